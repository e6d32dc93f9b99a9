"""What a ShortRunGuide is made of: its parts checked, those that nobody gave, and how it is described."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..checks import check_kind, check_unused
from ..density.handlers import init_uniform
from ..density.program import Reading
from ..density.structure import check_proper
from ..dynamics.dynamics import Dynamics
from ..dynamics.metric import Preconditioner
from ..objectives.annealed import Annealed
from ..objectives.objective import Objective
from ..objectives.path import PathDensity
from ..starts.fitted import Gaussian
from ..starts.start import check_start


def check_parts(step_size: Any, dynamics: Any, start: Any, objective: Any, metric: Any) -> None:
    """Refuse what is not a part of a run, or does not go together."""
    if dynamics is not None and step_size is not None:
        raise ValueError("pass step_size or dynamics, not both: Langevin(step_size) is the default dynamics.")
    check_kind("dynamics", dynamics, Dynamics, "Langevin(0.1)")
    check_kind("objective", objective, Objective, "PathDensity()")
    check_kind("metric", metric, Preconditioner, "Diagonal()")
    check_start(start)
    check_unused(step_size=step_size, dynamics=dynamics, objective=objective)


def read_from_prior(draw: Callable[..., Reading], required: bool) -> Reading:
    """One run of the model, its latents drawn from the prior.

    :param required: whether a model with a prior that cannot be drawn from is refused, and not read elsewhere.
    """
    try:
        return draw()
    except NotImplementedError:
        reading = draw(init_uniform)
        if not required:
            return reading
        check_proper(reading)
        raise


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
