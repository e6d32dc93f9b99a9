"""Tuning by comparison: the bound at a grid of step sizes, with the same randomness for each."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from ..checks import check_count, check_kind, check_share
from ..density.call import Call
from ..runs.record import ShortRun
from ..runs.run import Gradients
from ..starts.start import StartDraw
from ..tensors import ordinary_autograd, random_state, set_random_state
from .short_run import ShortRunGuide

_LOGGER = logging.getLogger("pyro_shortrun")
_FACTORS = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)


class Grid(NamedTuple):
    """What :func:`tune_on_grid` found: ``factors`` of the step sizes, the ``bound`` (nats) and the share of ``invalid``
    rows of each (frozen, or with a step that was not invertible, which :class:`PathDensity` alone finds out), all
    ``(factors,)``, and the ``best`` factor."""

    factors: Tensor
    bound: Tensor
    invalid: Tensor
    best: float


@dataclass(frozen=True)
class Trial:
    """Runs of a guide with some step sizes: the call they were made in, their starts, and what became of them."""

    call: Call
    drawn: StartDraw
    run: ShortRun

    @cached_property
    def _landed(self) -> tuple[Tensor, ...]:
        return self.run.landed or self.call.model.land(self.run.end)

    @property
    def weight(self) -> float:
        """How many rows each row of a subsampled plate stands for."""
        return self.call.density.layout.row_weight

    def log_joint(self) -> Tensor:
        """``log p(x, z_K)``, ``(runs,)``."""
        density, jacobian, *_ = self._landed
        return (density - self.weight * jacobian).sum(-1)

    def log_weights(self) -> Tensor:
        """``log p(x, z_K) - log q(z_K)`` of single rows, ``(runs, rows)``."""
        return self._landed[0] / self.weight - self.drawn.log_q + self.run.increment

    def log_weight(self) -> Tensor:
        """The same of all the data, ``(runs,)``, as :meth:`ShortRunGuide.log_weight` gives it."""
        return self.weight * self.log_weights().sum(-1)

    @property
    def invalid(self) -> Tensor:
        """Share of the rows that froze or took a step that was not invertible."""
        return (self.run.info.frozen | self.run.info.singular).float().mean()


class Trials:
    """Runs of a guide at other step sizes and lengths, with the same randomness for each; the guide stays as it is.

    :param count: runs for each.
    :raises ValueError: where this is no ShortRunGuide.
    """

    def __init__(self, guide: ShortRunGuide, args: tuple[Any, ...], kwargs: dict[str, Any], count: int) -> None:
        check_kind("guide", guide, ShortRunGuide, "ShortRunGuide(model)")
        guide.setup(*args, **kwargs)
        self._guide, self._args, self._kwargs, self._count = guide, args, kwargs, count
        self._random = random_state()

    def __call__(self, factor: float, num_steps: int | None = None) -> Trial:
        set_random_state(self._random)
        return self._trial(factor, num_steps)

    @torch.no_grad()
    def _trial(self, factor: float, num_steps: int | None) -> Trial:
        """Step sizes of single steps are stretched over the run."""
        guide = self._guide
        steps = num_steps or guide.num_steps
        with ordinary_autograd(), poutine.block():
            call = guide._bind(self._args, self._kwargs)
            own = guide.dynamics.step_size(call.density.layout, guide.num_steps).detach()
            eta = factor * own[torch.arange(steps, device=own.device) * guide.num_steps // steps]
            account, resized = guide.has_density, guide.objective.resized(steps)
            simulation = replace(guide._simulation, num_steps=steps, objective=resized)
            objective = simulation.informed(call, eta, training=False) if account else resized
            return Trial(call, *simulation.run(call, self._count, eta, objective, account, Gradients.NONE))


@torch.no_grad()
def tune_on_grid(
    guide: ShortRunGuide,
    *args: Any,
    factors: Sequence[float] = _FACTORS,
    num_particles: int = 16,
    max_invalid: float = 0.05,
    **kwargs: Any,
) -> Grid:
    r"""Multiply the step sizes of a guide by the factor whose bound is largest.

    For every factor the bound ``E[log p(x, z_K) - log q(z_K)]`` of the guide's objective is estimated from
    ``num_particles`` runs with the same start, noise and probes (common random numbers), the model's parameters held
    fixed. Factors with more than ``max_invalid`` of their rows invalid are left out. The papers search like this every
    few epochs; call it between steps of SVI, with ``StepSize(..., learnable=False)`` or besides its gradients.

    Nijkamp et al., ECCV 2020; Pang et al., EACL 2021, section 2.5.

    :param guide: set up or not.
    :param args: the model's arguments, preferably data that is not trained on, as ``kwargs``.
    :param factors: candidates; those that would leave ``(0, max)`` are left out.
    :param max_invalid: a share between 0 and 1.
    :raises ValueError: where every candidate is left out, or an argument is out of range.

    >>> import pyro, pyro.distributions as dist
    >>> from pyro_shortrun import Langevin, Prior, StepSize
    >>> from pyro_shortrun.guides import tune_on_grid
    >>> def model(x):
    ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    ...     pyro.sample("x", dist.Normal(loc, 0.5), obs=x)
    >>> guide = ShortRunGuide(model, dynamics=Langevin(StepSize(0.001, learnable=False)), start=Prior())
    >>> tune_on_grid(guide, torch.tensor(1.0)).best
    4.0
    """
    check_count("num_particles", num_particles)
    check_share("max_invalid", max_invalid, "0.05")
    if not (isinstance(factors, Sequence) and factors and all(isinstance(f, (int, float)) and f > 0 for f in factors)):
        raise ValueError(f"factors must be a sequence of numbers > 0, got {factors!r}.")
    trials = Trials(guide, args, kwargs, num_particles)
    if not guide.has_density:
        raise NotImplementedError(f"{type(guide.start).__name__} starts have no density, and so there is no bound.")
    step_size = guide.dynamics.step_size
    first = step_size.value.detach().clone()
    known = [f for f in factors if f > 0 and (first * f < step_size.max).all()]
    bounds, invalid = [], []
    for factor in known:
        trial = trials(factor)
        bounds.append(trial.log_weight().mean())
        invalid.append(trial.invalid)
    good = [i for i, share in enumerate(invalid) if share <= max_invalid and bounds[i].isfinite()]
    if not good:
        raise ValueError(
            f"no factor among {list(factors)} leaves step sizes inside (0, {step_size.max:g}) and at least "
            f"{1 - max_invalid:.0%} of the rows valid: begin with another step size."
        )
    best = max(good, key=lambda i: bounds[i])
    step_size.assign(first * known[best])
    if len(known) > 1 and known[best] in (min(known), max(known)):
        _LOGGER.info("the best factor, %g, is at the edge of the grid: call tune_on_grid again.", known[best])
    return Grid(torch.tensor(known), torch.stack(bounds), torch.stack(invalid), known[best])
