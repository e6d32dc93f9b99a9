"""Adaptation: the step size that goes with a wanted acceptance, and the scales that a chain learns in warm-up."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .metric import Identity, Moments, Preconditioner

_WINDOWS = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8)  # shares of the warm-up at whose ends the scales are fitted anew
_POOLED_FROM = 0.4  # before that every chain has a step size of its own, so that stragglers can follow
_CALM, _SHRINKAGE, _FORGETTING = 10, 0.05, 0.75  # t0, gamma and kappa of dual averaging
_FEWEST = 20  # draws in a window, and transitions left to find the step size that goes with new scales


def follow_acceptance(log_step: Tensor, acceptance: Tensor, wanted: float, gain: float) -> Tensor:
    """``log eta`` for the next transition: stochastic approximation with a constant gain (Robbins, Monro 1951).

    For a step size that goes on adapting; :class:`Adaptation` is for a warm-up that ends.
    """
    return log_step + gain * (acceptance - wanted)


class Following(NamedTuple):
    """A step size that follows the acceptance, ``(chains, rows)`` each: the logarithm of its factor now, what it is
    short of the wanted acceptance so far, and the average of the logarithm."""

    log_factor: Tensor
    shortfall: Tensor
    average: Tensor

    def after(self, shortfall: Tensor, gains: Tensor, center: Tensor) -> Following:
        """After one more transition, whose acceptance was short by ``shortfall``.

        :param gains: of the sum of shortfalls so far, of the new one, of the pull that they have, and of the average.
        """
        kept, added, pull, weight = gains.unbind(-1)
        total = kept * self.shortfall + added * shortfall
        log_factor = center - pull * total
        return Following(log_factor, total, self.average + weight * (log_factor - self.average))


_STILL = (1.0, 0.0, 0.0, 0.0)  # gains of a step size that stays at its center


def averaging(step: int) -> tuple[float, ...]:
    """Gains of Nesterov's dual averaging in its ``step``-th step, with the constants of Stan and Pyro."""
    share = 1 / (step + _CALM)
    return 1 - share, share, math.sqrt(step) / _SHRINKAGE, step**-_FORGETTING


class Adaptation:
    r"""Step-size factor and scales, from the transitions of a warm-up.

    The factor follows Nesterov's dual averaging towards ``target`` mean acceptance, rows apart: in the first part of
    the warm-up for every chain by itself, then for all chains together. The scales are fitted anew at the ends of
    growing windows. A block of transitions may go as far as :attr:`ahead`.

    Hoffman, Gelman: The No-U-turn sampler, JMLR 2014 (dual averaging of step sizes).

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
        self._pooled_from = math.floor(_POOLED_FROM * total)
        self._begin_window()

    def _begin_window(self) -> None:
        self._center, self._step = self.log_factor + math.log(10), 0
        self._shortfall = self._average = torch.zeros_like(self.log_factor)
        self._draws = self.preconditioner.moments(self._like)
        self._grads = self.preconditioner.moments(self._like)

    @property
    def ahead(self) -> int:
        """Transitions up to where something is fitted, or the warm-up ends; 0 after it."""
        return min((e - self.done for e in (*self._ends, self._pooled_from, self.total) if e > self.done), default=0)

    @property
    def is_pooled(self) -> bool:
        """Whether all chains follow their mean acceptance."""
        return self.done >= self._pooled_from

    @property
    def _follows(self) -> bool:
        return self.target is not None and self.done < self.total

    @property
    def center(self) -> Tensor:
        """What the logarithm of the factor is pulled to; it is there where nothing is adapted."""
        return self._center if self._follows else self.log_factor

    def gains(self, count: int) -> list[tuple[float, ...]]:
        """Of the next transitions."""
        return [averaging(self._step + 1 + k) if self._follows else _STILL for k in range(count)]

    def following(self, chains: int) -> Following:
        """As blocks of transitions carry it."""
        parts = self.log_factor, self._shortfall, self._average
        return Following(*(t.expand(chains, -1).contiguous() for t in parts))

    def note(self, u: Tensor, grad: Tensor) -> None:
        """Told states and gradients, ``(transitions, chains, rows, size)``, of transitions of a warm-up."""
        if self._ends:
            self._draws.update(u.flatten(0, 1))
            self._grads.update(grad.flatten(0, 1))

    def advance(self, following: Following, count: int) -> bool:
        """Go on after ``count`` transitions, which :meth:`note` was told; whether the scales are other ones now."""
        if self._follows:
            self.log_factor, self._shortfall, self._average = (t[0] if self.is_pooled else t for t in following)
            self._step += count
        self.done += count
        if self.target is not None and self.done == self.total:
            self.log_factor = self._average
        enough = self._draws.count >= _FEWEST and self.total - self.done >= _FEWEST
        fits = self.done in self._ends and enough
        if fits:
            self._refit()
        if self.target is not None and self.done == self._pooled_from and self.log_factor.dim() > 1:
            self.log_factor = self.log_factor.median(0).values
            self._begin_window()
        return fits

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
            "averaging": {
                "prox_center": self._center,
                "_g_avg": self._shortfall,
                "_x_avg": self._average,
                "_t": self._step,
            },
            "draws": _saved(self._draws),
            "grads": _saved(self._grads),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.done, self.log_factor, self.factor = state["done"], state["log_factor"], state["factor"]
        self.scales = self.preconditioner.scales(self.factor)
        averaging = state["averaging"]
        self._center, self._step = averaging["prox_center"], averaging["_t"]
        self._shortfall, self._average = (
            torch.as_tensor(averaging[k]).to(self.log_factor).expand_as(self.log_factor) for k in ("_g_avg", "_x_avg")
        )
        vars(self._draws).update(state["draws"])
        vars(self._grads).update(state["grads"])


def _saved(moments: Moments) -> dict[str, Any]:
    return {k: getattr(moments, k) for k in ("count", "mean", "scatter")}
