"""Gaussian starts: a fixed width around a Pyro initialisation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..checks import check_between, check_function
from ..density.call import Call
from .start import Start, StartDraw


class Init(Start):
    r"""A Gaussian of fixed width around a Pyro initialisation: ``u_0 = init + scale * eps``.

    The initialisation is computed for every run; if it is random, ``log q_0`` is that given its draw.

    :param init_loc_fn: ``pyro.infer.autoguide.init_to_median`` or a sibling.
    :param scale: standard deviation in unconstrained space.
    :raises ValueError: where ``scale`` is not positive.
    """

    def __init__(self, init_loc_fn: Callable[..., Any], scale: float = 0.1) -> None:
        check_function("init_loc_fn", init_loc_fn, "pyro.infer.autoguide.init_to_median")
        check_between("scale", scale, 0, math.inf, "0.1")
        self.init_loc_fn, self.scale = init_loc_fn, scale

    def draw(self, call: Call, chains: int) -> StartDraw:
        bind, layout = call.bind, call.density.layout

        def locate() -> Tensor:
            reading = call.program.draw(bind.args, bind.kwargs, bind.indices, bind.given, self.init_loc_fn)
            return layout.pack(reading.unconstrained)

        center = call.replicate(locate, chains, "init").detach()
        u = center + self.scale * torch.randn_like(center)
        log_q = torch.distributions.Normal(center, self.scale).log_prob(u)
        log_q = torch.where(_unmasked(call, u[0]), log_q, torch.zeros_like(log_q))
        if layout.arrow is not None:
            local = torch.arange(layout.size, device=u.device) >= layout.arrow.shared
            log_q = torch.where(local, layout.arrow.weight * log_q, log_q)
        return StartDraw(u, log_q.sum(-1), call.model(u))


def _unmasked(call: Call, like: Tensor) -> Tensor:
    """Which coordinates of a row belong to latents that no ``poutine.mask`` takes out, ``(rows, size)``."""
    keep = {}
    for site, shape in zip(call.reading.latents, call.density.layout.sites, strict=True):
        mask = True if site["mask"] is None else site["mask"]
        batch = torch.as_tensor(mask, device=like.device).expand(shape.batch_shape)
        keep[shape.name] = batch.reshape((*shape.batch_shape, *((1,) * len(shape.event_shape)))).expand(shape.shape)
    return call.density.layout.pack(keep).bool()
