"""Draws from tilted priors against closed forms, and EnergyPredictive against Predictive."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyro_shortrun import EnergyPredictive, ShortRunGuide, energy_prior, sample_prior

pytestmark = pytest.mark.filterwarnings("error")


def tilted(c: float = 1.0) -> Callable:
    """z ~ N(0, 1 / (1 + c)) and x = z + 0.5 eps."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            energy_prior("ebm", lambda z: c * z.square() / 2, z)
            pyro.deterministic("double", 2 * z)
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    return model


def after(steps: int, precision: float, eta: float) -> float:
    """Variance of ``steps`` Langevin steps on N(0, 1 / precision) from N(0, 1)."""
    a = (1 - eta * precision) ** 2
    return a**steps + 2 * eta * (1 - a**steps) / (1 - a)


@pytest.mark.parametrize("compile", [False, True])
def test_quadratic_energy(compile):
    """Variances of latents and observations, within 5 standard errors of a variance; observations are drawn anew."""
    draws = sample_prior(tilted(), torch.full((40,), 99.0), num_samples=500, num_steps=40, compile=compile)
    assert draws["z"].shape == draws["x"].shape == draws["double"].shape == (500, 40)
    exact = after(40, 2.0, 0.1)
    assert exact == pytest.approx(0.5 / 0.9, rel=1e-3)  # the step's own bias
    error = 5 * math.sqrt(2 / 20_000)
    assert draws["z"].square().mean().item() == pytest.approx(exact, rel=error)
    assert draws["x"].square().mean().item() == pytest.approx(exact + 0.25, rel=error)
    torch.testing.assert_close(draws["double"], 2 * draws["z"])


def layered(x: Tensor | None = None) -> None:
    """A joint energy that makes z1 and z2 a correlated Gaussian, with z1 given z2 moved after it."""
    with pyro.plate("data", 4):
        z2 = pyro.sample("z2", dist.Normal(torch.zeros(()), 1.0))
        z1 = pyro.sample("z1", dist.Normal(torch.zeros(()), 1.0))
        energy_prior("ebm", lambda a, b: -0.6 * a * b, z1, z2)
        z0 = pyro.sample("z0", dist.Normal(z1, 0.1))
        pyro.sample("x", dist.Normal(z0, 0.5), obs=x)


def test_data_may_be_left_out_and_layers_held():
    """Given z2, z1 ~ N(0.6 z2, 1); its precision is 1. Within 5 standard errors."""
    z2 = torch.tensor([-2.0, 0.0, 1.0, 3.0])
    draws = sample_prior(layered, num_samples=4000, num_steps=60, given={"z2": z2})
    mean = 0.6 * z2 * (1 - 0.9**60)
    assert ((draws["z1"].mean(0) - mean).abs() < 5 * math.sqrt(1.06 / 4000)).all()
    assert torch.equal(draws["z2"], z2.expand(4000, 4))
    assert (draws["z0"] - draws["z1"]).std().item() == pytest.approx(0.1, rel=0.05)
    assert set(draws) == {"z0", "z1", "z2", "x"}


def test_models_without_energies():
    def model(x: Tensor | None = None) -> None:
        z = pyro.sample("z", dist.Normal(torch.ones(3), 0.1).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(), 0.1), obs=x)

    draws = sample_prior(model, num_samples=6)
    assert draws["z"].shape == (6, 3) and draws["x"].shape == (6,)
    assert (draws["z"] - 1).abs().max() < 1


def test_predictive_from_the_prior():
    predictive = EnergyPredictive(tilted(24.0), num_samples=500, return_sites=["z"], num_steps=50, step_size=0.01)
    draws = predictive(torch.zeros(4))
    assert set(draws) == {"z"} and draws["z"].shape == (500, 4)
    assert draws["z"].std().item() == pytest.approx(math.sqrt(after(50, 25.0, 0.01)), rel=0.1)


@pytest.mark.parametrize("guide", [AutoNormal, lambda m: ShortRunGuide(m, num_steps=3)], ids=["AutoNormal", "run"])
def test_predictive_with_a_guide_is_pyros(guide):
    model, x = tilted(), torch.tensor([1.0, -1.0])
    guide = guide(model)
    guide(x)
    draws = []
    for kind in (Predictive, EnergyPredictive):
        predictive = kind(model, guide=guide, num_samples=7)
        if kind is EnergyPredictive:
            predictive._check((x,), {})
            predictive._check = lambda *_: None  # which draws
        pyro.set_rng_seed(0)
        draws.append(predictive(x))
    assert draws[0].keys() == draws[1].keys()
    for name in draws[0]:
        torch.testing.assert_close(draws[0][name], draws[1][name])


def test_predictive_needs_every_latent_of_the_tilted_prior():
    draws = {"z1": torch.zeros(5, 4)}
    with pytest.raises(ValueError, match="give the latent site 'z2'"):
        EnergyPredictive(layered, draws)()
    draws["z2"] = torch.zeros(5, 4)
    assert EnergyPredictive(layered, draws)()["x"].shape == (5, 4)


def test_refusals():
    with pytest.raises(ValueError, match="num_samples"):
        sample_prior(layered, num_samples=0)
    with pytest.raises(ValueError, match="given names 'w'"):
        sample_prior(layered, given={"w": torch.zeros(4)})
    with pytest.raises(ValueError, match="num_steps"):
        sample_prior(layered, num_steps=0)
    with pytest.raises(ValueError, match="posterior_samples or num_samples"):
        EnergyPredictive(layered)
