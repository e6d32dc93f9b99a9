"""Compiled evaluation: Pyro runs once per structure, while a graph is traced, and not in the loop.

:class:`CompiledDensity` is a :class:`~pyro_shortrun.density.LogDensity` whose value and gradient are traced with
``make_fx`` and compiled by inductor. Whatever tensors the model reaches (data, parameters, plate indices) show in the
trace as constants; they become inputs of the graph and are found again in later calls by their role (:func:`roles`), so
that a changed batch or parameter changes the result. A start's eager log density is compared with the graph's in every
call: a graph that has gone stale in another way is traced anew.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from .density import LogDensity
from .program import Binding, Program
from .structure import Structure

_LOGGER = logging.getLogger("pyro_shortrun")
_GRAPHS_AT_MOST = 64
_LOOPED_AT_MOST = 8  # chains whose copies of the model may stand side by side in one graph

Role = Hashable
Function = Callable[..., Any]


@dataclass(frozen=True)
class Live:
    """What a call's graphs depend on: tensors by role, and a key of everything else."""

    tensors: Mapping[Role, Tensor]
    key: Hashable


def roles(bind: Binding, batches: Mapping[str, Tensor]) -> Live:
    """The tensors that a model sees in a call, by the way they come to it, and their shapes and the other arguments."""
    tensors: dict[Role, Tensor] = dict(pyro.get_param_store()._params.items())
    sources = (bind.args, bind.kwargs, dict(bind.indices), dict(bind.given), dict(batches))
    leaves, spec = pytree.tree_flatten(sources)
    tensors.update({i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)})
    literals = tuple(_literal(leaf) for leaf in leaves if not isinstance(leaf, Tensor))
    shapes = tuple((role, t.shape, t.dtype, t.device) for role, t in tensors.items())
    return Live(tensors, (shapes, literals, str(spec), bind.enum_dim))


def _literal(leaf: Any) -> Hashable:
    return leaf if isinstance(leaf, (int, float, str, bool, type(None))) else id(leaf)


@dataclass(frozen=True)
class Graph:
    """A compiled function whose constants have become inputs: each a role, or a tensor that has none."""

    run: Function
    constants: tuple[Role | Tensor, ...]

    def bind(self, live: Live) -> Function:
        """The function with this call's tensors in their roles."""
        values = [(c if isinstance(c, Tensor) else live.tensors[c]).detach() for c in self.constants]
        return lambda *inputs: self.run(*inputs, *values)


def trace(fn: Function, inputs: tuple[Tensor, ...], live: Live, backend: str) -> Graph:
    """Trace and compile ``fn(*inputs)``; what it reaches besides its inputs becomes an input too."""
    with pyro.validation_enabled(False):
        module = make_fx(lambda *xs: fn(*xs))(*inputs)  # a bound method would count its self
    role_of = {id(t): role for role, t in live.tensors.items()}
    constants: dict[str, Role | Tensor] = {}
    last = [n for n in module.graph.nodes if n.op == "placeholder"][-1]
    for node in [n for n in module.graph.nodes if n.op == "get_attr"]:
        value = getattr(module, node.target)
        with module.graph.inserting_after(last):
            new = module.graph.placeholder(f"constant_{len(constants)}")
        constants[new.name] = role_of.get(id(value), value.detach())
        node.replace_all_uses_with(new)
        module.graph.erase_node(node)
        last = new
    lifted = GraphModule({}, module.graph)
    options: dict[str, Any] = {"mode": "reduce-overhead"} if inputs[0].is_cuda and backend == "inductor" else {}
    run = torch.compile(lifted, fullgraph=True, dynamic=False, backend=backend, **options)
    return Graph(run, tuple(constants.values()))


class Compiler:
    """The graphs of one guide or kernel, by function, structure and shapes.

    :param backend: of ``torch.compile``.
    """

    def __init__(self, backend: str = "inductor") -> None:
        self.backend = backend
        self._graphs: dict[Hashable, Graph] = {}
        self._eager = False

    def graph(self, key: Hashable, fn: Function, inputs: tuple[Tensor, ...], live: Live) -> Graph | None:
        """The graph of ``fn``, made if need be; None where the model cannot be traced, which is warned about once."""
        if self._eager:
            return None
        if key not in self._graphs and len(self._graphs) >= _GRAPHS_AT_MOST:
            self.give_up(f"its shapes or other arguments changed more than {_GRAPHS_AT_MOST} times")
            return None
        if key not in self._graphs:
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")  # inductor's own
                    graph = trace(fn, inputs, live, self.backend)
                    graph.bind(live)(*inputs)
            except Exception as reason:  # make_fx, dynamo and inductor raise whatever they meet
                self.give_up(reason)
                return None
            self._graphs[key] = graph
        return self._graphs[key]

    def forget(self) -> None:
        """Drop every graph."""
        self._graphs.clear()

    def give_up(self, reason: object) -> None:
        """Run eagerly from now on."""
        self._eager = True
        text = str(reason).strip().split("\n")[0]
        _LOGGER.warning(
            "compile=True has no effect: the model runs eagerly, as it cannot be traced or compiled (%s).", text
        )

    def __getstate__(self) -> dict:
        return {"backend": self.backend, "_graphs": {}, "_eager": False}


