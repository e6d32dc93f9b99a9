"""What the way back need not compute again: what cost much on the way there is written down in each step."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch._higher_order_ops.scan import scan_op
from torch.fx import GraphModule, Node
from torch.fx.passes.shape_prop import TensorMetadata

from .values import Values

_ATEN = torch.ops.aten
_COSTLY = {
    _ATEN.mm.default,
    _ATEN.mv.default,
    _ATEN.dot.default,
    _ATEN.bmm.default,
    _ATEN.addmm.default,
    _ATEN.addmv.default,
    _ATEN.baddbmm.default,
    _ATEN.convolution.default,
    _ATEN.linalg_solve_triangular.default,
}
_NUMBERS_AT_MOST = 2**24  # written down by one loop for another


@dataclass
class _Loop:
    """A scan in a graph, its step, and the numbers of the step's values."""

    node: Node
    step: GraphModule
    length: int
    numbers: dict[Node, int] = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[list[Node], list[Node], list[Node]]:
        """What the scan is given: carry, columns and fixed ones."""
        _, carry, columns, fixed = self.node.args
        return list(carry), list(columns), list(fixed)  # type: ignore[arg-type]

    @property
    def is_reversed(self) -> bool:
        """Whether its columns were turned round."""
        return all(n.target is _ATEN.flip.default and n.args[1] == [0] for n in self.inputs[1])

    @property
    def outputs(self) -> list[Node]:
        """What a step gives."""
        (node,) = (n for n in self.step.graph.nodes if n.op == "output")
        return list(node.args[0])

    def write(self, values: list[tuple[Node, list[int]]], graph: Any) -> list[Node]:
        """Further columns of these values of a step, dimensions in these orders, as nodes of the graph around."""
        (end,) = (n for n in self.step.graph.nodes if n.op == "output")
        count = len(self.outputs)
        with self.step.graph.inserting_before(end):
            ordered = [self.step.graph.call_function(_ATEN.permute.default, value) for value in values]
            kept = [self.step.graph.call_function(_ATEN.clone.default, (v,), _CONTIGUOUS) for v in ordered]
        end.args = ((*self.outputs, *kept),)
        self.step.recompile()
        with graph.inserting_after(self.node):
            return [graph.call_function(operator.getitem, (self.node, count + i)) for i in range(len(kept))]

    def read(self, columns: list[Node], values: list[list[Node]]) -> None:
        """Take values of a step, each of which may be that of several nodes, from columns in the order of the steps
        that wrote them. Strides stay: the step may depend on them."""
        carry, known, fixed = self.inputs
        graph, inner = self.node.graph, self.step.graph
        last = [n for n in inner.nodes if n.op == "placeholder"][len(carry) + len(known) - 1]
        for i, same in reversed(list(enumerate(values))):
            order = _order(same[0])
            back = [order.index(d) for d in range(len(order))]
            with inner.inserting_after(last):
                given = inner.placeholder(f"kept_{i}")
            with inner.inserting_before(_first_operation(inner)):
                value = inner.call_function(_ATEN.permute.default, (given, back))
            value.meta = {k: v for k, v in same[0].meta.items() if k == "tensor_meta"}
            for node in same:
                node.replace_all_uses_with(value)
        with graph.inserting_before(self.node):
            turned = [graph.call_function(_ATEN.flip.default, (n, [0])) for n in columns]
        self.node.args = (self.node.args[0], carry, [*known, *turned], tuple(fixed))
        inner.eliminate_dead_code()
        self.step.recompile()


_CONTIGUOUS: dict[str, Any] = {"memory_format": torch.contiguous_format}


def reuse(module: GraphModule) -> None:
    """Let steps on the way back take what costs much from those on the way there, where that has it; in place."""
    loops = _loops(module)
    numbers = Values()
    outer = numbers.of_graph(module.graph, {})
    there: list[_Loop] = []
    for loop in loops:
        _number(loop, numbers, outer, {one.node: one for one in there})
        if not loop.is_reversed:
            there.append(loop)
            continue
        for one in there:
            if one.length == loop.length:
                _share(one, loop)
    module.graph.lint()
    module.recompile()


def _loops(module: GraphModule) -> list[_Loop]:
    nodes = [n for n in module.graph.nodes if n.target is scan_op]
    found = []
    for node in nodes:
        step, _, columns, _ = node.args
        found.append(_Loop(node, getattr(module, step.target), columns[0].meta["tensor_meta"].shape[0]))
    return found


