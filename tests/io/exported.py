"""Models to export, and what reads an export of either version of ArviZ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from programs import NOISE, frozen, located_at
from pyro.infer import MCMC
from torch import Tensor

from pyro_shortrun import Prior, ShortRunGuide, ShortRunLangevin, StepSize, VectorizedMCMC, to_arviz

KERNEL_STATS = {"lp", "acceptance_rate", "grad_norm", "step_size", "nonfinite", "diverging"}


GUIDE_STATS = {"log_p", "log_q", "lp", "nonfinite", "diverging"}


GROUPS = {
    "posterior",
    "sample_stats",
    "log_likelihood",
    "posterior_predictive",
    "prior",
    "prior_predictive",
    "observed_data",
}


def local(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


def evidence(x: Tensor) -> float:
    cov = NOISE**2 * torch.eye(len(x)) + 1.0
    return dist.MultivariateNormal(torch.zeros(len(x)), cov).log_prob(x).item()


def around_posterior(width: float) -> Callable:
    def start(x: Tensor) -> None:
        mean, deviation = located_at(x)
        pyro.sample("loc", dist.Normal(mean, width * deviation))

    return start


def still(target: Callable, start: Callable, **options: Any) -> ShortRunGuide:
    """A guide that stays where it starts."""
    return ShortRunGuide(target, num_steps=1, dynamics=frozen(), start=start, **options)


def short(target: Callable, **options: Any) -> ShortRunGuide:
    return ShortRunGuide(
        target, num_steps=2, step_size=StepSize(1e-3, learnable=False), **{"start": Prior(), **options}
    )


def export(target: Callable, *args: Any, create_plates: Callable | None = None, **options: Any) -> Any:
    options = {"num_samples": 3, "num_chains": 2, "num_prior": 4, **options}
    return to_arviz(short(target, create_plates=create_plates), *args, **options)


def groups(exported: Any) -> set[str]:
    return set(exported.children) if hasattr(exported, "children") else set(exported.groups())


def get(exported: Any, group: str, name: str) -> Tensor:
    return torch.tensor(exported[group][name].values)


def dims(exported: Any, group: str, name: str) -> tuple[str, ...]:
    """Those after (chain, draw)."""
    names = exported[group][name].dims
    if group != "observed_data":
        assert names[:2] == ("chain", "draw")
        names = names[2:]
    return names


def coord(exported: Any, group: str, name: str, dim: str) -> list:
    return exported[group][name].coords[dim].values.tolist()


def equal(a: Mapping[str, Tensor], exported: Any, group: str = "posterior") -> None:
    assert set(a) == set(exported[group].data_vars)
    for name, value in a.items():
        torch.testing.assert_close(get(exported, group, name).cpu(), value.cpu(), rtol=0, atol=0)


def log_weights(exported: Any) -> Tensor:
    return get(exported, "sample_stats", "log_p") - get(exported, "sample_stats", "log_q")


def run_mcmc(kernel: Any, *args: Any, **options: Any) -> MCMC:
    mcmc = MCMC(kernel, num_samples=6, warmup_steps=4, disable_progbar=True, **options)
    mcmc.run(*args)
    return mcmc


def run_vectorized(kernel: ShortRunLangevin, *args: Any, **options: Any) -> VectorizedMCMC:
    mcmc = VectorizedMCMC(kernel, num_samples=6, warmup_steps=4, num_chains=3, disable_progbar=True, **options)
    mcmc.run(*args)
    return mcmc
