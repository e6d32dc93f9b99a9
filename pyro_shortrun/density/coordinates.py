"""Indices of a row's coordinates, for what there is one of by site or by coordinate."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import Layout, constant


def site_index(layout: Layout) -> Tensor:
    """``(size,)`` index of the site to which each coordinate belongs."""
    return constant(layout, {s.name: float(i) for i, s in enumerate(layout.sites)}).round().long()


def dim_index(layout: Layout) -> Tensor:
    """``(size,)`` index of each coordinate; elements of an arrowhead's local plate share theirs."""
    if layout.arrow is None:
        return torch.arange(layout.size)
    local = layout.arrow.shared + torch.arange(layout.arrow.local).repeat(layout.arrow.count)
    return torch.cat([torch.arange(layout.arrow.shared), local])


def dim_count(layout: Layout) -> int:
    """How many different indices :func:`dim_index` has."""
    return layout.size if layout.arrow is None else layout.arrow.shared + layout.arrow.local
