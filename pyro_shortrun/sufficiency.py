"""Are runs in a tilted prior long enough, and has its energy converged?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from .arguments import check_count
from .comparison import draws_of
from .dynamics import Dynamics
from .energy import NegativeSampler
from .evaluation import squared_mmd
from .interop import ordinary_autograd, plain
from .program import Reading, masked
from .start import Call, Start
from .tilted import TiltedPrior, begin_in, energies, go_on

_ERRORS = 4.0  # standard errors that a change must have to count
_BLOCKS = 8
_POINTS = 2000  # of a maximum mean discrepancy, for its cost is quadratic


# -------------------------------------------------------------------------------------------- converged?


@dataclass(frozen=True)
class EnergyGap:
    """What :func:`energy_gap` found, by ``energy_prior`` site, in nats per element: mean energies of posterior draws
    (``posterior``) and of runs in the prior (``prior``), and their ``*_error``, standard errors over draws."""

    posterior: dict[str, float]
    posterior_error: dict[str, float]
    prior: dict[str, float]
    prior_error: dict[str, float]
    nonfinite: int

    @property
    def gap(self) -> dict[str, float]:
        """Posterior minus prior: minus :attr:`EnergyInfo.gap`, which is of ``f = -E``."""
        return {k: v - self.prior[k] for k, v in self.posterior.items()}

    @property
    def error(self) -> dict[str, float]:
        """Standard error of the gap, for these data."""
        return {k: math.hypot(v, self.prior_error[k]) for k, v in self.posterior_error.items()}

    def summary(self) -> str:
        """One line for each site, in words."""
        lines = []
        for site, gap in self.gap.items():
            error = self.error[site]
            known = (
                "is zero within its error" if abs(gap) <= _ERRORS * error else "is not zero: not at maximum likelihood"
            )
            lines.append(
                f"{site}: energy {self.posterior[site]:.4g} +- {self.posterior_error[site]:.2g} at posterior draws, "
                f"{self.prior[site]:.4g} +- {self.prior_error[site]:.2g} at the ends of runs in the prior; the gap, "
                f"{gap:.4g} +- {error:.2g}, {known}."
            )
        left_out = f"{self.nonfinite} rows of runs in the prior were not finite and stopped early."
        return "\n".join([*lines, *([left_out] if self.nonfinite else [])])


@torch.no_grad()
def energy_gap(
    model: Callable,
    guide: Any,
    *args: Any,
    num_samples: int = 64,
    num_steps: int = 40,
    step_size: float | None = None,
    dynamics: Dynamics | None = None,
    start: Start | Callable | None = None,
    **kwargs: Any,
) -> EnergyGap:
    r"""The two phases of maximum likelihood, compared: for each :func:`~pyro_shortrun.energy_prior` site

    .. math:: E_{p(x)}\, E_{q(z \mid x)}[E(z)] - E_{p_K(z)}[E(z)] ,

    where :math:`p_K` is the law of the ends of K-step runs in the prior. For an energy with a free scale the gradient
    of the likelihood in that scale is minus this gap, so that it is near zero where training has converged, and large
    where the energy runs away. Zero does not say that the runs are long enough (see :func:`run_length`).

    The standard errors are over draws, for these data: data that were not trained on add the spread of the data.

    :param model: a Pyro model with ``energy_prior`` statements.
    :param guide: a guide that samples the energies' latents, a finished sampler, or draws, as for
        :func:`~pyro_shortrun.comparison.compare_with_nuts`.
    :param args: the model's arguments, as ``kwargs``.
    :param num_samples: draws of each phase; at least 4.
    :param num_steps: steps of a run in the prior: those of :class:`EnergyELBO`, as ``step_size``, ``dynamics`` and
        ``start``.
    :raises ValueError: where the model has no ``energy_prior``, or an argument is out of range.

    >>> import pyro, pyro.distributions as dist
    >>> from pyro_shortrun import energy_prior
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         energy_prior("ebm", lambda z: z.square(), z)
    ...         pyro.sample("x", dist.Normal(z, 0.1), obs=x)
    >>> found = energy_gap(model, {"z": torch.zeros(1, 4, 3)}, torch.zeros(3), num_steps=5)
    >>> found.posterior["ebm"], found.gap["ebm"] < 0
    (0.0, True)
    """
    check_count("num_samples", num_samples)
    if num_samples < 4:
        raise ValueError("num_samples must be at least 4, for standard errors.")
    sampler = NegativeSampler(num_steps, step_size, dynamics, start)
    with ordinary_autograd(), torch.no_grad(), poutine.block():
        call = _bound(model, args, kwargs)
        density = call.density
        sites = {s.name: s.shape for s in density.layout.sites}
        found = {k: v.flatten(0, 1) for k, v in draws_of(guide, args, kwargs, num_samples, 1, sites).items()}
        count = len(next(iter(found.values())))
        positive = torch.stack([density.unconstrain({k: v[i] for k, v in found.items()}) for i in range(count)])
        done = sampler.run(call, num_samples)
        phases = [_energies(call, u) for u in (positive, done.end)]
    means, errors = ([{k: v[i] for k, v in phase.items()} for phase in map(_moments, phases)] for i in (0, 1))
    return EnergyGap(means[0], errors[0], means[1], errors[1], done.info.nonfinite)


def _bound(model: Callable, args: tuple, kwargs: dict) -> Call:
    call = TiltedPrior(model).bind(plain(args), plain(kwargs))
    if call is None:
        raise ValueError("the model has no energy_prior(...) statement.")
    return call


def _energies(call: Call, u: Tensor) -> dict[str, Tensor]:
    """Mean energies of the elements of every site, by chain of ``u``."""

    def take(reading: Reading) -> tuple[Tensor, ...]:
        found = [(-s["fn"].log_factor, s["mask"]) for s in energies(reading).values()]
        return tuple(masked(e, m).sum() / masked(torch.ones_like(e), m).sum() for e, m in found)

    return dict(zip(energies(call.reading), call.density.with_readings(u, take)[1:], strict=True))


def _moments(values: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Mean and standard error over chains."""
    return {k: (v.mean().item(), v.std().item() / math.sqrt(len(v))) for k, v in values.items()}


