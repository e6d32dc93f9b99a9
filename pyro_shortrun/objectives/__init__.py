"""How a run accounts for log q."""

from .annealed import Annealed
from .linearized import Linearized
from .logdet import Automatic, Exact, Lanczos, LogDet
from .mixture import Mixture
from .objective import Objective
from .path import PathDensity
from .refine import Refine
from .reverse import GaussianReverse
from .transition import Column, Departure, Transition

__all__ = [
    "Annealed",
    "Automatic",
    "Column",
    "Departure",
    "Exact",
    "GaussianReverse",
    "Lanczos",
    "Linearized",
    "LogDet",
    "Mixture",
    "Objective",
    "PathDensity",
    "Refine",
    "Transition",
]
