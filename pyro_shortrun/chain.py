"""The short run itself: K transitions, their log-weight increments, and which gradients flow where.

Three ways to run, chosen by :class:`Gradients`:

* ``NONE``: no graph is kept; memory does not grow with K.
* ``GUIDE``: the run is one node of autograd whose backward differentiates with respect to the start and the step
  sizes and nothing else. The model's parameters, which occur inside every step, get no gradient through the run:
  maximum likelihood wants ``grad_theta log p_theta(x, z_K)`` with ``z_K`` held fixed. The backward pass recomputes
  one step at a time, so memory is K states, not K graphs.
* ``FULL``: an ordinary graph through everything, for the exact gradient of the bound in the model's parameters too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from .dynamics import Dynamics
from .objective import Objective
from .potential import Density


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

    ``states`` holds ``u_0 .. u_K`` as ``(K + 1, chains, rows, size)`` if it was asked for.
    """

    start: Tensor
    end: Tensor
    increment: Tensor
    info: RunInfo
    states: Tensor | None = None


@dataclass(frozen=True)
class Runner:
    """What a run needs besides tensors.

    :param account: whether increments (log q) are wanted at all.
    """

    density: Density
    dynamics: Dynamics
    objective: Objective
    account: bool = True

    def move(self, u: Tensor, grad: Tensor, step_size: Tensor, noise: Tensor) -> Tensor:
        """One transition, at fixed gradient."""
        return self.dynamics.step(u, grad, step_size, noise, self.density.layout.drift_scale(u))

    def increment(
        self, u: Tensor, grad: Tensor, step_size: Tensor, aux: Tensor | None, graph: bool
    ) -> tuple[Tensor, Tensor]:
        """What the step from ``u`` adds to the log weight, and whether it is singular, ``(chains, rows)``."""
        out = self.objective.account(self.density, self.dynamics, u, grad, step_size, aux, create_graph=graph)
        return out.increment, out.singular


def run(
    runner: Runner,
    start: Tensor,
    step_size: Tensor,
    noise: Tensor,
    gradients: Gradients = Gradients.NONE,
    keep_states: bool = False,
) -> ShortRun:
    """Run ``K = len(step_size)`` transitions from ``start``.

    :param start: ``u_0``, ``(chains, rows, size)``.
    :param step_size: ``eta``, ``(K, size)``.
    :param noise: standard normal, ``(K, chains, rows, size)``; zeros make a noise-free run.
    :param gradients: which gradients are kept, see :class:`Gradients`.
    :param keep_states: whether ``ShortRun.states`` is wanted.
    """
    aux = runner.objective.draw(start) if runner.account else None
    walk = _Walk(runner, noise, aux, keep_states)
    if gradients is Gradients.FULL:
        end, increment = walk.forward(start, step_size, graph=True)
    elif gradients is Gradients.GUIDE and (start.requires_grad or step_size.requires_grad):
        with torch.enable_grad():
            end, increment = _GuideOnly.apply(walk, start, step_size)
    else:
        end, increment = walk.forward(start.detach(), step_size.detach(), graph=False)
    states = torch.stack([*walk.states, end.detach()]) if keep_states else None
    return ShortRun(start, end, increment, walk.info(step_size), states)


class _Walk:
    """The loop over steps, with its running record."""

    def __init__(self, runner: Runner, noise: Tensor, aux: Tensor | None, keep_states: bool) -> None:
        self.runner, self.noise, self.aux = runner, noise, aux
        self.keep_states = keep_states
        self.states: list[Tensor] = []
        self.accepted: list[Tensor] = []
        self._log_density: list[Tensor] = []
        self._grad_norm: list[Tensor] = []
        self._log_det: list[Tensor] = []

    def forward(self, u: Tensor, step_size: Tensor, graph: bool, partials: list | None = None) -> tuple[Tensor, Tensor]:
        """``u_K`` and the sum of increments.

        A step whose end has a non-finite density, gradient or determinant is undone and its row moves no more.

        :param partials: if a list, gets each increment's derivatives in state and step size.
        """
        runner, account = self.runner, self.runner.account
        hessian = account or graph
        total = u.new_zeros(u.shape[:2])
        self.singular = torch.zeros_like(total, dtype=torch.bool)
        x, value, grad = self._evaluate(u, graph, hessian)
        alive = _finite(value, grad)
        for k, eta in enumerate(step_size):
            if self.keep_states or partials is not None:
                self.states.append(u.detach())
            self._note(value, grad, alive)
            extra, moving = None, alive
            if account:
                eta_rows = eta
                if partials is not None:
                    eta_rows = eta.detach().expand_as(x).clone().requires_grad_()
                extra, singular = runner.increment(x, grad, eta_rows, self.aux, graph or partials is not None)
                if partials is not None:
                    partials.append(_partials(extra, x, eta_rows, alive))
                    extra = extra.detach()
                moving = alive & extra.isfinite()
                self.singular |= singular & moving
            with torch.set_grad_enabled(graph):
                moved = runner.move(x, grad if graph else grad.detach(), eta, self.noise[k])
                new = _where(moving, moved, u)
            if k + 1 < len(step_size):
                x, value, grad = self._evaluate(new, graph, hessian)
                ok = moving & _finite(value, grad)
            else:
                with torch.no_grad():
                    value = runner.density(new.detach())
                ok = moving & value.isfinite() & new.detach().isfinite().all(-1)
            u = _where(ok, new, u)
            if extra is not None:
                total = total + torch.where(ok, extra, torch.zeros_like(extra))
                self._log_det.append(_mean(extra.detach(), ok))
            self.accepted.append(ok)
            alive = ok
        self._log_density.append(_mean(value.detach(), alive))
        return u, total

    def _evaluate(self, u: Tensor, graph: bool, hessian: bool) -> tuple[Tensor, Tensor, Tensor]:
        if not graph:
            u = u.detach().requires_grad_()
        elif not u.requires_grad:
            u = u.requires_grad_()
        value, grad = self.runner.density.value_and_grad(u, create_graph=hessian)
        return u, value, grad

    def _note(self, value: Tensor, grad: Tensor, alive: Tensor) -> None:
        self._log_density.append(_mean(value.detach(), alive))
        self._grad_norm.append(_mean(grad.detach().norm(dim=-1), alive))

    def info(self, step_size: Tensor) -> RunInfo:
        empty = step_size.new_zeros(0)
        return RunInfo(
            log_density=torch.stack(self._log_density),
            grad_norm=torch.stack(self._grad_norm),
            log_det=torch.stack(self._log_det) if self._log_det else empty,
            step_size=step_size.detach().clone(),
            frozen=~self.accepted[-1],
            singular=self.singular,
        )


