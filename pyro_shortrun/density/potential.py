"""A plain ``potential_fn``, as Pyro's kernels take it, as a log density over states."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .interface import Density
from .layout import Layout
from .shapes import LatentSite
from .structure import Structure
from .vectorize import map_chains


class PotentialDensity(Density):
    """Minus a ``potential_fn`` over a dict of unconstrained values, as Pyro's kernels take it; a single row.

    :param potential_fn: from ``{name: value}`` to a scalar.
    :param like: one value of every name, for names, shapes, dtype and device.
    """

    def __init__(self, potential_fn: Callable[..., Any], like: Mapping[str, Tensor]) -> None:
        sites = tuple(LatentSite(k, torch.Size(), v.shape, ()) for k, v in like.items())
        first = next(iter(like.values()))
        self.layout = Layout(sites, ())
        self.structure = Structure(self.layout, frozenset(), False, True, first.dtype, first.device)
        self._potential_fn = potential_fn

    def __call__(self, u: Tensor) -> Tensor:
        return map_chains(self._one, (u,), self.structure.vectorizes)

    def _one(self, u: Tensor) -> Tensor:
        return -self._potential_fn(self.layout.unpack(u)).reshape(1)
