"""Preparation of runs: parameters created, a Gaussian start fitted, the first step size found."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ..density.call import Call
from ..dynamics.acceptance import Acceptance
from ..runs.pilot import back_off
from ..runs.run import Gradients
from ..starts.fitted import Gaussian
from ..tensors import ordinary_autograd, random_state, set_random_state
from .simulation import Simulation

_LOGGER = logging.getLogger("pyro_shortrun")
_GRID = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64)
_FIRST = 3
_CHAINS = 256
_MORE = 0.01  # nats by which another step is to be better
_FROZEN = 0.05  # share of rows


def prepare(
    simulation: Simulation, call: Call, chooses_step: bool, backs_off: bool, acceptance: Acceptance | None
) -> None:
    """Create what is missing, before a call's run.

    :param chooses_step: whether the step size is found by :func:`best_step`, after a fit.
    :param backs_off: whether it is lowered while pilot runs fail, as long as it is the first guess.
    :param acceptance: by which it is lowered instead, and tuned later.
    """
    layout, like = call.density.layout, next(iter(call.reading.unconstrained.values())).detach()
    dynamics, start = simulation.dynamics, simulation.start
    simulation.objective.setup(simulation.num_steps, layout, like)
    dynamics.setup(like)
    created = dynamics.step_size.setup(layout, simulation.num_steps, like)
    if isinstance(start, Gaussian) and not start.fitted:
        fit_start(simulation, call, chooses_step)
    if simulation.metric is not None and not simulation.metric.is_fitted:
        simulation.metric.fit(call, start)
        if chooses_step and start.has_density:
            with poutine.block():
                dynamics.step_size.fill(best_step(simulation, call))
    if created and backs_off and dynamics.step_size.is_at_init:  # a param store may know better
        pilot = replace(call, spare=[])  # the call's own draw is kept for its run
        if acceptance is not None:
            simulation.search(acceptance, pilot)
            return
        back_off(dynamics, lambda: simulation.pilot_fails(pilot), lambda: simulation.require_movable(pilot))


def fit_start(simulation: Simulation, call: Call, chooses_step: bool) -> None:
    """Fit the Gaussian that runs start from, and find the step size that goes with it."""
    assert isinstance(simulation.start, Gaussian)
    with poutine.block():
        simulation.start.pretrain(call)
        if chooses_step:
            simulation.dynamics.step_size.fill(best_step(simulation, call))


def pretrain(guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Set a guide up, or fit its Gaussian start again.

    :raises ValueError: where it has none.
    """
    before = guide._first
    guide.setup(*args, **kwargs)
    if not isinstance(guide.start, Gaussian):
        raise ValueError(f"pretrain is for start=Gaussian(), and this guide has {type(guide.start).__name__}.")
    if before is not None:
        with ordinary_autograd(), poutine.block(), guide._pyro_context:
            fit_start(guide._simulation, guide._bind(args, kwargs), guide._chooses_step)


@torch.no_grad()
def best_step(simulation: Simulation, call: Call) -> float:
    """The step size from .01 to .64 with the highest bound, found uphill from .08.

    :raises ValueError: where none has a finite bound.
    """
    call = replace(call, density=call.model, spare=[])  # no graph for a few runs
    random, bounds = random_state(), dict[int, float]()

    def bound(place: int) -> float:
        if place not in bounds:
            set_random_state(random)
            bounds[place] = _bound(simulation, call, _GRID[place])
        return bounds[place]

    place = _FIRST
    with poutine.block():
        for way in (1, -1):
            while 0 <= place + way < len(_GRID) and bound(place + way) > bound(place) + _MORE:
                place += way
        while place > 0 and bound(place) == -torch.inf:  # smaller steps may do
            place -= 1
    if bound(place) == -torch.inf:
        raise ValueError(
            f"runs from the Gaussian start are not finite even at step size {_GRID[0]}: the posterior is far from a "
            "Gaussian. Write scale parameters non-centred (poutine.reparam), check the data for NaN, or pass "
            "start=Prior() or a step_size."
        )
    _LOGGER.info("step size %g: bound %.5g nats, from %d runs", _GRID[place], bound(place), _CHAINS)
    return _GRID[place]


def _bound(simulation: Simulation, call: Call, step_size: float) -> float:
    layout, structure = call.density.layout, call.density.structure
    eta = torch.full((simulation.num_steps, layout.size), step_size, dtype=structure.dtype, device=structure.device)
    objective = simulation.informed(call, eta, training=False)
    drawn, result = simulation.run(call, _CHAINS, eta, objective, True, Gradients.NONE)
    weights = _log_weights(call, drawn.log_q, result.increment, result.end)
    known = weights.isfinite() & ~result.info.frozen.any(-1)
    return weights[known].mean().item() if known.float().mean() >= 1 - _FROZEN else -torch.inf


def _log_weights(call: Call, log_q: Tensor, increment: Tensor, end: Tensor) -> Tensor:
    return (call.density(end) - log_q + increment).sum(-1)
