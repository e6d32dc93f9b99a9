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
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .base import Base
from .bridge import Tempered, TemperedBackward, TemperedForward
from .dynamics import Dynamics
from .noise import Drawn, Given, Noise
from .objective import Objective
from .potential import Density
from .steps import Backward, Carry, Forward, Land, Last, Report, Rule, Tape, where_rows


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

    ``landed`` is what :meth:`~pyro_shortrun.potential.Density.land` gives at the end, without gradients; None where it
    was not asked, or where some row did not get to its last proposal. ``states`` holds ``u_0 .. u_K`` as
    ``(K + 1, chains, rows, size)`` if it was asked for.
    """

    start: Tensor
    end: Tensor
    increment: Tensor
    info: RunInfo
    states: Tensor | None = None
    landed: tuple[Tensor, ...] | None = None


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
) -> ShortRun:
    """Run ``K = len(step_size)`` transitions from ``start``.

    :param start: ``u_0``, ``(chains, rows, size)``.
    :param step_size: ``eta``, ``(K, size)``.
    :param noise: standard normal, ``(K, chains, rows, size)``; zeros make a noise-free run. Drawn by default.
    :param gradients: which gradients are kept, see :class:`Gradients`.
    :param keep_states: whether ``ShortRun.states`` is wanted.
    """
    if noise is None:
        noise = Drawn(runner.dynamics, len(step_size), start)
        noise.block(0, 1)  # before other draws, so that a run is the same whether or not it is accounted for
    aux = runner.objective.draw(start, runner.density.layout) if runner.account else None
    noise = noise if isinstance(noise, Noise) else Given(noise)
    walk: _Walk
    inputs: tuple[Tensor, ...] = (start, step_size)
    if runner.objective.tempers:
        assert runner.base is not None
        walk = _TemperedWalk(runner, noise, (), keep_states)
        beta = start.new_ones(len(step_size)) if runner.beta is None else runner.beta
        inputs = (start, step_size, beta, *runner.base.tensors)
    else:
        walk = _Walk(runner, noise, () if aux is None else (aux,), keep_states)
    if gradients is Gradients.FULL:
        end, increment = walk.forward(*inputs, graph=True)
    elif gradients is Gradients.GUIDE and any(t.requires_grad for t in inputs):
        with torch.enable_grad():
            end, increment = _GuideOnly.apply(walk, *inputs)
    else:
        end, increment = walk.forward(*(t.detach() for t in inputs))
    states = torch.cat([*walk.states, end.detach().unsqueeze(0)]) if keep_states else None
    landed = walk.landed if walk.landed and walk.lands else None
    return ShortRun(start, end, increment, walk.info(step_size), states, landed)


class _Walk:
    """The loop over blocks of steps, with its running record."""

    def __init__(self, runner: Runner, noise: Noise, aux: tuple[Tensor, ...], keep_states: bool) -> None:
        self.runner, self.noise, self.aux, self.keep_states = runner, noise, aux, keep_states
        self.states: list[Tensor] = []
        self._segments: list[_Segment] = []
        self._reports: list[Report] = []

    def forward(
        self, start: Tensor, step_size: Tensor, *extra: Tensor, graph: bool = False, taped: bool = False
    ) -> tuple[Tensor, Tensor]:
        """``u_K`` and the sum of increments.

        A step whose end has a non-finite density, gradient or determinant is undone and its row moves no more.

        :param graph: whether all of it stays in the graph of autograd.
        :param taped: whether :meth:`backward` will be called.
        """
        if not graph:
            start, step_size = start.contiguous(), step_size.contiguous()
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

        def inputs(first: int, last: int) -> tuple:
            noise = self.noise.block(segment.first + first, last - first)
            return *carry, segment.step_size[first:last], noise, *self.aux

        at_once = self._at_once(forward, len(segment.step_size), inputs)
        for k in range(0, len(segment.step_size), at_once):
            carry, tape = self._block(forward, inputs(k, k + at_once), segment.first + k == 0, again)
            if taped:
                segment.tapes.append(Tape(*tape))
        return carry

    def _block(self, forward: Any, inputs: tuple, first: bool, again: bool = False) -> tuple[Carry, tuple]:
        """A block of arrivals, reported unless it was before; the first one also tells whether graphs are stale."""
        out = self._execute(forward, inputs)
        while first and self.runner.density.is_stale(inputs[0], out[6]):
            out = self._execute(forward, inputs)
        if not again:
            self._reports.append(Report(*out[6:10]))
        if self.keep_states:
            self.states.append(out[0].detach().unsqueeze(0))
        return Carry(*out[:6]), out[10:]

    def _at_once(self, fn: Any, count: int, inputs: Callable[[int, int], tuple]) -> int:
        """How many of ``count`` steps make a block: a divisor; one where every state is wanted."""
        if self.keep_states or self.runner.checkpoint:
            return 1
        most = self.runner.density.steps_at_once(fn, lambda: inputs(0, 1))
        return next(n for n in range(min(most, count), 0, -1) if count % n == 0)

    @property
    def invalid(self) -> Tensor:
        """Rows whose log q is not valid, ``(chains, rows)``."""
        return self.singular | ~self.arrived

    def backward(self, back: Tensor, back_total: Tensor) -> tuple[Tensor, ...]:
        """Cotangents of what :meth:`forward` was given from those of ``u_K`` and of the increments."""
        invalid = self.invalid
        back, back_total = back.contiguous(), back_total.contiguous()
        retreat, found, following = Backward(self.runner.rule), [], self.arrived.unsqueeze(0)
        for segment in reversed(self._segments):
            if not segment.tapes:
                self._advance(segment, graph=False, taped=True, again=True)
            tape = Tape(*map(torch.cat, zip(*segment.tapes, strict=True)))
            segment.tapes.clear()
            ends = torch.cat([tape.arrived[1:], following])
            tape, following = tape._replace(arrived=ends), tape.arrived[:1]

            def inputs(first: int, last: int, segment: _Segment = segment, tape: Tape = tape) -> tuple:
                noise = self.noise.block(segment.first + first, last - first)
                return invalid, segment.step_size[first:last], noise, *(t[first:last] for t in tape)

            one = (back, back_total, *inputs(0, 1))
            at_once = self._at_once(retreat, len(segment.step_size), lambda *_, one=one: one)
            for last in range(len(segment.step_size), 0, -at_once):
                back, part = self._execute(retreat, (back, back_total, *inputs(last - at_once, last)))
                found.append(part)
        return back, torch.cat(found[::-1])

    def _execute(self, fn: Any, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return self.runner.density.execute(fn, tuple(inputs), fn.key)

    def info(self, step_size: Tensor) -> RunInfo:
        log_density, last_increment = self._last[:2]
        increments = torch.cat([*(r.increment for r in self._reports), last_increment.unsqueeze(0)])[1:]
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


class _TemperedWalk(_Walk):
    """The loop over arrivals of a run whose targets move from the start's density to the model's."""

    def forward(
        self, start: Tensor, step_size: Tensor, *extra: Tensor, graph: bool = False, taped: bool = False
    ) -> tuple[Tensor, Tensor]:
        assert self.runner.base is not None
        beta, *tensors = extra
        self._step = Tempered(self.runner.rule, self.runner.base)
        self._schedule = _padded(step_size, beta, graph)
        self._tensors = tuple(tensors)
        self._tapes: list[Tensor] = []
        forward, carry = TemperedForward(self._step, taped, graph), Carry.at(start if graph else start.contiguous())
        steps, count = len(step_size), len(step_size) + 1
        self._noise = self._padded_noise(0, count, steps) if self.noise.is_whole else None
        at_once = self._at_once(forward, count, lambda *_: (*carry, *self._arrivals(0, 1), *tensors))
        for k in range(0, count, at_once):
            carry, tape = self._block(forward, (*carry, *self._arrivals(k, k + at_once), *tensors), k == 0)
            self._tapes.extend(tape)
        self.arrived, self.singular = carry.alive, carry.singular
        self.lands = True
        self.landed = () if graph else self._execute(Land(), (carry.u,))
        if self.keep_states:
            self.states.pop()  # the end
        self._last = [self._reports[-1].log_density[-1], self._reports[-1].increment[-1]]
        return carry.u, carry.total

    def _arrivals(self, first: int, last: int) -> tuple[Tensor, ...]:
        """The schedule of arrivals ``first .. last - 1``; before the first step and after the last one is no noise."""
        eta, beta, ends = self._schedule
        count = len(ends) - 1
        noise = self._padded_noise(first, last, count) if self._noise is None else self._noise[first : last + 1]
        return eta[first : last + 1], beta[first : last + 1], noise, ends[first:last]

    def _padded_noise(self, first: int, last: int, count: int) -> Tensor:
        """Noise of the steps that end and begin at these arrivals, of ``count`` steps."""
        inner = self.noise.block(max(first - 1, 0), min(last, count) - max(first - 1, 0))
        silent = torch.zeros_like(inner[:1])
        return torch.cat([silent] * (first == 0) + [inner] + [silent] * (last > count))

    def backward(self, back: Tensor, back_total: Tensor) -> tuple[Tensor, ...]:
        valid = ~self.invalid
        zero = torch.zeros_like(back)
        earlier, back = where_rows(valid, back, zero), zero
        back_total = torch.where(valid, back_total, torch.zeros_like(back_total))
        retreat, count = TemperedBackward(self._step), len(self._schedule[2])
        states = torch.cat(self._tapes)
        befores = torch.cat([states[:1], states[:-1]])
        grads = [torch.zeros_like(t) for t in self._schedule[:2]]
        bases = [torch.zeros_like(t) for t in self._tensors]

        def inputs(first: int, last: int) -> tuple:
            return *self._arrivals(first, last), states[first:last], befores[first:last], *self._tensors

        one = (back, earlier, back_total, valid, *inputs(0, 1))
        at_once = self._at_once(retreat, count, lambda *_: one)
        for last in range(count, 0, -at_once):
            first = last - at_once
            out = self._execute(retreat, (back, earlier, back_total, valid, *inputs(first, last)))
            back, earlier = out[:2]
            for grad, ended, began in zip(grads, out[2:6:2], out[3:6:2], strict=True):
                grad[first:last] += ended
                grad[first + 1 : last + 1] += began
            bases = [a + b for a, b in zip(bases, out[6:], strict=True)]
        return back, *(g[1:-1] for g in grads), *bases


def _padded(step_size: Tensor, beta: Tensor, graph: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Step sizes and temperatures with one more before the first step and after the last, where they do not matter."""
    if not graph:
        step_size, beta = step_size.detach(), beta.detach()
    eta = torch.cat([step_size[:1], step_size, step_size[-1:]])
    ends = torch.ones(len(step_size) + 1, dtype=eta.dtype, device=eta.device)
    ends[0] = 0
    return eta, torch.cat([beta[:1], beta, beta[-1:]]), ends


class _GuideOnly(torch.autograd.Function):
    """The run as one node: gradients to the start, the step sizes and what else is the guide's only, one recomputed
    step at a time.

    A row that froze or took a singular step has no valid log q to differentiate. It takes the place of a row whose
    loss is ``log eta`` (averaged over steps and coordinates), so that step sizes too large for some rows shrink at a
    bounded rate instead of following a meaningless and often huge gradient.
    """

    @staticmethod
    def forward(ctx: Any, walk: _Walk, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        end, total = walk.forward(*(t.detach() for t in inputs), taped=True)
        ctx.walk, ctx.step_size = walk, inputs[1].detach()
        return end.detach(), total.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_end: Tensor, grad_total: Tensor) -> tuple:
        walk, step_size = ctx.walk, ctx.step_size
        grad_start, grad_steps, *others = walk.backward(grad_end, grad_total)
        pull = torch.where(walk.invalid, grad_total, torch.zeros_like(grad_total)).sum()
        grad_steps = grad_steps - pull / (step_size * step_size.numel())
        return None, where_rows(walk.invalid, torch.zeros_like(grad_start), grad_start), grad_steps, *others
