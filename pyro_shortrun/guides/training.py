"""Training steps of a ShortRunGuide: the loss and all its gradients from one graph."""

from __future__ import annotations

import logging
from collections.abc import Hashable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..compile.graph import Live, Same, arguments
from ..compile.inductor import Backend, Inductor
from ..compile.whole import TracedDensity, Whole
from ..objectives.transition import settings
from ..runs.record import RunInfo
from ..runs.run import Gradients
from ..tensors import apart, plain, random_state, set_random_state
from .simulation import MUCH

_LOGGER = logging.getLogger("pyro_shortrun")
_GRAPHS_AT_MOST = 16
_RENEWALS_AT_MOST = 2
_LOOKED_AT_LEAST = 1024  # steps
_RECORD = 6  # tensors of a RunInfo
_SMALL_GRADIENT = 1e-3  # of the largest one; less may be what rounding left of a sum that is zero


@dataclass(frozen=True)
class Request:
    """A step that is asked for: the loss of ``guide`` at these arguments over ``particles`` runs."""

    guide: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    particles: int

    @property
    def device(self) -> torch.device:
        return self.guide._first.device

    def key(self, live: Live) -> Hashable:
        """What decides the graph: shapes and other values of the arguments, what is conditioned on, training modes, and
        the parts of the guide with their settings."""
        guide = self.guide
        model_trains = guide.model.training if isinstance(guide.model, nn.Module) else None
        parts = Same(guide.start), *((Same(part), settings(part)) for part in (guide.dynamics, guide.objective))
        call = live.key, torch.get_default_dtype(), self.particles, guide.num_steps, Same(guide._conditioned)
        return *call, *parts, guide.training, model_trains

    def aliased(self) -> Request:
        """With other tensor objects as arguments, so that a trace tells them from each other and from what else the
        model reaches."""
        args, kwargs = pytree.tree_map(
            lambda t: t.detach() if isinstance(t, Tensor) and not t.requires_grad else t, (self.args, self.kwargs)
        )
        return replace(self, args=args, kwargs=kwargs)

    @property
    def suits(self) -> bool:
        """Whether it may be one graph: all calls are alike, and no handler around weighs it."""
        guide = self.guide
        alike = guide.training and guide.tune_every == 1 and not guide.full_gradient and not guide.checkpoint
        known = guide._binder is not None and not guide._binder.program.hides
        handlers = all(type(h) is TraceMessenger and h.param_only for h in _PYRO_STACK)
        return alike and known and handlers and torch.is_grad_enabled() and guide.has_density

    def eager(self) -> float:
        """The step without graphs."""
        with self.guide.eagerly():
            loss = -self.guide.log_weight(*self.args, num_particles=self.particles, **self.kwargs).mean()
        if loss.requires_grad:
            loss.backward()
        return loss.item()

    def eager_with_gradients(self, names: list[str]) -> tuple[float, list[Tensor]]:
        """The step without graphs, and what it added to the gradients of some parameters."""
        leaves = [pyro.get_param_store()._params[name] for name in names]
        before = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        try:
            loss = self.eager()
        finally:
            found = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
            for leaf, old, new in zip(leaves, before, found, strict=True):
                leaf.grad = leaf.grad if old is None else old + new
        return loss, found


@dataclass
class _Step:
    """The graph of a step, the parameters that it has gradients for, and how often it was taken."""

    whole: Whole
    names: tuple[str, ...]  # of parameters, all that show
    trained: tuple[int, ...]  # which of them have gradients
    marks: Hashable  # of the parameters, as they were
    taken: int = 0
    rounding: float | None = None  # of the first comparison

    @property
    def is_due(self) -> bool:
        """Whether to look if it still is the model's: at calls 1, 2, 4, 8, ..., and every 1024th."""
        return self.taken & (self.taken - 1) == 0 or self.taken % _LOOKED_AT_LEAST == 0

    @property
    def is_current(self) -> bool:
        """Whether the same parameters are there, to be trained or not as they were."""
        return _marks(self.names) == self.marks

    def agrees(self, request: Request, loss: float, grads: list[Tensor]) -> tuple[bool, float]:
        """Whether the eager step, from the same random state, gives the same; and its loss."""
        eager, known = request.eager_with_gradients([self.names[i] for i in self.trained])
        unit = _SMALL_GRADIENT * max((_largest(g) for g in known), default=0.0)
        gap = max(
            [
                _gap(torch.tensor(loss), torch.tensor(eager)),
                *(_gap(a, b, unit) for a, b in zip(grads, known, strict=True)),
            ]
        )
        tight, loose = (1e-3, 2e-2) if request.guide._first.dtype is torch.float32 else (1e-8, 1e-6)
        if self.rounding is None and gap < loose:
            self.rounding = gap
        return gap <= max(tight, 20 * (self.rounding or 0.0)), eager

    def give(self, grads: list[Tensor]) -> None:
        """Add gradients to those of the parameters."""
        store = pyro.get_param_store()._params
        for i, grad in zip(self.trained, grads, strict=True):
            leaf = store[self.names[i]]
            leaf.grad = grad if leaf.grad is None else leaf.grad + grad


