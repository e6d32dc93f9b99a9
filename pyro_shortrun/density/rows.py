"""Log-probabilities of a run of the model, summed to rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyro
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .enumeration import common_scale, enumerated_factors, marginal
from .layout import Layout
from .program import Reading
from .shapes import LatentSite
from .sites import Site, masked
from .structure import Structure


def sum_to_rows(layout: Layout, term: Tensor, plates: Iterable[Any]) -> Tensor:
    """Sum a batch of log-probabilities to ``(rows,)``.

    A term outside the rows is a constant to them and is shared equally, so that rows add up to the total.

    :param plates: those around the site, as :class:`~pyro_shortrun.density.shapes.Plate` or as Pyro has them.
    """
    rows = layout.row_plates
    if layout.is_arrow or not rows or not {p.name for p in rows} <= {p.name for p in plates}:
        return (term.sum() / max(layout.rows, 1)).expand(layout.rows)
    missing = -min(p.dim for p in rows) - term.dim()
    term = term.reshape((1,) * max(missing, 0) + tuple(term.shape))
    axes = [term.dim() + p.dim for p in rows]
    term = term.permute(*axes, *(i for i in range(term.dim()) if i not in axes))
    term = term.expand(*layout.row_shape, *term.shape[len(axes) :])
    return term.reshape(layout.rows, -1).sum(-1)


@dataclass(frozen=True)
class Rows:
    """Log densities of one run of the model, ``(rows,)`` each."""

    structure: Structure
    reading: Reading

    def joint(self) -> Tensor:
        """``log p(x, z) + log |dz/du|``."""
        layout, summed = self.structure.layout, self._summed
        terms = [
            sum_to_rows(layout, s["log_prob"], s["cond_indep_stack"]) for s in self._sites if s["name"] not in summed
        ]
        terms.append(self._total_jacobian(weighted=False))
        if summed:
            terms.append(self._contract(summed, scaled=True))
        return sum(terms)  # type: ignore[return-value]

    def prior(self) -> Tensor:
        """``log p(z) + log |dz/du|`` as a part of log q, over the latents alone."""
        sites, summed = self._sites, self._summed
        latents = [s for s in sites if s["name"] in self.structure.latents]
        terms = [
            self._weighted(
                s["unscaled_log_prob"] if s["mask"] is None else masked(s["unscaled_log_prob"], s["mask"]),
                self._shape(s),
            )
            for s in latents
            if s["name"] not in summed
        ]
        if any(s["name"] in summed for s in latents):
            terms.append(self._contract({k: s for k, s in summed.items() if not s["is_observed"]}, scaled=False))
        return sum(terms) + self.jacobian()

    def jacobian(self) -> Tensor:
        """``log |dz/du|`` as a part of log q, masked sites left out."""
        return self._total_jacobian(weighted=True)

    @cached_property
    def _sites(self) -> list[Site]:
        """Sites but subsamples, with the log-probabilities of the run."""
        nodes = self.reading.trace.nodes.values()
        with pyro.validation_enabled(False):
            self.reading.trace.compute_log_prob()
        return [s for s in nodes if s["type"] == "sample" and not site_is_subsample(s)]

    @cached_property
    def _summed(self) -> Mapping[str, Site]:
        return enumerated_factors(self.reading.trace, self._sites) if self.structure.summed else {}

    def _shape(self, site: Site) -> LatentSite:
        return self.structure.latents[site["name"]]

    def _total_jacobian(self, weighted: bool) -> Tensor:
        """Weighted as parts of log q, or scaled as Pyro scales log-probabilities."""
        first = next(iter(self.reading.unconstrained.values()))
        rows = first.new_zeros(self.structure.layout.rows)
        terms = self.reading.log_jacobians
        if terms and self.structure.began_real:
            self.structure.noticed["supports vary"] = True
        for name, term in terms.items():
            shape, mask = self.structure.latents[name], self.reading.trace.nodes[name]["mask"]
            term = term if mask is None else masked(term, mask)
            if weighted:
                rows = rows + self._weighted(term, shape)
            else:
                rows = rows + sum_to_rows(self.structure.layout, shape.scale * term, shape.plates)
        return rows

    def _weighted(self, term: Tensor, site: LatentSite) -> Tensor:
        """Parts of log q: an arrowhead's local sites count ``full_size / size`` times (its one row is not
        inside the plate, so Pyro will not scale it)."""
        weight = site.scale if self.structure.layout.is_arrow else 1.0
        return sum_to_rows(self.structure.layout, weight * term, site.plates)

    def _contract(self, sites: Mapping[str, Site], scaled: bool) -> Tensor:
        """Sum the enumerated sites out of the product of ``sites``, to rows."""
        layout = self.structure.layout
        term = marginal(self.reading.trace, sites, () if layout.is_arrow else layout.row_plates)
        return sum_to_rows(layout, term * common_scale(sites) if scaled else term, layout.row_plates)


def joint_and_prior(structure: Structure, reading: Reading) -> tuple[Tensor, Tensor] | None:
    """``log pi`` and the prior's log density, ``(1, rows)``, of the run of the model that drew the state; None where
    that run does not tell (enumerated sites are not drawn)."""
    if structure.summed:
        return None
    rows = Rows(structure, reading)
    return rows.joint().unsqueeze(0), rows.prior().unsqueeze(0)
