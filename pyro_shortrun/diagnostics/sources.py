"""Draws of a guide, of a finished sampler, or of a dict, and how many independent ones they are worth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.infer import MCMC, Predictive
from pyro.ops.stats import effective_sample_size
from torch import Tensor

from ..guides.base import DensityGuide
from ..mcmc.vectorized import VectorizedMCMC

Draws = dict[str, Tensor]


def draws_of(
    source: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    num_samples: int,
    num_chains: int,
    sites: Mapping[str, torch.Size] | None = None,
) -> Draws:
    """Draws ``(chains, draws, *site shape)`` of a guide, a finished sampler, or a dict.

    :param num_samples: draws of each of ``num_chains`` chains, for guides.
    :param sites: names and shapes of the sites wanted; all, if None.
    """
    names = None if sites is None else list(sites)
    with torch.no_grad(), poutine.block():
        found = _all_draws(source, args, kwargs, num_samples, num_chains, sites)
    missing = [name for name in names or () if name not in found]
    if missing:
        raise ValueError(f"the source has no draws of site '{missing[0]}', which the reference has.")
    found = {k: found[k].detach() for k in (names or found)}
    for name, shape in (sites or {}).items():
        if found[name].shape[2:] != shape or found[name].shape[1] < 4:
            raise ValueError(
                f"draws of '{name}' have shape {tuple(found[name].shape)}; wanted are at least 4 draws as "
                f"(chains, draws, *{tuple(shape)})."
            )
    return found


def _all_draws(
    source: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    count: int,
    chains: int,
    sites: Mapping[str, torch.Size] | None,
) -> Draws:
    if isinstance(source, Mapping):
        source = {k: torch.as_tensor(v) for k, v in source.items()}
        flat = {k for k, v in source.items() if sites and k in sites and v.dim() == 1 + len(sites[k])}
        return {k: v.unsqueeze(0) if k in flat else v for k, v in source.items()}
    check_source(source)
    if isinstance(source, (MCMC, VectorizedMCMC)):
        return source.get_samples(group_by_chain=True)
    if isinstance(source, DensityGuide):
        return source.sample_posterior(*args, num_samples=count, num_chains=chains, **kwargs)
    drawn = Predictive(source, num_samples=count * chains)(*args, **kwargs)
    return {k: v.unflatten(0, (chains, count)) for k, v in drawn.items()}


def check_source(source: Any, name: str = "source") -> None:
    """Refuse what has no draws, before minutes are spent on a reference."""
    done = isinstance(source, VectorizedMCMC) and source.has_draws or isinstance(source, MCMC) and source._samples
    if isinstance(source, (MCMC, VectorizedMCMC)) and not done:
        raise ValueError(f"this {type(source).__name__} has no draws yet; call mcmc.run(*args) first.")
    if isinstance(source, type) or not isinstance(source, (Mapping, MCMC, VectorizedMCMC)) and not callable(source):
        raise ValueError(
            f"{name} must be a guide, an MCMC or VectorizedMCMC that has run, or a dict of draws, got {source!r}."
        )


def independent_draws(x: Tensor) -> Tensor:
    """Effective sample size, ``(...)``, of ``(chains, draws, ...)``: Pyro's, which may be negative for antithetic
    chains, within Stan's limit; one for draws that are all the same."""
    count = x.shape[0] * x.shape[1]
    limit = count * max(1.0, math.log10(count))
    found = effective_sample_size(x)
    return torch.where(found > 0, found.clamp(max=limit), limit).where(~found.isnan(), 1.0)
