"""Importance-sampled likelihoods against closed forms."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import gamma_poisson
from torch import Tensor

from pyro_shortrun import Prior, ShortRunGuide, energy_prior
from pyro_shortrun.evaluation import frechet_distance, importance_log_likelihood, squared_mmd

WEIGHT = [[1.0, 0.5], [-0.3, 2.0], [0.7, 0.1]]


def model(x: Tensor) -> None:
    weight = torch.tensor(WEIGHT)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ weight.T, 0.7).to_event(1), obs=x)


def evidence(x: Tensor) -> Tensor:
    weight = torch.tensor(WEIGHT)
    cov = weight @ weight.T + 0.49 * torch.eye(3)
    return dist.MultivariateNormal(torch.zeros(3), cov).log_prob(x)


@pytest.mark.parametrize("source", ["short run", "prior"])
def test_linear_gaussian_evidence(source):
    """Within 5 reported standard errors of the closed form, wherever the draws come from; seeded."""
    x = torch.randn(6, 3)
    if source == "prior":
        draws = {"z": torch.randn(50, 6, 2)}
    else:
        guide = ShortRunGuide(model, num_steps=10, step_size=0.05, start=Prior())
        draws = {k: v[0] for k, v in guide.sample_posterior(x, num_samples=50).items()}
    out = importance_log_likelihood(model, draws, x, num_samples=2000)
    assert out.value.shape == out.error.shape == out.ess.shape == (6,)
    assert ((out.value - evidence(x)).abs() < 5 * out.error).all()
    assert out.error.max() < 0.1
    assert out.mean == pytest.approx(evidence(x).mean().item(), abs=5 * out.mean_error)


def test_constrained_latents():
    """Gamma-Poisson: the evidence is negative binomial."""
    counts = torch.tensor([0.0, 3.0, 11.0])

    draws = {"rate": dist.Gamma(2.0, 0.5).sample((200, 3))}
    out = importance_log_likelihood(gamma_poisson, draws, counts, num_samples=4000)
    exact = dist.GammaPoisson(torch.tensor(2.0), torch.tensor(0.5)).log_prob(counts)
    assert ((out.value - exact).abs() < 5 * out.error).all()


def test_missing_site_is_named():
    with pytest.raises(ValueError, match="z"):
        importance_log_likelihood(model, {"w": torch.zeros(5, 6, 2)}, torch.randn(6, 3))


def test_frechet_distance_of_commuting_gaussians():
    """Diagonal covariances: the sum of squared differences of means and of standard deviations; and no distance."""
    sphere = 3**0.5 * torch.cat([torch.eye(3), -torch.eye(3)])  # mean 0, covariance (n - 1) / n * I below
    scale = torch.tensor([0.5, 1.0, 3.0])
    expected = (6 / 5) * (scale - 1).square().sum() + 0.25 * 3
    assert frechet_distance(sphere, scale * sphere + 0.5) == pytest.approx(expected.item())
    rotated = torch.linalg.qr(torch.randn(3, 3))[0]
    moved = frechet_distance(sphere @ rotated, (scale * sphere + 0.5) @ rotated)
    assert moved == pytest.approx(expected.item())
    assert frechet_distance(sphere, sphere) == pytest.approx(0.0, abs=1e-12)


def test_squared_mmd():
    """By hand for two points each; of one law about zero, 5 standard deviations of about 0.001."""
    a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [2.0]])
    k = [math.exp(-(d**2) / 2) for d in (0.0, 1.0, 2.0)]
    expected = k[1] + k[2] - 2 * (k[0] + k[2] + k[1] + k[1]) / 4
    assert squared_mmd(a, b, width=1.0) == pytest.approx(expected)
    assert abs(squared_mmd(torch.randn(1000, 2), torch.randn(1000, 2))) < 5e-3
    assert squared_mmd(torch.randn(1000, 2) + 1, torch.randn(1000, 2)) > 0.05


def test_squared_mmd_far_from_zero():
    """Distances are small against the points, in float32; a width of zero is refused."""
    a, b = (torch.randn(100, 2).float().mul(64).round() / 64 for _ in range(2))  # so that the shift is exact
    assert squared_mmd(a + 10_000, b + 10_000) == pytest.approx(squared_mmd(a, b), abs=1e-9)
    with pytest.raises(ValueError, match="width"):
        squared_mmd(a, torch.zeros(50, 2))
    with pytest.raises(ValueError, match="width"):
        squared_mmd(a, b, width=0.0)


@pytest.mark.parametrize("measure", [frechet_distance, squared_mmd])
def test_samples_that_cannot_be_compared(measure):
    with pytest.raises(ValueError, match="a and b must be samples"):
        measure(torch.zeros(5, 2), torch.zeros(5, 3))
    with pytest.raises(ValueError, match="not finite"):
        measure(torch.full((5, 2), torch.nan), torch.zeros(5, 2))


def test_energy_priors_are_refused():
    """Their log Z would be left out."""

    def tilted(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            energy_prior("ebm", lambda z: z.square(), z)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="use ais"):
        importance_log_likelihood(tilted, {"z": torch.zeros(5, 3)}, torch.zeros(3))
