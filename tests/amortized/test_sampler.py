"""AmortizedSampler: amortised dynamics without data."""

from __future__ import annotations

import pytest
import torch
from encoders import net
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from pyro_shortrun.amortized import AmortizedSampler


class Waves(nn.Module):
    """Random features with weights to train, nearly orthogonal for inputs that are far apart."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, width)
        nn.init.normal_(self.linear.weight)
        nn.init.uniform_(self.linear.bias, 0, 6.3)

    def forward(self, v: Tensor) -> Tensor:
        return self.linear(v).cos()


def test_unconditional_gaussian():
    """60 draws of a correlated Gaussian with mean (1, -1): 100 of such sets, 20 transitions apart; within 5 standard
    errors of the moments if the sets were independent."""
    cov = torch.tensor([[1.0, 0.6], [0.6, 0.8]])
    goal = MultivariateNormal(torch.tensor([1.0, -1.0]), cov)
    sampler = AmortizedSampler(goal.log_prob, Waves(3, 200), 3 * torch.randn(60, 3), size=2)
    sampler(500)
    sampler.eval()
    draws = torch.cat([sampler(20).detach() for _ in range(100)])
    error = 5 / len(draws) ** 0.5
    torch.testing.assert_close(draws.mean(0), goal.mean, rtol=0, atol=2 * error)
    torch.testing.assert_close(draws.T.cov(), cov, rtol=0, atol=3 * error)


def test_unconditional_mixture_and_training_of_its_features():
    """Both modes have their share; the draws' graph leads to the features, and not into the map."""
    centers = torch.tensor([[-1.2, 0.0], [1.2, 0.0]])

    def log_density(z: Tensor) -> Tensor:
        return (-(z.unsqueeze(1) - centers).square().sum(-1) / (2 * 0.5**2)).logsumexp(1)

    features = Waves(3, 200)
    sampler = AmortizedSampler(log_density, features, 3 * torch.randn(40, 3), size=2)
    sampler(500)
    draws = torch.cat([sampler(10).detach() for _ in range(150)])
    right = draws[:, 0] > 0
    assert right.float().mean().item() == pytest.approx(0.5, abs=0.1)
    spread = torch.stack([draws[right, 1].std(), draws[~right, 1].std()])
    torch.testing.assert_close(spread, torch.full((2,), 0.5), rtol=0.1, atol=0)
    z = sampler(2)
    log_density(z).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in features.parameters())
    assert not sampler.psi.requires_grad
    assert sampler.at(torch.randn(500, 3)).shape == (500, 2)
    assert {"chain.phi", "chain.log_step", "inputs"} <= set(sampler.state_dict())


def test_sampler_refuses():
    with pytest.raises(ValueError, match="width 12 for 13 rows"):
        AmortizedSampler(lambda z: z.sum(-1), net(), torch.randn(13, 2), size=1)
    with pytest.raises(ValueError, match="log_density must return shape"):
        AmortizedSampler(lambda z: z.sum(), net(), torch.randn(3, 2), size=1)()
    with pytest.raises(ValueError, match="or its gradient, is not finite"):
        AmortizedSampler(lambda z: (0 * z).abs().sqrt().sum(-1), net(), torch.randn(3, 2), size=1)()
    with pytest.raises(ValueError, match="not finite"):
        AmortizedSampler(lambda z: z.sum(-1) / 0, net(), torch.randn(3, 2), size=1)()
