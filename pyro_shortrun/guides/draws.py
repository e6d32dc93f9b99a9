"""Draws of a guide with the two log densities that weigh them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import check_count, check_flags
from ..density.call import Call
from ..runs.record import ShortRun
from ..starts.start import StartDraw


@dataclass(frozen=True)
class WeightedDraws:
    """``values`` by site, ``(draws, *shape)``, and totals over rows, ``(draws,)``.

    ``log_p`` is the model's log joint over the sites, ``log_q`` the run's density there as its objective has it,
    ``log_density`` the log joint in unconstrained space (None where they were not asked for); ``nonfinite`` is the
    number of frozen rows. ``end`` are the states in unconstrained space, ``(draws, rows, size)``, and ``row_log_q`` the
    run's density there, ``(draws, rows)``.
    """

    values: dict[str, Tensor]
    log_p: Tensor | None
    log_q: Tensor | None
    log_density: Tensor | None
    nonfinite: Tensor
    end: Tensor
    row_log_q: Tensor | None

    def values_and_computed(self, call: Call) -> dict[str, Tensor]:
        """``values``, and those of sites that the model computes from them (``pyro.deterministic``)."""
        return {**self.values, **call.model.computed(self.end, call.reading)}

    @staticmethod
    def join(parts: Sequence[WeightedDraws]) -> WeightedDraws:
        """Parts one after the other."""

        def cat(name: str) -> Tensor | None:
            values = [getattr(p, name) for p in parts]
            return None if values[0] is None else torch.cat(values)

        totals = {k: cat(k) for k in ("log_p", "log_q", "log_density", "nonfinite", "end", "row_log_q")}
        return WeightedDraws({k: torch.cat([p.values[k] for p in parts]) for k in parts[0].values}, **totals)  # type: ignore


def check_draws(num_samples: Any, num_chains: Any, adjust: Any, resample: Any) -> None:
    """Refuse numbers of draws, chains and adjusted steps that are none."""
    check_count("num_samples", num_samples)
    check_count("num_chains", num_chains)
    if adjust is not None:
        check_count("adjust", adjust, least=0)
    if resample is not None:
        check_flags(resample=resample)


def check_levels(quantiles: Any) -> None:
    """Refuse what are no quantiles: numbers from 0 to 1."""
    try:
        levels = torch.as_tensor(quantiles, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        levels = torch.full((1,), torch.nan)
    if not (levels.numel() and ((levels >= 0) & (levels <= 1)).all()):
        raise ValueError(
            f"quantiles must be numbers from 0 to 1 such as [0.05, 0.95], and come before the model's arguments; got "
            f"{quantiles!r}."
        )


def weigh(call: Call, drawn: StartDraw, result: ShortRun, account: bool) -> WeightedDraws:
    """The ends of a run as site values; log densities if the run was asked to ``account`` for them."""
    density, jacobian, *found = result.landed or call.model.land(result.end)
    layout = call.density.layout
    values = {s.name: v.detach() for s, v in zip(layout.sites, found, strict=True)}
    frozen = result.info.frozen.sum(-1)
    if not account:
        return WeightedDraws(values, None, None, None, frozen, result.end, None)
    # Rows of a subsampled plate stand for full_size / size rows each, in log q as in the model's log joint.
    weight = layout.row_weight
    row_log_q = drawn.log_q - result.increment
    log_q = weight * (row_log_q - jacobian).sum(-1)
    log_p = (density - weight * jacobian).sum(-1)
    return WeightedDraws(values, log_p, log_q, density.sum(-1), frozen, result.end, row_log_q)
