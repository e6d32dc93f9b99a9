"""Annealed importance sampling: log evidence, and log Z of tilted priors, from both sides."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from ..checks import check_between, check_count, check_flags, check_model
from ..compile.compiler import Compiler
from ..compile.executor import density_of
from ..density.call import Call
from ..density.interface import Density
from ..density.layout import require_full_plates
from ..dynamics.adaptation import follow_acceptance
from ..dynamics.langevin import Langevin
from ..dynamics.metropolis import BEST_ACCEPTANCE, Position, decide, hastings_log_ratio
from ..dynamics.step_size import StepSize
from ..energy.prior import TiltedPrior
from ..tensors import keep_rows, ordinary_autograd, plain

_PILOT_CHAINS = 8
_GAIN = 0.3  # of the step size's adaptation


@dataclass(frozen=True)
class Interval:
    """Estimates from below and above per row in nats, and the effective sample size ``ess`` of the one from below.

    Each has a Monte Carlo error of about ``sqrt(1 / ess - 1 / num_chains)``, so a tight interval may be crossed.
    """

    lower: Tensor
    upper: Tensor
    ess: Tensor


@dataclass(frozen=True)
class Evidence:
    """``log p(x)`` per row, in nats.

    ``joint`` is for the integral of the model as written, ``log_z`` for the normaliser of its tilted prior (None
    without energies): ``lower = joint.lower - log_z.upper``, and the other way round.
    """

    joint: Interval
    log_z: Interval | None

    @property
    def lower(self) -> Tensor:
        """From below: ``E[lower] <= log p(x)`` up to the quality of the long runs behind ``log_z.upper``."""
        return self.joint.lower if self.log_z is None else self.joint.lower - self.log_z.upper

    @property
    def upper(self) -> Tensor:
        """From above, as good as the long runs that the reverse passes start at."""
        return self.joint.upper if self.log_z is None else self.joint.upper - self.log_z.lower

    @property
    def ess(self) -> Tensor:
        """The smaller effective sample size of the two forward passes, out of ``num_chains``."""
        return self.joint.ess if self.log_z is None else torch.minimum(self.joint.ess, self.log_z.ess)


def ais(
    model: Callable[..., Any],
    *args: Any,
    num_chains: int = 32,
    num_temperatures: int = 200,
    num_transitions: int = 1,
    long_run: int | None = None,
    step_size: float = 0.1,
    power: float = 3.0,
    compile: bool = False,
    **kwargs: Any,
) -> Evidence:
    r"""``log p(x)`` per row as an interval, by annealed importance sampling with Metropolis-adjusted transitions.

    From draws of the prior :math:`q_0 = \prod_i p(z_i \mid \text{parents})`, targets move along
    :math:`\pi_t \propto q_0^{1-\beta_t} \pi^{\beta_t}`, :math:`\beta_t = (t / T)^{\text{power}}`, with MALA transitions
    that leave :math:`\pi_t` invariant:

    .. math:: \log w = \sum_{t=1}^T (\beta_t - \beta_{t-1}) \log\frac{\pi}{q_0}(u_{t-1}) , \qquad
              E[w] = \int \pi(u)\, du ,

    so ``log mean w`` over chains is too low in expectation. The same backwards from draws of :math:`\pi` gives an
    estimate that is too high. Such draws are not to be had exactly: they are the forward pass's ends, resampled by
    their weights and moved on by ``long_run`` transitions, and the upper end is as good as these.

    With :func:`~pyro_shortrun.energy_prior` statements, :math:`\log p(x) = \log \int \pi - \log Z`; log Z is
    bracketed in the same way on the prior alone, and the two intervals are combined.

    Neal: Annealed importance sampling, Statistics and Computing 2001; Grosse, Ghahramani, Adams: Sandwiching the
    marginal likelihood using bidirectional Monte Carlo, 2015.

    >>> import pyro, pyro.distributions as dist, torch
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> found = ais(model, torch.zeros(2), num_chains=8, num_temperatures=20)
    >>> found.lower.shape, found.log_z is None
    (torch.Size([2]), True)

    :param model: a Pyro model whose latents share their plates (one row per datum), or have none.
    :param args: its arguments.
    :param num_chains: chains per row.
    :param num_temperatures: ``T``.
    :param num_transitions: transitions per temperature.
    :param long_run: transitions at the target before the reverse pass, ``num_temperatures`` by default.
    :param step_size: first guess of ``eta``; a pilot pass of at most 8 chains adapts it for each temperature and row,
        so that in the pass that counts it does not depend on the states.
    :param power: of the temperatures; larger ones spend more of them near the prior.
    :param compile: whether densities and gradients are compiled, which pays from some hundred transitions on.
    :param kwargs: the model's keyword arguments.
    :raises ValueError: for arguments out of range, and where a latent lies in a subsampled plate.
    """
    check_count("num_temperatures", num_temperatures)
    check_count("num_transitions", num_transitions)
    check_count("num_chains", num_chains, least=2)
    check_between("power", power, 0, math.inf, "3.0")
    check_between("step_size", step_size, 0, math.inf, "0.1")
    if long_run is not None:
        check_count("long_run", long_run)
    check_flags(compile=compile)
    check_model(model)
    betas = [(t / num_temperatures) ** power for t in range(num_temperatures + 1)]
    rest = num_temperatures if long_run is None else long_run
    with ordinary_autograd(), torch.no_grad(), poutine.block():
        args, kwargs = plain(args), plain(kwargs)
        parts = [Call.of(model, args, kwargs), TiltedPrior(model).bind(args, kwargs)]
        paths = [None if c is None else _Path(c, betas, num_transitions, step_size, compile) for c in parts]
        found = [None if path is None else path.bracket(num_chains, rest) for path in paths]
    joint, log_z = found
    assert joint is not None
    if log_z is not None and log_z.lower.shape != joint.lower.shape:  # rows differ: only totals can be compared
        joint, log_z = _total(joint), _total(log_z)
    return Evidence(joint, log_z)


def _total(interval: Interval) -> Interval:
    return Interval(interval.lower.sum().reshape(1), interval.upper.sum().reshape(1), interval.ess.min().reshape(1))


class _OnPath(NamedTuple):
    """A state with the log densities of prior and target there and their gradients."""

    u: Tensor
    prior: Tensor
    target: Tensor
    slope: Tensor
    grad: Tensor

    def at(self, beta: float) -> Position:
        """As a state of the chain at a temperature."""
        density = (1 - beta) * self.prior + beta * self.target
        return Position(self.u, density, (1 - beta) * self.slope + beta * self.grad)


class _Path:
    """The way from a prior to a target, with a step size per temperature and row."""

    def __init__(
        self, call: Call, betas: list[float], num_transitions: int, step_size: float, compile: bool = False
    ) -> None:
        require_full_plates(call.density.layout, "evaluate")
        self.call, self.betas, self.transitions = call, betas, num_transitions
        compiler = Compiler() if compile else None
        self._density = density_of(call.model, compiler)
        self._dynamics = Langevin(StepSize(step_size, learnable=False), max_drift=float("inf"))
        like = call.reading.unconstrained[call.density.layout.sites[0].name]
        self._log_eta = torch.full(
            (call.density.layout.rows,), math.log(step_size), dtype=like.dtype, device=like.device
        )
        self._etas: list[Tensor] = []

    def bracket(self, chains: int, long_run: int) -> Interval:
        self._forward(min(chains, _PILOT_CHAINS), adapt=True)
        log_w, end = self._forward(chains)
        log_w = torch.where(log_w.isnan(), -torch.inf, log_w)  # draws where the model has no density have no weight
        lost = ~log_w.isfinite().any(0)
        if lost.any():
            raise ValueError(
                f"the log density is not finite at any of the {chains} draws from the prior for row "
                f"{int(lost.nonzero()[0])} ({int(lost.sum())} of {len(lost)} rows), so annealing cannot begin there: "
                "use more chains, and look for data that the model cannot have made."
            )
        weights = log_w.softmax(0)
        index = weights.T.multinomial(chains, replacement=True).T
        end = self._at(end.u.gather(0, index.unsqueeze(-1).expand_as(end.u)))
        for _ in range(long_run):
            end = self._move(end, 1.0, self._etas[-1])[0]
        lower, upper = _log_mean_exp(log_w), -_log_mean_exp(self._reverse(end))
        return Interval(lower, upper, 1 / weights.square().sum(0))

    def _forward(self, chains: int, adapt: bool = False) -> tuple[Tensor, _OnPath]:
        point = self._at(self.call.prior(chains))
        log_w = torch.zeros_like(point.prior)
        for t in range(1, len(self.betas)):
            log_w = log_w + (self.betas[t] - self.betas[t - 1]) * (point.target - point.prior)
            if adapt:
                self._etas.append(self._log_eta.exp())
            for _ in range(self.transitions):
                point, accept = self._move(point, self.betas[t], self._etas[t - 1])
                if adapt:
                    self._log_eta = follow_acceptance(self._log_eta, accept.mean(0), BEST_ACCEPTANCE, _GAIN)
        return log_w, point

    def _reverse(self, point: _OnPath) -> Tensor:
        log_w = torch.zeros_like(point.prior)
        for t in range(len(self.betas) - 1, 0, -1):
            for _ in range(self.transitions):
                point, _accept = self._move(point, self.betas[t], self._etas[t - 1])
            log_w = log_w - (self.betas[t] - self.betas[t - 1]) * (point.target - point.prior)
        return log_w

    def _at(self, u: Tensor) -> _OnPath:
        return _OnPath(u, *self._density.execute(_Terms(), (u,)))

    def _move(self, point: _OnPath, beta: float, eta: Tensor) -> tuple[_OnPath, Tensor]:
        """A MALA transition for temperature ``beta``, and its acceptance probabilities."""
        eta, one = eta.unsqueeze(-1), torch.ones_like(point.u[0, 0])
        here = point.at(beta)
        u = self._dynamics.step(here.u, here.pull, eta, torch.randn_like(here.u), one)
        new = self._at(u)
        ratio = hastings_log_ratio(self._dynamics, here, new.at(beta), eta, one)
        finite = new.prior.isfinite() & new.target.isfinite()
        move, accept = decide(ratio, finite, torch.rand_like(ratio).log())
        return _OnPath(*(keep_rows(move, a, b) for a, b in zip(new, point, strict=True))), accept


class _Terms:
    """``(u,)`` to the log densities of prior and target there, and their gradients."""

    key = ("annealing",)

    def __call__(self, density: Density, *inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            u = inputs[0].detach().requires_grad_()
            target, prior = density.with_start(u)
            (grad,) = torch.autograd.grad(target.sum(), u, retain_graph=True, materialize_grads=True)
            (slope,) = torch.autograd.grad(prior.sum(), u, materialize_grads=True)
        return prior.detach(), target.detach(), slope, grad


def _log_mean_exp(log_w: Tensor) -> Tensor:
    return log_w.logsumexp(0) - math.log(len(log_w))
