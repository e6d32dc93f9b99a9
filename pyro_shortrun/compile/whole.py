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
from .graph import Constants, Function, Live, sources_forgotten, spec, trace
from .inductor import Backend
from .reuse import reuse
from .scan import Scan
from .values import draws_numbers, written

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


class Inputs:
    """Values of what a graph reaches: those that have a role in a call are looked up in each."""

    def __init__(self, constants: Constants, live: Live) -> None:
        self._values = [(live.tensors[c] if not isinstance(c, Tensor) else c).detach() for c in constants]
        self._roles = [(i, c) for i, c in enumerate(constants) if not isinstance(c, Tensor)]
        self._specs = [spec(self._values[i]) for i, _ in self._roles]

    def of(self, live: Live) -> list[Tensor] | None:
        """In this call; None where some have other shapes than at first, or are gone."""
        values, tensors = self._values, live.tensors
        for (i, role), known in zip(self._roles, self._specs, strict=True):
            found = tensors.get(role)
            if found is None or (found.shape, found.stride(), found.dtype, found.device) != known:
                return None
            values[i] = found.detach() if found.requires_grad else found
        return values


@dataclass(frozen=True)
class Whole:
    """``compute()`` with the tensors that it reaches as they are at each call.

    Its random numbers are drawn by torch's generator in the order of the trace, by ``draw``, so that they are those
    of the eager computation; the rest is ``run``, on what was drawn and on the values at ``kept``.
    """

    draw: Function
    run: Function
    kept: list[int]
    inputs: Inputs

    @classmethod
    @sources_forgotten()
    def of(cls, compute: Compute, live: Live, backend: Backend) -> Whole:
        """Traced and compiled.

        :raises Exception: whatever tracing and compiling meet.
        """
        module, constants = trace(compute, (), live)
        _check(module, constants)
        reuse(module)
        inputs = Inputs(constants, live)
        values = inputs.of(live)
        assert values is not None
        first, rest, needed, kept = _split(module)
        with torch.no_grad():
            drawn = first(*(values[i] for i in needed))
            run = backend.build(rest, [*drawn, *(values[i] for i in kept)])
        return cls(lambda values: first(*[values[i] for i in needed]), run, kept, inputs)

    def __call__(self, live: Live) -> tuple[Tensor, ...] | None:
        """None where it was made for tensors of other shapes."""
        values = self.inputs.of(live)
        if values is None:
            return None
        with torch.no_grad():
            return self.run(*self.draw(values), *[values[i] for i in self.kept])


def _check(module: GraphModule, constants: Constants) -> None:
    """Refuse what a graph would get wrong without a word."""
    if any(isinstance(c, Tensor) and c.requires_grad for c in constants):
        raise NotImplementedError("it has parameters that Pyro does not know: name them, pyro.module(name, module)")
    for part in module.modules():
        nodes = part.graph.nodes if isinstance(part, GraphModule) else ()
        if any(n.op == "placeholder" for node in nodes for n in written(node)):
            raise NotImplementedError("it changes a tensor in place, as a BatchNorm in training mode does")


def _split(module: GraphModule) -> tuple[GraphModule, GraphModule, list[int], list[int]]:
    """What draws random numbers, with all that it needs and that writes into that, and the rest; and which of the
    inputs each has, the rest after what was drawn."""
    nodes = list(module.graph.nodes)
    early: set[Node] = set()
    for node in reversed(nodes):
        if draws_numbers(node) or any(user in early for n in (node, *written(node)) for user in n.users):
            early.add(node)
    inputs = [n for n in nodes if n.op == "placeholder"]
    before = [n for n in nodes if n in early and n.op != "placeholder"]
    after = [n for n in nodes if n not in early and n.op != "placeholder"]
    passed = [n for n in before if _is_used(n, after)]
    needed, kept = ([i for i, n in enumerate(inputs) if _is_used(n, part)] for part in (before, after))
    first = _part(module, [inputs[i] for i in needed], before, passed)
    rest = _part(module, [*passed, *(inputs[i] for i in kept)], after, None)
    return first, rest, needed, kept


def _is_used(node: Node, by: list[Node]) -> bool:
    return not set(by).isdisjoint(node.users)


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
    attributes: dict[str, Any] = {str(n.target): getattr(module, str(n.target)) for n in body if n.op == "get_attr"}
    return GraphModule(attributes, graph)
