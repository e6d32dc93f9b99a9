"""GaussianReverse: the run weighed by a reverse kernel that pilots teach."""

from __future__ import annotations

from copy import copy

from torch import Tensor

from ..checks import check_count, check_flags
from ..density.layout import Layout
from ..dynamics.dynamics import Dynamics
from ..starts.base import Base, Untempered
from .annealed import Annealed
from .objective import Objective, Pilots
from .reverse_kernels import Affine, Fit, Recorder, Reverse
from .transition import Plain, Transition


class GaussianReverse(Annealed):
    r"""Langevin steps, weighed by a reverse kernel that is learned from other runs.

    The weight is that of :class:`Annealed`, by default without tempering (:math:`\beta_k = 1`, so that the law of a
    draw is that of the plain short run), and each reverse step is a Gaussian,

    .. math:: r_k(u' \mid u) = N\big(u';\; u - a_k + 2 \eta_k (b_k + G_k u) + D_k a_k,\; s_k S_k s_k\big),
              \qquad s_k = \sqrt{2 \eta_k}, \quad a_k = \eta_k \nabla\log\pi_k(u).

    The exact reversal of a small step is :math:`N(u - a_k + 2 \eta_k \nabla\log q_k(u), 2 \eta_k I)`, with ``q_k`` the
    law of the run after k steps. What stands for its score is linear in ``u`` and in the model's own gradient, and the
    coefficients are the maximum likelihood ones: least squares over pilots, runs with the same step sizes made right
    before those that are weighed. No run weighs itself, so ``E[log w] <= log p(x)`` and ``E[exp(log w)] = p(x)`` hold
    whatever the coefficients are, and importance weights and ``RenyiELBO`` apply. Gradients hold the coefficients
    fixed: at the optimum of least squares the bound does not change with them. Calls that train have fewer pilots than
    others, and looser bounds.

    In the mean this is the evidence lower bound of the run itself, for any step size, on Gaussian posteriors with
    independent coordinates (``dense=True``: on all) from such a start, but for the error of the least squares: at most
    about ``2 * K * size / draws`` nats (dense: ``1.25 * K * size ** 2 / draws``). The tuned step is then the one whose
    draws are best. Coefficients are shared by all rows of a plate. Cost per step: one gradient, one Hessian product on
    the way back, and one gradient of every pilot.

    :param tempered: whether targets move as in :class:`Annealed`, with its temperatures and starts. Bounds are often
        tighter; draws are those of the tempered run. Without, any start will do whose draws have a density.
    :param dense: whether coordinates of a row are regressed on each other, not each on itself and its own gradient.
        Better where a run from far away has to turn correlated coordinates, but needs many more pilots.
    :param pilots: rows (times chains) of pilots before calls that do not train.
    :param fresh: rows of pilots before calls that train, times the numbers that a draw has in a regression
        (``3 * size + 1`` if dense, else 4). Few make coefficients noisy, which favours steps somewhat below the best.
    :param learnable: whether SVI tunes the temperatures.
    :raises ValueError: where ``pilots`` or ``fresh`` are no positive integers.
    :raises NotImplementedError: for latents in ``poutine.mask``, and for ``dense=True`` with a subsampled plate that
        does not hold all latents.
    """

    takes_masks = False
    carries = True  # pilots cost more than the run

    def __init__(
        self,
        tempered: bool = False,
        *,
        dense: bool = False,
        pilots: int = 4096,
        fresh: int = 64,
        learnable: bool = True,
    ) -> None:
        super().__init__(learnable)
        check_count("pilots", pilots)
        check_count("fresh", fresh)
        check_flags(tempered=tempered, dense=dense)
        self.tempers, self.dense, self.num_pilots, self.fresh = tempered, dense, pilots, fresh

    def setup(self, num_steps: int, layout: Layout, like: Tensor) -> None:
        if self.dense and layout.arrow is not None and layout.arrow.weight != 1:
            raise NotImplementedError("dense=True cannot scale the local part of a subsampled model: leave it out.")
        if self.tempers:
            super().setup(num_steps, layout, like)

    def temperatures(self, num_steps: int, like: Tensor) -> Tensor:
        return super().temperatures(num_steps, like) if self.tempers else like.new_ones(num_steps)

    def check(self, dynamics: Dynamics) -> None:
        if dynamics.has_momentum:
            name = type(dynamics).__name__
            raise ValueError(f"GaussianReverse is for Langevin dynamics; {name} goes with Annealed().")
        super().check(dynamics)

    def transition(self, dynamics: Dynamics, base: Base | None, account: bool) -> Transition:
        if self.tempers:
            return super().transition(dynamics, base, account)
        return super().transition(dynamics, Untempered(), account) if account else Plain(dynamics)

    def pilots(self, layout: Layout, step_size: Tensor, training: bool) -> Pilots:
        fit = Fit(layout, step_size, self.dense)
        count = self.fresh * Fit.width(layout, self.dense) if training else self.num_pilots
        return _Pilots(self, fit, count)


class _Pilots(Pilots):
    """Runs of a :class:`GaussianReverse` for its least squares."""

    def __init__(self, whole: GaussianReverse, fit: Fit, count: int) -> None:
        self._whole, self._fit, self.count = whole, fit, count

    def temperatures(self, num_steps: int, like: Tensor) -> Tensor:
        return self._whole.temperatures(num_steps, like)

    def transition(self, dynamics: Dynamics, base: Base | None, account: bool) -> Transition:
        return weighed_by(self._whole, Recorder(self._fit)).transition(dynamics, base, account)

    def objective(self) -> Objective:
        return weighed_by(self._whole, Affine(self._fit.dense, self._fit.solve()))


def weighed_by(objective: GaussianReverse, reverse: Reverse) -> GaussianReverse:
    """The same objective, parameters and all, with this reverse."""
    other = copy(objective)
    other._reverse = reverse
    return other
