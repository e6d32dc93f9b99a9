"""Blocks of arrivals of any transition as functions of tensors: forwards, and backwards one step at a time.

Everything here is a plain function of tensors (and of a density), so that a block of steps can be traced and compiled
as one graph (:meth:`~pyro_shortrun.density.interface.Density.execute`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..density.interface import Density
from ..density.recurrence import Recurrence
from ..objectives.transition import Column, Departure, State, Transition
from ..tensors import keep_rows


class Sizes(NamedTuple):
    """Numbers of tensors in a state, of values and constants that every arrival is given, of shared ones, and of those
    besides that are differentiated in."""

    state: int
    values: int
    constants: int
    shared: int
    tensors: int

    def split(self, inputs: Sequence[Tensor], between: int) -> tuple[State, ...]:
        """State, ``between`` tensors, values, constants, shared, and the rest."""
        parts, first = [], 0
        for size in (self.state, between, *self[1:]):
            parts.append(tuple(inputs[first : first + size]))
            first += size
        return tuple(parts)


class Carry(NamedTuple):
    """What goes from one arrival to the next besides the state, ``(chains, rows)`` each.

    ``alive`` marks rows that still move, ``pending`` is what the step on its way adds when it arrives, ``total`` what
    was added so far; ``singular`` rows met a step that was not invertible.
    """

    alive: Tensor
    pending: Tensor
    total: Tensor
    singular: Tensor

    @classmethod
    def at(cls, start: Tensor) -> Carry:
        """Before the first arrival."""
        rows = start.new_zeros(start.shape[:2])
        yes = torch.ones_like(rows, dtype=torch.bool)
        return cls(yes, rows, rows, ~yes)


class Report(NamedTuple):
    """Of a block of arrivals: the log density ``(chains, rows)`` at the first one, and for each one, as means over
    rows that arrived, log density, gradient norm, and what it added to the log weight, ``(arrivals,)``."""

    first: Tensor
    log_density: Tensor
    grad_norm: Tensor
    increment: Tensor


@dataclass(frozen=True)
class Advance:
    """A block of ``n`` arrivals: ``(*state, *carry, noise, *values, *constants, *shared, *tensors)`` to ``(*state,
    *carry, *report[, *tape])``.

    :param taped: whether the way back will be asked for. The tape is the states before all arrivals (the first of its
        tensors only where the transition looks back), and where it pays ahead, the derivatives of each departure in its
        state and values.
    :param graph: whether all of it stays in the graph of autograd.
    """

    transition: Transition
    sizes: Sizes
    taped: bool = False
    graph: bool = False

    @cached_property
    def key(self) -> tuple[Any, ...]:
        return "forward", self.transition.key, self.taped

    @property
    def recurrence(self) -> Recurrence:
        """Of its arrivals."""
        return Recurrence(self.sizes.state + len(Carry._fields), 1 + self.sizes.values + self.sizes.constants, firsts=1)

    def witness(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The states of the first arrival, and the log density that was found there."""
        return inputs[1], outputs[self.sizes.state + len(Carry._fields)]

    def __call__(self, density: Density, *inputs: Tensor) -> tuple[Tensor, ...]:
        state, (*carried, noise), values, constants, shared, tensors = self.sizes.split(inputs, 5)
        carry, reports, tapes = Carry(*carried), [], []
        scale = density.layout.drift_scale(noise)
        for k in range(len(noise)):
            column = Column(tuple(t[k] for t in values), tuple(t[k] for t in constants), noise[k], scale, shared)
            before = state if self.transition.looks_back else state[1:]
            state, carry, report, parts = self._arrive(density, state, carry, column, tensors)
            reports.append(report)
            if self.taped:
                tapes.append((*before, *parts))
        first, *columns = zip(*reports, strict=True)
        out = (*state, *carry, first[0], *map(torch.stack, columns))
        return (*out, *(torch.stack(t).detach() for t in zip(*tapes, strict=True))) if self.taped else out

    def _arrive(
        self, density: Density, state: State, carry: Carry, column: Column, tensors: State
    ) -> tuple[State, Carry, Report, State]:
        u, x, *others = state
        with torch.enable_grad():
            if not (self.graph and x.requires_grad):
                x = x.detach().requires_grad_()
            value, *found = self.transition.evaluate(density, x, tensors, self.graph or self.transition.pays_ahead)
            leaving, parts = self._depart(density, x, found[0], column, carry.alive)
        if not self.graph:
            x, found, value = x.detach(), [t.detach() for t in found], value.detach()
        with torch.set_grad_enabled(self.graph):
            moved, added = self.transition.move(density, (u, x, *others), found, column)
            extra = carry.pending if added is None else carry.pending + added
            arrived = carry.alive & (value.isfinite() & extra.isfinite() & found[0].isfinite().all(-1)).detach()
            state = tuple(keep_rows(arrived, a, b) for a, b in zip(moved, (u, u, *others), strict=True))
            total = carry.total + torch.where(arrived, extra, torch.zeros_like(extra))
            state, carry = self._leave(state, carry._replace(alive=arrived, total=total), leaving)
        norm = found[0].detach().norm(dim=-1)
        report = Report(value.detach(), *(_mean_over(t.detach(), arrived) for t in (value, norm, extra)))
        return state, carry, report, parts

    def _depart(
        self, density: Density, x: Tensor, grad: Tensor, column: Column, alive: Tensor
    ) -> tuple[Departure | None, State]:
        """What the next step will add, and its derivatives in ``x`` and the values where it pays ahead."""
        transition, taped = self.transition, self.taped and self.transition.pays_ahead
        differentiable = transition.pays_ahead and (self.taped or self.graph)
        if taped:
            rows = x.shape[:2]
            leaves = tuple(t.detach().expand(*rows, t.shape[-1]).clone().requires_grad_() for t in column.values)
            column = column._replace(values=leaves)
        with torch.set_grad_enabled(differentiable):
            leaving = transition.departure(density, x, grad, column, differentiable)
        if leaving is None or not taped:
            return leaving, ()
        parts = _partials(leaving.increment, (x, *column.values), alive)
        return leaving._replace(increment=leaving.increment.detach()), parts

    @staticmethod
    def _leave(state: State, carry: Carry, leaving: Departure | None) -> tuple[State, Carry]:
        """Rows whose departure is not finite stay where they arrived."""
        if leaving is None:
            return state, carry._replace(pending=torch.zeros_like(carry.total))
        moving = carry.alive & leaving.increment.detach().isfinite()
        u, proposal, *others = state
        bad = carry.singular if leaving.singular is None else carry.singular | (leaving.singular & moving)
        carry = carry._replace(alive=moving, pending=leaving.increment, singular=bad)
        return (u, torch.where(moving.unsqueeze(-1), proposal, u), *others), carry


