"""The graphs of a guide or kernel, and those of one call, bound to its tensors."""

from __future__ import annotations

import logging
from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..density.interface import Block, Density
from ..density.model import LogDensity
from .graph import Function, Graph, Live, bound, roles, sources_forgotten, trace
from .inductor import Backend, Inductor
from .scan import Scan

_LOGGER = logging.getLogger("pyro_shortrun")
_GRAPHS_AT_MOST = 64
_RENEWALS_AT_MOST = 4
_LOOPED_AT_MOST = 8  # chains whose copies of the model may stand side by side in one graph


class Compiler:
    """The graphs of one guide or kernel, by function, structure and shapes.

    :param asked: whether somebody asked for graphs, and is to be told where there are none.
    """

    def __init__(self, backend: Backend | None = None, asked: bool = True) -> None:
        self.backend = Inductor() if backend is None else backend
        self._level = logging.WARNING if asked else logging.DEBUG
        self._graphs: dict[Hashable, Graph] = {}
        self._given_up: set[str] = set()
        self._renewals = 0
        self.rounding: float | None = None  # how far a new graph was from the eager log density, relatively
        self.is_eager = False  # given up altogether

    def graph(self, key: Hashable, what: str, fn: Function, inputs: tuple[Tensor, ...], live: Live) -> Graph | None:
        """The graph of ``fn``, made if need be; None where it cannot be traced, which is warned about once.

        :param what: name of the function for the warning.
        """
        if self.is_eager or what in self._given_up:
            return None
        if key in self._graphs and not self._graphs[key].fits(live):
            del self._graphs[key]
        if key not in self._graphs and len(self._graphs) >= _GRAPHS_AT_MOST:
            self.give_up(f"its shapes or other arguments changed more than {_GRAPHS_AT_MOST} times")
            return None
        if key not in self._graphs:
            try:
                with torch.no_grad(), sources_forgotten():
                    module, constants = trace(fn, inputs, live)
                    values = [*inputs, *bound(constants, live)]
                    self._graphs[key] = Graph.of(self.backend.build(module, values), constants, live)
            except Exception as reason:  # make_fx and inductor raise whatever they meet
                self.give_up(reason, what if self._graphs else None)
                return None
        return self._graphs[key]

    def agrees(self, known: Tensor, value: Tensor) -> bool:
        """Whether the graphs' ``value`` is the log density: within the rounding of their first comparison, or a loose
        bound for that one."""
        gap = ((known - value).abs() / (1 + known.abs())).nan_to_num(0.0).max().item()
        if not torch.equal(known.isfinite(), value.isfinite()):
            return False
        tight, loose = (2e-5, 1e-3) if known.dtype is torch.float32 else (1e-9, 1e-6)
        if self.rounding is None and gap < loose:
            self.rounding = gap
        return gap <= max(tight, 20 * (self.rounding or 0.0))

    def forget(self) -> None:
        """Drop every graph, as they no longer are the model's; give up if this happens again and again."""
        self._renewals += 1
        if self._renewals > _RENEWALS_AT_MOST:
            self.give_up("something that it depends on changes from call to call: pass that as a tensor argument")
        self.rounding = None
        self._graphs.clear()

    def give_up(self, reason: object, what: str | None = None) -> None:
        """Run eagerly from now on, in one function or all."""
        text = str(reason).strip().split("\n")[0]
        if what is None:
            self.is_eager = True
            _LOGGER.log(
                self._level,
                "compile=True has no effect: the model runs eagerly, as it cannot be traced or compiled (%s).",
                text,
            )
        else:
            self._given_up.add(what)
            _LOGGER.log(
                self._level,
                "compile=True has no effect on the %s part of a run, which cannot be traced or compiled (%s).",
                what,
                text,
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(Compiler(self.backend)), "_level": self._level}


class CallGraphs:
    """The graphs of one call: those of its structure and shapes, with the call's tensors in their roles."""

    def __init__(self, model: LogDensity, compiler: Compiler) -> None:
        self.compiler = compiler
        self._model = model
        self._bound: dict[Hashable, Function | None] = {}

    def run(self, fn: Block, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """``fn(density, *inputs)``, without gradients; eager where it cannot be traced."""
        with torch.no_grad():
            if getattr(fn, "recurrence", None) is not None and not self.compiler.backend.takes_loops:
                return self._without(fn, inputs)
            ready = prepared(inputs)
            run = self._of_call(fn, ready)
            return self._without(fn, inputs) if run is None else run(*ready)

    def _without(self, fn: Block, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Where the whole cannot be a graph: its steps one by one, which may be."""
        recurrence = getattr(fn, "recurrence", None)
        if recurrence is None or self.compiler.is_eager:
            return fn(_unspoilt(self._model), *inputs)
        return recurrence.repeat(lambda *step: self.run(_Single(fn), step), inputs)

    def find(self, fn: Block, inputs: tuple[Tensor, ...]) -> Graph | None:
        """The graph of ``fn``, made if need be; None where it cannot be traced."""
        name = str(fn.key[0])
        return self.compiler.graph(self._key(fn, inputs), name, self._traceable(fn), inputs, self.live)

    def forget(self) -> None:
        """Ask the compiler again from now on."""
        self._bound.clear()

    @cached_property
    def live(self) -> Live:
        """The call's tensors by role."""
        return roles(self._model.bind, self._model.batches)

    def _key(self, fn: Block, inputs: tuple[Tensor, ...]) -> Hashable:
        shapes = tuple((t.shape, t.dtype, t.device) for t in inputs)
        return fn.key, shapes, self._model.layout, self.live.key

    def _of_call(self, fn: Block, inputs: tuple[Tensor, ...]) -> Function | None:
        """The graph of ``fn`` bound to this call, or None."""
        here = (fn.key, tuple(t.shape for t in inputs), inputs[0].dtype, inputs[0].device)
        if here not in self._bound:
            self._model.layout.drift_scale(inputs[0])  # kept by the layout: not to be made in a trace
            graph = self.find(fn, inputs)
            self._bound[here] = None if graph is None else graph.bind(self.live)
        return self._bound[here]

    def _traceable(self, fn: Block) -> Function:
        block, recurrence = traceable(fn, self._model), getattr(fn, "recurrence", None)
        return block if recurrence is None else Scan(block, recurrence)


def traceable(fn: Block, model: LogDensity) -> Function:
    """A block of a bound model as a function of tensors alone."""

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        density = replace(_unspoilt(model), repeats=model.layout.rows == 1 and not model.batches)
        out = fn(density, *inputs)
        chains = len(inputs[0])
        if not density.structure.vectorizes.get("density", True) and chains > _LOOPED_AT_MOST:
            raise NotImplementedError(f"its {chains} chains cannot be vectorised in a trace")
        return out

    return call


def _unspoilt(model: LogDensity) -> LogDensity:
    """With its own note of whether vmap works: it may fail in a trace where it works without."""
    return replace(model, structure=replace(model.structure, vectorizes={}))


@dataclass(frozen=True)
class _Single:
    """A block of one step, without a loop around it in the graph."""

    block: Block

    @property
    def key(self) -> tuple[Hashable, ...]:
        return f"{self.block.key[0]} step", *self.block.key[1:]

    def __call__(self, density: Density, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.block(density, *inputs)


def prepared(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Inputs as graphs expect them: outside autograd, and contiguous, as the shapes are all they are known by."""
    return tuple((t.detach() if t.requires_grad else t).contiguous() for t in inputs)
