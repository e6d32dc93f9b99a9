"""Metrics: linear maps per row in which a posterior has unit scales, and how a chain's draws fit them.

A preconditioner makes a linear map per row, ``u = L w``; the dynamics then moves ``w``, in which the posterior has unit
scales. For Langevin dynamics with a diagonal ``L`` this is one step size ``eta * L_i ** 2`` per coordinate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

_SHRINKAGE = 4.0  # times dimension: as many draws leave half of the correlations


class Scales(ABC):
    """``u = L w`` in every row."""

    @abstractmethod
    def whiten(self, u: Tensor) -> Tensor:
        """``L^-1 u``."""

    @abstractmethod
    def color(self, w: Tensor) -> Tensor:
        """``L w``."""

    @abstractmethod
    def pull(self, grad: Tensor) -> Tensor:
        """``L^T grad``: the gradient with respect to ``w``."""


@dataclass(frozen=True)
class Unit(Scales):
    """``L = I``."""

    def whiten(self, u: Tensor) -> Tensor:
        return u

    def color(self, w: Tensor) -> Tensor:
        return w

    def pull(self, grad: Tensor) -> Tensor:
        return grad


@dataclass(frozen=True)
class DiagonalScales(Scales):
    """``L`` diagonal, ``factor`` of shape ``(rows, size)``."""

    factor: Tensor

    def whiten(self, u: Tensor) -> Tensor:
        return u / self.factor

    def color(self, w: Tensor) -> Tensor:
        return w * self.factor

    def pull(self, grad: Tensor) -> Tensor:
        return grad * self.factor


@dataclass(frozen=True)
class DenseScales(Scales):
    """``L`` lower triangular, ``factor`` of shape ``(rows, size, size)``."""

    factor: Tensor

    def whiten(self, u: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.factor, u.unsqueeze(-1), upper=False).squeeze(-1)

    def color(self, w: Tensor) -> Tensor:
        return (self.factor @ w.unsqueeze(-1)).squeeze(-1)

    def pull(self, grad: Tensor) -> Tensor:
        return (self.factor.mT @ grad.unsqueeze(-1)).squeeze(-1)


class Preconditioner(ABC):
    """How the scales of the posterior are estimated in warm-up, from draws and gradients of all chains together.

    On a Gaussian with covariance ``S``, ``cov(grad) = S^-1 cov(u) S^-1`` wherever the chains are; so ``S`` is found
    from both before the chains have converged, as the geometric mean of ``cov(u)`` and ``cov(grad)^-1``. It is the
    minimiser of the Fisher divergence (Seyboldt, Carlson, Carpenter 2024).
    """

    def moments(self, like: Tensor) -> Moments:
        """An empty record of what :meth:`fit` needs."""
        return Moments(like)

    @abstractmethod
    def initial(self, like: Tensor) -> Tensor:
        """The factor ``L`` before anything is known; ``like`` is ``(rows, size)``."""

    @abstractmethod
    def scales(self, factor: Tensor) -> Scales:
        """Scales from a factor."""

    @abstractmethod
    def fit(self, draws: Tensor, grads: Tensor, previous: Tensor) -> Tensor:
        """The factor for (co)variances of draws and gradients; ``previous`` where they do not determine it."""


class Identity(Preconditioner):
    """No preconditioning: ``L = I``."""

    def initial(self, like: Tensor) -> Tensor:
        return torch.ones_like(like)

    def scales(self, factor: Tensor) -> Scales:
        return Unit()

    def fit(self, draws: Tensor, grads: Tensor, previous: Tensor) -> Tensor:
        return previous


class Diagonal(Preconditioner):
    """A scale per coordinate: ``L_i ** 2 = sd(u_i) / sd(grad_i)``, ``(rows, size)``, the scale itself on a Gaussian.

    Seyboldt, Carlson, Carpenter: Preconditioning Hamiltonian Monte Carlo by minimizing Fisher divergence, 2024.
    """

    def initial(self, like: Tensor) -> Tensor:
        return torch.ones_like(like)

    def scales(self, factor: Tensor) -> Scales:
        return DiagonalScales(factor)

    def fit(self, draws: Tensor, grads: Tensor, previous: Tensor) -> Tensor:
        factor = (draws / grads).pow(0.25)
        return torch.where(factor.isfinite() & (factor > 0), factor, previous)


class Dense(Preconditioner):
    """The whole covariance of a row, ``L L^T = cov(grad)^-1 # cov(u)`` (geometric mean), ``(rows, size, size)``: for
    correlated posteriors of up to some hundred coordinates.

    Seyboldt, Carlson, Carpenter: Preconditioning Hamiltonian Monte Carlo by minimizing Fisher divergence, 2024.
    """

    def moments(self, like: Tensor) -> Moments:
        return CrossMoments(like)

    def initial(self, like: Tensor) -> Tensor:
        return torch.diag_embed(torch.ones_like(like))

    def scales(self, factor: Tensor) -> Scales:
        return DenseScales(factor)

    def fit(self, draws: Tensor, grads: Tensor, previous: Tensor) -> Tensor:
        # In double precision, and in units in which the diagonal is one, so that eigenvalues are not lost to rounding.
        dtype, draws, grads, previous = draws.dtype, draws.double(), grads.double(), previous.double()
        unit = (draws.diagonal(dim1=-2, dim2=-1) / grads.diagonal(dim1=-2, dim2=-1)).pow(0.25)
        outer = unit.unsqueeze(-1) * unit.unsqueeze(-2)
        known = (outer.isfinite() & (outer > 0)).all(-1, keepdim=True).all(-2, keepdim=True)
        eye = self.initial(previous[..., 0])
        draws, grads = torch.where(known, draws / outer, eye), torch.where(known, grads * outer, eye)
        root, inverse = _power(grads, 0.5), _power(grads, -0.5)
        mean = inverse @ _power(root @ draws @ root, 0.5) @ inverse
        factor, failed = torch.linalg.cholesky_ex(mean * outer)
        return torch.where(known & (failed == 0).reshape(-1, 1, 1), factor, previous).to(dtype)


def _power(matrix: Tensor, exponent: float) -> Tensor:
    """Power of a symmetric positive semi-definite matrix, small eigenvalues lifted to rounding."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    floor = values[..., -1:] * torch.finfo(values.dtype).eps * values.shape[-1]
    return (vectors * torch.maximum(values, floor).pow(exponent).unsqueeze(-2)) @ vectors.mT


