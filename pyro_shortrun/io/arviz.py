"""Results to ArviZ: draws, statistics, pointwise likelihoods, predictions, prior and data under the plates' names."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import numpy as np
import torch
from pyro.infer import MCMC
from pyro.infer.mcmc.api import StreamingMCMC
from torch import Tensor

from ..amortized.guide import LangevinEncoderGuide
from ..checks import check_count
from ..density.call import Call
from ..density.handlers import init_uniform
from ..density.pointwise import pointwise
from ..density.program import Reading
from ..density.sites import is_computed, is_data, plates_of
from ..density.vectorize import map_chains
from ..guides.short_run import ShortRunGuide
from ..mcmc.target import ModelTarget
from ..mcmc.vectorized import VectorizedMCMC
from ..tensors import ordinary_autograd, plain

_LOGGER = logging.getLogger("pyro_shortrun")
_AT_ONCE = 2048  # draws
_RESERVED = {"chain", "draw", "sample"}
_STATS = {"lp", "log_p", "log_q", "acceptance_rate", "grad_norm", "step_size", "nonfinite", "diverging"}
Draws = dict[str, Tensor]


@dataclass(frozen=True)
class _Posterior:
    """Draws and statistics ``(chains, draws, ...)``, and the bound model they belong to (None for a potential_fn)."""

    draws: Draws
    stats: Draws
    call: Call | None


@dataclass
class _Axes:
    """Names of dimensions by variable, and coordinates of the plates."""

    dims: dict[str, list[str]] = field(default_factory=dict)
    coords: dict[str, np.ndarray] = field(default_factory=dict)


def to_arviz(
    source: ShortRunGuide | LangevinEncoderGuide | MCMC | VectorizedMCMC,
    *args: Any,
    num_samples: int = 1000,
    num_chains: int = 4,
    num_prior: int = 500,
    log_likelihood: bool = True,
    posterior_predictive: bool = True,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, list[str]] | None = None,
    **kwargs: Any,
) -> Any:
    r"""Export to ArviZ: an ``InferenceData`` (arviz 0.x) or a ``DataTree`` (arviz 1.x).

    Groups: ``posterior`` (with ``pyro.deterministic`` sites), ``sample_stats``, ``log_likelihood`` (one value per
    observation), ``posterior_predictive``, ``prior``, ``prior_predictive``, ``observed_data``. Dimensions are named
    after the model's plates, whose indices are their coordinates. Names that ArviZ cannot take are changed: ``a/b`` to
    ``a.b``, and ``chain``, ``draw``, ``sample`` and the statistics' names get ``_site`` or ``_plate``
    appended.

    A guide's draws are independent runs, exported as ``(chain, draw)``, so that R-hat and everything that wants chains
    works. Its ``sample_stats`` hold ``log_q``, the log density of each draw as its objective accounts for it (given the
    noise path for :class:`PathDensity`), and ``log_p``, the model's log joint there, both over the sites themselves in
    nats: importance weights are ``exp(log_p - log_q)``, for ``az.psislw`` and ``loo_approximate_posterior``. A start
    without a density (:class:`Persistent`) has neither, nor has :class:`Linearized`. Those of a
    :class:`LangevinEncoderGuide` are Markov chains on these data, each from the guide's map after 200 transitions.

    A chain's ``sample_stats`` hold ``lp`` (log density in unconstrained space), ``acceptance_rate``, ``grad_norm``,
    ``step_size``, ``nonfinite`` and ``diverging`` (``nonfinite > 0``). Other kernels of Pyro give what they report.

    Replicated data are drawn with discrete latents drawn anew. Enumerated sites are summed out of the pointwise
    likelihood; where they tie observations together (a hidden Markov model) there is none, and where the prior is
    improper there is no prior; a logged warning says so.

    :param source: a guide, or a finished :class:`pyro.infer.MCMC` or :class:`VectorizedMCMC`.
    :param args: the model's arguments; a finished MCMC remembers its own.
    :param num_samples: draws per chain, for guides.
    :param num_chains: chains, for guides.
    :param num_prior: draws from the prior; 0 for none.
    :param log_likelihood: whether to compute it.
    :param posterior_predictive: whether to draw it.
    :param coords: coordinates that replace or add to the plates' own.
    :param dims: names of dimensions of a variable, instead of those from plates.
    :raises ValueError: for sources that keep no draws.
    """
    if num_prior != 0:
        check_count("num_prior", num_prior)
    posterior = _read(source, plain(args), plain(kwargs), num_samples, num_chains)
    groups: dict[str, Draws] = {"posterior": dict(posterior.draws)}
    axes = _Axes()
    if posterior.call is not None:
        model = _Model(posterior.call)
        axes = model.axes()
        missing = [s.name for s in posterior.call.density.layout.sites if s.name not in posterior.draws]
        if missing:
            _LOGGER.warning("draws of %s were not kept: nothing that needs them is exported.", missing)
            log_likelihood = posterior_predictive = False
        shape = next(iter(posterior.draws.values())).shape[:2]
        flat = {k: v.flatten(0, 1) for k, v in posterior.draws.items()}
        pointwise, computed = ({}, {}) if missing else model.at(flat)
        groups["posterior"] |= _grouped(computed, shape)
        if log_likelihood:
            groups["log_likelihood"] = _grouped(pointwise, shape)
        if posterior_predictive:
            drawn = model.simulate(flat, len(next(iter(flat.values()))))
            groups["posterior_predictive"] = _grouped({k: drawn[k] for k in model.data}, shape)
        groups |= model.prior(num_prior)
        groups["observed_data"] = model.data
    axes.dims.update({k: list(v) for k, v in (dims or {}).items()})
    axes.coords.update(coords or {})
    arrays = {k: {_variable(name): _numpy(v) for name, v in group.items()} for k, group in groups.items() if group}
    if posterior.stats:
        arrays["sample_stats"] = {k: _numpy(v) for k, v in posterior.stats.items()}
    return _from_dict(arrays, axes)


def _grouped(draws: Draws, shape: torch.Size) -> Draws:
    return {k: v.unflatten(0, tuple(shape)) for k, v in draws.items()}


def _numpy(value: Tensor) -> np.ndarray:
    return value.detach().cpu().numpy()


# -------------------------------------------------------------------------------------------- where draws come from


def _read(source: Any, args: tuple[Any, ...], kwargs: dict[str, Any], num_samples: int, num_chains: int) -> _Posterior:
    if isinstance(source, ShortRunGuide):
        check_count("num_samples", num_samples)
        check_count("num_chains", num_chains)
        return _of_guide(source, args, kwargs, num_samples, num_chains)
    if isinstance(source, LangevinEncoderGuide):
        bound, draws, density = source.chain_draws(args, kwargs, num_samples, num_chains)
        return _Posterior(draws, {"lp": density}, bound)
    if isinstance(source, VectorizedMCMC):
        if not source.has_draws:
            raise ValueError("this VectorizedMCMC has no draws yet; call mcmc.run(*args) first.")
        target = source.target
        call = target.call if isinstance(target, ModelTarget) else None
        if call is not None and (args or kwargs):
            call = _bound(source.kernel.model, args, kwargs)
        return _Posterior(source.get_samples(group_by_chain=True), _chain_stats(source.sample_stats), call)
    if isinstance(source, MCMC):
        if source._samples is None:
            raise ValueError("this MCMC has no draws yet; call mcmc.run(*args) first.")
        if not (args or kwargs):
            args, kwargs = plain(source._args), plain(source._kwargs)
        call = _bound(getattr(source.kernel, "model", None), args, kwargs)
        return _Posterior(source.get_samples(group_by_chain=True), _pyro_stats(source), call)
    if isinstance(source, StreamingMCMC):
        raise ValueError("StreamingMCMC keeps no draws to export; use MCMC or VectorizedMCMC.")
    raise ValueError(
        "to_arviz takes a ShortRunGuide, a LangevinEncoderGuide, or a pyro.infer.MCMC or VectorizedMCMC that has run, "
        f"got {type(source)!r}."
    )


def _bound(model: Callable[..., Any] | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    if model is None:
        return None
    return Call.of(model, args, kwargs, init_uniform)


def _of_guide(
    guide: ShortRunGuide, args: tuple[Any, ...], kwargs: dict[str, Any], num_samples: int, num_chains: int
) -> _Posterior:
    call, drawn = guide.weighted_draws(args, kwargs, num_samples * num_chains)
    shape = torch.Size((num_chains, num_samples))
    densities = {"log_p": drawn.log_p, "log_q": drawn.log_q, "lp": drawn.log_density}
    stats = {k: v for k, v in densities.items() if v is not None}
    stats |= {"nonfinite": drawn.nonfinite, "diverging": drawn.nonfinite > 0}
    return _Posterior(_grouped(drawn.values, shape), _grouped(stats, shape), call)


def _chain_stats(stats: Mapping[str, Tensor]) -> Draws:
    return {**stats, "diverging": stats["nonfinite"] > 0}


def _pyro_stats(mcmc: MCMC) -> Draws:
    """What a kernel's diagnostics tell of each draw."""
    reports: list[dict[str, Any]] = mcmc._diagnostics  # type: ignore[assignment]  # filled by run()
    if all("sample_stats" in r for r in reports):
        names = reports[0]["sample_stats"].values
        return _chain_stats({k: torch.stack([r["sample_stats"].values[k] for r in reports]) for k in names})
    if all("divergences" in r for r in reports):
        diverging = torch.zeros(mcmc.num_chains, mcmc.num_samples, dtype=torch.bool, device="cpu")
        for row, report in zip(diverging, reports, strict=True):
            row[report["divergences"]] = True
        return {"diverging": diverging}
    return {}


