"""Reverse kernels of Langevin steps: densities of where a step came from, given where it arrived.

Any of them makes a valid bound; the better it resembles the law of the run, the tighter that is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..density.coordinates import dim_count, dim_index
from ..density.layout import Layout

_RIDGE = 1e-6  # of the features' variances
_PRIOR = 2.0  # draws that speak for a reverse step which is pure noise


class Reverse(ABC):
    """``log r(before | u)`` of a step ``u = before + drift + sqrt(2 eta) * noise``.

    ``parameters`` has ``(K, ...)`` tensors, one entry per step; ``learns`` tells whether :meth:`learn` is to be called.
    """

    parameters: tuple[Tensor, ...] = ()
    learns = False

    @property
    @abstractmethod
    def key(self) -> tuple[Any, ...]:
        """Everything that decides the arithmetic."""

    @abstractmethod
    def log_density(self, before: Tensor, u: Tensor, mean: Tensor, eta: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """Terms per coordinate that sum to ``log r(before | u)`` plus half of ``log(4 pi eta)``.

        :param mean: where the same step would go from ``u`` without noise.
        :param parameters: of this step.
        """

    def learn(self, before: Tensor, u: Tensor, drift: Tensor, valid: Tensor) -> None:
        """Told finished steps, ``(K, chains, rows, size)`` each, and which rows count."""
        return None


@dataclass(frozen=True)
class Mirror(Reverse):
    """The same Langevin step again, from ``u``."""

    key = ("mirror",)

    def log_density(self, before: Tensor, u: Tensor, mean: Tensor, eta: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        return -(before - mean).square() / (4 * eta)


@dataclass(frozen=True)
class Recorder(Mirror):
    """Weighs as :class:`Mirror`, for runs from which ``fit`` learns."""

    fit: Fit

    key = ("recorder",)
    learns = True

    def learn(self, before: Tensor, u: Tensor, drift: Tensor, valid: Tensor) -> None:
        self.fit.update(before, u, drift, valid)


@dataclass(frozen=True)
class Affine(Reverse):
    r"""A Gaussian that undoes the drift, and adds what a linear function says of the score of the run's law at ``u``,

    .. math:: r(u' \mid u) = N\big(u - a + 2 \eta (b + G u) + D a,\; s S s\big), \qquad s = \sqrt{2 \eta},

    with the drift :math:`a(u) = \eta \nabla\log\pi(u)`.

    :param dense: whether ``G``, ``D`` and ``S`` are matrices, or diagonals.
    :param parameters: as :meth:`Fit.solve` gives them.
    """

    dense: bool
    parameters: tuple[Tensor, ...]

    @property
    def key(self) -> tuple[Any, ...]:
        return "affine", self.dense

    def log_density(self, before: Tensor, u: Tensor, mean: Tensor, eta: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        width = 2 * eta
        slope = (mean - u) / width
        target = (before - u) / width + slope
        intercept, slopes, whiten = parameters
        if self.dense:
            residual = width.sqrt() * (target - intercept - torch.cat([u, slope], -1) @ slopes)
            return whiten.diagonal().log() - 0.5 * (residual @ whiten.mT).square()
        residual = target - intercept - slopes[0] * u - slopes[1] * slope
        return whiten.log() - 0.5 * (whiten * width.sqrt() * residual).square()


class Fit:
    """Least squares of what a step came from on what it arrived at, for every step, from sums over rows and chains.

    Dense, all coordinates of a row are regressed on all; else each on itself and its own gradient, and elements of a
    plate share their coefficients. Sums are in double precision.

    :param step_size: ``eta``, ``(K, size)``.
    """

    def __init__(self, layout: Layout, step_size: Tensor, dense: bool) -> None:
        self.dense = dense
        self._eta = step_size.detach()
        self._index = dim_index(layout).to(step_size.device)
        groups = dim_count(layout)
        self._shares = torch.bincount(self._index, minlength=groups).double()[:, None, None]
        count, size = step_size.shape
        shape = (count, self.width(layout, dense)) if dense else (count, groups, 4)
        self._sums = step_size.new_zeros((*shape, shape[-1]), dtype=torch.float64)
        self._count = step_size.new_zeros((), dtype=torch.float64)

    @staticmethod
    def width(layout: Layout, dense: bool) -> int:
        """How many numbers each draw has in a regression."""
        return 1 + 3 * layout.size if dense else 4

    def update(self, before: Tensor, u: Tensor, drift: Tensor, valid: Tensor) -> None:
        """Told finished steps, ``(K, chains, rows, size)`` each, and which rows count."""
        self._count = self._count + valid.sum()
        keep = valid.unsqueeze(-1)
        for k, width in enumerate(2 * self._eta):
            slope, target = drift[k] / width, (before[k] - u[k] + drift[k]) / width
            if self.dense:
                draws = torch.cat([torch.ones_like(slope[..., :1]), u[k], slope, target], -1) * keep
                draws = draws.flatten(0, 1).double()
                self._sums[k] += draws.mT @ draws
            else:
                draws = torch.stack([torch.ones_like(slope), u[k], slope, target], -1) * keep.unsqueeze(-1)
                draws = draws.flatten(0, 1).double().movedim(1, 0)
                self._sums[k].index_add_(0, self._index, draws.mT @ draws)

    def solve(self) -> tuple[Tensor, ...]:
        """Intercept, slopes and inverse Cholesky factor of the residual covariance in units of ``s``: ``(K, size)``,
        ``(K, 2 * size, size)``, ``(K, size, size)`` if dense, else ``(K, size)``, ``(K, 2, size)``, ``(K, size)``."""
        scale = (2 * self._eta.double()).sqrt()
        moments = self._sums / self._count.clamp(min=1.0)
        if self.dense:
            intercept, slopes, residual = self._regression(moments, 2 * scale.shape[1])
            eye = torch.eye(scale.shape[1], dtype=scale.dtype, device=scale.device)
            covariance = self._shrunk(scale.unsqueeze(-1) * residual * scale.unsqueeze(-2), eye, 2 * scale.shape[1])
            factor = torch.linalg.cholesky_ex(covariance)[0]
            found = intercept, slopes, torch.linalg.solve_triangular(factor, eye, upper=False)
        else:
            groups = self._regression(moments / self._shares, 2)
            intercept, slopes, residual = (t.squeeze(-1)[:, self._index] for t in groups)
            variance = self._shrunk(scale.square() * residual.squeeze(-1), torch.ones_like(scale), 2)
            found = intercept, slopes.mT, variance.rsqrt()
        return tuple(t.to(self._eta.dtype) for t in found)

    def _regression(self, moments: Tensor, p: int) -> tuple[Tensor, Tensor, Tensor]:
        """Intercept ``(..., targets)``, slopes ``(..., p, targets)``, shrunk towards zero by a prior worth a few draws,
        and residual covariance."""
        mean, covariance = moments[..., 0, 1:], moments[..., 1:, 1:]
        covariance = covariance - mean.unsqueeze(-1) * mean.unsqueeze(-2)
        xx, xy, yy = covariance[..., :p, :p], covariance[..., :p, p:], covariance[..., p:, p:]
        scale = xx.diagonal(dim1=-2, dim2=-1).clamp(min=1e-30).sqrt()
        outer = scale.unsqueeze(-1) * scale.unsqueeze(-2)
        eye = torch.eye(p, dtype=xx.dtype, device=xx.device)
        ridge = _RIDGE + _PRIOR / (self._count + _PRIOR)
        slopes = torch.linalg.solve(xx / outer + ridge * eye, xy / scale.unsqueeze(-1)) / scale.unsqueeze(-1)
        intercept = mean[..., p:] - (mean[..., :p].unsqueeze(-2) @ slopes).squeeze(-2)
        fitted = slopes.mT @ xy
        return intercept, slopes, yy - fitted - fitted.mT + slopes.mT @ xx @ slopes

    def _shrunk(self, variance: Tensor, unit: Tensor, p: int) -> Tensor:
        """The residual (co)variance corrected for the fit and shrunk towards one."""
        free = (self._count - p - 1).clamp(min=0.0)
        return (self._count * variance + _PRIOR * unit) / (free + _PRIOR)
