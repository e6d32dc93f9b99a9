"""Densities and blocks of steps as compiled graphs, so that Pyro is not in the loop."""

from .executor import CompiledDensity, Compiler
from .inductor import Backend, Inductor, Untouched

__all__ = [
    "Backend",
    "CompiledDensity",
    "Compiler",
    "Inductor",
    "Untouched",
]
