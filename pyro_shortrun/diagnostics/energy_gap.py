"""Has an energy prior converged: the two phases of maximum likelihood, compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ..checks import check_count
from ..density.call import Call
from ..density.program import Reading
from ..density.sites import masked
from ..energy.prior import TiltedPrior
from ..energy.runs import PriorRuns
from ..energy.statement import energies
from ..tensors import ordinary_autograd, plain
from .sources import draws_of, independent_draws

ERRORS = 4.0  # standard errors that a difference must have to count


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
        """Posterior minus prior: minus ``EnergyInfo.gap``, which is of ``f = -E``."""
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
                "is zero within its error" if abs(gap) <= ERRORS * error else "is not zero: not at maximum likelihood"
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
    model: Callable[..., Any],
    guide: Any,
    *args: Any,
    num_samples: int = 64,
    runs: PriorRuns | None = None,
    **kwargs: Any,
) -> EnergyGap:
    r"""The two phases of maximum likelihood, compared: for each :func:`~pyro_shortrun.energy_prior` site,

    .. math:: E_{p(x)}\, E_{q(z \mid x)}[E(z)] - E_{p_K(z)}[E(z)] ,

    where :math:`p_K` is the law of the ends of K-step runs in the prior. For an energy with a free scale the gradient
    of the likelihood in that scale is minus this gap, so that it is near zero where training has converged, and large
    where the energy runs away. Zero does not say that the runs are long enough (see :func:`run_length`).

    The standard errors are over draws (of chains, by their effective sample size), for these data: data that were not
    trained on add the spread of the data.

    :param model: a Pyro model with ``energy_prior`` statements.
    :param guide: a guide that samples the energies' latents, a finished sampler, or draws, as for
        :func:`~pyro_shortrun.diagnostics.reference.compare_with_nuts`.
    :param args: the model's arguments, as ``kwargs``.
    :param num_samples: draws of each phase; at least 4.
    :param runs: runs in the prior, those of :class:`~pyro_shortrun.EnergyELBO`:
        :class:`~pyro_shortrun.energy.PriorRuns`, 40 steps of 0.1 by default.
    :raises ValueError: where the model has no ``energy_prior``, or an argument is out of range.

    >>> import pyro, pyro.distributions as dist
    >>> from pyro_shortrun import energy_prior
    >>> from pyro_shortrun.energy import PriorRuns
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         energy_prior("ebm", lambda z: z.square(), z)
    ...         pyro.sample("x", dist.Normal(z, 0.1), obs=x)
    >>> found = energy_gap(model, {"z": torch.zeros(1, 4, 3)}, torch.zeros(3), runs=PriorRuns(num_steps=5))
    >>> found.posterior["ebm"], found.gap["ebm"] < 0
    (0.0, True)
    """
    check_count("num_samples", num_samples)
    if num_samples < 4:
        raise ValueError("num_samples must be at least 4, for standard errors.")
    runs = PriorRuns.of(runs)
    with ordinary_autograd(), torch.no_grad(), poutine.block():
        call = bound_prior(model, args, kwargs)
        density = call.model
        sites = {s.name: s.shape for s in density.layout.sites}
        drawn = draws_of(guide, args, kwargs, num_samples, 1, sites)
        chains, count = next(iter(drawn.values())).shape[:2]
        flat = {k: v.flatten(0, 1) for k, v in drawn.items()}
        positive = torch.stack([density.unconstrain({k: v[i] for k, v in flat.items()}) for i in range(chains * count)])
        done = runs.make(call, num_samples)
        phases = [mean_energies(call, u) for u in (positive, done.end)]
    chained = {k: v.unflatten(0, (chains, count)) for k, v in phases[0].items()}
    independent = {k: float(independent_draws(v).clamp(max=chains * count)) for k, v in chained.items()}
    found = [moments(phases[0], independent), moments(phases[1], {})]
    means, errors = ([{k: v[i] for k, v in phase.items()} for phase in found] for i in (0, 1))
    return EnergyGap(means[0], errors[0], means[1], errors[1], done.info.nonfinite)


def bound_prior(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """The tilted prior of a model, which must have one."""
    call = TiltedPrior(model).bind(plain(args), plain(kwargs))
    if call is None:
        raise ValueError(
            "the model has no energy_prior(...) statement: there must be one for its prior to be looked at."
        )
    return call


def mean_energies(call: Call, u: Tensor) -> dict[str, Tensor]:
    """Mean energies of the elements of every site, by chain of ``u``."""

    def take(reading: Reading) -> tuple[Tensor, ...]:
        found = [(-s["fn"].log_factor, s["mask"]) for s in energies(reading).values()]
        return tuple(masked(e, m).sum() / masked(torch.ones_like(e), m).sum() for e, m in found)

    return dict(zip(energies(call.reading), call.model.over(u, take), strict=True))


def moments(values: Mapping[str, Tensor], independent: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Mean and standard error over draws, which are worth ``independent`` ones: all, where it has no number."""
    return {k: (v.mean().item(), v.std().item() / math.sqrt(independent.get(k, len(v)))) for k, v in values.items()}
