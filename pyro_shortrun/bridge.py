"""Blocks of tempered steps: each arrival weighs the step that led to it by a reverse step, then moves on.

The counterpart of :mod:`pyro_shortrun.steps` for :class:`~pyro_shortrun.objective.Annealed`; see there for *arrivals*.
Step ``k`` has the target ``pi_k = q_0^(1 - beta_k) pi^(beta_k)``. Arrival ``k`` is the end of step ``k - 1`` and the
beginning of step ``k``: it needs both steps' sizes, temperatures and noise, so blocks get one more of each than they
have arrivals.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .base import Base
from .density import LogDensity
from .steps import Carry, Rule, mean_over, where_rows


class Schedule(NamedTuple):
    """Of a block of ``n`` arrivals: step sizes ``(n + 1, size)``, temperatures ``(n + 1,)``, noise ``(n + 1, ...)``,
    and which arrivals end a step, as ones and zeros ``(n,)``."""

    eta: Tensor
    beta: Tensor
    noise: Tensor
    ends: Tensor


@dataclass(frozen=True)
class Tempered:
    """The arithmetic of one arrival."""

    rule: Rule
    base: Base

    @cached_property
    def key(self) -> tuple:
        """Everything that decides the arithmetic."""
        return self.rule.key, type(self.base), tuple(t.dim() for t in self.base.tensors)

    def evaluate(
        self, density: LogDensity, u: Tensor, tensors: tuple[Tensor, ...], create_graph: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``log pi`` and the gradients of ``log pi`` and ``log q_0``, scaled alike."""
        value, grad, slope = self.base.evaluate(density, u, tensors, create_graph)
        if density.layout.is_arrow and self.base.is_weighted:
            return value, grad, slope
        return value, grad, slope / density.layout.drift_scale(u)

    def increment(
        self,
        density: LogDensity,
        before: Tensor,
        u: Tensor,
        slopes: tuple[Tensor, Tensor],
        eta: Tensor,
        beta: Tensor,
        noise: Tensor,
    ) -> Tensor:
        """``log r(before | u) - log f(u | before)``, where ``noise`` led from ``before`` to ``u``."""
        scale = density.layout.drift_scale(u)
        mean = self.rule.dynamics.mean(u, _mix(slopes, beta), eta, scale)
        terms = 0.5 * noise.square() - (before - mean).square() / (4 * eta)
        return (terms / scale if density.layout.is_arrow else terms).sum(-1)

    def propose(
        self, density: LogDensity, u: Tensor, slopes: tuple[Tensor, Tensor], eta: Tensor, beta: Tensor, noise: Tensor
    ) -> Tensor:
        """The end of the next step."""
        return self.rule.dynamics.step(u, _mix(slopes, beta), eta, noise, density.layout.drift_scale(u))


def _mix(slopes: tuple[Tensor, Tensor], beta: Tensor) -> Tensor:
    grad, base = slopes
    return beta * grad + (1 - beta) * base


@dataclass(frozen=True)
class TemperedForward:
    """A block of arrivals: ``(*carry, *schedule, *base)`` to ``(*carry, *report[, states])``."""

    step: Tempered
    taped: bool = False
    graph: bool = False

    @cached_property
    def key(self) -> tuple:
        return "forward", self.step.key, self.taped

    def __call__(self, density: LogDensity, *inputs: Tensor) -> tuple[Tensor, ...]:
        carry, schedule, tensors = Carry(*inputs[:6]), Schedule(*inputs[6:10]), inputs[10:]
        reports, states = [], []
        for k in range(len(schedule.ends)):
            x, before = carry.proposal, carry.u
            with torch.enable_grad():
                if not (self.graph and x.requires_grad):
                    x = x.detach().requires_grad_()
                value, *slopes = self.step.evaluate(density, x, tensors, create_graph=self.graph)
            with torch.set_grad_enabled(self.graph):
                if not self.graph:
                    x, value, slopes = x.detach(), value.detach(), [s.detach() for s in slopes]
                pair = (slopes[0], slopes[1])
                here = schedule.eta[k], schedule.beta[k], schedule.noise[k]
                extra = self.step.increment(density, before, x, pair, *here) * schedule.ends[k]
                finite = value.isfinite() & extra.isfinite() & slopes[0].isfinite().all(-1)
                arrived = carry.alive & finite
                u = where_rows(arrived, x, before)
                total = carry.total + torch.where(arrived, extra, torch.zeros_like(extra))
                ahead = schedule.eta[k + 1], schedule.beta[k + 1], schedule.noise[k + 1]
                proposal = where_rows(arrived, self.step.propose(density, u, pair, *ahead), u)
            carry = Carry(u, proposal, arrived, carry.pending, total, carry.singular)
            norm = slopes[0].detach().norm(dim=-1)
            known = value.detach()
            reports.append((known, *(mean_over(t, arrived) for t in (known, norm, extra.detach()))))
            states.append(u.detach())
        first, *columns = zip(*reports, strict=True)
        out = (*carry, first[0], *map(torch.stack, columns))
        return (*out, torch.stack(states)) if self.taped else out


