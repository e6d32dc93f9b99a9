"""Simulations of a guide: starts drawn, moved by its dynamics, weighed by its objective."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, replace

import torch
from pyro import poutine
from torch import Tensor

from ..density.call import Call
from ..density.layout import Layout
from ..density.structure import check_masks
from ..dynamics.dynamics import Dynamics
from ..objectives.objective import Objective
from ..runs.pilot import pilot_chains, pilot_fails
from ..runs.record import RunInfo, ShortRun
from ..runs.run import Gradients, run
from ..starts.finite import require_finite, require_movable
from ..starts.start import Start, StartDraw

_LOGGER = logging.getLogger("pyro_shortrun")
_NOISE_AT_ONCE = 2**24  # numbers
MUCH = 0.25  # share of rows
_RELIABLE = 0.7  # Pareto shapes up to


@dataclass(frozen=True)
class Simulation:
    """How runs go.

    :param checkpoint: whether tuned runs keep few of their states.
    """

    num_steps: int
    dynamics: Dynamics
    objective: Objective
    start: Start
    checkpoint: bool = False

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
        if call.density.is_traced:
            return drawn if attached else drawn.detached()
        what = "the model's log density is not finite at the start of the run"
        require_finite(drawn.finite, call.model, drawn.state, what)
        return drawn if attached else drawn.detached()

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


class Watch:
    """Tells once what is wrong with runs."""

    def __init__(self) -> None:
        self._froze = self._folded = self._heavy = False

    def __call__(self, info: RunInfo) -> None:
        """Told of every run."""
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
