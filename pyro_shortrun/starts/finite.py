"""Starts that are not finite: drawn again, or refused by the name of a site."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from ..density.call import Call
from ..density.model import LogDensity
from ..density.trust import offender
from ..tensors import random_state, set_random_state
from .start import Start

Drawn = TypeVar("Drawn")
_OTHERS = 8  # starts
CHECK_MODEL = (
    "check the data for NaN, the observation's support, and the priors, or pass another start, such as "
    "start=Init(init_to_median)"
)

CHECK_GRADIENT = (
    "look for NaN behind a mask, sqrt(0), 0 * inf and the like in the model (pyro.enable_validation(True) names more), "
    "or pass another start, such as start=Init(init_to_median)"
)


def redrawn(drawn: Drawn, bad: Callable[[Drawn], Tensor], again: Callable[[Drawn, Tensor], Drawn], tries: int) -> Drawn:
    """The draw, its bad rows drawn again until there are none, or ``tries`` times.

    :param bad: marks rows, ``(chains, rows)``.
    :param again: the draw with such rows drawn anew.
    """
    for _ in range(tries):
        rows = bad(drawn)
        if not rows.any():
            break
        drawn = again(drawn, rows)
    return drawn


def require_finite(finite: Tensor, model: LogDensity, state: Tensor, what: str, remedy: str = CHECK_MODEL) -> None:
    """Refuse states ``(chains, rows, size)`` that are not all ``finite``, ``(chains, ...)``.

    :param what: what is not finite, and where.
    :raises ValueError: naming the first site that is to blame.
    """
    if not finite.all():
        chain = int((~finite).reshape(len(finite), -1).any(1).nonzero()[0])
        raise ValueError(f"{what}, first at {offender(model, state[chain].detach())}: {remedy}.")


def require_gradient(model: LogDensity, states: Tensor) -> None:
    """Refuse a model whose log density has no gradient at any of these states, ``(chains, rows, size)``.

    :raises ValueError: naming the first site that is to blame.
    """
    if not model.value_and_grad(states.detach())[1].isfinite().all(-1).any():
        what = "the gradient of the log density is not finite at any start of a run"
        nowhere = torch.zeros(states.shape[:-1], dtype=torch.bool)
        require_finite(nowhere, model, states, what, CHECK_GRADIENT)


def require_movable(call: Call, start: Start, begin: Tensor, end: Tensor, frozen: Tensor) -> None:
    """Refuse a model whose log density has no gradient wherever runs begin: they would all stay there.

    :param begin: where the runs of a call began, and ``end``, where they are, ``(chains, rows, size)``.
    :param frozen: rows that met something that is not finite, ``(chains, rows)``.
    :raises ValueError: naming the first site that is to blame.
    """
    if not (frozen.all() and end.equal(begin)):
        return
    random = random_state(begin.device)
    others = [start.draw(replace(call, spare=[]), 1).state for _ in range(_OTHERS)]  # the run may have been unlucky
    set_random_state(random, begin.device)
    require_gradient(call.model, torch.cat([begin, *others]))