# -------------------------------------------------------------------------------------------- long enough?


@dataclass(frozen=True)
class RunLength:
    r"""What :func:`run_length` found. Arrays are ``(lengths,)``.

    ``energy`` and ``energy_error`` are mean energies by site, per element, and under ``"-log density"`` minus the mean
    of :math:`\log\pi` per row, which has prior and energies; ``mmd`` is the squared maximum mean discrepancy of states
    to those of the longest runs, from disjoint halves of the runs, and ``nonfinite`` counts rows that stopped by then.
    ``change`` is the mean difference between ``num_steps[-1]`` and ``trained`` steps, ``trend`` the mean slope per
    doubling of the number of steps from ``trained`` on, both run by run, so that their standard errors
    (``change_error``, ``trend_error``) are those of differences of the same runs.
    """

    num_steps: tuple[int, ...]
    trained: int
    energy: dict[str, Tensor]
    energy_error: dict[str, Tensor]
    mmd: Tensor
    mmd_error: Tensor
    nonfinite: Tensor
    change: dict[str, float]
    change_error: dict[str, float]
    trend: dict[str, float]
    trend_error: dict[str, float]

    @property
    def too_short(self) -> bool:
        """Whether any energy has a trend beyond ``trained`` steps, by four standard errors."""
        return any(abs(v) > _ERRORS * self.trend_error[k] for k, v in self.trend.items())

    def summary(self) -> str:
        """A table, and what it says of runs of ``trained`` steps."""
        names = list(self.energy)
        lines = [f"{'K':>6}" + "".join(f"{n:>22}" for n in names) + f"{'MMD^2 to longest':>24}{'nonfinite':>11}"]
        for i, steps in enumerate(self.num_steps):
            cells = [f"{self.energy[n][i]:.4f} +- {self.energy_error[n][i]:.4f}" for n in names]
            mmd = f"{self.mmd[i]:.4f} +- {self.mmd_error[i]:.4f}" if steps < self.num_steps[-1] else ""
            lines.append(f"{steps:>6}" + "".join(f"{c:>22}" for c in cells) + f"{mmd:>24}{self.nonfinite[i]:>11d}")
        return "\n".join([*lines, self._verdict(), *self._stopped()])

    def _verdict(self) -> str:
        last, first = self.num_steps[-1], self.trained
        moving = [k for k, v in self.trend.items() if abs(v) > _ERRORS * self.trend_error[k]]
        if not moving:
            none = f"No energy changes from K = {first} to {last} beyond its error"
            return f"{none}: runs of {first} steps look long enough."
        told = ", ".join(f"{k} by {self.change[k]:.2g} +- {self.change_error[k]:.1g}" for k in moving)
        return (
            f"Energies still change at K = {first}: {told} from {first} to {last}. The model is that of the "
            f"{first}-step sampler, not of its energy: sample as in training, or train with longer runs."
        )

    def _stopped(self) -> list[str]:
        count = int(self.nonfinite[-1])
        return [f"{count} rows met a non-finite density or gradient and stopped there."] if count else []

    def plot(self, axes: Any = None) -> Any:
        """Energies, and the discrepancy to the longest runs, against the number of steps.

        :param axes: two axes; made where None.
        :return: the axes.
        """
        import matplotlib.pyplot as plt

        if axes is None:
            _, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
        for name, value in self.energy.items():
            axes[0].errorbar(self.num_steps, value.tolist(), self.energy_error[name].tolist(), label=name)
        axes[1].errorbar(self.num_steps[:-1], self.mmd[:-1].tolist(), self.mmd_error[:-1].tolist())
        for ax, label in zip(axes, ("mean energy, nats", f"MMD$^2$ to K = {self.num_steps[-1]}"), strict=True):
            ax.axvline(self.trained, color="0.6", ls=":", label=f"trained, K = {self.trained}")
            ax.set(xscale="log", xlabel="steps K", ylabel=label)
        axes[0].legend(fontsize=8)
        return axes