class Moments:
    """Running mean and variance of every coordinate over chains and draws."""

    def __init__(self, like: Tensor) -> None:
        self.count = 0
        self.mean = torch.zeros_like(like)
        self.scatter = self._squares(self.mean.unsqueeze(0))

    def update(self, values: Tensor) -> None:
        """Add ``(chains, rows, size)`` values; batches are merged as by Chan, Golub, LeVeque 1979."""
        added, mean = len(values), values.mean(0)
        shift, count = mean - self.mean, self.count + added
        self.scatter = self.scatter + self._squares(values - mean)
        self.scatter = self.scatter + self._squares(shift.unsqueeze(0)) * (self.count * added / count)
        self.mean = self.mean + shift * (added / count)
        self.count = count

    def _squares(self, x: Tensor) -> Tensor:
        return x.square().sum(0)

    @property
    def covariance(self) -> Tensor:
        """Variances, ``(rows, size)``."""
        return self.scatter / max(self.count - 1, 1)


class CrossMoments(Moments):
    """The same with the covariances within a row."""

    def _squares(self, x: Tensor) -> Tensor:
        return torch.einsum("crd,cre->rde", x, x)

    @property
    def covariance(self) -> Tensor:
        """Covariances, ``(rows, size, size)``, shrunk towards their diagonal.

        Successive draws of a chain are alike, so that the number of draws says too much: shrinkage is strong.
        """
        covariance = super().covariance
        kept = self.count**2 / (self.count**2 + (_SHRINKAGE * self.mean.shape[-1]) ** 2)
        return kept * covariance + (1 - kept) * torch.diag_embed(covariance.diagonal(dim1=-2, dim2=-1))
