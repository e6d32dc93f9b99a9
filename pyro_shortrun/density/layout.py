"""How the latent sites of a model lie in one flat tensor of independent rows.

The dynamics moves a tensor ``u`` of shape ``(chains, rows, size)``. A *row* is a part of the posterior that is
independent of all other rows given the model's parameters, so that the Jacobian of a step is block diagonal:

* every latent lies in the plate ``data``: one row per element of the plate;
* no latent lies in a plate, or something couples the plate's elements: a single row;
* local latents in a plate and shared latents outside it: a single row whose coordinates are ordered
  ``shared, local[0], local[1], ...`` and whose Hessian is an arrowhead (:class:`Arrow`).

Only tensors and shapes occur here; models and traces are read in :mod:`pyro_shortrun.density.model`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


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

    @property
    def scale(self) -> float:
        """Product of ``full_size / size`` over the site's own plates."""
        return math.prod(plate.scale for plate in self.plates)

    @property
    def shape(self) -> torch.Size:
        """Shape of the unconstrained value, batch dimensions first."""
        return self.batch_shape + self.event_shape


@dataclass(frozen=True)
class Arrow:
    """Sizes of an arrowhead row: ``shared`` coordinates, then ``count`` blocks of ``local`` coordinates."""

    shared: int
    count: int
    local: int
    weight: float  # full_size / size of the local plate: the local parts of log q count this often


