"""Natural gradients for a Gaussian: its precision follows the mean curvature, its mean Newton's step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .normal import Normal, antithetic, lower, whitened
from .target import Target

_TRUST = 4.0  # a precision falls by at most this factor in a step, as wider is more dangerous than narrower
_STEEPEST = 100.0  # and rises by this one
_HUGE = 1e100  # curvature of a density that has no upper bound
_SLACK = 0.1  # nats by which a bound may fall: over few draws, its highest point is not where it is stationary
_REACH = 0.5  # how far the mean moves, in standard deviations times the root of the dimension
_FEWEST, _MOST, _HESSIANS = 8, 256, 4000  # draws, and Hessian products, per iteration
_JUDGES = 64  # draws of the bounds by which starts are compared
_SLOWEST, _FASTEST = 0.05, 0.7  # rates
_PATIENCE = 20  # steps in which a bound is to rise


@dataclass(frozen=True)
class Residual:
    """How far a Gaussian is from stationary, in its own coordinates: ``mean`` ``(size,)`` in standard deviations,
    ``spread`` the largest log ratio of a variance and the one that its curvature asks for."""

    mean: Tensor
    spread: float

    @property
    def size(self) -> float:
        """One number for both."""
        return max(self.mean.abs().max().item(), self.spread)


def natural_fit(
    target: Target, *starts: Normal, max_steps: int = 200, tolerance: float = 0.02
) -> tuple[Normal, Residual]:
    r"""The Gaussian that maximises the bound, ``E[grad log pi] = 0`` and ``E[-Hessian log pi] = Sigma^-1``, by

    .. math:: \Sigma^{-1} \leftarrow (1 - \rho) \Sigma^{-1} + \rho\, E[-\nabla^2 \log\pi(u)], \qquad
              m \leftarrow m + \rho\, \Sigma\, E[\nabla \log\pi(u)] ,

    with expectations over fixed antithetic noise, of which there is more when the fit has settled on less. ``rho``
    falls where the bound does. Steps are limited in the coordinates of the Gaussian, so that they are the same in all
    units. On a Gaussian target it is exact. Of several ``starts`` the one is taken from which it gets highest.

    Khan, Lin: Conjugate-computation variational inference, AISTATS 2017; Giordano, Ingram, Broderick: Black box
    variational inference with a deterministic objective, JMLR 2024.

    :param tolerance: the residual at which it ends, over the largest number of draws.
    """
    most, like = max(4, min(_MOST, _HESSIANS // target.size)), starts[0].loc
    count = min(_FEWEST, most)
    noise, judge = antithetic(count, target.size, like), antithetic(_JUDGES, target.size, like)
    ascents = [_Ascent(_Place.of(target, start, noise)) for start in starts]
    if len(ascents) > 1:
        for ascent in ascents:
            ascent.climb(target, 4 * tolerance, max_steps // 3)
    ascent = max(ascents, key=lambda a: a.here.fit.bound(target, judge)[0]) if len(ascents) > 1 else ascents[0]
    for _ in range(max_steps):
        last = count >= most
        if ascent.is_done(tolerance if last else 4 * tolerance):
            if last:
                break
            count = min(4 * count, most)
            ascent = _Ascent(_Place.of(target, ascent.here.fit, antithetic(count, target.size, like)))
        ascent.step(target)
    return ascent.here.fit, ascent.here.residual


class _Ascent:
    """Steps over the same noise."""

    def __init__(self, here: _Place) -> None:
        self.here, self.rate = here, 0.5
        self._heights = [here.bound]

    def is_done(self, tolerance: float) -> bool:
        """Whether the Gaussian is stationary, or the bound no longer rises."""
        before = self._heights[-1 - _PATIENCE] if len(self._heights) > _PATIENCE else -math.inf
        return self.here.residual.size < tolerance or self._heights[-1] < before + _SLACK

    def climb(self, target: Target, tolerance: float, max_steps: int) -> None:
        """Steps until it is done, or hopeless."""
        for _ in range(max_steps):
            if self.is_done(tolerance):
                return
            self.step(target)

    def step(self, target: Target) -> None:
        """One step, or none where the bound would fall."""
        there = _Place.of(target, self.here.ahead(self.rate), self.here.noise)
        gain = there.bound - self.here.bound
        if gain < -_SLACK and there.residual.size > 0.5 * self.here.residual.size and self.rate > _SLOWEST:
            self.rate *= 0.4
        else:
            fastest = 1.0 if gain > 1 else _FASTEST
            self.here, self.rate = there, min(fastest, 1.4 * self.rate) if gain > 0 else max(_SLOWEST, 0.7 * self.rate)
        self._heights.append(self.here.bound)


@dataclass(frozen=True)
class _Place:
    """A Gaussian on the way, with its bound, and in its own coordinates mean slope and mean curvature (by
    eigenvalues and vectors), over given noise."""

    fit: Normal
    noise: Tensor
    bound: float
    slope: Tensor
    values: Tensor
    vectors: Tensor
    residual: Residual

    @classmethod
    def of(cls, target: Target, fit: Normal, noise: Tensor) -> _Place:
        value, grad, curvature = target.curvature(fit.at(noise))
        known = value.isfinite()
        if not known.any():
            known = torch.ones_like(known)
        white = whitened(curvature[known].mean(0), fit.factor)
        slope = grad[known].mean(0) @ fit.factor
        white = white.nan_to_num(0.0, _HUGE, -_HUGE).clamp(-_HUGE, _HUGE)
        values, vectors = torch.linalg.eigh(white)
        bound = (value.mean() + fit.log_scale).item()
        spread = values.clamp(1 / _TRUST, _STEEPEST).log().abs().max().item()
        return cls(fit, noise, bound, slope, values, vectors, Residual(slope, spread))

    def ahead(self, rate: float) -> Normal:
        """The Gaussian one step on."""
        values = 1 + rate * (self.values.clamp(1 / _TRUST, _STEEPEST) - 1)
        steep = 1 + rate * (self.values.abs().clamp(1 / _TRUST, _STEEPEST) - 1)
        step = rate * (self.vectors / steep) @ (self.vectors.mT @ self.slope)
        reach = _REACH * len(step) ** 0.5 / step.norm().clamp(min=1e-30).item()
        loc = self.fit.loc + self.fit.factor @ (step * min(1.0, reach))
        return Normal(loc, lower(self.fit.factor @ (self.vectors * values.rsqrt())))
