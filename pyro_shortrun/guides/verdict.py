"""The verdict on a fit: whether losses still fall."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

BATCHES = 10  # in a window: few, so that each is longer than what neighbouring losses share
_LIMIT = 2.1  # standard errors: the .975 quantile of Student's t with 2 (BATCHES - 1) degrees of freedom
_ROUNDING = 1e-6  # of the loss: less is no change in float32


@dataclass(frozen=True, eq=False, repr=False)
class FitResult:
    """What a run of :class:`ShortRunSVI` gives: its losses, and whether they still fall; as one line, ``repr``.

    :param losses: what the steps gave, shape (steps done,), float64, in nats.
    :param window: steps in a window, ``W``.
    :param change: the mean loss of the last window minus that of the one before; NaN where there were no two.
    :param error: the standard error of ``change``.
    :param converged: whether ``change`` is within its error.
    :param seconds: how long the run took.
    :param num_nonfinite: steps whose loss was not finite.
    :param interrupted: whether an interrupt from the keyboard ended the run.
    """

    losses: Tensor
    window: int
    change: float
    error: float
    converged: bool
    seconds: float
    num_nonfinite: int
    interrupted: bool = False

    @property
    def loss(self) -> float:
        """The mean loss in the last window, or in all steps where there were fewer."""
        return finite_of(self.losses)[-self.window :].mean().item()

    def __repr__(self) -> str:
        steps = f"{len(self.losses)} steps in {self.seconds:.3g} s{', interrupted' * self.interrupted}"
        bad = f" ({self.num_nonfinite} steps were not finite and moved nothing)" * bool(self.num_nonfinite)
        return f"{steps}: loss {self._with_error()}, {self._verdict()}{bad}"

    def _with_error(self) -> str:
        last = finite_of(self.losses)[-self.window :]
        return _rounded(self.loss, math.sqrt(_squared_error(last))) if len(last) >= BATCHES else f"{self.loss:.5g}"

    def _verdict(self) -> str:
        if math.isnan(self.change):
            return f"too few steps to say whether it falls (two windows of {self.window} are needed)"
        if self.converged:
            return "converged"
        size = f"{_rounded(abs(self.change), self.error)} per window of {self.window} steps"
        return f"still falling by {size}: run on" if self.change < 0 else f"rising by {size}: lower the learning rate"


def verdict(losses: Tensor, window: int) -> tuple[float, float, bool]:
    """Change of the mean loss from window to window, its standard error, and whether that is all it is.

    :param losses: shape (steps,); those that are not finite are left out.
    """
    finite = finite_of(losses)
    if len(finite) < 2 * window:
        return math.nan, math.nan, False
    before, last = finite[-2 * window : -window], finite[-window:]
    mean = last.mean().item()
    change = mean - before.mean().item()
    error = math.sqrt(_squared_error(before) + _squared_error(last))
    return change, error, abs(change) <= max(_LIMIT * error, _ROUNDING * max(1.0, abs(mean)))


def _squared_error(losses: Tensor) -> float:
    """Of their mean, by the means of batches of neighbours."""
    size = len(losses) // BATCHES
    means = losses[len(losses) - size * BATCHES :].view(BATCHES, size).mean(1)
    return means.var().item() / BATCHES


def finite_of(losses: Tensor) -> Tensor:
    """Those that are finite."""
    return losses[losses.isfinite()]


def _rounded(value: float, error: float) -> str:
    """Two digits of the error."""
    digits = 3 if error == 0 or not math.isfinite(error) else min(max(0, 1 - math.floor(math.log10(error))), 6)
    return f"{value:.{digits}f} +- {error:.{digits}f}"
