"""The model at draws: log-probabilities, deterministic sites, simulated data, and names of their dimensions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..density.call import Call
from ..density.pointwise import pointwise, seen
from ..density.program import Reading
from ..density.sites import is_computed, is_data, is_factor, plates_of
from ..density.vectorize import map_chains
from ..energy.statement import energy_of
from ..tensors import ordinary_autograd
from .posterior import Draws, grouped

_LOGGER = logging.getLogger("pyro_shortrun")
_AT_ONCE = 2048  # draws
_RESERVED = {"chain", "draw", "sample"}
_STATS = {"lp", "log_p", "log_q", "acceptance_rate", "grad_norm", "step_size", "nonfinite", "diverging"}


@dataclass
class Axes:
    """Names of dimensions by variable, and coordinates of the plates."""

    dims: dict[str, list[str]] = field(default_factory=dict)
    coords: dict[str, np.ndarray] = field(default_factory=dict)


class ModelAtDraws:
    """Evaluates and simulates a bound model at many draws, vectorised where it can be."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.seen: Draws = {}  # which observations there are, of data sites with some that are masked
        nodes = call.reading.trace.nodes
        self._factors = [k for k, s in nodes.items() if is_factor(s) and energy_of(s) is None]
        self._observed = {k: s for k, s in nodes.items() if is_data(s)}
        self._computed = {k: s for k, s in nodes.items() if is_computed(s)}
        self.data = {k: _observation(s) for k, s in self._observed.items()}

    @property
    def sites(self) -> list[str]:
        """Names of all sites that can be exported."""
        return [*(s.name for s in self.call.density.layout.sites), *self._computed, *self._observed]

    def axes(self, exported: Mapping[str, str]) -> Axes:
        """Names of every site's dimensions, and the indices of plates.

        :param exported: names of variables by site.
        """
        sites = [*self.call.reading.latents, *self._observed.values(), *self._computed.values()]
        indices = self.call.reading.indices
        axes = Axes()
        for site in sites:
            plates = {p.dim: p for p in plates_of(site)}
            # A deterministic site in a plate counts all of its dims as event dims, unless told otherwise.
            computed = site["name"] in self._computed
            shape = site["value"].shape if computed else self._shape(site)
            batch = len(shape) if computed else len(shape) - len(site["fn"].event_shape)
            names = []
            for i, size in enumerate(shape):
                plate = plates.get(i - batch) if i < batch else None
                named = plate is not None and plate.size == size
                names.append(_plate_name(plate.name) if named else f"{exported[site['name']]}_dim_{i}")  # type: ignore[union-attr]
            axes.dims[exported[site["name"]]] = names
            for plate in plates.values():
                axes.coords[_plate_name(plate.name)] = indices[plate.name].cpu().numpy()
        return axes

    def _shape(self, site: Any) -> torch.Size:
        return self.data[site["name"]].shape if site["name"] in self.data else _shape(site)

    def at(self, draws: Draws) -> tuple[Draws, Draws]:
        """Log-probability of every observation, and deterministic sites, at posterior draws; takes note of what is
        ``seen``."""
        call, names = self.call, [s.name for s in self.call.density.layout.sites]
        shapes = {k: s["fn"].batch_shape for k, s in self._observed.items()}

        def evaluate(*values: Tensor) -> tuple[dict[str, Tensor], Reading]:
            reading = call.program.run(call.bind, dict(zip(names, values, strict=True)), free=False)
            return pointwise(call.model.structure, reading, shapes), reading

        def flat(*values: Tensor) -> tuple[Tensor, ...]:
            terms, reading = evaluate(*values)
            nodes = reading.trace.nodes
            here = (seen(nodes[k], v.shape) for k, v in terms.items())
            return *terms.values(), *here, *(nodes[k]["value"] for k in self._computed)

        with ordinary_autograd(), torch.no_grad():
            known = list(evaluate(*(draws[k][0] for k in names))[0])
        if set(known) != set(self._observed):
            _LOGGER.warning(
                "enumerated sites tie the elements of %s together: no pointwise log_likelihood of theirs is exported.",
                sorted(set(self._observed) - set(known)),
            )
        if self._factors and known:
            _LOGGER.warning(
                "pyro.factor terms %s are in the posterior, but neither in log_likelihood nor in posterior_predictive: "
                "where they stand for data, az.loo compares wrong models. Write such data as an observed site, with a "
                "distribution of your own if need be.",
                self._factors,
            )
        if not known and not self._computed:
            return {}, {}
        out = self._map(flat, tuple(draws[k] for k in names), "export")
        count = len(known)
        terms = dict(zip(known, out[:count], strict=True))
        found = {k: v.any(0) for k, v in zip(known, out[count : 2 * count], strict=True)}  # masks may move with latents
        self.seen = {k: v for k, v in found.items() if not v.all()}
        return terms, dict(zip(self._computed, out[2 * count :], strict=True))

    def simulate(self, draws: Draws, count: int) -> Draws:
        """Every latent, deterministic and data site drawn anew, but for those in ``draws``."""
        latent = [k for k in (s.name for s in self.call.density.layout.sites) if k in draws]
        names = self.sites

        def draw(*values: Tensor) -> tuple[Tensor, ...]:
            given = dict(zip(latent, values[1:], strict=True))
            out = self.call.program.simulate(self.call.bind, given)
            return tuple(out[k] for k in names)

        inputs = (torch.arange(count), *(draws[k] for k in latent))
        return dict(zip(names, self._map(draw, inputs, "simulate"), strict=True))

    def prior(self, count: int) -> dict[str, Draws]:
        """The groups ``prior`` and ``prior_predictive``."""
        if not count:
            return {}
        try:
            drawn = self.simulate({}, count)
        except NotImplementedError as reason:
            _LOGGER.warning("no prior is exported, since it cannot be drawn from: %s", reason)
            return {}
        drawn = grouped(drawn, torch.Size((1, count)))
        return {
            "prior": {k: v for k, v in drawn.items() if k not in self._observed},
            "prior_predictive": {k: v for k, v in drawn.items() if k in self._observed},
        }

    def _map(self, fn: Callable[..., Any], inputs: tuple[Tensor, ...], key: str) -> tuple[Tensor, ...]:
        vectorizes = self.call.density.structure.vectorizes
        parts = []
        with ordinary_autograd(), torch.no_grad():
            for part in zip(*(x.split(_AT_ONCE) for x in inputs), strict=True):
                parts.append(map_chains(fn, part, vectorizes, key, draws=key == "simulate"))
        return tuple(torch.cat(p) for p in zip(*parts, strict=True))


def _shape(site: Any) -> torch.Size:
    return torch.Size((*site["fn"].batch_shape, *site["fn"].event_shape))


def _observation(site: Any) -> Tensor:
    """Data as wide as their distribution: a plate may be over one number."""
    value = torch.as_tensor(site["value"]).detach()
    return value.expand(torch.broadcast_shapes(value.shape, _shape(site)))


def _plate_name(name: str) -> str:
    return f"{name}_plate" if name in _RESERVED else name.replace("/", ".")


def variables(sites: Iterable[str]) -> dict[str, str]:
    """Names for sites as xarray and NetCDF allow them, no two alike: those that need no change keep theirs.

    ArviZ has one dict of dims for all groups, statistics included.
    """
    wanted = {name: f"{name}_site" if name in _RESERVED | _STATS else name.replace("/", ".") for name in sites}
    out = {name: name for name, new in wanted.items() if new == name}
    taken = set(out.values())
    for name, new in wanted.items():
        if name not in out:
            while new in taken:
                new += "_site"
            taken.add(new)
            out[name] = new
    return out