@torch.no_grad()
def run_length(
    model: Callable,
    *args: Any,
    num_steps: Sequence[int] = (5, 10, 20, 40, 80, 160),
    trained: int = 40,
    num_samples: int = 64,
    step_size: float | None = None,
    dynamics: Dynamics | None = None,
    start: Start | Callable | None = None,
    **kwargs: Any,
) -> RunLength:
    """Was the run too short? Runs in a model's tilted prior, looked at after several numbers of steps.

    The same runs go on from one number of steps to the next. If they have reached the density by the number of steps
    that the energy was trained with, nothing changes afterwards. Else the model that was learnt is that of the
    ``trained``-step sampler, and not of its energy: a legitimate model, but one whose samples depend on that number.

    The energies are enough to say that something still changes, and not that nothing does: a run that is stuck in one
    of two modes has constant energies, and longer runs of the same kind would not tell.

    Nijkamp, Hill, Zhu, Wu: Learning Non-Convergent Non-Persistent Short-Run MCMC Toward Energy-Based Model, NeurIPS
    2019; Nijkamp, Hill, Han, Zhu, Wu: On the Anatomy of MCMC-Based Maximum Likelihood Learning of Energy-Based Models,
    AAAI 2020.

    :param model: a Pyro model with ``energy_prior`` statements.
    :param args: the model's arguments, as ``kwargs``; data after the last energy do not matter, their shapes do.
    :param num_steps: increasing numbers of steps, ``trained`` and larger ones among them. The last ones' time bounds
        what can be seen: take at least four times ``trained``.
    :param trained: steps of a run in training.
    :param num_samples: runs of every row; at least 4.
    :param step_size: as in training, 0.1 by default; or ``dynamics``. Step sizes of single steps go on with the last.
    :param start: as in training.
    :raises ValueError: where the model has no ``energy_prior``, or an argument is out of range.

    >>> import pyro, pyro.distributions as dist
    >>> from pyro_shortrun import energy_prior
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         energy_prior("ebm", lambda z: 4 * z.square(), z)
    ...         pyro.sample("x", dist.Normal(z, 0.1), obs=x)
    >>> run_length(model, torch.zeros(50), num_steps=(4, 16, 64), trained=4, step_size=0.01).too_short
    True
    """
    lengths = _lengths(num_steps, trained, num_samples)
    sampler = NegativeSampler(trained, step_size, dynamics, start)
    with ordinary_autograd(), torch.no_grad(), poutine.block():
        call = _bound(model, args, kwargs)
        state, eta = begin_in(call, sampler.start, sampler.dynamics, trained, num_samples)
        eta = torch.cat([eta, eta[-1:].expand(max(lengths[-1] - trained, 0), -1)])
        frozen, states, found, stopped, done = torch.zeros_like(state[..., 0], dtype=torch.bool), [], [], [], 0
        for steps in lengths:
            part = go_on(call, sampler.dynamics, state, eta[done:steps])
            state, done, frozen = part.end, steps, frozen | part.info.frozen
            states.append(state)
            found.append({**_energies(call, state), "-log density": -call.density(state).mean(-1) / _weight(call)})
            stopped.append(int(frozen.sum()))
    return _summarised(lengths, trained, found, states, stopped)


