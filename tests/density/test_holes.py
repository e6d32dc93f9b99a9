"""Data with holes: Pyro's numbers, and every way of running chains."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_shortrun import Prior, ShortRunGuide, ShortRunLangevin, StepSize, VectorizedMCMC
from pyro_shortrun.density.holes import traceable

NAN = math.nan
ROWS = [[0.1, 0.2, 3.4], [0.5, 0.1, NAN], [NAN, NAN, 0.3], [NAN, NAN, NAN]]


def vector() -> dist.Distribution:
    cov = torch.tensor([[2.0, 0.3, 0.1], [0.3, 1.0, -0.4], [0.1, -0.4, 0.7]])
    return dist.NanMaskedMultivariateNormal(torch.tensor([0.3, -0.2, 0.1]), cov)


FNS = {
    "elements": lambda: dist.NanMaskedNormal(torch.tensor([0.3, -0.2, 0.1]), torch.tensor([0.5, 1.0, 2.0])),
    "events": lambda: dist.NanMaskedNormal(0.3 * torch.ones(3), 0.7).to_event(1),
    "masked": lambda: dist.NanMaskedNormal(0.3 * torch.ones(4, 3), 0.7).mask(torch.arange(3) < 2),
    "vectors": vector,
    "expanded": lambda: vector().expand([4]),
}


@pytest.mark.parametrize("name", FNS)
def test_numbers_are_pyros(name):
    y = torch.tensor(ROWS)
    fn = FNS[name]()
    own = traceable(fn)
    torch.testing.assert_close(own.log_prob(y), fn.log_prob(y))
    moved = torch.stack([y, 2 * y])
    torch.testing.assert_close(torch.func.vmap(own.log_prob)(moved), torch.stack([fn.log_prob(v) for v in moved]))
    assert type(fn).__module__.startswith("pyro.distributions")  # a user's object stays as it is


@pytest.mark.parametrize("make", [lambda m: dist.NanMaskedNormal(m, 1.0), lambda m: vectors(m)])
def test_gradients_are_pyros_and_finite(make):
    grads = []
    for own in (False, True):
        m = torch.tensor(0.4, requires_grad=True)
        fn = traceable(make(m)) if own else make(m)
        grads.append(torch.autograd.grad(fn.log_prob(torch.tensor(ROWS)).sum(), m)[0])
    assert grads[0].isfinite()
    torch.testing.assert_close(*grads)


def vectors(m: Tensor) -> dist.Distribution:
    return dist.NanMaskedMultivariateNormal(m * torch.ones(3), torch.eye(3) + 0.2)


def test_distributions_without_holes_are_passed_on():
    for fn in (dist.Normal(0.0, 1.0), dist.Normal(torch.zeros(2), 1.0).to_event(1)):
        assert traceable(fn) is fn


def holes(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.NanMaskedNormal(mu, 1.0), obs=y)


def test_chains_and_runs_of_data_with_holes():
    """Two observations of 1 and 2: N(1, 1 / 3)."""
    y = torch.tensor([1.0, NAN, 2.0])
    kernel = ShortRunLangevin(holes, 5, adjust=True)
    mcmc = VectorizedMCMC(kernel, 40, 40, num_chains=32, disable_progbar=True)
    mcmc.run(y)
    draws = mcmc.get_samples()["mu"]
    assert draws.mean().item() == pytest.approx(1.0, abs=0.08)
    assert draws.std().item() == pytest.approx(math.sqrt(1 / 3), rel=0.1)
    guide = ShortRunGuide(holes, num_steps=30, step_size=StepSize(0.1), start=Prior())
    runs = guide.sample_posterior(y, num_samples=2000)["mu"]
    assert runs.mean().item() == pytest.approx(1.0, abs=0.08)
