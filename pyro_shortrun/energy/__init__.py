"""Priors tilted by energies: the statement, runs in the prior, the loss, draws."""

from .elbo import EnergyELBO, EnergyInfo
from .predictive import EnergyPredictive, sample_prior
from .prior import TiltedPrior
from .runs import PriorRuns
from .statement import energy_prior

__all__ = [
    "EnergyELBO",
    "EnergyInfo",
    "EnergyPredictive",
    "PriorRuns",
    "TiltedPrior",
    "energy_prior",
    "sample_prior",
]
