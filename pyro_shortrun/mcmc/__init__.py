"""Chains, and short runs, as kernels of Pyro's MCMC."""

from .kernel import ShortRunLangevin
from .vectorized import VectorizedMCMC

__all__ = [
    "ShortRunLangevin",
    "VectorizedMCMC",
]
