"""How a state moves: steps, their sizes, the coordinates they are taken in."""

from .dynamics import Dynamics
from .hamiltonian import Hamiltonian
from .langevin import Langevin
from .metric import Dense, Diagonal, Identity, Preconditioner
from .step_size import StepSize

__all__ = [
    "Dense",
    "Diagonal",
    "Dynamics",
    "Hamiltonian",
    "Identity",
    "Langevin",
    "Preconditioner",
    "StepSize",
]