class Training:
    """Steps of one guide by graphs: draw of the start, run, log weight and gradients, for the parameters of guide and
    model alike.

    Graphs are known by the shapes, dtypes and devices of the arguments, their other values, the number of particles,
    and whether guide and model are in training mode, which is looked at in every call; that they still give what the
    eager step gives from the same random state, loss and gradients, in calls 1, 2, 4, 8, ... and every 1024th of each.
    """

    def __init__(self, compile: bool | None) -> None:
        self._compile = compile
        self._steps: dict[Hashable, _Step] = {}
        self._renewals = 0
        self.given_up = False
        self.backend: Backend | None = None  # where it is not that of the guide's compiler

    def __getstate__(self) -> dict[str, Any]:
        return vars(Training(self._compile))

    def turn_on(self) -> None:
        """Compile from now on where that was left open, ``compile=None``."""
        if self._compile is None:
            self.backend = self.backend or Inductor()

    def __call__(self, request: Request, params: set[Tensor] | None = None) -> float | None:
        """The loss, its gradients added to those of the parameters; None where the step is not from a graph.

        :param params: to be told the parameters, in place of Pyro's handlers.
        """
        if self._backend(request.guide) is None or self.given_up or not request.suits:
            return None
        capture = poutine.trace(param_only=True)
        with nullcontext() if params is None else capture:
            loss, names = self._taken(request)
            if params is None:
                for name in names:
                    pyro.param(name)  # shows it
        store = pyro.get_param_store()._params
        if params is not None and loss is not None:
            params |= {store[name] for name in names or capture.trace.nodes}
        return loss

    def _taken(self, request: Request) -> tuple[float | None, tuple[str, ...]]:
        """The loss, and the names of the parameters where the step was not taken eagerly."""
        if request.guide._first is None:
            return request.eager(), ()
        request = replace(request, args=plain(request.args), kwargs=plain(request.kwargs))
        live = arguments(request.args, request.kwargs)
        step = self._known(request, live)
        if step is None:
            return None, ()
        if request.guide.adapts:  # by a step from where the run ends, which the graph does not say
            return request.eager(), ()
        step.taken += 1
        before = random_state(request.device) if step.is_due else None
        found = step.whole(live)
        if found is None:  # a parameter has another shape than it had
            self._forget(step)
            return request.eager(), ()
        summary, *rest = found
        loss, finite, froze, folded = summary.tolist()
        if not finite:  # there are remedies
            return request.eager(), ()
        if before is not None:
            set_random_state(before, request.device)
            return self._compared(request, step, loss, rest[_RECORD:]), ()
        self._note(request.guide, _record(rest), bool(froze or folded))
        step.give(rest[_RECORD:])
        return loss, step.names

    def _compared(self, request: Request, step: _Step, loss: float, grads: list[Tensor]) -> float:
        """The eager step; the graph is dropped if it gave something else."""
        agrees, eager = step.agrees(request, loss, grads)
        if not agrees:
            self._forget(step)
        return eager

    @staticmethod
    def _note(guide: Any, info: RunInfo, in_trouble: bool) -> None:
        guide.info = info
        guide._calls += 1
        if in_trouble:
            guide._watch(info)

    def _known(self, request: Request, live: Live) -> _Step | None:
        key = request.key(live)
        step = self._steps.get(key)
        if step is None or not step.is_current:
            step = self._made(request, live)
            if step is not None:
                self._steps[key] = step
        return step

    def _made(self, request: Request, live: Live) -> _Step | None:
        if len(self._steps) >= _GRAPHS_AT_MOST:
            self._give_up(f"shapes or other arguments changed more than {_GRAPHS_AT_MOST} times")
            return None
        if live.is_opaque:
            self._give_up("an argument is neither a tensor nor a number")
            return None
        request = request.aliased()
        live = arguments(request.args, request.kwargs)
        guide, before, computation = request.guide, random_state(request.device), _Computation(request)
        info, backend = guide.info, self._backend(guide)
        assert backend is not None
        try:
            with guide.eagerly():  # what is found out once for each structure is not found out in a trace
                guide.setup(*request.args, **request.kwargs)
            whole = Whole.of(computation, live, backend)
        except Exception as reason:  # tracing and compiling raise whatever they meet
            self._give_up(reason)
            return None
        finally:
            set_random_state(before, request.device)
            guide.info = info
        return _Step(whole, computation.names, computation.trained, _marks(computation.names))

    def _backend(self, guide: Any) -> Backend | None:
        compiler = guide._compiler
        return self.backend if compiler is None else None if compiler.is_eager else compiler.backend

    def _forget(self, step: _Step) -> None:
        self._steps.clear()
        self._renewals += 1
        if step.taken == 1:
            self._give_up("traced, it gives another loss than the eager step")
        elif self._renewals > _RENEWALS_AT_MOST:
            self._give_up("its loss changes with something that is no argument: pass that as a tensor argument")

    def _give_up(self, reason: object) -> None:
        self.given_up = True
        self._steps.clear()
        _LOGGER.warning(
            "a training step is not one graph but several: it cannot be traced or compiled as a whole (%s).",
            str(reason).strip().split("\n")[0],
        )


