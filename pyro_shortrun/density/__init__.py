"""A Pyro program as an unconstrained log density over rows."""

from .affine import Affine
from .call import Binder, Call
from .interface import Block, Density
from .layout import Arrow, Layout
from .model import LogDensity
from .potential import PotentialDensity
from .program import Program
from .recurrence import Recurrence
from .shapes import LatentSite, Plate

__all__ = [
    "Affine",
    "Arrow",
    "Binder",
    "Block",
    "Call",
    "Density",
    "LatentSite",
    "Layout",
    "LogDensity",
    "Plate",
    "PotentialDensity",
    "Program",
    "Recurrence",
]
