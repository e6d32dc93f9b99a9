"""Pareto smoothing of importance weights, and the shape of their tails."""

from __future__ import annotations

import numpy as np


def smoothed(log_weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smoothed log weights ``(..., draws)`` and k, by whichever ArviZ is installed.

    Vehtari, Simpson, Gelman, Yao, Gabry: Pareto smoothed importance sampling, JMLR 2024.
    """
    import arviz as az

    if int(az.__version__.split(".")[0]) < 1:
        return az.psislw(log_weights)
    from arviz_stats.base import array_stats

    return array_stats.psislw(-log_weights)  # it takes log likelihoods, of which weights are the reciprocals
