"""Reverse kernels of Langevin steps: densities of where a step came from, given where it arrived.

Any of them makes a valid bound; the better it resembles the law of the run, the tighter that is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_RIDGE = 1e-6  # of the features' variances
_PRIOR = 2.0  # draws that speak for a reverse step which is pure noise
_FEWEST = 1024.0  # draws that the statistics remember at least


class Reverse(ABC):
    """``log r(before | u)`` of a step ``u = before + drift + sqrt(2 eta) * noise``.

    ``parameters`` has ``(K, ...)`` tensors, one entry per step; ``learns`` tells whether :meth:`learn` is to be called.
    """

    parameters: tuple[Tensor, ...] = ()
    learns = False

    @property
    @abstractmethod
    def key(self) -> tuple:
        """Everything that decides the arithmetic."""

    @abstractmethod
    def log_density(self, before: Tensor, u: Tensor, mean: Tensor, eta: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """Terms per coordinate that sum to ``log r(before | u)`` plus half of ``log(4 pi eta)``.

        :param mean: where the same step would go from ``u`` without noise.
        :param parameters: of this step.
        """

    def learn(self, before: Tensor, u: Tensor, drift: Tensor, step_size: Tensor, valid: Tensor) -> None:
        """Told finished steps, ``(K, chains, rows, size)`` each, and which rows count."""
        return None


@dataclass(frozen=True)
class Mirror(Reverse):
    """The same Langevin step again, from ``u``."""

    key = ("mirror",)

    def log_density(self, before: Tensor, u: Tensor, mean: Tensor, eta: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        return -(before - mean).square() / (4 * eta)


@dataclass(frozen=True)
class Affine(Reverse):
    r"""A Gaussian that undoes the drift, and adds what a linear function says of the score of the run's law at ``u``,

    .. math:: r(u' \mid u) = N\big(u - a + 2 \eta (b + G u + D a / (2 \eta)),\; s S s\big), \qquad s = \sqrt{2 \eta},

    with the drift :math:`a(u) = \eta \nabla\log\pi(u)`. In this form the coefficients are those of a score, and change
    little with ``eta``.
    """

    fit: Fit

    learns = True

    @property
    def key(self) -> tuple:
        return ("affine", type(self.fit))

    @property
    def parameters(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        return self.fit.solution

    def log_density(self, before: Tensor, u: Tensor, mean: Tensor, eta: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        width = 2 * eta
        slope = (mean - u) / width
        return self.fit.log_density((before - u) / width + slope, u, slope, width.sqrt(), parameters)

    def learn(self, before: Tensor, u: Tensor, drift: Tensor, step_size: Tensor, valid: Tensor) -> None:
        width = 2 * step_size[:, None, None]
        self.fit.update(u, drift / width, (before - u + drift) / width, valid, step_size)


class Fit(nn.Module, ABC):
    """Regression of what a step came from on what it arrived at, for every step, from running moments.

    The moments are those of ``(1, features, target)``, in double precision, over rows and chains. They forget: of
    ``n`` draws seen, about the last half counts, at most ``memory``.

    :param batch: leading dimensions of the moments.
    :param features: number of features; ``targets``: of targets.
    :param memory: number of draws.
    """

    moments: Tensor
    log_scale: Tensor  # of s, as the moments were made
    count: Tensor
    seen: Tensor

    def __init__(self, batch: tuple[int, ...], features: int, targets: int, memory: int, like: Tensor) -> None:
        super().__init__()
        size = 1 + features + targets
        self.features, self.memory, self._dtype = features, float(memory), like.dtype
        self.register_buffer("moments", like.new_zeros((*batch, size, size), dtype=torch.float64))
        self.register_buffer("log_scale", like.new_zeros((batch[0], like.shape[-1]), dtype=torch.float64))
        self.register_buffer("count", like.new_zeros((), dtype=torch.float64))
        self.register_buffer("seen", like.new_zeros((), dtype=torch.float64))
        self._solved: tuple[Tensor, ...] | None = None
        self._fresh: tuple[Tensor, ...] | None = None
        self._past: tuple[Tensor, Tensor, Tensor]
        self._new: tuple[Tensor, float, Tensor]

    @abstractmethod
    def update(self, u: Tensor, slope: Tensor, target: Tensor, valid: Tensor, step_size: Tensor) -> None:
        """Told features ``u`` and ``slope`` and targets, ``(K, chains, rows, size)``, and which rows count."""

    @abstractmethod
    def log_density(
        self, target: Tensor, u: Tensor, slope: Tensor, scale: Tensor, parameters: Sequence[Tensor]
    ) -> Tensor:
        """Terms per coordinate, for the parameters of one step, where ``scale`` is ``s``."""

    @abstractmethod
    def _solve(self) -> tuple[Tensor, ...]:
        """What :meth:`log_density` needs, ``(K, ...)`` each, in double precision."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing was seen so far."""
        return self._solved is None and not bool(self.count > 0)

    def forget(self) -> None:
        """Begin anew."""
        self._solved = self._fresh = None
        self.count = torch.zeros_like(self.count)
        self.seen.zero_()

    def _absorb(self, added: Tensor, number: float, step_size: Tensor) -> None:
        """``added``: sums of squares and products of ``number`` draws."""
        self.seen += number
        self._solved = self._fresh = None
        self._past = self.count, self.moments.clone(), self.log_scale.clone()
        self._new = added, number, 0.5 * (2 * step_size).log().double()
        self._mix((self.seen / 2).clamp(_FEWEST, self.memory))

    def _mix(self, most: Tensor) -> None:
        """Moments of new draws and of the past, which counts as ``most`` draws at most."""
        (count, moments, log_scale), (added, number, new_scale) = self._past, self._new
        kept = torch.minimum(count, most)
        self.count = kept + number
        self.moments.copy_((kept * moments + added) / self.count.clamp(min=1.0))
        self.log_scale.copy_((kept * log_scale + number * new_scale) / self.count.clamp(min=1.0))

    def prefer_new(self) -> None:
        """Until the next update, let the solution be that of the newest draws, to which the past adds no more than what
        keeps it regular."""
        here = self.count, self.moments.clone(), self.log_scale.clone()
        self._mix(self.count.new_tensor(self.width))
        self._fresh = tuple(t.to(self._dtype) for t in self._solve())
        self.count = here[0]
        self.moments.copy_(here[1])
        self.log_scale.copy_(here[2])

    @property
    def width(self) -> int:
        """How many numbers a draw has in the moments."""
        return self.moments.shape[-1]

    def _regression(self) -> tuple[Tensor, Tensor, Tensor]:
        """Intercept ``(*batch, targets)``, slopes ``(*batch, features, targets)``, shrunk towards zero by a prior worth
        a few draws, and residual covariance."""
        p = self.features
        mean, covariance = self.moments[..., 0, 1:], self.moments[..., 1:, 1:]
        covariance = covariance - mean.unsqueeze(-1) * mean.unsqueeze(-2)
        xx, xy, yy = covariance[..., :p, :p], covariance[..., :p, p:], covariance[..., p:, p:]
        scale = xx.diagonal(dim1=-2, dim2=-1).clamp(min=1e-30).sqrt()
        outer = scale.unsqueeze(-1) * scale.unsqueeze(-2)
        eye = torch.eye(p, dtype=xx.dtype, device=xx.device)
        ridge = _RIDGE + _PRIOR / (self.count + _PRIOR)
        slopes = torch.linalg.solve(xx / outer + ridge * eye, xy / scale.unsqueeze(-1)) / scale.unsqueeze(-1)
        intercept = mean[..., p:] - (mean[..., :p].unsqueeze(-2) @ slopes).squeeze(-2)
        fitted = slopes.mT @ xy
        residual = yy - fitted - fitted.mT + slopes.mT @ xx @ slopes
        return intercept, slopes, residual

    def _shrunk(self, variance: Tensor, unit: Tensor) -> Tensor:
        """The residual (co)variance, in units of ``s``, corrected for the fit and shrunk towards one."""
        free = (self.count - self.features - 1).clamp(min=0.0)
        return (self.count * variance + _PRIOR * unit) / (free + _PRIOR)

    @property
    def solution(self) -> tuple[Tensor, ...]:
        """What :meth:`log_density` needs, ``(K, ...)`` each."""
        if self._fresh is not None:
            return self._fresh
        if self._solved is None:
            with torch.no_grad():
                self._solved = tuple(t.to(self._dtype) for t in self._solve())
        return self._solved


class DenseFit(Fit):
    """All coordinates of a row together."""

    def __init__(self, num_steps: int, memory: int, like: Tensor) -> None:
        size = like.shape[-1]
        super().__init__((num_steps,), 2 * size, size, memory, like)

    def update(self, u: Tensor, slope: Tensor, target: Tensor, valid: Tensor, step_size: Tensor) -> None:
        draws = torch.cat([torch.ones_like(u[..., :1]), u, slope, target], -1) * valid.unsqueeze(-1)
        draws = draws.flatten(1, 2).double()
        self._absorb(draws.mT @ draws, float(valid.sum()), step_size)

    def _solve(self) -> tuple[Tensor, ...]:
        intercept, slopes, residual = self._regression()
        scale = self.log_scale.exp()
        residual = scale.unsqueeze(-1) * residual * scale.unsqueeze(-2)
        eye = torch.eye(residual.shape[-1], dtype=residual.dtype, device=residual.device)
        factor = torch.linalg.cholesky_ex(self._shrunk(residual, eye))[0]
        return intercept, slopes, torch.linalg.solve_triangular(factor, eye, upper=False)

    def log_density(
        self, target: Tensor, u: Tensor, slope: Tensor, scale: Tensor, parameters: Sequence[Tensor]
    ) -> Tensor:
        intercept, slopes, whiten = parameters
        residual = target - intercept - torch.cat([u, slope], -1) @ slopes
        return whiten.diagonal().log() - 0.5 * ((scale * residual) @ whiten.mT).square()


class DiagonalFit(Fit):
    """Every coordinate for itself; elements of a plate share theirs.

    :param index: which moments a coordinate has, ``(size,)``.
    """

    def __init__(self, num_steps: int, index: Tensor, memory: int, like: Tensor) -> None:
        count = int(index.max()) + 1
        super().__init__((num_steps, count), 2, 1, memory, like)
        self._index = index.to(like.device)
        self._shares = torch.bincount(self._index, minlength=count).double()

    def update(self, u: Tensor, slope: Tensor, target: Tensor, valid: Tensor, step_size: Tensor) -> None:
        draws = torch.stack([torch.ones_like(u), u, slope, target], -1) * valid[..., None, None]
        draws = draws.flatten(1, 2).double().movedim(2, 1)
        added = torch.zeros_like(self.moments).index_add_(1, self._index, draws.mT @ draws)
        self._absorb(added / self._shares[:, None, None], float(valid.sum()), step_size)

    def _solve(self) -> tuple[Tensor, ...]:
        intercept, slopes, residual = (t.squeeze(-1)[:, self._index] for t in self._regression())
        variance = self._shrunk((2 * self.log_scale).exp() * residual.squeeze(-1), torch.ones_like(self.log_scale))
        return intercept, slopes[..., 0], slopes[..., 1], variance.rsqrt()

    def log_density(
        self, target: Tensor, u: Tensor, slope: Tensor, scale: Tensor, parameters: Sequence[Tensor]
    ) -> Tensor:
        intercept, at_u, at_slope, whiten = parameters
        residual = target - intercept - at_u * u - at_slope * slope
        return whiten.log() - 0.5 * (whiten * scale * residual).square()
