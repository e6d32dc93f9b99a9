"""The short run itself: K transitions, their log-weight increments, and which gradients flow where.

Three ways to run, chosen by :class:`Gradients`:

* ``NONE``: no graph is kept; memory does not grow with K.
* ``GUIDE``: the run is one node of autograd whose backward differentiates with respect to the start and the step
  sizes and nothing else. The model's parameters, which occur inside every step, get no gradient through the run:
  maximum likelihood wants ``grad_theta log p_theta(x, z_K)`` with ``z_K`` held fixed. The backward pass recomputes
  one step at a time, so memory is K states, not K graphs, or ``2 sqrt(K)`` states with ``checkpoint``.
* ``FULL``: an ordinary graph through everything, for the exact gradient of the bound in the model's parameters too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..density.interface import Density
from ..dynamics.dynamics import Dynamics
from ..objectives.objective import Objective
from ..objectives.transition import Transition
from ..starts.base import Base
from ..tensors import keep_rows, where_rows
from .blocks import Advance, Retreat
from .noise import DrawnNoise, GivenNoise, Noise
from .steps import Backward, Carry, Forward, Land, Last, Report, Rule, Tape


class Gradients(Enum):
    NONE = 0
    GUIDE = 1
    FULL = 2


@dataclass(frozen=True)
class RunInfo:
    """What happened in a run; per step and averaged over the rows that were still moving.

    ``log_density`` is ``log pi(u_k)`` per row (times ``full_size / size`` under subsampling) for k = 0..K;
    ``grad_norm`` and ``log_det`` are for k = 0..K-1 (``log_det`` is empty where log q was not asked for);
    ``step_size`` is ``(K, size)``. ``frozen`` marks rows ``(chains, rows)`` that met a non-finite state, gradient or
    determinant and stayed at their last finite state; ``singular`` marks rows in which some step was not invertible,
    so that their log q is not reliable. ``carried`` tells whether log q had the log-determinants of an earlier run
    (``tune_every``).
    """

    log_density: Tensor
    grad_norm: Tensor
    log_det: Tensor
    step_size: Tensor
    frozen: Tensor
    singular: Tensor
    carried: bool = False

    @property
    def nonfinite(self) -> int:
        """Number of frozen rows."""
        return int(self.frozen.sum())

    @property
    def noninvertible(self) -> int:
        """Number of rows with a step that was not invertible."""
        return int(self.singular.sum())

    def __repr__(self) -> str:
        first, last = self.log_density[0].item(), self.log_density[-1].item()
        return (
            f"RunInfo(log density {first:.4g} -> {last:.4g} in {len(self.grad_norm)} steps, "
            f"{self.nonfinite} of {self.frozen.numel()} rows frozen, {self.noninvertible} with a singular step)"
        )


@dataclass(frozen=True)
class ShortRun:
    """A finished run: ``end`` is ``u_K``, ``increment`` the sum of log-weight increments, ``(chains, rows)``.

    ``landed`` is what :meth:`~pyro_shortrun.density.interface.Density.land` gives at the end, without gradients; None where it
    was not asked, or where some row did not get to its last proposal. ``states`` holds ``u_0 .. u_K`` as
    ``(K + 1, chains, rows, size)`` if it was asked for.
    """

    start: Tensor
    end: Tensor
    increment: Tensor
    info: RunInfo
    states: Tensor | None = None
    landed: tuple[Tensor, ...] | None = None

    def every(self, count: int) -> ShortRun:
        """Only the first of every ``count`` chains; a draw is frozen where one of them is."""

        def some(rows: Tensor) -> Tensor:
            return rows.unflatten(0, (-1, count)).any(1)

        return replace(
            self,
            info=replace(self.info, frozen=some(self.info.frozen), singular=some(self.info.singular)),
            start=self.start[::count],
            end=self.end[::count],
            increment=self.increment[::count],
            states=None if self.states is None else self.states[:, ::count],
            landed=None if self.landed is None else tuple(t[::count] for t in self.landed),
        )


@dataclass(frozen=True)
class Runner:
    """What a run needs besides tensors.

    :param account: whether increments (log q) are wanted at all.
    :param base: the density of the start, for objectives that temper, with their temperatures ``beta``, ``(K,)``.
    :param checkpoint: whether the way back of a tuned run recomputes all but every ``sqrt(K)``-th state.
    """

    density: Density
    dynamics: Dynamics
    objective: Objective
    account: bool = True
    checkpoint: bool = False
    base: Base | None = None
    beta: Tensor | None = None

    @cached_property
    def rule(self) -> Rule:
        """The arithmetic of one step."""
        return Rule(self.dynamics, self.objective, self.account)


def run(
    runner: Runner,
    start: Tensor,
    step_size: Tensor,
    noise: Tensor | Noise | None = None,
    gradients: Gradients = Gradients.NONE,
    keep_states: bool = False,
    log_q: Tensor | None = None,
) -> ShortRun:
    """Run ``K = len(step_size)`` transitions from ``start``.

    :param start: ``u_0``, ``(chains, rows, size)``.
    :param step_size: ``eta``, ``(K, size)``.
    :param noise: standard normal, ``(K, chains, rows, size)``; zeros make a noise-free run. Drawn by default.
    :param gradients: which gradients are kept, see :class:`Gradients`.
    :param keep_states: whether ``ShortRun.states`` is wanted.
    :param log_q: log density of the start, ``(chains, rows)``, for objectives that ask for it.
    """
    if noise is None:
        noise = DrawnNoise(runner.dynamics, len(step_size), start)
        noise.block(0, 1)  # before other draws, so that a run is the same whether or not it is accounted for
    noise = noise if isinstance(noise, Noise) else GivenNoise(noise)
    bridge = runner.objective.bridge(runner.dynamics, runner.base, runner.account)
    if bridge is not None:
        return _cross(runner, bridge, start, step_size, noise, gradients, keep_states, log_q)
    aux = runner.objective.draw(start, runner.density.layout) if runner.account else None
    walk = _Walk(runner, noise, () if aux is None else (aux,), keep_states)
    end, increment = _walked(walk, (start, step_size), gradients)
    return walk.result(start, end, increment, step_size)


def _walked(walk: _Walk, inputs: tuple[Tensor, ...], gradients: Gradients, taped: bool = False) -> tuple[Tensor, ...]:
    if gradients is Gradients.FULL:
        return walk.forward(*inputs, graph=True)
    if gradients is Gradients.GUIDE and any(t.requires_grad for t in inputs):
        with torch.enable_grad():
            return _GuideOnly.apply(walk, *inputs)
    return walk.forward(*(t.detach() for t in inputs), taped=taped)


def _cross(
    runner: Runner,
    bridge: Transition,
    start: Tensor,
    step_size: Tensor,
    noise: Noise,
    gradients: Gradients,
    keep_states: bool,
    log_q: Tensor | None,
) -> ShortRun:
    """:func:`run` for objectives that have a bridge."""
    with torch.set_grad_enabled(gradients is not Gradients.NONE):
        beta = start.new_ones(len(step_size)) if runner.beta is None else runner.beta
        first = bridge.begin(runner.density, start, step_size, noise.block(0, 1)[0])
        values = bridge.values(step_size, beta)
        inputs = *first, *values, *bridge.tensors
        walk = _BridgeWalk(runner, noise, bridge, (len(first), len(values)), step_size, keep_states)
        *last, total = _walked(walk, inputs, gradients, taped=bridge.learns)
        added = bridge.finish(first, tuple(last), step_size, log_q)
        increment = total if added is None else total + added
    if bridge.learns:
        with torch.no_grad():
            bridge.learn(walk.tape, tuple(t.detach() for t in last), ~walk.invalid)
    return walk.result(start, last[0], increment, step_size)


class _Walk:
    """The loop over blocks of steps, with its running record."""

    def __init__(self, runner: Runner, noise: Noise, aux: tuple[Tensor, ...], keep_states: bool) -> None:
        self.runner, self.noise, self.aux, self.keep_states = runner, noise, aux, keep_states
        self.states: list[Tensor] = []
        self._segments: list[_Segment] = []
        self._reports: list[Report] = []
        self._lag = 1  # arrivals after which a step's increment is reported

    def forward(self, *given: Tensor, graph: bool = False, taped: bool = False) -> tuple[Tensor, ...]:
        """From start and step sizes to ``u_K`` and the sum of increments.

        A step whose end has a non-finite density, gradient or determinant is undone and its row moves no more.

        :param graph: whether all of it stays in the graph of autograd.
        :param taped: whether :meth:`backward` will be called.
        """
        start, step_size = given if graph else tuple(t.contiguous() for t in given)
        carry, count = Carry.at(start), len(step_size)
        length = math.isqrt(count - 1) + 1 if taped and self.runner.checkpoint else count
        for first in range(0, count, length):
            segment = _Segment(first, step_size[first : first + length], carry)
            carry = self._advance(segment, graph, taped and length == count)
            if taped:
                self._segments.append(segment)
        return self._land(carry, graph)

    def _land(self, carry: Carry, graph: bool) -> tuple[Tensor, Tensor]:
        end, total, self.arrived, *self._last = self._execute(Last(graph), carry)
        self.landed = tuple(self._last[2:])
        self.lands = bool(self.arrived.all())
        self.singular = carry.singular
        return end, total

    def _advance(self, segment: _Segment, graph: bool, taped: bool, again: bool = False) -> Carry:
        """Through a segment; if ``taped``, fills its tapes."""
        carry, forward = segment.begin, Forward(self.runner.rule, taped, graph)

        def inputs(first: int, last: int) -> tuple[Any, ...]:
            noise = self.noise.block(segment.first + first, last - first)
            return *carry, segment.step_size[first:last], noise, *self.aux

        at_once = self._at_once(forward, len(segment.step_size), inputs)
        for k in range(0, len(segment.step_size), at_once):
            carry, tape = self._block(forward, inputs(k, k + at_once), segment.first + k == 0, again)
            if taped:
                segment.tapes.append(Tape(*tape))
        return carry

    def _block(
        self, forward: Any, inputs: tuple[Any, ...], first: bool, again: bool = False
    ) -> tuple[Carry, tuple[Any, ...]]:
        """A block of arrivals, reported unless it was before; the first one also tells whether graphs are stale."""
        out = self._execute(forward, inputs)
        while first and self.runner.density.is_stale(inputs[0], out[6]):
            out = self._execute(forward, inputs)
        if not again:
            self._reports.append(Report(*out[6:10]))
        if self.keep_states:
            self.states.append(out[0].detach().unsqueeze(0))
        return Carry(*out[:6]), out[10:]

    def _at_once(self, fn: Any, count: int, inputs: Callable[[int, int], tuple[Any, ...]]) -> int:
        """How many of ``count`` steps make a block: a divisor; one where every state is wanted."""
        if self.keep_states or self.runner.checkpoint:
            return 1
        most = self.runner.density.steps_at_once(fn, lambda: inputs(0, 1))
        return next(n for n in range(min(most, count), 0, -1) if count % n == 0)

    @property
    def invalid(self) -> Tensor:
        """Rows whose log q is not valid, ``(chains, rows)``."""
        return self.singular | ~self.arrived

    def _without_gradient(self, back: Tensor) -> Tensor:
        """Rows to leave out of the way back: invalid ones, and those that ended where the density is finite and has no
        gradient, which no step has seen."""
        return self.invalid | ~back.isfinite().all(-1)

    def backward(self, back: Tensor, back_total: Tensor) -> tuple[Tensor, ...]:
        """Cotangents of start and step sizes from those of ``u_K`` and of the increments."""
        invalid = self._without_gradient(back)
        pull = torch.where(invalid, back_total, torch.zeros_like(back_total)).sum()
        back, back_total = where_rows(invalid, torch.zeros_like(back), back).contiguous(), back_total.contiguous()
        retreat, found, following = Backward(self.runner.rule), [], self.arrived.unsqueeze(0)
        for segment in reversed(self._segments):
            if not segment.tapes:
                self._advance(segment, graph=False, taped=True, again=True)
            tape = Tape(*map(torch.cat, zip(*segment.tapes, strict=True)))
            segment.tapes.clear()
            ends = torch.cat([tape.arrived[1:], following])
            tape, following = tape._replace(arrived=ends), tape.arrived[:1]

            def inputs(first: int, last: int, segment: _Segment = segment, tape: Tape = tape) -> tuple[Any, ...]:
                noise = self.noise.block(segment.first + first, last - first)
                return invalid, segment.step_size[first:last], noise, *(t[first:last] for t in tape)

            one = (back, back_total, *inputs(0, 1))
            at_once = self._at_once(retreat, len(segment.step_size), lambda *_, one=one: one)
            for last in range(len(segment.step_size), 0, -at_once):
                back, part = self._execute(retreat, (back, back_total, *inputs(last - at_once, last)))
                found.append(part)
        step_size = torch.cat([segment.step_size for segment in self._segments])
        grad_steps = torch.cat(found[::-1]) - pull / (step_size * step_size.numel())
        return where_rows(invalid, torch.zeros_like(back), back), grad_steps

    def result(self, start: Tensor, end: Tensor, increment: Tensor, step_size: Tensor) -> ShortRun:
        """The record of the run."""
        states = torch.cat([*self.states, end.detach().unsqueeze(0)]) if self.keep_states else None
        landed = self.landed if self.landed and self.lands else None
        return ShortRun(start, end, increment, self.info(step_size), states, landed)

    def _execute(self, fn: Any, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return self.runner.density.execute(fn, tuple(inputs), fn.key)

    def info(self, step_size: Tensor) -> RunInfo:
        log_density, last_increment = self._last[:2]
        increments = torch.cat([*(r.increment for r in self._reports), last_increment.unsqueeze(0)])[self._lag :]
        count = len(step_size)
        return RunInfo(
            log_density=torch.cat([*(r.log_density for r in self._reports), log_density.unsqueeze(0)])[: count + 1],
            grad_norm=torch.cat([r.grad_norm for r in self._reports])[:count],
            log_det=increments[:count] if self.runner.account else increments[:0],
            step_size=step_size.detach().clone(),
            frozen=~self.arrived,
            singular=self.singular,
        )


@dataclass
class _Segment:
    """Consecutive steps from ``first``, the state before them, and their tapes block by block."""

    first: int
    step_size: Tensor
    begin: Carry
    tapes: list[Tape] = field(default_factory=list)


class _BridgeWalk(_Walk):
    """The loop over arrivals of a bridge."""

    def __init__(
        self,
        runner: Runner,
        noise: Noise,
        bridge: Transition,
        sizes: tuple[int, int],
        step_size: Tensor,
        keep_states: bool,
    ) -> None:
        """``sizes``: numbers of tensors in a state and of values that every arrival is given."""
        super().__init__(runner, noise, (), keep_states)
        self.bridge, self._steps = bridge, len(step_size)
        self._arrivals = len(step_size) + bridge.ends_at_arrival
        self._constants = bridge.constants(step_size.detach())
        self._sizes = *sizes, len(self._constants)
        self._lag = 1 - bridge.offset

    def forward(self, *given: Tensor, graph: bool = False, taped: bool = False) -> tuple[Tensor, ...]:
        """The last state, its first element the run's end, and the sum of what was added along the way.

        :param given: state before the first arrival, values of all arrivals, further tensors.
        """
        width, count, _ = self._sizes
        state, self._values, self._tensors = given[:width], given[width : width + count], given[width + count :]
        if not graph:
            state = tuple(t.contiguous() for t in state)
        self._tapes: list[tuple[Tensor, ...]] = []
        advance = Advance(self.bridge, self._sizes, taped, graph)
        rows = state[0].new_zeros(state[0].shape[:2])
        carry = (*state, torch.ones_like(rows, dtype=torch.bool), rows, rows)
        self._padded = self._departures(0, self._arrivals) if self.noise.is_whole else None
        if self.bridge.offset:  # the first arrival is not the start, whose density is known
            self.runner.density.refresh(state[0])
        at_once = self._at_once(advance, self._arrivals, lambda *_: (*carry, *self._columns(0, 1), *self._tensors))
        for k in range(0, self._arrivals, at_once):
            inputs = *carry, *self._columns(k, k + at_once), *self._tensors
            out = self._execute(advance, inputs)
            while k == 0 and self.runner.density.is_stale(state[0], out[width + 3]):
                out = self._execute(advance, inputs)
            carry, report, tape = out[: width + 3], out[width + 3 : width + 7], out[width + 7 :]
            self._reports.append(Report(*report))
            self._tapes.append(tape)
            if self.keep_states:
                self.states.append(carry[0].detach().unsqueeze(0))
        return self._end(carry, width, graph)

    def _end(self, carry: tuple[Tensor, ...], width: int, graph: bool) -> tuple[Tensor, ...]:
        state, (alive, pending, total) = carry[:width], carry[width:]
        if self.bridge.ends_at_arrival:
            self.arrived, self.lands = alive, True
            self.landed = () if graph else self._execute(Land(), (state[0],))
            if self.keep_states:
                self.states.pop()
            self._last = [self._reports[-1].log_density[-1], self._reports[-1].increment[-1]]
        else:
            u, proposal, *others = state
            end, total = self._land(Carry(u, proposal, alive, pending, total, torch.zeros_like(alive)), graph)
            state = end, proposal, *others
        self.singular = torch.zeros_like(self.arrived)
        return *state, total

    def _columns(self, first: int, last: int) -> tuple[Tensor, ...]:
        """Noise, values and constants of arrivals ``first .. last - 1``."""
        noise = self._departures(first, last) if self._padded is None else self._padded[first:last]
        return noise, *(t[first:last] for t in (*self._values, *self._constants))

    def _departures(self, first: int, last: int) -> Tensor:
        """Noise of the steps that begin at these arrivals; after the last step there is none."""
        begin, end = first + self.bridge.offset, min(last + self.bridge.offset, self._steps)
        parts = [self.noise.block(begin, end - begin)] if end > begin else []
        missing = last - first - max(end - begin, 0)
        if missing:
            like = parts[0] if parts else self.noise.block(self._steps - 1, 1)
            parts.append(torch.zeros_like(like[:1]).expand(missing, *like.shape[1:]))
        return torch.cat(parts)

    def backward(self, *cotangents: Tensor) -> tuple[Tensor, ...]:
        """Cotangents of what :meth:`forward` was given from those of what it gave."""
        valid = ~self._without_gradient(cotangents[0])
        *back, back_total = cotangents
        if not self.bridge.ends_at_arrival:  # the end is the last proposal
            back = [torch.zeros_like(back[0]), back[0], *back[2:]]
        pull = torch.where(valid, torch.zeros_like(back_total), back_total).sum()
        back = [keep_rows(valid, t, torch.zeros_like(t)).contiguous() for t in back]
        back_total = torch.where(valid, back_total, torch.zeros_like(back_total)).contiguous()
        retreat, width, count = Retreat(self.bridge, self._sizes), self._sizes[0], self._sizes[1]
        states = self.tape
        sums = tuple(torch.zeros_like(t) for t in self._tensors)
        found: list[tuple[Tensor, ...]] = []

        def inputs(first: int, last: int) -> tuple[Tensor, ...]:
            column = *(t[first:last] for t in states), *self._columns(first, last), *self._tensors
            return *back, back_total, valid, *column

        at_once = self._at_once(retreat, self._arrivals, lambda *_: inputs(0, 1))
        for last in range(self._arrivals, 0, -at_once):
            out = self._execute(retreat, inputs(last - at_once, last))
            back = list(out[:width])
            found.append(out[width : width + count])
            sums = tuple(a + b for a, b in zip(sums, out[width + count :], strict=True))
        grads = [torch.cat(t[::-1]) for t in zip(*found, strict=True)]
        eta = self._values[0]
        grads[0] = grads[0] - pull / (eta * self._steps * eta.shape[-1])
        return *(keep_rows(valid, t, torch.zeros_like(t)) for t in back), *grads, *sums

    @property
    def tape(self) -> tuple[Tensor, ...]:
        """The states before all arrivals, ``(arrivals, chains, rows, ...)`` each."""
        if len(self._tapes) > 1:
            self._tapes = [tuple(map(torch.cat, zip(*self._tapes, strict=True)))]
        return self._tapes[0]


class _GuideOnly(torch.autograd.Function):
    """The run as one node: gradients to the start, the step sizes and what else is the guide's only, one recomputed
    step at a time.

    A row that froze or took a singular step has no valid log q to differentiate. It takes the place of a row whose
    loss is ``log eta`` (averaged over steps and coordinates), so that step sizes too large for some rows shrink at a
    bounded rate instead of following a meaningless and often huge gradient.
    """

    @staticmethod
    def forward(ctx: Any, walk: _Walk, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.walk = walk
        return tuple(t.detach() for t in walk.forward(*(t.detach() for t in inputs), taped=True))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, *ctx.walk.backward(*grads)
