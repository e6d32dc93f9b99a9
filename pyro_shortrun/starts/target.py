"""Targets of a fit: the log density of one row, in double precision, with its curvature."""

from __future__ import annotations

import torch
from torch import Tensor

from ..density.interface import Density

_AT_ONCE = 2**14  # numbers of Hessian products that are asked for together


class Target:
    """``log pi`` over states ``(n, size)`` of the single row of a density.

    The model is run in its own precision; what is made of its values is kept in double precision. Where it is not
    finite, ``log pi`` is ``-inf`` and derivatives are zero. ``evaluations`` counts states.

    :param density: with one row.
    """

    def __init__(self, density: Density) -> None:
        self._density = density
        self.size, self.dtype = density.layout.size, density.structure.dtype
        self.device = density.structure.device
        self.evaluations = 0

    @property
    def rounding(self) -> float:
        """Unit of rounding of the model's own precision."""
        return torch.finfo(self.dtype).eps

    def _states(self, u: Tensor) -> Tensor:
        self.evaluations += len(u)
        return u.to(self.dtype).unsqueeze(1)

    @torch.no_grad()
    def value(self, u: Tensor) -> Tensor:
        """``log pi(u)``, ``(n,)``."""
        value = self._value(self._states(u)).reshape(len(u)).double()
        return torch.where(value.isfinite(), value, torch.full_like(value, -torch.inf))

    def _value(self, states: Tensor) -> Tensor:
        """Values; NaN at states where the model's linear algebra fails, which are found by halving."""
        known = dict(self._density.structure.vectorizes)
        try:
            return self._density(states)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            if len(states) == 1:
                return states.new_full((1, 1), torch.nan)
            self._density.structure.vectorizes.clear()
            self._density.structure.vectorizes.update(known)  # it is not that chains cannot be vectorised
            half = len(states) // 2
            return torch.cat([self._value(states[:half]), self._value(states[half:])])

    def value_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """``log pi(u)`` and its gradient, ``(n,)`` and ``(n, size)``."""
        value, grad = self._density.value_and_grad(self._states(u))
        return _finite(value.reshape(len(u)), grad.reshape(u.shape))

    def curvature(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``log pi(u)``, its gradient, and minus its Hessian, ``(n,)``, ``(n, size)`` and ``(n, size, size)``."""
        leaf = self._states(u).requires_grad_()
        with torch.enable_grad():
            value, grad = self._density.value_and_grad(leaf, create_graph=True)
        product = self._density.hessian_product(leaf, grad, create_graph=False)
        unit = torch.eye(self.size, dtype=self.dtype, device=self.device)
        each = max(1, _AT_ONCE // max(leaf.numel(), 1))
        columns = [product(part[:, None, None].expand(-1, *leaf.shape)) for part in unit.split(each)]
        hessian = -torch.cat(columns)[:, :, 0].movedim(0, -1).double()
        hessian = (hessian + hessian.mT) / 2
        bad = ~hessian.isfinite().flatten(1).all(-1)
        value = torch.where(bad, torch.nan, value.detach().reshape(len(u)))
        value, grad = _finite(value, grad.detach().reshape(u.shape))
        return value, grad, torch.where(value.isfinite()[:, None, None], hessian, torch.zeros_like(hessian))


def _finite(value: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    value, grad = value.double(), grad.double()
    known = value.isfinite() & grad.isfinite().all(-1)
    return (
        torch.where(known, value, torch.full_like(value, -torch.inf)),
        torch.where(known.unsqueeze(-1), grad, torch.zeros_like(grad)),
    )
