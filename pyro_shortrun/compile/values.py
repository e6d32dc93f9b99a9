"""Which nodes of graphs have the same value."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Size
from torch._ops import OpOverload
from torch.fx import Graph as Nodes
from torch.fx import Node

_ATEN = torch.ops.aten
_SAME = {
    _ATEN.clone.default,
    _ATEN.detach.default,
    _ATEN.alias.default,
    _ATEN.lift_fresh_copy.default,
    _ATEN.contiguous.default,
}
_SAME_IF_SHAPED_ALIKE = {_ATEN.expand.default, _ATEN.view.default, _ATEN.reshape.default, _ATEN.slice.Tensor}
_OF_MEMORY = {  # what they give is no function of the values that they are given
    _ATEN.as_strided.default,
    _ATEN.empty.memory_format,
    _ATEN.empty_like.default,
    _ATEN.empty_strided.default,
    _ATEN.new_empty.default,
    _ATEN.new_empty_strided.default,
}
_FILLED = {
    _ATEN.ones_like.default,
    _ATEN.zeros_like.default,
    _ATEN.new_zeros.default,
    _ATEN.new_ones.default,
    _ATEN.zeros.default,
    _ATEN.ones.default,
}


class Values:
    """Numbers of values: nodes of one number, in whichever graph, have the same value, as far as can be seen.

    A value is known by its operation and the numbers of what that is given; copies and views of all of a tensor count
    as the tensor, and what is taken out of a stack as what was put there.
    """

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        self._keys: list[Any] = []

    def number(self, *key: Hashable) -> int:
        """Of the value with this key."""
        if key not in self._numbers:
            self._numbers[key] = len(self._keys)
            self._keys.append(key)
        return self._numbers[key]

    def of_graph(self, graph: Nodes, given: Mapping[Node, int]) -> dict[Node, int]:
        """The numbers of a graph's nodes, of which some are given.

        What may be changed in place, and all that comes of it, has a number of its own.
        """
        found: dict[Node, int] = {}
        changed = _changed(graph)
        for node in graph.nodes:
            if node.op == "output":
                continue
            its_own = node in changed or node.op != "call_function" or draws_numbers(node) or node.target in _OF_MEMORY
            found[node] = given[node] if node in given else self.number(node) if its_own else self._of(node, found)
        return found

    def item(self, number: int, index: int, dim: int = 0) -> int:
        """Of what is at ``index`` along a dimension."""
        match self._keys[number]:
            case ("stack", int(along), *members) if along == dim:
                return int(members[index])
        return self.number("item", number, index, dim)

    def stack(self, dim: int, *members: int) -> int:
        """Of values side by side along a new dimension."""
        return self.number("stack", dim, *members)

    def _of(self, node: Any, found: Mapping[Node, int]) -> int:
        target, first = node.target, _first(node)
        if _is_the_same(node):
            return found[_only(first)]
        if target in _FILLED and (meta := node.meta.get("tensor_meta")) is not None:
            return self.number(str(target), meta.shape, meta.dtype)
        if target is _ATEN.stack.default and all(_dtype(n) is _dtype(node) is not None for n in first):
            return self.stack(_dim(node, 1, _rank(node)), *(found[n] for n in first))
        if target is _ATEN.unsqueeze.default:
            return self.stack(_dim(node, 1, _rank(node)), found[first])
        if target is _ATEN.select.int and node.args[2] >= 0:
            return self.item(found[first], node.args[2], _dim(node, 1, _rank(first)))
        if target is _ATEN.squeeze.dim and _rank(node) < _rank(first):
            return self.item(found[first], 0, _dim(node, 1, _rank(first)))
        if target is operator.getitem and first.target is _ATEN.unbind.int:
            return self.item(found[first.args[0]], node.args[1], _dim(first, 1, _rank(first.args[0])))
        return self.number(target, _hashable(node.args, found), _hashable(node.kwargs, found))


def draws_numbers(node: Node) -> bool:
    """Whether a node takes from a random generator."""
    return isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _is_the_same(node: Any) -> bool:
    """Whether a node's value is that of its first argument."""
    target, first = node.target, _first(node)
    if target in _SAME or (target is _ATEN.cat.default and len(first) == 1):
        return True
    if target is _ATEN.permute.default:
        rank = _rank(first)
        return [d % rank for d in node.args[1]] == list(range(rank))
    return target in _SAME_IF_SHAPED_ALIKE and _shape(node) is not None and bool(_shape(node) == _shape(first))


def _first(node: Node) -> Any:
    return node.args[0] if node.args else None


def _only(argument: Any) -> Any:
    return argument[0] if isinstance(argument, (list, tuple)) else argument


def _shape(node: Any) -> Size | None:
    meta = node.meta.get("tensor_meta")
    return None if meta is None else meta.shape


def _dtype(node: Any) -> torch.dtype | None:
    meta = node.meta.get("tensor_meta")
    return None if meta is None else meta.dtype


def _rank(node: Any) -> int:
    shape = _shape(node)
    return 1000 if shape is None else len(shape)  # negative dimensions then are like no other


def _dim(node: Any, position: int, rank: int) -> int:
    """A dimension that is an argument, 0 by default, counted from the first one."""
    dim = int(node.args[position]) if len(node.args) > position else 0
    return dim if dim >= 0 else dim + rank


def _hashable(value: Any, found: Mapping[Node, int]) -> Hashable:
    if isinstance(value, Node):
        return "node", found[value]
    if isinstance(value, (list, tuple)):
        return tuple(_hashable(v, found) for v in value)
    if isinstance(value, dict):
        return tuple((k, _hashable(v, found)) for k, v in value.items())
    return type(value).__name__, repr(value)


def written(node: Node) -> set[Node]:
    """Nodes whose memory a node writes to: arguments that it changes, and what those are views of."""
    if not isinstance(node.target, OpOverload) or not node.target._schema.is_mutable:
        return set()
    found: set[Node] = set()
    for i, argument in enumerate(node.target._schema.arguments):
        if argument.is_write:
            given = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            for changed in given if isinstance(given, (list, tuple)) else (given,):
                found |= _viewed(changed)
    return found


def _viewed(node: Any) -> set[Node]:
    """A node and, if it is a view, what it is a view of."""
    found: set[Node] = set()
    while isinstance(node, Node):
        found.add(node)
        if not (node.target is operator.getitem or (isinstance(node.target, OpOverload) and node.target.is_view)):
            break
        node = _first(node)
    return found


def _changed(graph: Nodes) -> set[Node]:
    """Nodes whose memory is written to after they were made, and all that comes of them."""
    found: set[Node] = set()
    for node in graph.nodes:
        if memory := written(node):
            found |= {node, *memory}
    for node in graph.nodes:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found
