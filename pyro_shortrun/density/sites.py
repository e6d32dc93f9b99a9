"""What a site of a Pyro trace is: latent, data, computed; its plates and mask; what handlers do to all sites."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta, Unit
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution

from .shapes import Plate

Site = Any  # a trace node: Pyro types it as a TypedDict whose entries may all be None


def is_discrete(msg: Site) -> bool:
    """A site whose values can be counted."""
    return bool(getattr(msg["fn"], "has_enumerate_support", False)) or bool(
        getattr(getattr(msg["fn"], "support", None), "is_discrete", False)
    )


def is_latent(msg: Site) -> bool:
    """A continuous site that is neither observed nor a plate's subsample."""
    return msg["type"] == "sample" and not msg["is_observed"] and not site_is_subsample(msg) and not is_discrete(msg)


def is_computed(site: Site) -> bool:
    """A function of the latents: ``pyro.deterministic``, or what a reparametrisation leaves at the old name."""
    fn = site["fn"]
    while isinstance(getattr(fn, "base_dist", None), Distribution):
        fn = fn.base_dist
    return site["type"] == "sample" and site["is_observed"] and isinstance(fn, Delta)


def is_data(site: Site) -> bool:
    """An observed site that is neither computed from latents nor a ``pyro.factor``."""
    observed = site["type"] == "sample" and site["is_observed"]
    return bool(observed) and not is_computed(site) and not isinstance(site["fn"], Unit)


def is_factor(site: Site) -> bool:
    """A ``pyro.factor``."""
    return site["type"] == "sample" and isinstance(site["fn"], Unit)


def plates_of(site: Site) -> tuple[Plate, ...]:
    """The vectorised plates around a site."""
    return tuple(
        Plate(f.name, f.dim, int(f.size), int(f.full_size or f.size)) for f in site["cond_indep_stack"] if f.vectorized
    )


def masked(term: Tensor, mask: Any) -> Tensor:
    """``term`` with zeros where ``poutine.mask`` takes a site out."""
    return term if mask is None else scale_and_mask(term, mask=mask)


def is_weighted_from_outside() -> bool:
    """Whether handlers around this call scale, mask or repeat sample statements."""
    with poutine.trace() as tracer:
        pyro.sample("_outer", Delta(torch.zeros(())), infer={"is_auxiliary": True})
    site: Any = tracer.trace.nodes["_outer"]
    return bool(site["scale"] != 1.0) or site["mask"] is not None or bool(site["cond_indep_stack"])


def is_masked_out() -> bool:
    """Whether handlers around this call take every element of its sample statements out of the log density."""
    mask = poutine.get_mask()
    return mask is False or (isinstance(mask, Tensor) and not bool(mask.any()))
