"""Results to ArviZ and to files, and back."""

from .arviz import to_arviz
from .saving import load_state, save_state
from .streaming import stream_posterior

__all__ = [
    "load_state",
    "save_state",
    "stream_posterior",
    "to_arviz",
]
