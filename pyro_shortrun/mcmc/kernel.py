"""ShortRunLangevin: short runs and Langevin chains as a kernel for Pyro's MCMC."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor

from ..checks import check_between, check_count, check_flags, check_function, check_kind, check_model
from ..compile.compiler import Compiler
from ..density.handlers import init_uniform
from ..dynamics.dynamics import Dynamics
from ..dynamics.langevin import Langevin
from ..dynamics.metric import Diagonal, Identity, Preconditioner
from ..dynamics.metropolis import BEST_ACCEPTANCE
from ..dynamics.step_size import StepSize
from ..objectives.annealed import Annealed
from ..objectives.objective import Objective
from ..objectives.path import PathDensity
from ..starts.fitted import Gaussian
from ..starts.from_guide import as_start
from ..starts.gaussian import Init
from ..starts.kept import Persistent
from ..starts.prior import Prior
from ..starts.start import Start, check_start
from ..tensors import ordinary_autograd, plain
from .chains import DrawStats, Session
from .langevin_chain import LangevinChain, StepSizeSchedule
from .pace import stages
from .sampler import Sampler
from .short_runs import ShortRuns
from .starting import Starting
from .target import ModelTarget, PotentialTarget, Target

_SHORT_WARMUP = 500  # transitions


class ShortRunLangevin(MCMCKernel):
    r"""Short runs, Langevin chains and MALA on a model's log joint, for :class:`pyro.infer.MCMC`.

    One transition moves the unconstrained latents ``u`` by

    .. math:: u' = u + \eta \nabla \log\pi(u) + \sqrt{2 \eta}\, \epsilon , \qquad \epsilon \sim N(0, I),

    and a draw is ``num_steps`` transitions:

    * ``persistent=False`` (default): from a fresh start, so that draws are independent: the papers' short run. Warm-up
      tunes the step size by gradient ascent on the run's bound (``objective``); each warm-up step is one run per chain.
    * ``persistent=True``: from the last draw: an unadjusted Langevin chain at the step size given (a number is halved
      first where pilot runs find it too large for the model, as in the guide). Its stationary law is biased: for
      ``N(0, 1/lambda)`` the variance is ``1 / (lambda (1 - eta lambda / 2))``. Where the model subsamples a plate,
      every transition has a mini-batch of its own (SGLD).
    * ``adjust=True``: a chain whose transitions pass a Metropolis test (MALA), row by row where a plate makes the
      latents independent; asymptotically exact. Warm-up adapts the step size by dual averaging, and a
      ``preconditioner``. With an explicit ``persistent=False`` every draw restarts.

    The kernel counts warm-up steps itself. Draws, chains in processes, ``StreamingMCMC`` and ``az.from_pyro`` are
    Pyro's; :class:`VectorizedMCMC` runs many chains at once.

    >>> import pyro, pyro.distributions as dist, torch
    >>> from pyro.infer import MCMC
    >>> def model(x):
    ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
    >>> kernel = ShortRunLangevin(model, num_steps=5, adjust=True)
    >>> mcmc = MCMC(kernel, num_samples=20, warmup_steps=20, disable_progbar=True)
    >>> mcmc.run(torch.ones(3))
    >>> mcmc.get_samples()["loc"].shape
    torch.Size([20])

    Roberts, Tweedie: Exponential convergence of Langevin distributions and their discrete approximations, Bernoulli
    1996 (ULA, MALA); Welling, Teh: Bayesian learning via stochastic gradient Langevin dynamics, ICML 2011 (SGLD);
    Nijkamp et al., ECCV 2020 (short runs).

    :param model: a Pyro model, or None with ``potential_fn``. Its discrete latents are summed out, as by NUTS.
    :param num_steps: transitions per draw, ``>= 1``.
    :param step_size: ``eta``: a number, a :class:`StepSize`, or, for chains, a schedule ``t -> eta`` of the number of
        transitions made. A number is a first guess where it is adapted; ``StepSize(eta, learnable=False)`` stays. In a
        preconditioned chain it is relative to the scales found.
    :param persistent: see above; default: the value of ``adjust``.
    :param adjust: see above.
    :param potential_fn: instead of a model, minus the log density over a dict of unconstrained tensors. Needs
        ``initial_params``; with ``persistent=False``, runs start at ``N(initial_params, 1)``. (The one that Pyro's
        ``initialize_model`` makes cannot be vectorised over chains; its model can.)
    :param dynamics: a :class:`Dynamics` instead of ``step_size``; default :class:`Langevin`.
    :param start: where runs and chains start, and what they move in: by default a fitted :class:`Gaussian`, in whose
        coordinates the posterior has unit scales, by the rule :func:`~pyro_shortrun.guides.default_start` of the
        guides (all latents together small, no subsampling); otherwise, and where ``initial_params`` or an unadjusted
        chain's step size are given, :class:`Prior` for short runs and for chains ``Init(init_to_uniform)``, uniform in
        (-2, 2) as Pyro's kernels. Or a guide, which is not trained.
    :param preconditioner: :class:`Diagonal` (default with ``adjust``), :class:`Dense` or :class:`Identity`.
    :param target_accept_prob: wanted acceptance rate; default 0.574, optimal for MALA in high dimension.
    :param objective: the bound by which short runs are tuned: :class:`Annealed` (default from a Gaussian) or
        :class:`PathDensity` (default otherwise).
    :param transforms: with ``potential_fn``: transforms from constrained to unconstrained space by name.
    :param compile: whether the transitions of models are compiled, in one graph with a loop in it. By default (None) as
        far as it pays: where what is left takes more than half a second they are traced once and then run without
        Pyro, where that takes more than half a minute they are compiled. All give the same draws but for rounding.
    :raises ValueError: for arguments out of range or that exclude each other, and at set-up for a density that is not
        finite at the start.
    """

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        num_steps: int = 20,
        step_size: float | StepSize | StepSizeSchedule | None = None,
        persistent: bool | None = None,
        adjust: bool = False,
        *,
        potential_fn: Callable[..., Any] | None = None,
        dynamics: Dynamics | None = None,
        start: Start | Callable[..., Any] | None = None,
        preconditioner: Preconditioner | None = None,
        target_accept_prob: float | None = None,
        objective: Objective | None = None,
        transforms: Mapping[str, Any] | None = None,
        compile: bool | None = None,
    ) -> None:
        if (model is None) == (potential_fn is None):
            raise ValueError("pass either a model or potential_fn.")
        if model is not None:
            check_model(model)
        check_count("num_steps", num_steps)
        if dynamics is not None and step_size is not None:
            raise ValueError("pass step_size or dynamics, not both: Langevin(step_size) is the default dynamics.")
        check_flags(adjust=adjust, persistent=persistent, compile=compile)
        check_function("potential_fn", potential_fn, "lambda params: params['z'].square().sum() / 2")
        check_kind("transforms", transforms, Mapping, "{'scale': biject_to(constraints.positive).inv}")
        if target_accept_prob is not None:
            check_between("target_accept_prob", target_accept_prob, 0, 1, "0.574")
        check_kind("dynamics", dynamics, Dynamics, "Langevin(0.1)")
        check_kind("objective", objective, Objective, "PathDensity()")
        check_kind("preconditioner", preconditioner, Preconditioner, "Diagonal()")
        check_start(None if isinstance(start, Gaussian) else start)  # a guide's may be used again
        self.model, self.potential_fn, self.num_steps = model, potential_fn, num_steps
        self.adjust, self.persistent = adjust, adjust if persistent is None else persistent
        self.target_accept_prob = BEST_ACCEPTANCE if target_accept_prob is None else target_accept_prob
        self._schedule = step_size if callable(step_size) and not isinstance(step_size, StepSize) else None
        self._is_guess = dynamics is None and not isinstance(step_size, StepSize)
        # Steps that stay as they are belong to the latents' own units, not to those of a fitted Gaussian.
        self._has_steps_of_its_own = self.persistent and not adjust and not (dynamics is None and step_size is None)
        guess: Any = 0.1 if step_size is None or self._schedule is not None else step_size
        self.dynamics = Langevin(guess) if dynamics is None else dynamics
        self.objective = objective
        default: Preconditioner = Diagonal() if adjust else Identity()
        self.preconditioner = default if preconditioner is None else preconditioner
        self._start = start
        self._given_transforms = transforms
        _check_combination(self, objective, target_accept_prob)
        self._compiler = Compiler() if compile else None
        self._stages = stages() if compile is None and model is not None else []
        self.transforms: dict[str, Any] | None = None
        self._given: dict[str, Tensor] | None = None
        self._session: Session | None = None
        self._params: dict[str, Tensor] = {}

    # ---------------------------------------------------------------- Pyro's protocol

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Bind the model's arguments and open one chain; warm-up is counted from here."""
        self._session = self.open(1, warmup_steps, args, kwargs, self._given)
        self._session.sampler.one_by_one = True
        self.transforms = self._session.target.transforms
        self._params = self._session.params()

    @property
    def initial_params(self) -> dict[str, Tensor]:
        """State of the chain in unconstrained space, by site. (A site whose support depends on other sites is in its
        constrained space: no fixed transform could bring it back.)"""
        return self._params

    @initial_params.setter
    def initial_params(self, params: Mapping[str, Tensor]) -> None:
        self._given = {k: v.unsqueeze(0) for k, v in params.items()}

    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """One draw from ``params``."""
        session = self._running()
        if params is not self._params:
            session.move_to({k: v.unsqueeze(0) for k, v in params.items()})
        session.draw()
        self._params = session.params()
        return self._params

    def logging(self) -> OrderedDict[str, Any]:
        """Step size and acceptance for the progress bar."""
        return self._running().record.short()

    def diagnostics(self) -> dict[str, Any]:
        """``divergences`` (indices of draws with a non-finite proposal), ``acceptance rate``, and all per-draw
        statistics as ``sample_stats``."""
        session = self._running()
        stats = session.stats()
        diverging = (stats["nonfinite"][0] > 0).nonzero().flatten().tolist()
        return {
            "divergences": diverging,
            "acceptance rate": stats["acceptance_rate"].mean().item(),
            "sample_stats": DrawStats({k: v[0].cpu() for k, v in stats.items()}),
        }

    def cleanup(self) -> None:
        """Forget the initial parameters given (Pyro calls this twice)."""
        self._given = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the chain, which a worker process opens for itself."""
        return {**self.__dict__, "_session": None, "transforms": None, "_params": {}}

    def _running(self) -> Session:
        if self._session is None:
            raise RuntimeError("call kernel.setup(warmup_steps, *args) first, or run the kernel by MCMC.")
        return self._session

    # ---------------------------------------------------------------- many chains

    def open(
        self,
        num_chains: int,
        warmup_steps: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        initial_params: Mapping[str, Tensor] | None = None,
        chain_batch_size: int | None = None,
        may_shorten: bool = False,
    ) -> Session:
        """Start ``num_chains`` chains of this kernel on the model's arguments.

        :param may_shorten: whether less warm-up will do where there is little to learn, from a fitted Gaussian.
        """
        with ordinary_autograd():
            target = _target(self, plain(args), plain(kwargs), initial_params)
            if may_shorten and target.frame is not None:
                warmup_steps = min(warmup_steps, -(-_SHORT_WARMUP // self.num_steps))
            sampler = _sampler(self, target, warmup_steps, chain_batch_size)
            session = Session(sampler, warmup_steps, self._stages)
            if num_chains > 1:
                two = target.start(2).state if initial_params is None else None
                session.check_vectorizes(two, initial_params)
            session.begin(num_chains, initial_params)
        return session


# ---------------------------------------------------------------- what a kernel's arguments make


def _check_combination(kernel: ShortRunLangevin, objective: Objective | None, target_accept_prob: float | None) -> None:
    if objective is not None and type(objective) not in (PathDensity, Annealed):
        kind = type(objective).__name__
        raise NotImplementedError(f"{kind} tunes a ShortRunGuide, not a kernel: use PathDensity() or Annealed().")
    if kernel.dynamics.has_momentum:
        raise NotImplementedError(
            f"{type(kernel.dynamics).__name__} is for a ShortRunGuide with objective=Annealed(): use Langevin(...)."
        )
    chain = kernel.persistent or kernel.adjust
    if chain and objective is not None:
        raise ValueError("objective tunes short runs: it has no use with persistent=True or adjust=True.")
    if not kernel.adjust and target_accept_prob is not None:
        raise ValueError("target_accept_prob has no use without adjust=True.")
    if kernel._given_transforms is not None and kernel.potential_fn is None:
        raise ValueError("transforms go with potential_fn; a model has its own: leave them out.")
    if kernel.adjust and not kernel.dynamics.has_transition_density:
        raise ValueError("adjust=True needs dynamics with noise, such as Langevin(0.1).")
    if kernel._schedule is not None and (kernel.adjust or not kernel.persistent):
        raise ValueError("a step-size schedule is for unadjusted chains: set persistent=True, adjust=False.")
    if not chain and not isinstance(kernel.preconditioner, Identity):
        raise ValueError("a preconditioner is learned by a chain: set persistent=True or adjust=True.")
    if isinstance(kernel._start, Persistent):
        raise ValueError("start=Persistent() is for guides; a chain that goes on is persistent=True.")
    if kernel._start is not None and kernel.potential_fn is not None:
        raise ValueError("start needs a model; with potential_fn, pass initial_params to MCMC.")


def _target(
    kernel: ShortRunLangevin, args: tuple[Any, ...], kwargs: dict[str, Any], initial: Mapping[str, Tensor] | None
) -> Target:
    if kernel.model is None:
        if initial is None:
            raise ValueError("potential_fn needs initial_params: MCMC(kernel, ..., initial_params={name: tensor}).")
        return PotentialTarget(kernel.potential_fn, initial, kernel._given_transforms)  # type: ignore[arg-type]
    if initial is not None and not kernel.persistent:
        raise ValueError("initial_params have no use where every draw restarts; pass start= to the kernel.")
    fits = initial is None and not kernel._has_steps_of_its_own
    given = None if kernel._start is None else as_start(kernel._start)
    starting = Starting(given, Init(init_uniform) if kernel.persistent else Prior(), fits)
    target = ModelTarget(*starting(kernel.model, args, kwargs), kernel._compiler)
    if kernel.adjust and target.is_subsampled:
        name = next(iter(target.call.reading.subsampled))
        raise ValueError(
            f"plate '{name}' shows a mini-batch, by whose likelihood adjust=True would accept: use the full plate, "
            "or persistent=True, adjust=False with a decaying step size (SGLD)."
        )
    return target


def _sampler(kernel: ShortRunLangevin, target: Target, warmup: int, chain_batch_size: int | None) -> Sampler:
    dynamics = copy.deepcopy(kernel.dynamics)  # every run of MCMC tunes anew
    learnable = dynamics.step_size.learnable
    if not (kernel.persistent or kernel.adjust):
        return ShortRuns(
            target,
            dynamics,
            kernel.num_steps,
            chain_batch_size,
            objective=copy.deepcopy(kernel.objective) or _objective(target),
            warmup=warmup,
            guess=kernel._is_guess,
            tune=learnable and target.has_density,
        )
    return LangevinChain(
        target,
        dynamics,
        kernel.num_steps,
        chain_batch_size,
        known_by=kernel.dynamics,
        adjust=kernel.adjust,
        restarts=not kernel.persistent,
        schedule=kernel._schedule,
        preconditioner=kernel.preconditioner,
        warmup=warmup,
        accept=kernel.target_accept_prob if kernel.adjust and learnable else None,
        guess=kernel._is_guess and kernel._schedule is None and not kernel.adjust and kernel.model is not None,
        limit=float("inf") if kernel._is_guess else dynamics.step_size.max,
    )


def _objective(target: Target) -> Objective:
    """Of short runs where nobody says: as that of guides from the same start."""
    return PathDensity() if target.frame is None else Annealed(learnable=False)
