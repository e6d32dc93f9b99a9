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
