"""What a chain learns during warm-up: a step size for a wanted acceptance rate, and the scales of the posterior.

A preconditioner makes a linear map per row, ``u = L w``; the dynamics then moves ``w``, in which the posterior has unit
scales. For Langevin dynamics with a diagonal ``L`` this is one step size ``eta * L_i ** 2`` per coordinate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from pyro.ops.dual_averaging import DualAveraging
from torch import Tensor

_WINDOWS = (0.1, 0.2, 0.4, 0.8)  # shares of the warm-up at whose ends the scales are fitted anew
_FEWEST = 10  # transitions in the first window


class Scales(ABC):
    """``u = L w`` in every row."""

    @abstractmethod
    def whiten(self, u: Tensor) -> Tensor:
        """``L^-1 u``."""

    @abstractmethod
    def color(self, w: Tensor) -> Tensor:
        """``L w``."""

    @abstractmethod
    def pull(self, grad: Tensor) -> Tensor:
        """``L^T grad``: the gradient with respect to ``w``."""


@dataclass(frozen=True)
class Unit(Scales):
    """``L = I``."""

    def whiten(self, u: Tensor) -> Tensor:
        return u

    def color(self, w: Tensor) -> Tensor:
        return w

    def pull(self, grad: Tensor) -> Tensor:
        return grad


@dataclass(frozen=True)
class DiagonalScales(Scales):
    """``L`` diagonal, ``factor`` of shape ``(rows, size)``."""

    factor: Tensor

    def whiten(self, u: Tensor) -> Tensor:
        return u / self.factor

    def color(self, w: Tensor) -> Tensor:
        return w * self.factor

    def pull(self, grad: Tensor) -> Tensor:
        return grad * self.factor


@dataclass(frozen=True)
class DenseScales(Scales):
    """``L`` lower triangular, ``factor`` of shape ``(rows, size, size)``."""

    factor: Tensor

    def whiten(self, u: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.factor, u.unsqueeze(-1), upper=False).squeeze(-1)

    def color(self, w: Tensor) -> Tensor:
        return (self.factor @ w.unsqueeze(-1)).squeeze(-1)

    def pull(self, grad: Tensor) -> Tensor:
        return (self.factor.mT @ grad.unsqueeze(-1)).squeeze(-1)


class Preconditioner(ABC):
    """How the scales of the posterior are estimated from the draws of the warm-up, all chains together."""

    dense = False

    @abstractmethod
    def scales(self, factor: Tensor | None) -> Scales:
        """Scales from a fitted ``factor``; unit scales from None."""

    @abstractmethod
    def fit(self, moments: Moments) -> Tensor | None:
        """The factor ``L`` for the (co)variances seen."""


class Identity(Preconditioner):
    """No preconditioning.

    >>> Identity().scales(None)
    Unit()
    """

    def scales(self, factor: Tensor | None) -> Scales:
        return Unit()

    def fit(self, moments: Moments) -> Tensor | None:
        return None


class Diagonal(Preconditioner):
    """A scale per coordinate: ``L_i = sd(u_i)``, shrunk towards 1 as in Stan where draws are few."""

    def scales(self, factor: Tensor | None) -> Scales:
        return Unit() if factor is None else DiagonalScales(factor)

    def fit(self, moments: Moments) -> Tensor | None:
        return moments.covariance().sqrt()


class Dense(Preconditioner):
    """The whole covariance of a row, ``L = cholesky(cov(u))``: for correlated posteriors of up to some hundred
    coordinates."""

    dense = True

    def scales(self, factor: Tensor | None) -> Scales:
        return Unit() if factor is None else DenseScales(factor)

    def fit(self, moments: Moments) -> Tensor | None:
        return torch.linalg.cholesky(moments.covariance())


class Moments:
    """Running mean and (co)variance over chains and draws, per row.

    :param dense: whether whole covariances are kept.
    """

    def __init__(self, like: Tensor, dense: bool) -> None:
        self.dense, self.count = dense, 0
        self.mean = torch.zeros_like(like)
        self.scatter = torch.zeros_like(torch.diag_embed(like) if dense else like)

    def update(self, u: Tensor) -> None:
        """Add ``(chains, rows, size)`` values; batches are merged as by Chan, Golub, LeVeque 1979."""
        added, mean = len(u), u.mean(0)
        shift, count = mean - self.mean, self.count + added
        self.scatter = self.scatter + self._square(u - mean).sum(0)
        self.scatter = self.scatter + self._square(shift) * (self.count * added / count)
        self.mean = self.mean + shift * (added / count)
        self.count = count

    def _square(self, x: Tensor) -> Tensor:
        return x.unsqueeze(-1) * x.unsqueeze(-2) if self.dense else x.square()

    def covariance(self) -> Tensor:
        """``(rows, size)`` variances or ``(rows, size, size)`` covariances, regularised as in Stan."""
        n = self.count
        share, floor = n / (n + 5.0), 1e-3 * 5.0 / (n + 5.0)
        eye = torch.eye(self.mean.shape[-1]).to(self.mean) if self.dense else 1.0
        return share * self.scatter / max(n - 1, 1) + floor * eye


class Adaptation:
    r"""Step-size factor per row and scales, from the transitions of a warm-up.

    The factor follows Nesterov's dual averaging towards ``target`` mean acceptance (chains together, rows apart); the
    scales are fitted anew at the ends of growing windows.

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
        self.factor: Tensor | None = None
        self.scales = preconditioner.scales(None)
        self._log_restart = torch.log(like.new_tensor(restart))
        self._like = like
        self._averaging = self._fresh_averaging()
        self._moments = Moments(like, preconditioner.dense)
        fits = not isinstance(preconditioner, Identity) and _WINDOWS[0] * total >= _FEWEST
        self._ends = {round(share * total) for share in _WINDOWS} if fits else set()

    def _fresh_averaging(self) -> DualAveraging:
        return DualAveraging(prox_center=self.log_factor + torch.log(self.log_factor.new_tensor(10.0)))

    def update(self, u: Tensor, accept_prob: Tensor) -> None:
        """Told the state ``(chains, rows, size)`` after a transition and its ``(chains, rows)`` acceptance."""
        if self.done >= self.total:
            return
        self.done += 1
        if self.target is not None:
            self._averaging.step(self.target - accept_prob.mean(0))
            self.log_factor, average = self._averaging.get_state()
            if self.done == self.total:
                self.log_factor = average
        if self._ends:
            self._moments.update(u)
            if self.done in self._ends:
                self._refit()

    def _refit(self) -> None:
        self.factor = self.preconditioner.fit(self._moments)
        self.scales = self.preconditioner.scales(self.factor)
        self._moments = Moments(self._like, self.preconditioner.dense)
        if self.target is not None:
            self.log_factor = torch.zeros_like(self.log_factor) + self._log_restart
            self._averaging = self._fresh_averaging()

    def state_dict(self) -> dict:
        """Tensors and numbers that :meth:`load_state_dict` takes."""
        averaging = {k: v for k, v in vars(self._averaging).items()}
        moments = {k: getattr(self._moments, k) for k in ("count", "mean", "scatter")}
        return {
            "done": self.done,
            "log_factor": self.log_factor,
            "factor": self.factor,
            "averaging": averaging,
            "moments": moments,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from a saved state."""
        self.done, self.log_factor, self.factor = state["done"], state["log_factor"], state["factor"]
        self.scales = self.preconditioner.scales(self.factor)
        vars(self._averaging).update(state["averaging"])
        vars(self._moments).update(state["moments"])
