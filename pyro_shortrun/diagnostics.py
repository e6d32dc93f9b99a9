"""Diagnostics, under one name: whether draws, weights and chains can be trusted, and the way to ArviZ's own."""

from .calibration import SBC, Chains, Trained, sbc
from .ecdf import plot_ecdf
from .export import to_arviz
from .importance import PSIS, psis
from .nested import nested_rhat

__all__ = ["PSIS", "SBC", "Chains", "Trained", "nested_rhat", "plot_ecdf", "psis", "sbc", "to_arviz"]
