"""The short run itself: K steps of any transition, their log-weight increments, and which gradients flow where.

Three ways to run, chosen by :class:`Gradients`:

* ``NONE``: no graph is kept; memory does not grow with K.
* ``GUIDE``: the run is one node of autograd whose backward differentiates with respect to the start, the step sizes and
  what else is the guide's, and nothing else. The model's parameters, which occur inside every step, get no gradient
  through the run: maximum likelihood wants ``grad_theta log p_theta(x, z_K)`` with ``z_K`` held fixed. The backward
  pass recomputes one step at a time, so memory is K states, not K graphs, or ``2 sqrt(K)`` states with ``checkpoint``.
* ``FULL``: an ordinary graph through everything, for the exact gradient of the bound in the model's parameters too.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch
from torch import Tensor

from ..density.interface import Density
from ..dynamics.dynamics import Dynamics
from ..objectives.objective import Objective
from ..starts.start import StartDraw
from .loop import Loop
from .noise import DrawnNoise, GivenNoise, Noise
from .record import ShortRun


class Gradients(Enum):
    """Which gradients a run keeps, see the module."""

    NONE = 0
    GUIDE = 1
    FULL = 2


def run(
    density: Density,
    dynamics: Dynamics,
    objective: Objective,
    start: StartDraw | Tensor,
    step_size: Tensor,
    noise: Tensor | Noise | None = None,
    *,
    account: bool = True,
    gradients: Gradients = Gradients.NONE,
    keep_states: bool = False,
    checkpoint: bool = False,
) -> ShortRun:
    """Run ``K = len(step_size)`` steps from ``start``.

    :param start: ``u_0``, ``(chains, rows, size)``, for objectives that ask for its density as a
        :class:`~pyro_shortrun.starts.start.StartDraw`.
    :param step_size: ``eta``, ``(K, size)``.
    :param noise: standard normal, ``(K, chains, rows, size)``; zeros make a noise-free run. Drawn by default.
    :param account: whether increments (log q) are wanted at all.
    :param gradients: which gradients are kept, see :class:`Gradients`.
    :param keep_states: whether ``ShortRun.states`` is wanted.
    :param checkpoint: whether the way back recomputes all but every ``sqrt(K)``-th state.
    """
    if isinstance(start, Tensor):
        state, base, log_q = start, None, None
    else:
        state, base, log_q = start.state, start.base, start.log_q
        density.expect(state, start.log_density)
    if noise is None:
        noise = DrawnNoise(dynamics, len(step_size), state)
        noise.block(0, 1)  # before other draws, so that a run is the same whether or not it is accounted for
    noise = noise if isinstance(noise, Noise) else GivenNoise(noise)
    if account:
        objective.check(dynamics)
    transition = objective.transition(dynamics, base, account)
    with torch.set_grad_enabled(gradients is not Gradients.NONE):
        first = transition.begin(density, state, step_size, noise.block(0, 1)[0])
        values = transition.values(step_size, objective.temperatures(len(step_size), state))
        shared = transition.draw(state, density.layout)
        loop = Loop(density, transition, noise, step_size, len(first), shared, keep_states, checkpoint)
        *last, total = _walked(loop, (*first, *values, *transition.tensors), gradients)
        added = transition.finish(first, tuple(last), step_size, log_q)
        if added is not None and gradients is Gradients.GUIDE and not transition.detaches:
            # Of an invalid row nothing counts but its pull.
            added = torch.where(loop.invalid, added.detach(), added)
        increment = total if added is None else total + added
    if transition.learns:
        with torch.no_grad():
            transition.learn(loop.tape, tuple(t.detach() for t in last), ~loop.invalid)
    return loop.result(state, last[0], increment, account)


def _walked(loop: Loop, inputs: tuple[Tensor, ...], gradients: Gradients) -> tuple[Tensor, ...]:
    if loop.transition.detaches:
        return loop.forward(*(t.detach() for t in inputs))
    if gradients is Gradients.FULL:
        return loop.forward(*inputs, graph=True)
    if gradients is Gradients.GUIDE and any(t.requires_grad for t in inputs):
        return _GuideOnly.apply(loop, *inputs)
    return loop.forward(*(t.detach() for t in inputs), taped=loop.transition.learns)


class _GuideOnly(torch.autograd.Function):
    """The run as one node: gradients to the start, the step sizes and what else is the guide's only, one recomputed
    step at a time.

    A row that froze or took a singular step has no valid log q to differentiate. It takes the place of a row whose
    loss is ``log eta`` (averaged over steps and coordinates), so that step sizes too large for some rows shrink at a
    bounded rate instead of following a meaningless and often huge gradient.
    """

    @staticmethod
    def forward(ctx: Any, loop: Loop, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.loop = loop
        return tuple(t.detach() for t in loop.forward(*(t.detach() for t in inputs), taped=True))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, *ctx.loop.backward(*grads)
