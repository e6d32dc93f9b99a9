"""Axes to draw on, given or made, and arrays to draw. Matplotlib is imported where something is drawn."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor


def axes_of(axes: Any, rows: int, columns: int, size: tuple[float, float]) -> np.ndarray:
    """An array of the axes that were given, or of new ones."""
    if axes is None:
        import matplotlib.pyplot as plt

        _, axes = plt.subplots(rows, columns, figsize=size, layout="constrained")
    found = np.atleast_1d(axes)
    if found.size != rows * columns:
        raise ValueError(f"needs {rows * columns} axes, got {found.size}.")
    return found.reshape(-1)


def ax_of(ax: Any) -> Any:
    """The one that was given, or a new one."""
    return axes_of(ax, 1, 1, (5, 3.2))[0]


def numpy_of(value: Any) -> np.ndarray:
    """Of a tensor on any device, or what NumPy takes."""
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
