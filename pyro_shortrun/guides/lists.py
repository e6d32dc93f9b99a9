"""Guides as parts of an ``AutoGuideList``: what the other parts have drawn, also where nobody traces the list."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuideList
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor

_TRACERS = "_pyro_shortrun_tracers"


def keep_values(parts: AutoGuideList) -> None:
    """Let every call of the list be traced, so that later parts find the values of earlier ones."""
    if _TRACERS not in parts.__dict__:
        parts.__dict__[_TRACERS] = []
        parts.register_forward_pre_hook(_begin)
        parts.register_forward_hook(_end, always_call=True)


def _begin(parts: Any, args: Any) -> None:
    tracer = TraceMessenger()
    parts.__dict__[_TRACERS].append(tracer)
    tracer.__enter__()


def _end(parts: Any, args: Any, result: Any) -> None:
    parts.__dict__[_TRACERS].pop().__exit__(None, None, None)


@torch.no_grad()
def draws_of_part(guide: Any, count: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Draws ``(count, *site shape)`` of a part's sites, each of a call of the whole list."""
    parts, names = guide.master(), None
    drawn = []
    with poutine.block(), poutine.mask(mask=False):
        for _ in range(count):
            values = parts(*args, **kwargs)
            names = names or [s.name for s in guide._first.layout.sites]
            drawn.append([values[name] for name in names])
    return dict(zip(names or [], map(torch.stack, zip(*drawn, strict=True)), strict=True))
