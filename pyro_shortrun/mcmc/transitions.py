"""Markov chains and repeated short runs, chains as a batch: what :mod:`pyro_shortrun.mcmc.kernel` drives.

A :class:`Sampler` turns a :class:`State` into the next one, with the statistics of the draw.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..dynamics.adaptation import Adaptation
from ..dynamics.dynamics import Dynamics
from ..dynamics.metric import Preconditioner
from ..dynamics.metropolis import Proposed, decide, log_ratio
from ..objectives.objective import Objective
from ..runs.pilot import back_off, pilot_chains, pilot_fails
from ..runs.run import Gradients, run
from ..starts.start import StartDraw
from ..tensors import moved, where_rows
from .target import Target

_LR = 0.05
_TRIES = 100
_MUCH_CLIPPED = 0.1  # share of coordinates
Schedule = Callable[[int], float]
Stats = dict[str, Tensor]


@dataclass(frozen=True)
class State:
    """``u`` with the log density and gradient there: ``(chains, rows, size)``, ``(chains, rows)``, as ``u``."""

    u: Tensor
    log_density: Tensor
    grad: Tensor

    def where(self, rows: Tensor, other: State) -> State:
        """This state in these rows, ``(chains, rows)``, another one in the rest."""
        return State(
            where_rows(rows, self.u, other.u),
            torch.where(rows, self.log_density, other.log_density),
            where_rows(rows, self.grad, other.grad),
        )


class Sampler(ABC):
    """Draws states.

    :param chain_batch_size: chains evaluated at once, all if None.
    """

    def __init__(self, target: Target, dynamics: Dynamics, num_steps: int, chain_batch_size: int | None) -> None:
        self.target, self.dynamics, self.num_steps = target, dynamics, num_steps
        self._at_once = chain_batch_size

    @property
    @abstractmethod
    def kind(self) -> str:
        """What a saved run must share with the one that goes on from it, in words."""

    @abstractmethod
    def draw(self, state: State, warming: bool) -> tuple[State, Stats]:
        """The next draw of every chain and its statistics, each ``(chains,)``."""

    def fault(self, state: State, stats: Stats, warming: bool) -> str | None:
        """What is wrong with a draw that the user would not see otherwise."""
        bad = int((stats["nonfinite"] > 0).sum())
        if not bad:
            return None
        return (
            f"{bad} of {len(stats['nonfinite'])} chains met a non-finite density or gradient and stay at their last "
            "finite state (counted in the statistic 'nonfinite')"
        )

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What warm-up has learned: tensors, numbers, lists and dicts."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""

    def evaluate(self, u: Tensor) -> State:
        """Log density and gradient at ``u``, in batches of chains."""
        parts = [self.target.current(len(part)).value_and_grad(part) for part in self._split(u)]
        value, grad = (torch.cat(p) if len(parts) > 1 else p[0] for p in zip(*parts, strict=True))
        return State(u, value.detach().to(u), grad.detach())  # data may be of another dtype than the latents

    def _split(self, x: Tensor, axis: int = 0) -> tuple[Tensor, ...]:
        return x.split(self._at_once or max(x.shape[axis], 1), axis)

    def fresh(self, chains: int) -> State:
        """States drawn from the start; where the density has no gradient they are drawn again, as Pyro's kernels do."""
        state = self.evaluate(self.target.start(chains).state)
        for _ in range(_TRIES):
            bad = ~state.grad.isfinite().all(-1)
            if not bad.any():
                break
            again = self.evaluate(self.target.start(chains).state)
            state = again.where(bad, state)
        return state


def _pilot_fails(target: Target, dynamics: Dynamics, num_steps: int) -> bool:
    chains = pilot_chains(target.density.layout)
    start = target.start(chains).state
    eta = dynamics.step_size.forward(target.density.layout, num_steps)
    return pilot_fails(target.current(chains), dynamics, start, eta)


