"""Short runs as Pyro guides, their loss and fit, and the tuning of their steps."""

from ..starts.rule import default_start
from .base import DensityGuide
from .elbo import ShortRunELBO
from .fit import ShortRunSVI
from .short_run import ShortRunGuide
from .tuning import Grid, tune_on_grid
from .verdict import FitResult

__all__ = [
    "DensityGuide",
    "FitResult",
    "Grid",
    "ShortRunELBO",
    "ShortRunGuide",
    "ShortRunSVI",
    "default_start",
    "tune_on_grid",
]
