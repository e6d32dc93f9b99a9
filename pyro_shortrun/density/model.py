"""A bound Pyro program as an unconstrained log density over rows.

:class:`LogDensity` is, for fixed model arguments,

    log pi(u) = log p(x, z(u)) + log |dz/du|,      z = biject_to(support)(u),

with every observed site and ``pyro.factor`` in it, enumerated discrete sites summed out, in nats, upwards.
Which plates make the rows is decided in :mod:`pyro_shortrun.density.structure`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pyro
import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .interface import Density
from .program import Binding, Program, Reading
from .rows import Rows
from .sites import is_computed
from .structure import Structure
from .vectorize import map_chains, require_vmap


@dataclass(eq=False)
class LogDensity(Density):
    """Unconstrained log density of a bound model, over states ``u`` of shape ``(chains, rows, size)``.

    ``u -> log pi`` of shape ``(chains, rows)``; the sum over rows equals the trace's ``log_prob_sum`` plus
    log-Jacobians. Every evaluation is a run of the model.

    :param batches: a subsample of its own for every chain: plate name to ``(chains, batch)``.
    """

    program: Program
    structure: Structure
    bind: Binding
    batches: Mapping[str, Tensor] = field(default_factory=dict)
    repeats: bool = False

    def __post_init__(self) -> None:
        self.layout = self.structure.layout

    def read(self, u: Tensor) -> Reading:
        """The model run at one state, ``(rows, size)``."""
        return self._read(u, self.bind)

    def _read(self, u: Tensor, bind: Binding) -> Reading:
        with pyro.validation_enabled(False):
            return self.program.run(bind, self.layout.unpack(u))

    def over(self, u: Tensor, take: Callable[[Reading], Any], mapper: Callable[..., Any] = map_chains) -> Any:
        """What ``take`` takes from the run of the model at each state (tensors), along a leading axis of chains."""
        names = list(self.batches)

        def one_chain(one: Tensor, *batch: Tensor) -> Any:
            indices = {**self.bind.indices, **dict(zip(names, batch, strict=True))}
            return take(self._read(one, replace(self.bind, indices=indices) if names else self.bind))

        if len(u) == 1 and mapper is map_chains:  # no need of a map
            out = one_chain(u[0], *(batch[0] for batch in self.batches.values()))
            return tuple(t.unsqueeze(0) for t in out) if isinstance(out, tuple) else out.unsqueeze(0)
        return mapper(one_chain, (u, *self.batches.values()), self.structure.vectorizes)

    def _values(self, reading: Reading) -> list[Tensor]:
        return [reading.trace.nodes[name]["value"] for name in self.structure.latents]

    def _joint(self, reading: Reading) -> Tensor:
        return Rows(self.structure, reading).joint()

    def __call__(self, u: Tensor) -> Tensor:
        return self.over(u, self._joint)

    def require_vectorization(self, u: Tensor) -> None:
        try:
            self.over(u, self._joint, _require)
        except NotImplementedError as reason:
            name = _unvectorizable(self, u)
            raise NotImplementedError(f"site '{name}': {reason}" if name else str(reason)) from reason

    def with_start(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """``log pi(u)`` and the prior's log density ``log p(z(u)) + log |dz/du|``, both ``(chains, rows)``."""

        def take(reading: Reading) -> tuple[Tensor, Tensor]:
            rows = Rows(self.structure, reading)
            return rows.joint(), rows.prior()

        return self.over(u, take)

    def land(self, u: Tensor) -> tuple[Tensor, ...]:
        """``log pi(u)``, ``log |dz/du|`` and the site values there, from one run of the model."""

        def take(reading: Reading) -> tuple[Tensor, ...]:
            rows = Rows(self.structure, reading)
            return rows.joint(), rows.jacobian(), *self._values(reading)

        return self.over(u, take)

    def differentiable(self, u: Tensor, parameters: bool) -> Tensor:
        known = self.structure.noticed
        if parameters and "parameters move supports" not in known:
            values, jacobian = self.constrain(u.detach())
            known["parameters move supports"] = any(t.requires_grad for t in (jacobian, *values.values()))
        if parameters and known["parameters move supports"]:
            raise NotImplementedError("a latent site's support depends on parameters: use Trace_ELBO.")
        with self.program.showing_parameters():
            return super().differentiable(u, parameters)

    def constrain(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Site values ``(chains, *batch, *event)`` and ``log |dz/du|`` per row, ``(chains, rows)``.

        Supports and masks may depend on other sites, so they are read at ``u``, by a run of the model.
        """

        def take(reading: Reading) -> tuple[Tensor, ...]:
            return *self._values(reading), Rows(self.structure, reading).jacobian()

        *values, jacobian = self.over(u, take)
        return dict(zip(self.structure.latents, values, strict=True)), jacobian

    def computed(self, u: Tensor, reading: Reading) -> dict[str, Tensor]:
        """Values of ``pyro.deterministic`` sites, ``(chains, *shape)``; of those that depend on no site that is summed
        out.

        :param reading: a run of the model forwards, which tells their shapes.
        """
        shapes = {k: torch.as_tensor(s["value"]).shape for k, s in reading.trace.nodes.items() if is_computed(s)}

        def take(one: Reading) -> tuple[Tensor, ...]:
            return tuple(torch.as_tensor(one.trace.nodes[name]["value"]) for name in shapes)

        with torch.no_grad():
            found = dict(zip(shapes, self.over(u, take), strict=True)) if shapes else {}
        return {k: v for k, v in found.items() if v.shape[1:] == shapes[k]}

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """Site values of one chain to ``(rows, size)``."""
        with pyro.validation_enabled(False):
            return self.layout.pack(self.program.run(self.bind, values, free=False).unconstrained)


def _unvectorizable(density: LogDensity, u: Tensor) -> str | None:
    """Name of the site whose log-probability vmap cannot take, if it is one."""
    failed: list[str] = []

    def attempt(reading: Reading) -> Tensor:
        for name, site in reading.trace.nodes.items():
            if site["type"] == "sample" and not site_is_subsample(site):
                failed[:] = [name]
                site["fn"].log_prob(site["value"])
        failed.clear()
        return next(iter(reading.unconstrained.values())).sum()

    try:
        density.over(u, attempt, _require)
    except NotImplementedError:
        pass
    return failed[0] if failed else None


def _require(fn: Callable[..., Any], inputs: tuple[Tensor, ...], vectorizes: dict[str, bool]) -> None:
    require_vmap(fn, inputs)
