"""Training steps of a ShortRunGuide: the loss and all its gradients from one graph."""

from __future__ import annotations

import logging
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, nn

from ..compile.graph import Live, arguments
from ..compile.whole import TracedDensity, Whole
from ..runs.record import RunInfo
from ..runs.run import Gradients
from ..tensors import plain, random_state, set_random_state

_LOGGER = logging.getLogger("pyro_shortrun")
_GRAPHS_AT_MOST = 16
_RENEWALS_AT_MOST = 2


@dataclass
class _Step:
    """The graph of a step, the parameters that it has gradients for, and how often it was taken."""

    whole: Whole
    names: tuple[str, ...]  # of parameters, all that show
    trained: tuple[int, ...]  # which of them have gradients
    taken: int = 0
    rounding: float | None = field(default=None)

    @property
    def is_due(self) -> bool:
        """Whether to look if it still is the model's: at calls 1, 2, 4, 8, ..."""
        return self.taken & (self.taken - 1) == 0


class Training:
    """Steps of one guide by graphs: draw of the start, run, log weight and gradients, for the parameters of guide and
    model alike.

    Graphs are known by the shapes, dtypes and devices of the arguments, their other values, the number of particles,
    and whether guide and model are in training mode, which is looked at in every call; that they still give what the
    eager step gives from the same random state, loss and gradients, in calls 1, 2, 4, 8, ... of each.
    """

    def __init__(self) -> None:
        self._steps: dict[Hashable, _Step] = {}
        self._renewals = 0
        self.given_up = False

    def __getstate__(self) -> dict[str, Any]:
        return vars(Training())

    def __call__(self, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any], particles: int) -> float | None:
        """The loss, its gradients added to those of the parameters; None where the step has to be an eager one."""
        if self.given_up or not _suits(guide):
            return None
        if guide._first is None:
            return self._eager(guide, args, kwargs, particles)[0]
        args, kwargs = plain(args), plain(kwargs)
        live = arguments(args, kwargs)
        key = live.key, particles, id(guide._conditioned), _modes(guide)
        step = self._steps.get(key)
        if step is not None and not step.whole.fits(live):
            step = None
        if step is None:
            step = self._made(guide, args, kwargs, particles, live)
            if step is None:
                return None
            self._steps[key] = step
        return self._take(guide, step, live, args, kwargs, particles)

    def _take(
        self, guide: Any, step: _Step, live: Live, args: tuple[Any, ...], kwargs: dict[str, Any], particles: int
    ) -> float | None:
        step.taken += 1
        device = guide._first.device
        before = random_state(device)
        summary, *rest = step.whole(live)
        loss, finite, froze, folded = summary.tolist()
        if not finite or step.is_due:
            set_random_state(before, device)
        if not finite:
            return self._eager(guide, args, kwargs, particles)[0]
        if step.is_due:
            return self._compared(guide, step, loss, rest[6:], args, kwargs, particles)
        guide.info = RunInfo(*rest[:6])  # type: ignore[arg-type]
        guide._calls += 1
        if froze or folded:
            guide._watch(guide.info)
        self._give(step, rest[6:])
        return loss

    @staticmethod
    def _give(step: _Step, grads: list[Tensor]) -> None:
        for name in step.names:
            pyro.param(name)  # shows it to handlers, as SVI's
        store = pyro.get_param_store()._params
        for i, grad in zip(step.trained, grads, strict=True):
            leaf = store[step.names[i]]
            leaf.grad = grad if leaf.grad is None else leaf.grad + grad

    def _compared(
        self,
        guide: Any,
        step: _Step,
        loss: float,
        grads: list[Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        particles: int,
    ) -> float:
        """The eager step, from the same random state; the graph is dropped if it gave something else."""
        names = [step.names[i] for i in step.trained]
        eager, known = self._eager(guide, args, kwargs, particles, names)
        gap = max([_gap(torch.tensor(loss), torch.tensor(eager)), *map(_gap, grads, known)])
        tight, loose = (1e-3, 2e-2) if guide._first.dtype is torch.float32 else (1e-8, 1e-6)
        if step.rounding is None and gap < loose:
            step.rounding = gap
        if not gap <= max(tight, 20 * (step.rounding or 0.0)):
            self._forget(step)
        return eager

    @staticmethod
    def _eager(
        guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any], particles: int, names: list[str] | None = None
    ) -> tuple[float, list[Tensor]]:
        """The step without graphs, and gradients of parameters by name."""
        with guide.eagerly():
            loss = -guide.log_weight(*args, num_particles=particles, **kwargs).mean()
        store = pyro.get_param_store()._params
        before = [store[name].grad for name in names or ()]
        leaves = [store[name] for name in names or ()]
        for leaf in leaves:
            leaf.grad = None
        loss.backward()
        found = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        for leaf, old in zip(leaves, before, strict=True):
            leaf.grad = leaf.grad if old is None else old if leaf.grad is None else old + leaf.grad
        return loss.item(), found

    def _forget(self, step: _Step) -> None:
        self._steps.clear()
        self._renewals += 1
        if step.taken == 1:
            self._give_up("traced, it gives another loss than the eager step")
        elif self._renewals > _RENEWALS_AT_MOST:
            self._give_up("its loss changes with something that is no argument: pass that as a tensor argument")

    def _made(
        self, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any], particles: int, live: Live
    ) -> _Step | None:
        if len(self._steps) >= _GRAPHS_AT_MOST:
            self._give_up(f"shapes or other arguments changed more than {_GRAPHS_AT_MOST} times")
            return None
        device = guide._first.device
        before, info = random_state(device), guide.info
        computation = _Computation(guide, args, kwargs, particles)
        try:
            with guide.eagerly():  # what is found out once for each structure is not found out in a trace
                guide.setup(*args, **kwargs)
            whole = Whole.of(computation, live, guide._compiler.backend)
        except Exception as reason:  # tracing and compiling raise whatever they meet
            self._give_up(reason)
            return None
        finally:
            set_random_state(before, device)
            guide.info = info
        return _Step(whole, computation.names, computation.trained)

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

    def __init__(self, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any], particles: int) -> None:
        self._guide, self._args, self._kwargs, self._particles = guide, args, kwargs, particles
        self.names: tuple[str, ...] = ()
        self.trained: tuple[int, ...] = ()

    def __call__(self) -> tuple[Tensor, ...]:
        guide, capture = self._guide, poutine.trace(param_only=True)
        with torch.enable_grad(), capture, guide._pyro_context:
            call = guide._bind(self._args, self._kwargs, self._particles)
            call = replace(call, density=TracedDensity(call.model))
            drawn, result = guide._run(call, self._particles, True, Gradients.GUIDE)
            density = call.density.differentiable(result.end, True)
            log_q = drawn.log_q - result.increment
            loss = -(density - call.density.layout.row_weight * log_q).sum(-1).mean()
        info = result.info
        flags = drawn.finite.all(), info.frozen.any(), info.singular.to(loss.dtype).mean() > 0.25
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
        return [g for _, g in pairs]


def _suits(guide: Any) -> bool:
    """Whether a step of this guide may be one graph: all calls alike, and no handler around that weighs it."""
    plain_calls = guide.training and guide.tune_every == 1 and not guide.full_gradient and not guide.checkpoint
    known = guide._binder is not None and not guide._binder.program.hides
    handlers = all(type(h) is TraceMessenger and h.param_only for h in _PYRO_STACK)
    return plain_calls and known and handlers and torch.is_grad_enabled() and guide.has_density


def _modes(guide: Any) -> Hashable:
    return guide.model.training if isinstance(guide.model, nn.Module) else None


def _gap(a: Tensor, b: Tensor) -> float:
    """The largest difference, in units of the largest number."""
    if not torch.equal(a.isfinite(), b.isfinite()):
        return float("inf")
    return ((a - b).abs().max() / (1e-6 + b.abs().max())).nan_to_num(0.0).item() if a.numel() else 0.0
