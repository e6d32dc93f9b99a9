"""A function of tensors as a graph whose other tensors have become inputs, known by their role in a call."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node, graph_module
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from ..density.program import Binding

Role = Hashable
Function = Callable[..., Any]
Constants = tuple["Role | Tensor", ...]


@dataclass(frozen=True)
class Live:
    """What a call's graphs depend on: tensors by role (the arguments', and parameters by name), and a key of the
    arguments' shapes and of everything else."""

    tensors: Mapping[Role, Tensor]
    key: Hashable
    is_opaque: bool = False  # whether some argument is neither a tensor nor a number


def roles(bind: Binding, batches: Mapping[str, Tensor]) -> Live:
    """The tensors that a model sees in a call, by the way they come to it, and their shapes and the other arguments."""
    return _live((bind.args, bind.kwargs, dict(bind.indices), dict(bind.given), dict(batches)), bind.enum_dim)


def arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Live:
    """The tensors that come to a model by its arguments and by Pyro's store."""
    return _live((args, kwargs))


def _live(sources: tuple[Any, ...], *more: Hashable) -> Live:
    leaves, structure = pytree.tree_flatten(sources)
    given: dict[Role, Tensor] = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    literals = tuple(_literal(leaf) for leaf in leaves if not isinstance(leaf, Tensor))
    shapes = tuple((role, *spec(t)) for role, t in given.items())
    tensors: dict[Role, Tensor] = dict(pyro.get_param_store()._params.items())
    is_opaque = any(isinstance(literal, Same) for literal in literals)
    return Live(tensors | given, (shapes, literals, structure, *more), is_opaque)


def _literal(leaf: Any) -> Hashable:
    return (type(leaf), leaf) if isinstance(leaf, (int, float, str, bool, type(None))) else Same(leaf)


@dataclass(frozen=True, eq=False)
class Same:
    """An object that is no tensor and no number: known by its identity, and kept, so that this is not used again."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def spec(t: Tensor) -> tuple[Any, ...]:
    """What a compiled graph takes for granted of a tensor."""
    return t.shape, t.stride(), t.dtype, t.device


@contextmanager
def sources_forgotten() -> Iterator[None]:
    """Without what torch keeps for good: the source text of every graph that is made within, for tracebacks through it,
    some megabytes for each training step."""
    kept: dict[str, str] = getattr(getattr(graph_module, "_loader", None), "eval_cache", {})
    before = set(kept)
    try:
        yield
    finally:
        for name in set(kept) - before:
            del kept[name]


@dataclass(frozen=True)
class Graph:
    """A compiled function whose constants have become inputs: each a role, or a tensor that has none."""

    run: Function
    constants: Constants
    specs: tuple[tuple[Any, ...], ...]

    @classmethod
    def of(cls, run: Function, constants: Constants, live: Live) -> Graph:
        """With the shapes that the constants have now."""
        return cls(run, constants, tuple(map(spec, bound(constants, live))))

    def fits(self, live: Live) -> bool:
        """Whether parameters still have the shapes that they had."""
        known = all(isinstance(c, Tensor) or c in live.tensors for c in self.constants)
        return known and self.specs == tuple(map(spec, bound(self.constants, live)))

    def wants_gradients(self, live: Live) -> bool:
        """Whether the function depends on something that is to be trained."""
        return any((c if isinstance(c, Tensor) else live.tensors[c]).requires_grad for c in self.constants)

    def bind(self, live: Live) -> Function:
        """The function with this call's tensors in their roles."""
        values = bound(self.constants, live)
        return lambda *inputs: self.run(*inputs, *values)


def bound(constants: Constants, live: Live) -> list[Tensor]:
    """The tensors that the constants stand for in a call, outside autograd."""
    return [(c if isinstance(c, Tensor) else live.tensors[c]).detach() for c in constants]


def trace(fn: Function, inputs: tuple[Tensor, ...], live: Live) -> tuple[GraphModule, Constants]:
    """Trace ``fn(*inputs)``; what it reaches besides its inputs becomes an input too."""
    module, values = lifted(fn, inputs)
    role_of = {id(t): role for role, t in live.tensors.items()}
    return module, tuple(role_of.get(id(value), value) for value in values)


def lifted(fn: Function, inputs: tuple[Tensor, ...]) -> tuple[GraphModule, list[Tensor]]:
    """The graph of ``fn(*inputs)``, whose further inputs are the tensors that it reaches besides."""
    inputs = tuple(t.clone() for t in inputs)  # the tracer takes inputs that are one tensor for one input
    context = TracingContext(FakeTensorMode(allow_fallback_kernels=True))  # or each node's metadata make one of these
    with pyro.validation_enabled(False), torch.no_grad(), tracing(context):
        module = make_fx(lambda *xs: fn(*xs))(*inputs)  # a bound method would count its self
    known: dict[int, tuple[Node, Tensor]] = {}
    last = next((n for n in reversed(module.graph.nodes) if n.op == "placeholder"), None)
    for node in [n for n in module.graph.nodes if n.op == "get_attr"]:
        value = getattr(module, node.target)
        if isinstance(value, GraphModule):  # the step of a scan
            continue
        if id(value) not in known:
            with module.graph.inserting_before() if last is None else module.graph.inserting_after(last):
                last = module.graph.placeholder(f"constant_{len(known)}")
            known[id(value)] = last, value
        node.replace_all_uses_with(known[id(value)][0])
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    modules = {n.target: getattr(module, n.target) for n in module.graph.nodes if n.op == "get_attr"}
    return GraphModule(modules, module.graph), [value for _, value in known.values()]
