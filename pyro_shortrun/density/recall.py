"""A log density that keeps what two runs of the model told: the one that a call was read from, and the landing."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .interface import Density
from .model import LogDensity
from .program import Reading
from .rows import Rows


class Known(NamedTuple):
    """A state, ``(1, rows, size)``, ``log pi`` there and its gradient."""

    u: Tensor
    value: Tensor
    grad: Tensor


class Recall(Density):
    """The log density of ``model``, which is not run again where it is known.

    :param reading: a run of the model that is a function of its unconstrained values, as leaves of autograd; None where
        there is none.
    """

    def __init__(self, model: LogDensity, reading: Reading | None) -> None:
        self.structure, self.layout = model.structure, model.layout
        self._model, self._reading = model, None if model.structure.summed else reading
        self._keeps = False
        self._landing: tuple[Tensor, Tensor] | None = None

    def keep_landing(self) -> None:
        """The run of the model with which a run lands will be differentiated in the parameters, which show to
        handlers."""
        self._keeps = not self._moves_supports(unless_known=True)

    def _moves_supports(self, unless_known: bool) -> bool:
        return bool(self.structure.noticed.get("parameters move supports", unless_known))

    @cached_property
    def _first(self) -> Known | None:
        if self._reading is None:
            return None
        free = self._reading.unconstrained
        with torch.enable_grad():
            joint = Rows(self.structure, self._reading).joint()
            grads = torch.autograd.grad(joint.sum(), list(free.values()), materialize_grads=True)
        parts = {k: v.detach() for k, v in free.items()}, dict(zip(free, grads, strict=True))
        u, grad = (self.layout.pack(t).unsqueeze(0) for t in parts)
        self._reading = None  # and its graph
        return Known(u, joint.detach().unsqueeze(0), grad)

    def _known(self, u: Tensor) -> Known | None:
        first = self._first
        return first if first is not None and u.shape == first.u.shape and torch.equal(u, first.u) else None

    def __call__(self, u: Tensor) -> Tensor:
        known = None if u.requires_grad else self._known(u)
        return self._model(u) if known is None else known.value

    def value_and_grad(self, u: Tensor, create_graph: bool = False) -> tuple[Tensor, Tensor]:
        known = None if create_graph else self._known(u.detach())
        return self._model.value_and_grad(u, create_graph) if known is None else known[1:]

    def differentiable(self, u: Tensor, parameters: bool) -> Tensor:
        if self._landing is not None and parameters and not u.requires_grad and torch.equal(u, self._landing[0]):
            return self._landing[1]
        return self._model.differentiable(u, parameters)

    def with_start(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return self._model.with_start(u)

    def land(self, u: Tensor) -> tuple[Tensor, ...]:
        if not self._keeps:
            return self._model.land(u)
        with torch.enable_grad(), self._model.program.showing_parameters():
            value, *others = self._model.land(u)
        self._landing = u, value
        return value.detach(), *(t.detach() for t in others)

    def require_vectorization(self, u: Tensor) -> None:
        self._model.require_vectorization(u)
