"""Nesterov's accelerated gradient steps."""

from __future__ import annotations

from ..checks import check_between
from .dynamics import Dynamics
from .step_size import StepSize


class Nesterov(Dynamics):
    r"""Gradient ascent with Nesterov's momentum, without noise.

    .. math:: y_k = u_k + \beta\, (u_k - u_{k-1}) , \qquad
              u_{k+1} = y_k + \mathrm{clip}_R\big(\eta\, \nabla \log\pi(y_k)\big) , \qquad u_{-1} = u_0 ,

    the limit ``R = max_drift`` being each coordinate's. It climbs as far as several times as many plain steps, so that
    few of them give good reconstructions; the ends are near modes and no draws from a posterior. There is no log q of
    such a run: for ``objective=Refine()``, and for starts without a density.

    Nesterov: A method for solving the convex programming problem with convergence rate O(1/k^2), 1983; in this form
    Sutskever, Martens, Dahl, Hinton, ICML 2013.

    :param step_size: ``eta``: a number or a :class:`StepSize`.
    :param beta: how much of a step is taken again by the next one, in (0, 1).
    :param max_drift: ``R``; ``float("inf")`` for none.
    :raises ValueError: where ``beta`` or ``max_drift`` is out of range, or the step size is not valid.

    >>> Nesterov(0.1, beta=0.7).inertia
    0.7
    """

    has_noise = False

    def __init__(self, step_size: StepSize | float = 0.1, *, beta: float = 0.7, max_drift: float = 10.0) -> None:
        super().__init__(step_size, max_drift)
        check_between("beta", beta, 0, 1, "0.7")
        self.beta = float(beta)

    @property
    def inertia(self) -> float:  # type: ignore[override]
        """``beta``."""
        return self.beta
