"""Checks of arguments that the guide and the kernel share."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import pyro.distributions as dist
from pyro.nn import PyroModule

from .program import Reading
from .start import Start


def check_count(name: str, value: Any) -> None:
    """Refuse anything but a positive integer."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}.")


def check_kind(name: str, value: Any, kind: type, example: str) -> None:
    """Refuse an argument that is given and not a ``kind``."""
    if value is not None and not isinstance(value, kind):
        raise ValueError(f"{name} must be a {kind.__name__} object such as {example}, got {value!r}.")


def check_start(start: Any) -> None:
    """Refuse what is neither a Start nor a guide."""
    if start is not None and (isinstance(start, type) or not (isinstance(start, Start) or callable(start))):
        raise ValueError(f"start must be Prior(), Persistent(), Init(...) or a Pyro guide, got {start!r}.")
    if isinstance(start, PyroModule) and start._pyro_context.used:
        raise ValueError(
            "the start was called before it was given to ShortRunGuide, and its parameters are in Pyro's store "
            f"under its own name: pass a function, start=lambda *args: {type(start).__name__.lower()}(*args)."
        )
    if getattr(start, "__module__", "") == "pyro.infer.autoguide.initialization":
        raise ValueError(f"start={start!r} is an initialisation, not a guide: use start=Init({start!r}).")


def check_proper(reading: Reading) -> None:
    """Refuse to start from a prior that is no density: log q would be that of nothing."""
    for site in reading.latents:
        fn = site["fn"]
        while isinstance(fn, (dist.Independent, dist.MaskedDistribution)):
            fn = fn.base_dist
        if isinstance(fn, dist.ImproperUniform):
            raise ValueError(
                f"latent site '{site['name']}' has an improper prior, which no run can start from: use "
                "start=AutoNormal(model, init_loc_fn=init_to_value(values={...})) or another guide."
            )
