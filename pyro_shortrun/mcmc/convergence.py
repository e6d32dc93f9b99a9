"""Nested R-hat, the statistic: how far groups of chains that began at the same point each are apart."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def nested_rhat_of(name: str, draws: Tensor, superchains: int) -> Tensor:
    """Of one variable; formula and paper are with :func:`~pyro_shortrun.diagnostics.nested_rhat`.

    :param name: for messages.
    :param draws: ``(chains, draws, ...)``, chains of a group next to each other.
    :return: ``(...)``, NaN for what does not vary.
    :raises ValueError: where chains do not divide into groups, or there is one draw of one chain in each.
    """
    if draws.dim() < 2 or superchains < 2 or len(draws) % superchains or not draws[:, :1].numel():
        raise ValueError(
            f"{name} has shape {tuple(draws.shape)}: its leading dimension, the chains, must divide into "
            f"superchains={superchains} >= 2 groups, and draws must follow."
        )
    z = draws.unflatten(0, (superchains, -1)).to(torch.promote_types(draws.dtype, torch.get_default_dtype()))
    members, length = z.shape[1:3]
    if members == length == 1:
        raise ValueError(f"{name} has one draw of one chain in each group: nothing varies within groups.")
    chains = z.mean(2)
    groups = chains.mean(1)
    between = chains.var(1) if members > 1 else torch.zeros_like(groups)
    within = z.var(2).mean(1) if length > 1 else torch.zeros_like(groups)
    return (1 + groups.var(0) / (between + within).mean(0)).sqrt()


def groups_of(starts: Mapping[str, Tensor] | None, chains: int) -> int:
    """How many groups of equally many neighbouring chains began at one point each: all chains where none is given.

    :param starts: ``(chains, ...)`` by name.
    """
    if not starts:
        return chains
    rows = torch.cat([v.detach().reshape(chains, -1) for v in starts.values()], 1)
    new = (rows[1:] != rows[:-1]).any(1).nonzero().flatten() + 1
    size = int(new[0]) if len(new) else chains
    alike = chains % size == 0 and torch.equal(new, torch.arange(size, chains, size, device=new.device))
    return chains // size if alike else chains


def worst_nested_rhat(draws: Mapping[str, Tensor], superchains: int) -> tuple[float, str] | None:
    """The largest nested R-hat and the site it is of; None where there are no two groups, or nothing varies."""
    if superchains < 2:
        return None
    found = {k: nested_rhat_of(k, v, superchains).flatten() for k, v in draws.items()}
    varying = [(v[~v.isnan()].max().item(), k) for k, v in found.items() if not v.isnan().all()]
    return max(varying, default=None)
