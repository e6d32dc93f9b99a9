"""Enumerated sites summed out of a trace, as in ``TraceEnum_ELBO``."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from opt_einsum import shared_intermediates
from pyro import poutine
from pyro.ops import packed
from pyro.ops.contract import contract_to_tensor
from torch import Tensor

from .log_einsum import VectorizableLogRing
from .shapes import Plate
from .sites import Site, plates_of


def marginal(trace: poutine.Trace, sites: Mapping[str, Site], kept: Iterable[Plate]) -> Tensor:
    """Sum the enumerated sites out of the product of ``sites``; elements of the ``kept`` plates stay apart."""
    plates = trace.plate_to_symbol
    factors: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    for site in sites.values():
        ordinal = frozenset(plates[p.name] for p in plates_of(site))
        term = packed.scale_and_mask(site["packed"]["unscaled_log_prob"], mask=site["packed"]["mask"])
        factors.setdefault(ordinal, []).append(term)
    dims = set(trace.symbol_to_dim) - set(plates.values())
    target = frozenset(plates[p.name] for p in kept)
    with shared_intermediates() as cache:
        term = contract_to_tensor(factors, dims, target_ordinal=target, ring=VectorizableLogRing(cache))
    return packed.unpack(term, trace.symbol_to_dim)


def enumerated_factors(trace: poutine.Trace, sites: list[Site]) -> dict[str, Site]:
    """The sites whose log-probability has an enumerated dimension."""
    trace.pack_tensors()
    plates = set(trace.plate_to_symbol.values())
    enumerated = set(trace.symbol_to_dim) - plates
    return {s["name"]: s for s in sites if not enumerated.isdisjoint(s["packed"]["unscaled_log_prob"]._pyro_dims)}


def common_scale(sites: Mapping[str, Site]) -> Any:
    """As in TraceEnum_ELBO: the scale stands outside the sum over the discrete sites, so it must be one."""
    scales = [s["scale"] for s in sites.values()]
    if any(not torch.equal(torch.as_tensor(s), torch.as_tensor(scales[0])) for s in scales):
        raise ValueError(
            "enumerated sites and what depends on them must share one poutine.scale (or subsampled plate); "
            f"found {sorted(float(torch.as_tensor(s)) for s in scales)} at {sorted(sites)}."
        )
    return scales[0]
