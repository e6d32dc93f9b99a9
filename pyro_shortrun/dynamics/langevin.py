"""Langevin dynamics, and gradient ascent where its noise is left out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import check_flags
from .dynamics import Dynamics, Jacobian
from .step_size import StepSize


class Langevin(Dynamics):
    r"""Unadjusted Langevin dynamics, or gradient ascent on the log density.

    .. math:: u'_i = u_i + \mathrm{clip}_R\big(\eta_i\, \partial_i \log\pi(u)\big) + \sqrt{2\eta_i}\,\epsilon_i ,
              \qquad \epsilon \sim N(0, I)

    ``noise=False`` drops the last term (the noise-free short run of the paper's first version). The clip limits each
    coordinate's drift to ``R = max_drift`` per step, in unconstrained units, so that a start in the far tail of a wide
    prior cannot throw the run out of floating-point range; at a clipped coordinate the Jacobian's row is that of the
    identity, so log q stays exact. Recipes that write :math:`s^2/2` and :math:`s`: :math:`\eta = s^2/2`.

    States, gradients and noise are ``(rows, size)``, rows of the unconstrained space ``u``; units are those of ``u``.

    Nijkamp, Pang, Han, Zhou, Zhu, Wu: Learning Multi-layer Latent Variable Model via Variational Optimization of
    Short Run MCMC for Approximate Inference, ECCV 2020.

    :param step_size: ``eta``: a number or a :class:`StepSize`.
    :param noise: whether noise is added.
    :param max_drift: ``R``; ``float("inf")`` for none.
    :raises ValueError: where ``max_drift`` is not positive, or the step size is not valid.

    >>> Langevin(0.1, noise=False).noise
    False
    """

    def __init__(self, step_size: StepSize | float = 0.1, *, noise: bool = True, max_drift: float = 10.0) -> None:
        super().__init__(step_size, max_drift)
        check_flags(noise=noise)
        self.noise = noise

    @property
    def has_noise(self) -> bool:  # type: ignore[override]
        """Whether a step adds noise: what ``noise`` is now."""
        return self.noise

    def jacobian(self, grad: Tensor, step_size: Tensor, scale: Tensor) -> Jacobian:
        slope = (step_size * scale).expand_as(grad)
        # The clip is locally a translation, but where eta * lambda_max(-H) >= 1 the step still folds the space (the
        # run bounces between both sides of the mode): the whole slope decides about that.
        free = torch.where(self.clipped(grad, step_size, scale).detach(), torch.zeros_like(slope), slope)
        return Jacobian(free, slope if math.isfinite(self.max_drift) else None)
