"""The run: K steps of a dynamics, weighed by an objective."""

from .run import Gradients, RunInfo, ShortRun, run

__all__ = [
    "Gradients",
    "RunInfo",
    "ShortRun",
    "run",
]
