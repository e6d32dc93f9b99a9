"""Results to ArviZ: draws, statistics, pointwise likelihoods, predictions, prior and data under the plates' names."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

import numpy as np
from pyro.infer import MCMC
from torch import Tensor

from ..amortized.guide import LangevinEncoderGuide
from ..checks import check_count, check_flags, check_kind
from ..guides.base import DensityGuide
from ..guides.short_run import ShortRunGuide
from ..mcmc.vectorized import VectorizedMCMC
from ..tensors import plain
from .at_draws import Axes, ModelAtDraws, variables
from .posterior import Draws, grouped, posterior_of

_LOGGER = logging.getLogger("pyro_shortrun")


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
    ``a.b``, and ``chain``, ``draw``, ``sample`` and the statistics' names get ``_site`` or ``_plate`` appended, as does
    what would then have another site's name.

    Masked observations (``poutine.mask``, ``obs_mask``, a masked distribution, NaN under Pyro's NaN-masked ones) are no
    data points: the ``log_likelihood`` of a site ``y`` that has some is over those that are there, along
    ``y_observed``, whose coordinates are the plate's indices, or, of several dimensions, positions in the flattened
    ``y``. What ``pyro.factor`` adds to the posterior is in neither likelihood nor predictions; a logged warning names
    it.

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
    :raises ValueError: for sources that keep no draws, and where ``dims`` names what is not exported.
    """
    check_count("num_prior", num_prior, least=0)
    check_flags(log_likelihood=log_likelihood, posterior_predictive=posterior_predictive)
    check_kind("dims", dims, Mapping, "{'x': ['row', 'column']}")
    check_kind("coords", coords, Mapping, "{'row': ['a', 'b']}")
    if (dims or coords) and isinstance(source, DensityGuide):  # before minutes are spent on draws
        _named(ModelAtDraws(source.call(args, kwargs)), (), dims or {}, coords or {})
    posterior = posterior_of(source, plain(args), plain(kwargs), num_samples, num_chains)
    groups: dict[str, Draws] = {"posterior": dict(posterior.draws)}
    model = None if posterior.call is None else ModelAtDraws(posterior.call)
    names, axes = _named(model, posterior.draws, dims or {}, coords or {})
    seen: dict[str, np.ndarray] = {}
    if model is not None:
        missing = [s.name for s in model.call.density.layout.sites if s.name not in posterior.draws]
        if missing:
            _LOGGER.warning("draws of %s were not kept: nothing that needs them is exported.", missing)
            log_likelihood = posterior_predictive = False
        shape = next(iter(posterior.draws.values())).shape[:2]
        flat = {k: v.flatten(0, 1) for k, v in posterior.draws.items()}
        pointwise, computed = ({}, {}) if missing else model.at(flat)
        groups["posterior"] |= grouped(computed, shape)
        if log_likelihood:
            groups["log_likelihood"] = grouped(pointwise, shape)
        if posterior_predictive:
            drawn = model.simulate(flat, len(next(iter(flat.values()))))
            groups["posterior_predictive"] = grouped({k: drawn[k] for k in model.data}, shape)
        groups |= model.prior(num_prior)
        groups["observed_data"] = model.data
        seen = {names[k]: v.cpu().numpy() for k, v in model.seen.items()}
    arrays = {k: {names[name]: _numpy(v) for name, v in group.items()} for k, group in groups.items() if group}
    if posterior.stats:
        arrays["sample_stats"] = {k: _numpy(v) for k, v in posterior.stats.items()}
    if not (seen and "log_likelihood" in arrays):
        return _from_dict(arrays, axes)
    terms, own = _only_seen(arrays.pop("log_likelihood"), seen, axes)
    return _joined(_from_dict(arrays, axes), _from_dict({"log_likelihood": terms}, own) if terms else None)


def _named(
    model: ModelAtDraws | None, draws: Iterable[str], dims: Mapping[str, list[str]], coords: Mapping[str, Any]
) -> tuple[dict[str, str], Axes]:
    """Names of variables by site, and their dimensions and coordinates, some of them as the user wants.

    :raises ValueError: for names that are not exported, and where there are more or fewer than wanted.
    """
    names = variables(dict.fromkeys([*draws, *(() if model is None else model.sites)]))
    axes = Axes() if model is None else model.axes(names)
    for name, given in dims.items():
        if name not in names.values():
            raise ValueError(f"dims names '{name}', which is not exported; there are {sorted(names.values())}.")
        if len(given) != len(axes.dims.get(name, given)):
            raise ValueError(f"dims['{name}'] must name {len(axes.dims[name])} dimensions, got {given!r}.")
    sizes = {name: len(index) for name, index in axes.coords.items()}
    axes.dims.update({k: list(v) for k, v in dims.items()})
    there = {*_chained(axes.dims.values()), *sizes}
    for name, labels in coords.items():
        if name not in there and model is not None:
            raise ValueError(f"coords names '{name}', which is no dimension; there are {sorted(there)}.")
        if len(labels) != sizes.get(name, len(labels)):
            raise ValueError(f"coords['{name}'] must have {sizes[name]} labels, got {len(labels)}.")
    axes.coords.update(coords)
    return names, axes


def _only_seen(
    terms: Mapping[str, np.ndarray], seen: Mapping[str, np.ndarray], axes: Axes
) -> tuple[dict[str, np.ndarray], Axes]:
    """Pointwise terms of what is observed alone, in one dimension; and without sites of which nothing is."""
    own = Axes({**axes.dims}, {**axes.coords})
    out = dict(terms)
    for name, keep in seen.items():
        del out[name]
        if keep.any():
            own.dims[name] = [f"{name}_observed"]
            own.coords[f"{name}_observed"] = _places(keep, axes.dims[name], axes.coords)
            out[name] = terms[name].reshape(*terms[name].shape[:2], -1)[..., keep.ravel()]
    return out, own


def _places(keep: np.ndarray, dims: list[str], coords: Mapping[str, Any]) -> np.ndarray:
    """Coordinates of what is observed: the plate's in one dimension, else positions in the flattened array."""
    if keep.ndim == 1 and dims and dims[0] in coords:
        return np.asarray(coords[dims[0]])[keep]
    return np.flatnonzero(keep)


def _numpy(value: Tensor) -> np.ndarray:
    return value.detach().cpu().numpy()


def _from_dict(groups: Mapping[str, Mapping[str, np.ndarray]], axes: Axes) -> Any:
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


def _joined(data: Any, more: Any | None) -> Any:
    """The groups of both, of either version of ArviZ."""
    if more is None:
        return data
    if hasattr(data, "extend"):
        data.extend(more)
    else:
        data["log_likelihood"] = more["log_likelihood"].copy()
    return data


def _chained(lists: Iterable[list[str]]) -> Iterable[str]:
    return (name for names in lists for name in names)
