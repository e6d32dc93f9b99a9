"""Log-probabilities of single observations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro.distributions import (
    Independent,
    MaskedDistribution,
    NanMaskedMultivariateNormal,
    NanMaskedNormal,
)
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .enumeration import enumerated_factors, marginal
from .program import Reading
from .sites import Site, is_data, masked, plates_of
from .structure import Structure


def pointwise(structure: Structure, reading: Reading, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Log-probability of every element of data sites, unscaled, zero where masked, enumerated sites summed out; for
    which elements there are, see :func:`seen`.

    :param shapes: batch shapes by name, without enumeration dims.

    Data whose elements the enumerated sites tie together have no such value and are left out.
    """
    trace = reading.trace
    trace.compute_log_prob()
    sites = [s for s in trace.nodes.values() if s["type"] == "sample" and not site_is_subsample(s)]
    summed = enumerated_factors(trace, sites) if structure.summed else {}
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


def seen(site: Site, shape: torch.Size) -> Tensor:
    """Which elements of a data site are observed, ``shape``: not masked by a handler, by their distribution, or by NaN
    where the distribution leaves that out."""
    value = torch.as_tensor(site["value"])
    keep = torch.ones((), dtype=torch.bool, device=value.device)
    if site["mask"] is not None:
        keep = keep & torch.as_tensor(site["mask"], device=value.device)
    return (keep & _seen_by(site["fn"], value)).expand(shape)


def _seen_by(fn: Any, value: Tensor) -> Tensor:
    """What a distribution counts, over its batch shape."""
    if isinstance(fn, NanMaskedNormal):
        return value.isfinite()
    if isinstance(fn, NanMaskedMultivariateNormal):
        return value.isfinite().any(-1)
    if isinstance(fn, Independent):
        dims = tuple(range(-fn.reinterpreted_batch_ndims, 0))
        base = _seen_by(fn.base_dist, value)
        return base.any(dims) if dims and base.dim() >= len(dims) else base
    if isinstance(fn, MaskedDistribution):
        mask = torch.as_tensor(fn._mask, device=value.device).expand(fn.batch_shape)
        return mask & _seen_by(fn.base_dist, value)
    return torch.ones((), dtype=torch.bool, device=value.device)


def _trimmed(shape: torch.Size, batch: torch.Size) -> torch.Size:
    """``shape`` without dims of size one to the left of ``batch``, as summing out enumerated sites leaves them."""
    extra = max(len(shape) - len(batch), 0)
    return shape[extra:] if shape[:extra].numel() == 1 else shape
