"""MCMC teaching: a generator and an energy-based model of the data learn from each other."""

from .ancestral import AncestralSampler
from .refiner import Refined, Refiner
from .teaching import MCMCTeaching, TeachingInfo

__all__ = [
    "AncestralSampler",
    "MCMCTeaching",
    "Refined",
    "Refiner",
    "TeachingInfo",
]
