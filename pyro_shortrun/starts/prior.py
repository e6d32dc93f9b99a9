"""Prior: every run starts at a fresh draw from the model's own prior."""

from __future__ import annotations

import logging
from functools import partial

import torch
from torch import Tensor

from ..checks import check_count
from ..density.call import Call
from ..density.rows import joint_and_prior
from ..tensors import keep_rows
from .base import PriorBase
from .finite import redrawn
from .start import Start, StartDraw

_LOGGER = logging.getLogger("pyro_shortrun")


class Prior(Start):
    r"""Fresh draws from the model's own prior, for every run: the papers' start.

    ``log q_0(u) = log p(z(u)) + log |dz/du|`` over the latent sites alone; ``pyro.factor`` terms do not belong to it.
    Rows whose log density is not finite are drawn again (a logged warning says so once). The start is then the prior
    cut to where the model's density is finite while ``log q_0`` stays the prior's, so that the bound is too high by
    ``-log P(finite)`` per row.

    :param tries: how often a row is drawn again before the run is refused.
    :raises ValueError: at a call, for an improper prior, and where rows are not finite after all tries.
    """

    def __init__(self, tries: int = 20) -> None:
        check_count("tries", tries)
        self.tries = tries
        self._told = False

    def draw(self, call: Call, chains: int) -> StartDraw:
        known = joint_and_prior(call.model.structure, call.spare[-1]) if chains == 1 and call.spare else None
        u = call.prior(chains)
        value, prior = known or call.model.with_start(u)
        drawn = StartDraw(u, prior, value, PriorBase())
        if call.density.is_traced:
            return drawn
        bad = ~drawn.finite
        if bad.any():
            drawn = redrawn(drawn, lambda one: ~one.finite, partial(_again, call), self.tries)
            if drawn.finite.all():  # else the run is refused
                self._tell(int(bad.sum()), bad.numel())
        return drawn

    def _tell(self, bad: int, rows: int) -> None:
        if not self._told:
            self._told = True
            _LOGGER.warning(
                "%d of %d start rows had no finite log density and were drawn again: the bound is too high by "
                "-log P(finite). Consider start=Init(init_to_median).",
                bad,
                rows,
            )


def _again(call: Call, drawn: StartDraw, bad: Tensor) -> StartDraw:
    """The draw with bad rows drawn anew, in a run of the model for every chain that has some."""
    with torch.no_grad():
        pairs = zip(bad, drawn.state, strict=True)
        again = torch.stack([call.redraw() if rows.any() else state for rows, state in pairs])
    u = keep_rows(bad, again, drawn.state)
    value, prior = call.model.with_start(u)
    return StartDraw(u, prior, value, drawn.base)
