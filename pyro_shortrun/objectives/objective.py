"""The interface of an objective: how a run accounts for log q."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..density.layout import Layout
from ..dynamics.dynamics import Dynamics
from ..starts.base import Base
from .transition import Transition


class Objective:
    r"""Accounts for the log weight of a run,

    .. math:: \log w = \log\pi(u_K) - \log q_0(u_0) + \sum_k \text{increment}_k ,

    so that ``log q(u_K) = log q_0(u_0) - sum of increments`` is what the guide reports to Pyro; in nats, ``(chains,
    rows)``. A new one says how a run goes and is weighed, in :meth:`transition`; everything else has a default.
    """

    tempers = False  # whether targets move from the start's density to the model's
    copies = 1  # runs that make one draw
    weighs = True  # whether E[exp(log w)] = p(x), so that log q makes importance weights
    takes_masks = True  # whether latents that poutine.mask takes out of the density may be there
    carries = True  # whether increments cost so much that calls between tunings take those of the last tuned one
    tunes_steps = True  # whether step sizes are tuned by the weight of the run

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if gone := [name for name in ("account", "bridge", "draw") if name in vars(cls)]:
            name = cls.__name__
            raise TypeError(f"{name}.{gone[0]} is not called: define {name}.transition(dynamics, base, account).")

    def transition(self, dynamics: Dynamics, base: Base | None, account: bool) -> Transition:
        """How the run goes and is weighed.

        :param base: density of the start, where it is known everywhere.
        :param account: whether the log weight is asked for.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how a run is weighed.")

    def setup(self, num_steps: int, layout: Layout, like: Tensor) -> None:
        """Create parameters (once), in the dtype and on the device of ``like``."""
        return None

    def resized(self, num_steps: int) -> Objective:
        """The objective, set up, of runs of another length."""
        return self

    def check(self, dynamics: Dynamics) -> None:
        """Refuse a dynamics that does not go with this objective."""
        if dynamics.has_momentum:
            raise ValueError(f"{type(dynamics).__name__} is for objective=Annealed(), not {type(self).__name__}.")
        check_inertia(self, dynamics)

    def pilots(self, layout: Layout, step_size: Tensor, training: bool) -> Pilots | None:
        """What is to be found out by other runs before each run that is weighed, if anything."""
        return None

    def temperatures(self, num_steps: int, like: Tensor) -> Tensor:
        """``beta_k`` of each step, ``(num_steps,)``."""
        return like.new_ones(num_steps)


class Pilots(Objective):
    """Runs that are made for what they tell: ``count`` rows (times chains), then :meth:`objective`."""

    count: int

    def objective(self) -> Objective:
        """How to weigh a run, from what was learned."""
        raise NotImplementedError


def check_inertia(objective: Objective, dynamics: Dynamics) -> None:
    """Refuse steps that depend on the one before, where log q is made of steps of positions alone."""
    if dynamics.inertia:
        kind, name = type(dynamics).__name__, type(objective).__name__
        raise ValueError(f"there is no log q of {kind} steps, which {name} needs: use objective=Refine().")


def check_jacobian(objective: Objective, dynamics: Dynamics) -> None:
    """Refuse a dynamics that does not say the Jacobian of its step, where log q is made of that."""
    if not dynamics.has_jacobian:
        kind, name = type(dynamics).__name__, type(objective).__name__
        raise ValueError(
            f"{name} needs the Jacobian of a step, which {kind} does not say: define {kind}.jacobian(grad, step_size, "
            "scale), or use objective=Annealed()."
        )
