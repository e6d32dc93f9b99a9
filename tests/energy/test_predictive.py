"""Draws from tilted priors against closed forms, and EnergyPredictive against Predictive."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyro_shortrun import EnergyELBO, Prior, ShortRunGuide, ais, energy_prior, sample_prior
from pyro_shortrun.energy import EnergyPredictive, PriorRuns
from pyro_shortrun.starts import Replay


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
    predictive = EnergyPredictive(tilted(24.0), num_samples=500, return_sites=["z"], runs=PriorRuns(50, 0.01))
    draws = predictive(torch.zeros(4))
    assert set(draws) == {"z"} and draws["z"].shape == (500, 4)
    assert draws["z"].std().item() == pytest.approx(math.sqrt(after(50, 25.0, 0.01)), rel=0.1)


@pytest.mark.parametrize(
    "guide", [AutoNormal, lambda m: ShortRunGuide(m, num_steps=3, start=Prior())], ids=["AutoNormal", "run"]
)
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


def test_discrete_latents_go_with_the_others():
    """Runs sum k out; its draws are from p(k | z). P(k agrees with z's sign) is 1 to 1e-3 for means at -4 and 4."""

    @config_enumerate
    def model(x: Tensor | None = None) -> None:
        with pyro.plate("data", 20):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.5])))
            z = pyro.sample("z", dist.Normal(torch.tensor([-4.0, 4.0])[k], 1.0))
            energy_prior("ebm", lambda z: 0.01 * z.square(), z)
            pyro.sample("x", dist.Normal(k * 1.0, 0.01), obs=x)

    for hidden in (model, poutine.block(model, hide=["k"])):
        draws = sample_prior(hidden, num_samples=50, num_steps=20)
        assert draws["k"].shape == draws["z"].shape == (50, 20)
        assert ((draws["z"] > 0) == (draws["k"] == 1)).double().mean() > 0.99
        assert (draws["x"] - draws["k"]).abs().max() < 0.1


def test_data_before_the_energy_are_conditions():
    """z depends on a label in the arguments; what is drawn has that label, and what follows depends on it."""

    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            y = pyro.sample("y", dist.Categorical(torch.tensor([0.5, 0.5])), obs=y)
            z = pyro.sample("z", dist.Normal(torch.tensor([-4.0, 4.0])[y], 1.0))
            energy_prior("ebm", lambda z: 0.01 * z.square(), z)
            pyro.sample("x", dist.Normal(z + 100 * y, 0.1))

    y = torch.tensor([0, 1, 1, 0])
    draws = sample_prior(model, y, num_samples=30, num_steps=20)
    assert torch.equal(draws["y"], y.expand(30, 4))
    assert ((draws["x"] > 50) == (y == 1)).all() and (draws["z"].sign() == 2 * y - 1).double().mean() > 0.99


def test_every_latent_of_the_prior_may_be_held():
    held = {"z1": torch.ones(4), "z2": torch.zeros(4)}
    draws = sample_prior(layered, num_samples=300, given=held)
    assert torch.equal(draws["z1"], torch.ones(300, 4))
    assert draws["z0"].mean().item() == pytest.approx(1.0, abs=0.02)
    with pytest.raises(NotImplementedError, match="holds 'z0', which comes after"):
        sample_prior(layered, given={"z0": torch.zeros(4)})


def test_sampling_leaves_a_replay_buffer_alone():
    start, model, x = Replay(50), tilted(), torch.zeros(4)
    guide = AutoNormal(model)
    guide(x)
    EnergyELBO(Trace_ELBO(), num_steps=2, start=start).loss_and_grads(model, guide, x)
    before = start.store.clone()
    assert sample_prior(model, x, num_samples=3, num_steps=2, start=start)["z"].shape == (3, 4)
    assert torch.equal(start.store, before) and int(start.written) == 4


def test_draws_in_parts():
    """More numbers than are run at once: as many draws as asked for, all of them different."""
    draws = sample_prior(tilted(), torch.zeros(2**19), num_samples=5, num_steps=1)["z"]
    assert draws.shape == (5, 2**19) and len(draws[:, 0].unique()) == 5


def test_inference_mode():
    """Held values and data of the energy may be inference tensors."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(()), 1.0))
            z1 = pyro.sample("z1", dist.Normal(torch.zeros(()), 1.0))
            energy_prior("ebm", lambda a, b: x * a * b, z1, z2)
            pyro.sample("x", dist.Normal(z1, 1.0), obs=x)

    with torch.inference_mode():
        x = torch.ones(3)
        held = {"z2": torch.ones(3)}
        assert sample_prior(model, x, given=held, num_samples=2, num_steps=3)["x"].shape == (2, 3)
        assert ais(model, x, num_chains=2, num_temperatures=3).lower.shape == (3,)


def test_refusals():
    with pytest.raises(ValueError, match="num_samples"):
        sample_prior(layered, num_samples=0)
    with pytest.raises(ValueError, match="given names 'w'"):
        sample_prior(layered, given={"w": torch.zeros(4)})
    with pytest.raises(ValueError, match="given names 'x'"):
        sample_prior(layered, torch.zeros(4), given={"x": torch.zeros(4)})
    with pytest.raises(ValueError, match=r"given\['z1'\] has shape \(3,\); it must have the site's, \(4,\)"):
        sample_prior(layered, given={"z1": torch.zeros(3)})
    with pytest.raises(NotImplementedError, match="have no trace"):
        EnergyPredictive(layered, num_samples=2).get_vectorized_trace()
    with pytest.raises(ValueError, match="num_steps"):
        sample_prior(layered, num_steps=0)
    with pytest.raises(ValueError, match="posterior_samples or num_samples"):
        EnergyPredictive(layered)
