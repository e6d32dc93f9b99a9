"""PathDensity: log q of a run given its noise, by the log-determinants of its steps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from ..checks import check_kind
from ..density.interface import Density
from ..density.layout import Layout
from ..dynamics.dynamics import Dynamics
from ..starts.base import Base
from .logdet import Automatic, LogDet
from .objective import Objective, check_jacobian
from .transition import Column, Departure, Plain, Transition, settings


@dataclass(frozen=True)
class PathTransition(Plain):
    """Steps of the dynamics, each paid for at its departure by the log-determinant of its Jacobian."""

    logdet: LogDet

    pays_ahead = True

    @cached_property
    def key(self) -> tuple[Any, ...]:
        return *super().key, self.logdet, settings(self.logdet)

    def draw(self, like: Tensor, layout: Layout) -> tuple[Tensor, ...]:
        probes = self.logdet.probes(like, layout)
        return () if probes is None else (probes,)

    def departure(
        self, density: Density, u: Tensor, grad: Tensor, column: Column, create_graph: bool
    ) -> Departure | None:
        layout = density.layout
        product = density.hessian_product(u, grad, create_graph)
        slope, judged = self.dynamics.jacobian(grad, column.values[0], column.scale)
        probes = column.shared[0] if column.shared else None
        return Departure(*self.logdet(product, slope, layout, probes, judged=judged))


class PathDensity(Objective):
    r"""Density of the run's end given its noise path, the objective of the short-run papers.

    For a fixed noise path :math:`\epsilon` the run is a map :math:`u_0 \mapsto u_K`, so

    .. math::
        \log q(u_K \mid \epsilon) = \log q_0(u_0) - \sum_k \log\Big|\det\frac{\partial u_{k+1}}{\partial u_k}\Big|,
              \qquad \frac{\partial u_{k+1}}{\partial u_k} = I + \eta_k \nabla^2 \log\pi(u_k) .

    In nats, one value per row. Averaged over noise paths, ``E[log pi(u_K) - log q(u_K | eps)] <= log p(x)``: a lower
    bound, since this is the density *given the path*, not the marginal; it is the ELBO of the run itself only for
    ``Langevin(noise=False)``. With noise it is loose by the mutual information of ``u_K`` and the path and prefers
    a smaller step than the exact KL does (on a Gaussian posterior of precision 25 and K = 25: eta = 0.0030 where
    0.0074 is best). ``E[exp(log w)] = p(x)`` while every step is invertible, so importance weights and ``RenyiELBO``
    apply; steps that are not (``eta * lambda_max(-H) >= 1``) are counted in ``info.singular``.

    Cost per step: the Hessian products of ``logdet``.

    Nijkamp et al., ECCV 2020; the change of variables is spelled out in Pang, Nijkamp, Han, Wu: Generative Text
    Modeling through Short Run Inference, EACL 2021, section 2.5.

    :param logdet: a :class:`~pyro_shortrun.objectives.logdet.LogDet`; by default exact up to 64 Hessian products per
        step and stochastic Lanczos quadrature beyond.
    """

    def __init__(self, logdet: LogDet | None = None) -> None:
        check_kind("logdet", logdet, LogDet, "Exact()")
        self.logdet = Automatic() if logdet is None else logdet

    def transition(self, dynamics: Dynamics, base: Base | None, account: bool) -> Transition:
        if not account:
            return Plain(dynamics)
        check_jacobian(self, dynamics)
        return PathTransition(dynamics, self.logdet)
