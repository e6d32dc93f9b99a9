"""Checks of arguments that the guide and the kernel share."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
from pyro.nn import PyroModule

from .program import Reading
from .start import Start


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


def check_masks(objective: Any, reading: Reading) -> None:
    """Refuse latents that are taken out of the density, where the objective would count their spread all the same."""
    for site in reading.latents:
        if site["mask"] is not None and site["mask"] is not True:
            raise NotImplementedError(
                f"latent site '{site['name']}' lies in poutine.mask, which {type(objective).__name__} cannot weigh: "
                "use Annealed() or PathDensity()."
            )
