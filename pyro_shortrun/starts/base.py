"""Where tempered runs start from: densities ``log q_0(u)`` known everywhere, with their gradients.

A :class:`Base` is a rule and the tensors it depends on, so that a compiled step can take these as inputs and the way
back can differentiate in them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..density.affine import Affine
from ..density.interface import Density

_FLATTEST = 1e-6  # curvature of a prior


class Base(ABC):
    """The density ``q_0`` of a run's start.

    ``is_weighted`` tells whether in an arrowhead its local parts count ``full_size / size`` times.
    """

    is_weighted = False

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What ``q_0`` depends on and is to be differentiated in."""
        return ()

    @abstractmethod
    def evaluate(
        self, density: Density, u: Tensor, tensors: tuple[Tensor, ...], create_graph: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``log pi(u)``, its gradient, and that of ``log q_0(u)``, of ``(chains, rows)`` and twice the shape of ``u``.

        :param u: requires gradients.
        """

    def inside(self, frame: Affine) -> Base:
        """The same in other coordinates, where it does not know them from the density that it is evaluated with."""
        return self

    def covariance(self, density: Density, u: Tensor) -> Tensor:
        """Covariance of every row at the start ``u``, ``(chains, rows, size, size)``."""
        raise NotImplementedError(f"{type(self).__name__} does not know its covariance.")


@dataclass(frozen=True)
class PriorBase(Base):
    """The model's own prior."""

    is_weighted = True

    def evaluate(
        self, density: Density, u: Tensor, tensors: tuple[Tensor, ...], create_graph: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        joint, prior = density.with_start(u)
        options: Any = dict(create_graph=create_graph, materialize_grads=True)
        (grad,) = torch.autograd.grad(joint.sum(), u, retain_graph=True, **options)
        (slope,) = torch.autograd.grad(prior.sum(), u, **options)
        return joint, grad, slope

    def covariance(self, density: Density, u: Tensor) -> Tensor:
        """The inverse of minus the Hessian of ``log q_0``, its eigenvalues taken as positive."""
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            _, prior = density.with_start(u)
            (slope,) = torch.autograd.grad(prior.sum(), u, create_graph=True)
            columns = [
                torch.autograd.grad(s.sum(), u, retain_graph=True, materialize_grads=True)[0]
                if s.requires_grad
                else torch.zeros_like(u)
                for s in slope.unbind(-1)
            ]
        values, vectors = torch.linalg.eigh(-torch.stack(columns, -1))
        values = values.abs().clamp(min=_FLATTEST)
        return (vectors / values.unsqueeze(-2)) @ vectors.mT


@dataclass(frozen=True)
class Untempered(Base):
    """Any density: targets are the model's alone."""

    is_weighted = True

    def evaluate(
        self, density: Density, u: Tensor, tensors: tuple[Tensor, ...], create_graph: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        value, grad = density.value_and_grad(u, create_graph)
        return value, grad, torch.zeros_like(grad)


@dataclass(frozen=True)
class GaussianBase(Base):
    """A Gaussian per row in unconstrained space: ``loc`` ``(rows, size)``, ``scale`` the same or lower triangular
    ``(rows, size, size)``."""

    loc: Tensor
    scale: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.loc, self.scale

    @property
    def is_diagonal(self) -> bool:
        """Whether coordinates are independent."""
        return self.scale.dim() == self.loc.dim()

    def draw(self, chains: int) -> tuple[Tensor, Tensor]:
        """States ``(chains, rows, size)`` and their log density per coordinate (of the innovations)."""
        noise = torch.randn((chains, *self.loc.shape), dtype=self.loc.dtype, device=self.loc.device)
        if self.is_diagonal:
            u, log_scale = self.loc + self.scale * noise, self.scale.log()
        else:
            u = self.loc + (self.scale @ noise.unsqueeze(-1)).squeeze(-1)
            log_scale = self.scale.diagonal(dim1=-2, dim2=-1).log()
        return u, torch.distributions.Normal(0.0, 1.0, validate_args=False).log_prob(noise) - log_scale

    def inside(self, frame: Affine) -> Base:
        factor = torch.diag_embed(self.scale) if self.is_diagonal else self.scale
        return GaussianBase(frame.inward(self.loc), torch.linalg.solve_triangular(frame.factor, factor, upper=False))

    def evaluate(
        self, density: Density, u: Tensor, tensors: tuple[Tensor, ...], create_graph: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        value, grad = density.value_and_grad(u, create_graph)
        loc, scale = tensors
        with torch.set_grad_enabled(create_graph):
            if self.is_diagonal:
                return value, grad, (loc - u) / scale.square()
            white = torch.linalg.solve_triangular(scale, (loc - u).unsqueeze(-1), upper=False)
            return value, grad, torch.linalg.solve_triangular(scale.mT, white, upper=True).squeeze(-1)

    def covariance(self, density: Density, u: Tensor) -> Tensor:
        factor = torch.diag_embed(self.scale) if self.is_diagonal else self.scale
        return (factor @ factor.mT).expand(len(u), -1, -1, -1)
