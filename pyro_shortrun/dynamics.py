"""Transitions of a short run: one class per dynamics."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints

from .arguments import check_between
from .layout import Layout
from .logdet import LogDet, LogDetResult, Product
from .step_size import StepSize

_LOGGER = logging.getLogger("pyro_shortrun")
_MAX_HALVINGS = 20
_STIFF_DRIFT = 1.0


class Dynamics(PyroModule):
    """One transition of the state ``u``, ``(chains, rows, size)``.

    :param step_size: a :class:`StepSize`, or its initial value.
    :param max_drift: limit of each coordinate's drift per step.
    """

    has_momentum = False

    def __init__(self, step_size: StepSize | float, max_drift: float = 10.0) -> None:
        super().__init__()
        self.step_size = step_size if isinstance(step_size, StepSize) else StepSize(step_size)
        if not max_drift > 0:
            raise ValueError(f"max_drift must be > 0, got {max_drift!r}; use float('inf') for no limit.")
        self.max_drift = max_drift

    def setup(self, like: Tensor) -> None:
        """Create parameters other than the step size (once), in the dtype and on the device of ``like``."""
        return None

    def draw_noise(self, num_steps: int, like: Tensor) -> Tensor:
        """Standard normal noise of all steps, ``(num_steps, *like.shape)``."""
        return torch.randn((num_steps, *like.shape), dtype=like.dtype, device=like.device)

    def step(self, u: Tensor, grad: Tensor, step_size: Tensor, noise: Tensor, scale: Tensor) -> Tensor:
        """The next state.

        :param u: state, ``(chains, rows, size)``.
        :param grad: ``grad log pi(u)``, same shape.
        :param step_size: ``eta``, broadcastable to ``u``.
        :param noise: standard normal, same shape as ``u``.
        :param scale: ``(size,)`` factors of the gradient that undo the scaling of subsampled plates.
        """
        raise NotImplementedError(f"a {type(self).__name__} step is not one of positions alone.")

    def log_abs_det(
        self,
        grad: Tensor,
        step_size: Tensor,
        scale: Tensor,
        product: Product,
        layout: Layout,
        logdet: LogDet,
        probes: Tensor | None,
    ) -> LogDetResult:
        """``log |det du'/du|`` of :meth:`step` at fixed noise, ``(chains, rows)``.

        :param product: products with the Hessian of ``log pi`` at ``u``.
        """
        raise NotImplementedError(f"{type(self).__name__} has no log-determinant of a step.")

    def clipped(self, grad: Tensor, step_size: Tensor, scale: Tensor) -> Tensor:
        """Where :meth:`step` is not the textbook's because a drift was limited, as ``grad``."""
        return (step_size * scale * grad).abs() >= self.max_drift

    @property
    def has_transition_density(self) -> bool:
        """Whether :meth:`log_transition` is defined."""
        return False

    @property
    def has_noise(self) -> bool:
        """Whether a step adds noise."""
        return self.has_transition_density or self.has_momentum

    def mean(self, u: Tensor, grad: Tensor, step_size: Tensor, scale: Tensor) -> Tensor:
        """``u`` and the drift, ``eta * grad log pi(u)`` limited to ``max_drift``."""
        return u + (step_size * scale * grad).clamp(-self.max_drift, self.max_drift)

    def log_transition(self, u: Tensor, moved: Tensor, grad: Tensor, step_size: Tensor, scale: Tensor) -> Tensor:
        """``log f(moved | u)``, the density of :meth:`step` with noise, ``(chains, rows)``."""
        raise NotImplementedError(f"{type(self).__name__} has no transition density.")


def back_off(dynamics: Dynamics, fails: Callable[[], bool]) -> None:
    """Halve a step size that was a first guess while pilot runs fail, with the drift clipped more tightly."""
    first, halvings = dynamics.step_size.init, 0
    while halvings < _MAX_HALVINGS and fails():
        dynamics.step_size.shrink(0.5)
        dynamics.max_drift = _STIFF_DRIFT
        halvings += 1
    if halvings:
        _LOGGER.warning(
            "step_size %g is too large for this model (eta * curvature > 1 along pilot runs from the start): "
            "beginning at %.2g with max_drift=%g. Pass StepSize(%g) to insist on it.",
            first,
            first * 0.5**halvings,
            _STIFF_DRIFT,
            first,
        )


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
        self.noise = noise

    def draw_noise(self, num_steps: int, like: Tensor) -> Tensor:
        if self.noise:
            return super().draw_noise(num_steps, like)
        return torch.zeros((), dtype=like.dtype, device=like.device).expand(num_steps, *like.shape)

    def step(self, u: Tensor, grad: Tensor, step_size: Tensor, noise: Tensor, scale: Tensor) -> Tensor:
        moved = self.mean(u, grad, step_size, scale)
        return moved + (2 * step_size).sqrt() * noise if self.noise else moved

    @property
    def has_transition_density(self) -> bool:
        return self.noise

    def log_transition(self, u: Tensor, moved: Tensor, grad: Tensor, step_size: Tensor, scale: Tensor) -> Tensor:
        mean = self.mean(u, grad, step_size, scale)
        variance = 2 * step_size
        return -0.5 * ((moved - mean).square() / variance + (2 * math.pi * variance).log()).sum(-1)

    def log_abs_det(
        self,
        grad: Tensor,
        step_size: Tensor,
        scale: Tensor,
        product: Product,
        layout: Layout,
        logdet: LogDet,
        probes: Tensor | None,
    ) -> LogDetResult:
        diagonal = (step_size * scale).expand_as(grad)
        free = (diagonal * grad).detach().abs() < self.max_drift
        # The clip is locally a translation, but where eta * lambda_max(-H) >= 1 the step still folds the space (the
        # run bounces between both sides of the mode): the whole diagonal decides about that.
        clipped = torch.where(free, diagonal, torch.zeros_like(diagonal))
        return logdet(product, clipped, layout, probes, judged=diagonal if math.isfinite(self.max_drift) else None)


class Hamiltonian(Dynamics):
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

    has_momentum = True
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
