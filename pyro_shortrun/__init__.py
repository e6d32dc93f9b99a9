"""Short-run MCMC inference for Pyro.

A short run draws latents from a start distribution (the prior by default), moves them by a fixed small number of
gradient-based steps on the model's log joint, and accounts for the density of what it drew, so that the step sizes
can be tuned variationally. See :class:`ShortRunGuide`. What is not here is in the package of its subject:
``from pyro_shortrun.diagnostics import sbc``.
"""

from .amortized.guide import LangevinEncoderGuide
from .diagnostics.psis import psis
from .dynamics.dynamics import Dynamics
from .dynamics.hamiltonian import Hamiltonian
from .dynamics.langevin import Langevin
from .dynamics.nesterov import Nesterov
from .dynamics.step_size import StepSize
from .energy.elbo import EnergyELBO
from .energy.predictive import sample_prior
from .energy.statement import energy_prior
from .evaluation.evidence import ais
from .guides.elbo import ShortRunELBO
from .guides.fit import ShortRunSVI
from .guides.short_run import ShortRunGuide
from .io.arviz import to_arviz
from .io.saving import load_state, save_state
from .mcmc.kernel import ShortRunLangevin
from .mcmc.vectorized import VectorizedMCMC
from .objectives.annealed import Annealed
from .objectives.linearized import Linearized
from .objectives.mixture import Mixture
from .objectives.path import PathDensity
from .objectives.refine import Refine
from .objectives.reverse import GaussianReverse
from .semi_implicit.elbo import SemiImplicit_ELBO
from .semi_implicit.guide import SemiImplicitGuide
from .starts.fitted import Gaussian
from .starts.gaussian import Init
from .starts.kept import Persistent
from .starts.prior import Prior
from .teaching.refiner import Refiner
from .teaching.teaching import MCMCTeaching

__version__ = "0.1.0"

__all__ = [
    "Annealed",
    "Dynamics",
    "EnergyELBO",
    "Gaussian",
    "GaussianReverse",
    "Hamiltonian",
    "Init",
    "Langevin",
    "LangevinEncoderGuide",
    "Linearized",
    "MCMCTeaching",
    "Mixture",
    "Nesterov",
    "PathDensity",
    "Persistent",
    "Prior",
    "Refine",
    "Refiner",
    "SemiImplicitGuide",
    "SemiImplicit_ELBO",
    "ShortRunELBO",
    "ShortRunGuide",
    "ShortRunLangevin",
    "ShortRunSVI",
    "StepSize",
    "VectorizedMCMC",
    "ais",
    "energy_prior",
    "load_state",
    "psis",
    "sample_prior",
    "save_state",
    "to_arviz",
]
