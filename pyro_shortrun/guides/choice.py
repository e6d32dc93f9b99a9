"""What a ShortRunGuide is made of: its parts checked, those that nobody gave, and how it is described."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..checks import check_kind, check_unused
from ..dynamics.acceptance import Acceptance
from ..dynamics.dynamics import Dynamics
from ..dynamics.metric import Preconditioner
from ..dynamics.step_size import StepSize
from ..objectives.annealed import Annealed
from ..objectives.objective import Objective
from ..objectives.path import PathDensity
from ..objectives.refine import Refine
from ..starts.fitted import Gaussian
from ..starts.start import Start, check_start


def by_acceptance(objective: Objective, start: object, step_size: StepSize, is_chosen: bool) -> Acceptance | None:
    """What tunes the step size where there is no bound to do so, if anything does: with ``Refine``, unless it is not
    learnable; from a start without a density, where nobody has given it."""
    if isinstance(objective, Refine):
        return Acceptance(objective.accept) if objective.accept is not None and step_size.learnable else None
    return Acceptance() if is_chosen and isinstance(start, Start) and not start.has_density else None


def check_parts(step_size: Any, dynamics: Any, start: Any, objective: Any, full_gradient: bool, metric: Any) -> None:
    """Refuse what is not a part of a run, or does not go together."""
    if dynamics is not None and step_size is not None:
        raise ValueError("pass step_size or dynamics, not both: Langevin(step_size) is the default dynamics.")
    check_kind("dynamics", dynamics, Dynamics, "Langevin(0.1)")
    check_kind("objective", objective, Objective, "PathDensity()")
    if full_gradient and isinstance(objective, Refine):
        raise ValueError("Refine() has no bound of the run whose full gradient there could be: full_gradient=False.")
    check_kind("metric", metric, Preconditioner, "Diagonal()")
    check_start(start)
    check_unused(step_size=step_size, dynamics=dynamics, objective=objective)


def default_objective(start: object, dynamics: Dynamics) -> Objective:
    """``Annealed(learnable=False)`` from a ``Gaussian()``, by dynamics with noise; ``PathDensity()`` otherwise."""
    noisy = dynamics.has_transition_density or dynamics.has_momentum
    return Annealed(learnable=False) if isinstance(start, Gaussian) and noisy else PathDensity()


def described(guide: Any, step_sizes: Any) -> str:
    """A ShortRunGuide in one line."""
    start = "by rule at the first call" if guide.start is None else guide.start
    named = start if isinstance(start, str) else repr(start) if isinstance(start, Gaussian) else type(start).__name__
    objective = "by rule" if guide.start is None and guide._chooses[1] else type(guide.objective).__name__
    line = (
        f"num_steps={guide.num_steps}, dynamics={type(guide.dynamics).__name__}, start={named}, objective={objective}"
    )
    if isinstance(step_sizes, Tensor):
        line += f", step_size={_numbers(step_sizes)}"
    elif step_sizes is not None:
        line += f", step_size={{{', '.join(f'{k!r}: {_numbers(v)}' for k, v in step_sizes.items())}}}"
    return f"{type(guide).__name__}({line})"


def _numbers(values: Tensor) -> str:
    low, high = values.min().item(), values.max().item()
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
