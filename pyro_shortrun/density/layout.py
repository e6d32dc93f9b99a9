"""How the latent sites of a model lie in one flat tensor of independent rows.

The dynamics moves a tensor ``u`` of shape ``(chains, rows, size)``. A *row* is a part of the posterior that is
independent of all other rows given the model's parameters, so that the Jacobian of a step is block diagonal:

* every latent lies in the plate ``data``: one row per element of the plate;
* no latent lies in a plate, or something couples the plate's elements: a single row;
* local latents in a plate and shared latents outside it: a single row whose coordinates are ordered
  ``shared, local[0], local[1], ...`` and whose Hessian is an arrowhead (:class:`Arrow`).

Only tensors and shapes occur here; models and traces are read in :mod:`pyro_shortrun.density.structure`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .shapes import LatentSite, Plate


@dataclass(frozen=True)
class Arrow:
    """Sizes of an arrowhead row: ``shared`` coordinates, then ``count`` blocks of ``local`` coordinates."""

    shared: int
    count: int
    local: int
    weight: float  # full_size / size of the local plate: the local parts of log q count this often


@dataclass(frozen=True)
class _Packing:
    """How one site's values lie in rows: axes of the row plates first, in ``order``, the others after them."""

    order: tuple[int, ...]
    sizes: tuple[int, ...]
    rows: int
    numel: int  # in a row

    @classmethod
    def of(cls, site: LatentSite, rows: tuple[Plate, ...]) -> _Packing:
        axes = [len(site.batch_shape) + plate.dim for plate in rows]
        order = (*axes, *(i for i in range(len(site.shape)) if i not in axes))
        sizes = tuple(site.shape[i] for i in order)
        return cls(order, sizes, math.prod(plate.size for plate in rows), math.prod(sizes[len(axes) :]))

    @cached_property
    def _inverse(self) -> tuple[int, ...]:
        return tuple(self.order.index(i) for i in range(len(self.order)))

    def to_rows(self, value: Tensor) -> Tensor:
        """``(*lead, *batch, *event)`` to ``(*lead, rows, numel)``."""
        lead = value.dim() - len(self.order)
        value = value.permute([*range(lead), *[lead + i for i in self.order]])
        return value.reshape((*value.shape[:lead], self.rows, self.numel))

    def from_rows(self, value: Tensor) -> Tensor:
        """The reverse of :meth:`to_rows`."""
        lead = value.dim() - 2
        value = value.reshape((*value.shape[:lead], *self.sizes))
        return value.permute([*range(lead), *[lead + i for i in self._inverse]])


