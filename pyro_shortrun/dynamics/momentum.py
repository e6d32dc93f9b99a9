"""The interface of a dynamics whose state has a momentum besides its position."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .dynamics import Dynamics


class Leap(NamedTuple):
    """One step as an arrival sees it.

    ``length`` is the leapfrog step ``sqrt(2 eta)``, ``drift`` the limited ``eta * grad`` of the step's own target at
    the arrival, both as the position ``(chains, rows, size)`` or broadcastable to it; ``exists`` is 1, or 0 for the
    step before the first arrival and the one after the last.
    """

    length: Tensor
    drift: Tensor
    exists: Tensor


class Arrived(NamedTuple):
    """The position at which the gradient is wanted next, the momentum there, and by how much the kicks at this arrival
    raised the log density of the momentum, ``log N(v'; 0, I) - log N(v; 0, I)``, per coordinate."""

    proposal: Tensor
    momentum: Tensor
    gain: Tensor


class MomentumDynamics(Dynamics):
    r"""Steps made of kicks ``v += a(u)``, drifts ``u += b v`` (both keep volume) and refreshments
    ``v <- kept v + sqrt(1 - kept^2) xi`` (which keep ``N(0, I)``).

    Any order of them is weighed alike: the log weight of a step is what its kicks add to the log density of the
    momentum. Every gradient is an *arrival*; ``midway`` tells whether that is in the middle of each step, so that K
    steps have K arrivals, or at the ends of steps, so that there are K + 1 and the run ends at the last.
    """

    has_momentum = True
    midway = False

    def mean(self, u: Tensor, grad: Tensor, step_size: Tensor, scale: Tensor) -> Tensor:
        raise NotImplementedError(f"a {type(self).__name__} step is not one of positions alone.")

    @property
    def kept(self) -> Tensor:
        """The part of the momentum that a refreshment leaves, a number in [0, 1)."""
        raise NotImplementedError

    def depart(self, start: Tensor, noise: Tensor, step_size: Tensor) -> tuple[Tensor, Tensor]:
        """Position of the first arrival, and the momentum there, of a run from ``start`` with momentum ``noise``."""
        return start, noise

    def arrive(self, u: Tensor, momentum: Tensor, here: Leap, ahead: Leap, kept: Tensor, noise: Tensor) -> Arrived:
        """From one arrival to the next.

        :param u: where the gradient was taken.
        :param here: the step that ends at ``u``, or whose middle it is.
        :param ahead: the step that begins at ``u``, or after the step whose middle it is.
        :param kept: :attr:`kept`, broadcastable to ``u``; 1 at the first of K + 1 arrivals, whose momentum is
            fresh already, so that a run takes the noise of K steps.
        """
        raise NotImplementedError

    @staticmethod
    def refreshed(momentum: Tensor, kept: Tensor, noise: Tensor) -> Tensor:
        """The momentum, partly drawn anew."""
        return kept * momentum + (1 - kept.square()).sqrt() * noise


def gain(before: Tensor, after: Tensor) -> Tensor:
    """``log N(after; 0, I) - log N(before; 0, I)`` per coordinate."""
    return 0.5 * (before.square() - after.square())


def leapfrog(step_size: Tensor) -> Tensor:
    """``epsilon = sqrt(2 eta)``."""
    return torch.sqrt(2 * step_size)
