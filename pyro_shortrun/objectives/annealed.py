"""Bounds by annealed importance sampling: targets that move from the start's density to the model's."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints

from ..checks import check_flags
from ..density.interface import Density
from ..density.layout import Layout
from ..dynamics.dynamics import Dynamics
from ..dynamics.momentum import Leap, MomentumDynamics, leapfrog
from ..starts.base import Base
from .objective import Objective, check_inertia
from .reverse_kernels import Mirror, Reverse
from .transition import Column, Departure, State, Transition, settings


@dataclass(frozen=True)
class Tempered(Transition):
    """What Langevin and momentum transitions share: gradients of the tempered targets
    ``pi_k = q_0^(1 - beta_k) pi^(beta_k)``."""

    dynamics: Dynamics
    base: Base

    @property
    def _rule(self) -> tuple[Any, ...]:
        return self.dynamics, settings(self.dynamics), type(self.base), tuple(t.dim() for t in self.base.tensors)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.base.tensors

    def evaluate(
        self, density: Density, u: Tensor, tensors: tuple[Tensor, ...], create_graph: bool
    ) -> tuple[Tensor, ...]:
        """``log pi`` and the gradients of ``log pi`` and ``log q_0``, scaled alike."""
        value, grad, slope = self.base.evaluate(density, u, tensors, create_graph)
        if density.layout.is_arrow and self.base.is_weighted:
            return value, grad, slope
        return value, grad, slope / density.layout.drift_scale(u)


def mixed(slopes: Sequence[Tensor], beta: Tensor) -> Tensor:
    """Gradient of a tempered target."""
    grad, base = slopes
    return beta * grad + (1 - beta) * base


def weighed(density: Density, terms: Tensor, scale: Tensor) -> Tensor:
    """Terms per coordinate summed over a row; an arrowhead's local ones count ``1 / scale`` times."""
    return (terms / scale if density.layout.is_arrow else terms).sum(-1)


def around(values: Tensor) -> tuple[Tensor, Tensor]:
    """Of ``K`` steps: what belongs to the step that ends at each of ``K + 1`` arrivals, and to the one that begins.
    Before the first and after the last one it does not matter."""
    return torch.cat([values[:1], values]), torch.cat([values, values[-1:]])


def ahead_of(values: Tensor) -> Tensor:
    """Of ``K`` steps: what belongs to the step after each; after the last one it does not matter."""
    return torch.cat([values[1:], values[-1:]])


