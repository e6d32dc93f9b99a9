"""A computation of many parts as one graph, which draws its random numbers first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph as Nodes
from torch.fx import GraphModule, Node

from ..density.interface import Block, Density
from ..density.model import LogDensity
from .compiler import traceable
from .graph import Function, Graph, Live, bound, trace
from .inductor import Backend
from .scan import Scan, draws_numbers

Compute = Callable[[], tuple[Tensor, ...]]


class TracedDensity(Density):
    """The log density of a bound model in a trace of all that is done with it: its blocks of steps become loops."""

    is_traced = True

    def __init__(self, model: LogDensity) -> None:
        self.structure, self.layout, self._model = model.structure, model.layout, model

    def execute(self, fn: Block, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        recurrence = getattr(fn, "recurrence", None)
        block = traceable(fn, self._model)
        return block(*inputs) if recurrence is None else Scan(block, recurrence)(*inputs)

    def __call__(self, u: Tensor) -> Tensor:
        return self._model(u)

    def differentiable(self, u: Tensor, parameters: bool) -> Tensor:
        return self._model.differentiable(u, parameters)

    def with_start(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return self._model.with_start(u)

    def land(self, u: Tensor) -> tuple[Tensor, ...]:
        return self._model.land(u)


@dataclass(frozen=True)
class Whole:
    """``compute()`` with the tensors that it reaches as they are at each call.

    Its random numbers are drawn by torch's generator in the order of the trace, by :attr:`draw`, so that they are those
    of the eager computation; the rest is :attr:`graph`.
    """

    draw: Function
    drawn_from: Graph
    graph: Graph

    @classmethod
    def of(cls, compute: Compute, live: Live, backend: Backend) -> Whole:
        """Traced and compiled.

        :raises Exception: whatever tracing and compiling meet.
        """
        module, constants = trace(compute, (), live)
        values = bound(constants, live)
        first, rest, kept = _split(module)
        drawn = first(*values)
        built = backend.build(rest, [*drawn, *(values[i] for i in kept)])
        return cls(first, Graph.of(first, constants, live), Graph.of(built, tuple(constants[i] for i in kept), live))

    def fits(self, live: Live) -> bool:
        """Whether parameters still have the shapes that they had."""
        return self.drawn_from.fits(live)

    def __call__(self, live: Live) -> tuple[Tensor, ...]:
        with torch.no_grad():
            drawn = self.draw(*bound(self.drawn_from.constants, live))
            return self.graph.run(*drawn, *bound(self.graph.constants, live))


def _split(module: GraphModule) -> tuple[GraphModule, GraphModule, list[int]]:
    """What draws random numbers, with all that it needs, and the rest; of the inputs, in this order, which the rest has
    after what was drawn."""
    nodes = list(module.graph.nodes)
    early: set[Node] = set()
    for node in reversed(nodes):
        if draws_numbers(node) or any(user in early for user in node.users):
            early.add(node)
    inputs = [n for n in nodes if n.op == "placeholder"]
    before = [n for n in nodes if n in early and n.op != "placeholder"]
    after = [n for n in nodes if n not in early and n.op != "placeholder"]
    passed = [n for n in before if any(user in after for user in n.users)]
    kept = [i for i, n in enumerate(inputs) if any(user in after for user in n.users)]
    first = _part(module, inputs, before, passed)
    rest = _part(module, [*passed, *(inputs[i] for i in kept)], after, None)
    return first, rest, kept


def _part(module: GraphModule, inputs: list[Node], body: list[Node], outputs: list[Node] | None) -> GraphModule:
    """These nodes as a module; their own output where none are named."""
    graph, env = Nodes(), {}
    for node in inputs:
        env[node] = graph.placeholder(node.name)
        env[node].meta = node.meta.copy()
    for node in body:
        env[node] = graph.node_copy(node, lambda n: env[n])
    if outputs is not None:
        graph.output(tuple(env[n] for n in outputs))
    attributes: dict[str, Any] = {n.target: getattr(module, n.target) for n in body if n.op == "get_attr"}
    return GraphModule(attributes, graph)
