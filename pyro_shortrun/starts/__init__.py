"""Where runs start, and the density of that."""

from .base import Base, GaussianBase, PriorBase
from .fitted import Gaussian
from .fitting import Fit
from .from_guide import FromGuide
from .gaussian import Init
from .kept import Persistent, Replay
from .normal import Normal
from .prior import Prior
from .start import Start, StartDraw

__all__ = [
    "Base",
    "Fit",
    "FromGuide",
    "Gaussian",
    "GaussianBase",
    "Init",
    "Normal",
    "Persistent",
    "Prior",
    "PriorBase",
    "Replay",
    "Start",
    "StartDraw",
]
