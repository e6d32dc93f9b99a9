"""Choosing and averaging over rows."""

from __future__ import annotations

import torch
from torch import Tensor


def where_rows(rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``a`` in these rows, ``b`` in the others."""
    return torch.where(rows.unsqueeze(-1), a, b)


def mean_over(value: Tensor, rows: Tensor) -> Tensor:
    """The mean of a value over these rows, 0 if there are none."""
    return torch.where(rows, value, torch.zeros_like(value)).sum() / rows.sum().clamp(min=1)


def keep_rows(rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``a`` in these rows, ``b`` in the others, whatever dimensions follow."""
    return torch.where(rows.reshape(*rows.shape, *((1,) * (a.dim() - rows.dim()))), a, b)
