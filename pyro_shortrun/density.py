"""A Pyro program as an unconstrained log density over rows.

:class:`LogDensity` is, for fixed model arguments,

    log pi(u) = log p(x, z(u)) + log |dz/du|,      z = biject_to(support)(u),

with every observed site and ``pyro.factor`` in it, enumerated discrete sites summed out, in nats, upwards.
:func:`read_structure` decides the rows. Only this module and :mod:`pyro_shortrun.program` read model traces.
"""

from __future__ import annotations

import logging
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from opt_einsum import shared_intermediates
from pyro import poutine
from pyro.ops import packed
from pyro.ops.contract import contract_to_tensor
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .layout import Arrow, LatentSite, Layout, Plate
from .program import Binding, Program, Reading, Site, is_data, masked, plates_of

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Structure:
    """What stays the same between calls whose sites, shapes and plates are the same."""

    layout: Layout
    data: frozenset[str]
    summed: bool  # some discrete site is enumerated
    dtype: torch.dtype
    device: torch.device
    vectorizes: dict[str, bool] = field(default_factory=dict)  # found out on first use, see `map_chains`


def read_structure(program: Program, reading: Reading, bind: Binding) -> Structure:
    """Decide the rows from a draw and one evaluation in which the latents require gradients."""
    sites = [
        LatentSite(
            s["name"],
            torch.Size(s["fn"].batch_shape),
            reading.unconstrained[s["name"]].shape[len(s["fn"].batch_shape) :],
            plates_of(s),
        )
        for s in reading.latents
    ]
    leaves = {k: v.detach().clone().requires_grad_() for k, v in reading.unconstrained.items()}
    _check_dtypes(leaves)
    with torch.enable_grad(), pyro.validation_enabled(False):
        probe = program.run(bind, leaves)
        probe.trace.compute_log_prob()
        rows = _row_plates(sites, probe, leaves)
    first = next(iter(leaves.values()))
    return Structure(
        layout=Layout(tuple(sites), rows),
        data=frozenset(k for k, s in reading.trace.nodes.items() if is_data(s) and k not in bind.given),
        summed=bind.enum_dim is not None,
        dtype=first.dtype,
        device=first.device,
    )


def _check_dtypes(values: Mapping[str, Tensor]) -> None:
    kinds = {(v.dtype, v.device): k for k, v in values.items()}
    if len(kinds) > 1:
        found = ", ".join(f"'{k}' is {d} on {dev}" for (d, dev), k in kinds.items())
        raise ValueError(
            f"latent sites must share one dtype and device, but {found}: cast the distributions' parameters."
        )


def _row_plates(sites: list[LatentSite], probe: Reading, leaves: Mapping[str, Tensor]) -> tuple[Plate, ...]:
    """Plates common to all latents that lie in any plate, less those across which something couples them."""
    plated = [set(s.plates) for s in sites if s.plates]
    common = set.intersection(*plated) if plated else set()

    def couples(plate: Plate) -> bool:
        local = [leaves[s.name] for s in sites if plate in s.plates]
        for site in probe.trace.nodes.values():
            if site["type"] != "sample" or site_is_subsample(site) or plate in plates_of(site):
                continue
            if "_enumerate_dim" in site["infer"] or _reaches(site["log_prob"], local):
                return True
        return False

    return tuple(sorted((p for p in common if not couples(p)), key=lambda p: p.dim))


def _reaches(term: Any, leaves: list[Tensor]) -> bool:
    if not (isinstance(term, Tensor) and term.requires_grad):
        return False
    grads = torch.autograd.grad(term.sum(), leaves, retain_graph=True, allow_unused=True)
    return any(g is not None for g in grads)


