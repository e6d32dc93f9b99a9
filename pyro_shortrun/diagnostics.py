"""Diagnostics under one name: whether draws, weights and chains can be trusted, pictures, the way to ArviZ's own."""

from .calibration import SBC, Chains, Trained, sbc
from .comparison import Comparison, compare_with_nuts
from .ecdf import plot_ecdf, plot_ranks
from .export import to_arviz
from .importance import PSIS, psis
from .nested import nested_rhat
from .phases import EnergyGap, energy_gap
from .plots import (
    StepSizeHistory,
    plot_aggregate_posterior,
    plot_hierarchy,
    plot_images,
    plot_reconstructions,
    plot_step_sizes,
    plot_trajectories,
)
from .sufficiency import RunLength, run_length
from .sweep import StepSweep, step_sweep

__all__ = [
    "PSIS",
    "SBC",
    "Chains",
    "Comparison",
    "EnergyGap",
    "RunLength",
    "StepSizeHistory",
    "StepSweep",
    "Trained",
    "compare_with_nuts",
    "energy_gap",
    "nested_rhat",
    "plot_aggregate_posterior",
    "plot_ecdf",
    "plot_hierarchy",
    "plot_images",
    "plot_ranks",
    "plot_reconstructions",
    "plot_step_sizes",
    "plot_trajectories",
    "psis",
    "run_length",
    "sbc",
    "step_sweep",
    "to_arviz",
]
