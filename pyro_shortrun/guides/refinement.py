"""What is made of the ends of runs: resampled by their weights, and moved on by Metropolis-adjusted steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..density.affine import Affine, AffineDensity
from ..density.call import Call
from ..density.interface import Density
from ..density.layout import Layout, require_full_plates
from ..dynamics.adaptation import Following
from ..dynamics.langevin import Langevin
from ..dynamics.metric import Identity
from ..dynamics.metropolis import BEST_ACCEPTANCE
from ..objectives.objective import Objective
from ..runs.transitions import Given, Place, Transitions
from ..starts.fitted import Gaussian
from ..starts.start import Start
from .draws import WeightedDraws
from .smoothing import smoothed

_NUMBERS_AT_ONCE = 2**22
_FOLLOWS, _STAYS = (1.0, 1.0, 1.0, 0.0), (1.0, 0.0, 1.0, 0.0)  # gains
_ADJUST = 20  # steps
_ENOUGH = 100  # draws for a tail of weights
_MEAN_EXISTS = 1.0  # Pareto shapes below
_NOTHING = 100.0  # nats


class Adjusted(NamedTuple):
    """States after adjusted steps, ``(chains, rows, size)``, and the share of proposals accepted in the last one."""

    state: Tensor
    acceptance: float


@torch.no_grad()
def adjust(density: Density, state: Tensor, step_size: Tensor | None, num_steps: int) -> Adjusted:
    r"""Langevin steps with Metropolis tests (MALA), every chain and row by itself: they leave ``pi`` as it is, and
    bring whatever they begin with closer to it.

    In the first half of the steps the step size is adapted to an acceptance of .574, by all chains together and for
    every row by itself.

    Roberts, Tweedie: Exponential convergence of Langevin distributions and their discrete approximations, 1996.

    :param state: ``(chains, rows, size)``.
    :param step_size: ``(size,)``, to begin with; None for ``.5 / size ** (1 / 3)``, in coordinates of unit scales.
    """
    size = state.shape[-1]
    first = state.new_full((size,), 0.5 / size ** (1 / 3)) if step_size is None else step_size
    block = Transitions(Langevin(), Identity(), adjust=True, wanted=BEST_ACCEPTANCE)
    here = Place(state, state, *density.value_and_grad(state))
    zero, factor = torch.zeros_like(here.log_density), state.new_ones(state.shape[1:])
    following, acceptance = Following(zero, zero, zero), math.nan
    gains = state.new_tensor([_FOLLOWS if k < num_steps // 2 else _STAYS for k in range(num_steps)])
    most = max(1, _NUMBERS_AT_ONCE // max(state.numel(), 1))
    count = next(n for n in range(min(most, max(num_steps, 1)), 0, -1) if num_steps % n == 0)
    for k in range(0, num_steps, count):
        noise, uniform = torch.randn(count, *state.shape).to(state), torch.rand(count, *zero.shape).to(state)
        given = Given(noise, uniform.log(), first.expand(count, size), gains[k : k + count])
        here, following, passed = block.run(density, here, following, given, zero, True, factor)
        acceptance = passed.acceptance[-1].mean().item()
    return Adjusted(here.u, acceptance)


@dataclass(frozen=True)
class Plan:
    """What is made of draws: ``adjust`` steps after they were resampled, which with None they are where the weights
    have a mean."""

    adjust: int
    resample: bool | None

    @classmethod
    def of(cls, start: Start, objective: Objective, count: int, adjust: int | None, resample: bool | None) -> Plan:
        """The default: draws from a Gaussian are adjusted, and ``count`` of them resampled where that goes before, so
        that steps separate those chosen twice; draws from other starts are not."""
        fitted = isinstance(start, Gaussian)
        adjust = (_ADJUST if fitted else 0) if adjust is None else adjust
        if resample is None and not (fitted and objective.weighs and count >= _ENOUGH and adjust):
            resample = False
        return cls(adjust, resample)

    @property
    def is_empty(self) -> bool:
        """Whether draws stay as they are."""
        return not self.adjust and self.resample is False


class Refined(NamedTuple):
    """Draws, the acceptance of the last adjusted step, and the Pareto shape of the weights; None where none were.
    ``moving`` are the sites whose means the weights move most."""

    draws: WeightedDraws
    acceptance: float | None
    k_hat: float | None
    moving: str


def refine(call: Call, drawn: WeightedDraws, plan: Plan, frame: Affine | None, step_size: Tensor) -> Refined:
    """Draws as planned.

    :param frame: coordinates to move in, if not the latents' own.
    :param step_size: to begin with in these, ``(size,)``.
    """
    require_full_plates(call.density.layout, "adjust and resample")
    end, k_hat, moving, num_steps, acceptance = drawn.end, None, "", plan.adjust, None
    if plan.resample is not False:
        if drawn.log_p is None or drawn.log_q is None:
            raise ValueError("draws of this start or objective have no weights: sample_posterior(..., resample=False).")
        lines, k_hat = _smoothed(drawn.log_p - drawn.log_q)
        moving = _moving(call.density.layout, end if frame is None else frame.inward(end), lines)
        if plan.resample or k_hat < _MEAN_EXISTS:
            end = end[resampled(lines, len(end))]
    if num_steps:
        density = call.density if frame is None else AffineDensity(call.density, frame)
        state, first = (end, step_size) if frame is None else (frame.inward(end), None)
        moved = adjust(density, state, first, num_steps)
        end, acceptance = moved.state if frame is None else frame.outward(moved.state), moved.acceptance
    values, _ = call.model.constrain(end)
    return Refined(replace(drawn, values=values, end=end, log_p=None, log_q=None), acceptance, k_hat, moving)


def _smoothed(log_weights: Tensor) -> tuple[Tensor, float]:
    """Smoothed log weights and their shape; those that are not finite count as nearly nothing."""
    known = log_weights.isfinite()
    least = log_weights[known].min() if known.any() else log_weights.new_zeros(())
    lines, tail = smoothed(torch.where(known, log_weights, least - _NOTHING).double().cpu().numpy())
    return torch.as_tensor(lines, device=log_weights.device), float(tail)


def _moving(layout: Layout, state: Tensor, log_weights: Tensor) -> str:
    """The sites whose weighted mean is furthest from the plain one, in standard deviations: all that are more than half
    as far as the first."""
    share = log_weights.softmax(0).to(state)[:, None, None]
    shift = ((share - 1 / len(state)) * state).sum(0, keepdim=True).abs() / state.std(0, keepdim=True)
    far = {name: value.max().item() for name, value in layout.unpack(shift).items()}
    return ", ".join(f"'{name}'" for name in far if far[name] > 0.5 * max(far.values()))


def resampled(log_weights: Tensor, count: int) -> Tensor:
    """Indices of ``count`` draws in proportion to their weights, by one uniform number (systematic resampling).

    Kitagawa: Monte Carlo filter and smoother for non-Gaussian nonlinear state space models, 1996.
    """
    levels = log_weights.double().softmax(0).cumsum(0)
    places = (torch.arange(count, device=levels.device) + torch.rand((), device=levels.device)) / count
    return torch.searchsorted(levels, places.to(levels) * levels[-1]).clamp(max=len(levels) - 1)