def _weight(call: Call) -> float:
    """What each row of a subsampled plate counts for."""
    layout = call.density.layout
    return 1.0 if layout.is_arrow else math.prod(p.scale for p in layout.row_plates)


def _lengths(num_steps: Sequence[int], trained: int, num_samples: int) -> tuple[int, ...]:
    check_count("trained", trained)
    check_count("num_samples", num_samples)
    for steps in num_steps:
        check_count("num_steps", steps)
    lengths = tuple(num_steps)
    if len(lengths) < 2 or lengths != tuple(sorted(set(lengths))):
        raise ValueError(f"num_steps must be two or more increasing numbers of steps, got {lengths}.")
    if trained not in lengths[:-1]:
        raise ValueError(f"num_steps must hold trained={trained} and a larger number, got {lengths}.")
    if num_samples < 4:
        raise ValueError("num_samples must be at least 4, for standard errors.")
    return lengths


def _summarised(
    lengths: tuple[int, ...], trained: int, found: list[dict[str, Tensor]], states: list[Tensor], stopped: list[int]
) -> RunLength:
    by_name = {k: torch.stack([f[k] for f in found]) for k in found[0]}  # (lengths, runs)
    first = lengths.index(trained)
    time = torch.tensor(lengths[first:], dtype=torch.float64).log2()
    time = ((time - time.mean()) / (time - time.mean()).square().sum()).to(states[0])
    change = _moments({k: v[-1] - v[first] for k, v in by_name.items()})
    trend = _moments({k: time @ v[first:] for k, v in by_name.items()})
    mmd = torch.tensor([_discrepancy(u, states[-1]) for u in states])
    root = math.sqrt(states[0].shape[0])
    return RunLength(
        lengths,
        trained,
        {k: v.mean(1) for k, v in by_name.items()},
        {k: v.std(1) / root for k, v in by_name.items()},
        mmd[:, 0],
        mmd[:, 1],
        torch.tensor(stopped),
        *({k: v[i] for k, v in pairs.items()} for pairs in (change, trend) for i in (0, 1)),
    )


def _discrepancy(u: Tensor, last: Tensor) -> tuple[float, float]:
    """Squared MMD between the states of even runs and the last states of odd ones, which are independent of each other,
    and its standard error over blocks of runs."""
    blocks = min(_BLOCKS, u.shape[0] // 2)
    chains = [torch.arange(i, u.shape[0], blocks, device=u.device) for i in range(blocks)]
    most = _POINTS // blocks
    pairs = [(u[c[::2]].flatten(0, 1)[:most], last[c[1::2]].flatten(0, 1)[:most]) for c in chains]
    pooled = torch.cat([b for _, b in pairs])
    width = torch.pdist(pooled).median().item()
    if not width > 0 or min(len(t) for pair in pairs for t in pair) < 2:
        return math.nan, math.nan
    values = torch.tensor([squared_mmd(a, b, width) for a, b in pairs])
    return values.mean().item(), values.std().item() / math.sqrt(blocks)
