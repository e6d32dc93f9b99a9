"""Plates of a guide: those that a user gives, and those made after the model's."""

from __future__ import annotations

from typing import Any

import pyro
from pyro.infer.autoguide import AutoGuide

from ..density.program import Reading


def check_plates(create_plates: Any) -> None:
    """Refuse plates where a function is wanted that makes them."""
    if isinstance(create_plates, pyro.plate) or not (create_plates is None or callable(create_plates)):
        raise ValueError(
            "create_plates must be a function of the model's arguments that returns plates, such as lambda x: "
            f"pyro.plate('data', len(x), subsample_size=10); got {create_plates!r}."
        )


def create_given(guide: AutoGuide, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, pyro.plate]:
    """The plates of the AutoGuideList that the guide is a part of, or of its ``create_plates``."""
    if guide.master is not None:
        return dict(getattr(guide.master(), "plates", {}))
    if guide.create_plates is None:
        return {}
    plates = guide.create_plates(*args, **kwargs)
    plates = [plates] if isinstance(plates, pyro.plate) else list(plates)
    if not all(isinstance(p, pyro.plate) for p in plates):
        raise ValueError("create_plates() must return a pyro.plate or an iterable of them.")
    return {p.name: p for p in plates}


def create_missing(plates: dict[str, pyro.plate], reading: Reading, latents_only: bool) -> None:
    """Add the model's other plates (or those around latents), with the subsample of this call's model run."""
    for frame in reading.frames:
        if frame.name not in plates and (frame.around_latents or not latents_only):
            index = reading.indices[frame.name] if frame.is_subsampled else None
            plates[frame.name] = pyro.plate(frame.name, frame.full_size, dim=frame.dim, subsample=index)
