"""The Metropolis step: whether a proposal becomes the next state."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .dynamics import Dynamics

BEST_ACCEPTANCE = 0.574  # at which Langevin proposals go farthest in many dimensions (Roberts, Rosenthal 1998)


class Position(NamedTuple):
    """A state at either end of a proposal, in the coordinates that the dynamics moves.

    ``u`` and ``pull``, the gradient of the log density in ``u``, are ``(chains, rows, size)``, ``log_density`` is
    ``(chains, rows)``.
    """

    u: Tensor
    log_density: Tensor
    pull: Tensor


class Decision(NamedTuple):
    """Which rows move, and the probability with which they do, of the shape of the log ratio."""

    move: Tensor
    probability: Tensor


def hastings_log_ratio(dynamics: Dynamics, here: Position, there: Position, step_size: Tensor, scale: Tensor) -> Tensor:
    r"""``log pi(u') f(u | u') - log pi(u) f(u' | u)`` of a step ``u -> u'`` with density ``f``, ``(chains, rows)``.

    :param step_size: ``eta``, broadcastable to ``u``.
    :param scale: ``(size,)``, as for :meth:`Dynamics.step`.
    """
    back = dynamics.log_transition(there.u, here.u, there.pull, step_size, scale)
    forth = dynamics.log_transition(here.u, there.u, here.pull, step_size, scale)
    return there.log_density - here.log_density + back - forth


def decide(log_ratio: Tensor, finite: Tensor, log_uniform: Tensor) -> Decision:
    """Accept with probability ``min(1, ratio)`` (Metropolis, Hastings); what is not finite is rejected.

    :param finite: where the proposal has a finite density and gradient. (A ratio may overflow all the same.)
    :param log_uniform: logarithms of uniform numbers.
    """
    known = finite & ~log_ratio.isnan()
    log_ratio = torch.where(known, log_ratio, torch.full_like(log_ratio, -torch.inf))
    return Decision(log_uniform < log_ratio, log_ratio.clamp(max=0).exp())
