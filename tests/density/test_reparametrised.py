"""Reparametrised latents whose own support has no transform: run as with Pyro's kernels, without a word."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_median, init_to_uniform
from pyro.infer.reparam import LatentStableReparam, ProjectedNormalReparam

from pyro_shortrun import (
    Annealed,
    Init,
    Persistent,
    Prior,
    SemiImplicitGuide,
    ShortRunGuide,
    ShortRunLangevin,
    StepSize,
)


def sphere() -> None:
    y = pyro.sample("y", dist.ProjectedNormal(torch.zeros(3)))
    pyro.sample("o", dist.Normal(y, 1.0).to_event(1), obs=torch.tensor([1.0, 0.0, 0.0]))


def stable() -> None:
    z = pyro.sample("z", dist.Stable(1.5, 0.0))
    pyro.sample("o", dist.Normal(z, 1.0), obs=torch.tensor(1.0))


MODELS = {
    "sphere": poutine.reparam(sphere, {"y": ProjectedNormalReparam()}),
    "stable": poutine.reparam(stable, {"z": LatentStableReparam()}),
}
WAYS: dict[str, Callable[[Callable], ShortRunGuide | SemiImplicitGuide]] = {
    "prior": lambda m: ShortRunGuide(m, num_steps=2, step_size=StepSize(0.01), start=Prior()),
    "AutoNormal": lambda m: ShortRunGuide(
        m, num_steps=2, step_size=StepSize(0.01), start=AutoNormal(m), objective=Annealed()
    ),
    "uniform": lambda m: ShortRunGuide(m, num_steps=2, step_size=StepSize(0.01), start=Init(init_to_uniform)),
    "median": lambda m: ShortRunGuide(m, num_steps=2, step_size=StepSize(0.01), start=Init(init_to_median)),
    "persistent": lambda m: ShortRunGuide(m, num_steps=2, step_size=StepSize(0.01), start=Persistent()),
    "semi-implicit": lambda m: SemiImplicitGuide(m, num_mixtures=2),
}


@pytest.fixture(autouse=True)
def silence() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*does not commute.*")
        yield


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_guides(name, way):
    model = MODELS[name]
    assert math.isfinite(Trace_ELBO().loss_and_grads(model, WAYS[way](model)))


@pytest.mark.parametrize("name", MODELS)
def test_kernels(name):
    kernel = ShortRunLangevin(MODELS[name], 2, adjust=True)
    mcmc = MCMC(kernel, num_samples=3, warmup_steps=3, disable_progbar=True)
    mcmc.run()


def test_posterior_on_the_sphere():
    """Uniform prior and exp(y_1): E y_1 = coth 1 - 1 (von Mises, Fisher)."""
    kernel = ShortRunLangevin(MODELS["sphere"], 5, adjust=True)
    mcmc = MCMC(kernel, num_samples=600, warmup_steps=60, disable_progbar=True)
    mcmc.run()
    y = torch.nn.functional.normalize(mcmc.get_samples()["y_normal"], dim=-1)
    assert y.mean(0).tolist() == pytest.approx([1 / math.tanh(1) - 1, 0.0, 0.0], abs=0.12)
