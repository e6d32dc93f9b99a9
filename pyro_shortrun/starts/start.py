"""The interface of a start: where a run begins."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.nn import PyroModule
from torch import Tensor

from ..checks import is_silent
from ..density.affine import Affine, AffineDensity
from ..density.call import Call
from ..density.interface import Density
from ..density.structure import Structure
from ..tensors import keep_rows
from .base import Base


@dataclass(frozen=True)
class Framed:
    """Start states and their density in the coordinates ``frame`` that a run is to move in."""

    frame: Affine
    state: Tensor
    base: Base | None


@dataclass(frozen=True)
class StartDraw:
    """Start states ``(chains, rows, size)``, their log density and ``log pi`` there, ``(chains, rows)``, their density
    everywhere, if it is known, and the same in coordinates of the start's own, if it has some."""

    state: Tensor
    log_q: Tensor
    log_density: Tensor
    base: Base | None = None
    framed: Framed | None = None

    def inside(self, density: Density) -> tuple[Density, StartDraw]:
        """The density and this draw in the coordinates to move in."""
        if self.framed is None:
            return density, self
        frame, scale = self.framed.frame, self.framed.frame.log_scale
        here = StartDraw(self.framed.state, self.log_q + scale, self.log_density + scale, self.framed.base)
        return AffineDensity(density, frame), here

    @property
    def finite(self) -> Tensor:
        """Rows that a run can start from, ``(chains, rows)``."""
        return self.log_density.isfinite() & self.log_q.isfinite()

    def where(self, rows: Tensor, other: StartDraw) -> StartDraw:
        """This draw in these rows, ``(chains, rows)``, another one in the rest."""
        return replace(
            self,
            state=keep_rows(rows, self.state, other.state),
            log_q=torch.where(rows, self.log_q, other.log_q),
            log_density=torch.where(rows, self.log_density, other.log_density),
            framed=None,
        )

    def detached(self) -> StartDraw:
        """The same without gradients."""
        framed = self.framed and replace(self.framed, state=self.framed.state.detach())
        return replace(
            self,
            state=self.state.detach(),
            log_q=self.log_q.detach(),
            log_density=self.log_density.detach(),
            framed=framed,
        )

    def every(self, count: int) -> StartDraw:
        """Only the first of every ``count`` chains."""
        framed = self.framed and replace(self.framed, state=self.framed.state[::count])
        return replace(
            self,
            state=self.state[::count],
            log_q=self.log_q[::count],
            log_density=self.log_density[::count],
            framed=framed,
        )


class Start(ABC):
    """A distribution of ``u_0``.

    ``has_density`` tells whether ``log q_0`` is known, so that there is a bound to tune by, ``is_learned`` whether it
    has parameters of its own to train by that.
    """

    has_density = True
    is_learned = False

    @property
    def frame(self) -> Affine | None:
        """Coordinates of its own in which runs move, if it has some."""
        return None

    def arrange(self, structure: Structure) -> Structure:
        """The structure with the rows that this start takes, which are the model's own unless it says otherwise."""
        return structure

    def setup(self, density: Density) -> None:
        """Create what the start stores."""
        return None

    def look(self, call: Call) -> None:
        """Find out what a call alone can tell, before it is drawn from; leaves random numbers as they are."""
        return None

    @abstractmethod
    def draw(self, call: Call, chains: int) -> StartDraw:
        """Draw ``u_0`` for every row of every chain."""

    def finish(self, call: Call, end: Tensor) -> None:
        """Told the end of every training run."""
        return None


def check_start(start: Any) -> None:
    """Refuse what is neither a Start nor a guide."""
    kind = start is None or isinstance(start, Start) or (callable(start) and not is_silent(start))
    if isinstance(start, type) or not kind:
        raise ValueError(f"start must be Prior(), Gaussian(), Persistent(), Init(...) or a Pyro guide, got {start!r}.")
    if isinstance(start, PyroModule) and start._pyro_context.used:
        raise ValueError(
            "the start was called before it was given to ShortRunGuide, and its parameters are in Pyro's store "
            f"under its own name: pass a function, start=lambda *args: {type(start).__name__.lower()}(*args)."
        )
    if getattr(start, "__module__", "") == "pyro.infer.autoguide.initialization":
        raise ValueError(f"start={start!r} is an initialisation, not a guide: use start=Init({start!r}).")
