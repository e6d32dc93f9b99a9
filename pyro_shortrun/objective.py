"""How a run accounts for log q: what each step adds to the log weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints

from .logdet import Automatic, LogDet

if TYPE_CHECKING:
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

    so that ``log q(u_K) = log q_0(u_0) - sum of increments`` is what the guide reports to Pyro.
    """

    tempers = False  # whether targets move from the start's density to the model's

    def setup(self, num_steps: int, like: Tensor) -> None:
        """Create parameters (once), in the dtype and on the device of ``like``."""
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


class Annealed(PyroModule, Objective):
    r"""Annealed importance sampling along the run: a bound without determinants.

    The targets move from the start's density to the model's, :math:`\pi_k \propto q_0^{1-\beta_k} \pi^{\beta_k}` with
    :math:`0 < \beta_1 < \dots < \beta_K = 1`; step k is a Langevin step for :math:`\pi_k`, and the reverse of it is
    weighed by a Langevin step for the same target:

    .. math::
        \log w = \log\pi(u_K) - \log q_0(u_0) + \sum_k \log r_k(u_{k-1} \mid u_k) - \log f_k(u_k \mid u_{k-1}),
        \qquad f_k(u' \mid u) = r_k(u' \mid u) = N\big(u';\, u + \eta_k \nabla\log\pi_k(u),\, 2 \eta_k\big) .

    In nats, one value per row. ``E[log w] <= log p(x)`` and ``E[exp(log w)] = p(x)`` for any step size, so importance
    weights and ``RenyiELBO`` apply. It is exact as K grows and steps shrink. Without tempering this bound would be the
    start's own for small steps. ``info.log_det`` holds the mean increments.

    Needs dynamics with noise and a start whose density is known everywhere: :class:`Prior`, or an ``AutoNormal``,
    ``AutoDiagonalNormal`` or ``AutoMultivariateNormal``, which is then trained by the same loop, as
    the temperatures are. Cost per step: one gradient of the model's log density (and of the start's), one Hessian
    product on the way back.

    Neal: Annealed importance sampling, 2001; Thin, Kotelevskii, Doucet, Durmus, Moulines, Panov: Monte Carlo
    variational auto-encoders, ICML 2021; Zhang, Hsu, Li, Finn, Grosse: Differentiable annealed importance sampling and
    the perils of gradient noise, NeurIPS 2021.

    :param learnable: whether SVI tunes the temperatures, which begin at ``k / K``.
    """

    tempers = True
    increments: Any  # a PyroParam, or a buffer

    def __init__(self, learnable: bool = True) -> None:
        super().__init__()
        self.learnable = learnable

    def setup(self, num_steps: int, like: Tensor) -> None:
        if "increments_unconstrained" in self._parameters or "increments" in self._buffers:
            return
        even = like.new_full((num_steps,), 1.0 / num_steps)
        if self.learnable and num_steps > 1:
            self.increments = PyroParam(even, constraints.simplex)
        else:
            self.register_buffer("increments", even)

    def temperatures(self, num_steps: int, like: Tensor) -> Tensor:
        if not hasattr(self, "increments"):
            self.setup(num_steps, like)
        if len(self.increments) != num_steps:
            raise ValueError(
                f"there are {len(self.increments)} temperatures for {num_steps} steps: another guide's are in Pyro's "
                "parameter store under the same name; call pyro.clear_param_store() between guides."
            )
        beta = self.increments.cumsum(0)
        return beta / beta[-1]