# -------------------------------------------------------------------------------------------- the model at the draws


class _Model:
    """Evaluates and simulates a bound model at many draws, vectorised where it can be."""

    def __init__(self, call: Call) -> None:
        self.call = call
        nodes = call.reading.trace.nodes
        self._observed = {k: s for k, s in nodes.items() if is_data(s)}
        self._computed = {k: s for k, s in nodes.items() if is_computed(s)}
        self.data = {k: _observation(s) for k, s in self._observed.items()}

    def axes(self) -> _Axes:
        """Names of every site's dimensions, and the indices of plates."""
        sites = [*self.call.reading.latents, *self._observed.values(), *self._computed.values()]
        indices = self.call.reading.indices
        axes = _Axes()
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
                names.append(_plate_name(plate.name) if named else f"{_variable(site['name'])}_dim_{i}")  # type: ignore[union-attr]
            axes.dims[_variable(site["name"])] = names
            for plate in plates.values():
                axes.coords[_plate_name(plate.name)] = indices[plate.name].cpu().numpy()
        return axes

    def _shape(self, site: Any) -> torch.Size:
        return self.data[site["name"]].shape if site["name"] in self.data else _shape(site)

    def at(self, draws: Draws) -> tuple[Draws, Draws]:
        """Log-probability of every observation, and deterministic sites, at posterior draws."""
        call, names = self.call, [s.name for s in self.call.density.layout.sites]
        shapes = {k: s["fn"].batch_shape for k, s in self._observed.items()}

        def evaluate(*values: Tensor) -> tuple[dict[str, Tensor], Reading]:
            reading = call.program.run(call.bind, dict(zip(names, values, strict=True)), free=False)
            return pointwise(call.model.structure, reading, shapes), reading

        def flat(*values: Tensor) -> tuple[Tensor, ...]:
            terms, reading = evaluate(*values)
            return *terms.values(), *(reading.trace.nodes[k]["value"] for k in self._computed)

        with ordinary_autograd(), torch.no_grad():
            found = list(evaluate(*(draws[k][0] for k in names))[0])
        if set(found) != set(self._observed):
            _LOGGER.warning(
                "enumerated sites tie the elements of %s together: no pointwise log_likelihood of theirs is exported.",
                sorted(set(self._observed) - set(found)),
            )
        if not found and not self._computed:
            return {}, {}
        out = self._map(flat, tuple(draws[k] for k in names), "export")
        count = len(found)
        return dict(zip(found, out[:count], strict=True)), dict(zip(self._computed, out[count:], strict=True))

    def simulate(self, draws: Draws, count: int) -> Draws:
        """Every latent, deterministic and data site drawn anew, but for those in ``draws``."""
        latent = [k for k in (s.name for s in self.call.density.layout.sites) if k in draws]
        names = [*(s.name for s in self.call.density.layout.sites), *self._computed, *self._observed]

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
        drawn = _grouped(drawn, torch.Size((1, count)))
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


def _variable(name: str) -> str:
    """A site's name as xarray and NetCDF allow it; ArviZ has one dict of dims for all groups, statistics included."""
    return f"{name}_site" if name in _RESERVED | _STATS else name.replace("/", ".")


# -------------------------------------------------------------------------------------------- ArviZ


def _from_dict(groups: Mapping[str, Mapping[str, np.ndarray]], axes: _Axes) -> Any:
    """The one door to ArviZ, whose ``from_dict`` takes groups as keywords up to 0.x and as a dict from 1.0."""
    import arviz as az

    used = set(_chained(axes.dims.get(k, []) for group in groups.values() for k in group))
    coords = {k: v for k, v in axes.coords.items() if k in used}
    options: dict[str, Any] = {"coords": coords, "dims": axes.dims}
    if int(az.__version__.split(".")[0]) < 1:
        data = az.from_dict(**dict(groups), **options)  # type: ignore[arg-type]
    else:
        data = az.from_dict(groups, **options)
    for group in groups:
        data[group].attrs.update(
            inference_library="pyro_shortrun", inference_library_version=metadata.version("pyro-shortrun")
        )
    return data


def _chained(lists: Iterable[list[str]]) -> Iterable[str]:
    return (name for names in lists for name in names)