@dataclass(frozen=True)
class LangevinTransition(Tempered):
    """Langevin steps, each weighed at its end by a reverse step.

    The state is ``(u_{k-1}, u_k)``, and for a reverse that learns also the drift at ``u_{k-1}``.
    """

    reverse: Reverse

    ends_at_arrival = looks_back = True

    @cached_property
    def key(self) -> tuple[Any, ...]:
        return *self._rule, self.reverse.key

    @property
    def learns(self) -> bool:
        return self.reverse.learns

    def begin(self, density: Density, start: Tensor, step_size: Tensor, noise: Tensor) -> State:
        return (start, start, torch.zeros_like(start)) if self.learns else (start, start)

    def values(self, step_size: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
        return *around(step_size), *around(beta.unsqueeze(-1))

    def constants(self, step_size: Tensor) -> tuple[Tensor, ...]:
        ends = step_size.new_ones(len(step_size) + 1, 1)
        ends[0] = 0
        return ends, *(torch.cat([t[:1], t]) for t in self.reverse.parameters)

    def move(
        self, density: Density, state: State, found: Sequence[Tensor], column: Column
    ) -> tuple[State, Tensor | None]:
        before, u = state[:2]
        eta, ahead, beta, beta_ahead = column.values
        ends, *parameters = column.constants
        scale = column.scale
        mean = self.dynamics.mean(u, mixed(found, beta), eta, scale)
        extra = weighed(density, ends * self.reverse.log_density(before, u, mean, eta, parameters), scale)
        proposal = self.dynamics.step(u, mixed(found, beta_ahead), ahead, column.noise, scale)
        return (u, proposal, mean - u) if self.learns else (u, proposal), extra

    def departure(
        self, density: Density, u: Tensor, grad: Tensor, column: Column, create_graph: bool
    ) -> Departure | None:
        return Departure(weighed(density, 0.5 * column.noise.square(), column.scale))

    def learn(self, states: State, last: State, valid: Tensor) -> None:
        before, u, drift = states
        drift = torch.cat([drift[2:], last[2].unsqueeze(0)])
        self.reverse.learn(before[1:], u[1:], drift, valid)


@dataclass(frozen=True)
class MomentumTransition(Tempered):
    """Steps with a momentum, weighed by what their kicks add to its log density.

    The state is ``(last arrival, this arrival, momentum)``.
    """

    dynamics: MomentumDynamics

    @property
    def offset(self) -> int:  # type: ignore[override]
        return int(self.dynamics.midway)

    @property
    def ends_at_arrival(self) -> bool:  # type: ignore[override]
        return not self.dynamics.midway

    @cached_property
    def key(self) -> tuple[Any, ...]:
        return self._rule

    def begin(self, density: Density, start: Tensor, step_size: Tensor, noise: Tensor) -> State:
        return start, *self.dynamics.depart(start, noise, step_size[0])

    def values(self, step_size: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
        beta = beta.unsqueeze(-1)
        if self.dynamics.midway:
            here, ahead = (step_size, beta), (ahead_of(step_size), ahead_of(beta))
        else:
            here, ahead = zip(around(step_size), around(beta), strict=True)
        kept = self.dynamics.kept.expand(len(step_size), 1)
        if self.ends_at_arrival:  # at the first arrival the momentum is fresh already
            kept = torch.cat([torch.ones_like(kept[:1]), kept])
        return here[0], ahead[0], here[1], ahead[1], kept

    def constants(self, step_size: Tensor) -> tuple[Tensor, ...]:
        ends, begins = (step_size.new_ones(len(step_size) + self.ends_at_arrival, 1) for _ in range(2))
        begins[-1] = 0
        if self.ends_at_arrival:
            ends[0] = 0
        return ends, begins

    def move(
        self, density: Density, state: State, found: Sequence[Tensor], column: Column
    ) -> tuple[State, Tensor | None]:
        _, u, momentum = state
        eta, eta_ahead, beta, beta_ahead, kept = column.values
        ends, begins = column.constants
        here = self._leap(column.scale, found, eta, beta, ends)
        ahead = self._leap(column.scale, found, eta_ahead, beta_ahead, begins)
        proposal, momentum, gained = self.dynamics.arrive(u, momentum, here, ahead, kept, column.noise)
        return (u, proposal, momentum), weighed(density, gained, column.scale)

    def _leap(self, scale: Tensor, slopes: Sequence[Tensor], eta: Tensor, beta: Tensor, exists: Tensor) -> Leap:
        drift = self.dynamics.drift(mixed(slopes, beta), eta, scale)
        return Leap(leapfrog(eta), drift, exists)


def _stretched(beta: Tensor, num_steps: int) -> Tensor:
    """Temperatures of another number of steps: what these are, linearly between, at the same share of the run."""
    places = torch.arange(1, num_steps + 1, dtype=beta.dtype, device=beta.device) * (len(beta) / num_steps)
    above = places.ceil().long().clamp(1, len(beta))
    known = torch.cat([torch.zeros_like(beta[:1]), beta])
    return torch.lerp(known[above - 1], known[above], places - (above - 1))


class Annealed(PyroModule, Objective):
    r"""Annealed importance sampling along the run: a bound without determinants.

    The targets move from the start's density to the model's, :math:`\pi_k \propto q_0^{1-\beta_k} \pi^{\beta_k}` with
    :math:`0 < \beta_1 < \dots < \beta_K = 1`; step k is one for :math:`\pi_k`. With :class:`Langevin` dynamics the
    reverse of a step is weighed by a Langevin step for the same target:

    .. math::
        \log w = \log\pi(u_K) - \log q_0(u_0) + \sum_k \log r_k(u_{k-1} \mid u_k) - \log f_k(u_k \mid u_{k-1}),
        \qquad f_k(u' \mid u) = r_k(u' \mid u) = N\big(u';\, u + \eta_k \nabla\log\pi_k(u),\, 2 \eta_k\big) .

    With :class:`Hamiltonian` dynamics a step is a leapfrog step, which keeps volume, and the momenta are weighed
    instead: the sum is that of :math:`\log N(v'_k; 0, I) - \log N(v_k; 0, I)` for the momentum before (:math:`v_k`)
    and after (:math:`v'_k`) each step.

    In nats, one value per row. ``E[log w] <= log p(x)`` and ``E[exp(log w)] = p(x)`` for any step size, so importance
    weights and ``RenyiELBO`` apply. It is exact as K grows and steps shrink. Without tempering this bound would be the
    start's own for small steps. ``info.log_det`` holds the mean increments.

    Needs dynamics with noise and a start whose density is known everywhere: :class:`Prior`, or an ``AutoNormal``,
    ``AutoDiagonalNormal`` or ``AutoMultivariateNormal``, which is then trained by the same loop, as
    the temperatures are. Cost per step: one gradient of the model's log density (and of the start's), one Hessian
    product on the way back.

    Neal: Annealed importance sampling, 2001; Thin, Kotelevskii, Doucet, Durmus, Moulines, Panov: Monte Carlo
    variational auto-encoders, ICML 2021; Geffner, Domke: MCMC variational inference via uncorrected Hamiltonian
    annealing, NeurIPS 2021; Zhang, Hsu, Li, Finn, Grosse: Differentiable annealed importance sampling and the perils of
    gradient noise, NeurIPS 2021.

    :param learnable: whether SVI tunes the temperatures, which begin at ``k / K``.
    :raises ValueError: for dynamics without noise.
    :raises NotImplementedError: for a start whose density is not known everywhere.
    """

    tempers = True
    carries = False
    _reverse: Reverse = Mirror()
    increments: Any  # a PyroParam, or a buffer
    _stretched: Tensor | None = None  # temperatures in place of these

    def __init__(self, learnable: bool = True) -> None:
        super().__init__()
        check_flags(learnable=learnable)
        self.learnable = learnable

    def setup(self, num_steps: int, layout: Layout, like: Tensor) -> None:
        if "increments_unconstrained" in self._parameters or "increments" in self._buffers:
            return
        even = like.new_full((num_steps,), 1.0 / num_steps)
        if self.learnable and num_steps > 1:
            self.increments = PyroParam(even, constraints.simplex)
        else:
            self.register_buffer("increments", even)

    def resized(self, num_steps: int) -> Objective:
        if not self.tempers or num_steps == len(self.increments):
            return self
        other = copy(self)
        other._stretched = _stretched(self.temperatures(len(self.increments), self.increments).detach(), num_steps)
        return other

    def temperatures(self, num_steps: int, like: Tensor) -> Tensor:
        if self._stretched is not None:
            return self._stretched
        if len(self.increments) != num_steps:
            raise ValueError(
                f"there are {len(self.increments)} temperatures for {num_steps} steps: another guide's are in Pyro's "
                "parameter store under the same name; call pyro.clear_param_store() between guides."
            )
        beta = self.increments.cumsum(0)
        return beta / beta[-1]

    def check(self, dynamics: Dynamics) -> None:
        check_inertia(self, dynamics)
        if not (dynamics.has_transition_density or dynamics.has_momentum):
            name = type(self).__name__
            raise ValueError(f"{name} needs dynamics with noise, such as Langevin(0.1): its weights are those of it.")

    def transition(self, dynamics: Dynamics, base: Base | None, account: bool) -> Transition:
        if base is None:
            raise NotImplementedError(
                f"{type(self).__name__} needs the density of the start everywhere, not only at draws: use "
                "start=Prior(), AutoNormal(model), AutoDiagonalNormal(model) or AutoMultivariateNormal(model), or an "
                "encoder whose sites are real and Normal independently of each other; and "
                "start=Prior() where latents lie in poutine.mask (as obs_mask makes some), which those do not mask."
            )
        if isinstance(dynamics, MomentumDynamics):
            return MomentumTransition(dynamics, base)
        return LangevinTransition(dynamics, base, self._reverse)
