"""Checks of single arguments."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any


def check_count(name: str, value: Any) -> None:
    """Refuse anything but a positive integer."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}.")


def check_kind(name: str, value: Any, kind: type, example: str) -> None:
    """Refuse an argument that is given and not a ``kind``."""
    if value is not None and not isinstance(value, kind):
        raise ValueError(f"{name} must be a {kind.__name__} object such as {example}, got {value!r}.")


def check_between(name: str, value: Any, low: float, high: float, example: str) -> None:
    """Refuse anything but a number strictly between two others."""
    if isinstance(value, bool) or not isinstance(value, Real) or not low < float(value) < high:
        raise ValueError(f"{name} must be a number in ({low:g}, {high:g}), got {value!r}; try {example}.")
