"""The fit of a Gaussian to a target: candidates, of which the one with the highest bound is kept."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from .natural import natural_fit
from .newton import COMPARABLE, laplace_on_paths
from .normal import Normal, antithetic
from .target import Target

_PATH_DRAWS = 16  # of each bound along a path
_BOUND_DRAWS = 400  # of the bounds that are compared
_TIE = 0.05  # nats
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
    :param others: modes elsewhere that Newton's paths came to, with a bound within 3 nats of the best one's.
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
    others: tuple[Normal, ...] = ()


def fit_normal(target: Target, places: Tensor, first: Normal | None = None) -> Fit:
    """The better of two Gaussians: the best Laplace approximation on Newton's paths from ``places``, and what
    natural-gradient ascent of the bound makes of it, and of ``first`` or the unit Gaussian.

    :param places: ``(n, size)``, where paths begin.
    :param first: a Gaussian of an earlier fit.
    :raises ValueError: where there is no place from which one can be found.
    """
    began = time.process_time()
    laplace, height, others = laplace_on_paths(target, places, antithetic(_PATH_DRAWS, target.size, places))
    unit = Normal(torch.zeros_like(places[0]), torch.diag_embed(torch.ones_like(places[0])))  # a peak may be too narrow
    ascended, residual = natural_fit(target, laplace, unit if first is None else first)
    noise = antithetic(_BOUND_DRAWS, target.size, places)
    bound, error = _bound(target, ascended, noise)
    mean: Tensor | None = residual.mean.abs()
    normal, kind, converged = ascended, "natural gradients", residual.size < _SETTLED
    if math.isfinite(height):
        other, its_error = _bound(target, laplace, noise)
        if other > bound + _TIE:  # the ascent has lost its way
            normal, kind, mean, converged, bound, error = laplace, "Laplace", None, False, other, its_error
    if not math.isfinite(bound):
        raise ValueError(
            "no Gaussian has a finite bound: the log density is not finite around every place that was tried. Check "
            "the data for NaN, the observation's support, and priors that reach where the model is not defined; or "
            "pass another start, such as start=Prior()."
        )
    known = (laplace, *others) if height > bound - COMPARABLE else ()
    others = tuple(mode for mode in known if mode.is_apart(normal))
    seconds = time.process_time() - began
    return Fit(normal, kind, bound, error, mean, converged, target.evaluations, seconds, others)


def _bound(target: Target, normal: Normal, noise: Tensor) -> tuple[float, float]:
    return normal.bound(target, noise) if normal.is_finite else (-math.inf, math.inf)