class CompiledDensity(LogDensity):
    """A log density whose value and gradient come from compiled graphs where nothing differentiates through them."""

    def __init__(self, program: Program, structure: Structure, bind: Binding, compiler: Compiler) -> None:
        super().__init__(program, structure, bind)
        self._compiler = compiler
        self._bound: dict[Hashable, Function | None] = {}
        self._live: Live | None = None
        self._known: tuple[Tensor, Tensor] | None = None

    def on_batches(self, indices: Mapping[str, Tensor]) -> LogDensity:
        density = CompiledDensity(self._program, self.structure, self.bind, self._compiler)
        density._batches = indices
        return density

    def __call__(self, u: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().__call__(u)
        run = self._compiled("value", self._eager_value, u)
        return super().__call__(u) if run is None else run(u)

    def expect(self, u: Tensor, value: Tensor) -> None:
        self._known = (u.detach(), value.detach())

    def value_and_grad(self, u: Tensor, create_graph: bool = False) -> tuple[Tensor, Tensor]:
        run = None if create_graph else self._compiled("gradient", self._eager_gradient, u)
        if run is None:
            return super().value_and_grad(u, create_graph)
        with torch.no_grad():
            value, grad = run(u.detach())
        if self._is_stale(u, value):
            return self._renewed(u)
        return value, grad

    def _is_stale(self, u: Tensor, value: Tensor) -> bool:
        """Whether the graph's value differs from the eager one at the start of the run (compared once)."""
        known, self._known = self._known, None
        if known is None or known[0].shape != u.shape or not torch.equal(known[0], u.detach()):
            return False
        tolerance = 1e-3 if u.dtype is torch.float32 else 1e-6
        return not torch.allclose(known[1], value, rtol=tolerance, atol=tolerance, equal_nan=True)

    def _renewed(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The graph no longer is the model's: something changed that is not an argument or a parameter."""
        value, grad = super().value_and_grad(u)
        self._compiler.forget()
        self._bound.clear()
        run = self._compiled("gradient", self._eager_gradient, u)
        if run is not None:
            self._known = (u.detach(), value)
            if self._is_stale(u, run(u.detach())[0]):
                self._compiler.give_up("its graph does not give the model's log density")
                self._bound.clear()
        return value, grad

    def _compiled(self, name: str, fn: Function, u: Tensor) -> Function | None:
        """The graph of ``fn`` bound to this call, or None."""
        call = (name, u.shape, u.dtype, u.device)
        if call not in self._bound:
            if self._live is None:
                self._live = roles(self.bind, self._batches)
            inputs = (u.detach(),)
            graph = self._compiler.graph((*call, self.layout, self._live.key), fn, inputs, self._live)
            self._bound[call] = None if graph is None else graph.bind(self._live)
        return self._bound[call]

    def _plain(self, u: Tensor) -> LogDensity:
        """Eager, with its own note of whether vmap works: it may fail in a trace where it works without."""
        density = LogDensity(self._program, replace(self.structure, vectorizes={}), self.bind)
        density._batches = self._batches
        return density

    def _eager_value(self, u: Tensor) -> Tensor:
        plain = self._plain(u)
        with torch.no_grad():
            value = plain(u)
        _check_size(plain, u)
        return value

    def _eager_gradient(self, u: Tensor) -> tuple[Tensor, Tensor]:
        plain = self._plain(u)
        value, grad = plain.value_and_grad(u)
        _check_size(plain, u)
        return value, grad


def _check_size(density: LogDensity, u: Tensor) -> None:
    if not density.structure.vectorizes.get("density", True) and len(u) > _LOOPED_AT_MOST:
        raise NotImplementedError(f"its {len(u)} chains cannot be vectorised in a trace")


def density_of(program: Program, structure: Structure, bind: Binding, compiler: Compiler | None) -> LogDensity:
    """The log density of a bound model, compiled if there is a compiler."""
    if compiler is None:
        return LogDensity(program, structure, bind)
    return CompiledDensity(program, structure, bind, compiler)
