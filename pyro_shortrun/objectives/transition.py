"""The interface of a transition: what a run carries from arrival to arrival and adds to its log weight.

A run is a sequence of *arrivals*. At each, the log density and gradient are found at the proposed state, a proposal
where they are not finite is undone and its row moves no more, and the next proposal is made. A transition says what an
arrival does, in plain functions of tensors with no branch that depends on their values, so that blocks of arrivals can
be traced, compiled and gone back through (:mod:`pyro_shortrun.runs.blocks`), for all transitions alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor

from ..density.interface import Density
from ..density.layout import Layout
from ..dynamics.dynamics import Dynamics
from .logdet import LogDet

State = tuple[Tensor, ...]


class Column(NamedTuple):
    """What one arrival is given: ``values`` are differentiated in, ``constants`` are not; ``noise`` is that of the step
    which begins here, ``(chains, rows, size)``; ``scale`` are ``(size,)`` factors of a gradient that undo the scaling
    of subsampled plates; ``shared`` is what :meth:`Transition.draw` gave."""

    values: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]
    noise: Tensor
    scale: Tensor
    shared: tuple[Tensor, ...] = ()


class Departure(NamedTuple):
    """What a step adds to the log weight when it arrives, and whether it is not invertible, ``(chains, rows)``."""

    increment: Tensor
    singular: Tensor | None = None


class Transition(ABC):
    """Arithmetic of arrivals.

    A state is ``(u, proposal, *others)``, each ``(chains, rows, ...)``: the last position that was reached, the one to
    be judged at the next arrival, and what else the run carries.

    ``offset`` is how many steps' noise :meth:`begin` takes; ``ends_at_arrival`` tells whether the end of the last
    step is an arrival too, so that there are ``K + 1``, and not ``K``; ``looks_back`` whether :meth:`move` reads
    ``state[0]``; ``pays_ahead`` whether :meth:`departure` depends on the state and the values; ``detaches`` whether
    no gradient goes through the steps, so that there are only those which :meth:`finish` gives.
    """

    offset = 0
    ends_at_arrival = False
    looks_back = False
    pays_ahead = False
    detaches = False

    @property
    @abstractmethod
    def key(self) -> tuple[Any, ...]:
        """Everything that decides the arithmetic."""

    @property
    def learns(self) -> bool:
        """Whether :meth:`learn` is to be called."""
        return False

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Further tensors to be differentiated in, the same for all arrivals."""
        return ()

    def draw(self, like: Tensor, layout: Layout) -> tuple[Tensor, ...]:
        """Auxiliary randomness of one run, shared by its steps."""
        return ()

    def begin(self, density: Density, start: Tensor, step_size: Tensor, noise: Tensor) -> State:
        """The state before the first arrival, ``noise`` being that of the first step."""
        return start, start

    @abstractmethod
    def values(self, step_size: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
        """What every arrival is given and differentiated in, ``(arrivals, width)`` each, the step size first, from
        ``(K, size)`` and ``(K,)``."""

    def constants(self, step_size: Tensor) -> tuple[Tensor, ...]:
        """What every arrival is given besides, ``(arrivals, ...)`` each."""
        return ()

    @abstractmethod
    def evaluate(
        self, density: Density, u: Tensor, tensors: tuple[Tensor, ...], create_graph: bool
    ) -> tuple[Tensor, ...]:
        """``log pi(u)``, its gradient, and what else :meth:`move` needs.

        :param u: requires gradients.
        """

    @abstractmethod
    def move(
        self, density: Density, state: State, found: Sequence[Tensor], column: Column
    ) -> tuple[State, Tensor | None]:
        """The next state, beginning with ``state[1]``, and what this arrival adds to the log weight, ``(chains,
        rows)``, if anything. ``found`` is from :meth:`evaluate`, without the value."""

    def departure(
        self, density: Density, u: Tensor, grad: Tensor, column: Column, create_graph: bool
    ) -> Departure | None:
        """What the step that begins at ``u`` will add when it arrives, if anything.

        Where it ``pays_ahead``, its derivatives are taken on the way there, where its graph is at hand: ``grad``
        then has a graph to ``u``, and ``create_graph`` tells whether the result needs one.
        """
        return None

    def land(self, others: State, value: Tensor, arrived: Tensor) -> State:
        """What else the run carries once the last proposal has been judged: its log density, ``(chains, rows)``, and
        the rows that have it as their end. Not asked where the run ends at an arrival."""
        return others

    def finish(self, first: State, last: State, step_size: Tensor, log_q: Tensor | None) -> Tensor | None:
        """What first and last state add to the log weight, ``(chains, rows)``, if anything.

        :param last: its first element is the end of the run.
        :param log_q: log density of the start, ``(chains, rows)``.
        """
        return None

    def learn(self, states: State, last: State, valid: Tensor) -> None:
        """Told the states before all arrivals, ``(arrivals, chains, rows, ...)`` each, and the last one."""
        return None


@dataclass(frozen=True)
class Plain(Transition):
    """Steps of the dynamics as they are, which add nothing.

    Where the dynamics has inertia, the last of the state is the position before the proposal, which lies beyond the
    next one; the end of a run does not.
    """

    dynamics: Dynamics

    @cached_property
    def key(self) -> tuple[Any, ...]:
        return type(self), self.dynamics, settings(self.dynamics)

    def begin(self, density: Density, start: Tensor, step_size: Tensor, noise: Tensor) -> State:
        return (start, start, start) if self.dynamics.inertia else (start, start)

    def values(self, step_size: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
        return (step_size,)

    def constants(self, step_size: Tensor) -> tuple[Tensor, ...]:
        if not self.dynamics.inertia:
            return ()
        beyond = step_size.new_full((len(step_size), 1), self.dynamics.inertia)
        beyond[-1] = 0
        return (beyond,)

    def evaluate(
        self, density: Density, u: Tensor, tensors: tuple[Tensor, ...], create_graph: bool
    ) -> tuple[Tensor, ...]:
        return density.value_and_grad(u, create_graph)

    def move(
        self, density: Density, state: State, found: Sequence[Tensor], column: Column
    ) -> tuple[State, Tensor | None]:
        u, (eta,) = state[1], column.values
        moved = self.dynamics.step(u, found[0], eta, column.noise, column.scale)
        if not self.dynamics.inertia:
            return (u, moved), None
        return (u, moved + column.constants[-1] * (moved - state[-1]), moved), None


def check_whole(density: Density, objective: str) -> None:
    """Refuse an arrowhead of which only a part is there: what is not a sum over its coordinates cannot be scaled."""
    arrow = density.layout.arrow
    if arrow is not None and arrow.weight != 1:
        raise NotImplementedError(f"{objective} cannot weigh a subsampled model's global latents: use PathDensity().")


def settings(thing: object) -> tuple[Any, ...]:
    """Numbers that an object was made with, and those of its log-determinant."""
    found = [
        (k, settings(v) if isinstance(v, LogDet) else v)
        for k, v in vars(thing).items()
        if k != "training" and isinstance(v, (bool, int, float, LogDet))
    ]
    return type(thing), *found
