"""What a guide was made with, beside its tensors, so that a state is not loaded into another one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..dynamics.step_size import StepSize
from ..guides.base import DensityGuide
from ..guides.short_run import ShortRunGuide
from ..objectives.logdet import LogDet

Description = dict[str, Any]
_WAYS = {"training", "max_drift", "init", "tries", "eval_steps", "checkpoint", "full_gradient", "tune_every"}


def described(part: Any) -> Description:
    """What must be the same where a state is loaded: plain values by name; nothing for what is no guide, or not set up.

    ``max_drift`` is not among them: backing off changes it, see :func:`drift_limit`.
    """
    if not isinstance(part, DensityGuide) or part._first is None:
        return {}
    sites = {f"coordinates of site '{k}' in a row": v for k, v in part._first.layout.row_sizes.items()}
    if not isinstance(part, ShortRunGuide):
        return {"sites": sorted(part._first.layout.row_sizes), **sites, **_settings("", part)}
    found: Description = {"sites": sorted(part._first.layout.row_sizes), **sites, "num_steps": part.num_steps}
    for name in ("dynamics", "objective", "start"):
        found[name] = type(getattr(part, name)).__name__
        found |= _settings(f"{name}.", getattr(part, name))
    return found


def _settings(prefix: str, thing: Any) -> Description:
    """Plain public values that an object was made with, and those of its step size and its log-determinant."""
    found: Description = {}
    own = getattr(thing, "__dict__", {})  # a start may be any callable
    inner = {**own, **own.get("_modules", {})}
    for name, value in inner.items():
        if isinstance(value, (StepSize, LogDet)):
            found[f"{prefix}{name}"] = type(value).__name__
            found |= _settings(f"{prefix}{name}.", value)
        elif isinstance(value, (bool, int, float, str)) and not name.startswith("_") and name not in _WAYS:
            found[f"{prefix}{name}"] = value
    return found


def misfit(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first value that differs, in words; those that only one of the two has do not count."""
    for name in saved:
        if name in now and saved[name] != now[name]:
            return f"was saved with {name} {saved[name]!r}, and here has {now[name]!r}"
    return None


def drift_limit(part: Any) -> float | None:
    """``max_drift`` of a guide's dynamics, which is restored."""
    return part.dynamics.max_drift if isinstance(part, ShortRunGuide) else None
