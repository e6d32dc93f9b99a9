"""Quality of a guide's draws against the length of its runs and their step size."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import check_count, check_counts
from ..guides.short_run import ShortRunGuide
from ..guides.tuning import Trial, Trials

_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
_MOST_INVALID = 0.05


@dataclass(frozen=True)
class StepSweep:
    """What :func:`step_sweep` found; arrays are ``(num_steps, factors)``, totals over rows, in nats.

    ``log_joint`` is the mean of ``log p(x, z_K)`` and ``log_joint_error`` its standard error over runs; ``bound`` is
    the guide's objective ``E[log p(x, z_K) - log q(z_K)]`` with its ``bound_error``, and ``log_likelihood`` the
    importance estimate ``log mean exp`` of the same weights, row by row (both NaN for a start without density,
    ``log_likelihood`` also where weights are not those of an importance sampler). ``displacement`` is the mean
    ``|u_K - u_0|`` of a row, ``nonfinite`` and ``singular`` are shares of rows, as in :class:`RunInfo`, and ``seconds``
    is the time of all the runs of a cell.
    """

    num_steps: tuple[int, ...]
    factors: tuple[float, ...]
    step_size: Tensor
    log_joint: Tensor
    log_joint_error: Tensor
    bound: Tensor
    bound_error: Tensor
    log_likelihood: Tensor
    displacement: Tensor
    nonfinite: Tensor
    singular: Tensor
    seconds: Tensor

    @property
    def _score(self) -> Tensor:
        return self.log_joint if self.bound.isnan().all() else self.bound

    @property
    def best(self) -> tuple[int, float] | None:
        """Number of steps and factor of the largest bound (log joint where there is none) among cells with at most 5 %
        of their rows frozen or with a singular step; None where there is no such cell."""
        valid = (self.nonfinite + self.singular <= _MOST_INVALID) & self._score.isfinite()
        if not valid.any():
            return None
        index = int(torch.where(valid, self._score, -math.inf).argmax())
        row, column = divmod(index, len(self.factors))
        return self.num_steps[row], self.factors[column]

    def summary(self) -> str:
        """A table, one line per cell."""
        heads = f"{'K':>5}{'factor':>8}{'step size':>11}{'log joint':>20}{'bound':>20}{'log p(x)':>11}"
        lines = [heads + f"{'moved':>9}{'nonfinite':>11}{'singular':>10}{'seconds':>9}"]
        for i, steps in enumerate(self.num_steps):
            for j, factor in enumerate(self.factors):
                cell = {k: getattr(self, k)[i, j].item() for k in _FIELDS}
                joint = f"{cell['log_joint']:.2f} +- {cell['log_joint_error']:.2f}"
                bound = f"{cell['bound']:.2f} +- {cell['bound_error']:.2f}"
                lines.append(
                    f"{steps:>5}{factor:>8g}{self.step_size[j].item():>11.3g}{joint:>20}{bound:>20}"
                    f"{cell['log_likelihood']:>11.2f}{cell['displacement']:>9.3g}{cell['nonfinite']:>11.1%}"
                    f"{cell['singular']:>10.1%}{cell['seconds']:>9.2f}"
                )
        name = "log joint" if self.bound.isnan().all() else "bound"
        none = f"every cell has more than {_MOST_INVALID:.0%} of its rows invalid: try smaller factors."
        best = self.best
        return "\n".join([*lines, f"largest {name}: K = {best[0]}, factor {best[1]:g}" if best else none])

    def plot(self, axes: Any = None) -> Any:
        """Log joint and bound against the step size, a line for each number of steps.

        :param axes: two axes; made where None.
        :return: the axes.
        """
        import matplotlib.pyplot as plt

        if axes is None:
            _, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
        found = (self.log_joint, self.log_joint_error, "log joint"), (self.bound, self.bound_error, "bound")
        for ax, (value, error, name) in zip(axes, found, strict=True):
            for i, steps in enumerate(self.num_steps):
                ax.errorbar(self.step_size.tolist(), value[i].tolist(), error[i].tolist(), label=f"K = {steps}")
            ax.set(xscale="log", xlabel="step size", ylabel=f"{name}, nats")
        axes[0].legend(fontsize=8)
        return axes


_FIELDS = "log_joint log_joint_error bound bound_error log_likelihood displacement nonfinite singular seconds".split()


@torch.no_grad()
def step_sweep(
    guide: ShortRunGuide,
    *args: Any,
    num_steps: Sequence[int] | None = None,
    factors: Sequence[float] = _FACTORS,
    num_samples: int = 64,
    **kwargs: Any,
) -> StepSweep:
    r"""Quality of a guide's draws at other numbers of steps and step sizes than it was trained with.

    For every pair ``(K, factor)`` it makes ``num_samples`` runs of ``K`` steps, the guide's step sizes multiplied by
    ``factor``, on the data given, with the same start and noise for all factors (common random numbers). Guide and
    model stay as they are. Where quality still rises at the trained K, the run was too short; where it rises with the
    step, the step is too small.

    The log joint alone does not tell: it is largest at the mode. The bound with noise, under :class:`PathDensity`,
    prefers steps that are too small, and longer runs loosen it.

    >>> import pyro, pyro.distributions as dist
    >>> from pyro_shortrun import Prior
    >>> def model(x):
    ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    ...     pyro.sample("x", dist.Normal(loc, 0.5), obs=x)
    >>> guide = ShortRunGuide(model, num_steps=8, step_size=0.01, start=Prior())
    >>> step_sweep(guide, torch.tensor(1.0), num_steps=(4, 8, 16), factors=(1.0, 2.0)).bound.shape
    torch.Size([3, 2])

    :param guide: trained, or not even set up.
    :param args: the model's arguments, as ``kwargs``: preferably data that was not trained on.
    :param num_steps: numbers of steps; by default a quarter, half, once, twice and four times the guide's. Step sizes
        of single steps, and the temperatures of :class:`Annealed`, are stretched over the run.
    :param factors: of the step sizes, > 0; step sizes above ``StepSize.max`` are tried too.
    :param num_samples: runs for each cell, at once; at least 2.
    :raises ValueError: where an argument is out of range.
    """
    check_count("num_samples", num_samples, least=2)  # for standard errors
    if not factors or not all(isinstance(f, (int, float)) and 0 < f < math.inf for f in factors):
        raise ValueError(f"factors must be a sequence of numbers > 0, got {factors!r}.")
    trials = Trials(guide, args, kwargs, num_samples)
    lengths = _lengths(guide, num_steps)
    trials(factors[0], lengths[0])  # what is found out once, and compiled, is not timed
    cells = [[_cell(guide, trials, factor, steps) for factor in factors] for steps in lengths]
    arrays = {k: torch.tensor([[cell[k] for cell in row] for row in cells]) for k in _FIELDS}
    own = guide.dynamics.step_size.value.detach().mean()
    return StepSweep(lengths, tuple(factors), torch.tensor(factors, device=own.device) * own, **arrays)


def _lengths(guide: ShortRunGuide, num_steps: Sequence[int] | None) -> tuple[int, ...]:
    own = guide.num_steps
    if num_steps is None:
        usual = dict.fromkeys(max(1, k) for k in (own // 4, own // 2, own, 2 * own, 4 * own))
        return tuple(usual)
    check_counts("num_steps", num_steps)
    if not num_steps:
        raise ValueError("num_steps must be a sequence of integers >= 1, got none.")
    return tuple(num_steps)


def _cell(guide: ShortRunGuide, trials: Trials, factor: float, num_steps: int) -> dict[str, float]:
    began = time.perf_counter()
    trial = trials(factor, num_steps)
    joint = trial.log_joint()
    seconds = time.perf_counter() - began
    moved = (trial.run.end - trial.run.start).norm(dim=-1).mean()
    info = trial.run.info
    cell = {"displacement": moved, "nonfinite": info.frozen.double().mean(), "singular": info.singular.double().mean()}
    cell |= _bound(guide, trial) | _mean("log_joint", joint)
    return {"seconds": seconds, **{k: float(v) for k, v in cell.items()}}


def _bound(guide: ShortRunGuide, trial: Trial) -> dict[str, Tensor]:
    nan = torch.tensor(math.nan)
    if not guide.has_density:
        return {"bound": nan, "bound_error": nan, "log_likelihood": nan}
    rows = trial.log_weights()
    likelihood = (rows.logsumexp(0) - math.log(len(rows))).sum() * trial.weight
    return _mean("bound", trial.log_weight()) | {"log_likelihood": likelihood if guide.objective.weighs else nan}


def _mean(name: str, values: Tensor) -> dict[str, Tensor]:
    return {name: values.mean(), f"{name}_error": values.std() / math.sqrt(len(values))}
