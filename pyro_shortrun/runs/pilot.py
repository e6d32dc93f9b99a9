"""Pilot runs: a first guess of the step size is lowered until they succeed, and a metric is learned."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from ..density.interface import Density
from ..density.layout import Layout
from ..dynamics.adaptation import Adaptation
from ..dynamics.dynamics import Dynamics
from ..dynamics.langevin import Langevin
from ..dynamics.metric import Preconditioner
from ..dynamics.metropolis import BEST_ACCEPTANCE
from ..objectives.path import PathDensity
from .run import run
from .transitions import Given, Place, Transitions

_LOGGER = logging.getLogger("pyro_shortrun")

_MAX_HALVINGS = 20
_STIFF_DRIFT = 1.0
_PILOT_ROWS = 16
_FAILURES = 0.25  # share of rows
_FIRST_STEP = 0.1  # of chains that learn a metric
_AT_ONCE = 16  # transitions of these


def back_off(dynamics: Dynamics, fails: Callable[[], bool], blame: Callable[[], object] = lambda: None) -> None:
    """Halve a step size that was a first guess while pilot runs fail, with the drift clipped more tightly.

    :param blame: raises where something else than the step size is to blame.
    :raises ValueError: where they fail at its floor, a millionth of the first guess, too.
    """
    first, halvings = dynamics.step_size.init, 0
    while fails():
        if halvings == _MAX_HALVINGS:
            blame()
            raise ValueError(
                f"step_size {first:g} was halved {halvings} times, and pilot runs still meet eta * curvature > 1 or "
                "are not finite: the start is far from the posterior, or scales differ by orders of magnitude. Use "
                "start=Gaussian(), whose coordinates have unit scales, or scale the data; StepSize(...) insists."
            )
        dynamics.step_size.shrink(0.5)
        dynamics.max_drift = _STIFF_DRIFT
        halvings += 1
    if halvings:
        _LOGGER.warning(
            "step_size %g is too large for this model (eta * curvature > 1 along pilot runs from the start): "
            "beginning at %.2g with max_drift=%g. Pass StepSize(%g) to insist on it.",
            first,
            first * 0.5**halvings,
            _STIFF_DRIFT,
            first,
        )


def pilot_chains(layout: Layout) -> int:
    """How many chains make a pilot."""
    return max(1, _PILOT_ROWS // max(layout.rows, 1))


@torch.no_grad()
def pilot_metric(density: Density, start: Tensor, preconditioner: Preconditioner, total: int) -> Tensor:
    """The factor of a metric that Metropolis-adjusted chains from ``start``, ``(chains, rows, size)``, learn in
    ``total`` transitions; of every row."""
    like = torch.zeros_like(start[0])
    adaptation = Adaptation(
        like, total, BEST_ACCEPTANCE, preconditioner, 0.5 * like.shape[-1] ** (-1 / 3) / _FIRST_STEP
    )
    block = Transitions(Langevin(), preconditioner, adjust=True, wanted=BEST_ACCEPTANCE)
    here = Place(start, adaptation.scales.whiten(start), *density.value_and_grad(start))
    while adaptation.ahead:
        count = min(adaptation.ahead, _AT_ONCE)
        noise, uniform = torch.randn(count, *start.shape).to(start), torch.rand(count, *start.shape[:2]).to(start)
        given = Given(noise, uniform.log(), like.new_full((count, like.shape[-1]), _FIRST_STEP), noise)
        here, following, passed = block.follow(density, adaptation, here, given)
        adaptation.note(passed.u, passed.grad)
        if adaptation.advance(following, count):
            here = here._replace(white=adaptation.scales.whiten(here.u))
    return adaptation.factor


@torch.no_grad()
def pilot_fails(density: Density, dynamics: Dynamics, start: Tensor, step_size: Tensor) -> bool:
    """Whether more than a quarter of Langevin runs from ``start`` meet a non-finite state or steps with
    ``eta * lambda_max(-H) >= 1``: whatever the objective will be, such a step folds the space.

    :param start: states ``(chains, rows, size)``.
    :param step_size: ``(K, size)``.
    """
    # With a step size of its own, which is not used: a module that is given to another one changes its name.
    judge = Langevin(noise=dynamics.has_noise, max_drift=dynamics.max_drift)
    info = run(density, judge, PathDensity(), start, step_size).info
    return bool((info.frozen | info.singular).float().mean() > _FAILURES)
