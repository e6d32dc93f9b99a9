"""Langevin chains, adjusted or not, chains as a batch."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..density.interface import Block
from ..dynamics.adaptation import Adaptation
from ..dynamics.dynamics import Dynamics
from ..dynamics.metric import Preconditioner
from ..runs.course import reasonable
from ..runs.transitions import Given, Passed, Place, Transitions
from ..tensors import moved
from .sampler import ChainState, Sampler, Stats, draw_stats
from .target import Target

_LOGGER = logging.getLogger("pyro_shortrun")
_MUCH_CLIPPED = 0.1  # share of coordinates
_INFLATION = 0.1  # of a variance, by the noise of mini-batches
_STARTS, _BATCHES = 4, 16  # by which that noise is estimated
_TOGETHER = 64  # transitions in a block, if these are not too many numbers
_NUMBERS_AT_ONCE = 2**20
StepSizeSchedule = Callable[[int], float]


class LangevinChain(Sampler):
    r"""``num_steps`` transitions per draw, from the last draw or from a fresh start.

    With ``adjust``, a transition ``u -> u'`` of the dynamics with density ``f`` is accepted per row with probability
    ``min(1, pi(u') f(u | u') / (pi(u) f(u' | u)))`` (Metropolis, Hastings).

    :param schedule: step size as a function of the number of transitions made, or None.
    :param restarts: whether every draw begins at a fresh start.
    :param limit: upper bound of the adapted step size.
    :param guess: whether the step size is a first guess that pilot runs may halve.
    :param known_by: what stands for the dynamics, of which every run has its own, in the keys of graphs.
    """

    def __init__(
        self,
        target: Target,
        dynamics: Dynamics,
        num_steps: int,
        chain_batch_size: int | None,
        *,
        known_by: object,
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
        self._block = Transitions(
            dynamics, preconditioner, adjust, accept or 0.0, math.inf if schedule else limit, chain_batch_size, known_by
        )
        self.made = 0  # transitions
        self._first: float | None = None  # log density of a row after the warm-up

    @property
    def kind(self) -> str:
        name = "adjusted" if self.adjust else "unadjusted"
        start = "from fresh starts" if self.restarts else "in a chain"
        preconditioner = type(self.adaptation.preconditioner).__name__
        return f"{self.num_steps} {name} steps {start}, preconditioner {preconditioner}"

    def evaluate(self, u: Tensor) -> ChainState:
        if self.restarts or self.target.is_subsampled:
            return super().evaluate(u)
        plain = self.target.plain()  # a graph of the gradient would be made for a single call
        parts = [plain.value_and_grad(part) for part in self._split(u)]
        value, grad = (torch.cat(p) for p in zip(*parts, strict=True))
        return ChainState(u, value.detach().to(u), grad.detach())

    def step_size(self, k: int) -> Tensor:
        """Step size of the ``k``-th step of a draw, broadcastable to ``(rows, size)``."""
        return (self.adaptation.log_factor.exp().unsqueeze(-1) * self._eta[k]).clamp(max=self._block.limit)

    def draw(self, state: ChainState, warming: bool) -> tuple[ChainState, Stats]:
        return self.draws(state, 1, warming)[0]

    @torch.no_grad()
    def draws(self, state: ChainState, count: int, warming: bool) -> list[tuple[ChainState, Stats]]:
        if self.restarts:
            state, count = self.fresh(len(state.u)), 1
        count = min(count, self._draws_at_once(state))
        given, found, here = self._given(state, count), [], self._place(state)
        first, total = 0, count * self.num_steps
        while first < total:
            ahead = self.adaptation.ahead or total
            until = min(total, first + ahead, first + self._length(state))
            here, passed = self._pass(here, given.part(first, until), first, warming)
            found.append(passed)
            first = until
        passed = Passed(*(torch.cat(parts) for parts in zip(*found, strict=True)))
        ends = [self._drawn(passed, given.eta, i) for i in range(count)]
        # Not a part of what was passed: products of matrices are rounded by where in memory they lie.
        last = ChainState(here.u, here.log_density, here.grad, here.white)
        return [*ends[:-1], (last, ends[-1][1])]

    def _draws_at_once(self, state: ChainState | Place) -> int:
        """In one block."""
        numbers = self.num_steps * max(state.u.numel(), 1)
        return 1 if self.one_by_one else max(1, min(-(-_TOGETHER // self.num_steps), _NUMBERS_AT_ONCE // numbers))

    def _length(self, state: ChainState | Place) -> int:
        """Transitions in a block: those of some draws, or a divisor of those of one."""
        if self.target.is_subsampled:
            return 1
        most = max(1, _NUMBERS_AT_ONCE // max(state.u.numel(), 1))
        if most >= self.num_steps:
            return self._draws_at_once(state) * self.num_steps
        return next(n for n in range(most, 0, -1) if self.num_steps % n == 0)

    @property
    def _density(self) -> Any:
        return _MiniBatches(self.target) if self.target.is_subsampled else self.target.density

    def _pass(self, here: Place, given: Given, first: int, warming: bool) -> tuple[Place, Passed]:
        """Through transitions with nothing to be fitted before the end; the first is the ``first``-th of some draws."""
        adaptation, count, length = self.adaptation, len(given.eta), self._length(here) if self.target.has_loops else 0
        here, following, passed = self._block.follow(self._density, adaptation, here, given, length)
        if warming:
            # Draw by draw, so that sums are rounded alike however many are made in one call.
            ends = [*range(-first % self.num_steps or self.num_steps, count, self.num_steps), count]
            for begin, end in pairwise([0, *ends]):
                adaptation.note(passed.u[begin:end], passed.grad[begin:end])
            if adaptation.advance(following, count):
                here = here._replace(white=adaptation.scales.whiten(here.u))
        return here, passed

    def _given(self, state: ChainState, count: int) -> Given:
        """Random numbers and step sizes of some draws, drawn draw by draw."""
        pairs = []
        for _ in range(count):
            noise = self.dynamics.draw_noise(self.num_steps, state.u)
            pairs.append((noise, torch.rand(self.num_steps, *state.log_density.shape).to(state.u).log()))
        noise, log_uniform = (torch.cat(t) if count > 1 else t[0] for t in zip(*pairs, strict=True))
        total = count * self.num_steps
        if self.schedule is None:
            eta = self._eta.repeat(count, 1)
        else:
            steps = range(self.made, self.made + total)
            eta = self._one * self._one.new_tensor([_checked(self.schedule(t), t) for t in steps]).unsqueeze(-1)
        self.made += total
        return Given(noise, log_uniform, eta, eta.new_zeros(total, 4))

    def _drawn(self, passed: Passed, eta: Tensor, i: int) -> tuple[ChainState, Stats]:
        """The ``i``-th draw and its statistics."""
        part, last = passed.part(i * self.num_steps, (i + 1) * self.num_steps), (i + 1) * self.num_steps - 1
        state = ChainState(part.u[-1], part.log_density[-1], part.grad[-1])
        self._last_eta = (part.log_factor[-1].exp().unsqueeze(-1) * eta[last]).clamp(max=self._block.limit)
        stats = draw_stats(state, part.acceptance.mean(0), (~part.finite).sum(0), self._last_eta, self.target.log_scale)
        return state, stats

    def _place(self, state: ChainState) -> Place:
        white = self.adaptation.scales.whiten(state.u) if state.white is None else state.white
        return Place(state.u, white, state.log_density, state.grad)

    def transition(
        self, state: ChainState, eta: Tensor, noise: Tensor, log_uniform: Tensor
    ) -> tuple[ChainState, Tensor, Tensor]:
        """One transition: the next state, the acceptance probability, and whether the proposal was finite."""
        scales, here = self.adaptation.scales, self._place(state)
        there, accept, finite = self._block.step(self._density, scales, here, eta, noise, log_uniform)
        return ChainState(there.u, there.log_density, there.grad, there.white), accept, finite

    def fault(self, state: ChainState, stats: Stats, warming: bool) -> str | None:
        if not (warming or self.restarts or self.target.is_subsampled):
            self._climb(state)
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

    def _climb(self, state: ChainState) -> None:
        """Tell once of chains whose log density goes on rising after the warm-up."""
        level = state.log_density.mean().item()
        self._first = level if self._first is None else self._first
        rise = level - self._first
        if rise > reasonable(state.u.shape[-1]):
            self._first = math.inf
            _LOGGER.warning(
                "the log density of chains still rises after the warm-up, by %.3g nats a row: take more warm-up steps; "
                "or it has no upper bound (a pyro.factor of the wrong sign?), and then no posterior (told once).",
                rise,
            )

    def state_dict(self) -> dict[str, Any]:
        return {"made": self.made, "adaptation": self.adaptation.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.made = state["made"]
        self.adaptation.load_state_dict(moved(state["adaptation"], self._one.device))


class _MiniBatches:
    """The density of a model that subsamples: every evaluation is of fresh mini-batches."""

    def __init__(self, target: Target) -> None:
        self._target, self.layout = target, target.density.layout

    def value_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """``log pi(u)`` and its gradient."""
        return self._target.current(len(u)).value_and_grad(u)

    def execute(self, fn: Block, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """As for any density, without graphs."""
        return fn(self, *inputs)


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
