"""A run with everything given: density, dynamics, objective, and the start's own density."""

from __future__ import annotations

from copy import copy
from typing import Any

from torch import Tensor

from pyro_shortrun.density import Density
from pyro_shortrun.dynamics import Dynamics
from pyro_shortrun.objectives import Objective
from pyro_shortrun.runs import ShortRun, run
from pyro_shortrun.starts import Base, StartDraw


def short_run(
    density: Density,
    dynamics: Dynamics,
    objective: Objective,
    u: Tensor,
    eta: Tensor,
    noise: Tensor | None = None,
    *,
    base: Base | None = None,
    log_q: Tensor | None = None,
    temperatures: Tensor | None = None,
    **options: Any,
) -> ShortRun:
    """From ``u``; of draws, where an objective makes one of several runs. ``options`` are those of ``run``.

    :param temperatures: instead of the objective's own.
    """
    if temperatures is not None:
        objective = copy(objective)
        vars(objective)["temperatures"] = lambda num_steps, like: temperatures
    log_q = u.detach().new_zeros(u.shape[:2]) if log_q is None else log_q
    start = StartDraw(u, log_q, density(u.detach()).detach(), base)
    return run(density, dynamics, objective, start, eta, noise, **options).every(objective.copies)
