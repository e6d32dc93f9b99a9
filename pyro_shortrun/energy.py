"""EnergyELBO: SVI for models whose prior is tilted by energies, by short runs in that prior."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer import ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from .arguments import check_count, check_kind
from .chain import RunInfo, ShortRun
from .density import LogDensity
from .dynamics import Dynamics, Langevin
from .interop import is_weighted_from_outside, ordinary_autograd, plain
from .program import Reading, Site
from .start import Call, Drawn, FromGuide, Prior, Start
from .step_size import StepSize
from .tilted import Energy, TiltedPrior, energies, energy_of, run_in
from .validation import check_start


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
    :param num_steps: steps of a negative run.
    :param step_size: ``eta`` of ``u + eta * grad + sqrt(2 * eta) * eps``, 0.1 by default; recipes with :math:`s^2/2`
        have ``eta = s ** 2 / 2`` (their s = 0.4 is 0.08).
    :param dynamics: instead of ``step_size``; it is not tuned.
    :param start: where negative runs start: :class:`~pyro_shortrun.Prior` (default, fresh for every call),
        :class:`Replay`, :class:`~pyro_shortrun.Persistent` or a guide.
    :param num_chains: negative runs per row.
    :param l2: weight of the sum of squared energies of both phases, whose gradient reaches the energies' own
        parameters.
    :param compile: whether negative runs are compiled, as for ``ShortRunGuide``.
    :raises ValueError: for arguments out of range; at a call, where the model has no ``energy_prior``, where a start is
        not finite, and where every negative run is not.
    :raises NotImplementedError: for ``poutine.scale`` on the prior, ``l2`` with a base that does not run the model
        under Pyro's handlers, and ``differentiable_loss`` of a base without one.
    """

    def __init__(
        self,
        base_elbo: ELBO,
        num_steps: int = 40,
        step_size: float | None = None,
        *,
        dynamics: Dynamics | None = None,
        start: Start | Callable | None = None,
        num_chains: int = 1,
        l2: float = 0.0,
        compile: bool = False,
    ) -> None:
        check_kind("base_elbo", base_elbo, ELBO, "Trace_ELBO()")
        super().__init__(num_particles=base_elbo.num_particles)
        check_count("num_chains", num_chains)
        if not (l2 >= 0 and math.isfinite(l2)):
            raise ValueError(f"l2 must be a finite number >= 0, got {l2!r}.")
        self.base_elbo: Any = base_elbo
        self.num_chains, self.l2 = num_chains, l2
        self.sampler = NegativeSampler(num_steps, step_size, dynamics, start)
        self.info: EnergyInfo | None = None
        self._compile = compile
        self._prior: TiltedPrior | None = None
        self._warned = False

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The base's loss: there is no negative phase, which would not change the value."""
        return self.base_elbo.loss(model, guide, *args, **kwargs)

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The base's loss as a number; gradients, that of log Z included, go to the parameters' ``grad``."""
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
        negative = self._negative(model, args, kwargs)
        with _Watch() as watch:
            loss = self.base_elbo.differentiable_loss(model, guide, *args, **kwargs)
        surrogate = self._finish(negative, watch)
        return loss + (surrogate - surrogate.detach())

    def _get_trace(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("EnergyELBO makes no traces itself.")

    def _negative(self, model: Callable, args: tuple, kwargs: dict) -> _Negative:
        """Runs in the prior, and their energies and surrogate with a graph to the model's parameters."""
        if is_weighted_from_outside():
            raise NotImplementedError("poutine.scale, poutine.mask or a plate around EnergyELBO: put it in the model.")
        if self._prior is None or self._prior.model is not model:
            self._prior = TiltedPrior(model, self._compile)
        with ordinary_autograd():
            call = self._prior.bind(plain(args), plain(kwargs))
            if call is None:
                raise ValueError("the model has no energy_prior(...) statement: use the base ELBO without EnergyELBO.")
            done = self.sampler.run(call, self.num_chains)
            self._warn_once(done.info)
            return _Negative.at(call, done.end, done.info)

    def _finish(self, negative: _Negative, watch: _Watch) -> Tensor:
        """The term whose gradient is to be added; keeps the statistics of the call."""
        self.info = EnergyInfo(watch.means, negative.means, negative.info, negative.info.nonfinite)
        if not self.l2:
            return negative.surrogate
        if not watch.found:
            raise NotImplementedError(
                f"l2 needs the energies of the positive phase, which {type(self.base_elbo).__name__} does not show: "
                "use Trace_ELBO."
            )
        return negative.surrogate + self.l2 * (watch.squares / self.num_particles + negative.squares)

    def _warn_once(self, info: RunInfo) -> None:
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


class NegativeSampler:
    """How runs in the prior are made.

    :param num_steps: steps of a run.
    :param step_size: ``eta``, 0.1 if None.
    :param dynamics: instead of ``step_size``.
    :param start: :class:`~pyro_shortrun.Prior` if None.
    """

    def __init__(
        self, num_steps: int, step_size: float | None, dynamics: Dynamics | None, start: Start | Callable | None
    ) -> None:
        check_count("num_steps", num_steps)
        check_kind("dynamics", dynamics, Dynamics, "Langevin(0.1)")
        check_start(start)
        if dynamics is not None and step_size is not None:
            raise ValueError("pass step_size or dynamics, not both: Langevin(step_size) is the default dynamics.")
        self.num_steps = num_steps
        self.dynamics = dynamics or Langevin(StepSize(0.1 if step_size is None else step_size, learnable=False))
        self.start = Prior() if start is None else start if isinstance(start, Start) else FromGuide(start)

    def run(self, call: Call, chains: int) -> ShortRun:
        """``chains`` runs of every row."""
        return run_in(call, self.start, self.dynamics, self.num_steps, chains)


