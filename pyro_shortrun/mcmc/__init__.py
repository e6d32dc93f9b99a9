"""Chains, and short runs, as kernels of Pyro's MCMC."""

from .chains import DrawStats
from .kernel import ShortRunLangevin
from .vectorized import VectorizedMCMC

__all__ = [
    "DrawStats",
    "ShortRunLangevin",
    "VectorizedMCMC",
]
