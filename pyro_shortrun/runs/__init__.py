"""The run: K steps of a dynamics, weighed by an objective."""

from .record import RunInfo, ShortRun
from .run import Gradients, run

__all__ = [
    "Gradients",
    "RunInfo",
    "ShortRun",
    "run",
]
