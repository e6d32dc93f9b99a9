"""Linearized: the covariance of a run, propagated along its own path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..density.interface import Density
from ..dynamics.dynamics import Dynamics
from ..starts.base import Base
from .objective import Objective, check_jacobian
from .transition import Column, Plain, State, Transition, check_whole


@dataclass(frozen=True)
class LinearizedTransition(Plain):
    """The state is ``(u_{k-1}, u_k, P_k)``."""

    base: Base

    def begin(self, density: Density, start: Tensor, step_size: Tensor, noise: Tensor) -> State:
        check_whole(density, "Linearized")
        return start, start, self.base.covariance(density, start)

    def evaluate(
        self, density: Density, u: Tensor, tensors: tuple[Tensor, ...], create_graph: bool
    ) -> tuple[Tensor, ...]:
        value, grad = density.value_and_grad(u, create_graph=True)
        size = u.shape[-1]
        basis = torch.eye(size, dtype=u.dtype, device=u.device)[:, None, None, :].expand(size, *u.shape)
        columns = density.hessian_product(u, grad, create_graph)(basis.contiguous())
        return value, grad, columns.movedim(0, -1)

    def move(
        self, density: Density, state: State, found: Sequence[Tensor], column: Column
    ) -> tuple[State, Tensor | None]:
        _, u, covariance = state
        grad, hessian = found
        (eta,) = column.values
        eye = torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)
        jacobian = eye + self.dynamics.jacobian(grad, eta, column.scale).slope.unsqueeze(-1) * hessian
        spread = jacobian @ covariance @ jacobian.mT
        if self.dynamics.has_transition_density:
            spread = spread + 2 * torch.diag_embed(eta.expand_as(u))
        return (u, self.dynamics.step(u, grad, eta, column.noise, column.scale), spread), None

    def finish(self, first: State, last: State, step_size: Tensor, log_q: Tensor | None) -> Tensor | None:
        return 0.5 * (torch.linalg.slogdet(last[-1])[1] - torch.linalg.slogdet(first[-1])[1])


class Linearized(Objective):
    r"""Entropy of the run from the covariance that its linearised steps have: an **estimate, not a bound**.

    .. math::
        P_{k+1} = A_k P_k A_k^T + 2 \eta_k I, \qquad A_k = I + \eta_k \nabla^2 \log\pi(u_k), \qquad
        \log w = \log\pi(u_K) - \log q_0(u_0) + \tfrac12 \log|P_K| - \tfrac12 \log|P_0|

    along each run's own path, with ``P_0`` the covariance of the start; in nats, one value per row. Exact in
    expectation for Gaussian posteriors from a Gaussian start, with noise (unlike :class:`PathDensity`) and without, and
    equal to :class:`PathDensity` for ``Langevin(noise=False)``. Where the posterior is not Gaussian, ``E[log w]`` may
    exceed ``log p(x)``; use it to tune steps on well-behaved posteriors, never to compare models, and not for
    importance weights.

    The start must be :class:`Prior` (``P_0`` is then what its curvature at ``u_0`` says, exact for normal priors) or
    ``AutoNormal``, ``AutoDiagonalNormal`` or ``AutoMultivariateNormal``. Cost per step: ``size`` Hessian products, and
    their derivatives on the way back; ``size ** 2`` numbers per row and step.

    :raises NotImplementedError: for other starts, latents in ``poutine.mask``, and a subsampled plate that does not
        hold all latents.
    """

    carries = weighs = takes_masks = False

    def transition(self, dynamics: Dynamics, base: Base | None, account: bool) -> Transition:
        if not account:
            return Plain(dynamics)
        check_jacobian(self, dynamics)
        if base is None:
            raise NotImplementedError(
                "Linearized needs the covariance of the start: use start=Prior(), AutoNormal(model), "
                "AutoDiagonalNormal(model) or AutoMultivariateNormal(model)."
            )
        return LinearizedTransition(dynamics, base)
