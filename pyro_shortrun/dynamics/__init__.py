"""How a state moves: steps, their sizes, the coordinates they are taken in."""

from .dynamics import Dynamics, Jacobian
from .hamiltonian import Hamiltonian
from .langevin import Langevin
from .metric import Dense, Diagonal, Identity, Preconditioner
from .momentum import MomentumDynamics
from .step_size import StepSize

__all__ = [
    "Dense",
    "Diagonal",
    "Dynamics",
    "Hamiltonian",
    "Identity",
    "Jacobian",
    "Langevin",
    "MomentumDynamics",
    "Preconditioner",
    "StepSize",
]
