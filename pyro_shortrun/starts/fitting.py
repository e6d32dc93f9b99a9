"""The fit of a Gaussian to a target: candidates, of which the one with the highest bound is kept."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from .natural import natural_fit
from .newton import laplace_on_paths
from .normal import Normal, antithetic
from .target import Target

_PATH_DRAWS = 16  # of each bound along a path
_BOUND_DRAWS = 400  # of the bounds that are compared
_SETTLED = 0.3  # residual above which a fit is not called converged


@dataclass(frozen=True)
class Fit:
    """What a fit found.

    :param normal: the Gaussian.
    :param kind: how it was found.
    :param bound: its bound on ``log p(x)``, in nats, and the standard ``error`` of that.
    :param residual: per coordinate, how far its mean is from stationary, in its standard deviations; None where it was
        not found by ascent of the bound.
    :param converged: whether no coordinate is far from stationary.
    :param evaluations: of the log density, Hessian products not counted.
    :param seconds: of this process.
    """

    normal: Normal
    kind: str
    bound: float
    error: float
    residual: Tensor | None
    converged: bool
    evaluations: int
    seconds: float


def fit_normal(target: Target, places: Tensor, first: Normal | None = None) -> Fit:
    """The best of some Gaussians: the best Laplace approximation on Newton's paths from ``places``, natural-gradient
    ascent of the bound from it, and the same from ``first``.

    :param places: ``(n, size)``, where paths begin.
    :param first: a Gaussian of an earlier fit.
    :raises ValueError: where there is no place from which one can be found.
    """
    began = time.process_time()
    noise = antithetic(_PATH_DRAWS, target.size, places)
    laplace, height = laplace_on_paths(target, places, noise)
    found: dict[str, Normal] = {"Laplace": laplace} if math.isfinite(height) else {}
    begin = laplace if first is None else first
    residuals = {}
    ascended, residual = natural_fit(target, begin)
    found["natural gradients"], residuals["natural gradients"] = ascended, residual
    kind, (bound, error) = _best(target, found)
    left = residuals.get(kind)
    return Fit(
        found[kind],
        kind,
        bound,
        error,
        None if left is None else left.mean.abs(),
        left is not None and left.size < _SETTLED,
        target.evaluations,
        time.process_time() - began,
    )


def _best(target: Target, found: Mapping[str, Normal]) -> tuple[str, tuple[float, float]]:
    known = {kind: normal for kind, normal in found.items() if normal.is_finite}
    like = next(iter(found.values())).loc
    noise = antithetic(_BOUND_DRAWS, target.size, like)
    bounds = {kind: normal.bound(target, noise) for kind, normal in known.items()}
    kind = max(bounds, key=lambda k: bounds[k][0], default="")
    if not kind or not math.isfinite(bounds[kind][0]):
        raise ValueError(
            "no Gaussian has a finite bound: the log density is not finite around every place that was tried. Check "
            "the data for NaN, the observation's support, and priors that reach where the model is not defined; or "
            "pass another start, such as start=Prior()."
        )
    return kind, bounds[kind]
