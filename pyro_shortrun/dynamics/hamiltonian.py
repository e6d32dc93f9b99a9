"""Hamiltonian dynamics: leapfrog steps with a partial refreshment of the momentum."""

from __future__ import annotations

from typing import Any

from pyro.nn import PyroParam
from torch import Tensor
from torch.distributions import constraints

from ..checks import check_between, check_flags
from .momentum import Arrived, Leap, MomentumDynamics, gain, leapfrog
from .step_size import StepSize


class Hamiltonian(MomentumDynamics):
    r"""Underdamped dynamics: leapfrog steps with a partial refreshment of the momentum.

    .. math::
        u &\leftarrow u + \tfrac{\epsilon}{2} v, \qquad
        v' = v + \epsilon \nabla\log\pi(u), \qquad u' = u + \tfrac{\epsilon}{2} v', \\
        v'' &= (1 - \delta) v' + \sqrt{1 - (1 - \delta)^2}\, \xi, \qquad \xi \sim N(0, I), \qquad
        \epsilon = \sqrt{2 \eta}

    with unit mass and one gradient per step; a step size per coordinate (``StepSize(per="dim")``) is a diagonal mass.
    With ``damping = 1`` all of the momentum is drawn anew, and a step is :class:`Langevin`'s with the gradient taken
    half-way. Less damping lets the run travel further in K steps. The limit ``max_drift`` is that of
    :class:`Langevin`, on ``eta * grad``.

    Goes with :class:`~pyro_shortrun.Annealed` (its weight needs no density of a transition). Trajectories hold the
    positions in the middle of steps.

    Position and momentum are ``(rows, size)`` each.

    Geffner, Domke: MCMC variational inference via uncorrected Hamiltonian annealing, NeurIPS 2021.

    :param step_size: ``eta``, half the square of the leapfrog step: a number or a :class:`StepSize`.
    :param damping: ``delta``, in (0, 1).
    :param learnable: whether SVI tunes the damping.
    :param max_drift: ``float("inf")`` for none.
    :raises ValueError: for arguments out of range.

    >>> Hamiltonian(0.1, damping=0.2).damping
    0.2
    """

    midway = True
    share: Any

    def __init__(
        self,
        step_size: StepSize | float = 0.1,
        *,
        damping: float = 0.1,
        learnable: bool = True,
        max_drift: float = 10.0,
    ) -> None:
        super().__init__(step_size, max_drift)
        check_between("damping", damping, 0, 1, "0.1")
        check_flags(learnable=learnable)
        self.damping, self.learnable = damping, learnable

    def setup(self, like: Tensor) -> None:
        if "share_unconstrained" in self._parameters or "share" in self._buffers:
            return
        share = like.new_full((), self.damping)
        if self.learnable:
            self.share = PyroParam(share, constraints.unit_interval)
        else:
            self.register_buffer("share", share)

    @property
    def kept(self) -> Tensor:
        """The part of the momentum that a step leaves, ``1 - delta``."""
        return 1 - self.share

    def depart(self, start: Tensor, noise: Tensor, step_size: Tensor) -> tuple[Tensor, Tensor]:
        return start + 0.5 * leapfrog(step_size) * noise, noise

    def arrive(self, u: Tensor, momentum: Tensor, here: Leap, ahead: Leap, kept: Tensor, noise: Tensor) -> Arrived:
        pushed = momentum + 2 * here.drift / here.length
        refreshed = self.refreshed(pushed, kept, noise)
        end = u + 0.5 * here.length * pushed
        return Arrived(end + ahead.exists * 0.5 * ahead.length * refreshed, refreshed, gain(momentum, pushed))
