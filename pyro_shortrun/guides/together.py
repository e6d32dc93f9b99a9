"""The torch optimisers that a Pyro optimiser has, one for each parameter, as one for all of them."""

from __future__ import annotations

from typing import Any

from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim import Optimizer


class Together:
    """Moves parameters as ``optim`` does, to rounding, by one fused call where torch has that for its kind.

    States and options stay those of ``optim``, which saves and schedules them as ever.
    """

    def __init__(self, optim: Any) -> None:
        self._optim = optim
        self._params: set[Tensor] = set()
        self._joint: Optimizer | None = None
        self._own: list[Optimizer] = []
        self._options: dict[str, Any] = {}

    def __call__(self, params: set[Tensor]) -> None:
        """A step of these parameters, by their gradients."""
        if params != self._params or not self._is_current():
            self._optim(params)  # creates what is missing
            self._params, self._joint = params, self._joined(params)
        elif self._joint is None:
            self._optim(params)
        else:
            self._joint.step()

    def _is_current(self) -> bool:
        """Whether no scheduler has changed an option since, and no state was loaded."""
        if self._joint is None:
            return True
        order = self._joint.param_groups[0]["params"]
        return all(
            _options(own) == self._options and own.state[p] is self._joint.state[p]
            for own, p in zip(self._own, order, strict=True)
        )

    def _joined(self, params: set[Tensor]) -> Optimizer | None:
        """All as one, or None where they differ, clip gradients, or torch cannot."""
        optim = self._optim
        if not isinstance(optim, PyroOptim) or any(optim.grad_clip[p] is not None for p in params):
            return None
        order = list(params)
        self._own = [getattr(optim.optim_objs[p], "optimizer", optim.optim_objs[p]) for p in order]
        options = [_options(own) for own in self._own]
        kind: Any = type(self._own[0]) if self._own else None
        alike = all(type(own) is kind and o == options[0] for own, o in zip(self._own, options, strict=True))
        if kind is None or not alike or "fused" not in options[0] or not _can_fuse(order):
            return None
        joint: Optimizer = kind(order)
        self._options = options[0]
        joint.param_groups[0].update(options[0], fused=True, foreach=False)
        for own, p in zip(self._own, order, strict=True):
            joint.state[p] = own.state[p]
        return joint


def _options(own: Optimizer) -> dict[str, Any]:
    return {k: v for k, v in own.param_groups[0].items() if k != "params"}


def _can_fuse(params: list[Tensor]) -> bool:
    """On a GPU, the number of steps that an optimiser of its own keeps is where a fused one cannot read it."""
    return all(p.is_floating_point() and p.device.type == "cpu" for p in params)