@dataclass(frozen=True)
class Layout:
    """Packs unconstrained site values into ``(rows, size)`` and back.

    :param sites: the latent sites, in the order of the model.
    :param row_plates: plates whose elements are independent (or conditionally so, see ``Arrow``).
    """

    sites: tuple[LatentSite, ...]
    row_plates: tuple[Plate, ...]

    @cached_property
    def is_arrow(self) -> bool:
        """Whether local latents in a plate and shared ones outside it make one arrowhead row."""
        return bool(self.row_plates) and bool(self._split[0])

    @cached_property
    def _split(self) -> tuple[tuple[LatentSite, ...], tuple[LatentSite, ...]]:
        """Shared and local sites."""
        names = {plate.name for plate in self.row_plates}
        shared = tuple(s for s in self.sites if not names <= {p.name for p in s.plates})
        local = tuple(s for s in self.sites if names <= {p.name for p in s.plates})
        return (shared, local) if names else ((), self.sites)

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
        shared, local = self._split
        count = self.row_shape.numel()
        return Arrow(
            shared=sum(s.shape.numel() for s in shared),
            count=count,
            local=sum(self._numel(s) for s in local),
            weight=self.plate_scale,
        )

    @cached_property
    def size(self) -> int:
        """Number of coordinates in a row."""
        if self.arrow is not None:
            return self.arrow.shared + self.arrow.count * self.arrow.local
        return sum(self._numel(s) for s in self.sites)

    @cached_property
    def unscalable(self) -> str | None:
        """Name of a latent whose subsampling scale no row or arrowhead can carry, or None."""
        shared, local = self._split
        wrong = [s.name for s in local if not math.isclose(s.scale, self.plate_scale)]
        wrong += [s.name for s in shared if not math.isclose(s.scale, 1.0)]
        return wrong[0] if wrong else None

    def _row_axes(self, site: LatentSite) -> list[int]:
        return [len(site.batch_shape) + plate.dim for plate in self.row_plates]

    def _numel(self, site: LatentSite) -> int:
        """Number of the site's coordinates in one row (or one local block)."""
        axes = self._row_axes(site)
        return math.prod(n for i, n in enumerate(site.shape) if i not in axes)

    @cached_property
    def row_sizes(self) -> dict[str, int]:
        """Number of coordinates of each site in a row (or local block)."""
        shared, local = self._split
        sizes = {s.name: s.shape.numel() for s in shared}
        return sizes | {s.name: self._numel(s) for s in local}

    def _to_rows(self, site: LatentSite, value: Tensor) -> Tensor:
        """``(*lead, *batch, *event)`` to ``(*lead, rows, numel per row)``."""
        lead = value.dim() - len(site.shape)
        axes = self._row_axes(site)
        rest = [i for i in range(len(site.shape)) if i not in axes]
        order = [*range(lead), *(lead + i for i in axes), *(lead + i for i in rest)]
        return value.permute(order).reshape(*value.shape[:lead], self.row_shape.numel(), self._numel(site))

    def _from_rows(self, site: LatentSite, value: Tensor) -> Tensor:
        lead = value.dim() - 2
        axes = self._row_axes(site)
        rest = [i for i in range(len(site.shape)) if i not in axes]
        sizes = [*self.row_shape, *(site.shape[i] for i in rest)]
        inverse = torch.tensor([*axes, *rest]).argsort().tolist() if sizes else []
        value = value.reshape((*value.shape[:lead], *sizes))
        return value.permute((*range(lead), *(lead + i for i in inverse)))

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """Unconstrained site values ``(*lead, *batch, *event)`` to ``(*lead, rows, size)``."""
        shared, local = self._split
        rows = torch.cat([self._to_rows(s, values[s.name]) for s in local], -1)
        if not self.is_arrow:
            return rows
        lead = rows.shape[:-2]
        parts = [values[s.name].reshape(*lead, -1) for s in shared]
        return torch.cat([*parts, rows.reshape(*lead, -1)], -1).unsqueeze(-2)

    def unpack(self, u: Tensor) -> dict[str, Tensor]:
        """``(*lead, rows, size)`` to unconstrained site values ``(*lead, *batch, *event)``."""
        shared, local = self._split
        values: dict[str, Tensor] = {}
        if self.is_arrow:
            assert self.arrow is not None
            u = u.squeeze(-2)
            lead, start = u.shape[:-1], 0
            for s in shared:
                stop = start + s.shape.numel()
                values[s.name] = u[..., start:stop].reshape((*lead, *s.shape))
                start = stop
            u = u[..., start:].reshape(*lead, self.arrow.count, self.arrow.local)
        start = 0
        for s in local:
            stop = start + self._numel(s)
            values[s.name] = self._from_rows(s, u[..., start:stop])
            start = stop
        return {s.name: values[s.name] for s in self.sites}

    def sum_to_rows(self, term: Tensor, plates: Iterable[Plate]) -> Tensor:
        """Sum a batch of log-probabilities to ``(rows,)``.

        A term outside the rows is a constant to them and is shared equally, so that rows add up to the total.
        """
        inside = {p.name for p in self.row_plates} <= {p.name for p in plates}
        if self.is_arrow or not self.row_plates or not inside:
            return (term.sum() / max(self.rows, 1)).expand(self.rows)
        missing = -min(p.dim for p in self.row_plates) - term.dim()
        term = term.reshape((1,) * max(missing, 0) + tuple(term.shape))
        axes = [term.dim() + p.dim for p in self.row_plates]
        rest = [i for i in range(term.dim()) if i not in axes]
        term = term.permute(*axes, *rest)
        term = term.expand(*self.row_shape, *term.shape[len(axes) :])
        return term.reshape(self.rows, -1).sum(-1)

    def constant(self, values: Mapping[str, float]) -> Tensor:
        """A ``(size,)`` tensor (float64, CPU) that has ``values[site]`` at every coordinate of each site."""
        full = {s.name: torch.full(s.shape, values[s.name], dtype=torch.float64) for s in self.sites}
        return self.pack(full)[0]

    @cached_property
    def site_index(self) -> Tensor:
        """``(size,)`` index of the site to which each coordinate belongs."""
        numbers = {s.name: float(i) for i, s in enumerate(self.sites)}
        return self.constant(numbers).round().long()

    @cached_property
    def dim_index(self) -> Tensor:
        """``(size,)`` index of each coordinate; elements of an arrowhead's local plate share theirs."""
        if self.arrow is None:
            return torch.arange(self.size)
        local = self.arrow.shared + torch.arange(self.arrow.local).repeat(self.arrow.count)
        return torch.cat([torch.arange(self.arrow.shared), local])

    def drift_scale(self, like: Tensor) -> Tensor:
        """``(size,)`` of ``1 / scale`` per site: undoes the scaling that subsampling gives to local latents."""
        key = (like.dtype, like.device)
        cache = self.__dict__.setdefault("_drift_scale", {})
        if key not in cache:
            values = self.constant({s.name: 1.0 / s.scale for s in self.sites})
            cache[key] = values.to(dtype=like.dtype, device=like.device)
        return cache[key]


def require_full_plates(layout: Layout, action: str) -> None:
    """Refuse latents in a subsampled plate.

    :param action: what is to be done on the full plate.
    """
    thinned = [s.name for s in layout.sites if s.scale != 1]
    if thinned:
        raise ValueError(f"latent sites {thinned} lie in a subsampled plate: {action} on the full plate.")
