"""Adaptation: the step size that goes with a wanted acceptance, and the scales that a chain learns in warm-up."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.ops.dual_averaging import DualAveraging
from torch import Tensor

from .metric import Identity, Moments, Preconditioner

_WINDOWS = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8)  # shares of the warm-up at whose ends the scales are fitted anew
_POOLED_FROM = 0.4  # before that every chain has a step size of its own, so that stragglers can follow
_FEWEST = 20  # draws in a window, and transitions left to find the step size that goes with new scales


def follow_acceptance(log_step: Tensor, acceptance: Tensor, wanted: float, gain: float) -> Tensor:
    """``log eta`` for the next transition: stochastic approximation with a constant gain (Robbins, Monro 1951).

    For a step size that goes on adapting; :class:`Adaptation` is for a warm-up that ends.
    """
    return log_step + gain * (acceptance - wanted)


class Adaptation:
    r"""Step-size factor and scales, from the transitions of a warm-up.

    The factor follows Nesterov's dual averaging towards ``target`` mean acceptance, rows apart: in the first part of
    the warm-up for every chain by itself, then for all chains together. The scales are fitted anew at the ends of
    growing windows.

    :param like: a zero state ``(rows, size)``.
    :param total: transitions in the warm-up.
    :param target: wanted acceptance probability, or None where the step size stays.
    :param restart: factor with which a new window begins.
    """

    def __init__(
        self, like: Tensor, total: int, target: float | None, preconditioner: Preconditioner, restart: float
    ) -> None:
        self.total, self.target, self.preconditioner = total, target, preconditioner
        self.done = 0
        self.log_factor = like.new_zeros(like.shape[0])
        self.factor = preconditioner.initial(like)
        self.scales = preconditioner.scales(self.factor)
        self._log_restart, self._like = math.log(restart), like
        fits = not isinstance(preconditioner, Identity)
        self._ends = [round(share * total) for share in _WINDOWS] if fits else []
        self._begin_window()

    def _begin_window(self) -> None:
        self._averaging = DualAveraging(prox_center=self.log_factor + math.log(10))
        self._draws = self.preconditioner.moments(self._like)
        self._grads = self.preconditioner.moments(self._like)

    def update(self, u: Tensor, grad: Tensor, accept_prob: Tensor) -> None:
        """Told state and gradient ``(chains, rows, size)`` after a transition, and ``(chains, rows)`` acceptance."""
        if self.done >= self.total:
            return
        self.done += 1
        pooled = self.done > _POOLED_FROM * self.total
        if self.target is not None:
            self._averaging.step(self.target - (accept_prob.mean(0) if pooled else accept_prob))
            self.log_factor, average = self._averaging.get_state()
            if self.done == self.total:
                self.log_factor = average
        if self._ends:
            self._draws.update(u)
            self._grads.update(grad)
        enough = self._draws.count >= _FEWEST and self.total - self.done >= _FEWEST
        if self.done in self._ends and enough:
            self._refit()
        if self.target is not None and self.done == math.floor(_POOLED_FROM * self.total) and self.log_factor.dim() > 1:
            self.log_factor = self.log_factor.median(0).values
            self._begin_window()

    def _refit(self) -> None:
        self.factor = self.preconditioner.fit(self._draws.covariance, self._grads.covariance, self.factor)
        self.scales = self.preconditioner.scales(self.factor)
        if self.target is not None:
            self.log_factor = torch.full_like(self.log_factor, self._log_restart)
        self._begin_window()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers that :meth:`load_state_dict` takes."""
        return {
            "done": self.done,
            "log_factor": self.log_factor,
            "factor": self.factor,
            "averaging": dict(vars(self._averaging)),
            "draws": _saved(self._draws),
            "grads": _saved(self._grads),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.done, self.log_factor, self.factor = state["done"], state["log_factor"], state["factor"]
        self.scales = self.preconditioner.scales(self.factor)
        vars(self._averaging).update(state["averaging"])
        vars(self._draws).update(state["draws"])
        vars(self._grads).update(state["grads"])


def _saved(moments: Moments) -> dict[str, Any]:
    return {k: getattr(moments, k) for k in ("count", "mean", "scatter")}
