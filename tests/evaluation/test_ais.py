"""Intervals of annealed importance sampling against closed forms."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_shortrun import ais, energy_prior


def tilted(x: Tensor, c: float = 1.5, noise: float = 0.5) -> None:
    """z ~ N(0, 1 / (1 + c)), x = z + noise * eps."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        energy_prior("ebm", lambda z: c * z.square().sum(-1) / 2, z)
        pyro.sample("x", dist.Normal(z, noise).to_event(1), obs=x)


def test_quadratic_energy_and_evidence_are_in_their_intervals():
    """log Z = -log(1 + c) for two coordinates; p(x) = N(0, 1 / (1 + c) + noise^2). Seeded; 5 errors of 0.03."""
    x = torch.tensor([[0.0, 0.0], [1.0, -0.5], [2.0, 1.0]])
    found = ais(tilted, x, num_chains=200, num_temperatures=200)
    log_z = torch.full((3,), -math.log(2.5))
    evidence = dist.Normal(0.0, math.sqrt(1 / 2.5 + 0.25)).log_prob(x).sum(-1)
    for lower, upper, exact in (
        (found.log_z.lower, found.log_z.upper, log_z),
        (found.lower, found.upper, evidence),
    ):
        assert (lower < exact + 0.15).all() and (upper > exact - 0.15).all()
        assert (upper - lower).abs().max() < 0.2
    assert (found.ess > 100).all() and (found.ess <= 200).all()


def test_compiled_paths_equal_eager_ones():
    x, found = torch.tensor([[0.0, 0.0], [1.0, -0.5]]), []
    for compile in (False, True):
        pyro.set_rng_seed(1)
        found.append(ais(tilted, x, num_chains=10, num_temperatures=10, compile=compile))
    torch.testing.assert_close(found[0].lower, found[1].lower)
    torch.testing.assert_close(found[0].upper, found[1].upper)


def test_few_temperatures_are_below_and_above():
    """Averages over 300 rows of the same problem: the lower end is too low, the upper end too high."""
    x = torch.full((300, 2), 1.5)
    found = ais(tilted, x, num_chains=4, num_temperatures=3, long_run=60)
    exact = dist.Normal(0.0, math.sqrt(1 / 2.5 + 0.25)).log_prob(torch.tensor([1.5, 1.5])).sum()
    assert found.lower.mean() < exact < found.upper.mean()
    assert found.upper.mean() - found.lower.mean() > 0.1
    assert found.joint.lower.exp().mean() == pytest.approx((exact - math.log(2.5)).exp().item(), rel=0.1)  # unbiased


def test_draws_without_a_density_have_no_weight():
    """x ~ N(sqrt z, 1/2), z ~ N(0, 1): half of the prior's draws are NaN to the model. Seeded; error 0.1."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z.sqrt(), 0.5, validate_args=False), obs=x)

    x = torch.tensor([0.5, 1.5])
    z = torch.linspace(1e-6, 8, 20_001)
    joint = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z.sqrt(), 0.5).log_prob(x.unsqueeze(1))
    exact = torch.trapezoid(joint.exp(), z).log()
    found = ais(model, x, num_chains=200, num_temperatures=100)
    assert (found.lower - exact).abs().max() < 0.4 and found.upper.isfinite().all()


def test_constrained_global_latents():
    """Gamma-Poisson without energies: the evidence is a product of conditionals."""
    counts = torch.tensor([2.0, 3.0, 5.0])

    def model(x: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Poisson(rate), obs=x)

    found = ais(model, counts, num_chains=500, num_temperatures=100)
    n, total = len(counts), counts.sum()
    exact = torch.lgamma(2 + total) - (2 + total) * math.log(0.5 + n) + 2 * math.log(0.5)
    exact = exact - torch.lgamma(counts + 1).sum()
    assert found.lower.shape == (1,) and found.log_z is None
    assert found.lower.item() == pytest.approx(exact.item(), abs=0.05)
    assert found.upper.item() == pytest.approx(exact.item(), abs=0.05)


def test_positive_support():
    """Gamma(2, 1.5) with energy 0.7 z is Gamma(2, 2.2) up to Z = (1.5 / 2.2)^2. Seeded; 5 errors of 0.03."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0), 1.5))
            energy_prior("ebm", lambda z: 0.7 * z, rate)
            pyro.sample("x", dist.Poisson(rate), obs=x)

    x = torch.tensor([0.0, 3.0])
    found = ais(model, x, num_chains=200, num_temperatures=100)
    log_z = torch.full((2,), 2 * math.log(1.5 / 2.2))
    evidence = dist.GammaPoisson(2.0, 2.2).log_prob(x)
    for interval, exact in ((found.log_z, log_z), (found, evidence)):
        torch.testing.assert_close(interval.lower, exact, rtol=0.0, atol=0.15)
        torch.testing.assert_close(interval.upper, exact, rtol=0.0, atol=0.15)


def test_simplex():
    """Dirichlet(a) with energy -sum c log z is Dirichlet(a + c) up to Z = B(a + c) / B(a)."""
    a, c = torch.tensor([1.5, 2.0, 3.0]), torch.tensor([1.0, 0.0, 0.5])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            p = pyro.sample("p", dist.Dirichlet(a))
            energy_prior("ebm", lambda z: -(c * z.log()).sum(-1), p)
            pyro.sample("x", dist.Categorical(p), obs=x)

    def log_beta(a: Tensor) -> Tensor:
        return torch.lgamma(a).sum() - torch.lgamma(a.sum())

    x = torch.tensor([0, 2])
    found = ais(model, x, num_chains=200, num_temperatures=100)
    for interval, exact in ((found.log_z, log_beta(a + c) - log_beta(a)), (found, ((a + c) / (a + c).sum()).log()[x])):
        torch.testing.assert_close(interval.lower, exact.expand(2), rtol=0.0, atol=0.15)
        torch.testing.assert_close(interval.upper, exact.expand(2), rtol=0.0, atol=0.15)


def test_refusals():
    with pytest.raises(ValueError, match="num_chains must be an integer >= 2"):
        ais(tilted, torch.zeros(3, 2), num_chains=1)
    with pytest.raises(ValueError, match="num_temperatures"):
        ais(tilted, torch.zeros(3, 2), num_temperatures=0)

    def thinned(x: Tensor) -> None:
        with pyro.plate("data", 6, subsample_size=2):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x[:2])

    with pytest.raises(ValueError, match=r"\['z'\] lie in a subsampled plate"):
        ais(thinned, torch.zeros(6))

    def narrow(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.factor("hit", torch.where((x - z).abs() < 3, 0.0, -torch.inf))

    with pytest.raises(ValueError, match=r"draws from the prior for row 1 \(1 of 2 rows\)"):
        ais(narrow, torch.tensor([0.0, 50.0]), num_chains=4, num_temperatures=3)
