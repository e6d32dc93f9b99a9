"""Importance-sampled likelihoods against closed forms."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_shortrun import ShortRunGuide, energy_prior
from pyro_shortrun.evaluation import importance_log_likelihood

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
        guide = ShortRunGuide(model, num_steps=10, step_size=0.05)
        draws = {k: v[0] for k, v in guide.sample_posterior(x, num_samples=50).items()}
    out = importance_log_likelihood(model, draws, x, num_samples=2000)
    assert out.value.shape == out.error.shape == out.ess.shape == (6,)
    assert ((out.value - evidence(x)).abs() < 5 * out.error).all()
    assert out.error.max() < 0.1
    assert out.mean == pytest.approx(evidence(x).mean().item(), abs=5 * out.mean_error)


def test_constrained_latents():
    """Gamma-Poisson: the evidence is negative binomial."""
    counts = torch.tensor([0.0, 3.0, 11.0])

    def gamma_poisson(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(2.0, 0.5))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    draws = {"rate": dist.Gamma(2.0, 0.5).sample((200, 3))}
    out = importance_log_likelihood(gamma_poisson, draws, counts, num_samples=4000)
    exact = dist.GammaPoisson(torch.tensor(2.0), torch.tensor(0.5)).log_prob(counts)
    assert ((out.value - exact).abs() < 5 * out.error).all()


def test_missing_site_is_named():
    with pytest.raises(ValueError, match="z"):
        importance_log_likelihood(model, {"w": torch.zeros(5, 6, 2)}, torch.randn(6, 3))


def test_energy_priors_are_refused():
    """Their log Z would be left out."""

    def tilted(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            energy_prior("ebm", lambda z: z.square(), z)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="use ais"):
        importance_log_likelihood(tilted, {"z": torch.zeros(5, 3)}, torch.zeros(3))
