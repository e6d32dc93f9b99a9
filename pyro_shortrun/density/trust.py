"""Whether a density can be trusted: is it random, do rows mix, which site is not finite."""

from __future__ import annotations

import warnings

import pyro
import torch
from torch import Tensor

from .interface import Density
from .layout import Arrow, Layout
from .model import LogDensity
from .sites import Site


@torch.no_grad()
def is_random(density: Density, u: Tensor) -> bool:
    """Whether two evaluations at the same states differ, which is warned about."""
    random = not torch.allclose(density(u), density(u), rtol=1e-4, atol=1e-6, equal_nan=True)
    if random:
        warnings.warn(
            "the model's log density is random (two evaluations at the same latents differ): put dropout "
            "in eval mode and sample nothing inside the model except through pyro.sample.",
            stacklevel=2,
        )
    return random


@torch.no_grad()
def rows_mix(density: Density, u: Tensor) -> bool:
    """Whether rows that should be independent change with their neighbours at these states."""
    if density.layout.rows < 2:
        return False
    other = u.clone()
    other[:, ::2] = u.roll(1, 1)[:, ::2]
    here, there = density(u), density(other)
    return not torch.allclose(here[:, 1::2], there[:, 1::2], rtol=1e-3, atol=1e-5, equal_nan=True)


def warn_if_rows_mix(density: Density, u: Tensor) -> None:
    """Warn where the density is random, or where rows that should be independent are not (one chain)."""
    if is_random(density, u):
        return
    names = row_names(density.layout)
    if density.layout.arrow is not None:
        if _blocks_mix(density, u, density.layout.arrow):
            warnings.warn(
                f"elements of plate {names} influence each other's log density although a plate declares them "
                "independent: log q is wrong; remove the plate.",
                stacklevel=2,
            )
    elif rows_mix(density, u):
        warnings.warn(
            f"elements of plate {names} influence each other's log density although a plate declares "
            "them independent: put batch normalisation in eval mode (every step of a run would also "
            "update its running statistics), or remove the plate.",
            stacklevel=2,
        )


def _blocks_mix(density: Density, u: Tensor, arrow: Arrow) -> bool:
    """Whether the Hessian connects the first local block of an arrowhead to the others."""
    leaf = u.detach().clone().requires_grad_()
    _, grad = density.value_and_grad(leaf, create_graph=True)
    vector = torch.zeros_like(u)
    first = slice(arrow.shared, arrow.shared + arrow.local)
    vector[..., first] = 1.0
    column = density.hessian_product(leaf, grad, create_graph=False)(vector.unsqueeze(0))[0, 0, 0]
    rest = column[arrow.shared + arrow.local :].abs()
    return bool(rest.numel()) and bool(rest.max() > 1e-4 * (1 + column[first].abs().max()))


def row_names(layout: Layout) -> str:
    """The plates whose elements are the rows, for messages."""
    return ", ".join(f"'{p.name}'" for p in layout.row_plates)


def offender(density: LogDensity, u: Tensor) -> str:
    """Name and value of the first site whose log density, or else the gradient of that, is not finite at ``u`` (one
    chain)."""
    leaf = u.detach().requires_grad_()
    with torch.enable_grad(), pyro.validation_enabled(False):
        reading = density.read(leaf)
        reading.trace.compute_log_prob()
    sites = [s for s in reading.trace.nodes.values() if s["type"] == "sample"]
    for bad in (lambda term: not term.isfinite().all(), lambda term: not _slope(term, leaf).isfinite().all()):
        for site in sites:
            if bad(site["log_prob"]):
                return _named(site)
    return "the gradient of the log density"


def _slope(term: Tensor, leaf: Tensor) -> Tensor:
    if not term.requires_grad:
        return torch.zeros(())
    with torch.enable_grad():
        return torch.autograd.grad(term.sum(), leaf, retain_graph=True, materialize_grads=True)[0]


def _named(site: Site) -> str:
    value = torch.as_tensor(site["value"])
    bad = ", ".join(f"{v:.4g}" for v in value.detach().flatten()[:3].tolist())
    return f"site '{site['name']}' (value {bad}{', ...' if value.numel() > 3 else ''})"