@dataclass(frozen=True)
class Layout:
    """Packs unconstrained site values into ``(rows, size)`` and back. (Most of its methods are sizes, found once.)

    :param sites: the latent sites, in the order of the model.
    :param row_plates: plates whose elements are independent (or conditionally so, see ``Arrow``).
    """

    sites: tuple[LatentSite, ...]
    row_plates: tuple[Plate, ...]

    @cached_property
    def split(self) -> tuple[tuple[LatentSite, ...], tuple[LatentSite, ...]]:
        """Shared sites, and local ones, which lie in the row plates (all of them where there are none)."""
        local = tuple(s for s in self.sites if s.is_in(self.row_plates))
        return tuple(s for s in self.sites if not s.is_in(self.row_plates)), local

    @cached_property
    def _local(self) -> list[tuple[str, _Packing]]:
        return [(s.name, _Packing.of(s, self.row_plates)) for s in self.split[1]]

    @cached_property
    def is_arrow(self) -> bool:
        """Whether local latents in a plate and shared ones outside it make one arrowhead row."""
        return bool(self.split[0])

    @cached_property
    def row_shape(self) -> torch.Size:
        """Sizes of the row plates, outermost first."""
        return torch.Size(plate.size for plate in self.row_plates)

    @cached_property
    def plate_scale(self) -> float:
        """``full_size / size`` of the row plates: how often one of their elements counts in the log joint."""
        return math.prod(plate.scale for plate in self.row_plates)

    @property
    def row_weight(self) -> float:
        """How often a row counts in the log joint; an arrowhead's one row counts once."""
        return 1.0 if self.is_arrow else self.plate_scale

    @cached_property
    def rows(self) -> int:
        """Number of independent rows."""
        return 1 if self.is_arrow else self.row_shape.numel()

    @cached_property
    def arrow(self) -> Arrow | None:
        """The arrowhead structure of the single row, or None."""
        if not self.is_arrow:
            return None
        return Arrow(
            shared=sum(s.shape.numel() for s in self.split[0]),
            count=self.row_shape.numel(),
            local=sum(packing.numel for _, packing in self._local),
            weight=self.plate_scale,
        )

    @cached_property
    def size(self) -> int:
        """Number of coordinates in a row."""
        if self.arrow is not None:
            return self.arrow.shared + self.arrow.count * self.arrow.local
        return sum(packing.numel for _, packing in self._local)

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """Unconstrained site values ``(*lead, *batch, *event)`` to ``(*lead, rows, size)``.

        :raises ValueError: where one is not there.
        """
        if gone := [s.name for s in self.sites if s.name not in values]:
            raise ValueError(
                f"latent site '{gone[0]}' disappeared in another run of the model: its latent sites must not depend on "
                "the values of other sites."
            )
        rows = torch.cat([packing.to_rows(values[name]) for name, packing in self._local], -1)
        if not self.is_arrow:
            return rows
        lead = rows.shape[:-2]
        parts = [values[s.name].reshape(*lead, -1) for s in self.split[0]]
        return torch.cat([*parts, rows.reshape(*lead, -1)], -1).unsqueeze(-2)

    def unpack(self, u: Tensor) -> dict[str, Tensor]:
        """``(*lead, rows, size)`` to unconstrained site values ``(*lead, *batch, *event)``."""
        values: dict[str, Tensor] = {}
        if self.arrow is not None:
            u = u.squeeze(-2)
            lead, start = u.shape[:-1], 0
            for s in self.split[0]:
                stop = start + s.shape.numel()
                values[s.name] = u[..., start:stop].reshape((*lead, *s.shape))
                start = stop
            u = u[..., start:].reshape(*lead, self.arrow.count, self.arrow.local)
        start = 0
        for name, packing in self._local:
            values[name] = packing.from_rows(u[..., start : start + packing.numel])
            start += packing.numel
        return {s.name: values[s.name] for s in self.sites} if self.is_arrow else values

    @cached_property
    def row_sizes(self) -> dict[str, int]:
        """Number of coordinates of each site in a row (or local block)."""
        return {s.name: s.shape.numel() for s in self.split[0]} | {name: p.numel for name, p in self._local}

    def drift_scale(self, like: Tensor) -> Tensor:
        """``(size,)`` of ``1 / scale`` per site: undoes the scaling that subsampling gives to local latents."""
        key = (like.dtype, like.device)
        cache = self.__dict__.setdefault("_drift_scale", {})
        if key not in cache:
            values = constant(self, {s.name: 1.0 / s.scale for s in self.sites})
            cache[key] = values.to(dtype=like.dtype, device=like.device)
        return cache[key]


def constant(layout: Layout, values: Mapping[str, float]) -> Tensor:
    """A ``(size,)`` tensor (float64, CPU) that has ``values[site]`` at every coordinate of each site."""
    return layout.pack({s.name: torch.full(s.shape, values[s.name], dtype=torch.float64) for s in layout.sites})[0]


def require_full_plates(layout: Layout, action: str) -> None:
    """Refuse latents in a subsampled plate.

    :param action: what is to be done on the full plate.
    """
    thinned = [s.name for s in layout.sites if s.scale != 1]
    if thinned:
        raise ValueError(f"latent sites {thinned} lie in a subsampled plate: {action} on the full plate.")
