"""Guides that are mixtures without end."""

from .elbo import SemiImplicit_ELBO
from .guide import SemiImplicitGuide
from .site import MixingNetwork, SemiImplicit

__all__ = [
    "MixingNetwork",
    "SemiImplicit",
    "SemiImplicitGuide",
    "SemiImplicit_ELBO",
]
