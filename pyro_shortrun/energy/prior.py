"""The prior tilted by its energies, as a density of its own: a model's latents without its observations.

A prior with energies is not normalised as it is written:

    p(z) = exp(-sum_j E_j(z)) prod_i p(z_i | parents) / Z.

:class:`TiltedPrior` is its unnormalised log density; :class:`~pyro_shortrun.energy.PriorRuns` are short runs in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ..compile.compiler import Compiler
from ..compile.executor import density_of
from ..density.call import Binder, Call
from ..density.program import Program, Reading
from ..density.sites import Site, is_data, plates_of
from .statement import energies, energy_of


class _Ended(Exception):
    """The model need not run on."""


class PriorPart(Messenger):
    """The model without its data and plain factors, ended after the site ``last``: the decoder does not run.

    A run to the model's end (``last`` is None) tells which data come before the last energy: ``conditions``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        self.last: str | None = None
        self.conditions: dict[str, Tensor] = {}
        self._data: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Site) -> None:
        plain_factor = isinstance(msg["fn"], dist.Unit) and energy_of(msg) is None
        if not site_is_subsample(msg) and (plain_factor or is_data(msg)):
            msg["stop"] = True  # no handler outside sees it
            if self.last is None and not plain_factor:
                self._data[msg["name"]] = msg["value"]

    def _pyro_post_sample(self, msg: Site) -> None:
        if self.last is None and energy_of(msg) is not None:
            self.conditions = dict(self._data)
        if msg["name"] == self.last:
            raise _Ended

    def __exit__(self, *exc: Any) -> bool:  # type: ignore[override]
        super().__exit__(*exc)
        return exc[0] is _Ended


class TiltedPrior:
    r"""The latents of a model up to its last energy, with the energies, without observations:

    .. math:: \log\pi(u) = \sum_i \log p(z_i \mid \text{parents}) - \sum_j E_j(z) + \log|dz/du| .

    What comes after the last energy is normalised given the latents before it and integrates to one. Data before it
    (:attr:`conditions`), which energies and latents may depend on, keep their values: Z is then that of
    ``p(z | conditions)``.

    :param model: a Pyro model.
    :param compile: whether runs are compiled.
    """

    def __init__(self, model: Callable[..., Any], compile: bool = False) -> None:
        self.model = model
        self._part = PriorPart()
        self._binder = Binder(Program(self._part(model)))
        self._compiler = Compiler() if compile else None

    @property
    def conditions(self) -> Mapping[str, Tensor]:
        """Data before the last energy, as of the last call."""
        return self._part.conditions

    @torch.no_grad()
    def bind(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], given: Mapping[str, Tensor] | None = None
    ) -> Call | None:
        """Read the model once; None where it has no energies, or nothing is left to run.

        :param given: latents that are held at these values; their log-probabilities stay in the density.
        :raises NotImplementedError: where ``poutine.scale`` or a subsampled plate weighs some of the prior only.
        """
        self._part.reset()
        given = given or {}
        program = self._binder.program
        reading = _up_to_last_energy(program.draw(args, kwargs, given=given))
        if reading is None:
            return None
        late = [name for name in given if name not in reading.trace.nodes]
        if late:
            raise NotImplementedError(
                f"given holds '{late[0]}', which comes after the last energy_prior: the latents before it would not be "
                "conditioned on it. Leave it out, or make it an observation and use a guide."
            )
        if given and not reading.unconstrained and program.enum_dim(reading) is None:
            return None
        self._part.last = list(reading.trace.nodes)[-1]
        _check_scales(reading)
        call = self._binder(reading, args, kwargs, given)
        return replace(call, density=density_of(call.model, self._compiler))

    def discrete(self, call: Call, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The discrete latents that runs sum out, drawn given the ends of runs, ``(draws, *site shape)`` each."""
        if call.bind.enum_dim is None:
            return {}
        count = len(next(iter(values.values())))
        draws = [call.program.discrete(call.bind, {k: v[i] for k, v in values.items()}) for i in range(count)]
        return {k: torch.stack([draw[k] for draw in draws]) for k in draws[0]}


def _check_scales(reading: Reading) -> None:
    """Only plates may scale, and all alike: runs would be in another prior."""
    sites = [*reading.latents, *energies(reading).values()]
    scales = {s["name"]: math.prod(p.scale for p in plates_of(s)) for s in sites}
    if max(scales.values()) - min(scales.values()) > 1e-5 * max(scales.values()):
        raise NotImplementedError(
            "some latents or energies of the prior lie in a subsampled plate and others do not (full size / batch: "
            f"{', '.join(f'{k} {v:.4g}' for k, v in scales.items())}): the latents left out belong to Z too. Use the "
            "full plate, or local latents alone."
        )
    for site in sites:
        by_plates = math.prod(p.scale for p in plates_of(site))
        ratio = torch.as_tensor(site["scale"], dtype=torch.float64) / by_plates
        if ((ratio - 1).abs() > 1e-5).any():
            raise NotImplementedError(
                f"poutine.scale weighs site '{site['name']}', and runs in the prior would be in another prior: leave "
                "it out and change the learning rate instead."
            )


def _up_to_last_energy(reading: Reading) -> Reading | None:
    """The reading without what the model did after its last energy."""
    found = energies(reading)
    if not found:
        return None
    trace, names = reading.trace.copy(), list(reading.trace.nodes)
    for name in names[names.index(list(found)[-1]) + 1 :]:
        trace.remove_node(name)
    kept = {k: v for k, v in reading.unconstrained.items() if k in trace.nodes}
    return replace(reading, trace=trace, unconstrained=kept)
