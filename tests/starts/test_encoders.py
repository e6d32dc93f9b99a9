"""Encoders as starts of tempered runs: their density is known everywhere where their sites are independent normals."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyro_shortrun import Annealed, GaussianReverse, Langevin, ShortRunGuide, StepSize

X = torch.tensor([0.5, -1.0, 2.0])


def model(x: Tensor) -> None:
    with pyro.plate("data", 3):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(a + b.sin().sum(-1), 0.5), obs=x)


def encoder(x: Tensor) -> None:
    loc, scale = pyro.param("loc", torch.tensor([0.3, -0.2, 0.1])), pyro.param("scale", torch.tensor([0.5, 0.6, 0.7]))
    with pyro.plate("data", 3):
        pyro.sample("a", dist.Normal(x * loc[0], scale[0]))
        pyro.sample("b", dist.Normal(x.unsqueeze(-1) * loc[1:], scale[1:]).to_event(1))


def dynamics() -> Langevin:
    return Langevin(StepSize(0.02, learnable=False))


@pytest.mark.parametrize("objective", [Annealed, lambda: GaussianReverse(True, pilots=64)], ids=["annealed", "reverse"])
def test_weights_are_right_and_the_encoder_is_trained(objective):
    """E[exp(log w)] = p(x), as importance sampling finds it; weights by a reverse that is learned are too heavy-tailed
    here for more than E[log w] < log p(x)."""
    guide = ShortRunGuide(model, num_steps=4, start=encoder, objective=objective(), dynamics=dynamics()).setup(X)
    guide.log_weight(X).mean().backward()
    store = pyro.get_param_store()
    assert all(store._params[name].grad.abs().min() > 0 for name in ("loc", "scale"))
    with torch.no_grad():
        log_w = guide.eval().log_weight(X, num_particles=4000)
    a, b = torch.randn(200_000, 3, 1), torch.randn(200_000, 3, 2)
    likelihood = dist.Normal(a[..., 0] + b.sin().sum(-1), 0.5).log_prob(X).exp().mean(0).log().sum()
    gap = log_w - likelihood
    assert gap.mean() < -4 * gap.std() / 4000**0.5
    if objective is Annealed:
        error = gap.exp().std().item() / 4000**0.5
        assert gap.exp().mean().item() == pytest.approx(1.0, abs=4 * error + 0.02)


def test_the_density_is_that_of_an_auto_guide_with_the_same_moments():
    def one(x: Tensor) -> None:
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.sin(), 0.5), obs=x)

    def guide_of(start: object) -> ShortRunGuide:
        return ShortRunGuide(one, num_steps=3, start=start, objective=Annealed(), dynamics=dynamics()).setup(X)

    known = guide_of(AutoNormal(one, init_scale=0.3))
    pyro.set_rng_seed(1)
    expected = known.log_weight(X, num_particles=3)
    loc = known.start.locs.z.detach()
    pyro.clear_param_store()

    def start(x: Tensor) -> None:
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(loc, 0.3))

    found = guide_of(start)
    pyro.set_rng_seed(1)
    torch.testing.assert_close(found.log_weight(X, num_particles=3), expected)


def dependent(x: Tensor) -> None:
    with pyro.plate("data", 3):
        a = pyro.sample("a", dist.Normal(x, 0.5))
        pyro.sample("b", dist.Normal(a.unsqueeze(-1).expand(3, 2), 0.5).to_event(1))


def heavy(x: Tensor) -> None:
    with pyro.plate("data", 3):
        pyro.sample("a", dist.StudentT(5.0, x, 0.5))
        pyro.sample("b", dist.Normal(torch.zeros(2), 0.5).to_event(1))


def auxiliary(x: Tensor) -> None:
    with pyro.plate("data", 3):
        c = pyro.sample("c", dist.Normal(x, 0.5), infer={"is_auxiliary": True})
        pyro.sample("a", dist.Normal(c, 0.5))
        pyro.sample("b", dist.Normal(torch.zeros(2), 0.5).to_event(1))


@pytest.mark.parametrize("start", [dependent, heavy, auxiliary])
def test_others_are_refused(start):
    with pytest.raises(NotImplementedError, match="Normal independently of each other"):
        ShortRunGuide(model, num_steps=2, start=start, objective=Annealed(), dynamics=dynamics())(X)