@dataclass(frozen=True)
class Last:
    """The last proposal, judged without a gradient: ``(u, proposal, alive, pending, total)`` to the end, the total,
    whether it was reached, means of log density and increment as in :class:`Report`, and what the density says of the
    last proposal when it lands."""

    graph: bool = False
    key = ("last",)

    def __call__(self, density: Density, *inputs: Tensor) -> tuple[Tensor, ...]:
        u, proposal, alive, pending, total = inputs
        with torch.no_grad():
            value, *landed = density.land(proposal.detach())
            arrived = alive & value.isfinite() & proposal.isfinite().all(-1)
        with torch.set_grad_enabled(self.graph):
            end = torch.where(arrived.unsqueeze(-1), proposal, u)
            total = total + torch.where(arrived, pending, torch.zeros_like(pending))
        means = _mean_over(value, arrived), _mean_over(pending.detach(), arrived)
        return end, total, arrived, *means, value, *landed


@dataclass(frozen=True)
class Land:
    """What the density says of a state when it lands: ``(u,)`` to what
    :meth:`~pyro_shortrun.density.interface.Density.land` gives."""

    key = ("land",)

    def __call__(self, density: Density, *inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return density.land(inputs[0])


@dataclass(frozen=True)
class Retreat:
    """The way back through a block of ``n`` arrivals.

    ``(*cotangents of the state after it, *tape, noise, *values, *constants, that of the total, valid, *shared,
    *tensors)`` to cotangents of the state before it, of values, ``(n, width)`` each, and tensors, over ``valid`` rows.
    """

    transition: Transition
    sizes: Sizes

    @cached_property
    def key(self) -> tuple[Any, ...]:
        return "backward", self.transition.key

    @property
    def recurrence(self) -> Recurrence:
        """Of its arrivals."""
        columns = sum(self.taped) + 1 + self.sizes.values + self.sizes.constants
        return Recurrence(self.sizes.state, columns, sums=self.sizes.tensors, backwards=True)

    @property
    def taped(self) -> tuple[int, int]:
        """Numbers of tensors on the tape: states, and derivatives of departures."""
        states = self.sizes.state if self.transition.looks_back else self.sizes.state - 1
        return states, 1 + self.sizes.values if self.transition.pays_ahead else 0

    def __call__(self, density: Density, *inputs: Tensor) -> tuple[Tensor, ...]:
        states = self.taped[0]
        back, columns, (total, valid, *fixed) = self.recurrence.split(inputs)
        shared, tensors = tuple(fixed[: self.sizes.shared]), tuple(fixed[self.sizes.shared :])
        tape, (noise, *rest) = columns[: sum(self.taped)], columns[sum(self.taped) :]
        values, constants = rest[: self.sizes.values], rest[self.sizes.values :]
        steps: list[State] = []
        sums, scale = tuple(torch.zeros_like(t) for t in tensors), density.layout.drift_scale(noise)
        for k in reversed(range(len(noise))):
            column = Column(tuple(t[k] for t in values), tuple(t[k] for t in constants), noise[k], scale, shared)
            before, parts = tuple(t[k] for t in tape[:states]), tuple(t[k] for t in tape[states:])
            back, grads, more = self._step(density, back, total, before, column, tensors)
            if parts:
                weight = total.unsqueeze(-1)
                back = (back[0], back[1] + weight * parts[0], *back[2:])
                grads = tuple(g + weight * p for g, p in zip(grads, parts[1:], strict=True))
            steps.append(tuple(_kept(t, valid).sum((0, 1)) for t in grads))
            sums = tuple(a + _kept(b, valid).sum(0) for a, b in zip(sums, more, strict=True))
        return (*back, *(torch.stack(t[::-1]) for t in zip(*steps, strict=True)), *sums)

    def _step(
        self, density: Density, back: State, total: Tensor, before: State, column: Column, tensors: State
    ) -> tuple[State, State, State]:
        """Cotangents before one arrival, and each row's own of the values and tensors.

        Every row has its own copy of what rows share, so that a row that is not finite cannot spoil the others.
        """
        chains, rows = before[0].shape[:2]
        shared = [t.expand(chains, rows, t.shape[-1]) for t in column.values]
        shared += [t.expand(chains, *t.shape) for t in tensors]
        leaves = [t.detach().clone().requires_grad_() for t in (*before, *shared)]
        own, count = len(before), len(column.values)
        state = tuple(leaves[:own]) if self.transition.looks_back else (leaves[0], *leaves[:own])
        column = column._replace(values=tuple(leaves[own : own + count]))
        with torch.enable_grad():
            _, *found = self.transition.evaluate(density, state[1], tuple(leaves[own + count :]), create_graph=True)
            moved, added = self.transition.move(density, state, found, column)
            outputs, cotangents = _pairs(moved, back, added, total)
            grads = torch.autograd.grad(outputs, leaves, cotangents, materialize_grads=True)
        first = () if self.transition.looks_back else (torch.zeros_like(grads[0]),)
        return (*first, *grads[:own]), grads[own : own + count], grads[own + count :]


def _pairs(moved: State, back: State, added: Tensor | None, total: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """What is differentiated on the way back, with its cotangents; what has no graph is left out."""
    pairs = [*zip(moved, back, strict=True), *(() if added is None else ((added, total),))]
    kept = [(a, b) for a, b in pairs if a.requires_grad]
    return [a for a, _ in kept], [b for _, b in kept]


def _partials(increment: Tensor, leaves: State, alive: Tensor) -> State:
    """Derivatives of each row's increment in its own state and values (rows do not mix)."""
    if not increment.requires_grad:
        return tuple(torch.zeros_like(t) for t in leaves)
    parts = torch.autograd.grad(increment.sum(), leaves, retain_graph=True, materialize_grads=True)
    return tuple(torch.where(alive.unsqueeze(-1) & p.isfinite(), p, torch.zeros_like(p)) for p in parts)


def _kept(grad: Tensor, valid: Tensor) -> Tensor:
    """``grad`` of ``(chains, rows, ...)`` without what belongs to other rows or is not finite."""
    return torch.where(_as(valid, grad) & grad.isfinite(), grad, torch.zeros_like(grad))


def _as(rows: Tensor, like: Tensor) -> Tensor:
    return rows.reshape(*rows.shape, *((1,) * (like.dim() - rows.dim())))


def _mean_over(value: Tensor, rows: Tensor) -> Tensor:
    """The mean of a value over these rows, 0 if there are none."""
    return torch.where(rows, value, torch.zeros_like(value)).sum() / rows.sum().clamp(min=1)
