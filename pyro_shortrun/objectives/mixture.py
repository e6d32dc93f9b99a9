"""Mixture: the last step of a run is a Gaussian, and several runs make a mixture of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_count
from ..density.interface import Density
from ..dynamics.dynamics import Dynamics
from ..starts.base import Base
from .objective import Objective
from .transition import Column, Plain, State, Transition, check_whole


@dataclass(frozen=True)
class MixtureTransition(Plain):
    """The state is ``(u_{k-1}, u_k, mean of u_k given u_{k-1})``."""

    copies: int

    def begin(self, density: Density, start: Tensor, step_size: Tensor, noise: Tensor) -> State:
        check_whole(density, "Mixture")
        return start, start, torch.zeros_like(start)

    def move(
        self, density: Density, state: State, found: Sequence[Tensor], column: Column
    ) -> tuple[State, Tensor | None]:
        u, (eta,) = state[1], column.values
        mean = self.dynamics.mean(u, found[0], eta, column.scale)
        return (u, self.dynamics.step(u, found[0], eta, column.noise, column.scale), mean), None

    def finish(self, first: State, last: State, step_size: Tensor, log_q: Tensor | None) -> Tensor | None:
        end, mean = (t.unflatten(0, (-1, self.copies)) for t in (last[0], last[-1]))
        variance = 2 * step_size[-1]
        terms = -0.5 * ((end[:, :1] - mean).square() / variance + (2 * math.pi * variance).log())
        log_mixture = terms.sum(-1).logsumexp(1) - math.log(self.copies)
        if log_q is None:
            raise ValueError("Mixture needs log q of the start: pass run(...) a StartDraw.")
        return log_q - log_mixture.repeat_interleave(self.copies, 0)


class Mixture(Objective):
    r"""Density of the run's end among ``M`` runs: a bound without determinants or reverse steps.

    The last Langevin step is an explicit Gaussian. With ``M`` independent runs per draw, of which the first is the
    draw,

    .. math:: \log q(u_K) = \log \frac{1}{M} \sum_{m=1}^{M} N\big(u_K;\; u^m_{K-1} + \eta \nabla\log\pi(u^m_{K-1}),\;
              2 \eta I\big) ,

    in nats, one value per row. ``E[log pi(u_K) - log q(u_K)] <= log p(x)`` for every ``M >= 2`` (a semi-implicit bound:
    the draw's own run is among the components), tighter as ``M`` grows, and the ELBO of the run itself for ``M`` to
    infinity. ``M`` has to grow exponentially with the number of latents of a row for that: loose beyond a few.
    Since the draw's own run is exchangeable with the others, ``E[exp(log w)] = p(x)`` for every ``M >= 2``, so that the
    weights are importance weights.

    Cost: ``M`` runs per draw, one Hessian product per step on the way back.

    Yin, Zhou: Semi-implicit variational inference, ICML 2018.

    :param num_runs: ``M >= 2``.
    :raises ValueError: for less than two runs.
    """

    carries = takes_masks = False

    def __init__(self, num_runs: int = 16) -> None:
        check_count("num_runs", num_runs)
        if num_runs < 2:
            raise ValueError(f"Mixture needs at least 2 runs, got {num_runs!r}: with one the bound does not exist.")
        self.copies = num_runs

    def check(self, dynamics: Dynamics) -> None:
        super().check(dynamics)
        if not dynamics.has_transition_density:
            raise ValueError("Mixture needs dynamics with noise, such as Langevin(0.1): its components are Gaussians.")

    def transition(self, dynamics: Dynamics, base: Base | None, account: bool) -> Transition:
        return MixtureTransition(dynamics, self.copies) if account else Plain(dynamics)
