"""The interface of a log density over states, and a plain ``potential_fn`` behind it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .layout import LatentSite, Layout
from .structure import Structure
from .vectorize import map_chains, require_vmap


class Density(ABC):
    """``log pi`` over states ``u`` of shape ``(chains, rows, size)``: value, gradient, Hessian products.

    Chains are vectorised with ``torch.func.vmap`` where the model allows it and looped otherwise.
    """

    structure: Structure
    layout: Layout

    @abstractmethod
    def __call__(self, u: Tensor) -> Tensor:
        """``log pi(u)``, ``(chains, rows)``."""

    @abstractmethod
    def require_vectorization(self, u: Tensor) -> None:
        """Refuse a model whose chains cannot be a batch dimension, naming the operation.

        :raises NotImplementedError: see :func:`~pyro_shortrun.vectorize.require_vmap`.
        """

    def value_and_grad(self, u: Tensor, create_graph: bool = False) -> tuple[Tensor, Tensor]:
        """``log pi(u)`` and its gradient; ``u`` must require gradients when a graph is wanted."""
        with torch.enable_grad():
            if not u.requires_grad:
                u = u.detach().requires_grad_()
            value = self(u)
            if not value.requires_grad:  # the density is constant in u
                return value, torch.zeros_like(u)
            (grad,) = torch.autograd.grad(value.sum(), u, create_graph=create_graph, materialize_grads=True)
        return (value if create_graph else value.detach()), grad

    def hessian_product(self, u: Tensor, grad: Tensor, create_graph: bool) -> Callable[[Tensor], Tensor]:
        """Products ``v -> H v`` for ``v`` of shape ``(m, chains, rows, size)``, from a ``grad`` with graph."""

        def product(vectors: Tensor) -> Tensor:
            if not grad.requires_grad:
                return torch.zeros_like(vectors)
            options = dict(retain_graph=True, create_graph=create_graph, materialize_grads=True)
            if self.structure.vectorizes.get("hessian", True):
                try:
                    (out,) = torch.autograd.grad(grad, u, vectors, is_grads_batched=True, **options)
                    return out
                except (RuntimeError, NotImplementedError):  # an operation without a batching rule
                    self.structure.vectorizes["hessian"] = False
            return torch.stack([torch.autograd.grad(grad, u, v, **options)[0] for v in vectors])

        return product


class PotentialDensity(Density):
    """Minus a ``potential_fn`` over a dict of unconstrained values, as Pyro's kernels take it; a single row.

    :param potential_fn: from ``{name: value}`` to a scalar.
    :param like: one value of every name, for names, shapes, dtype and device.
    """

    def __init__(self, potential_fn: Callable, like: Mapping[str, Tensor]) -> None:
        sites = tuple(LatentSite(k, torch.Size(), v.shape, ()) for k, v in like.items())
        first = next(iter(like.values()))
        self.layout = Layout(sites, ())
        self.structure = Structure(self.layout, frozenset(), False, first.dtype, first.device)
        self._potential_fn = potential_fn

    def __call__(self, u: Tensor) -> Tensor:
        return map_chains(self._one, (u,), self.structure.vectorizes)

    def require_vectorization(self, u: Tensor) -> None:
        require_vmap(self._one, (u,))

    def _one(self, u: Tensor) -> Tensor:
        return -self._potential_fn(self.layout.unpack(u)).reshape(1)
