"""Simulations of a guide: starts drawn, moved by its dynamics, weighed by its objective."""

from __future__ import annotations

import logging
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ..density.affine import Affine, AffineDensity
from ..density.call import Call
from ..density.layout import Layout
from ..density.structure import check_masks
from ..dynamics.acceptance import Acceptance
from ..dynamics.dynamics import Dynamics
from ..objectives.objective import Objective
from ..runs.course import astray
from ..runs.pilot import pilot_chains, pilot_fails
from ..runs.record import RunInfo, ShortRun
from ..runs.run import Gradients, run
from ..starts.finite import require_finite, require_movable
from ..starts.start import Start, StartDraw
from .metric import Metric

_LOGGER = logging.getLogger("pyro_shortrun")
_NOISE_AT_ONCE = 2**24  # numbers
MUCH = 0.25  # share of rows
_RELIABLE = 0.7  # Pareto shapes up to


@dataclass(frozen=True)
class Simulation:
    """How runs go.

    :param checkpoint: whether tuned runs keep few of their states.
    :param metric: coordinates to move in, if the start has none of its own.
    """

    num_steps: int
    dynamics: Dynamics
    objective: Objective
    start: Start
    checkpoint: bool = False
    metric: Metric | None = None

    @property
    def frame(self) -> Affine | None:
        """Coordinates in which runs move, if they are not the latents' own."""
        return self.start.frame if self.metric is None else self.metric.frame

    def chains_at_once(self, layout: Layout) -> int:
        """How many chains to run together."""
        return max(1, _NOISE_AT_ONCE // max(self.num_steps * layout.rows * layout.size, 1))

    def informed(self, call: Call, step_size: Tensor, training: bool) -> Objective:
        """The objective, with what it wants to know from pilots."""
        if not self.objective.takes_masks:
            check_masks(self.objective, call.reading)
        layout = call.density.layout
        pilots = self.objective.pilots(layout, step_size, training)
        if pilots is None:
            return self.objective
        missing = -(-pilots.count // max(layout.rows, 1))
        with torch.no_grad(), poutine.block():
            while missing > 0:
                chains = min(missing, self.chains_at_once(layout))
                self.run(replace(call, spare=[]), chains, step_size, pilots, True, Gradients.NONE)
                missing -= chains
        return pilots.objective()

    def make(
        self,
        call: Call,
        chains: int,
        account: bool,
        gradients: Gradients,
        training: bool = False,
        keep_states: bool = False,
    ) -> tuple[StartDraw, ShortRun]:
        """``chains`` draws, with the step sizes as they are and what the objective learns from pilots.

        What is not differentiated does not show: SVI's optimiser moves every parameter it sees, by momentum, even if
        its gradient is zero.
        """
        silent = gradients is Gradients.NONE
        with _hidden(silent or not self.objective.tunes_steps):
            step_size = self.dynamics.step_size(call.density.layout, self.num_steps)
        with _hidden(silent):
            objective = self.informed(call, step_size, training and not silent) if account else self.objective
            return self.run(call, chains, step_size, objective, account, gradients, keep_states)

    def run(
        self,
        call: Call,
        chains: int,
        step_size: Tensor,
        objective: Objective,
        account: bool,
        gradients: Gradients,
        keep_states: bool = False,
    ) -> tuple[StartDraw, ShortRun]:
        """``chains`` draws, each of as many runs as the objective wants."""
        copies = objective.copies if account else 1
        drawn = self.draw_start(replace(call, isolated=gradients is Gradients.GUIDE), chains * copies, gradients)
        density, inside = drawn.inside(call.density)
        result = run(
            density,
            self.dynamics,
            objective,
            inside,
            step_size,
            account=account,
            gradients=gradients,
            keep_states=keep_states,
            checkpoint=self.checkpoint,
        )
        if drawn.framed is not None:
            result = result.outside(drawn.framed.frame)
        return (drawn, result) if copies == 1 else (drawn.every(copies), result.every(copies))

    def draw_start(self, call: Call, chains: int, gradients: Gradients) -> StartDraw:
        """Where runs begin; with a graph where the start is trained."""
        attached = gradients is Gradients.FULL or (self.start.is_learned and gradients is Gradients.GUIDE)
        with torch.set_grad_enabled(attached):
            drawn = self.start.draw(call, chains)
            drawn = drawn if self.metric is None else self.metric.framed(drawn)
        if call.density.is_traced:
            return drawn if attached else drawn.detached()
        what = "the model's log density is not finite at the start of the run"
        require_finite(drawn.finite, call.model, drawn.state, what)
        return drawn if attached else drawn.detached()

    @torch.no_grad()
    def follow(self, acceptance: Acceptance, call: Call, drawn: StartDraw, end: Tensor) -> None:
        """Let the step size follow the acceptance, by steps from where a run has ended."""
        density, state = call.density, end.detach()
        if drawn.framed is not None:
            frame = drawn.framed.frame
            density, state = AffineDensity(density, frame), frame.inward(state)
        with poutine.block():
            acceptance.adapt(density, state, self.dynamics, self.num_steps)

    @torch.no_grad()
    def search(self, acceptance: Acceptance, call: Call) -> None:
        """Lower the first step size until steps are accepted, where runs begin and where they end."""
        with poutine.block():
            density, start = self.draw_start(call, pilot_chains(call.density.layout), Gradients.NONE).inside(
                call.density
            )
            acceptance.search(density, start.state, self.dynamics, self.num_steps)
            step_size = self.dynamics.step_size(density.layout, self.num_steps)
            ended = run(density, self.dynamics, self.objective, start, step_size, account=False)
            acceptance.search(density, ended.end, self.dynamics, self.num_steps)

    @torch.no_grad()
    def require_movable(self, call: Call) -> None:
        """Refuse a model whose log density has no gradient where runs begin."""
        begin = self.draw_start(call, 1, Gradients.NONE).state
        require_movable(call, self.start, begin, begin, torch.ones_like(begin[..., 0], dtype=torch.bool))

    @torch.no_grad()
    def pilot_fails(self, call: Call) -> bool:
        """Whether runs meet steps with ``eta * lambda_max(-H) >= 1``, whatever the objective will be."""
        layout = call.density.layout
        with poutine.block():
            density, start = self.draw_start(call, pilot_chains(layout), Gradients.NONE).inside(call.density)
            step_size = self.dynamics.step_size(layout, self.num_steps)
            return pilot_fails(density, self.dynamics, start.state, step_size)


def _hidden(yes: bool) -> AbstractContextManager[Any]:
    """Whether statements inside show to no handler outside."""
    return poutine.block() if yes else nullcontext()


class Watch:
    """Tells once what is wrong with runs."""

    def __init__(self) -> None:
        self._froze = self._folded = self._strayed = self._heavy = False

    def __call__(self, info: RunInfo, weight: float = 1.0) -> None:
        """Told of every run.

        :param weight: how many rows each row stands for.
        """
        reason = None if self._strayed else astray(info, weight)
        if reason is not None:
            self._strayed = True
            _LOGGER.warning("%s (guide.info.log_density; told once.)", reason)
        if not self._folded and info.singular.float().mean() > MUCH:
            self._folded = True
            _LOGGER.warning(
                "%d of %d rows took a step with eta * curvature >= 1: their log q, and the loss, is not reliable "
                "(guide.info.noninvertible; told once). Use a smaller step size.",
                info.noninvertible,
                info.singular.numel(),
            )
        if not self._froze and info.frozen.any():
            self._froze = True
            warnings.warn(
                f"{info.nonfinite} of {info.frozen.numel()} rows met a non-finite density or gradient and stay at "
                "their last finite state (counted in guide.info.nonfinite; this warning is shown once). Try a smaller "
                "step_size, or start=Init(init_to_median).",
                stacklevel=4,
            )

    def weights(self, k_hat: float | None, moving: str) -> None:
        """Told of the Pareto shape of draws' weights, and which sites these move."""
        if not self._heavy and k_hat is not None and k_hat > _RELIABLE:
            self._heavy = True
            _LOGGER.warning(
                "k-hat is %.2f: draws are not yet the posterior's, most of all at %s (a funnel, a heavy tail, or a "
                "mode that no draw begins at; told once). Write hierarchies non-centred (poutine.reparam with "
                "LocScaleReparam), take more steps (adjust=200), or compare with NUTS.",
                k_hat,
                moving,
            )
