"""Compiled evaluation: Pyro runs once per structure, while a graph is traced, and not in the loop.

:class:`CompiledDensity` is a :class:`~pyro_shortrun.density.model.LogDensity` whose value and gradient, and the blocks
of steps of :mod:`pyro_shortrun.runs`, are traced with ``make_fx`` and compiled by inductor.

Whatever tensors the model reaches (data, parameters, plate indices) show in the trace as constants; they become inputs
of the graph and are found again in later calls by their role (:mod:`pyro_shortrun.compile.graph`), so that a changed
batch or parameter changes the result. A start's eager log density is compared with the graph's in every call: a graph
that has gone stale in another way is traced anew.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from ..density.interface import Block, Density
from ..density.model import LogDensity
from ..density.program import Binding, Program
from ..density.structure import Structure
from .graph import Constants, Function, Graph, Live, bound, roles, trace
from .inductor import Backend, Inductor

_LOGGER = logging.getLogger("pyro_shortrun")
_GRAPHS_AT_MOST = 64
_STEPS_AT_MOST = 5  # in one graph
_NODES_AT_MOST = 1700  # in a graph of several steps: more take long to compile
_SMALL_STATE = 1024  # numbers
_RENEWALS_AT_MOST = 4
_LOOPED_AT_MOST = 8  # chains whose copies of the model may stand side by side in one graph


class Compiler:
    """The graphs of one guide or kernel, by function, structure and shapes."""

    def __init__(self, backend: Backend | None = None) -> None:
        self.backend = Inductor() if backend is None else backend
        self._graphs: dict[Hashable, Graph] = {}
        self._sizes: dict[Hashable, int] = {}
        self._traced: dict[Hashable, tuple[GraphModule, Constants]] = {}  # to be compiled if they are the size wanted
        self._given_up: set[str] = set()
        self._renewals = 0
        self.rounding: float | None = None  # how far a new graph was from the eager log density, relatively
        self._eager = False

    def graph(self, key: Hashable, what: str, fn: Function, inputs: tuple[Tensor, ...], live: Live) -> Graph | None:
        """The graph of ``fn``, made if need be; None where it cannot be traced, which is warned about once.

        :param what: name of the function for the warning.
        """
        if self._eager or what in self._given_up:
            return None
        if key in self._graphs and not self._graphs[key].fits(live):
            del self._graphs[key]
        if key not in self._graphs and len(self._graphs) >= _GRAPHS_AT_MOST:
            self.give_up(f"its shapes or other arguments changed more than {_GRAPHS_AT_MOST} times")
            return None
        if key not in self._graphs:
            try:
                with warnings.catch_warnings(), torch.no_grad():
                    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")  # inductor's own
                    module, constants = self._traced.pop(key) if key in self._traced else trace(fn, inputs, live)
                    values = [*inputs, *bound(constants, live)]
                    self._graphs[key] = Graph.of(self.backend.build(module, values), constants, live)
            except Exception as reason:  # make_fx and inductor raise whatever they meet
                self.give_up(reason, what if self._graphs else None)
                return None
        return self._graphs[key]

    def size(self, key: Hashable, fn: Function, inputs: tuple[Tensor, ...], live: Live) -> int | None:
        """Number of operations in ``fn``, or None where it cannot be traced."""
        if key not in self._sizes:
            try:
                self._traced[key] = trace(fn, inputs, live)
            except Exception:  # said when it is to be compiled
                return None
            self._sizes[key] = len(self._traced[key][0].graph.nodes)
        return self._sizes[key]

    def forget(self) -> None:
        """Drop every graph, as they no longer are the model's; give up if this happens again and again."""
        self._renewals += 1
        if self._renewals > _RENEWALS_AT_MOST:
            self.give_up("something that it depends on changes from call to call: pass that as a tensor argument")
        self.rounding = None
        self._graphs.clear()
        self._sizes.clear()
        self._traced.clear()

    def give_up(self, reason: object, what: str | None = None) -> None:
        """Run eagerly from now on, in one function or all."""
        text = str(reason).strip().split("\n")[0]
        if what is None:
            self._eager = True
            _LOGGER.warning(
                "compile=True has no effect: the model runs eagerly, as it cannot be traced or compiled (%s).", text
            )
        else:
            self._given_up.add(what)
            _LOGGER.warning(
                "compile=True has no effect on the %s part of a run, which cannot be traced or compiled (%s).",
                what,
                text,
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(Compiler(self.backend))}


