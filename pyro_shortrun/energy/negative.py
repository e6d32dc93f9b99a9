"""The negative phase: energies at the ends of runs in the prior, and the gradient of log Z there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..density.call import Call
from ..density.program import Reading
from ..density.sites import Site, masked
from ..runs.record import RunInfo
from .statement import Energy, energies, energy_of


@dataclass(frozen=True)
class Negative:
    """The negative phase: ``surrogate`` has the gradient of log Z, ``squares`` is the sum of squared energies."""

    surrogate: Tensor
    squares: Tensor | None
    means: dict[str, float]
    info: RunInfo
    keep: Callable[[], None] = lambda: None

    @classmethod
    def at(cls, call: Call, end: Tensor, info: RunInfo, squared: bool = False) -> Negative:
        """At the ends of runs, ``(chains, rows, size)``; rows that froze are left out, and the others weigh more.

        :param squared: whether the squares are wanted.
        """

        def take(reading: Reading) -> tuple[Tensor, ...]:
            terms = [Term.of(s) for s in energies(reading).values()]
            return tuple(t for term in terms for t in (term.total, term.count, *([term.square()] if squared else [])))

        value, *found = call.density.with_readings(end, take)
        valid = ~info.frozen
        kept = torch.where(valid, value, torch.zeros_like(value)).sum()
        surrogate = kept * (call.density.layout.rows / valid.sum())
        width = 3 if squared else 2
        totals, counts, squares = found[::width], found[1::width], found[2::width] if squared else []
        means = {k: mean_energy(t, n) for k, t, n in zip(energies(call.reading), totals, counts, strict=True)}
        return cls(surrogate, torch.stack(squares).mean(1).sum() if squared else None, means, info)


@dataclass(frozen=True)
class Term:
    """The site of an energy: its sum over elements that no mask takes out, their number, and its square's sum."""

    total: Tensor
    count: Tensor
    energy: Energy
    scale: Any
    mask: Any

    @classmethod
    def of(cls, site: Site) -> Term:
        value, energy = -site["fn"].log_factor.detach(), energy_of(site)
        assert energy is not None
        total, count = (masked(t, site["mask"]).sum() for t in (value, torch.ones_like(value)))
        return cls(total, count, energy, site["scale"], site["mask"])

    def square(self) -> Tensor:
        """Scaled as the site is, with a gradient in the energy's own parameters alone."""
        return masked(self.scale * self.energy.at_fixed_latents().square(), self.mask).sum()


def mean_energy(totals: Tensor, counts: Tensor) -> float:
    """Per element, of sums and the numbers of elements in them."""
    return (totals.sum() / counts.sum()).item()
