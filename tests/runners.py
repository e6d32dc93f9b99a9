"""A run with everything given: density, dynamics, objective, and the start's own density."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pyro_shortrun.density import Density
from pyro_shortrun.dynamics import Dynamics
from pyro_shortrun.objectives import Objective
from pyro_shortrun.runs import Gradients, ShortRun
from pyro_shortrun.runs import run as run_
from pyro_shortrun.starts import Base, StartDraw


@dataclass(frozen=True)
class Runner:
    density: Density
    dynamics: Dynamics
    objective: Objective
    base: Base | None = None
    beta: Tensor | None = None
    checkpoint: bool = False


def run(
    runner: Runner,
    u: Tensor,
    eta: Tensor,
    noise: Any = None,
    gradients: Gradients = Gradients.NONE,
    log_q: Tensor | None = None,
    **options: Any,
) -> ShortRun:
    log_q = u.detach().new_zeros(u.shape[:2]) if log_q is None else log_q
    start = StartDraw(u, log_q, runner.density(u.detach()).detach(), runner.base)
    options = {**options, "gradients": gradients, "checkpoint": runner.checkpoint, "temperatures": runner.beta}
    return run_(runner.density, runner.dynamics, runner.objective, start, eta, noise, **options)
