"""Nesterov's steps, by hand and where they are refused."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from pyro_shortrun import Annealed, Nesterov, PathDensity, Persistent, Prior, Refine, ShortRunGuide, StepSize


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sinh(), 0.5).to_event(1), obs=x)


def slope(z: Tensor, x: Tensor) -> Tensor:
    return -z + (x - z.sinh()) * z.cosh() / 0.25


def by_hand(z: Tensor, x: Tensor, eta: float, beta: float, steps: int) -> Tensor:
    before = z
    for _ in range(steps):
        ahead = z + beta * (z - before)
        before, z = z, ahead + eta * slope(ahead, x)
    return z


def nesterov(beta: float = 0.7) -> Nesterov:
    return Nesterov(StepSize(0.02, learnable=False), beta=beta)


@pytest.mark.parametrize("beta", [0.3, 0.7])
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_a_run_is_what_its_formula_says(beta, steps):
    x = torch.randn(4, 2)
    guide = ShortRunGuide(model, num_steps=steps, dynamics=nesterov(beta), start=Prior(), objective=Refine()).setup(x)
    path = guide.trajectory(x)["z"][:, 0]
    torch.testing.assert_close(path[-1], by_hand(path[0], x, 0.02, beta, steps))
    path = guide.sample_posterior(x, num_samples=3)["z"]
    assert path.shape == (1, 3, 4, 2)


def test_it_climbs_farther_than_plain_steps():
    x, z = torch.randn(4, 2), torch.zeros(4, 2)

    def left(end: Tensor) -> Tensor:
        return slope(end, x).norm()

    assert left(by_hand(z, x, 0.02, 0.7, 8)) < 0.5 * left(by_hand(z, x, 0.02, 0.0, 8))


@pytest.mark.parametrize("start", [Prior, Persistent])
def test_training(start):
    x = torch.randn(4, 2)
    guide = ShortRunGuide(model, num_steps=4, dynamics=nesterov(), start=start(), objective=Refine())
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert all(abs(svi.step(x)) < 1e3 for _ in range(3))


@pytest.mark.parametrize("objective", [PathDensity(), Annealed()])
def test_objectives_that_need_log_q_refuse_it(objective):
    with pytest.raises(ValueError, match="Nesterov"):
        ShortRunGuide(model, dynamics=nesterov(), start=Prior(), objective=objective)


@pytest.mark.parametrize("beta", [0, 1.0, "much"])
def test_beta_out_of_range(beta):
    with pytest.raises(ValueError, match="beta"):
        Nesterov(0.1, beta=beta)