class LogDensity:
    """Unconstrained log density of a bound model, over states ``u`` of shape ``(chains, rows, size)``.

    ``u -> log pi`` of shape ``(chains, rows)``; the sum over rows equals the trace's ``log_prob_sum`` plus
    log-Jacobians. Chains are vectorised with ``torch.func.vmap`` where the model allows it and looped otherwise.
    """

    def __init__(self, program: Program, structure: Structure, bind: Binding) -> None:
        self.structure, self.layout, self.bind = structure, structure.layout, bind
        self._program = program
        self._sites = {site.name: site for site in self.layout.sites}

    def __call__(self, u: Tensor) -> Tensor:
        """``log pi(u)``, ``(chains, rows)``."""
        return self._each(lambda one: self._terms(one, prior=False)[0], u)

    def with_start(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """``log pi(u)`` and the prior's log density ``log p(z(u)) + log |dz/du|``, both ``(chains, rows)``."""
        return self._each(lambda one: self._terms(one, prior=True), u)

    def value_and_grad(self, u: Tensor, create_graph: bool = False) -> tuple[Tensor, Tensor]:
        """``log pi(u)`` and its gradient; ``u`` must require gradients when a graph is wanted."""
        with torch.enable_grad():
            if not u.requires_grad:
                u = u.detach().requires_grad_()
            value = self(u)
            if not value.requires_grad:  # the density is constant in u
                return value, torch.zeros_like(u)
            (grad,) = torch.autograd.grad(value.sum(), u, create_graph=create_graph, materialize_grads=True)
        return (value if create_graph else value.detach()), grad

    def hessian_product(self, u: Tensor, grad: Tensor, create_graph: bool) -> Callable[[Tensor], Tensor]:
        """Products ``v -> H v`` for ``v`` of shape ``(m, chains, rows, size)``, from a ``grad`` with graph."""

        def product(vectors: Tensor) -> Tensor:
            if not grad.requires_grad:
                return torch.zeros_like(vectors)
            options = dict(retain_graph=True, create_graph=create_graph, materialize_grads=True)
            if self.structure.vectorizes.get("hessian", True):
                try:
                    (out,) = torch.autograd.grad(grad, u, vectors, is_grads_batched=True, **options)
                    return out
                except (RuntimeError, NotImplementedError):  # an operation without a batching rule
                    self.structure.vectorizes["hessian"] = False
            return torch.stack([torch.autograd.grad(grad, u, v, **options)[0] for v in vectors])

        return product

    def constrain(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Site values ``(chains, *batch, *event)`` and ``log |dz/du|`` per row, ``(chains, rows)``.

        Supports and masks may depend on other sites, so they are read at ``u``, by a run of the model.
        """

        def one_chain(one: Tensor) -> tuple[Tensor, ...]:
            with pyro.validation_enabled(False):
                reading = self._program.run(self.bind, self.layout.unpack(one))
            return *(reading.trace.nodes[k]["value"] for k in self._sites), self._jacobian(reading)

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

    def _each(self, fn: Callable[[Tensor], Any], u: Tensor) -> Any:
        if u.shape[0] == 1:
            out = fn(u[0])
            return tuple(t.unsqueeze(0) for t in out) if isinstance(out, tuple) else out.unsqueeze(0)
        return map_chains(fn, u, self.structure.vectorizes)

    def warn_if_rows_mix(self, u: Tensor) -> None:
        """Warn where the density is random, or where rows that should be independent are not (one chain)."""
        with torch.no_grad():
            first, again = self(u), self(u)
            if not torch.allclose(first, again, rtol=1e-4, atol=1e-6, equal_nan=True):
                warnings.warn(
                    "the model's log density is random (two evaluations at the same latents differ): put dropout "
                    "in eval mode and sample nothing inside the model except through pyro.sample.",
                    stacklevel=2,
                )
            elif self.layout.arrow is not None:
                self._warn_if_blocks_mix(u, self.layout.arrow)
            elif self.layout.rows > 1:
                other = u.clone()
                other[:, ::2] = u.roll(1, 1)[:, ::2]
                if not torch.allclose(first[:, 1::2], self(other)[:, 1::2], rtol=1e-3, atol=1e-5, equal_nan=True):
                    names = ", ".join(f"'{p.name}'" for p in self.layout.row_plates)
                    warnings.warn(
                        f"elements of plate {names} influence each other's log density although a plate declares "
                        "them independent: put batch normalisation in eval mode (every step of a run would also "
                        "update its running statistics), or remove the plate.",
                        stacklevel=2,
                    )

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
            names = ", ".join(f"'{p.name}'" for p in self.layout.row_plates)
            warnings.warn(
                f"elements of plate {names} influence each other's log density although a plate declares them "
                "independent: log q is wrong; remove the plate.",
                stacklevel=2,
            )

    def _run(self, u: Tensor) -> Reading:
        with pyro.validation_enabled(False):
            reading = self._program.run(self.bind, self.layout.unpack(u))
            reading.trace.compute_log_prob()
        return reading

    def _terms(self, u: Tensor, prior: bool) -> tuple[Tensor, ...]:
        """Rows of ``log pi`` and, if asked for, of the prior, from one run of the model."""
        reading = self._run(u)
        sites = [s for s in reading.trace.nodes.values() if s["type"] == "sample"]
        sites = [s for s in sites if not site_is_subsample(s)]
        summed = _enumerated_factors(reading.trace, sites) if self.structure.summed else {}
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
        """Sum the enumerated sites out of the product of ``sites``."""
        plates = trace.plate_to_symbol
        factors: OrderedDict = OrderedDict()
        for site in sites.values():
            ordinal = frozenset(plates[p.name] for p in plates_of(site))
            term = packed.scale_and_mask(site["packed"]["unscaled_log_prob"], mask=site["packed"]["mask"])
            factors.setdefault(ordinal, []).append(term)
        dims = set(trace.symbol_to_dim) - set(plates.values())
        rows = frozenset(plates[p.name] for p in self.layout.row_plates if not self.layout.is_arrow)
        with shared_intermediates() as cache:
            term = contract_to_tensor(factors, dims, target_ordinal=rows, cache=cache)
        term = packed.unpack(term, trace.symbol_to_dim)
        if scaled:
            term = term * _common_scale(sites)
        return self.layout.sum_to_rows(term, self.layout.row_plates)


def _enumerated_factors(trace: poutine.Trace, sites: list[Site]) -> dict[str, Site]:
    """The sites whose log-probability has an enumerated dimension."""
    trace.pack_tensors()
    plates = set(trace.plate_to_symbol.values())
    enumerated = set(trace.symbol_to_dim) - plates
    return {s["name"]: s for s in sites if not enumerated.isdisjoint(s["packed"]["unscaled_log_prob"]._pyro_dims)}


def _common_scale(sites: Mapping[str, Site]) -> Any:
    """As in TraceEnum_ELBO: the scale stands outside the sum over the discrete sites, so it must be one."""
    scales = [s["scale"] for s in sites.values()]
    if any(not torch.equal(torch.as_tensor(s), torch.as_tensor(scales[0])) for s in scales):
        raise ValueError(
            "enumerated sites and what depends on them must share one poutine.scale (or subsampled plate); "
            f"found {sorted(float(torch.as_tensor(s)) for s in scales)} at {sorted(sites)}."
        )
    return scales[0]


def map_chains(fn: Callable[[Tensor], Any], u: Tensor, vectorizes: dict[str, bool], key: str = "density") -> Any:
    """``fn`` (to a tensor or a tuple of tensors) over the leading axis of ``u``.

    By ``vmap``, or one after the other where an operation cannot be vectorised; which of the two is remembered in
    ``vectorizes[key]``.
    """
    if vectorizes.get(key, True):
        try:
            with pyro.validation_enabled(False), warnings.catch_warnings():
                # torch itself loops over an operation without a batching rule, and says so.
                warnings.filterwarnings("ignore", message="There is a performance drop")
                return torch.func.vmap(fn, randomness="different")(u)
        except (RuntimeError, NotImplementedError, ValueError, AttributeError, TypeError) as reason:
            vectorizes[key] = False
            _LOGGER.info("chains run one after the other, since vmap failed: %s", reason)
    each = [fn(one) for one in u]
    return tuple(map(torch.stack, zip(*each, strict=True))) if isinstance(each[0], tuple) else torch.stack(each)


def bind_model(model: Callable, args: tuple, kwargs: dict) -> LogDensity:
    """The log density of ``model(*args, **kwargs)``, structure read from one draw of the prior."""
    program = Program(model)
    reading = program.draw(args, kwargs)
    program.check(reading)
    bind = Binding(args, kwargs, reading.indices, {}, program.enum_dim(reading))
    return LogDensity(program, read_structure(program, reading, bind), bind)


def check_data(first: Structure, reading: Reading) -> None:
    """Refuse a call in which a site of the set-up's data is not observed."""
    nodes = reading.trace.nodes.items()
    missing = sorted(first.data - {k for k, s in nodes if s["type"] == "sample" and s["is_observed"]})
    if missing:
        raise ValueError(
            f"site '{missing[0]}' was observed when the guide was set up and is not now. The posterior depends "
            "on the data: call guide.condition_on(*training_args) before Predictive(model, guide=guide), or "
            "pass the observation."
        )


def check_latents(first: Structure | None, now: Structure, needs_log_q: bool) -> None:
    """Refuse latents that differ from those of the first call, other than in the number of rows."""
    if now.layout.unscalable is not None and needs_log_q:
        raise NotImplementedError(
            f"latent site '{now.layout.unscalable}' lies in a subsampled plate that the other latents do not "
            "share, so its part of log q cannot be scaled: use the full batch, or put all local latents into "
            "one plate."
        )
    if first is None:
        return
    new, old = now.layout.row_sizes, first.layout.row_sizes
    if set(new) != set(old):
        raise ValueError(
            f"the model's latent sites changed between calls, from {sorted(old)} to {sorted(new)}; use one "
            "guide per model."
        )
    for name in old:
        if old[name] != new[name]:
            raise ValueError(
                f"latent site '{name}' has {new[name]} values in a row, {old[name]} when the guide was set up: only "
                "the size of the plate that makes the rows may change between calls."
            )


def check_shapes(program: Program, conditioned: tuple[tuple, dict], now: tuple[tuple, dict]) -> None:
    """Refuse latents drawn for conditioned arguments where this call's arguments want other shapes."""
    wanted = program.draw(*now).unconstrained
    for name, value in program.draw(*conditioned).unconstrained.items():
        if name in wanted and wanted[name].shape != value.shape:
            raise ValueError(
                f"latent site '{name}' has unconstrained shape {tuple(value.shape)} for the arguments given "
                f"to condition_on but {tuple(wanted[name].shape)} for this call's arguments: local latents of the "
                "training data do not fit other data. Call guide.forget() to infer the new data's latents."
            )
