"""Short-run MCMC inference for Pyro.

A short run draws latents from a start distribution (the prior by default), moves them by a fixed small number of
gradient-based steps on the model's log joint, and accounts for the density of what it drew, so that the step sizes
can be tuned variationally. See :class:`ShortRunGuide`.
"""

from .dynamics import Dynamics, Langevin
from .guide import ShortRunGuide
from .logdet import Exact, Lanczos
from .objective import Objective, PathDensity
from .start import Init, Persistent, Prior
from .step_size import StepSize

__version__ = "0.1.0.dev0"

__all__ = [
    "Dynamics",
    "Exact",
    "Init",
    "Lanczos",
    "Langevin",
    "Objective",
    "PathDensity",
    "Persistent",
    "Prior",
    "ShortRunGuide",
    "StepSize",
]
