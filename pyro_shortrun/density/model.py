"""A Pyro program as an unconstrained log density over rows.

:class:`LogDensity` is, for fixed model arguments,

    log pi(u) = log p(x, z(u)) + log |dz/du|,      z = biject_to(support)(u),

with every observed site and ``pyro.factor`` in it, enumerated discrete sites summed out, in nats, upwards.
Which plates make the rows is decided in :mod:`pyro_shortrun.density.structure`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .enumeration import common_scale, enumerated_factors, marginal
from .interface import Density
from .layout import Arrow, LatentSite, Layout
from .program import Binding, Program, Reading
from .sites import Site, is_data, masked, plates_of
from .structure import Structure
from .vectorize import map_chains, require_vmap


class LogDensity(Density):
    """Unconstrained log density of a bound model, over states ``u`` of shape ``(chains, rows, size)``.

    ``u -> log pi`` of shape ``(chains, rows)``; the sum over rows equals the trace's ``log_prob_sum`` plus
    log-Jacobians.
    """

    def __init__(self, program: Program, structure: Structure, bind: Binding) -> None:
        self.structure, self.layout, self.bind = structure, structure.layout, bind
        self._program = program
        self._sites = {site.name: site for site in self.layout.sites}
        self._batches: Mapping[str, Tensor] = {}

    def on_batches(self, indices: Mapping[str, Tensor]) -> LogDensity:
        """The same density with a subsample of its own for every chain: plate name to ``(chains, batch)``."""
        density = LogDensity(self._program, self.structure, self.bind)
        density._batches = indices
        return density

    def __call__(self, u: Tensor) -> Tensor:
        """``log pi(u)``, ``(chains, rows)``."""
        return self.eager(u)

    def eager(self, u: Tensor) -> Tensor:
        """``log pi(u)`` by running the model, compiled or not."""
        return self._each(lambda density, one: density._terms(one, prior=False)[0], u)

    def require_vectorization(self, u: Tensor) -> None:
        try:
            self._each(lambda density, one: density._terms(one, prior=False)[0], u, _require)
        except NotImplementedError as reason:
            name = self._unvectorizable(u)
            raise NotImplementedError(f"site '{name}': {reason}" if name else str(reason)) from reason

    def _unvectorizable(self, u: Tensor) -> str | None:
        """Name of the site whose log-probability vmap cannot take, if it is one."""
        failed: list[str] = []

        def attempt(density: LogDensity, one: Tensor) -> Tensor:
            for name, site in density.read(one).trace.nodes.items():
                if site["type"] == "sample" and not site_is_subsample(site):
                    failed[:] = [name]
                    site["fn"].log_prob(site["value"])
            failed.clear()
            return one.sum()

        try:
            self._each(attempt, u, _require)
        except NotImplementedError:
            pass
        return failed[0] if failed else None

    def with_start(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """``log pi(u)`` and the prior's log density ``log p(z(u)) + log |dz/du|``, both ``(chains, rows)``."""
        return self._each(lambda density, one: density._terms(one, prior=True), u)

    def differentiable(self, u: Tensor, parameters: bool) -> Tensor:
        """``log pi(u)``, differentiable in ``u`` and, if asked for, the model's parameters, which show to handlers.

        :raises NotImplementedError: where a site's support depends on parameters: their gradient would not be that at
            fixed site values.
        """
        known = self.structure.vectorizes
        if parameters and "parameters move supports" not in known:
            values, jacobian = self.constrain(u.detach())
            known["parameters move supports"] = any(t.requires_grad for t in (jacobian, *values.values()))
        if parameters and known["parameters move supports"]:
            raise NotImplementedError("a latent site's support depends on parameters: use Trace_ELBO.")
        with torch.set_grad_enabled(parameters or u.requires_grad), self._program.showing_parameters():
            return self.eager(u)

    def start_terms(self, reading: Reading) -> tuple[Tensor, Tensor] | None:
        """What :meth:`with_start` gives, of the run of the model that drew the state; None where that run does not
        tell (enumerated sites are not drawn), one chain."""
        if self.structure.summed:
            return None
        with pyro.validation_enabled(False):
            reading.trace.compute_log_prob()
            joint, prior = self._terms_of(reading, prior=True)
        return joint.unsqueeze(0), prior.unsqueeze(0)

    def land(self, u: Tensor) -> tuple[Tensor, ...]:
        """``log pi(u)``, ``log |dz/du|`` and the site values there, from one run of the model."""

        def one_chain(density: LogDensity, one: Tensor) -> tuple[Tensor, ...]:
            reading = density._run(one)
            values = (reading.trace.nodes[k]["value"] for k in self._sites)
            return density._terms_of(reading, prior=False)[0], density._jacobian(reading), *values

        return self._each(one_chain, u)

    def with_readings(self, u: Tensor, extract: Callable[[Reading], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """``log pi(u)``, ``(chains, rows)``, and what ``extract`` takes from the run of the model, by chain."""

        def one_chain(density: LogDensity, one: Tensor) -> tuple[Tensor, ...]:
            reading = density._run(one)
            return density._terms_of(reading, prior=False)[0], *extract(reading)

        return self._each(one_chain, u)

    def constrain(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Site values ``(chains, *batch, *event)`` and ``log |dz/du|`` per row, ``(chains, rows)``.

        Supports and masks may depend on other sites, so they are read at ``u``, by a run of the model.
        """

        def one_chain(density: LogDensity, one: Tensor) -> tuple[Tensor, ...]:
            reading = density.read(one)
            return *(reading.trace.nodes[k]["value"] for k in self._sites), density._jacobian(reading)

        *values, jacobian = self._each(one_chain, u)
        return dict(zip(self._sites, values, strict=True)), jacobian

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """Site values of one chain to ``(rows, size)``."""
        with pyro.validation_enabled(False):
            return self.layout.pack(self._program.run(self.bind, values, free=False).unconstrained)

    def offender(self, u: Tensor) -> str:
        """Name and value of the first site whose log density is not finite at ``u`` (one chain)."""
        reading = self._run(u)
        for name, site in reading.trace.nodes.items():
            if site["type"] == "sample" and not torch.isfinite(site["log_prob"]).all():
                value = site["value"]
                bad = ", ".join(f"{v:.4g}" for v in value.detach().flatten()[:3].tolist())
                return f"site '{name}' (value {bad}{', ...' if value.numel() > 3 else ''})"
        return "the gradient of the log density"

    def _each(self, fn: Callable[[LogDensity, Tensor], Any], u: Tensor, mapper: Callable[..., Any] = map_chains) -> Any:
        """``fn(density, state)`` over chains, with every chain's own subsample where there is one."""
        names = list(self._batches)

        def one_chain(one: Tensor, *batch: Tensor) -> Any:
            if not names:
                return fn(self, one)
            bind = replace(self.bind, indices={**self.bind.indices, **dict(zip(names, batch, strict=True))})
            return fn(LogDensity(self._program, self.structure, bind), one)

        return mapper(one_chain, (u, *self._batches.values()), self.structure.vectorizes)

    @torch.no_grad()
    def is_random(self, u: Tensor) -> bool:
        """Whether two evaluations at the same states differ, which is warned about."""
        random = not torch.allclose(self.eager(u), self.eager(u), rtol=1e-4, atol=1e-6, equal_nan=True)
        if random:
            warnings.warn(
                "the model's log density is random (two evaluations at the same latents differ): put dropout "
                "in eval mode and sample nothing inside the model except through pyro.sample.",
                stacklevel=2,
            )
        return random

    @torch.no_grad()
    def rows_mix(self, u: Tensor) -> bool:
        """Whether rows that should be independent change with their neighbours at these states."""
        if self.layout.rows < 2:
            return False
        other = u.clone()
        other[:, ::2] = u.roll(1, 1)[:, ::2]
        here, there = self.eager(u), self.eager(other)
        return not torch.allclose(here[:, 1::2], there[:, 1::2], rtol=1e-3, atol=1e-5, equal_nan=True)

    def warn_if_rows_mix(self, u: Tensor) -> None:
        """Warn where the density is random, or where rows that should be independent are not (one chain)."""
        if self.is_random(u):
            return
        if self.layout.arrow is not None:
            self._warn_if_blocks_mix(u, self.layout.arrow)
        elif self.rows_mix(u):
            warnings.warn(
                f"elements of plate {self.row_names} influence each other's log density although a plate declares "
                "them independent: put batch normalisation in eval mode (every step of a run would also "
                "update its running statistics), or remove the plate.",
                stacklevel=2,
            )

    @property
    def row_names(self) -> str:
        """The plates whose elements are the rows, for messages."""
        return ", ".join(f"'{p.name}'" for p in self.layout.row_plates)

    def jointly(self) -> LogDensity:
        """The same density with all latents in one row."""
        structure = replace(self.structure, layout=Layout(self.layout.sites, ()), vectorizes={})
        return LogDensity(self._program, structure, self.bind)

    def _warn_if_blocks_mix(self, u: Tensor, arrow: Arrow) -> None:
        """The same for an arrowhead: the Hessian must not connect the first local block to the others."""
        leaf = u.detach().clone().requires_grad_()
        _, grad = self.value_and_grad(leaf, create_graph=True)
        vector = torch.zeros_like(u)
        first = slice(arrow.shared, arrow.shared + arrow.local)
        vector[..., first] = 1.0
        column = self.hessian_product(leaf, grad, create_graph=False)(vector.unsqueeze(0))[0, 0, 0]
        rest = column[arrow.shared + arrow.local :].abs()
        if rest.numel() and rest.max() > 1e-4 * (1 + column[first].abs().max()):
            warnings.warn(
                f"elements of plate {self.row_names} influence each other's log density although a plate declares them "
                "independent: log q is wrong; remove the plate.",
                stacklevel=2,
            )

    def read(self, u: Tensor) -> Reading:
        """The model run at one state, ``(rows, size)``."""
        with pyro.validation_enabled(False):
            return self._program.run(self.bind, self.layout.unpack(u))

    def _run(self, u: Tensor) -> Reading:
        reading = self.read(u)
        with pyro.validation_enabled(False):
            reading.trace.compute_log_prob()
        return reading

    def _terms(self, u: Tensor, prior: bool) -> tuple[Tensor, ...]:
        """Rows of ``log pi`` and, if asked for, of the prior, from one run of the model."""
        return self._terms_of(self._run(u), prior)

    def _terms_of(self, reading: Reading, prior: bool) -> tuple[Tensor, ...]:
        sites = [s for s in reading.trace.nodes.values() if s["type"] == "sample"]
        sites = [s for s in sites if not site_is_subsample(s)]
        summed = enumerated_factors(reading.trace, sites) if self.structure.summed else {}
        joint = [self.layout.sum_to_rows(s["log_prob"], plates_of(s)) for s in sites if s["name"] not in summed]
        joint.append(self._jacobian(reading, joint=True))
        if summed:
            joint.append(self._contract(reading.trace, summed, scaled=True))
        if not prior:
            return (sum(joint),)  # type: ignore[return-value]
        rows = [self._prior_rows(s) for s in reading.latents if s["name"] not in summed]
        if any(s["name"] in summed for s in reading.latents):
            unobserved = {k: s for k, s in summed.items() if not s["is_observed"]}
            rows.append(self._contract(reading.trace, unobserved, scaled=False))
        return sum(joint), sum(rows) + self._jacobian(reading)  # type: ignore[return-value]

    def _prior_rows(self, site: Site) -> Tensor:
        term = masked(site["unscaled_log_prob"], site["mask"])
        return self._weighted_rows(term, self._sites[site["name"]])

    def _jacobian(self, reading: Reading, joint: bool = False) -> Tensor:
        """``log |dz/du|`` per row, masked sites left out; scaled like log-probabilities if part of the ``joint``."""
        first = next(iter(reading.unconstrained.values()))
        rows = first.new_zeros(self.layout.rows)
        for site in reading.latents:
            term = reading.log_jacobian(site)
            if isinstance(term, Tensor):
                shape, term = self._sites[site["name"]], masked(term, site["mask"])
                scaled = self.layout.sum_to_rows(shape.scale * term, shape.plates) if joint else None
                rows = rows + (self._weighted_rows(term, shape) if scaled is None else scaled)
        return rows

    def _weighted_rows(self, term: Tensor, site: LatentSite) -> Tensor:
        """Parts of log q: an arrowhead's local sites count ``full_size / size`` times (its one row is not
        inside the plate, so Pyro will not scale it)."""
        weight = site.scale if self.layout.is_arrow else 1.0
        return self.layout.sum_to_rows(weight * term, site.plates)

    def _contract(self, trace: poutine.Trace, sites: Mapping[str, Site], scaled: bool) -> Tensor:
        """Sum the enumerated sites out of the product of ``sites``, to rows."""
        term = marginal(trace, sites, () if self.layout.is_arrow else self.layout.row_plates)
        if scaled:
            term = term * common_scale(sites)
        return self.layout.sum_to_rows(term, self.layout.row_plates)

    def pointwise(self, reading: Reading, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Log-probability of every element of data sites, unscaled, zero where masked, enumerated sites summed out.

        :param shapes: batch shapes by name, without enumeration dims.

        Data whose elements the enumerated sites tie together have no such value and are left out.
        """
        trace = reading.trace
        trace.compute_log_prob()
        sites = [s for s in trace.nodes.values() if s["type"] == "sample" and not site_is_subsample(s)]
        summed = enumerated_factors(trace, sites) if self.structure.summed else {}
        result = {}
        for name, batch in shapes.items():
            site = trace.nodes[name]
            if name not in summed:
                term = masked(site["unscaled_log_prob"], site["mask"])
            elif all(set(plates_of(s)) == set(plates_of(site)) for k, s in summed.items()) and not any(
                is_data(s) for k, s in summed.items() if k != name
            ):
                term = marginal(trace, summed, plates_of(site))
            else:
                continue
            shape = torch.broadcast_shapes(batch, _trimmed(term.shape, batch))
            result[name] = term.reshape(_trimmed(term.shape, batch)).expand(shape)
        return result


def _trimmed(shape: torch.Size, batch: torch.Size) -> torch.Size:
    """``shape`` without dims of size one to the left of ``batch``, as summing out enumerated sites leaves them."""
    extra = max(len(shape) - len(batch), 0)
    return shape[extra:] if shape[:extra].numel() == 1 else shape


def _require(fn: Callable[..., Any], inputs: tuple[Tensor, ...], vectorizes: dict[str, bool]) -> None:
    require_vmap(fn, inputs)
