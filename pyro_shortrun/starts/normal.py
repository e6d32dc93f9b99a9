"""Full-covariance Gaussians over one row: draws, bounds, and how they follow from curvatures."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .target import Target

_FAR = 4.0


@dataclass(frozen=True)
class Normal:
    """``u = loc + factor @ e`` with ``e ~ N(0, I)``; ``loc`` ``(size,)``, ``factor`` lower triangular, in double
    precision."""

    loc: Tensor
    factor: Tensor

    def at(self, noise: Tensor) -> Tensor:
        """States at standard normal ``noise``, ``(n, size)``."""
        return self.loc + noise @ self.factor.mT

    @property
    def log_scale(self) -> Tensor:
        """``log |det factor|``."""
        return self.factor.diagonal().abs().log().sum()

    @property
    def is_finite(self) -> bool:
        """Whether it is a distribution."""
        return bool(self.loc.isfinite().all() & self.factor.isfinite().all() & (self.factor.diagonal() > 0).all())

    def is_apart(self, other: Normal) -> bool:
        """Whether each mean is more than four standard deviations away in the other's coordinates."""
        gap = (self.loc - other.loc).unsqueeze(-1)
        white = [torch.linalg.solve_triangular(n.factor, gap, upper=False).norm().item() for n in (self, other)]
        return min(white) > _FAR

    def bound(self, target: Target, noise: Tensor) -> tuple[float, float]:
        """``E[log pi(u) - log q(u)] <= log p(x)`` over ``noise`` ``(n, size)``, in nats, and its standard error."""
        weights = target.value(self.at(noise)) + 0.5 * noise.square().sum(-1)
        constant = self.log_scale.item() + 0.5 * noise.shape[1] * math.log(2 * math.pi)
        mean = weights.mean().item() + constant
        return (mean, (weights.std() / math.sqrt(len(noise))).item()) if math.isfinite(mean) else (-math.inf, math.inf)


def whitened(curvature: Tensor, factor: Tensor) -> Tensor:
    """``L^T H L``: a curvature in the coordinates of a Gaussian."""
    white = factor.mT @ curvature @ factor
    return (white + white.mT) / 2


def lower(root: Tensor) -> Tensor:
    """The lower triangular factor of ``root @ root^T``, its diagonal positive; any number of leading dimensions."""
    upper = torch.linalg.qr(root.mT, mode="r").R
    sign = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(upper)
    return (upper * sign.unsqueeze(-1)).mT


def antithetic(count: int, size: int, like: Tensor) -> Tensor:
    """Standard normal noise in pairs of opposite sign, ``(count, size)``, so that odd moments vanish; where there is
    enough of it, its covariance is the identity."""
    half = torch.randn(-(-count // 2), size, dtype=like.dtype, device=like.device)
    if len(half) >= 4 * size:
        factor = torch.linalg.cholesky(half.mT @ half / len(half))
        half = torch.linalg.solve_triangular(factor, half.mT, upper=False).mT
    return torch.cat([half, -half])[:count]
