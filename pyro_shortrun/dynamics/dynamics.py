"""The interface of a dynamics: how one step moves a state."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, NamedTuple

import torch
from pyro.nn import PyroModule
from torch import Tensor

from .step_size import StepSize


class Jacobian(NamedTuple):
    """``du'/du = I + diag(slope) H`` of a step at fixed noise, ``H`` being the Hessian of ``log pi`` at ``u``.

    ``slope`` is what the step makes of a change of the gradient, ``d drift_i / d grad_i``, ``(chains, rows, size)``.
    ``judged``, nowhere smaller, decides in its place whether the step is invertible; None where it is ``slope``.
    """

    slope: Tensor
    judged: Tensor | None = None


class Dynamics(PyroModule):
    r"""One step of the state ``u``, ``(chains, rows, size)``,

    .. math:: u' = u + \mathrm{drift}(\nabla\log\pi(u)) + \sqrt{2 \eta}\, \epsilon .

    A dynamics of positions says what its :meth:`drift` is (and, to be weighed by the determinants of its steps, its
    :meth:`jacobian`). One with momentum is a :class:`~pyro_shortrun.dynamics.momentum.MomentumDynamics`.

    :param step_size: a :class:`StepSize`, or its initial value.
    :param max_drift: limit of each coordinate's drift per step.
    :raises ValueError: where ``max_drift`` is not positive, or the step size is not valid.
    """

    has_momentum = False
    has_noise = True  # whether a step adds noise
    inertia = 0.0  # the share of the last step that is taken again before the gradient is found

    def __init__(self, step_size: StepSize | float, max_drift: float = 10.0) -> None:
        super().__init__()
        self.step_size = step_size if isinstance(step_size, StepSize) else StepSize(step_size)
        _check_limit(max_drift)
        self.max_drift = max_drift

    def setup(self, like: Tensor) -> None:
        """Create parameters other than the step size (once), in the dtype and on the device of ``like``."""
        return None

    def draw_noise(self, num_steps: int, like: Tensor) -> Tensor:
        """Standard normal noise of all steps, ``(num_steps, *like.shape)``; zeros where there is none."""
        if not self.has_noise:
            return torch.zeros((), dtype=like.dtype, device=like.device).expand(num_steps, *like.shape)
        return torch.randn((num_steps, *like.shape), dtype=like.dtype, device=like.device)

    def drift(self, grad: Tensor, step_size: Tensor, scale: Tensor) -> Tensor:
        """How far a step goes without noise: by default ``eta * grad`` of each coordinate, limited to ``max_drift``.

        :param grad: ``grad log pi(u)``, ``(chains, rows, size)``.
        :param step_size: ``eta``, broadcastable to ``grad``.
        :param scale: ``(size,)`` factors of the gradient that undo the scaling of subsampled plates.
        """
        return (step_size * scale * grad).clamp(-self.max_drift, self.max_drift)

    def clipped(self, grad: Tensor, step_size: Tensor, scale: Tensor) -> Tensor:
        """Where a step is not the textbook's because its drift was limited, as ``grad``."""
        return (step_size * scale * grad).abs() >= self.max_drift

    def mean(self, u: Tensor, grad: Tensor, step_size: Tensor, scale: Tensor) -> Tensor:
        """``u`` and the drift."""
        return u + self.drift(grad, step_size, scale)

    def step(self, u: Tensor, grad: Tensor, step_size: Tensor, noise: Tensor, scale: Tensor) -> Tensor:
        """The next state.

        :param u: state, ``(chains, rows, size)``.
        :param noise: standard normal, same shape as ``u``.
        """
        moved = self.mean(u, grad, step_size, scale)
        return moved + (2 * step_size).sqrt() * noise if self.has_noise else moved

    def log_transition(self, u: Tensor, moved: Tensor, grad: Tensor, step_size: Tensor, scale: Tensor) -> Tensor:
        """``log f(moved | u)``, the density of :meth:`step` with noise, ``(chains, rows)``."""
        variance = 2 * step_size
        gap = moved - self.mean(u, grad, step_size, scale)
        return -0.5 * (gap.square() / variance + (2 * math.pi * variance).log()).sum(-1)

    @property
    def has_transition_density(self) -> bool:
        """Whether :meth:`log_transition` is that of the step: Gaussian around :meth:`mean`, unless said otherwise."""
        return self.has_noise and not self.has_momentum and _keeps_up(type(self), "log_transition", ("step",))

    @property
    def has_jacobian(self) -> bool:
        """Whether :meth:`jacobian` is defined, for the step as it is."""
        said = type(self).jacobian is not Dynamics.jacobian
        return said and _keeps_up(type(self), "jacobian", ("drift", "mean", "step"))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "log_abs_det" in vars(cls):
            raise TypeError(
                f"{cls.__name__}.log_abs_det is not called: define {cls.__name__}.jacobian(grad, step_size, scale), "
                "and the objective finds the determinant."
            )

    def jacobian(self, grad: Tensor, step_size: Tensor, scale: Tensor) -> Jacobian:
        """Of :meth:`step` at fixed noise."""
        raise NotImplementedError(f"{type(self).__name__} does not say the Jacobian of its step.")


def _check_limit(max_drift: Any) -> None:
    if isinstance(max_drift, bool) or not isinstance(max_drift, Real) or not float(max_drift) > 0:
        raise ValueError(f"max_drift must be a number > 0, got {max_drift!r}; use float('inf') for no limit.")


def _keeps_up(kind: type, what: str, others: tuple[str, ...]) -> bool:
    """Whether no subclass has changed one of the ``others`` without saying ``what`` anew."""
    owner = next(i for i, one in enumerate(kind.__mro__) if what in vars(one))
    return not any(name in vars(one) for one in kind.__mro__[:owner] for name in others)
