"""What every method of gradients.py is given and gives back, and the methods it is compared with, all in Pyro.

These programs were not written for batches, so that AutoGuides draw their particles in a plate and the log joint is
taken under `torch.vmap`: the value and gradient of `Trace_ELBO(num_particles=P)`. For the same reason SVGD moves one
site, the vector of all unconstrained coordinates.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import torch
from posteriordb_models import Draws, Flat, Posterior
from pyro import poutine
from pyro.infer import NUTS, SVGD, SVI, RBFSteinKernel
from pyro.infer.autoguide import AutoGuide, AutoIAFNormal, AutoMultivariateNormal, AutoNormal
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to, constraints

NUM_DRAWS = 4000
DECAY = 0.01  # of the learning rate, from the first step to the last
PROBE_DRAWS = 1000
START_RATE, ALONE = 0.05, 0.25  # starts of runs are trained by themselves for that share of the budget
COMPILING = 3  # first steps, which the clock leaves out


def is_latent(site: dict) -> bool:
    return site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)


class Bound:
    """A posterior with its data, and its log density over flat unconstrained ``u``, ``(N, size)``."""

    def __init__(self, posterior: Posterior, data: dict) -> None:
        self.posterior, self.model, self.args = posterior, posterior.model, posterior.arguments(data)
        nodes = poutine.trace(self.model).get_trace(*self.args).nodes
        sites = [s for s in nodes.values() if is_latent(s)]
        self.transforms = {s["name"]: biject_to(s["fn"].support) for s in sites}
        self._shapes = {s["name"]: self.transforms[s["name"]].inv(s["value"]).shape for s in sites}
        self.size = sum(shape.numel() for shape in self._shapes.values())

    def unpack(self, u: Tensor) -> Draws:
        """Unconstrained site values, ``(..., *shape)``."""
        parts = u.split([shape.numel() for shape in self._shapes.values()], -1)
        shapes = self._shapes.items()
        return {k: part.reshape((*u.shape[:-1], *shape)) for part, (k, shape) in zip(parts, shapes, strict=True)}

    def constrain(self, u: Tensor) -> Draws:
        """Site values, ``(..., *shape)``."""
        return {k: self.transforms[k](v) for k, v in self.unpack(u).items()}

    def free(self, draws: Draws) -> Tensor:
        """Unconstrained coordinates of draws ``(..., N, *shape)``, ``(N, size)``, all draws in one axis."""
        parts = [self.transforms[k].inv(draws[k]).reshape(-1, shape.numel()) for k, shape in self._shapes.items()]
        return torch.cat(parts, -1)

    def log_joint(self, values: Draws) -> Tensor:
        """Pyro's log joint of site values ``(N, *shape)``, which no handler sees, ``(N,)``."""

        def one(point: Draws) -> Tensor:
            return poutine.trace(poutine.condition(self.model, point)).get_trace(*self.args).log_prob_sum()

        with pyro.validation_enabled(False), poutine.block():
            return torch.vmap(one)(values)

    def log_density(self, u: Tensor) -> Tensor:
        """The log joint plus ``log |dz/du|``, ``(N,)``."""
        free, values = self.unpack(u), self.constrain(u)
        terms = [self.transforms[k].log_abs_det_jacobian(v, values[k]) for k, v in free.items()]
        return self.log_joint(values) + sum(term.reshape(len(u), -1).sum(-1) for term in terms)


@dataclass(frozen=True)
class Fitted:
    """Draws ``{site: (1, N, *shape)}`` and, where the method has a bound, log weights of fresh draws.

    ``estimate`` tells that the log weights are not certain to be those of a bound, and ``note`` why. Without
    ``are_weights`` they are merely independent values whose mean is the bound.
    """

    draws: Draws
    log_weights: Tensor | None = None
    estimate: bool = False
    note: str = ""
    are_weights: bool = True


