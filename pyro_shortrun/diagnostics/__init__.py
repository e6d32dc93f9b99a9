"""Whether draws, weights and chains can be trusted, and pictures of them."""

from .draw_plots import plot_aggregate_posterior, plot_hierarchy, plot_images, plot_reconstructions
from .energy_gap import EnergyGap, energy_gap
from .nested_rhat import nested_rhat
from .posteriors import Chains, Trained
from .psis import PSIS, psis
from .reference import Comparison, compare_with_nuts
from .run_length import RunLength, run_length
from .run_plots import StepSizeHistory, plot_step_sizes, plot_trajectories
from .sbc import SBC, sbc
from .step_sweep import StepSweep, step_sweep
from .uniformity import UniformBand, plot_ecdf, plot_ranks, symmetry_pvalue

__all__ = [
    "Chains",
    "Comparison",
    "EnergyGap",
    "PSIS",
    "RunLength",
    "SBC",
    "StepSizeHistory",
    "StepSweep",
    "Trained",
    "UniformBand",
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
    "symmetry_pvalue",
]
