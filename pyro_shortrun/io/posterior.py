"""Draws for export: what guides and samplers have, with the statistics of each draw and the bound model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer import MCMC
from pyro.infer.mcmc.api import StreamingMCMC
from torch import Tensor

from ..amortized.guide import LangevinEncoderGuide
from ..checks import check_count
from ..density.call import Call
from ..density.handlers import init_uniform
from ..guides.short_run import ShortRunGuide
from ..mcmc.target import ModelTarget
from ..mcmc.vectorized import VectorizedMCMC
from ..tensors import plain

Draws = dict[str, Tensor]


@dataclass(frozen=True)
class Posterior:
    """Draws and statistics ``(chains, draws, ...)``, and the bound model they belong to (None for a potential_fn)."""

    draws: Draws
    stats: Draws
    call: Call | None


def grouped(draws: Draws, shape: torch.Size) -> Draws:
    """Draws in a row as ``(chains, draws, ...)``."""
    return {k: v.unflatten(0, tuple(shape)) for k, v in draws.items()}


def posterior_of(
    source: Any, args: tuple[Any, ...], kwargs: dict[str, Any], num_samples: int, num_chains: int
) -> Posterior:
    """Draws of a guide, that many in that many chains, or those that a sampler has kept."""
    if isinstance(source, ShortRunGuide):
        check_count("num_samples", num_samples)
        check_count("num_chains", num_chains)
        return _of_guide(source, args, kwargs, num_samples, num_chains)
    if isinstance(source, LangevinEncoderGuide):
        bound, draws, density = source.chain_draws(args, kwargs, num_samples, num_chains)
        return Posterior(draws, {"lp": density}, bound)
    if isinstance(source, VectorizedMCMC):
        if not source.has_draws:
            raise ValueError("this VectorizedMCMC has no draws yet; call mcmc.run(*args) first.")
        target = source.target
        call = target.call if isinstance(target, ModelTarget) else None
        if call is not None and (args or kwargs):
            call = _bound(source.kernel.model, args, kwargs)
        return Posterior(source.get_samples(group_by_chain=True), _chain_stats(source.sample_stats), call)
    if isinstance(source, MCMC):
        if source._samples is None:
            raise ValueError("this MCMC has no draws yet; call mcmc.run(*args) first.")
        if not (args or kwargs):
            args, kwargs = plain(source._args), plain(source._kwargs)
        call = _bound(getattr(source.kernel, "model", None), args, kwargs)
        return Posterior(source.get_samples(group_by_chain=True), _pyro_stats(source), call)
    if isinstance(source, StreamingMCMC):
        raise ValueError("StreamingMCMC keeps no draws to export; use MCMC or VectorizedMCMC.")
    raise ValueError(
        "source must be a ShortRunGuide, a LangevinEncoderGuide, or a pyro.infer.MCMC or VectorizedMCMC that has run, "
        f"got a {type(source).__name__}."
    )


def _bound(model: Callable[..., Any] | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    if model is None:
        return None
    return Call.of(model, args, kwargs, init_uniform)


def _of_guide(
    guide: ShortRunGuide, args: tuple[Any, ...], kwargs: dict[str, Any], num_samples: int, num_chains: int
) -> Posterior:
    call, drawn = guide.weighted_draws(args, kwargs, num_samples * num_chains)
    shape = torch.Size((num_chains, num_samples))
    densities = {"log_p": drawn.log_p, "log_q": drawn.log_q, "lp": drawn.log_density}
    stats = {k: v for k, v in densities.items() if v is not None}
    stats |= {"nonfinite": drawn.nonfinite, "diverging": drawn.nonfinite > 0}
    return Posterior(grouped(drawn.values, shape), grouped(stats, shape), call)


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
