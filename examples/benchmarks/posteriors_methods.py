"""The methods of posteriors.py that are Pyro's: each gets a program and gives draws, a bound and its CPU seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from posteriors_models import Draws
from pyro.infer import MCMC, NUTS, Trace_ELBO
from pyro.infer.autoguide import (
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoMultivariateNormal,
    AutoNormal,
)
from torch import Tensor

from pyro_shortrun import ShortRunGuide, ShortRunLangevin, VectorizedMCMC, psis
from pyro_shortrun.dynamics import Dense


@dataclass(frozen=True)
class Budget:
    """What each method may take.

    :param draws: that are timed.
    :param more: that errors are taken from, where draws are independent, besides.
    :param steps: of training.
    :param nuts: draws of warm-up and after it.
    :param chains: how many at once by VectorizedMCMC, of how many draws of warm-up and after it.
    :param seconds: of CPU time for training or sampling, instead of ``steps`` and ``nuts``.
    """

    draws: int = 1000
    more: int = 4000
    steps: int = 2000
    nuts: tuple[int, int] = (500, 1000)
    chains: tuple[int, int, int] = (64, 200, 16)
    seconds: float | None = None


@dataclass(frozen=True)
class Found:
    """Draws ``(chains, draws, *shape)`` by site; Pareto shape of the weights, bound in nats, CPU seconds."""

    draws: Draws
    k_hat: float | None
    bound: float | None
    seconds: float


Model, Args = Callable[..., Any], tuple[Any, ...]


class Clock:
    """CPU seconds, and which share of the work is over: of the seconds if they are limited, of the steps otherwise."""

    def __init__(self, seconds: float | None, steps: int) -> None:
        self._began, self._seconds, self._steps, self._done = time.process_time(), seconds, steps, 0

    @property
    def seconds(self) -> float:
        return time.process_time() - self._began

    def tick(self) -> float:
        """Told of every step."""
        self._done += 1
        return self.progress

    @property
    def progress(self) -> float:
        return self._done / self._steps if self._seconds is None else self.seconds / self._seconds


def arrays(draws: dict[str, Tensor]) -> Draws:
    return {k: v.detach().numpy() for k, v in draws.items()}


# ---------------------------------------------------------------- this package's


def swap(adjust: int | None, model: Model, args: Args, budget: Budget) -> Found:
    """A guide without an argument, and without training."""
    clock = Clock(None, 1)
    guide = ShortRunGuide(model)
    guide.sample_posterior(*args, num_samples=budget.draws, adjust=adjust)
    seconds = clock.seconds
    draws = guide.sample_posterior(*args, num_samples=budget.more, adjust=adjust)
    _, drawn = guide.weighted_draws(args, {}, min(200, budget.draws))
    bound = (drawn.log_p - drawn.log_q).mean().item() if drawn.log_p is not None and drawn.log_q is not None else None
    return Found(arrays(draws), shape_of(model, guide, args), bound, seconds)


def chains(model: Model, args: Args, budget: Budget) -> Found:
    """Adjusted Langevin chains from the fitted Gaussian."""
    clock, (count, warmup, each) = Clock(None, 1), budget.chains
    kernel = ShortRunLangevin(model, num_steps=10, persistent=True, adjust=True, preconditioner=Dense())
    mcmc = VectorizedMCMC(kernel, each, warmup, num_chains=count, disable_progbar=True)
    mcmc.run(*args)
    return Found(arrays(mcmc.get_samples(group_by_chain=True)), None, None, clock.seconds)


def shape_of(model: Model, guide: Any, args: Args) -> float | None:
    """Pareto shape of the log weights; None where the model cannot be run for many draws at once."""
    try:
        return psis(model, guide, *args).k.item()
    except (RuntimeError, ValueError, NotImplementedError):
        return None


# ---------------------------------------------------------------- Pyro's


def auto(kind: Any, rate: float, model: Model, args: Args, budget: Budget) -> Found:
    """An AutoGuide trained by Adam at a rate that falls to a hundredth, clipped."""
    clock, guide, losses, share = Clock(budget.seconds, budget.steps), kind(model), [], 0.0
    guide(*args)
    parameters = [p for p in guide.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(parameters, rate)
    elbo = Trace_ELBO()
    while share < 1:
        optimiser.zero_grad()
        losses.append(elbo.loss_and_grads(model, guide, *args))
        for p in parameters:
            p.grad.clamp_(-10, 10)
        optimiser.param_groups[0]["lr"] = rate * 0.01**share
        optimiser.step()
        share = clock.tick()
    if isinstance(guide, AutoLaplaceApproximation):
        guide = guide.laplace_approximation(*args)

    @torch.no_grad()
    def draws(count: int) -> dict[str, Tensor]:
        parts = [guide(*args) for _ in range(count)]
        return {k: torch.stack([z[k] for z in parts]).unsqueeze(0) for k in parts[0]}

    draws(budget.draws)
    seconds = clock.seconds
    with torch.no_grad():
        bound = -float(np.mean([elbo.loss(model, guide, *args) for _ in range(100)]))
    return Found(arrays(draws(budget.more)), shape_of(model, guide, args), bound, seconds)


def nuts(model: Model, args: Args, budget: Budget) -> Found:
    clock, (warmup, count) = Clock(budget.seconds, 1), budget.nuts
    if budget.seconds is None:
        mcmc = MCMC(NUTS(model), count, warmup, disable_progbar=True)
        mcmc.run(*args)
        return Found(arrays(mcmc.get_samples(group_by_chain=True)), None, None, clock.seconds)
    kernel, states = NUTS(model), []
    kernel.setup(warmup, *args)
    z = kernel.initial_params
    while clock.progress < 1:
        z = kernel.sample(z)
        states.append(z)
    kept = states[warmup:] if len(states) > warmup + 10 else states[len(states) // 2 :]  # never left warm-up
    sites = {k: torch.stack([z[k] for z in kept]).unsqueeze(0) for k in kept[0]}
    return Found(arrays({k: kernel.transforms[k].inv(v) for k, v in sites.items()}), None, None, clock.seconds)


def flow(model: Model) -> AutoIAFNormal:
    return AutoIAFNormal(model, hidden_dim=[32], num_transforms=2)


METHODS: dict[str, Callable[[Model, Args, Budget], Found]] = {
    "plain swap": partial(swap, None),
    "plain swap, adjust=0": partial(swap, 0),
    "AutoNormal": partial(auto, AutoNormal, 0.05),
    "AutoMultivariateNormal": partial(auto, AutoMultivariateNormal, 0.05),
    "AutoLaplaceApproximation": partial(auto, AutoLaplaceApproximation, 0.05),
    "AutoIAFNormal": partial(auto, flow, 0.01),
    "VectorizedMCMC": chains,
    "NUTS": nuts,
}
