"""Loops in graphs: a block of steps as the graph of one step, and torch's ``scan`` of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan_op
from torch.fx import Graph as Nodes
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import (
    PythonKeyTracer,
    disable_proxy_modes_tracing,
    get_proxy_mode,
    track_tensor_tree,
)

from ..density.recurrence import Recurrence, Tensors
from ..tensors import apart, fresh
from .graph import Function, lifted
from .packing import Packing
from .values import draws_numbers


class Scan:
    """A block of steps, ``block(*inputs)``; its graph has that of a single step once.

    To be called in a trace. Of torch's ``scan`` only the operator is used: its own tracing wants a fake tensor for
    everything that a model reaches, and its derivatives are wrong under inductor in 2.13 (pytorch#153679).
    """

    def __init__(self, block: Function, recurrence: Recurrence) -> None:
        self._block, self._recurrence = block, recurrence

    def __call__(self, *inputs: Tensor) -> Tensors:
        recurrence = self._recurrence
        carry, columns, fixed = recurrence.split(inputs)
        begins = torch.zeros(len(columns[0]), 1, dtype=torch.bool, device=columns[0].device)
        begins[-1 if recurrence.backwards else 0] = True
        columns = (begins, *columns)
        with disable_proxy_modes_tracing(), torch.no_grad():
            step = _Step(self._block, recurrence, carry, columns, fixed)
            body, reached = lifted(step, (*step.begin, *step.first, *fixed))
        if any(draws_numbers(n) for n in body.graph.nodes):
            raise NotImplementedError("its log density draws random numbers")
        zeros = [torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in step.gathered]
        before = [fresh(t) for t in step.carried.pack([*carry, *zeros], 0)]
        along = [t.flip(0) if recurrence.backwards else t for t in step.read.pack(columns, 1)]
        body, packed = _packed(body, [*fixed, *reached])
        out = _emit(body, before, along, apart(packed))
        last = step.carried.unpack(out[: len(before)])
        stacked = step.written.unpack([t.movedim(1, 0) for t in out[len(before) :]])
        last, added = last[: len(carry) + recurrence.firsts], last[len(carry) + recurrence.firsts :]
        return *last, *(t.flip(0) if recurrence.backwards else t for t in stacked), *added


class _Step:
    """One step: what is carried (with firsts and sums), read of columns, and fixed, to what is carried to the next one
    and written to columns. What it gives shares no memory with what it was given."""

    def __init__(
        self, block: Function, recurrence: Recurrence, carry: Tensors, columns: Tensors, fixed: Tensors
    ) -> None:
        self._block, self._recurrence = block, recurrence
        example = block(*carry, *(t[:1] for t in columns[1:]), *fixed)
        _, firsts, written, sums = recurrence.parts(example)
        self.gathered = (*firsts, *sums)
        self.carried = Packing([*carry, *self.gathered])
        self.read = Packing([t[0] for t in columns])
        self.written = Packing([t[0] for t in written])
        self.begin = self.carried.pack([*carry, *self.gathered], 0)
        self.first = self.read.pack([t[0] for t in columns], 0)

    def __call__(self, *inputs: Tensor) -> Tensors:
        r, count = self._recurrence, len(self.begin)
        carry = self.carried.unpack(inputs[:count])
        begins, *columns = self.read.unpack(inputs[count : count + len(self.first)])
        fixed = inputs[count + len(self.first) :]
        out = self._block(*carry[: r.carry], *(t.unsqueeze(0) for t in columns), *fixed)
        following, now, written, more = r.parts(out)
        firsts, sums = carry[r.carry : r.carry + r.firsts], carry[r.carry + r.firsts :]
        firsts = [torch.where(begins, a, b) for a, b in zip(now, firsts, strict=True)]
        sums = [a + b for a, b in zip(sums, more, strict=True)]
        packed = self.carried.pack([*following, *firsts, *sums], 0)
        return tuple(fresh(t) for t in (*packed, *self.written.pack([t.squeeze(0) for t in written], 0)))


def _packed(body: GraphModule, fixed: list[Tensor]) -> tuple[GraphModule, list[Tensor]]:
    """The step with the small ones of its last inputs side by side, and these."""
    packing = Packing(fixed)
    packed = packing.pack(fixed, 0)
    with disable_proxy_modes_tracing():
        unpack, _ = lifted(lambda *parts: tuple(packing.unpack(parts)), tuple(packed))
    graph, own, theirs = Nodes(), _placeholders(body), _placeholders(unpack)
    first = len(own) - len(fixed)
    env = {n: graph.placeholder(f"moving_{i}") for i, n in enumerate(own[:first])}
    members: Any = graph.graph_copy(unpack.graph, {n: graph.placeholder(f"fixed_{i}") for i, n in enumerate(theirs)})
    graph.output(graph.graph_copy(body.graph, {**env, **dict(zip(own[first:], members, strict=True))}))
    return GraphModule(body, graph), packed


def _placeholders(module: GraphModule) -> list[Node]:
    return [n for n in module.graph.nodes if n.op == "placeholder"]


def _emit(body: GraphModule, carry: list[Tensor], columns: list[Tensor], fixed: list[Tensor]) -> Tensors:
    """The steps taken, as one node of the graph that is being traced."""
    with disable_proxy_modes_tracing():
        values = _taken(body, carry, columns, fixed)
    mode = get_proxy_mode()
    assert mode is not None
    tracer = mode.tracer
    assert isinstance(tracer, PythonKeyTracer)
    name = f"step_{sum(1 for _ in tracer.root.children())}"
    tracer.root.add_module(name, body)
    node = tracer.create_proxy("get_attr", name, (), {})
    args = [[tracer.unwrap_proxy(t) for t in part] for part in (carry, columns, fixed)]
    proxies: Any = tracer.create_proxy("call_function", scan_op, (node, args[0], args[1], tuple(args[2])), {})
    return track_tensor_tree(values, proxies, constant=None, tracer=tracer)


def _taken(body: GraphModule, carry: Sequence[Tensor], columns: Sequence[Tensor], fixed: Sequence[Tensor]) -> Tensors:
    found = []
    for k in range(len(columns[0])):
        out = body(*carry, *(t[k] for t in columns), *fixed)
        carry = out[: len(carry)]
        found.append(out[len(carry) :])
    return *carry, *(torch.stack(parts) for parts in zip(*found, strict=True))
