"""Newton's path to modes, from several places at once, with the best Laplace approximation on the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .normal import Normal, lower
from .target import Target

_STEPS = (4.0, 2.0, 1.0, 0.5, 0.25, 0.1, 0.03, 0.01, 1e-3, 1e-5)  # of Newton's own step
_STILL, _SLOW = 1e-4, 0.1  # Newton decrements, in nats
COMPARABLE = 3.0  # nats between the bounds of modes that count
_PATIENCE = 4  # iterations in which the best bound of the paths does not move


@dataclass(frozen=True)
class Curved:
    """Inverse square roots of curvatures, eigenvalues taken as positive: ``root @ root^T`` is the covariance of the
    Laplace approximation, ``(n, size, size)``."""

    root: Tensor

    @classmethod
    def of(cls, curvature: Tensor, rounding: float) -> Curved:
        """Found in units in which the diagonal is one, so that scales of coordinates do not matter."""
        diagonal = curvature.diagonal(dim1=-2, dim2=-1).abs()
        unit = torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal)).rsqrt()
        values, vectors = torch.linalg.eigh(curvature * unit.unsqueeze(-1) * unit.unsqueeze(-2))
        floor = max(10 * rounding * curvature.shape[-1], 1e-10)
        values = values.abs().clamp(min=floor)
        return cls(unit.unsqueeze(-1) * vectors * values.rsqrt().unsqueeze(-2))

    def step(self, grad: Tensor) -> Tensor:
        """Newton's step for gradients ``(n, size)``."""
        return (self.root @ (self.root.mT @ grad.unsqueeze(-1))).squeeze(-1)


class Paths(NamedTuple):
    """The best Gaussian on the paths, its bound, and those with nearly as high a bound at modes elsewhere."""

    best: Normal
    bound: float
    others: tuple[Normal, ...]


def laplace_on_paths(target: Target, start: Tensor, noise: Tensor, max_steps: int = 40) -> Paths:
    r"""The Gaussian ``N(u_k, |H_k|^{-1})`` with the highest bound along damped Newton paths

    .. math:: u_{k+1} = u_k + t_k |H_k|^{-1} \nabla\log\pi(u_k) ,

    where ``|H|`` is minus the Hessian with its eigenvalues taken as positive, and ``t_k`` the best of ten. Steps are
    the same in all units of the coordinates. As in Pathfinder, the best one need not be at the end, which may be an
    infinite peak.

    Zhang, Carpenter, Gelman, Vehtari: Pathfinder, JMLR 2022.

    :param start: ``(n, size)``, in double precision.
    :param noise: the noise of all bounds, ``(draws, size)``.
    """
    best, highest, patience = Normal(start[0], torch.diag_embed(torch.ones_like(start[0]))), -torch.inf, _PATIENCE
    ends: list[tuple[Normal, float]] = []
    u = start[target.value(start).isfinite()]
    for _ in range(max_steps if len(u) else 0):
        value, grad, curvature = target.curvature(u)
        curved = Curved.of(curvature, target.rounding)
        step = curved.step(grad)
        bounds, moved = _look(target, u, value, curved, step, noise)
        place = int(bounds.argmax())
        if bounds[place] > highest + 0.01:
            patience = _PATIENCE
        if bounds[place] > highest:
            best, highest = Normal(u[place], lower(curved.root[place])), bounds[place].item()
        decrement = (grad * step).sum(-1)
        still = (decrement < _SLOW) & (bounds > highest - COMPARABLE)
        ends = [(Normal(u[i], lower(curved.root[i])), bounds[i].item()) for i in still.nonzero().flatten().tolist()]
        patience -= 1
        if (decrement < _STILL).all() or (patience < 0 and decrement[value.argmax()] < _SLOW) or patience < -_PATIENCE:
            break
        u = moved
    ends = [end for end in ends if end[1] > highest - COMPARABLE]
    others: list[Normal] = []
    for end, _ in sorted(ends, key=lambda end: -end[1]):
        if all(end.is_apart(known) for known in (best, *others)):
            others.append(end)
    return Paths(best, highest, tuple(others))


def _look(
    target: Target, u: Tensor, value: Tensor, curved: Curved, step: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Bounds of the Laplace approximations at ``u``, and the best places along the steps, in one evaluation."""
    count, size = u.shape
    factors = torch.tensor(_STEPS, dtype=u.dtype, device=u.device)
    along = u + factors[:, None, None] * step
    draws = u + (curved.root @ noise.mT).permute(2, 0, 1)
    values = target.value(torch.cat([along, draws]).reshape(-1, size)).reshape(-1, count)
    found, weights = values[: len(factors)], values[len(factors) :] + 0.5 * noise.square().sum(-1, keepdim=True)
    bounds = weights.mean(0) + torch.linalg.slogdet(curved.root).logabsdet
    bounds = bounds + 0.5 * size * torch.log(torch.tensor(2 * torch.pi))
    highest, place = found.max(0)
    better = highest >= value - 8 * target.rounding * value.abs()
    moved = along[place, torch.arange(count)]
    return bounds, torch.where(better.unsqueeze(-1), moved, u)
