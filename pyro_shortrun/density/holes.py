"""Pyro's distributions of data with holes (NaN), in operations that ``vmap`` and tracing can take."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from pyro.distributions import MultivariateNormal, NanMaskedMultivariateNormal, NanMaskedNormal, Normal
from torch import Tensor
from torch.distributions import Distribution


class _Normal(NanMaskedNormal):
    """The same numbers; Pyro picks the elements that are there by index."""

    def log_prob(self, value: Tensor) -> Tensor:
        there = value.isfinite()
        filled = torch.where(there, value, self.loc.detach())
        return torch.where(there, Normal.log_prob(self, filled), 0.0)


class _MultivariateNormal(NanMaskedMultivariateNormal):
    """The same numbers; Pyro goes through the patterns of what is there.

    Coordinates that are not get a standard normal's place in the covariance, and its constant is taken off again.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        there = value.isfinite()
        gap = torch.where(there, value, self.loc.detach()) - self.loc
        both = there.unsqueeze(-1) & there.unsqueeze(-2)
        eye = torch.eye(value.shape[-1], dtype=self.loc.dtype, device=self.loc.device)
        cov = torch.where(both, self.covariance_matrix, eye)
        full = MultivariateNormal(torch.zeros_like(self.loc), cov, validate_args=False)
        missing = (~there).sum(-1)
        return full.log_prob(torch.where(there, gap, 0.0)) + 0.5 * math.log(2 * math.pi) * missing


_SAME: dict[type, type] = {NanMaskedNormal: _Normal, NanMaskedMultivariateNormal: _MultivariateNormal}


def traceable(fn: Any) -> Any:
    """The distribution, with these in place of Pyro's."""
    same = _SAME.get(type(fn))
    if same is not None:
        fn = copy.copy(fn)
        fn.__class__ = same
        return fn
    base = getattr(fn, "base_dist", None)
    if not isinstance(base, Distribution) or (new := traceable(base)) is base:
        return fn
    fn = copy.copy(fn)
    fn.base_dist = new
    return fn
