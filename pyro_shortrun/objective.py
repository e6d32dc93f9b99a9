"""How a run accounts for log q: what each step adds to the log weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .logdet import Automatic, LogDet

if TYPE_CHECKING:
    from .base import Base
    from .bridge import Bridge
    from .dynamics import Dynamics
    from .layout import Layout
    from .potential import Density


class Accounted(NamedTuple):
    """What a step adds: ``increment`` to ``log w`` and whether the step was ``singular``, ``(chains, rows)``."""

    increment: Tensor
    singular: Tensor


class Objective:
    r"""Accounts for the log weight of a run,

    .. math:: \log w = \log\pi(u_K) - \log q_0(u_0) + \sum_k \text{increment}_k ,

    so that ``log q(u_K) = log q_0(u_0) - sum of increments`` is what the guide reports to Pyro; in nats, ``(chains,
    rows)``.
    """

    tempers = False  # whether targets move from the start's density to the model's
    copies = 1  # runs that make one draw
    weighs = True  # whether E[exp(log w)] = p(x), so that log q makes importance weights
    takes_masks = True  # whether latents that poutine.mask takes out of the density may be there
    carries = True  # whether increments cost so much that calls between tunings take those of the last tuned one

    def setup(self, num_steps: int, layout: Layout, like: Tensor) -> None:
        """Create parameters (once), in the dtype and on the device of ``like``."""
        return None

    def check(self, dynamics: Dynamics, checkpoint: bool) -> None:
        """Refuse what does not go with this objective."""
        if dynamics.has_momentum:
            raise ValueError(f"{type(dynamics).__name__} is for objective=Annealed(), not {type(self).__name__}.")

    def bridge(self, dynamics: Dynamics, base: Base | None, account: bool) -> Bridge | None:
        """How the run goes and is weighed, where :meth:`account` is not enough to tell.

        :param base: density of the start, where it is known everywhere.
        :param account: whether the log weight is asked for.
        """
        return None

    def pilots(self, layout: Layout, step_size: Tensor, training: bool) -> Pilots | None:
        """What is to be found out by other runs before each run that is weighed, if anything."""
        return None

    def temperatures(self, num_steps: int, like: Tensor) -> Tensor:
        """``beta_k`` of each step, ``(num_steps,)``."""
        return like.new_ones(num_steps)

    def draw(self, like: Tensor, layout: Layout) -> Tensor | None:
        """Auxiliary randomness of one run, shared by its steps; None if none is needed."""
        return None

    def account(
        self,
        density: Density,
        dynamics: Dynamics,
        u: Tensor,
        grad: Tensor,
        step_size: Tensor,
        aux: Tensor | None,
        create_graph: bool,
    ) -> Accounted:
        """The increment of the step from ``u``, where ``grad`` is ``grad log pi(u)`` with a graph to ``u``."""
        raise NotImplementedError(f"the increments of {type(self).__name__} are not those of single steps.")


class Pilots(Objective):
    """Runs that are made for what they tell: ``count`` rows (times chains), then :meth:`objective`."""

    count: int

    def objective(self) -> Objective:
        """How to weigh a run, from what was learned."""
        raise NotImplementedError


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

    :param logdet: a :class:`~pyro_shortrun.logdet.LogDet`; by default exact up to 64 Hessian products per step and
        stochastic Lanczos quadrature beyond.
    """

    def __init__(self, logdet: LogDet | None = None) -> None:
        self.logdet = Automatic() if logdet is None else logdet

    def draw(self, like: Tensor, layout: Layout) -> Tensor | None:
        return self.logdet.probes(like, layout)

    def account(
        self,
        density: Density,
        dynamics: Dynamics,
        u: Tensor,
        grad: Tensor,
        step_size: Tensor,
        aux: Tensor | None,
        create_graph: bool,
    ) -> Accounted:
        product = density.hessian_product(u, grad, create_graph)
        scale = density.layout.drift_scale(u)
        with torch.set_grad_enabled(create_graph):
            value, singular = dynamics.log_abs_det(grad, step_size, scale, product, density.layout, self.logdet, aux)
        return Accounted(value, singular)