@dataclass(frozen=True)
class _Negative:
    """The negative phase: ``surrogate`` has the gradient of log Z, ``squares`` is the sum of squared energies."""

    surrogate: Tensor
    squares: Tensor
    means: dict[str, float]
    info: RunInfo

    @classmethod
    def at(cls, call: Call, end: Tensor, info: RunInfo) -> _Negative:
        """At the ends of runs, ``(chains, rows, size)``; rows that froze are left out, and the others weigh more."""
        sites = energies(call.reading)
        value, *found = call.density.with_readings(end, _take)
        valid = ~info.frozen
        kept = torch.where(valid, value, torch.zeros_like(value)).sum()
        surrogate = kept * (call.density.layout.rows / valid.sum())
        half = len(found) // 2
        means = {k: v.detach().mean().item() for k, v in zip(sites, found[:half], strict=True)}
        pairs = zip(sites.values(), found[half:], strict=True)
        squares = torch.stack([(s["scale"] * v.square()).mean(0).sum() for s, v in pairs]).sum()
        return cls(surrogate, squares, means, info)


def _take(reading: Reading) -> tuple[Tensor, ...]:
    """Energies as they stand in the density, and again at fixed latents."""
    sites = energies(reading).values()
    return *(-s["fn"].log_factor for s in sites), *(_energy(s).at_fixed_latents() for s in sites)


def _energy(site: Site) -> Energy:
    found = energy_of(site)
    assert found is not None
    return found


class _Watch(Messenger):
    """Takes note of energies that pass by in the positive phase."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[Tensor]] = {}
        self._again: list[tuple[Energy, Any]] = []

    def _pyro_post_sample(self, msg: Site) -> None:
        energy = energy_of(msg)
        if energy is not None:
            self.found.setdefault(msg["name"], []).append(-msg["fn"].log_factor.detach())
            self._again.append((energy, msg["scale"]))

    @property
    def means(self) -> dict[str, float]:
        return {k: torch.stack([v.mean() for v in vs]).mean().item() for k, vs in self.found.items()}

    @property
    def squares(self) -> Tensor:
        return torch.stack([(scale * e.at_fixed_latents().square()).sum() for e, scale in self._again]).sum()


class Replay(nn.Module, Start):
    """Negative runs that go on where earlier ones ended, from a buffer of states; some begin at the prior.

    For priors that are the same for every row (no inputs of the row in it): states are drawn from the buffer whatever
    row they came from, and the oldest are replaced. For others use :class:`~pyro_shortrun.Persistent`.

    Tieleman: Training restricted Boltzmann machines using approximations to the likelihood gradient, ICML 2008; Du,
    Mordatch: Implicit generation and modeling with energy-based models, NeurIPS 2019.

    :param size: number of states kept.
    :param refresh: probability with which a row starts at the prior all the same.
    :raises ValueError: where ``size`` is not a positive integer or ``refresh`` not in ``[0, 1]``, or where a row's
        number of coordinates changes between calls.
    """

    has_density = False
    store: Tensor
    written: Tensor

    def __init__(self, size: int = 10_000, refresh: float = 0.05) -> None:
        super().__init__()
        check_count("size", size)
        if not 0 <= refresh <= 1:
            raise ValueError(f"refresh is a probability, got {refresh!r}.")
        self.size, self.refresh = size, refresh
        self.register_buffer("written", torch.zeros((), dtype=torch.long))

    def setup(self, density: LogDensity) -> None:
        if "store" not in self._buffers:
            structure = density.structure
            empty = torch.zeros(self.size, density.layout.size, dtype=structure.dtype, device=structure.device)
            self.register_buffer("store", empty)
        if self.store.shape[1] != density.layout.size:
            raise ValueError(
                f"the replay buffer keeps rows of {self.store.shape[1]} coordinates and the model now has "
                f"{density.layout.size}: use one Replay() per model, and Prior() where latents outside the plate tie "
                "its elements into one row."
            )

    def draw(self, call: Call, chains: int) -> Drawn:
        u = fresh = call.prior(chains).detach()
        filled = min(int(self.written), self.size)
        if filled:
            index = torch.randint(filled, u.shape[:2], device=u.device)
            use = torch.rand(u.shape[:2], device=u.device) >= self.refresh
            u = torch.where(use.unsqueeze(-1), self.store[index], u)
        value = call.density.eager(u)
        lost = ~value.isfinite()
        if filled and lost.any():  # states that were fine for the energy as it was
            u = torch.where(lost.unsqueeze(-1), fresh, u)
            value = call.density.eager(u)
        return Drawn(u, torch.zeros_like(value), value)

    def finish(self, call: Call, end: Tensor) -> None:
        states = end.detach().flatten(0, 1)[-self.size :]
        index = (int(self.written) + torch.arange(len(states), device=states.device)) % self.size
        self.store[index] = states
        self.written += len(states)
