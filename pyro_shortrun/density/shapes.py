"""Shapes of latent sites, and of the plates around them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class Plate:
    """A vectorised plate around a site: ``dim`` counts from the right of the batch shape."""

    name: str
    dim: int
    size: int
    full_size: int

    @property
    def scale(self) -> float:
        """``full_size / size``, by which a subsampled plate multiplies log-probabilities."""
        return self.full_size / self.size if self.size else 1.0


@dataclass(frozen=True)
class LatentSite:
    """Name and shape of one latent site in unconstrained space."""

    name: str
    batch_shape: torch.Size
    event_shape: torch.Size
    plates: tuple[Plate, ...]

    @cached_property
    def scale(self) -> float:
        """Product of ``full_size / size`` over the site's own plates."""
        return math.prod(plate.scale for plate in self.plates)

    @cached_property
    def shape(self) -> torch.Size:
        """Shape of the unconstrained value, batch dimensions first."""
        return self.batch_shape + self.event_shape

    def is_in(self, plates: tuple[Plate, ...]) -> bool:
        """Whether all of them are around the site."""
        return {p.name for p in plates} <= {p.name for p in self.plates}