class _Computation:
    """What a step computes: a summary (loss, whether starts are finite, whether some rows froze, whether many took a
    singular step), the run's :class:`RunInfo`, and gradients."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self.names: tuple[str, ...] = ()
        self.trained: tuple[int, ...] = ()

    def __call__(self) -> tuple[Tensor, ...]:
        request, guide, capture = self._request, self._request.guide, poutine.trace(param_only=True)
        with torch.enable_grad(), capture, guide._pyro_context:
            call = guide._bind(request.args, request.kwargs, request.particles)
            call = replace(call, density=TracedDensity(call.model))
            drawn, result = guide._run(call, request.particles, True, Gradients.GUIDE)
            density = call.density.differentiable(result.end, True)
            log_q = drawn.log_q - result.increment
            loss = -(density - call.density.layout.row_weight * log_q).sum(-1).mean()
        info = result.info
        flags = drawn.finite.all(), info.frozen.any(), info.singular.to(loss.dtype).mean() > MUCH
        summary = torch.stack([loss.detach(), *(flag.to(loss.dtype) for flag in flags)])
        record = (info.log_density, info.grad_norm, info.log_det, info.step_size, info.frozen, info.singular)
        return summary, *record, *self._gradients(loss, capture.trace.nodes)

    def _gradients(self, loss: Tensor, sites: Any) -> list[Tensor]:
        store = pyro.get_param_store()
        names = [name for name, site in sites.items() if site["type"] == "param" and name in store._params]
        leaves = [store._params[name] for name in names]
        wanted = [i for i, leaf in enumerate(leaves) if leaf.requires_grad]
        found = torch.autograd.grad(loss, [leaves[i] for i in wanted], allow_unused=True)
        pairs = [(i, g) for i, g in zip(wanted, found, strict=True) if g is not None]
        self.names, self.trained = tuple(names), tuple(i for i, _ in pairs)
        return apart([g.contiguous() for _, g in pairs])  # as they may be changed in place


def _marks(names: tuple[str, ...]) -> Hashable:
    """Of parameters: whether they are trained, and their constraints; None for those that are gone."""
    store = pyro.get_param_store()
    found = ((store._params.get(name), store._constraints.get(name)) for name in names)
    return tuple(None if leaf is None else (leaf.requires_grad, Same(constraint)) for leaf, constraint in found)


def _record(tensors: list[Tensor]) -> RunInfo:
    info: Any = tensors[:_RECORD]
    return RunInfo(*info)


def _gap(a: Tensor, b: Tensor, unit: float = 0.0) -> float:
    """The largest difference, in units of the largest number, if that is not below ``unit``."""
    finite = b.isfinite()
    if not torch.equal(a.isfinite(), finite):
        return float("inf")
    a, b = a[finite], b[finite]
    return ((a - b).abs().max().item() / (1e-6 + max(_largest(b), unit))) if a.numel() else 0.0


def _largest(t: Tensor) -> float:
    """The largest absolute value of finite numbers."""
    finite = t[t.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0
