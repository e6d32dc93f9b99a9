"""A table of a guide's posterior, and what is known of how far to trust it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pyro.ops.stats import hpdi, quantile
from torch import Tensor

from ..checks import check_between, check_count
from .draws import WeightedDraws
from .smoothing import smoothed

GOOD_K_HAT = 0.7


def summary(guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any], num_samples: int, prob: float) -> str:
    """Of a guide's draws, and of runs apart from them, if it is one of runs, that are weighed.

    :raises ValueError: for fewer than two draws, and no probability.
    """
    check_count("num_samples", num_samples, least=2)
    check_between("prob", prob, 0, 1, "0.9")
    draws = guide.sample_posterior(*args, num_samples=num_samples, **kwargs)
    parts = [table({k: v[0] for k, v in draws.items()}, prob)]
    info = getattr(guide, "info", None)
    if info is not None and info.acceptance is not None:
        parts.append(f"Acceptance of the adjusted steps: {info.acceptance:.3f}")
    if hasattr(guide, "weighted_draws"):
        _, runs = guide.weighted_draws(args, kwargs, num_samples)
        parts += _reliability(runs)
    return "\n".join(parts)


def table(draws: Mapping[str, Tensor], prob: float) -> str:
    """A line for each coordinate: mean, standard deviation, median, and the narrowest interval with ``prob``.

    :param draws: ``(draws, *shape)`` by site.
    """
    tail = (1 - prob) / 2
    head = ("", "mean", "std", "median", f"{tail:.1%}", f"{1 - tail:.1%}")
    rows = [head, *(row for name, values in draws.items() for row in _rows(name, values, prob))]
    width = max(len(row[0]) for row in rows)
    return "\n".join(" ".join([row[0].rjust(width), *(cell.rjust(9) for cell in row[1:])]) for row in rows)


def _rows(name: str, values: Tensor, prob: float) -> Iterator[tuple[str, ...]]:
    values = values.to(torch.promote_types(values.dtype, torch.get_default_dtype()))
    numbers = torch.stack([values.mean(0), values.std(0), quantile(values, 0.5), *hpdi(values, prob)]).reshape(5, -1)
    for place, row in zip(itertools.product(*map(range, values.shape[1:])), numbers.T.tolist(), strict=True):
        index = ",".join(map(str, place))
        yield f"{name}[{index}]" if place else name, *(f"{x:.2f}" for x in row)


def _reliability(drawn: WeightedDraws) -> list[str]:
    """The Pareto k of runs' weights, if they have any."""
    if drawn.log_p is None or drawn.log_q is None:
        return []
    _, k_hat = smoothed((drawn.log_p - drawn.log_q).double().cpu().numpy())
    verdict = "good" if k_hat <= GOOD_K_HAT else "they are far from the posterior"
    return [f"Pareto k of the runs by themselves: {float(k_hat):.2f}, {verdict} (good to {GOOD_K_HAT})"]
