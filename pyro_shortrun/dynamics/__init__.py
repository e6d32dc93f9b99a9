"""How a state moves: steps, their sizes, the coordinates they are taken in."""

from .acceptance import Acceptance
from .dynamics import Dynamics, Jacobian
from .hamiltonian import Hamiltonian
from .langevin import Langevin
from .metric import Dense, Diagonal, Identity, Preconditioner
from .momentum import Arrived, Leap, MomentumDynamics
from .nesterov import Nesterov
from .step_size import StepSize

__all__ = [
    "Acceptance",
    "Arrived",
    "Dense",
    "Diagonal",
    "Dynamics",
    "Hamiltonian",
    "Identity",
    "Jacobian",
    "Langevin",
    "Leap",
    "MomentumDynamics",
    "Nesterov",
    "Preconditioner",
    "StepSize",
]
