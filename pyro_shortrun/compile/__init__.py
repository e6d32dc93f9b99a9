"""Densities and blocks of steps as compiled graphs, so that Pyro is not in the loop."""

from .compiler import Compiler
from .executor import CompiledDensity, density_of
from .inductor import Backend, Inductor, Scripted, Untouched

__all__ = [
    "Backend",
    "CompiledDensity",
    "Compiler",
    "Inductor",
    "Scripted",
    "Untouched",
    "density_of",
]
