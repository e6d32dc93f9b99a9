"""Are runs in a tilted prior long enough?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ..checks import check_count, check_counts
from ..density.call import Call
from ..energy.runs import PriorRuns
from ..evaluation.two_samples import squared_mmd
from ..tensors import ordinary_autograd
from .energy_gap import ERRORS, bound_prior, mean_energies, moments

_BLOCKS = 8
_TELLING = 0.25  # that a virial must be off; steps of 0.1 in a curvature of 4 give 0.25 by their size alone
_MOST_MEMORY = 0.5
_MOST_STOPPED = 0.05
_POINTS = 2000  # of a maximum mean discrepancy, for its cost is quadratic


@dataclass(frozen=True)
class RunLength:
    r"""What :func:`run_length` found. Arrays are ``(lengths,)``.

    ``energy`` and ``energy_error`` are mean energies by site, per element, and under ``"-log density"`` minus the mean
    of :math:`\log\pi` per row, which has prior and energies; ``mmd`` is the squared maximum mean discrepancy of states
    to those of the longest runs, from disjoint halves of the runs, and ``nonfinite`` counts rows that stopped by then,
    ``stopped`` their share at last. ``virial`` is the mean of :math:`-u \cdot \nabla\log\pi(u)` per coordinate, which
    is 1 in the density, with ``virial_error``; ``memory`` is the largest correlation, over coordinates, of states after
    ``trained`` steps with those of the longest runs. ``change`` is the mean difference between ``num_steps[-1]`` and
    ``trained`` steps, ``trend`` the mean slope per doubling of the number of steps from ``trained`` on, both run by
    run, so that their standard errors (``change_error``, ``trend_error``) are those of differences of the same runs.
    """

    num_steps: tuple[int, ...]
    trained: int
    energy: dict[str, Tensor]
    energy_error: dict[str, Tensor]
    mmd: Tensor
    mmd_error: Tensor
    nonfinite: Tensor
    stopped: float
    virial: Tensor
    virial_error: Tensor
    memory: float
    change: dict[str, float]
    change_error: dict[str, float]
    trend: dict[str, float]
    trend_error: dict[str, float]

    @property
    def _moving(self) -> list[str]:
        """Energies with a trend or a change, by four standard errors."""
        pairs = (self.trend, self.trend_error), (self.change, self.change_error)
        return [k for k in self.trend if any(abs(value[k]) > ERRORS * error[k] for value, error in pairs)]

    @property
    def too_short(self) -> bool:
        """Whether any energy changes beyond ``trained`` steps. ``False`` says little where not :attr:`conclusive`."""
        return bool(self._moving)

    @property
    def in_density(self) -> bool:
        """Whether the virial after ``trained`` steps is 1, within 0.25 or four standard errors."""
        first = self.num_steps.index(self.trained)
        off = (self.virial[first] - 1).abs().item()
        return off <= max(_TELLING, ERRORS * self.virial_error[first].item())

    @property
    def conclusive(self) -> bool:
        """Whether energies that stay mean anything: runs have forgotten by the end where they were after ``trained``
        steps (``memory`` at most 0.5), the virial is right, and at most 5 % of the rows stopped."""
        return self.in_density and self.stopped <= _MOST_STOPPED and not self.memory > _MOST_MEMORY

    def summary(self) -> str:
        """A table, and what it says of runs of ``trained`` steps."""
        names = list(self.energy)
        heads = "".join(f"{n:>22}" for n in names) + f"{'virial':>18}{'MMD^2 to longest':>20}"
        lines = [f"{'K':>6}{heads}{'nonfinite':>11}"]
        for i, steps in enumerate(self.num_steps):
            cells = [f"{self.energy[n][i]:.4f} +- {self.energy_error[n][i]:.4f}" for n in names]
            mmd = f"{self.mmd[i]:.4f} +- {self.mmd_error[i]:.4f}" if steps < self.num_steps[-1] else ""
            virial = f"{self.virial[i]:.3f} +- {self.virial_error[i]:.3f}"
            numbers = f"{virial:>18}{mmd:>20}{self.nonfinite[i]:>11d}"
            lines.append(f"{steps:>6}" + "".join(f"{c:>22}" for c in cells) + numbers)
        return "\n".join([*lines, self._verdict(), *self._stopped()])

    def _verdict(self) -> str:
        last, first = self.num_steps[-1], self.trained
        if moving := self._moving:
            told = ", ".join(f"{k} by {self.change[k]:.2g} +- {self.change_error[k]:.1g}" for k in moving)
            return (
                f"Energies still change at K = {first}: {told} from {first} to {last}. The model is that of the "
                f"{first}-step sampler, not of its energy: sample as in training, or train with longer runs."
            )
        told = f": runs of {first} steps look long enough." if self.conclusive else f", but {self._doubt()}"
        return f"No energy changes from K = {first} to {last} beyond its error{told}"

    def _doubt(self) -> str:
        if self.stopped > _MOST_STOPPED:
            return f"{self.stopped:.0%} of the rows stopped: no conclusion. Take smaller steps."
        if self.memory > _MOST_MEMORY:
            return (
                f"runs have not forgotten where they were at K = {self.trained} (correlation {self.memory:.2f}): steps "
                "are too small, or runs stay in the modes they fell into. No conclusion."
            )
        return (
            f"the virial is {self.virial[self.num_steps.index(self.trained)]:.2f} instead of 1: ends of runs are not "
            "draws of the density. Steps are too large, or far too small."
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
    model: Callable[..., Any],
    *args: Any,
    num_steps: Sequence[int] = (5, 10, 20, 40, 80, 160),
    runs: PriorRuns | None = None,
    num_samples: int = 64,
    **kwargs: Any,
) -> RunLength:
    r"""Was the run too short? Runs in a model's tilted prior, looked at after several numbers of steps.

    The same runs go on from one number of steps to the next. If they have reached the density by the number of steps
    that the energy was trained with, nothing changes afterwards. Else the model that was learnt is that of the sampler
    with so many steps, and not of its energy: a legitimate model, but one whose samples depend on that number.

    That energies stay is not enough: steps can be too small to get anywhere, too large to be right, and runs can stay
    in the mode that they fell into. Two more numbers tell. Runs that remember at the end where they were after as many
    steps as in training have not mixed (``memory``); and since integration by parts gives

    .. math:: E_\pi[-u \cdot \nabla\log\pi(u)] = \dim u ,

    states of which this mean per coordinate (``virial``) is not 1 are not draws of the density. A mode that no run ever
    enters still goes unseen.

    Nijkamp, Hill, Zhu, Wu: Learning Non-Convergent Non-Persistent Short-Run MCMC Toward Energy-Based Model, NeurIPS
    2019; Nijkamp, Hill, Han, Zhu, Wu: On the Anatomy of MCMC-Based Maximum Likelihood Learning of Energy-Based Models,
    AAAI 2020.

    :param model: a Pyro model with ``energy_prior`` statements.
    :param args: the model's arguments, as ``kwargs``; data after the last energy do not matter, their shapes do.
    :param num_steps: increasing numbers of steps, ``runs.num_steps`` and larger ones among them. The last ones' time
        bounds what can be seen: take at least four times ``runs.num_steps``.
    :param runs: runs in the prior as in training, :class:`~pyro_shortrun.energy.PriorRuns`; 40 steps of 0.1 by default.
        Step sizes of single steps go on with the last.
    :param num_samples: runs of every row; at least 4.
    :raises ValueError: where the model has no ``energy_prior``, or an argument is out of range.

    >>> import pyro, pyro.distributions as dist
    >>> from pyro_shortrun import energy_prior
    >>> from pyro_shortrun.energy import PriorRuns
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         energy_prior("ebm", lambda z: 4 * z.square(), z)
    ...         pyro.sample("x", dist.Normal(z, 0.1), obs=x)
    >>> run_length(model, torch.zeros(50), num_steps=(4, 16, 64), runs=PriorRuns(4, step_size=0.01)).too_short
    True
    """
    runs = PriorRuns.of(runs)
    trained = runs.num_steps
    lengths = _lengths(num_steps, trained, num_samples)
    with ordinary_autograd(), torch.no_grad(), poutine.block():
        call = bound_prior(model, args, kwargs)
        state, eta = runs.begin(call, num_samples)
        eta = torch.cat([eta, eta[-1:].expand(max(lengths[-1] - trained, 0), -1)])
        frozen, stages, done = torch.zeros_like(state[..., 0], dtype=torch.bool), [], 0
        for steps in lengths:
            part = runs.go_on(call, state, eta[done:steps])
            state, done, frozen = part.end, steps, frozen | part.info.frozen
            stages.append(_Stage.of(call, state, frozen))
    return _summarised(lengths, trained, stages)


@dataclass(frozen=True)
class _Stage:
    """Runs at one number of steps: states ``(runs, rows, size)``, energies and virial ``(runs,)``, stopped rows."""

    state: Tensor
    energy: dict[str, Tensor]
    virial: Tensor
    frozen: Tensor

    @classmethod
    def of(cls, call: Call, state: Tensor, frozen: Tensor) -> _Stage:
        density, grad = call.density.value_and_grad(state)
        # Rows of a subsampled plate count for several; what a mask takes out has no gradient and no virial.
        weight, counted = call.density.layout.row_weight, (grad != 0).any(0).sum().clamp(min=1)
        energy = {**mean_energies(call, state), "-log density": -density.mean(-1) / weight}
        return cls(state, energy, -(state * grad).sum((-2, -1)) / (weight * counted), frozen)


def _lengths(num_steps: Sequence[int], trained: int, num_samples: int) -> tuple[int, ...]:
    check_count("num_samples", num_samples, least=4)  # for standard errors
    check_counts("num_steps", num_steps)
    lengths = tuple(num_steps)
    if len(lengths) < 2 or lengths != tuple(sorted(set(lengths))):
        raise ValueError(f"num_steps must be two or more increasing numbers of steps, got {lengths}.")
    if trained not in lengths[:-1]:
        raise ValueError(f"num_steps must hold runs.num_steps={trained} and a larger number, got {lengths}.")
    return lengths


def _summarised(lengths: tuple[int, ...], trained: int, stages: list[_Stage]) -> RunLength:
    by_name = {k: torch.stack([s.energy[k] for s in stages]) for k in stages[0].energy}  # (lengths, runs)
    first, last = lengths.index(trained), stages[-1]
    time = torch.tensor(lengths[first:], dtype=torch.float64).log2()
    time = ((time - time.mean()) / (time - time.mean()).square().sum()).to(last.state)
    change = moments({k: v[-1] - v[first] for k, v in by_name.items()}, {})
    trend = moments({k: time @ v[first:] for k, v in by_name.items()}, {})
    mmd = torch.tensor([_discrepancy(s.state, last.state) for s in stages])
    virial, root = torch.stack([s.virial for s in stages]), math.sqrt(len(last.state))
    return RunLength(
        lengths,
        trained,
        {k: v.mean(1) for k, v in by_name.items()},
        {k: v.std(1) / root for k, v in by_name.items()},
        mmd[:, 0],
        mmd[:, 1],
        torch.stack([s.frozen.sum() for s in stages]),
        last.frozen.double().mean().item(),
        virial.mean(1),
        virial.std(1) / root,
        _memory(stages[first].state, last.state),
        *({k: v[i] for k, v in pairs.items()} for pairs in (change, trend) for i in (0, 1)),
    )


def _memory(before: Tensor, after: Tensor) -> float:
    """The largest correlation over coordinates, within rows; NaN where nothing varies."""
    x, y = (u - u.mean(0) for u in (before, after))
    covariance, scales = (x * y).sum((0, 1)), (x.square().sum((0, 1)) * y.square().sum((0, 1))).sqrt()
    return (covariance / scales).nan_to_num(-math.inf).max().item()


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
