"""Refine: an encoder trained by its own bound, and a model by the ends of short runs from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_between
from ..density.interface import Density
from ..dynamics.dynamics import Dynamics
from ..starts.base import Base
from .objective import Objective
from .transition import Column, Plain, State, Transition, check_whole


@dataclass(frozen=True)
class RefineTransition(Plain):
    """Steps of the dynamics, of which the first one's gradient is kept: it is the start's own.

    The state is ``(u, proposal, gradient at the start, log density there, log density at the last arrival)``, both of
    the latter per element of a subsampled plate.
    """

    detaches = True

    def begin(self, density: Density, start: Tensor, step_size: Tensor, noise: Tensor) -> State:
        check_whole(density, "Refine")
        rows = start.new_zeros(start.shape[:2])
        first, proposal, *kept = super().begin(density, start, step_size, noise)
        return first, proposal, torch.zeros_like(start), rows, rows, *kept

    def constants(self, step_size: Tensor) -> tuple[Tensor, ...]:
        is_first = torch.zeros(len(step_size), 1, dtype=torch.bool, device=step_size.device)
        is_first[0] = True
        return is_first, *super().constants(step_size)

    def evaluate(
        self, density: Density, u: Tensor, tensors: tuple[Tensor, ...], create_graph: bool
    ) -> tuple[Tensor, ...]:
        value, grad = density.value_and_grad(u)
        weight = density.layout.row_weight
        return value, grad, grad / weight, value / weight

    def move(
        self, density: Density, state: State, found: Sequence[Tensor], column: Column
    ) -> tuple[State, Tensor | None]:
        pull, value = state[2:4]
        grad, own, here = found
        (u, proposal, *kept), _ = super().move(density, state, (grad,), column)
        is_first = column.constants[0]
        return (u, proposal, torch.where(is_first, own, pull), torch.where(is_first, here, value), here, *kept), None

    def land(self, others: State, value: Tensor, arrived: Tensor) -> State:
        pull, first, last, *kept = others
        return pull, first, torch.where(arrived, value, last), *kept

    def finish(self, first: State, last: State, step_size: Tensor, log_q: Tensor | None) -> Tensor | None:
        """What the run gained is taken off again; of the start, the gradient that is known."""
        start, (pull, before, after) = first[0], last[2:5]
        return before - after + (pull * (start - start.detach())).sum(-1)


class Refine(Objective):
    r"""The start is trained by its own bound, the model by where runs from there end: no log q of a run at all.

    With ``q_phi`` the start (an encoder) and ``z_K`` the end of K steps of the dynamics from ``z_0 ~ q_phi(z | x)``,
    the parameters get the gradients

    .. math:: \nabla_\phi\, E_{q_\phi}[\log p_\theta(x, z_0) - \log q_\phi(z_0 \mid x)] , \qquad
              E[\nabla_\theta \log p_\theta(x, z_K)] \text{ with } z_K \text{ held fixed,}

    the first by the pathwise derivative through ``z_0``, whose ``grad log p(x, z_0)`` is the gradient of the first
    step too and is found once. The step size follows the acceptance of one Langevin step
    (:class:`~pyro_shortrun.dynamics.Acceptance`), unless it is a ``StepSize(learnable=False)``.

    *The loss* that SVI prints is minus the bound of the start, ``log p(x, z_0) - log q(z_0)``, that of the same encoder
    without runs; it is not one of the run, whose density nobody asks for. For bounds on ``log p(x)`` of the model use
    :func:`~pyro_shortrun.evaluation.importance_log_likelihood` or :func:`~pyro_shortrun.ais`.

    >>> from pyro_shortrun import ShortRunGuide
    >>> guide = ShortRunGuide(model, num_steps=2, start=encoder, objective=Refine())  # doctest: +SKIP

    An update with K = 2 takes little more than one of the encoder alone (a VAE): K + 1 runs of the decoder. The start
    is any guide whose sites are reparametrised; a :class:`~pyro_shortrun.Prior` start is the short run of the papers
    with a step size by acceptance.

    :param accept: wanted acceptance; None leaves the step size as it is. In few dimensions ask for more, 0.95.
    :raises ValueError: where ``accept`` is not in (0, 1).
    :raises NotImplementedError: for a subsampled model with latents outside the plate, and for starts whose sites have
        no pathwise derivative.
    """

    weighs = False
    carries = False
    tunes_steps = False

    def __init__(self, accept: float | None = 0.75) -> None:
        if accept is not None:
            check_between("accept", accept, 0, 1, "0.75")
        self.accept = accept

    def check(self, dynamics: Dynamics) -> None:
        if dynamics.has_momentum:
            super().check(dynamics)

    def transition(self, dynamics: Dynamics, base: Base | None, account: bool) -> Transition:
        return RefineTransition(dynamics) if account else Plain(dynamics)
