"""Langevin chains, adjusted or not, chains as a batch."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..dynamics.adaptation import Adaptation
from ..dynamics.dynamics import Dynamics
from ..dynamics.metric import Preconditioner
from ..dynamics.metropolis import Position, decide, hastings_log_ratio
from ..tensors import moved
from .sampler import ChainState, Sampler, Stats, draw_stats
from .target import Target

_LOGGER = logging.getLogger("pyro_shortrun")
_MUCH_CLIPPED = 0.1  # share of coordinates
_INFLATION = 0.1  # of a variance, by the noise of mini-batches
_STARTS, _BATCHES = 4, 16  # by which that noise is estimated
StepSizeSchedule = Callable[[int], float]


class LangevinChain(Sampler):
    r"""``num_steps`` transitions per draw, from the last draw or from a fresh start.

    With ``adjust``, a transition ``u -> u'`` of the dynamics with density ``f`` is accepted per row with probability
    ``min(1, pi(u') f(u | u') / (pi(u) f(u' | u)))`` (Metropolis, Hastings).

    :param schedule: step size as a function of the number of transitions made, or None.
    :param restarts: whether every draw begins at a fresh start.
    :param limit: upper bound of the adapted step size.
    :param guess: whether the step size is a first guess that pilot runs may halve.
    """

    def __init__(
        self,
        target: Target,
        dynamics: Dynamics,
        num_steps: int,
        chain_batch_size: int | None,
        *,
        adjust: bool,
        restarts: bool,
        schedule: StepSizeSchedule | None,
        preconditioner: Preconditioner,
        warmup: int,
        accept: float | None,
        limit: float,
        guess: bool,
    ) -> None:
        super().__init__(target, dynamics, num_steps, chain_batch_size)
        layout, structure = target.density.layout, target.density.structure
        like = torch.zeros(layout.rows, layout.size, dtype=structure.dtype, device=structure.device)
        self.adjust, self.restarts, self.schedule, self.limit = adjust, restarts, schedule, limit
        self._set_step_size(like, guess)
        if guess and target.is_subsampled:
            calm(dynamics, target)
        self._eta = dynamics.step_size.forward(layout, num_steps).detach()
        self._one = like.new_ones(layout.size)
        restart = 0.5 * max(layout.size, 1) ** (-1 / 3) / self._eta.mean().item()
        self.adaptation = Adaptation(like, warmup * num_steps, accept, preconditioner, restart)
        self.made = 0  # transitions

    @property
    def kind(self) -> str:
        name = "adjusted" if self.adjust else "unadjusted"
        start = "from fresh starts" if self.restarts else "in a chain"
        preconditioner = type(self.adaptation.preconditioner).__name__
        return f"{self.num_steps} {name} steps {start}, preconditioner {preconditioner}"

    def step_size(self, k: int) -> Tensor:
        """Step size of the ``k``-th step of a draw, broadcastable to ``(rows, size)``."""
        if self.schedule is not None:
            return self._one * _checked(self.schedule(self.made), self.made)
        return (self.adaptation.log_factor.exp().unsqueeze(-1) * self._eta[k]).clamp(max=self.limit)

    @torch.no_grad()
    def draw(self, state: ChainState, warming: bool) -> tuple[ChainState, Stats]:
        if self.restarts:
            state = self.fresh(len(state.u))
        noise = self.dynamics.draw_noise(self.num_steps, state.u)
        log_uniform = torch.rand(self.num_steps, *state.log_density.shape).to(state.u).log()
        accepted, nonfinite = torch.zeros_like(state.log_density), torch.zeros_like(state.log_density)
        for k in range(self.num_steps):
            eta = self._last_eta = self.step_size(k)
            state, accept, finite = self.transition(state, eta, noise[k], log_uniform[k])
            accepted, nonfinite = accepted + accept, nonfinite + (~finite)
            self.made += 1
            if warming:
                self.adaptation.update(state.u, state.grad, accept)
        return state, draw_stats(state, accepted / self.num_steps, nonfinite, eta)

    def transition(
        self, state: ChainState, eta: Tensor, noise: Tensor, log_uniform: Tensor
    ) -> tuple[ChainState, Tensor, Tensor]:
        """One transition: the next state, the acceptance probability, and whether the proposal was finite."""
        scales = self.adaptation.scales
        here = Position(scales.whiten(state.u), state.log_density, scales.pull(state.grad))
        moved = self.dynamics.step(here.u, here.pull, eta, noise, self._one)
        new = self.evaluate(scales.color(moved))
        finite = new.log_density.isfinite() & new.grad.isfinite().all(-1) & new.u.isfinite().all(-1)
        if self.adjust:
            there = Position(moved, new.log_density, scales.pull(new.grad))
            ratio = hastings_log_ratio(self.dynamics, here, there, eta, self._one)
            move, accept = decide(ratio, finite, log_uniform)
        else:
            move, accept = finite, finite.to(state.u)
        return new.where(move, state), accept, finite

    def fault(self, state: ChainState, stats: Stats, warming: bool) -> str | None:
        if self.adjust:  # a rejected proposal is nothing to warn about
            return None
        pull = self.adaptation.scales.pull(state.grad)
        clipped = self.dynamics.clipped(pull, self._last_eta, self._one).float().mean()
        if not warming and clipped > _MUCH_CLIPPED:
            return (
                "drifts are clipped at max_drift: the step size is too large, the chains bounce, and their law is not "
                "the posterior's. Use a smaller step_size, or adjust=True."
            )
        return super().fault(state, stats, warming)

    def state_dict(self) -> dict[str, Any]:
        return {"made": self.made, "adaptation": self.adaptation.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.made = state["made"]
        self.adaptation.load_state_dict(moved(state["adaptation"], self._one.device))


def _checked(eta: Any, step: int) -> float:
    eta = float(eta)
    if not (eta > 0 and eta < float("inf")):
        raise ValueError(f"the step-size schedule gave {eta} at transition {step}; it must give finite numbers > 0.")
    return eta


@torch.no_grad()
def calm(dynamics: Dynamics, target: Target) -> None:
    r"""Lower a first guess of the step size to where the noise of mini-batches adds little to a chain's variance.

    A step adds :math:`\eta^2 V` to the :math:`2 \eta` of Langevin's own noise, where :math:`V` is the variance of the
    gradient over mini-batches: the posterior's variance comes out :math:`1 + \eta V / 2` times too large. ``V`` is
    that of the noisiest coordinate, in the mean over some starts.
    """
    u = target.start(_STARTS).state
    grads = torch.stack([target.current(len(u)).value_and_grad(u)[1] for _ in range(_BATCHES)])
    noise = grads.var(0).mean(0).max().item()
    first = dynamics.step_size.value.detach().max().item()
    if math.isfinite(noise) and first * noise > 2 * _INFLATION:
        dynamics.step_size.shrink(2 * _INFLATION / (first * noise))
        _LOGGER.warning(
            "step_size %.2g is too large for mini-batch gradients as noisy as this model's, which would widen the "
            "posterior: going on with %.2g, which adds about %d %% to its variance. Pass a StepSize or a schedule to "
            "insist.",
            first,
            2 * _INFLATION / noise,
            round(100 * _INFLATION),
        )