class CompiledDensity(LogDensity):
    """A log density whose value and gradient, and blocks of steps, come from compiled graphs."""

    def __init__(self, program: Program, structure: Structure, bind: Binding, compiler: Compiler) -> None:
        super().__init__(program, structure, bind)
        self._compiler = compiler
        self._bound: dict[Hashable, Function | None] = {}
        self._at_once: dict[Hashable, int] = {}
        self._live: Live | None = None
        self._known: tuple[Tensor, Tensor] | None = None
        self._renewed = False

    def on_batches(self, indices: Mapping[str, Tensor]) -> LogDensity:
        density = CompiledDensity(self._program, self.structure, self.bind, self._compiler)
        density._batches = indices
        return density

    def execute(self, fn: Block, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """From a graph that gives what :meth:`expect` was told, which is found out where ``fn`` has a witness."""
        out = self._outputs(fn, inputs)
        while self._known is not None and hasattr(fn, "witness") and self._is_stale(*fn.witness(inputs, out)):
            out = self._outputs(fn, inputs)
        return out

    def _outputs(self, fn: Block, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if getattr(fn, "graph", False):  # of autograd
            return fn(self, *inputs)
        with torch.no_grad():
            ready = _ready(inputs)
            run = self._compiled(fn, ready)
            return fn(self._plain(), *inputs) if run is None else run(*ready)

    def steps_at_once(self, fn: Block, inputs: Callable[[], tuple[Tensor, ...]]) -> int:
        """Several where a step is so small that calling its graph takes most of the time."""
        if getattr(fn, "graph", False):
            return 1
        if fn.key not in self._at_once:
            self._at_once[fn.key] = self._choose(fn, _ready(inputs()))
        return self._at_once[fn.key]

    def _choose(self, fn: Block, inputs: tuple[Tensor, ...]) -> int:
        if inputs[0].numel() > _SMALL_STATE or _STEPS_AT_MOST == 1:
            return 1
        key = self._key(fn.key, inputs)
        size = self._compiler.size(key, self._traceable(fn), inputs, self._roles)
        return 1 if size is None else max(1, min(_STEPS_AT_MOST, _NODES_AT_MOST // size))

    def __call__(self, u: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().__call__(u)
        return self.execute(_VALUE, (u,))[0]

    def value_and_grad(self, u: Tensor, create_graph: bool = False) -> tuple[Tensor, Tensor]:
        if create_graph:
            return super().value_and_grad(u, create_graph)
        value, grad = self.execute(_GRADIENT, (u,))
        return value, grad

    def differentiable(self, u: Tensor, parameters: bool) -> Tensor:
        """From the graph of the gradient, where no tensor that the model reaches wants a gradient."""
        if parameters and self.structure.vectorizes.get("parameters move supports", True):
            return super().differentiable(u, parameters)  # finds out
        inputs = _ready((u,))
        graph = self._graph(_GRADIENT, inputs)
        if graph is None or (parameters and graph.wants_gradients(self._roles)):
            return super().differentiable(u, parameters)
        value, grad = self.value_and_grad(inputs[0])
        return value + ((u - u.detach()) * grad).sum(-1)

    def expect(self, u: Tensor, value: Tensor) -> None:
        self._known = (u.detach(), value.detach())

    def _is_stale(self, u: Tensor, value: Tensor) -> bool:
        """Whether graphs no longer are the model's, which is asked once for each expectation; then they are dropped,
        and given up if new ones are no better.

        :param value: ``log pi(u)`` of the graphs; if ``u`` is not what was expected, they are asked for that.
        """
        known, self._known = self._known, None
        assert known is not None
        if known[0].shape != u.shape or not torch.equal(known[0], u.detach()):
            (value,) = self._outputs(_VALUE, known[:1])
        if self._agree(known[1], value.detach()):
            return False
        if self._renewed:
            self._compiler.give_up("its graph does not give the model's log density")
        else:
            self._compiler.forget()
            self._renewed, self._known = True, known
        self._bound.clear()
        return True

    def _agree(self, known: Tensor, value: Tensor) -> bool:
        """Within the rounding of the first comparison of these graphs, or a loose bound for that one."""
        gap = ((known - value).abs() / (1 + known.abs())).nan_to_num(0.0).max().item()
        if not torch.equal(known.isfinite(), value.isfinite()):
            return False
        tight, loose = (2e-5, 1e-3) if known.dtype is torch.float32 else (1e-9, 1e-6)
        if self._compiler.rounding is None and gap < loose:
            self._compiler.rounding = gap
        return gap <= max(tight, 20 * (self._compiler.rounding or 0.0))

    @property
    def _roles(self) -> Live:
        if self._live is None:
            self._live = roles(self.bind, self._batches)
        return self._live

    def _key(self, key: Hashable, inputs: tuple[Tensor, ...]) -> Hashable:
        shapes = tuple((t.shape, t.dtype, t.device) for t in inputs)
        return key, shapes, self.layout, self._roles.key

    def _compiled(self, fn: Block, inputs: tuple[Tensor, ...]) -> Function | None:
        """The graph of ``fn`` bound to this call, or None."""
        here = (fn.key, tuple(t.shape for t in inputs), inputs[0].dtype, inputs[0].device)
        if here not in self._bound:
            self.layout.drift_scale(inputs[0])  # kept by the layout: not to be made in a trace
            graph = self._graph(fn, inputs)
            self._bound[here] = None if graph is None else graph.bind(self._roles)
        return self._bound[here]

    def _graph(self, fn: Block, inputs: tuple[Tensor, ...]) -> Graph | None:
        name = str(fn.key[0])
        return self._compiler.graph(self._key(fn.key, inputs), name, self._traceable(fn), inputs, self._roles)

    def _traceable(self, fn: Block) -> Function:
        def call(*inputs: Tensor) -> tuple[Tensor, ...]:
            plain = self._plain()
            plain.repeats = self.layout.rows == 1 and not self._batches
            out = fn(plain, *inputs)
            chains = len(inputs[0])
            if not plain.structure.vectorizes.get("density", True) and chains > _LOOPED_AT_MOST:
                raise NotImplementedError(f"its {chains} chains cannot be vectorised in a trace")
            return out

        return call

    def _plain(self) -> LogDensity:
        """Eager, with its own note of whether vmap works: it may fail in a trace where it works without."""
        density = LogDensity(self._program, replace(self.structure, vectorizes={}), self.bind)
        density._batches = self._batches
        return density


def _ready(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Inputs as graphs expect them: outside autograd, and contiguous, as the shapes are all they are known by."""
    return tuple((t.detach() if t.requires_grad else t).contiguous() for t in inputs)


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


def density_of(program: Program, structure: Structure, bind: Binding, compiler: Compiler | None) -> LogDensity:
    """The log density of a bound model, compiled if there is a compiler."""
    if compiler is None:
        return LogDensity(program, structure, bind)
    return CompiledDensity(program, structure, bind, compiler)