class Meter:
    """Counts gradients and seconds up to a limit of each; ``probe`` looks at draws at ``gradients / 2**k``.

    Neither the first steps, which compile, nor probes count towards the limit of seconds; ``elapsed`` has the former.
    """

    def __init__(self, gradients: int, seconds: float, probe: Callable[[Draws], float] | None, points: int = 7) -> None:
        self.budget, self.limit, self.spent = gradients, seconds, 0
        self.curve: list[tuple[int, float]] = []
        self.marks = [] if probe is None else [gradients // 2**k for k in range(points)]
        self._probe, self._begin, self._paused = probe, time.perf_counter(), 0.0
        self._steps, self._trained, self._last = 0, 0.0, self._begin

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self._begin - self._paused

    @property
    def progress(self) -> float:
        """Share of the budget that is spent; 1 ends the training."""
        return max(self.spent / self.budget, self._trained / self.limit)

    def restart(self) -> None:
        """Before steps of another kind, the first of which compile anew."""
        self._steps = 0

    def spend(self, gradients: int, draw: Callable[[], Draws | None]) -> None:
        """Told of every step when it was made."""
        self.spent += gradients
        self._steps += 1
        if self._steps > COMPILING:
            self._trained += time.perf_counter() - self._last
        if self.marks and self.spent >= self.marks[-1]:
            self.record(self.marks[-1], draw)
            self.marks = [mark for mark in self.marks if mark > self.spent]
        self._last = time.perf_counter()

    def record(self, mark: int, draw: Callable[[], Draws | None]) -> None:
        """Have the probe look at draws; the clock stands still meanwhile."""
        begin = time.perf_counter()
        draws = draw()
        if draws is not None and self._probe is not None:
            self.curve.append((mark, self._probe(draws)))
        self._paused += time.perf_counter() - begin


@dataclass(frozen=True)
class Method:
    """A name and how it is fitted."""

    name: str
    fit: Callable[[Bound, Meter], Fitted]


def train(
    step: Callable[[], Any],
    optimiser: Any,
    rate: float,
    gradients: int,
    meter: Meter,
    draw: Callable,
    until: float = 1.0,
) -> None:
    """Steps of an optimiser with a geometrically decaying rate until that share of the budget is spent."""
    begin = meter.progress
    while (progress := meter.progress) < until:
        progress = (progress - begin) / (until - begin)
        for one in optimiser.optim_objs.values():
            for group in one.param_groups:
                group["lr"] = rate * DECAY**progress
        step()
        meter.spend(gradients, draw)


# ---------------------------------------------------------------- AutoGuides


def particles(bound: Bound, guide: Callable, count: int) -> tuple[Tensor, Draws]:
    """``log p(x, z) - log q(z)``, ``(count,)``, and the guide's draws ``z``."""
    with pyro.validation_enabled(False), pyro.plate("particles", count, dim=-1):
        trace = poutine.trace(guide).get_trace(*bound.args)
    trace.compute_log_prob()
    log_q = sum(s["log_prob"] for s in trace.nodes.values() if is_latent(s))
    values = {k: trace.nodes[k]["value"] for k in bound.transforms}
    return bound.log_joint(values) - log_q, values


def loss_and_grads(bound: Bound, num_particles: int, model: Callable, guide: Any, *args: Any) -> float:
    """``Trace_ELBO`` with vectorised particles; what is not finite in a gradient counts as zero."""
    loss = -particles(bound, guide, num_particles)[0].mean()
    loss.backward()
    for p in guide.parameters():
        p.grad.nan_to_num_(0.0, 0.0, 0.0)
    return loss.item()


def fit_guide(
    guide: Any, rate: float, num_particles: int, bound: Bound, meter: Meter, until: float = 1.0
) -> Callable[[int], tuple[Tensor, Draws]]:
    """Train a guide until that share of the budget is spent; gives log weights and draws, as many as asked for."""
    optimiser, loss = pyro.optim.ClippedAdam({"lr": rate}), partial(loss_and_grads, bound, num_particles)
    guide(*bound.args)  # creates the parameters
    svi = SVI(bound.model, guide, optimiser, loss, loss)

    @torch.no_grad()
    def draws(count: int) -> tuple[Tensor, Draws]:
        parts = [particles(bound, guide, PROBE_DRAWS) for _ in range(count // PROBE_DRAWS)]
        return torch.cat([w for w, _ in parts]), {k: torch.cat([z[k] for _, z in parts])[None] for k in parts[0][1]}

    def step() -> None:
        svi.step(*bound.args)

    train(step, optimiser, rate, num_particles, meter, lambda: draws(PROBE_DRAWS)[1], until)
    return draws


def auto_guide(make: Callable, rate: float, num_particles: int, bound: Bound, meter: Meter) -> Fitted:
    log_weights, z = fit_guide(make(bound.model), rate, num_particles, bound, meter)(NUM_DRAWS)
    return Fitted(z, log_weights)


# ---------------------------------------------------------------- SVGD and NUTS


def svgd(num_particles: int, rate: float, bound: Bound, meter: Meter) -> Fitted:
    """Stein variational gradient descent from uniform(-2, 2); its draws are its particles."""

    def flat() -> None:
        u = pyro.sample("u", Flat(constraints.real, (), (bound.size,)))
        pyro.factor("log_density", bound.log_density(u.reshape(-1, bound.size)).reshape(u.shape[:-1]))

    optimiser = pyro.optim.Adam({"lr": rate})
    # The particles' plate must lie left of the model's: Pyro shares out dims even where handlers are blocked.
    steps = SVGD(flat, RBFSteinKernel(), optimiser, num_particles, max_plate_nesting=2)

    def draws() -> Draws:
        u = steps.get_named_particles()["u"].detach().reshape(1, num_particles, bound.size)
        return bound.constrain(u)

    train(steps.step, optimiser, rate, num_particles, meter, draws)
    return Fitted(draws())


def nuts(warmup: int, bound: Bound, meter: Meter) -> Fitted:
    """Draws after `warmup` transitions, as many as the budget allows."""
    kernel = NUTS(bound.model, jit_compile=True, ignore_jit_warnings=True)
    kernel.setup(warmup, *bound.args)
    potential, calls, states = kernel.potential_fn, [0], []

    def counted(z: dict) -> Tensor:
        calls[0] += 1
        return potential(z)

    def constrained(kept: list[dict]) -> Draws:
        return {k: t(torch.stack([z[k] for z in kept]))[None] for k, t in bound.transforms.items()}

    kernel.potential_fn, z = counted, kernel.initial_params
    while meter.progress < 1:
        z = kernel.sample(z)
        states.append(z)
        meter.spend(calls[0] - meter.spent, lambda: constrained(states[warmup:]) if len(states) > warmup else None)
    if len(states) > warmup + 1:
        return Fitted(constrained(states[warmup:]), note=f"{len(states) - warmup} draws")
    return Fitted(constrained(states[len(states) // 2 :]), note="never left warm-up")


def _auto_iaf(model: Callable) -> AutoGuide:
    return AutoIAFNormal(model, hidden_dim=[32], num_transforms=2)


RIVALS = [
    Method("AutoNormal", partial(auto_guide, AutoNormal, 0.05, 8)),
    Method("AutoMultivariateNormal", partial(auto_guide, AutoMultivariateNormal, 0.05, 8)),
    Method("AutoIAFNormal", partial(auto_guide, _auto_iaf, 0.01, 8)),
    Method("SVGD", partial(svgd, 50, 0.2)),
    Method("NUTS", partial(nuts, 300)),
]