@dataclass(frozen=True)
class TemperedBackward:
    """The way back through a block of arrivals.

    ``(back, earlier, back_total, valid, *schedule, states, before, *base)``, where ``back`` is the cotangent of the
    proposal that the block ended with and ``earlier`` what the next block's first increment adds to the last state's,
    to ``(back, earlier, eta, eta, beta, beta, *base)``: cotangents of the steps that ended here and of those that
    began here, ``(n, size)`` and ``(n,)`` each, over ``valid`` rows.
    """

    step: Tempered

    @cached_property
    def key(self) -> tuple:
        return "backward", self.step.key

    def __call__(self, density: LogDensity, *inputs: Tensor) -> tuple[Tensor, ...]:
        back, earlier, back_total, valid = inputs[:4]
        schedule, states, befores, tensors = Schedule(*inputs[4:8]), inputs[8], inputs[9], inputs[10:]
        steps: list[tuple[Tensor, ...]] = []
        bases = [torch.zeros_like(t) for t in tensors]
        for k in reversed(range(len(schedule.ends))):
            u = states[k]
            # Every row has its own copy of what rows share, so that a row that is not finite cannot spoil the others.
            shared = [t.expand_as(u) for t in schedule.eta[k : k + 2]]
            shared += [t.expand(*u.shape[:2], 1) for t in schedule.beta[k : k + 2]]
            shared += [t.expand(len(u), *t.shape) for t in tensors]
            leaves = [t.detach().clone().requires_grad_() for t in (u, befores[k], *shared)]
            u, before, eta, eta_ahead, beta, beta_ahead, *base = leaves
            with torch.enable_grad():
                _, *slopes = self.step.evaluate(density, u, tuple(base), create_graph=True)
                pair = (slopes[0], slopes[1])
                extra = self.step.increment(density, before, u, pair, eta, beta, schedule.noise[k])
                ahead = self.step.propose(density, u, pair, eta_ahead, beta_ahead, schedule.noise[k + 1])
                goal = (back * ahead).sum() + (back_total * schedule.ends[k] * extra).sum()
                found = torch.autograd.grad(goal, leaves, materialize_grads=True)
            back, earlier = found[0] + earlier, found[1]
            eta_sums = [_kept(t, valid).sum((0, 1)) for t in found[2:4]]
            beta_sums = [_kept(t, valid).sum() for t in found[4:6]]
            steps.append((*eta_sums, *beta_sums))
            bases = [a + _kept(b, valid).sum(0) for a, b in zip(bases, found[6:], strict=True)]
        return (back, earlier, *(torch.stack(t[::-1]) for t in zip(*steps, strict=True)), *bases)


def _kept(grad: Tensor, valid: Tensor) -> Tensor:
    """``grad`` of ``(chains, rows, ...)`` without what belongs to other rows or is not finite."""
    mask = valid.reshape(*valid.shape, *((1,) * (grad.dim() - 2)))
    return torch.where(mask & grad.isfinite(), grad, torch.zeros_like(grad))
