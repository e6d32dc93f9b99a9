"""Short runs as draws: each a run from a fresh start, chains as a batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..dynamics.dynamics import Dynamics
from ..objectives.objective import Objective
from ..runs.course import astray
from ..runs.run import Gradients, run
from .sampler import ChainState, Sampler, Stats, draw_stats
from .target import Target

_LR = 0.05


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
        self._objective = objective
        self._reason: str | None = None  # what is wrong with the last runs
        objective.setup(num_steps, target.density.layout, like)
        self._set_step_size(like, guess and tune)
        raw = list(dynamics.step_size.parameters()) if tune and warmup else []
        self._ascent = BoundAscent(raw, warmup) if raw else None

    @property
    def kind(self) -> str:
        return f"short runs of {self.num_steps} steps"

    def draw(self, state: ChainState, warming: bool) -> tuple[ChainState, Stats]:
        ascent = self._ascent if warming else None
        tunes = ascent is not None
        drawn = self.target.start(len(state.u))
        noise = self.dynamics.draw_noise(self.num_steps, drawn.state)
        ends, frozen, self._reason = [], [], None
        parts = zip(
            *map(self._split, (drawn.state, drawn.log_q, drawn.log_density)), self._split(noise, 1), strict=True
        )
        for *start, part in parts:
            begin, density = (
                replace(drawn, state=start[0], log_q=start[1], log_density=start[2]),
                self.target.current(len(start[0])),
            )
            eta = self.dynamics.step_size.forward(density.layout, self.num_steps)
            gradients = Gradients.GUIDE if tunes else Gradients.NONE
            result = run(density, self.dynamics, self._objective, begin, eta, part, account=tunes, gradients=gradients)
            if ascent is not None:
                bound = density(result.end) + result.increment - begin.log_q
                ascent.collect(bound.sum() / drawn.log_q.numel())
            ends.append(result.end.detach())
            frozen.append(result.info.frozen)
            self._reason = self._reason or astray(result.info)
        if ascent is not None:
            ascent.step()
        return self._record(torch.cat(ends), torch.cat(frozen))

    def fault(self, state: ChainState, stats: Stats, warming: bool) -> str | None:
        return super().fault(state, stats, warming) or (None if warming else self._reason)

    def _record(self, end: Tensor, frozen: Tensor) -> tuple[ChainState, Stats]:
        state = self.evaluate(end)
        eta = self.dynamics.step_size.forward(self.target.density.layout, self.num_steps).detach().mean(0)
        stats = draw_stats(state, (~frozen).to(end), frozen.to(end), eta, self.target.log_scale)
        return state, stats

    def state_dict(self) -> dict[str, Any]:
        learned = {"optimiser": None, "tuned": 0} if self._ascent is None else self._ascent.state_dict()
        step_size = {k: v.detach().clone() for k, v in self.dynamics.step_size.state_dict().items()}
        return {"step_size": step_size, "max_drift": getattr(self.dynamics, "max_drift", None), **learned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.dynamics.step_size.load_state_dict(state["step_size"])
        if state["max_drift"] is not None:
            self.dynamics.max_drift = state["max_drift"]
        if self._ascent is not None and state["optimiser"] is not None:
            self._ascent.load_state_dict(state)


class BoundAscent:
    """Adam on a run's bound, at a rate that falls to zero over the warm-up, so that the last noise does not stay.

    :param raw: the step sizes' parameters.
    :param total: steps.
    """

    def __init__(self, raw: list[Parameter], total: int) -> None:
        self._raw, self._total, self._done = raw, total, 0
        self._optimiser = torch.optim.Adam(raw, lr=_LR)

    def collect(self, bound: Tensor) -> None:
        """Add the gradient of minus the bound to the step sizes' own; nothing else gets any."""
        for p, g in zip(self._raw, torch.autograd.grad(-bound, self._raw), strict=True):
            p.grad = g if p.grad is None else p.grad + g

    def step(self) -> None:
        """Move the step sizes by what was collected."""
        for group in self._optimiser.param_groups:
            group["lr"] = _LR * max(1 - self._done / self._total, 0.0)
        self._done += 1
        self._optimiser.step()
        self._optimiser.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, lists and dicts."""
        return {"optimiser": self._optimiser.state_dict(), "tuned": self._done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._optimiser.load_state_dict(state["optimiser"])
        self._done = state["tuned"]
