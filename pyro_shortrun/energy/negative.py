"""The negative phase: energies at the ends of runs in the prior, and the gradient of log Z there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..density.call import Call
from ..density.interface import Density
from ..density.model import LogDensity
from ..density.program import Reading
from ..density.rows import Rows
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
        density = call.density if isinstance(call.density, Landing) else Landing(call.model, squared)
        value, *found = density.at(end)
        valid = ~info.frozen
        kept = torch.where(valid, value, torch.zeros_like(value)).sum()
        surrogate = kept * (call.density.layout.rows / valid.sum())
        width = 3 if squared else 2
        totals, counts, squares = found[::width], found[1::width], found[2::width] if squared else []
        means = {k: mean_energy(t, n) for k, t, n in zip(energies(call.reading), totals, counts, strict=True)}
        return cls(surrogate, torch.stack(squares).mean(1).sum() if squared else None, means, info)


class Landing(Density):
    """A tilted prior that keeps what the run of the model told with which a short run lands, its graph included.

    :param squared: whether squares of energies are wanted.
    """

    def __init__(self, model: LogDensity, squared: bool) -> None:
        self.structure, self.layout = model.structure, model.layout
        self._model, self._squared = model, squared
        self._last: tuple[Tensor, tuple[Tensor, ...]] | None = None

    def __call__(self, u: Tensor) -> Tensor:
        return self._model(u)

    def land(self, u: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            self._last = u, self._model.over(u, self._read)
        return (self._last[1][0].detach(),)

    def at(self, u: Tensor) -> tuple[Tensor, ...]:
        """``log pi(u)``, and by energy total, count and square, with gradients to the model's parameters."""
        if self._last is None or not torch.equal(self._last[0], u):  # some row did not get to its last proposal
            self.land(u)
        assert self._last is not None
        return self._last[1]

    def _read(self, reading: Reading) -> tuple[Tensor, ...]:
        terms = [Term.of(s) for s in energies(reading).values()]
        found = [t for term in terms for t in (term.total, term.count, *([term.square()] if self._squared else []))]
        return Rows(self.structure, reading).joint(), *found


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
