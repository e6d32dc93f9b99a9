"""Funnels: latents whose prior's scale is another latent, where data say little about them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..density.model import LogDensity
from ..density.program import Reading
from ..density.transforms import is_identity
from .normal import Normal

_VARIES = 0.2  # change of a log scale with one standard deviation of what it depends on; a Gaussian has that too small
_FREE = 0.4  # posterior over prior standard deviation, from which on the prior holds a latent


@torch.no_grad()
def funnels(model: LogDensity, normal: Normal) -> dict[str, str]:
    r"""From sites of prior ``p(z | s)`` with a scale that depends on ``s`` to the site ``s``, where by a Gaussian

    .. math:: |\partial\log\mathrm{scale}(z) / \partial s|\, \mathrm{sd}(s) > .2, \qquad
              \mathrm{sd}(z) / \mathrm{scale}(z) > .4

    (the median over the site's values). There the posterior narrows as ``s`` falls, so that no Gaussian and no one
    step size fits it. Written as ``z = loc + scale e`` it does not.

    :param model: with all latents in one row.
    """
    loc, factor = normal.loc.to(model.structure.dtype), normal.factor
    sd = factor.square().sum(1).sqrt().to(loc)
    sites = model.layout.unpack(torch.arange(len(loc), device=loc.device).reshape(1, 1, -1))
    places = {name: index.flatten() for name, index in sites.items()}
    here, found = _scales(model.read(loc.unsqueeze(0))), {}
    for source, place in places.items():
        ahead = torch.zeros_like(loc).index_fill(0, place, 1.0) * sd
        above, below = (_scales(model.read((loc + way * ahead).unsqueeze(0))) for way in (1, -1))
        for name in here.keys() & above.keys() & below.keys() - {source}:  # supports may branch
            change = (above[name] / below[name]).log().abs() / 2
            share = sd[places[name]] / here[name].expand(sites[name].shape[1:]).flatten()
            if change.max() > _VARIES and share.median() > _FREE:
                found[name] = source
    return found


def _scales(reading: Reading) -> dict[str, Tensor]:
    """Scales of the priors of latents on the real line that have one."""
    found = {}
    for site in reading.latents:
        fn = site["fn"]
        while hasattr(fn, "base_dist"):
            fn = fn.base_dist
        if isinstance(getattr(fn, "scale", None), Tensor) and is_identity(reading.transforms[site["name"]]):
            found[site["name"]] = fn.scale
    return found
