"""ShortRunGuide: a short MCMC run as a Pyro guide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from ..checks import check_count, check_flags
from ..density.call import Call
from ..density.interface import Density
from ..density.program import Invocation, Reading
from ..density.recall import Recall
from ..density.sites import is_masked_out, is_weighted_from_outside
from ..density.structure import Structure, check_latents, check_proper
from ..dynamics.dynamics import Dynamics
from ..dynamics.langevin import Langevin
from ..dynamics.metric import Preconditioner
from ..dynamics.step_size import StepSize
from ..objectives.objective import Objective
from ..runs.record import RunInfo, ShortRun
from ..runs.run import Gradients
from ..starts.finite import require_movable
from ..starts.from_guide import FromGuide
from ..starts.prior import Prior
from ..starts.rule import default_start
from ..starts.start import Start, StartDraw
from ..tensors import ordinary_autograd
from .base import DensityGuide
from .choice import by_acceptance, check_parts, default_objective, described
from .draws import WeightedDraws, check_draws
from .emit import emit, outer_shape
from .metric import Metric, arrange
from .posterior import posterior_draws, repeated, trajectories
from .preparation import prepare, pretrain
from .reading import read_from_prior, reading_ahead, recalled
from .simulation import Simulation, Watch
from .training import Training


class ShortRunGuide(DensityGuide):
    r"""A guide that draws the latents from a start and moves them by K steps of gradient dynamics.

    The latents' unconstrained values ``u`` start at ``u_0 ~ q_0`` (a fitted Gaussian, or the model's prior) and follow

    .. math:: u_{k+1} = u_k + \eta_k \nabla \log\pi(u_k) + \sqrt{2 \eta_k}\, \epsilon_k , \qquad k = 0, \dots, K - 1,

    on the model's own log joint :math:`\log\pi(u) = \log p(x, z(u)) + \log|dz/du|`. The guide reports the log density
    of what it drew (see ``objective``), so that plain :class:`~pyro.infer.SVI` with
    :class:`~pyro.infer.Trace_ELBO` trains the model *and* tunes the step sizes. Swap it for ``AutoNormal(model)``:

    >>> import pyro, pyro.distributions as dist, torch
    >>> from pyro.infer import SVI, Trace_ELBO
    >>> def model(x):
    ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
    >>> guide = ShortRunGuide(model, num_steps=20, step_size=0.1)
    >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    >>> loss = svi.step(torch.ones(3))
    >>> draws = guide.sample_posterior(torch.ones(3), num_samples=5, num_chains=2)
    >>> draws["loc"].shape
    torch.Size([2, 5])

    *Gradients.* The model's parameters get ``grad_theta log p_theta(x, z_K)`` with ``z_K`` held fixed, as maximum
    likelihood by short runs prescribes; the step sizes (and a learned start) get the gradient of the bound through
    the whole run. ``full_gradient=True`` lets the parameters have the exact gradient of the bound as well.

    *Plates.* Latents that share a plate form independent rows; in a subsampled one, the gradient of a local latent is
    divided by ``full_size / size``. *Discrete latents* must be enumerated (``config_enumerate``) or hidden.

    Nijkamp et al.: Multi-layer latent variable models via variational optimization of short run MCMC, ECCV 2020.

    :param model: a Pyro model.
    :param num_steps: ``K >= 1``.
    :param step_size: ``eta``: a number, or a :class:`StepSize`, which is taken as it is. By default the best of a grid
        from a :class:`Gaussian` start (whose coordinates it is for), otherwise 0.1. A number is a first guess: at
        set-up it is halved until at most a quarter of some pilot runs meet a step with ``eta * lambda_max(-H) >= 1``
        (where log q would be wrong), and the drift per step is then clipped at ``max_drift=1``; a warning says so.
    :param dynamics: a :class:`~pyro_shortrun.Dynamics` instead of ``step_size``; default ``Langevin``.
    :param start: :class:`Gaussian`, :class:`Prior`, :class:`Persistent`, :class:`Init` or any Pyro guide over the same
        sites (an ``AutoGuide``, an encoder), which is then trained too. By default
        :func:`~pyro_shortrun.guides.default_start` chooses: a Gaussian where all latents are one small row, the
        prior for latents of data.
    :param objective: how log q is accounted: :class:`Annealed` (default from a :class:`Gaussian`),
        :class:`PathDensity` (default otherwise), :class:`GaussianReverse`, :class:`Mixture`, :class:`Linearized`, or
        :class:`Refine`, which does not: an encoder is trained by its own bound, the model by the ends of runs.
    :param metric: :class:`~pyro_shortrun.dynamics.Diagonal` or :class:`~pyro_shortrun.dynamics.Dense` scales of every
        row in which runs move (and ``step_size`` is), found by pilot chains from a start that has none of its own.
    :param tune_every: step sizes (and a learned start) get gradients in every ``tune_every``-th training call; an
        ELBO's ``num_particles`` are as many calls if they are not vectorised. In the calls between, the
        log-determinants in log q are those of the last tuned run; ``guide.eval()`` makes every log q exact.
    :param checkpoint: whether a tuned run keeps ``2 sqrt(K)`` states for its way back, and recomputes the others.
    :param compile: whether runs, and with :class:`ShortRunELBO` whole training steps, are compiled; what cannot be is
        eager, with a logged warning. By default (None), :meth:`ShortRunSVI.run` compiles its steps where that pays.
    :param create_plates: as in :class:`~pyro.infer.autoguide.AutoGuide`, for subsampling.
    :raises ValueError: for arguments out of range, and at the first call for models that it cannot infer.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        num_steps: int = 20,
        step_size: float | StepSize | None = None,
        dynamics: Dynamics | None = None,
        start: Start | Callable[..., Any] | None = None,
        objective: Objective | None = None,
        metric: Preconditioner | None = None,
        tune_every: int = 1,
        full_gradient: bool = False,
        checkpoint: bool = False,
        compile: bool | None = None,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(model, compile=bool(compile), create_plates=create_plates)
        check_count("num_steps", num_steps)
        check_count("tune_every", tune_every)
        check_parts(step_size, dynamics, start, objective, full_gradient, metric)
        check_flags(full_gradient=full_gradient, checkpoint=checkpoint, compile=compile)
        self.num_steps, self.tune_every, self.checkpoint = num_steps, tune_every, checkpoint
        self.full_gradient, self.metric = full_gradient, None if metric is None else Metric(metric)
        self.dynamics = Langevin(0.1 if step_size is None else step_size) if dynamics is None else dynamics
        self.objective = default_objective(start, self.dynamics) if objective is None else objective
        if isinstance(start, AutoGuide) and start.create_plates is not None:  # plates are the outer guide's business
            self.create_plates = create_plates or start.create_plates
            start.create_plates = None
        self.start: Any = start
        self._chooses = start is None, objective is None
        if not all(self._chooses):
            self.objective.check(self.dynamics)
        self.info: RunInfo | None = None
        self._backs_off = dynamics is None and not isinstance(step_size, StepSize)
        self._chooses_step = dynamics is None and step_size is None
        self._acceptance = by_acceptance(self.objective, start, self.dynamics.step_size, self._chooses_step)
        self._subsamples = False
        self._adapter: tuple[FromGuide, ...] = ()  # not a module: its guide is self.start
        self._calls, self._watch, self.steps = 0, Watch(), Training(compile)
        self.register_buffer("_carried", torch.zeros(()), persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw every latent site, inside its plates: dict from site name to value."""
        with ordinary_autograd() as grad_enabled:
            outer = outer_shape()
            call, result, log_q, gradients = self._play(args, kwargs, outer.numel(), grad_enabled)
            known = result.landed and result.landed[1:]
            values, jacobian = call.constrain(result.end, gradients is not Gradients.FULL, known)
            log_q = log_q - jacobian if self._start.has_density else torch.zeros_like(jacobian)
            return emit(call, self.plates, self._pyro_name, outer, values, result.end, log_q)

    def log_weight(self, *args: Any, num_particles: int = 1, **kwargs: Any) -> Tensor:
        r"""``log w = log p(x, z_K) - log q(z_K)`` of independent runs, ``(num_particles,)``, as ``Trace_ELBO`` finds it
        by tracing guide and model, with the same gradients; for :class:`ShortRunELBO`.

        :raises NotImplementedError: for a start whose density is not known, and where a support depends on parameters.
        """
        check_count("num_particles", num_particles)
        if not self._start.has_density:
            raise NotImplementedError(f"{type(self._start).__name__} starts have no density: use Trace_ELBO.")
        return self.run_weight(args, kwargs, num_particles)

    def run_weight(self, args: tuple[Any, ...], kwargs: dict[str, Any], num_particles: int) -> Tensor:
        """The same; from a start without a density ``log p(x, z_K)``."""
        if is_weighted_from_outside():
            raise NotImplementedError("poutine.scale, poutine.mask or a plate around ShortRunELBO: use Trace_ELBO.")
        with ordinary_autograd() as grad_enabled, self._pyro_context:
            call, result, log_q, gradients = self._play(args, kwargs, num_particles, grad_enabled, lands=grad_enabled)
            density = call.density.differentiable(result.end, grad_enabled)
            if not self._start.has_density:
                log_q = call.constrain(result.end, True, result.landed and result.landed[1:])[1]
            return (density - call.density.layout.row_weight * log_q).sum(-1)

    def _play(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], chains: int, grad_enabled: bool, lands: bool = False
    ) -> tuple[Call, ShortRun, Tensor, Gradients]:
        """A training or evaluation call: its run and ``log q(u_K)``, ``(chains, rows)``; ``lands``: whether the log
        density of the end will be differentiated in the parameters."""
        masked = is_masked_out()
        training = grad_enabled and not masked
        call = self._bind(args, kwargs, chains)
        self._memory.note(call.bind, training and self.training)
        if lands and isinstance(call.density, Recall):
            call.density.keep_landing()
        tune = self._tunes(training)
        carry = self.training and training and not tune and self._calls > 1 and self.objective.carries
        account = not (masked or carry) and self._start.has_density
        full = self.full_gradient and training
        gradients = Gradients.FULL if full else Gradients.GUIDE if tune else Gradients.NONE
        drawn, result = self._run(call, chains, account, gradients)
        self._heed(call, result)
        if self.training and training:
            self._start.finish(call, result.end)
            if self._acceptance is not None and self._acceptance.is_due(self._calls):
                self._simulation.follow(self._acceptance, call, drawn, result.end)
        increment = result.increment
        if account and self.training and grad_enabled:
            self._carried = increment.detach().mean()
        elif carry:
            increment = self._carried.to(increment).expand_as(increment)
            self.info = replace(result.info, carried=True)
        return call, result, drawn.log_q - increment, gradients

    @torch.no_grad()
    def sample_posterior(
        self,
        *args: Any,
        num_samples: int = 1000,
        num_chains: int = 1,
        num_steps: int | None = None,
        adjust: int | None = None,
        resample: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Runs, vectorised.

        :param num_samples: draws per chain (the leading dimension, for ArviZ); a run for each.
        :param num_steps: steps of these runs, the guide's by default; with a :class:`Persistent` start they begin at
            the prior, for data that were never seen.
        :param adjust: how many Metropolis-adjusted steps follow each run and take away what is left of its bias
            (``guide.info.acceptance``); by default 20 from a :class:`Gaussian` start, and none from others.
        :param resample: whether draws are chosen by their Pareto-smoothed weights (``guide.info.k_hat``, good to .7)
            before that; by default 100 or more from a :class:`Gaussian` start, if adjusted, up to a k-hat of 1.
        :return: dict from site to ``(num_chains, num_samples, *site shape)``, ``pyro.deterministic`` ones too.
        """
        check_draws(num_samples, num_chains, adjust, resample)
        with ordinary_autograd(), poutine.block():
            call = self._bind(args, kwargs)
            self._memory.note(call.bind, training=False)
            values = posterior_draws(self, call, num_samples * num_chains, num_steps, adjust, resample)
        return {k: v.reshape(num_chains, num_samples, *v.shape[1:]) for k, v in values.items()}

    @torch.no_grad()
    def weighted_draws(self, args: tuple[Any, ...], kwargs: dict[str, Any], count: int) -> tuple[Call, WeightedDraws]:
        """Independent runs with their log densities, and the call they were made in; for exporters."""
        with ordinary_autograd(), poutine.block():
            call, weighs = self._bind(args, kwargs), self._start.has_density and self.objective.weighs
            return call, repeated(self, call, count, account=weighs)

    def trajectory(self, *args: Any, num_chains: int = 1, **kwargs: Any) -> dict[str, Tensor]:
        """The states of a run along its steps, dict from site to ``(num_steps + 1, num_chains, *site shape)``."""
        check_count("num_chains", num_chains)
        with ordinary_autograd(), poutine.block():
            return trajectories(self, self._bind(args, kwargs), num_chains)

    def pretrain(self, *args: Any, **kwargs: Any) -> ShortRunGuide:
        """Fit the :class:`Gaussian` start, and choose the step size if nobody has given one, at the model's parameters
        as they are. The first use does it by itself; a later call fits again, from where the start is."""
        pretrain(self, args, kwargs)
        return self

    @property
    def has_density(self) -> bool:
        """Whether the density of the start is known, so that there is a bound."""
        return self._start.has_density

    def step_sizes(self) -> Tensor | dict[str, Tensor]:
        """Current step sizes: a tensor (shared, per step) or a dict from site to values (per site, per dimension)."""
        if self._first is None:
            raise RuntimeError("the guide has no step sizes yet; call guide.setup(*args) with the model's arguments.")
        return self.dynamics.step_size.by_site(self._first.layout)

    @property
    def _start(self) -> Start:
        if self.start is None:  # until the first call
            return Prior()
        if isinstance(self.start, Start):
            return self.start
        if not self._adapter:
            self._adapter = (FromGuide(self.start, everywhere=self.objective.tempers),)
        return self._adapter[0]

    @property
    def _simulation(self) -> Simulation:
        return Simulation(self.num_steps, self.dynamics, self.objective, self._start, self.checkpoint, self.metric)

    @property
    def _reads_prior(self) -> bool:
        return isinstance(self._start, Prior)

    @property
    def adapts(self) -> bool:
        """Whether the step size follows the acceptance after the next training call."""
        return self._acceptance is not None and self._acceptance.is_due(self._calls + 1)

    def _density(self, call: Call) -> Density:  # with few gradients in a call, every run of the model counts
        return recalled(call) if not self.objective.tunes_steps and self._compiler is None else super()._density(call)

    def _read(self, draw: Invocation) -> Reading:
        """One run of the model, its latents drawn from the prior where the start is that."""
        if not self.objective.tunes_steps and (known := reading_ahead(self._start, draw)) is not None:
            return known
        with torch.set_grad_enabled(self.full_gradient):  # the start of a run is a draw, unless all is differentiated
            if not self._reads_prior:  # improper priors cannot be drawn from
                return super()._read(draw)
            reading = read_from_prior(draw, required=self.start is not None)
            self._subsamples = any(frame.is_subsampled for frame in reading.frames)
            return reading

    def _admit(self, structure: Structure) -> Structure:
        if self.start is None:
            self.start = default_start(structure, self._subsamples, bool(self._binder and self._binder.program.hides))
            self.objective = default_objective(self.start, self.dynamics) if self._chooses[1] else self.objective
            self.objective.check(self.dynamics)
        structure = arrange(structure, self._start, self.metric)
        check_latents(self._first, structure, self._start.has_density)
        return structure

    def _begin(self, call: Call) -> None:
        if isinstance(self._start, Prior):
            check_proper(call.reading)
        self._start.setup(call.density)
        if isinstance(self._start, FromGuide):
            self._start.draw(call, 1)  # creates a lazily built guide's parameters
            if not self.objective.tunes_steps:
                self._start.require_pathwise("Refine")

    def _prepare(self, call: Call) -> None:
        self._start.look(call)
        prepare(self._simulation, call, self._chooses_step, self._backs_off, self._acceptance)

    def _tunes(self, training: bool) -> bool:
        """Whether this call differentiates in the guide's parameters; counts training calls."""
        if not (training and self.training):
            return training and self._start.has_density
        self._calls += 1
        return self._start.has_density and ((self._calls - 1) % self.tune_every == 0 or not self.objective.tunes_steps)

    def _run(
        self, call: Call, chains: int, account: bool, gradients: Gradients, keep_states: bool = False
    ) -> tuple[StartDraw, ShortRun]:
        drawn, result = self._simulation.make(call, chains, account, gradients, self.training, keep_states)
        self.info = result.info
        return drawn, result

    def __repr__(self) -> str:
        """K, dynamics, start and objective, and the step sizes once there are some."""
        return described(self, None if self._first is None else self.step_sizes())

    def _heed(self, call: Call, result: ShortRun) -> None:
        """Refuse a run in which nothing could move, and tell what else is wrong with it."""
        require_movable(call, self._start, result.start, result.end, result.info.frozen)
        self._watch(result.info, call.density.layout.row_weight)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "info": None, "_adapter": ()}
