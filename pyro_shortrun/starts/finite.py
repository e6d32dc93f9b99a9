"""Starts that are not finite: drawn again, or refused by the name of a site."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from ..density.model import LogDensity
from ..density.trust import offender

Drawn = TypeVar("Drawn")
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


def require_gradient(model: LogDensity, state: Tensor, others: Tensor) -> None:
    """Refuse a model whose log density has no gradient wherever runs begin: they would all stay there.

    :param state: where the runs of a call began, ``(chains, rows, size)``.
    :param others: further starts.
    :raises ValueError: naming the first site that is to blame.
    """
    for u in (others, state):
        found = model.value_and_grad(u.detach())[1].isfinite().all(-1)
        if found.any():
            return
    what = "the gradient of the log density is not finite at any start of a run"
    require_finite(found, model, state, what, CHECK_GRADIENT)
