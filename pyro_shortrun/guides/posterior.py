"""Posterior draws of a ShortRunGuide: runs repeated, refined, or watched along their steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from ..checks import check_count
from ..density.call import Call
from ..runs.run import Gradients
from ..starts.kept import Persistent
from ..starts.prior import Prior
from .draws import WeightedDraws, weigh
from .refinement import Plan, refine
from .simulation import Simulation


def posterior_draws(
    guide: Any, call: Call, count: int, num_steps: int | None, adjust: int | None, resample: bool | None
) -> dict[str, Tensor]:
    """Site values at the ends of ``count`` runs, ``(count, *shape)``, and what the model computes from them; see
    ``ShortRunGuide.sample_posterior``."""
    if resample is None and num_steps is not None:
        resample = False
    plan = Plan.of(guide._start, guide.objective, count, adjust, resample)
    resamples = plan.resample is not False
    weighs = resamples and guide.has_density and guide.objective.weighs
    drawn = repeated(guide, call, count, weighs, _of_length(guide, num_steps, resamples))
    if not plan.is_empty:
        step_size = guide.dynamics.step_size(call.density.layout, guide.num_steps).mean(0)
        drawn, acceptance, k_hat, moving = refine(call, drawn, plan, guide._simulation.frame, step_size)
        guide._watch.weights(k_hat, moving)
        guide.info = guide.info and replace(guide.info, acceptance=acceptance, k_hat=k_hat)
    return drawn.values_and_computed(call)


def _of_length(guide: Any, num_steps: int | None, resample: bool) -> Simulation:
    """How the guide's runs go, with another number of steps if one is asked for; persistent runs then begin anew."""
    simulation: Simulation = guide._simulation
    if num_steps is None:
        return simulation
    check_count("num_steps", num_steps)
    if resample or guide.objective.tempers or guide.dynamics.step_size.per == "step":
        raise ValueError(
            "num_steps is for runs without weights, temperatures or a step size per step: draw with those of the guide."
        )
    start = Prior() if isinstance(simulation.start, Persistent) else simulation.start
    return replace(simulation, num_steps=num_steps, start=start)


def repeated(guide: Any, call: Call, count: int, account: bool, simulation: Simulation | None = None) -> WeightedDraws:
    """Independent runs, as many at once as memory should take."""
    simulation = simulation or guide._simulation
    parts, at_once = [], simulation.chains_at_once(call.density.layout)
    while count:
        drawn, result = simulation.make(call, min(count, at_once), account, Gradients.NONE)
        guide.info = result.info
        guide._heed(call, result)
        parts.append(weigh(call, drawn, result, account))
        count -= min(count, at_once)
    return WeightedDraws.join(parts)


def trajectories(guide: Any, call: Call, chains: int) -> dict[str, Tensor]:
    """Site values at the states of runs, ``(num_steps + 1, chains, *shape)``."""
    _, result = guide._run(call, chains, False, Gradients.NONE, keep_states=True)
    guide._heed(call, result)
    assert result.states is not None
    values, _ = call.model.constrain(result.states.flatten(0, 1))
    return {k: v.detach().unflatten(0, result.states.shape[:2]) for k, v in values.items()}
