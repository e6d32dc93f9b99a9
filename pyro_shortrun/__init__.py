"""Short-run MCMC inference for Pyro.

A short run draws latents from a start distribution (the prior by default), moves them by a fixed small number of
gradient-based steps on the model's log joint, and accounts for the density of what it drew, so that the step sizes
can be tuned variationally. See :class:`ShortRunGuide`.
"""

from .adaptation import Dense, Diagonal, Identity
from .ais import ais
from .amortized import LangevinEncoderGuide
from .amortized_sampler import AmortizedSampler
from .ancestral import AncestralSampler
from .annealed import Annealed, GaussianReverse
from .anomaly import anomaly_score
from .calibration import sbc
from .dynamics import Dynamics, Hamiltonian, Langevin
from .elbo import ShortRunELBO
from .energy import EnergyELBO
from .export import to_arviz
from .grid import Grid, tune_on_grid
from .guide import ShortRunGuide
from .importance import psis
from .kernel import ShortRunLangevin
from .linear_chain import Span, Whitened
from .linearized import Linearized
from .logdet import Exact, Lanczos
from .mixing import SemiImplicit
from .mixture import Mixture
from .nested import nested_rhat
from .objective import Objective, PathDensity
from .predictive import EnergyPredictive, sample_prior
from .refiner import Refiner
from .replay import Replay
from .saving import load_state, save_state
from .semi_implicit import SemiImplicit_ELBO, SemiImplicitGuide
from .start import Init, Persistent, Prior
from .step_size import StepSize
from .streaming import stream_posterior
from .teaching import MCMCTeaching
from .tilted import energy_prior
from .vectorized import VectorizedMCMC

__version__ = "0.1.0"

__all__ = [
    "Grid",
    "tune_on_grid",
    "MCMCTeaching",
    "Mixture",
    "Linearized",
    "Hamiltonian",
    "GaussianReverse",
    "AmortizedSampler",
    "AncestralSampler",
    "Annealed",
    "Dense",
    "Diagonal",
    "Dynamics",
    "EnergyELBO",
    "EnergyPredictive",
    "Exact",
    "Identity",
    "Init",
    "Lanczos",
    "Langevin",
    "LangevinEncoderGuide",
    "Objective",
    "PathDensity",
    "Persistent",
    "Prior",
    "Refiner",
    "Replay",
    "SemiImplicit",
    "SemiImplicitGuide",
    "SemiImplicit_ELBO",
    "ShortRunELBO",
    "ShortRunGuide",
    "ShortRunLangevin",
    "Span",
    "StepSize",
    "VectorizedMCMC",
    "Whitened",
    "ais",
    "anomaly_score",
    "energy_prior",
    "load_state",
    "nested_rhat",
    "psis",
    "sample_prior",
    "save_state",
    "sbc",
    "stream_posterior",
    "to_arviz",
]