def _number(loop: _Loop, numbers: Values, outer: dict[Node, int], before: dict[Node, _Loop]) -> None:
    """Number the values of a loop's step: of its columns by the step that they belong to."""
    carry, columns, fixed = loop.inputs
    if loop.is_reversed:
        columns = [n.args[0] for n in columns]  # type: ignore[misc]
    own = [numbers.number(loop.node, i) for i in range(len(carry))]
    of_step = [_entry(n, numbers, outer, before) for n in columns]
    given = [*own, *of_step, *(outer[n] for n in fixed)]
    inputs = (n for n in loop.step.graph.nodes if n.op == "placeholder")
    loop.numbers = numbers.of_graph(loop.step.graph, dict(zip(inputs, given, strict=True)))


def _entry(node: Node, numbers: Values, outer: dict[Node, int], before: dict[Node, _Loop]) -> int:
    """The number of what one step has of a column."""

    def entry(n: Any) -> int:
        return _entry(n, numbers, outer, before)

    args: Any = node.args
    match node.target:
        case _ATEN.stack.default if args[1:] == (1,):
            return numbers.stack(0, *map(entry, args[0]))
        case _ATEN.unsqueeze.default if args[1] == 1:
            return numbers.stack(0, entry(args[0]))
        case _ATEN.detach.default | _ATEN.clone.default:
            return entry(args[0])
        case _ATEN.slice.Tensor if node.meta["tensor_meta"].shape == args[0].meta["tensor_meta"].shape:
            return entry(args[0])
        case _ATEN.cat.default if len(args[0]) == 1:
            return entry(args[0][0])
        case operator.getitem if args[0].target is _ATEN.unbind.int and args[0].args[1:] in ((), (0,)):
            return _member(args[0].args[0], args[1], numbers, outer, before, node)
    return numbers.number("entry", outer[node])


def _member(stacked: Any, index: int, numbers: Values, outer: dict[Node, int], before: Any, node: Node) -> int:
    """Of one of several columns that a loop wrote side by side."""
    source = stacked.args[0] if stacked.target is _ATEN.permute.default else None
    if source is not None and source.target is operator.getitem and source.args[0] in before:
        if list(stacked.args[1])[:2] == [1, 0]:
            loop = before[source.args[0]]
            return numbers.item(loop.numbers[loop.outputs[source.args[1]]], index)
    return numbers.number("entry", outer[node])


def _share(there: _Loop, back: _Loop) -> None:
    """Let the way back read what it would compute again."""
    known = {number: node for node, number in reversed(there.numbers.items()) if _is_costly(node)}
    wanted: dict[Any, list[Node]] = {}
    for node in _needed(back, known):
        if back.numbers[node] in known:
            wanted.setdefault((back.numbers[node], *_order(node)), []).append(node)
    kept, room = [], _NUMBERS_AT_MOST // there.length
    for same in sorted(wanted.values(), key=lambda same: _size(same[0])):
        room -= _size(same[0])
        if room >= 0:
            kept.append(same)
    if kept:
        columns = there.write([(known[back.numbers[n]], _order(n)) for n, *_ in kept], there.node.graph)
        back.read(columns, kept)


def _needed(loop: _Loop, known: dict[int, Node]) -> list[Node]:
    """Of a step's nodes: those that its outputs come from, not beyond those that are known."""
    found: dict[Node, None] = {}
    waiting = loop.outputs
    while waiting:
        node = waiting.pop()
        if node in found:
            continue
        found[node] = None
        if loop.numbers.get(node) not in known or not _is_costly(node):
            waiting.extend(node.all_input_nodes)
    return [n for n in found if _is_costly(n)]


def _is_costly(node: Node) -> bool:
    """Whether a node is a single tensor that costs much."""
    return node.target in _COSTLY and isinstance(node.meta.get("tensor_meta"), TensorMetadata)


def _size(node: Node) -> int:
    return prod(node.meta["tensor_meta"].shape)


def _order(node: Node) -> list[int]:
    """The dimensions of a value, from the one along which its numbers are furthest apart."""
    stride = node.meta["tensor_meta"].stride
    return sorted(range(len(stride)), key=lambda d: -stride[d])


def _first_operation(graph: Any) -> Node:
    return next(n for n in graph.nodes if n.op != "placeholder")
