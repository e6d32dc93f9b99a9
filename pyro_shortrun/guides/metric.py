"""The metric of a guide's runs: coordinates of unit scales, found by pilot chains from its start."""

from __future__ import annotations

from dataclasses import replace

import torch
from pyro import poutine
from torch import Tensor, nn

from ..density.affine import Affine
from ..density.call import Call
from ..density.layout import Layout, require_full_plates
from ..density.structure import Structure
from ..dynamics.metric import Dense, Preconditioner
from ..runs.pilot import pilot_metric
from ..starts.fitted import Gaussian
from ..starts.start import Framed, Start, StartDraw

_MAX_SIZE = 300  # coordinates of a row
_ROWS = 256  # of pilot chains
_TRANSITIONS = 400


class Metric(nn.Module):
    """Coordinates ``v`` of every row, ``u = L v``, in which runs move.

    :param preconditioner: how ``L`` is found.
    """

    factor: Tensor

    def __init__(self, preconditioner: Preconditioner) -> None:
        super().__init__()
        self.preconditioner = preconditioner

    @property
    def is_fitted(self) -> bool:
        """Whether there are coordinates."""
        return "factor" in self._buffers

    @property
    def frame(self) -> Affine:
        """The coordinates."""
        return Affine(torch.zeros_like(self.factor[0]), self.factor)

    @torch.no_grad()
    def fit(self, call: Call, start: Start) -> None:
        """Find the coordinates, by Metropolis-adjusted chains from the start; one for all rows."""
        chains = max(4, _ROWS // max(call.density.layout.rows, 1))
        with poutine.block():
            begin = start.draw(replace(call, spare=[]), chains).state.detach()
            factor = pilot_metric(call.model, begin, self.preconditioner, _TRANSITIONS)
        covariance = factor.square() if factor.dim() == 2 else factor @ factor.mT
        mean = covariance.mean(0)
        self.register_buffer("factor", mean.sqrt().diag() if factor.dim() == 2 else torch.linalg.cholesky(mean))

    def framed(self, drawn: StartDraw) -> StartDraw:
        """A draw of the start with its place in these coordinates."""
        if drawn.framed is not None or not self.is_fitted:
            return drawn
        base = None if drawn.base is None else drawn.base.inside(self.frame)
        return replace(drawn, framed=Framed(self.frame, self.frame.inward(drawn.state), base))


def arrange(structure: Structure, start: Start, metric: Metric | None) -> Structure:
    """The structure with the rows that a start takes; with shared and local latents in one where all may be correlated.

    :raises ValueError: where there can be no metric.
    """
    structure = start.arrange(structure)
    if metric is None:
        return structure
    layout = structure.layout
    require_full_plates(layout, "pass metric=None, or run")
    if isinstance(start, Gaussian):
        raise ValueError("start=Gaussian() has coordinates of its own: leave metric= out, or pass start=Prior().")
    if layout.size > _MAX_SIZE:
        raise ValueError(f"rows have {layout.size} coordinates, and metric= takes {_MAX_SIZE}: pass metric=None.")
    if layout.is_arrow and isinstance(metric.preconditioner, Dense):
        return replace(structure, layout=Layout(layout.sites, ()), vectorizes={})
    return structure