class Walk(Sampler):
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
        schedule: Schedule | None,
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
        dynamics.step_size.setup(layout, num_steps, like)
        if guess:
            back_off(dynamics, lambda: _pilot_fails(target, dynamics, num_steps))
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

    def fresh(self, chains: int) -> State:
        """
        :raises ValueError: where the density has no gradient wherever a chain starts: it would never move.
        """
        state = super().fresh(chains)
        if not state.grad.isfinite().all():
            raise ValueError(
                "the gradient of the log density is not finite at the start of a chain: look for sqrt(0), 0 * inf and "
                "the like in the model, or pass another start, such as start=Init(init_to_median)."
            )
        return state

    def step_size(self, k: int) -> Tensor:
        """Step size of the ``k``-th step of a draw, broadcastable to ``(rows, size)``."""
        if self.schedule is not None:
            return self._one * _checked(self.schedule(self.made), self.made)
        return (self.adaptation.log_factor.exp().unsqueeze(-1) * self._eta[k]).clamp(max=self.limit)

    @torch.no_grad()
    def draw(self, state: State, warming: bool) -> tuple[State, Stats]:
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
        return state, _stats(state, accepted / self.num_steps, nonfinite, eta)

    def transition(self, state: State, eta: Tensor, noise: Tensor, log_uniform: Tensor) -> tuple[State, Tensor, Tensor]:
        """One transition: the next state, the acceptance probability, and whether the proposal was finite."""
        scales = self.adaptation.scales
        here = Proposed(scales.whiten(state.u), state.log_density, scales.pull(state.grad))
        moved = self.dynamics.step(here.u, here.pull, eta, noise, self._one)
        new = self.evaluate(scales.color(moved))
        finite = new.log_density.isfinite() & new.grad.isfinite().all(-1) & new.u.isfinite().all(-1)
        if self.adjust:
            there = Proposed(moved, new.log_density, scales.pull(new.grad))
            ratio = log_ratio(self.dynamics, here, there, eta, self._one)
            move, accept = decide(ratio, finite, log_uniform)
        else:
            move, accept = finite, finite.to(state.u)
        return new.where(move, state), accept, finite

    def fault(self, state: State, stats: Stats, warming: bool) -> str | None:
        if self.adjust:  # a rejected proposal is nothing to warn about
            return None
        pull = self.adaptation.scales.pull(state.grad)
        clipped = self.dynamics.clipped(pull, self._last_eta, self._one).float().mean()
        if not warming and clipped > _MUCH_CLIPPED:
            return (
                "drifts are clipped at max_drift: the step size is too large, the chains bounce, and their law is not "
                "the posterior's"
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


def _stats(state: State, accept: Tensor, nonfinite: Tensor, eta: Tensor) -> Stats:
    """Means over rows of acceptance, totals of the rest."""
    return {
        "lp": state.log_density.sum(-1),
        "acceptance_rate": accept.mean(-1),
        "grad_norm": state.grad.flatten(1).norm(dim=-1),
        "step_size": eta.expand_as(state.u).mean((-1, -2)),
        "nonfinite": nonfinite.sum(-1).long(),
    }


class ShortRuns(Sampler):
    """A fresh K-step run per draw; warm-up tunes the step size by the gradient of the run's bound.

    :param guess: whether the step size is a first guess that pilot runs may halve.
    :param tune: whether warm-up tunes at all.
    """

    def __init__(
        self,
        target: Target,
        dynamics: Dynamics,
        num_steps: int,
        chain_batch_size: int | None,
        *,
        objective: Objective,
        warmup: int,
        guess: bool,
        tune: bool,
    ) -> None:
        super().__init__(target, dynamics, num_steps, chain_batch_size)
        structure = target.density.structure
        like = torch.zeros((), dtype=structure.dtype, device=structure.device)
        self._objective, self._warmup = objective, warmup
        dynamics.step_size.setup(target.density.layout, num_steps, like)
        if guess and tune:
            back_off(dynamics, lambda: _pilot_fails(target, dynamics, num_steps))
        raw = list(dynamics.step_size.parameters()) if tune and warmup else []
        self._optimiser = torch.optim.Adam(raw, lr=_LR) if raw else None
        self._tuned = 0

    @property
    def kind(self) -> str:
        return f"short runs of {self.num_steps} steps"

    def draw(self, state: State, warming: bool) -> tuple[State, Stats]:
        tunes = warming and self._optimiser is not None
        drawn = self.target.start(len(state.u))
        noise = self.dynamics.draw_noise(self.num_steps, drawn.state)
        ends, frozen = [], []
        parts = zip(
            *map(self._split, (drawn.state, drawn.log_q, drawn.log_density)), self._split(noise, 1), strict=True
        )
        for *start, part in parts:
            begin, density = StartDraw(*start), self.target.current(len(start[0]))
            eta = self.dynamics.step_size.forward(density.layout, self.num_steps)
            gradients = Gradients.GUIDE if tunes else Gradients.NONE
            result = run(density, self.dynamics, self._objective, begin, eta, part, account=tunes, gradients=gradients)
            if tunes:
                bound = density(result.end) + result.increment - begin.log_q
                self._collect(bound.sum() / drawn.log_q.numel())
            ends.append(result.end.detach())
            frozen.append(result.info.frozen)
        if tunes:
            self._improve()
        return self._record(torch.cat(ends), torch.cat(frozen))

    def _collect(self, bound: Tensor) -> None:
        """Adds the gradient of minus the bound to the step sizes' own; nothing else gets any."""
        raw = list(self.dynamics.step_size.parameters())
        for p, g in zip(raw, torch.autograd.grad(-bound, raw), strict=True):
            p.grad = g if p.grad is None else p.grad + g

    def _improve(self) -> None:
        assert self._optimiser is not None
        self._tuned += 1
        for group in self._optimiser.param_groups:  # to zero at the end, so that the last noise does not stay
            group["lr"] = _LR * max(1 - (self._tuned - 1) / self._warmup, 0.0)
        self._optimiser.step()
        self._optimiser.zero_grad()

    def _record(self, end: Tensor, frozen: Tensor) -> tuple[State, Stats]:
        state = self.evaluate(end)
        eta = self.dynamics.step_size.forward(self.target.density.layout, self.num_steps).detach().mean(0)
        stats = _stats(state, (~frozen).to(end), frozen.to(end), eta)
        return state, stats

    def state_dict(self) -> dict[str, Any]:
        optimiser = None if self._optimiser is None else self._optimiser.state_dict()
        step_size = {k: v.detach().clone() for k, v in self.dynamics.step_size.state_dict().items()}
        drift = getattr(self.dynamics, "max_drift", None)
        return {"step_size": step_size, "max_drift": drift, "optimiser": optimiser, "tuned": self._tuned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.dynamics.step_size.load_state_dict(state["step_size"])
        if state["max_drift"] is not None:
            self.dynamics.max_drift = state["max_drift"]
        if self._optimiser is not None and state["optimiser"] is not None:
            self._optimiser.load_state_dict(state["optimiser"])
        self._tuned = state["tuned"]
