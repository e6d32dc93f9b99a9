"""Compiled evaluation: Pyro runs once per structure, while a graph is traced, and not in the loop.

:class:`CompiledDensity` holds a bound model, whose value and gradient, and the blocks of steps of
:mod:`pyro_shortrun.runs`, are traced with ``make_fx`` and compiled by inductor.

Whatever tensors the model reaches (data, parameters, plate indices) show in the trace as constants; they become inputs
of the graph and are found again in later calls by their role (:mod:`pyro_shortrun.compile.graph`), so that a changed
batch or parameter changes the result. A start's eager log density is compared with the graph's in every call: a graph
that has gone stale in another way is traced anew.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..density.interface import Block, Density
from ..density.model import LogDensity
from .compiler import CallGraphs, Compiler, prepared


class CompiledDensity(Density):
    """The log density of ``model`` from compiled graphs, wherever gradients in its parameters are not wanted."""

    def __init__(self, model: LogDensity, compiler: Compiler) -> None:
        self.structure, self.layout = model.structure, model.layout
        self._model, self._graphs = model, CallGraphs(model, compiler)
        self._known: tuple[Tensor, Tensor] | None = None
        self._renewed = False

    def execute(self, fn: Block, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """From a graph that gives what :meth:`expect` was told, which is found out where ``fn`` has a witness."""
        out = self._outputs(fn, inputs)
        while self._known is not None and hasattr(fn, "witness") and self._is_stale(*fn.witness(inputs, out)):
            out = self._outputs(fn, inputs)
        return out

    def _outputs(self, fn: Block, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        of_autograd = getattr(fn, "graph", False)
        return fn(self._model, *inputs) if of_autograd else self._graphs.run(fn, inputs)

    def __call__(self, u: Tensor) -> Tensor:
        return self._model(u) if torch.is_grad_enabled() else self.execute(_VALUE, (u,))[0]

    def value_and_grad(self, u: Tensor, create_graph: bool = False) -> tuple[Tensor, Tensor]:
        if create_graph:
            return self._model.value_and_grad(u, create_graph)
        value, grad = self.execute(_GRADIENT, (u,))
        return value, grad

    def differentiable(self, u: Tensor, parameters: bool) -> Tensor:
        """From the graph of the gradient, where no tensor that the model reaches wants a gradient."""
        if parameters and self.structure.noticed.get("parameters move supports", True):
            return self._model.differentiable(u, parameters)  # finds out
        inputs = prepared((u,))
        graph = self._graphs.find(_GRADIENT, inputs)
        if graph is None or (parameters and graph.wants_gradients(self._graphs.live)):
            return self._model.differentiable(u, parameters)
        value, grad = self.value_and_grad(inputs[0])
        return value + ((u - u.detach()) * grad).sum(-1)

    def with_start(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return self._model.with_start(u)

    def land(self, u: Tensor) -> tuple[Tensor, ...]:
        return self._model.land(u)

    def require_vectorization(self, u: Tensor) -> None:
        self._model.require_vectorization(u)

    def expect(self, u: Tensor, value: Tensor) -> None:
        self._known = (u.detach(), value.detach())

    def _is_stale(self, u: Tensor, value: Tensor) -> bool:
        """Whether graphs no longer are the model's, which is asked once for each expectation; then they are dropped,
        and given up if new ones are no better.

        :param value: ``log pi(u)`` of the graphs; if ``u`` is not what was expected, the model is run there.
        """
        known, self._known = self._known, None
        assert known is not None
        if known[0].shape != u.shape or not torch.equal(known[0], u.detach()):
            with torch.no_grad():
                known = u.detach(), self._model(u.detach())
        compiler = self._graphs.compiler
        if compiler.agrees(known[1], value.detach()):
            return False
        if self._renewed:
            compiler.give_up("its graph does not give the model's log density")
        else:
            compiler.forget()
            self._renewed, self._known = True, known
        self._graphs.forget()
        return True


@dataclass(frozen=True)
class _Value:
    """``(u,)`` to ``(log pi(u),)``."""

    key = ("value",)

    def __call__(self, density: Density, *inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (density(inputs[0]),)


@dataclass(frozen=True)
class _Gradient:
    """``(u,)`` to ``log pi(u)`` and its gradient."""

    key = ("gradient",)

    def __call__(self, density: Density, *inputs: Tensor) -> tuple[Tensor, ...]:
        return density.value_and_grad(inputs[0])

    def witness(self, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return inputs[0], outputs[0]


_VALUE, _GRADIENT = _Value(), _Gradient()


def density_of(model: LogDensity, compiler: Compiler | None) -> Density:
    """The log density of a bound model, from graphs if there is a compiler."""
    return model if compiler is None else CompiledDensity(model, compiler)
