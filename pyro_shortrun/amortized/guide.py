"""LangevinEncoderGuide: an encoder whose last linear map is a Markov chain."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ..checks import check_between, check_count, check_flags
from ..density.call import Call
from ..density.layout import Layout
from ..density.program import Invocation, Reading
from ..density.sites import is_masked_out
from ..density.structure import Structure
from ..guides.base import DensityGuide
from ..guides.emit import emit, outer_shape
from ..tensors import ordinary_autograd
from .basis import Basis
from .chain import AmortizedInfo, LinearChain
from .encoding import Encoding, gaussian_bound
from .features import check_width, features_of

_LOGGER = logging.getLogger("pyro_shortrun")
_DRAWS_AT_ONCE = 64  # the model's own tensors may be large


class LangevinEncoderGuide(DensityGuide):
    r"""Amortised Langevin dynamics as a guide: ``z = Phi g(x)``, where ``Phi`` is a Markov chain's state.

    An encoder's features ``g_i = g(x_i)`` are trained, its last linear map is not: it is sampled. In every call, on the
    call's batch of n rows, ``T = num_steps`` transitions move it,

    .. math:: \Phi' = \Phi + \frac{\eta}{n} \nabla_\Phi \sum_{i=1}^n \log\pi_i(\Phi g_i)
                      + \sqrt{2 \eta / n}\, \epsilon , \qquad \epsilon \sim N(0, I) ,

    each accepted with Metropolis' probability (once for the whole batch, with the reverse mean at the proposal), where
    :math:`\log\pi_i(u) = \log p(x_i, z(u)) + \log|dz/du|` is the model's own log joint in unconstrained space. (A
    recipe with the gradient of the batch's *mean* and noise :math:`\sqrt{2 \eta / n}` has the same ``eta``.) The rows
    move by Langevin dynamics preconditioned by the Gram matrix of their features; if that has rank n, which takes
    features of width ``d >= n``, the chain's law tends to the product of the rows' posteriors. In a call the features
    are computed once and stay, so that a transition costs two products with them and the model's gradient.

    ``Phi``, ``(size of a row, d)``, is a buffer that goes on from call to call, and no optimiser sees it.

    >>> import pyro, pyro.distributions as dist, torch
    >>> from pyro.infer import SVI, Trace_ELBO
    >>> decoder = torch.nn.Linear(2, 5)
    >>> def model(x):
    ...     pyro.module("decoder", decoder)
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    ...         pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)
    >>> features = torch.nn.Sequential(torch.nn.Linear(5, 32), torch.nn.ReLU())
    >>> guide = LangevinEncoderGuide(model, features)
    >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    >>> loss = svi.step(torch.randn(10, 5))
    >>> guide.phi.shape, guide.encode(torch.randn(3, 5))["z"].shape
    (torch.Size([2, 32]), torch.Size([3, 2]))

    *Gradients.* The loss is evaluated once, at the last map: its gradient reaches the model's parameters as
    ``grad_theta log p_theta(x, z)`` at fixed z, and the features' parameters through ``z = Phi g(x)`` at fixed ``Phi``.
    Nothing is differentiated through the transitions. (The paper averages over the T maps of a call; one of them has
    the same expectation under the chain's stationary law, at one pass instead of T.)

    *What the loss is.* The "ELBO" that ``Trace_ELBO`` reports is :math:`\sum_i \log\pi_i(\Phi g_i)`: a draw of the
    expected log joint, without an entropy. It is the objective of Monte Carlo EM, no bound on ``log p(x)``, and not to
    be compared with the ELBO of another guide, of ``RenyiELBO`` or of several particles. :meth:`log_bound` is a bound;
    :func:`~pyro_shortrun.evaluation.likelihood.importance_log_likelihood` treats all methods alike.

    *When is it exact?* For one batch, transition after transition. The next mini-batch is another target for the same
    map, so across mini-batches no law is invariant. The features see to it that a map which fits one batch fits the
    next.

    *Test data.* In ``eval()`` mode, or where gradients are off, a call makes ``eval_steps`` transitions from the
    current map on *its* batch and stores nothing. :meth:`sample_posterior` runs longer chains; :meth:`encode` makes
    none.

    *Parallel draws* (``vectorize_particles``, ``Predictive(parallel=True)``) are chains from the same map; the first is
    stored. *Subsampled plates:* log joints count once per row, so posteriors do not depend on ``full_size / size``.
    ``features`` may return rows for the batch or for the full plate (then the batch's are taken).

    (It has more methods than most: a guide's own, and what one asks a Markov chain for.)

    Taniguchi, Iwasawa, Kumagai, Matsuo: Langevin Autoencoders for Learning Deep Latent Variable Models, NeurIPS 2022.

    :param model: a Pyro model whose latents share their plates: every element of these is a row.
    :param features: a module or function from the model's arguments to ``g``, ``(*sizes of the plates, d)``. Keep
        batch normalisation and dropout, if any, in mind: ``g`` is one draw per call.
    :param num_steps: ``T >= 1``, in training calls.
    :param step_size: ``eta``; with ``target_accept_prob`` a first guess.
    :param adjust: whether proposals are accepted or rejected. Without, nothing corrects the step's bias.
    :param target_accept_prob: training calls adapt the step size to this acceptance; None for a fixed one. (Without
        ``adjust`` it always is fixed.) Every transition moves the codes of all other data as well, which is noise to
        them, so that training with mini-batches wants a higher one than the 0.574 at which chains of one target go
        farthest, and which :meth:`sample_posterior` uses.
    :param eval_steps: transitions of calls that do not train; ``10 * num_steps`` by default.
    :param basis: the directions of a transition: :class:`Span` keeps what no feature of the batch sees from walking at
        random; :class:`Whitened` moves all rows at one pace. All directions by default.
    :param init_scale: standard deviation of a row's state at the start, in unconstrained space.
    :param compile: whether the model's gradient is traced and compiled.
    :param create_plates: as in :class:`~pyro.infer.autoguide.AutoGuide`, for subsampling.
    :raises ValueError: for arguments out of range, and in a call whose features are too narrow for its rows.
    :raises NotImplementedError: at the first call, where a latent is not local to the rows; the message names it.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        features: Callable[..., Tensor],
        *,
        num_steps: int = 2,
        step_size: float = 0.1,
        adjust: bool = True,
        target_accept_prob: float | None = 0.9,
        eval_steps: int | None = None,
        basis: Basis | None = None,
        init_scale: float = 1.0,
        compile: bool = False,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        check_flags(compile=compile)
        super().__init__(model, compile=compile, create_plates=create_plates)
        if not callable(features):
            raise ValueError(f"features must be a module or function of the model's arguments, got {features!r}.")
        check_count("num_steps", num_steps)
        self.num_steps, self.eval_steps = num_steps, 10 * num_steps if eval_steps is None else eval_steps
        check_count("eval_steps", self.eval_steps)
        self.features = features
        self.chain = LinearChain(step_size, adjust, target_accept_prob, basis, init_scale)
        self.info: AmortizedInfo | None = None

    @property
    def phi(self) -> Tensor:
        """The current map, ``(size of a row, d)``.

        :raises RuntimeError: before :meth:`setup` or a first call.
        """
        if self.chain.phi is None:
            raise RuntimeError("the guide has no map yet; call guide.setup(*args) with the model's arguments.")
        return self.chain.phi

    # ---------------------------------------------------------------- what a user calls

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw every latent site, inside its plates.

        :return: dict from site name to value.
        """
        with ordinary_autograd() as grad_enabled:
            outer = outer_shape()
            trains = grad_enabled and not is_masked_out()
            call = self._bind(args, kwargs, outer.numel())
            self._memory.note(call.bind, self.training and grad_enabled)
            encoding = self._encoding(call, trains, check=True)
            stores = trains and self.training
            steps = self.num_steps if stores else self.eval_steps
            wanted = self.chain.target_accept_prob if stores else None
            start = encoding.start(outer.numel(), self._compiler is not None)
            run = self.chain.run(encoding.target, start, steps, wanted=wanted)
            self.info = run.info
            if stores:
                self.chain.store(run)
            u = encoding.states(run.point.phi)
            values, jacobian = call.constrain(u, isolated=True)
            return emit(call, self.plates, self._pyro_name, outer, values, u, -jacobian)

    @torch.no_grad()
    def encode(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """``z = Phi g(x)`` at the current map, without transitions, for any number of rows.

        :return: dict from site to value.
        """
        with ordinary_autograd(), poutine.block():
            call = self._bind(args, kwargs)
            values, _ = call.constrain(self._encoding(call).states(self.chain.starts(1)), isolated=True)
        return {k: v[0].detach() for k, v in values.items()}

    def sample_posterior(
        self,
        *args: Any,
        num_samples: int = 1000,
        num_chains: int = 1,
        warmup_steps: int = 200,
        thinning: int = 1,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Chains from the current map on these data, vectorised; the guide's own map stays as it is.

        :param num_samples: draws per chain.
        :param num_chains: chains, each from the current map.
        :param warmup_steps: transitions before the first draw; they adapt the step size, if training does, but to an
            acceptance of 0.574: one target wants longer steps than one batch after the other.
        :param thinning: transitions from one draw to the next.
        :return: dict from site to ``(num_chains, num_samples, *site shape)``.
        """
        return self.chain_draws(args, kwargs, num_samples, num_chains, warmup_steps, thinning)[1]

    def chain_draws(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        num_samples: int,
        num_chains: int,
        warmup_steps: int = 200,
        thinning: int = 1,
    ) -> tuple[Call, dict[str, Tensor], Tensor]:
        """The call, :meth:`sample_posterior`'s draws, and the log density of each, ``(num_chains, num_samples)``; for
        exporters."""
        with torch.no_grad(), ordinary_autograd(), poutine.block():
            call, states, density = self._run(args, kwargs, num_samples, num_chains, warmup_steps, thinning)
            parts = [call.constrain(part, isolated=True)[0] for part in states.flatten(0, 1).split(_DRAWS_AT_ONCE)]
        joined = {k: torch.cat([p[k].detach() for p in parts]) for k in parts[0]}
        return call, {k: v.reshape(num_chains, num_samples, *v.shape[1:]) for k, v in joined.items()}, density

    def moments(
        self,
        *args: Any,
        num_samples: int = 100,
        num_chains: int = 1,
        warmup_steps: int = 200,
        thinning: int = 1,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Posterior mean and standard deviation of every row in unconstrained space, ``(rows, size)`` each, from chains
        as in :meth:`sample_posterior`; for :meth:`log_bound`."""
        with torch.no_grad(), ordinary_autograd(), poutine.block():
            _, states, _ = self._run(args, kwargs, num_samples, num_chains, warmup_steps, thinning)
        flat = states.flatten(0, 1)
        if len(flat) < 2:
            raise ValueError("a standard deviation takes at least two draws: num_samples * num_chains must be >= 2.")
        return flat.mean(0), flat.std(0)

    @torch.no_grad()
    def log_bound(
        self,
        *args: Any,
        loc: Tensor | None = None,
        scale: float | Tensor = 0.05,
        num_samples: int = 1,
        **kwargs: Any,
    ) -> Tensor:
        r"""A lower bound on ``log p(x)`` per row, in expectation, ``(rows,)``, by a Gaussian around the encoding:

        .. math:: \log\pi(u) - \log N(u; \Phi g(x), s^2 I) , \qquad u \sim N(\Phi g(x), s^2 I) ,

        with ``s = scale``, averaged over ``num_samples``. With ``scale = 0.05`` it is the paper's test metric. A fixed
        scale that is smaller than the posterior's pays for it; that of :meth:`moments` does not.

        :param loc: another centre, ``(rows, size)``.
        :param scale: in unconstrained space; a number, or ``(rows, size)``.
        """
        check_count("num_samples", num_samples)
        if not isinstance(scale, Tensor):
            check_between("scale", scale, 0, math.inf, "0.05")
        with ordinary_autograd(), poutine.block():
            call = self._bind(args, kwargs)
            if loc is None:
                loc = self._encoding(call).states(self.chain.starts(1))[0].detach()
            return gaussian_bound(call, loc, torch.as_tensor(scale).to(loc).expand_as(loc), num_samples)

    # ---------------------------------------------------------------- one call

    @torch.no_grad()
    def _read(self, draw: Invocation) -> Reading:
        return super()._read(draw)

    def _admit(self, structure: Structure) -> Structure:
        name = _global_site(structure.layout)
        if name is not None:
            raise NotImplementedError(
                f"latent site '{name}' is not local to the rows (the plates that all other latents share, whose "
                "elements are independent), so an encoder of a row's data cannot give it: infer it by another guide, "
                f"guides = AutoGuideList(model); guides.append(AutoNormal(poutine.block(model, expose=['{name}']))); "
                f"guides.append(LangevinEncoderGuide(poutine.block(model, hide=['{name}']), features)); or use "
                "ShortRunGuide for all."
            )
        return super()._admit(structure)

    def _begin(self, call: Call) -> None:
        encoding = self._encoding(call)
        features = encoding.features
        self.chain.setup(call.density.layout.size, features)  # a loaded state may replace all of this
        rows = len(features)
        if rows > features.shape[-1]:  # no transition will be made on these
            return
        rank = int(torch.linalg.matrix_rank(features))
        if rank < rows:
            _LOGGER.warning(
                "features of the %d rows have rank %d: rows with equal (or linearly dependent) features share their "
                "latents, so their posteriors collapse.",
                rows,
                rank,
            )
        self.chain.halve_until_accepted(encoding.target, encoding.start(1, self._compiler is not None))

    def _encoding(self, call: Call, trains: bool = False, check: bool = False) -> Encoding:
        """The call's rows at their features.

        :param check: whether there must be as many features as rows.
        """
        features, known = features_of(call, self.features, trains), self.chain.phi
        if known is not None and known.shape[-1] != features.shape[-1]:
            raise ValueError(
                f"features have width {features.shape[-1]}, {known.shape[-1]} when the guide was set up: use one guide "
                "per encoder."
            )
        if check:
            check_width(*features.shape)
        return Encoding(call, features, self.chain)

    def _run(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], samples: int, chains: int, warmup: int, thinning: int
    ) -> tuple[Call, Tensor, Tensor]:
        """The call, and draws of fresh chains with their log densities."""
        call = self._bind(args, kwargs)
        encoding = self._encoding(call, check=True)
        states, density, self.info = encoding.run(samples, chains, warmup, thinning, self._compiler is not None)
        return call, states, density

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "info": None}


def _global_site(layout: Layout) -> str | None:
    """Name of a latent that is not one independent value (or vector) for each row, or None."""
    rows = {p.name for p in layout.row_plates}
    outside = [s.name for s in layout.sites if not rows <= {p.name for p in s.plates}]
    if outside or rows:
        return outside[0] if outside else None
    return next((s.name for s in layout.sites if not s.plates), layout.sites[0].name)