class _GuideOnly(torch.autograd.Function):
    """The run as one node: gradients to the start and the step sizes only, one recomputed step at a time.

    A row that froze or took a singular step has no valid log q to differentiate. It takes the place of a row whose
    loss is ``log eta`` (averaged over steps and coordinates), so that step sizes too large for some rows shrink at a
    bounded rate instead of following a meaningless and often huge gradient.
    """

    @staticmethod
    def forward(ctx: Any, walk: _Walk, start: Tensor, step_size: Tensor) -> tuple[Tensor, Tensor]:
        partials: list[tuple[Tensor, Tensor]] = []
        with torch.enable_grad():
            end, total = walk.forward(start.detach(), step_size.detach(), graph=False, partials=partials)
        ctx.walk, ctx.partials, ctx.step_size = walk, partials, step_size.detach()
        return end.detach(), total.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_end: Tensor, grad_total: Tensor) -> tuple:
        walk, step_size = ctx.walk, ctx.step_size
        grad_u = grad_end
        grad_steps = torch.zeros_like(step_size)
        invalid = (walk.singular | ~walk.accepted[-1]).unsqueeze(-1)
        pull = torch.where(invalid.squeeze(-1), grad_total, torch.zeros_like(grad_total)).sum()
        for k in reversed(range(len(step_size))):
            ok = walk.accepted[k].unsqueeze(-1)
            with torch.enable_grad():
                u = walk.states[k].clone().requires_grad_()
                eta = step_size[k].expand_as(u).clone().requires_grad_()
                _, grad = walk.runner.density.value_and_grad(u, create_graph=True)
                moved = walk.runner.move(u, grad, eta, walk.noise[k])
                back_u, back_eta = torch.autograd.grad(moved, (u, eta), grad_u, materialize_grads=True)
            if ctx.partials:
                part_u, part_eta = ctx.partials[k]
                back_u = back_u + grad_total.unsqueeze(-1) * part_u
                back_eta = back_eta + grad_total.unsqueeze(-1) * part_eta
            zero = torch.zeros_like(back_u)
            grad_u = torch.where(ok, back_u, grad_u)
            back_eta = torch.where(ok & ~invalid, back_eta, zero)
            grad_steps[k] = back_eta.sum((0, 1)) - pull / (step_size[k] * step_size.numel())
        return None, torch.where(invalid, torch.zeros_like(grad_u), grad_u), grad_steps


def isolate(fn: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], isolated: bool) -> tuple[Tensor, ...]:
    """``fn(*inputs)``, differentiable in its inputs alone if ``isolated``.

    ``fn`` may hold the model's parameters, as a support that depends on them does.
    """
    if not isolated:
        return fn(*inputs)
    if not any(t.requires_grad for t in inputs):
        with torch.no_grad():
            return fn(*inputs)
    return _InputOnly.apply(fn, *inputs)


class _InputOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fn: Callable, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.inputs = [t.detach().requires_grad_(t.requires_grad) for t in inputs]
        with torch.enable_grad():
            ctx.out = fn(*ctx.inputs)
        return tuple(t.detach().clone() for t in ctx.out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        wanted = [t for t in ctx.inputs if t.requires_grad]
        pairs = [(t, g) for t, g in zip(ctx.out, grads, strict=True) if t.requires_grad]
        outs, back = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outs, wanted, back, retain_graph=True, materialize_grads=True))
        return None, *(next(found) if t.requires_grad else None for t in ctx.inputs)


def _partials(extra: Tensor, x: Tensor, eta: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives of each row's increment in its own state and step size (rows do not mix)."""
    if not extra.requires_grad:
        return torch.zeros_like(x), torch.zeros_like(eta)
    parts = torch.autograd.grad(extra.sum(), (x, eta), retain_graph=True, materialize_grads=True)
    mask = alive.unsqueeze(-1)
    return tuple(torch.where(mask & p.isfinite(), p, torch.zeros_like(p)) for p in parts)  # type: ignore


def _finite(value: Tensor, grad: Tensor) -> Tensor:
    return value.detach().isfinite() & grad.detach().isfinite().all(-1)


def _where(rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(rows.unsqueeze(-1), a, b)


def _mean(value: Tensor, rows: Tensor) -> Tensor:
    return torch.where(rows, value, torch.zeros_like(value)).sum() / rows.sum().clamp(min=1)
