"""Blocks of transitions as functions of tensors: forwards, and backwards one step at a time.

A run is a sequence of *arrivals*. At each, the log density and gradient are found at the proposed state, a proposal
where they are not finite is undone and its row moves no more, and the next proposal is made. Everything here is a plain
function of tensors (and of a density), with no branch that depends on their values, so that a block of steps can be
traced and compiled as one graph (:meth:`~pyro_shortrun.density.interface.Density.execute`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..density.interface import Density
from ..dynamics.dynamics import Dynamics
from ..objectives.objective import Objective
from ..objectives.transition import settings
from ..tensors import mean_over, where_rows


@dataclass(frozen=True)
class Rule:
    """How a state moves and how its log weight changes.

    :param account: whether increments (log q) are wanted at all.
    """

    dynamics: Dynamics
    objective: Objective
    account: bool = True

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """Everything that decides the arithmetic."""
        return self.dynamics, self.objective, self.account, settings(self.dynamics), settings(self.objective)


class Carry(NamedTuple):
    """What goes from one arrival to the next: ``u`` and ``proposal`` are ``(chains, rows, size)``, the rest
    ``(chains, rows)``.

    ``u`` is the last state that was reached, ``alive`` marks rows that still move, ``pending`` is the increment of the
    step on its way, which counts when it arrives, ``total`` the increments so far; ``singular`` rows met a step that
    was not invertible.
    """

    u: Tensor
    proposal: Tensor
    alive: Tensor
    pending: Tensor
    total: Tensor
    singular: Tensor

    @classmethod
    def at(cls, start: Tensor) -> Carry:
        """Before the first arrival."""
        rows = start.new_zeros(start.shape[:2])
        yes = torch.ones_like(rows, dtype=torch.bool)
        return cls(start, start, yes, rows, rows, ~yes)


class Report(NamedTuple):
    """Of a block of arrivals: the log density ``(chains, rows)`` at the first one, and for each one, as means over
    rows that arrived, log density, gradient norm, and increment of the step that led there, ``(steps,)``."""

    first: Tensor
    log_density: Tensor
    grad_norm: Tensor
    increment: Tensor


class Tape(NamedTuple):
    """What a block's way back needs: states, whether they were reached, and each increment's derivatives in its own
    state and step size; ``(steps, chains, rows[, size])``."""

    states: Tensor
    arrived: Tensor
    part_u: Tensor
    part_eta: Tensor


@dataclass(frozen=True)
class Forward:
    """A block of arrivals, each followed by a move: ``(*carry, eta, noise[, aux])`` to ``(*carry, *report[, *tape])``.

    ``eta`` is ``(steps, size)``, ``noise`` ``(steps, chains, rows, size)``.

    :param taped: whether the way back will be asked for.
    :param graph: whether all of it stays in the graph of autograd.
    """

    rule: Rule
    taped: bool = False
    graph: bool = False

    @cached_property
    def key(self) -> tuple[Any, ...]:
        return "forward", self.rule.key, self.taped

    def __call__(self, density: Density, *inputs: Tensor) -> tuple[Tensor, ...]:
        carry, (eta, noise, *aux) = Carry(*inputs[:6]), inputs[6:]
        reports, tapes = [], []
        for step_size, eps in zip(eta, noise, strict=True):
            carry, report, tape = self._step(density, carry, step_size, eps, aux[0] if aux else None)
            reports.append(report)
            tapes.append(tape)
        first, *columns = zip(*reports, strict=True)
        out = (*carry, first[0], *map(torch.stack, columns))
        return (*out, *map(torch.stack, zip(*tapes, strict=True))) if self.taped else out

    def _step(
        self, density: Density, carry: Carry, eta: Tensor, noise: Tensor, aux: Tensor | None
    ) -> tuple[Carry, Report, tuple[Any, ...]]:
        x = carry.proposal
        extra, parts = None, ()
        if self.rule.account:
            x, value, grad, extra, singular, parts = self._account(density, x, eta, aux, carry.alive)
        elif self.graph:
            x = x if x.requires_grad else x.requires_grad_()
            value, grad = density.value_and_grad(x, create_graph=True)
        else:
            value, grad = density.value_and_grad(x)
        arrived = carry.alive & value.detach().isfinite() & grad.detach().isfinite().all(-1)
        with torch.set_grad_enabled(self.graph):
            u = where_rows(arrived, x if self.graph else x.detach(), carry.u)
            total = carry.total + torch.where(arrived, carry.pending, torch.zeros_like(carry.pending))
            moving = arrived if extra is None else arrived & extra.detach().isfinite()
            scale = density.layout.drift_scale(u)
            moved = self.rule.dynamics.step(u, grad if self.graph else grad.detach(), eta, noise, scale)
            proposal = where_rows(moving, moved, u)
        pending, bad = carry.pending, carry.singular
        if extra is not None:
            pending, bad = (extra if self.graph else extra.detach()), bad | (singular & moving)
        report = Report(
            value.detach(),
            mean_over(value.detach(), arrived),
            mean_over(grad.detach().norm(dim=-1), arrived),
            mean_over(carry.pending.detach(), arrived),
        )
        return Carry(u, proposal, moving, pending, total, bad), report, (u.detach(), arrived, *parts)

    def _account(
        self, density: Density, x: Tensor, eta: Tensor, aux: Tensor | None, alive: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, tuple[Any, ...]]:
        """State, log density, gradient, increment of the step from here, its singularity, and its derivatives."""
        differentiable = self.taped or self.graph
        with torch.enable_grad():
            if not (self.graph and x.requires_grad):
                x = x.detach().requires_grad_()
            if self.taped:
                eta = eta.detach().expand_as(x).clone().requires_grad_()
            value, grad = density.value_and_grad(x, create_graph=True)
            objective, dynamics = self.rule.objective, self.rule.dynamics
            out = objective.account(density, dynamics, x, grad, eta, aux, create_graph=differentiable)
            parts = _partials(out.increment, x, eta, alive) if self.taped else ()
        return x, value, grad, out.increment, out.singular, parts


@dataclass(frozen=True)
class Last:
    """The last arrival: ``(*carry,)`` to the end, the total, whether it was reached, means of log density and increment
    as in :class:`Report`, and what the density says of the last proposal when it lands."""

    graph: bool = False
    key = ("last",)

    def __call__(self, density: Density, *inputs: Tensor) -> tuple[Tensor, ...]:
        carry = Carry(*inputs)
        with torch.no_grad():
            value, *landed = density.land(carry.proposal.detach())
            arrived = carry.alive & value.isfinite() & carry.proposal.isfinite().all(-1)
        with torch.set_grad_enabled(self.graph):
            end = where_rows(arrived, carry.proposal, carry.u)
            total = carry.total + torch.where(arrived, carry.pending, torch.zeros_like(carry.pending))
        return (
            end,
            total,
            arrived,
            mean_over(value, arrived),
            mean_over(carry.pending.detach(), arrived),
            value,
            *landed,
        )


@dataclass(frozen=True)
class Land:
    """What the density says of a state when it lands: ``(u,)`` to :meth:`~pyro_shortrun.density.interface.Density.land`."""

    key = ("land",)

    def __call__(self, density: Density, *inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return density.land(inputs[0])


@dataclass(frozen=True)
class Backward:
    """The way back through a block of steps.

    ``(cotangent of the block's end, cotangent of the total, invalid, eta, noise, *tape)`` to the cotangent of the
    block's begin and that of ``eta``, ``(steps, size)``; the tape's ``arrived`` is that of each step's *end*. Rows that
    are ``invalid`` add nothing to ``eta``.
    """

    rule: Rule

    @cached_property
    def key(self) -> tuple[Any, ...]:
        return "backward", self.rule.key

    def __call__(self, density: Density, *inputs: Tensor) -> tuple[Tensor, ...]:
        back, back_total, invalid, eta, noise, *rest = inputs
        tape = Tape(*rest)
        valid, weight = ~invalid, back_total.unsqueeze(-1)
        found = []
        for k in reversed(range(len(eta))):
            with torch.enable_grad():
                u = tape.states[k].detach().requires_grad_()
                step_size = eta[k].detach().expand_as(u).clone().requires_grad_()
                _, grad = density.value_and_grad(u, create_graph=True)
                moved = self.rule.dynamics.step(u, grad, step_size, noise[k], density.layout.drift_scale(u))
                back_u, back_eta = torch.autograd.grad(moved, (u, step_size), back, materialize_grads=True)
            ok = tape.arrived[k]
            back_u = back_u + weight * tape.part_u[k]
            back_eta = back_eta + weight * tape.part_eta[k]
            back = where_rows(ok, back_u, back)
            found.append(where_rows(ok & valid, back_eta, torch.zeros_like(back_eta)).sum((0, 1)))
        return back, torch.stack(found[::-1])


def _partials(extra: Tensor, x: Tensor, eta: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives of each row's increment in its own state and step size (rows do not mix)."""
    if not extra.requires_grad:
        return torch.zeros_like(x), torch.zeros_like(eta)
    parts = torch.autograd.grad(extra.sum(), (x, eta), retain_graph=True, materialize_grads=True)
    return tuple(torch.where(alive.unsqueeze(-1) & p.isfinite(), p, torch.zeros_like(p)) for p in parts)  # type: ignore
