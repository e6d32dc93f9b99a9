"""Short runs as Pyro guides, their loss, and the tuning of their steps."""

from .base import DensityGuide
from .elbo import ShortRunELBO
from .short_run import ShortRunGuide
from .tuning import Grid, tune_on_grid

__all__ = [
    "DensityGuide",
    "Grid",
    "ShortRunELBO",
    "ShortRunGuide",
    "tune_on_grid",
]
