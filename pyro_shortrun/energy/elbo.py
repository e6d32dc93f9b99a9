"""EnergyELBO: SVI for models whose prior is tilted by energies, by short runs in that prior."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor

from ..checks import check_count, check_flags, check_kind, check_weight
from ..density.call import Call
from ..density.sites import Site, is_weighted_from_outside
from ..dynamics.dynamics import Dynamics
from ..runs.course import astray
from ..runs.record import RunInfo, ShortRun
from ..starts.start import Start
from ..tensors import keep_rows, ordinary_autograd, plain
from .negative import Landing, Negative, Term, mean_energy
from .prior import TiltedPrior
from .runs import PriorRuns
from .statement import KnowsLogZ, energy_of

_LOGGER = logging.getLogger("pyro_shortrun")


@dataclass(frozen=True)
class EnergyInfo:
    """The last call of an :class:`EnergyELBO`.

    ``positive`` and ``negative`` are mean energies by site, under the guide and in the runs in the prior (``positive``
    is empty where the base ELBO does not run the model under Pyro's handlers); ``run`` is the sampler's record and
    ``excluded`` the number of its rows that were left out because they were not finite.
    """

    positive: dict[str, float]
    negative: dict[str, float]
    run: RunInfo
    excluded: int

    @property
    def gap(self) -> dict[str, float]:
        """``f(+) - f(-)`` for ``f = -E``, by site: zero in the mean where the energy has converged."""
        return {k: self.negative[k] - v for k, v in self.positive.items()}

    def __repr__(self) -> str:
        gaps = ", ".join(f"{k} {v:.4g}" for k, v in self.gap.items())
        return f"EnergyInfo(gap {gaps}, {self.excluded} rows left out, {self.run!r})"


class EnergyELBO(ELBO):
    r"""A loss for SVI where :func:`~pyro_shortrun.energy_prior` tilts the prior: any ELBO, and the gradient of log Z.

    The base ELBO sees the prior as it is written, unnormalised. What it lacks is

    .. math:: \nabla_\theta \log Z_\theta = E_{p_\theta(z)}\Big[\nabla_\theta \Big(\sum_i \log p_\theta(z_i \mid
              \text{parents}) - \sum_j E_{\theta,j}(z)\Big)\Big] ,

    one term for each element of the plates that hold the latents, scaled as Pyro scales them under subsampling. The
    expectation is taken at the ends of short runs in the prior, observations left out (the negative phase), and reaches
    the parameters of the energies *and* of conditional priors (Z depends on both), but none of the guide's. The
    value of the loss is the base's: log Z itself is not in it (see :func:`~pyro_shortrun.ais`).

    With a :class:`~pyro_shortrun.ShortRunGuide` this is maximum likelihood with MCMC for prior and posterior; with an
    amortised guide it is the variational scheme, with ``AutoNormal`` ordinary variational inference.

    >>> import pyro, pyro.distributions as dist, torch
    >>> from pyro.infer import SVI, Trace_ELBO
    >>> from pyro_shortrun import ShortRunGuide, energy_prior
    >>> class Net(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.net = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.GELU(), torch.nn.Linear(16, 1))
    ...     def forward(self, z):
    ...         return self.net(z).squeeze(-1)
    >>> net = Net()
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    ...         energy_prior("ebm", net, z)
    ...         pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)
    >>> optimiser = pyro.optim.Adam(lambda name: {"lr": 1e-4 if name.startswith("ebm.") else 1e-3})
    >>> elbo = EnergyELBO(Trace_ELBO(), num_steps=10, step_size=0.1)
    >>> svi = SVI(model, ShortRunGuide(model, num_steps=5), optimiser, elbo)
    >>> loss = svi.step(torch.randn(8, 2))
    >>> sorted(elbo.info.gap)
    ['ebm']

    *Learning rates.* Energies want one 5 to 50 times smaller than the decoder's. Pyro's optimisers take a function of
    the parameter's name, as above, where ``pyro.module(name, energy)`` has made it ``name.parameter``. If
    ``elbo.info.gap`` grows without bound: a smaller rate, more steps, smooth activations, ``l2`` about 0.1.

    Pang, Han, Nijkamp, Zhu, Wu: Learning Latent Space Energy-Based Prior Model, NeurIPS 2020 (one layer); Cui, Wu, Han:
    Learning Joint Latent Space EBM Prior Model for Multi-layer Generator, CVPR 2023 (an energy for each layer; both
    schemes); Cui, Wu, Han: Learning Hierarchical Features with Joint Latent Space Energy-Based Prior, ICCV 2023 (one
    joint energy).

    :param base_elbo: ``Trace_ELBO()``, ``TraceMeanField_ELBO()``, ``RenyiELBO()``, ``ShortRunELBO()``, ...
    :param num_steps: steps of a negative run, 40 by default.
    :param step_size: as in :class:`PriorRuns`, as ``dynamics`` and ``start``.
    :param runs: instead of these four: :class:`PriorRuns`, for the same runs here and wherever there are some.
    :param num_chains: negative runs per row.
    :param l2: weight of the sum of squared energies of both phases, whose gradient reaches the energies' own
        parameters.
    :param compile: whether negative runs are compiled, as for ``ShortRunGuide``.
    :raises ValueError: for arguments out of range; at a call, where the model has no ``energy_prior``, where a start is
        not finite, and where every negative run is not.
    :raises NotImplementedError: for ``poutine.scale`` on the prior, a subsampled plate around a part of it, ``l2`` with
        a base that does not run the model under Pyro's handlers, and ``differentiable_loss`` of a base without one.
    """

    def __init__(
        self,
        base_elbo: ELBO,
        num_steps: int | None = None,
        step_size: float | None = None,
        *,
        runs: PriorRuns | None = None,
        dynamics: Dynamics | None = None,
        start: Start | Callable[..., Any] | None = None,
        num_chains: int = 1,
        l2: float = 0.0,
        compile: bool = False,
    ) -> None:
        check_kind("base_elbo", base_elbo, ELBO, "Trace_ELBO()")
        super().__init__(num_particles=base_elbo.num_particles)
        check_count("num_chains", num_chains)
        check_weight("l2", l2)
        check_flags(compile=compile)
        self.base_elbo: Any = base_elbo
        self.num_chains, self.l2 = num_chains, l2
        self.runs = PriorRuns.of(runs, num_steps=num_steps, step_size=step_size, dynamics=dynamics, start=start)
        self.info: EnergyInfo | None = None
        self._compile = compile
        self._prior: TiltedPrior | None = None
        self._warned = self._strayed = False
        self._updates = 0

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The base's loss: there is no negative phase, which would not change the value."""
        return self.base_elbo.loss(model, guide, *args, **kwargs)

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The base's loss as a number; gradients, that of log Z included, go to the parameters' ``grad``."""
        with KnowsLogZ():
            negative = self._negative(model, args, kwargs)
        with _Watch() as watch:
            loss = self.base_elbo.loss_and_grads(model, guide, *args, **kwargs)
        surrogate = self._finish(negative, watch)
        if surrogate.requires_grad:
            surrogate.backward()
        return loss

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The base's loss, whose gradient has that of log Z in it."""
        if not hasattr(self.base_elbo, "differentiable_loss"):
            raise NotImplementedError(
                f"{type(self.base_elbo).__name__} has no differentiable_loss: use SVI, which calls loss_and_grads."
            )
        with KnowsLogZ():
            negative = self._negative(model, args, kwargs)
        with _Watch() as watch:
            loss = self.base_elbo.differentiable_loss(model, guide, *args, **kwargs)
        surrogate = self._finish(negative, watch)
        return loss + (surrogate - surrogate.detach())

    def _get_trace(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("EnergyELBO makes no traces itself.")

    def _negative(self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Negative:
        """Runs in the prior, and their energies and surrogate with a graph to the model's parameters."""
        if is_weighted_from_outside():
            raise NotImplementedError("poutine.scale, poutine.mask or a plate around EnergyELBO: put it in the model.")
        if self._prior is None or self._prior.model != model:  # a bound method is a new object each time
            self._prior = TiltedPrior(model, self._compile)
        with ordinary_autograd():
            call = self._prior.bind(plain(args), plain(kwargs))
            if call is None:
                raise ValueError("the model has no energy_prior(...) statement: use the base ELBO without EnergyELBO.")
            if call.density is call.model:  # not compiled
                call = replace(call, density=Landing(call.model, squared=self.l2 > 0))
            done = self.runs.make(call, self.num_chains)
            self._warn_once(done.info)
            negative = Negative.at(call, done.end, done.info, squared=self.l2 > 0)
            return replace(negative, keep=partial(self._keep, call, done))

    @torch.no_grad()
    def _keep(self, call: Call, done: ShortRun) -> None:
        """Tell the start where the runs ended; rows that froze would freeze again, and begin anew."""
        end = done.end
        self._updates += 1
        self.runs.follow(call, end, self._updates)
        if done.info.nonfinite:
            end = keep_rows(done.info.frozen, call.prior(len(end)), end)
        self.runs.begins.finish(call, end)

    def _finish(self, negative: Negative, watch: _Watch) -> Tensor:
        """The term whose gradient is to be added; keeps the statistics of the call."""
        negative.keep()  # now that the base has had no fault with the call
        self.info = EnergyInfo(watch.means, negative.means, negative.info, negative.info.nonfinite)
        if not self.l2:
            return negative.surrogate
        if not watch.found:
            raise NotImplementedError(
                f"l2 needs the energies of the positive phase, which {type(self.base_elbo).__name__} does not show: "
                "use Trace_ELBO."
            )
        assert negative.squares is not None
        return negative.surrogate + self.l2 * (watch.squares / self.num_particles + negative.squares)

    def _warn_once(self, info: RunInfo) -> None:
        reason = None if self._strayed else astray(info)
        if reason is not None:
            self._strayed = True
            _LOGGER.warning("in the prior, %s (EnergyELBO.info.run.log_density; told once.)", reason)
        if info.frozen.all():
            raise ValueError(
                "every run in the prior met a non-finite density or gradient: the energies may have diverged. Lower "
                "their learning rate or the step_size, or set EnergyELBO(l2=...)."
            )
        if info.nonfinite and not self._warned:
            self._warned = True
            warnings.warn(
                f"{info.nonfinite} of {info.frozen.numel()} rows of runs in the prior met a non-finite density or "
                "gradient and are left out (counted in EnergyELBO.info.excluded; this warning is shown once). Lower "
                "the energies' learning rate or the step_size.",
                stacklevel=4,
            )


class _Watch(KnowsLogZ):
    """Takes note of energies that pass by in the positive phase."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[Term]] = {}

    def _pyro_post_sample(self, msg: Site) -> None:
        if energy_of(msg) is not None:
            self.found.setdefault(msg["name"], []).append(Term.of(msg))

    @property
    def means(self) -> dict[str, float]:
        pairs = {k: [(t.total, t.count) for t in terms] for k, terms in self.found.items()}
        return {k: mean_energy(*torch.tensor(found).T) for k, found in pairs.items()}

    @property
    def squares(self) -> Tensor:
        return torch.stack([term.square() for terms in self.found.values() for term in terms]).sum()
