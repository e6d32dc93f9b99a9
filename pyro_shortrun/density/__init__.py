"""A Pyro program as an unconstrained log density over rows."""

from .call import Call
from .interface import Density
from .layout import LatentSite, Layout, Plate
from .model import LogDensity
from .potential import PotentialDensity
from .program import Program

__all__ = [
    "Call",
    "Density",
    "LatentSite",
    "Layout",
    "LogDensity",
    "Plate",
    "PotentialDensity",
    "Program",
]
