"""What bridges share whose steps are those of the dynamics, with nothing added to the log weight along the way."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from .bridge import Bridge
from .dynamics import Dynamics
from .potential import Density
from .steps import settings


@dataclass(frozen=True)
class PlainBridge(Bridge):
    """Steps of the dynamics as they are."""

    dynamics: Dynamics

    @cached_property
    def key(self) -> tuple[Any, ...]:
        return type(self), self.dynamics, settings(self.dynamics)

    def values(self, step_size: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
        return (step_size,)

    def evaluate(
        self, density: Density, u: Tensor, tensors: tuple[Tensor, ...], create_graph: bool
    ) -> tuple[Tensor, ...]:
        return density.value_and_grad(u, create_graph)


def check_whole(density: Density, objective: str) -> None:
    """Refuse an arrowhead of which only a part is there: what is not a sum over its coordinates cannot be scaled."""
    arrow = density.layout.arrow
    if arrow is not None and arrow.weight != 1:
        raise NotImplementedError(f"{objective} cannot weigh a subsampled model's global latents: use PathDensity().")
