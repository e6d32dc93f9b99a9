"""The interface of a sampler, chains as a batch: what a :class:`~pyro_shortrun.mcmc.chains.Session` drives.

A :class:`Sampler` turns a :class:`ChainState` into the next one, with the statistics of the draw.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..dynamics.dynamics import Dynamics
from ..runs.pilot import back_off, pilot_chains, pilot_fails
from ..starts.finite import redrawn
from ..tensors import keep_rows
from .target import Target

_TRIES = 100
Stats = dict[str, Tensor]


@dataclass(frozen=True)
class ChainState:
    """``u`` with the log density and gradient there: ``(chains, rows, size)``, ``(chains, rows)``, as ``u``; and
    ``white``, the same as ``u`` in the coordinates of the chain's metric, where it has been moved in them."""

    u: Tensor
    log_density: Tensor
    grad: Tensor
    white: Tensor | None = None

    def immovable(self) -> Tensor:
        """Rows without a gradient, ``(chains, rows)``."""
        return ~self.grad.isfinite().all(-1)

    def where(self, rows: Tensor, other: ChainState) -> ChainState:
        """This state in these rows, ``(chains, rows)``, another one in the rest."""
        return ChainState(
            keep_rows(rows, self.u, other.u),
            torch.where(rows, self.log_density, other.log_density),
            keep_rows(rows, self.grad, other.grad),
        )

    def tensors(self) -> dict[str, Tensor]:
        """What it consists of, by name."""
        return {k: v for k, v in vars(self).items() if v is not None}


class Sampler(ABC):
    """Draws states.

    :param chain_batch_size: chains evaluated at once, all if None.
    """

    def __init__(self, target: Target, dynamics: Dynamics, num_steps: int, chain_batch_size: int | None) -> None:
        self.target, self.dynamics, self.num_steps = target, dynamics, num_steps
        self.one_by_one = False  # whether draws are asked for one at a time
        self._at_once = chain_batch_size

    @property
    @abstractmethod
    def kind(self) -> str:
        """What a saved run must share with the one that goes on from it, in words."""

    @abstractmethod
    def draw(self, state: ChainState, warming: bool) -> tuple[ChainState, Stats]:
        """The next draw of every chain and its statistics, each ``(chains,)``."""

    def draws(self, state: ChainState, count: int, warming: bool) -> list[tuple[ChainState, Stats]]:
        """At least one and at most ``count`` of the next draws."""
        return [self.draw(state, warming)]

    def fault(self, state: ChainState, stats: Stats, warming: bool) -> str | None:
        """What is wrong with a draw that the user would not see otherwise."""
        bad = int((stats["nonfinite"] > 0).sum())
        if not bad:
            return None
        return (
            f"{bad} of {len(stats['nonfinite'])} chains met a non-finite density or gradient and stay at their last "
            "finite state (counted in the statistic 'nonfinite'). Use a smaller step_size, or adjust=True."
        )

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What warm-up has learned: tensors, numbers, lists and dicts."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""

    def evaluate(self, u: Tensor) -> ChainState:
        """Log density and gradient at ``u``, in batches of chains."""
        parts = [self.target.current(len(part)).value_and_grad(part) for part in self._split(u)]
        value, grad = (torch.cat(p) if len(parts) > 1 else p[0] for p in zip(*parts, strict=True))
        return ChainState(u, value.detach().to(u), grad.detach())  # data may be of another dtype than the latents

    def _split(self, x: Tensor, axis: int = 0) -> tuple[Tensor, ...]:
        return x.split(self._at_once or max(x.shape[axis], 1), axis)

    def fresh(self, chains: int) -> ChainState:
        """States drawn from the start; where the density has no gradient they are drawn again, as Pyro's kernels do.

        :raises ValueError: where it has none wherever a chain starts: it would never move.
        """

        def draw() -> ChainState:
            return self.evaluate(self.target.start(chains).state)

        state = redrawn(draw(), ChainState.immovable, lambda state, bad: draw().where(bad, state), _TRIES)
        self.target.require_finite(
            ~state.immovable(), state.u, "the gradient of the log density is not finite at the start of a chain"
        )
        return state

    def _set_step_size(self, like: Tensor, guess: bool) -> None:
        """Create the step size, and where it is a first guess, halve it while pilot runs fail."""
        self.dynamics.step_size.setup(self.target.density.layout, self.num_steps, like)
        if guess:
            back_off(self.dynamics, self._pilot_fails, lambda: self.fresh(pilot_chains(self.target.density.layout)))

    def _pilot_fails(self) -> bool:
        layout = self.target.density.layout
        chains = pilot_chains(layout)
        start = self.target.start(chains).state
        eta = self.dynamics.step_size.forward(layout, self.num_steps)
        return pilot_fails(self.target.current(chains), self.dynamics, start, eta)


def draw_stats(state: ChainState, accept: Tensor, nonfinite: Tensor, eta: Tensor, log_scale: float) -> Stats:
    """Means over rows of acceptance, totals of the rest.

    :param log_scale: of the coordinates that the state is in, ``log |du/dv|``.
    """
    return {
        "lp": state.log_density.sum(-1) - log_scale,
        "acceptance_rate": accept.mean(-1),
        "grad_norm": state.grad.flatten(1).norm(dim=-1),
        "step_size": eta.expand_as(state.u).mean((-1, -2)),
        "nonfinite": nonfinite.sum(-1).long(),
    }
