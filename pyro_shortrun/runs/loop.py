"""The one loop over blocks of arrivals, forwards and back, with its running record."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..density.interface import Density
from ..objectives.transition import State, Transition
from ..tensors import keep_rows
from .blocks import Advance, Carry, Land, Last, Report, Retreat, Sizes
from .noise import Noise
from .record import RunInfo, ShortRun

_STEPS_AT_LEAST = 8  # in a block
_NUMBERS_AT_ONCE = 2**20  # of the noise of a block


@dataclass
class _Segment:
    """Consecutive arrivals from ``first`` up to ``last``, what they begin with, and their tapes block by block."""

    first: int
    last: int
    begin: tuple[Tensor, ...]
    tapes: list[State] = field(default_factory=list)

    @property
    def tape(self) -> State:
        """The tapes joined, ``(arrivals, chains, rows, ...)`` each."""
        if len(self.tapes) > 1:
            self.tapes = [tuple(map(torch.cat, zip(*self.tapes, strict=True)))]
        return self.tapes[0]


class Loop:
    """One run of a transition.

    :param width: number of tensors in a state.
    :param shared: what :meth:`~pyro_shortrun.objectives.transition.Transition.draw` gave.
    :param checkpoint: whether a taped run keeps the states before every ``sqrt(K)``-th arrival alone.
    """

    def __init__(
        self,
        density: Density,
        transition: Transition,
        noise: Noise,
        step_size: Tensor,
        width: int,
        shared: tuple[Tensor, ...],
        keep_states: bool,
        checkpoint: bool,
    ) -> None:
        self._density, self.transition = density, transition
        self._keep_states, self._checkpoint = keep_states, checkpoint
        self._step_size, self._shared = step_size.detach(), shared
        self._constants = transition.constants(self._step_size)
        self._columns = _Columns(noise, transition.offset, len(step_size), len(step_size) + transition.ends_at_arrival)
        self._width, self._count = width, self._columns.arrivals
        self._states: list[Tensor] = []
        self._segments: list[_Segment] = []
        self._reports: list[Report] = []

    def forward(self, *given: Tensor, graph: bool = False, taped: bool = False) -> tuple[Tensor, ...]:
        """The last state, its first element the run's end, and the sum of increments.

        A proposal with a non-finite density, gradient or increment is undone and its row moves no more.

        :param given: state before the first arrival, values of all arrivals, further tensors.
        :param graph: whether all of it stays in the graph of autograd.
        :param taped: whether :meth:`backward` will be called.
        """
        state = given[: self._width] if graph else tuple(t.contiguous() for t in given[: self._width])
        tensors = len(self.transition.tensors)
        values = len(given) - self._width - tensors
        self._sizes = Sizes(self._width, values, len(self._constants), len(self._shared), tensors)
        self._values, self._tensors = given[self._width : self._width + values], given[self._width + values :]
        carry, count = (*state, *Carry.at(state[0])), self._count
        sparse = taped and self._checkpoint and not self.transition.learns
        length = math.isqrt(count - 1) + 1 if sparse else count
        for first in range(0, count, length):
            segment = _Segment(first, min(first + length, count), carry)
            carry = self._advance(segment, graph, taped and not sparse)
            if taped:
                self._segments.append(segment)
        return self._end(carry, graph)

    def _advance(self, segment: _Segment, graph: bool, taped: bool, again: bool = False) -> tuple[Tensor, ...]:
        """Through a segment; if ``taped``, fills its tapes."""
        carry, advance = segment.begin, Advance(self.transition, self._sizes, taped, graph)

        def inputs(first: int, last: int) -> tuple[Tensor, ...]:
            return *carry, *self._column(first, last), *self._shared, *self._tensors

        at_once = self._at_once(segment)
        for first in range(segment.first, segment.last, at_once):
            out = self._density.execute(advance, inputs(first, first + at_once))
            width = len(carry)
            carry, report, tape = out[:width], out[width : width + 4], out[width + 4 :]
            if taped:
                segment.tapes.append(tape)
            if not again:
                self._note(carry, Report(*report))
        return carry

    def _note(self, carry: tuple[Tensor, ...], report: Report) -> None:
        self._reports.append(report)
        if self._keep_states:
            self._states.append(carry[0].detach().unsqueeze(0))

    def _column(self, first: int, last: int) -> tuple[Tensor, ...]:
        """Noise, values and constants of arrivals ``first .. last - 1``."""
        return self._columns.noise(first, last), *(t[first:last] for t in (*self._values, *self._constants))

    def _at_once(self, segment: _Segment) -> int:
        """How many of a segment's arrivals make a block: a divisor; one where every state is wanted, and where the last
        segment is shorter than the others, as blocks of other lengths are other graphs. What a block is given stays
        bounded."""
        if self._keep_states or self._checkpoint:
            return 1
        count = segment.last - segment.first
        most = max(_STEPS_AT_LEAST, _NUMBERS_AT_ONCE // max(segment.begin[0].numel(), 1))
        return next(n for n in range(min(most, count), 0, -1) if count % n == 0)

    def _end(self, carry: tuple[Tensor, ...], graph: bool) -> tuple[Tensor, ...]:
        state, (alive, pending, total, self.singular) = carry[: self._width], carry[self._width :]
        if self.transition.ends_at_arrival:
            self.arrived, self._last = alive, None
            self._landed = () if graph or self._density.is_traced else self._density.execute(Land(), (state[0],))
            return *state, total
        u, proposal, *others = state
        end, total, self.arrived, *self._last = self._density.execute(Last(graph), (u, proposal, alive, pending, total))
        self._landed = tuple(self._last[2:]) if not self._density.is_traced and self.arrived.all() else ()
        self._states.append(end.detach().unsqueeze(0))
        weight = self._density.layout.row_weight
        return end, proposal, *self.transition.land(tuple(others), self._last[2] / weight, self.arrived), total

    @property
    def invalid(self) -> Tensor:
        """Rows whose log q is not valid, ``(chains, rows)``."""
        return self.singular | ~self.arrived

    @property
    def tape(self) -> State:
        """The states before all arrivals, ``(arrivals, chains, rows, ...)`` each, of a run that learns."""
        return self._segments[0].tape

    def backward(self, *cotangents: Tensor) -> tuple[Tensor, ...]:
        """Cotangents of what :meth:`forward` was given from those of what it gave.

        Left out are invalid rows, and those that ended where the density is finite and has no gradient, which no step
        has seen.
        """
        *back, total = cotangents
        valid = ~(self.invalid | ~back[0].isfinite().all(-1))
        pull = torch.where(valid, torch.zeros_like(total), total).sum()
        if not self.transition.ends_at_arrival:  # the end is the last proposal
            back = [torch.zeros_like(back[0]), back[0], *back[2:]]
        total = torch.where(valid, total, torch.zeros_like(total)).contiguous()
        back = [_only(valid, t).contiguous() for t in back]
        sums = tuple(torch.zeros_like(t) for t in self._tensors)
        found: list[State] = []
        for segment in reversed(self._segments):
            if not segment.tapes:
                self._advance(segment, graph=False, taped=True, again=True)
            back, sums = self._retreat(segment, tuple(back), total, valid, sums, found)
        grads = [torch.cat(t[::-1]) for t in zip(*found, strict=True)]
        eta = self._values[0][-self._columns.steps :]  # before the first arrival there may be no step
        grads[0][-len(eta) :] -= pull / (eta * eta.numel())
        return *(_only(valid, t) for t in back), *grads, *sums

    def _retreat(
        self, segment: _Segment, back: State, total: Tensor, valid: Tensor, sums: State, found: list[State]
    ) -> tuple[list[Tensor], State]:
        """Through a segment, whose tape is dropped; values' cotangents are added to ``found``, block by block."""
        retreat, tape = Retreat(self.transition, self._sizes), segment.tape
        segment.tapes.clear()

        def inputs(first: int, last: int) -> tuple[Tensor, ...]:
            own = (t[first - segment.first : last - segment.first] for t in tape)
            return *back, *own, *self._column(first, last), total, valid, *self._shared, *self._tensors

        at_once = self._at_once(segment)
        width, values = self._sizes.state, self._sizes.values
        for last in range(segment.last, segment.first, -at_once):
            out = self._density.execute(retreat, inputs(last - at_once, last))
            back = tuple(out[:width])
            found.append(out[width : width + values])
            sums = tuple(a + b for a, b in zip(sums, out[width + values :], strict=True))
        return list(back), sums

    def result(self, start: Tensor, end: Tensor, increment: Tensor, account: bool) -> ShortRun:
        """The record of the run."""
        states = torch.cat(self._states) if self._keep_states else None
        return ShortRun(start, end, increment, self._info(account), states, self._landed or None)

    def _info(self, account: bool) -> RunInfo:
        """Increments are those of the K steps: what the start's own arrival adds is of none."""
        log_density, grad_norm, increment = (torch.cat(t) for t in list(zip(*self._reports, strict=True))[1:])
        if self._last is not None:
            log_density = torch.cat([log_density, self._last[0].unsqueeze(0)])
            increment = torch.cat([increment, self._last[1].unsqueeze(0)])
        steps = self._columns.steps
        increment = increment[1 - self.transition.offset :][:steps] if account else increment[:0]
        singular, frozen = self.singular, ~self.arrived
        return RunInfo(log_density, grad_norm[:steps], increment, self._step_size.clone(), frozen, singular)


class _Columns:
    """The noise of arrivals, which is that of the steps that begin there; after the last step there is none."""

    def __init__(self, noise: Noise, offset: int, steps: int, arrivals: int) -> None:
        self._noise, self._offset, self.steps, self.arrivals = noise, offset, steps, arrivals
        self._padded = self._departures(0, arrivals) if noise.is_whole else None

    def noise(self, first: int, last: int) -> Tensor:
        """Of arrivals ``first .. last - 1``, ``(arrivals, chains, rows, size)``."""
        return self._departures(first, last) if self._padded is None else self._padded[first:last]

    def _departures(self, first: int, last: int) -> Tensor:
        begin, end = first + self._offset, min(last + self._offset, self.steps)
        parts = [self._noise.block(begin, end - begin)] if end > begin else []
        missing = last - first - max(end - begin, 0)
        if missing:
            like = parts[0] if parts else self._noise.block(self.steps - 1, 1)
            parts.append(torch.zeros_like(like[:1]).expand(missing, *like.shape[1:]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _only(rows: Tensor, t: Tensor) -> Tensor:
    """Zero in other rows."""
    return keep_rows(rows, t, torch.zeros_like(t))
