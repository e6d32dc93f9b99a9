"""The interface of a log density over states."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
from torch import Tensor

from .layout import Layout
from .structure import Structure
from .vectorize import require_vmap


class Block(Protocol):
    """A function of a density and tensors that may be traced and compiled.

    One whose outputs tell ``log pi`` of a state among its inputs may have a method
    ``witness(inputs, outputs) -> (u, log pi(u))``, by which a compiled density checks itself; one that is the same step
    several times may have a :class:`~pyro_shortrun.density.Recurrence`, ``recurrence``, so that a single
    step is compiled.
    """

    @property
    def key(self) -> tuple[Hashable, ...]:
        """Everything that decides its arithmetic."""
        ...

    def __call__(self, density: Any, *inputs: Tensor) -> tuple[Tensor, ...]: ...


class Density(ABC):
    """``log pi`` over states ``u`` of shape ``(chains, rows, size)``: value, gradient, Hessian products.

    Chains are vectorised with ``torch.func.vmap`` where the model allows it and looped otherwise.
    """

    structure: Structure
    layout: Layout
    is_traced = False  # whether all that is done with it becomes one graph, so that nothing may depend on values
    repeats: bool = False  # whether a single row is repeated for its Hessian products: pays in compiled graphs

    @abstractmethod
    def __call__(self, u: Tensor) -> Tensor:
        """``log pi(u)``, ``(chains, rows)``."""

    def require_vectorization(self, u: Tensor) -> None:
        """Refuse a model whose chains cannot be a batch dimension, naming the operation.

        :raises NotImplementedError: with the operation, and the model's line if there is one.
        """
        require_vmap(lambda one: self(one.unsqueeze(0)).squeeze(0), (u,))

    def with_start(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """``log pi(u)`` and the log density of the prior, both ``(chains, rows)``."""
        raise NotImplementedError(f"{type(self).__name__} has no prior.")

    def differentiable(self, u: Tensor, parameters: bool) -> Tensor:
        """``log pi(u)``, differentiable in ``u`` and, if asked for, the model's parameters, which show to handlers.

        :raises NotImplementedError: where a site's support depends on parameters: their gradient would not be that at
            fixed site values.
        """
        with torch.set_grad_enabled(parameters or u.requires_grad):
            return self(u)

    def land(self, u: Tensor) -> tuple[Tensor, ...]:
        """``log pi(u)``, and whatever else the end of a run is asked for."""
        return (self(u),)

    def execute(self, fn: Block, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """``fn(density, *inputs)``; a compiled density traces it once for each ``fn.key`` and shapes."""
        return fn(self, *inputs)

    def expect(self, u: Tensor, value: Tensor) -> None:
        """Told ``log pi(u)`` as a run of the model gave it; a compiled density checks itself by it."""
        return None

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
        """Products ``v -> H v`` for ``v`` of shape ``(m, chains, rows, size)``, from a ``grad`` with graph.

        The vectors go back through the graph of ``grad`` together.
        """

        def product(vectors: Tensor) -> Tensor:
            if not grad.requires_grad:
                return torch.zeros_like(vectors)
            repeated = self._repeated_product(u, vectors, create_graph) if self.repeats else None
            if repeated is not None:
                return repeated
            options = dict(retain_graph=True, create_graph=create_graph, materialize_grads=True)
            if self.structure.vectorizes.get("hessian", True):
                try:
                    (out,) = torch.autograd.grad(grad, u, vectors, is_grads_batched=True, **options)
                    return out
                except (RuntimeError, NotImplementedError):  # an operation without a batching rule
                    self.structure.vectorizes["hessian"] = False
            return torch.stack([torch.autograd.grad(grad, u, v, **options)[0] for v in vectors])

        return product

    def _repeated_product(self, u: Tensor, vectors: Tensor, create_graph: bool) -> Tensor | None:
        """Products of a single row's Hessian with the state repeated, so that products of data with vectors become
        products with matrices; None where chains cannot be vectorised."""
        with torch.enable_grad():
            many = u.expand_as(vectors).flatten(0, 1)
            _, grad = self.value_and_grad(many, create_graph=True)
            if not self.structure.vectorizes.get("density", True):
                return None
            back = vectors.flatten(0, 1)
            (out,) = torch.autograd.grad(grad, many, back, create_graph=create_graph, materialize_grads=True)
        return out.unflatten(0, vectors.shape[:2])
