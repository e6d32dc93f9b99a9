"""Models that other parts of Pyro make, with guides and kernels of ours."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.contrib.gp as gp
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.epidemiology.models import SimpleSIRModel
from pyro.contrib.forecast import Forecaster, ForecastingModel
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO, config_enumerate, infer_discrete
from pyro.nn import PyroSample
from torch import Tensor

from pyro_shortrun import Gaussian, Init, Prior, ShortRunELBO, ShortRunGuide, ShortRunLangevin, VectorizedMCMC


def adam(lr: float = 0.01) -> pyro.optim.PyroOptim:
    return pyro.optim.Adam({"lr": lr})


# ---------------------------------------------------------------- Gaussian processes


def test_hyperparameters_of_a_gaussian_process():
    """``pyro.contrib.gp`` with priors: chains and runs agree on the posterior."""
    x = torch.linspace(0.0, 5.0, 15)
    y = torch.sin(x) + 0.1 * torch.cos(7 * x)
    kernel = gp.kernels.RBF(1)
    kernel.variance = PyroSample(dist.LogNormal(0.0, 0.3))
    kernel.lengthscale = PyroSample(dist.LogNormal(0.0, 0.3))
    process = gp.models.GPRegression(x, y, kernel, noise=torch.tensor(0.05), jitter=1e-5)
    process.requires_grad_(False)
    process.eval()
    process.set_mode("model")
    guide = ShortRunGuide(process.model, num_steps=5, start=Gaussian())
    draws = guide.sample_posterior(num_samples=200, adjust=20)
    mcmc = VectorizedMCMC(ShortRunLangevin(process.model, 2, adjust=True), 60, 60, num_chains=10, disable_progbar=True)
    mcmc.run()
    exact = mcmc.get_samples()
    assert set(draws) == {"kernel.variance", "kernel.lengthscale"}
    for name, values in draws.items():
        scale = exact[name].std()
        assert (values.mean() - exact[name].mean()).abs() < 0.3 * scale


# ---------------------------------------------------------------- epidemics, series


def test_an_epidemic():
    """``contrib.epidemiology``: the relaxed model under a guide, as ``fit_svi`` trains its own, and under chains."""
    model = SimpleSIRModel(population=50, recovery_time=3.0, data=torch.tensor([0.0, 1.0, 2.0, 4.0, 3.0, 1.0]))
    model.relaxed, model.num_quant_bins = True, 1  # as fit_svi does
    begins = Init(model._heuristic(None, num_particles=64), scale=0.01)
    guide = ShortRunGuide(model._relaxed_model, num_steps=2, step_size=0.001, start=begins)
    svi = SVI(model._relaxed_model, guide, adam(), Trace_ELBO())
    assert all(abs(svi.step()) < 1e4 for _ in range(3))
    draws = guide.sample_posterior(num_samples=5)
    assert draws["R0"].shape == (1, 5) and (draws["R0"] > 0).all()
    kernel = ShortRunLangevin(model._relaxed_model, 2, adjust=True, start=begins)
    mcmc = VectorizedMCMC(kernel, 5, 5, num_chains=2, disable_progbar=True)
    mcmc.run()
    assert set(mcmc.get_samples()) == set(draws)


class Walk(ForecastingModel):
    """A drifting level with noise."""

    def model(self, zero_data: Tensor, covariates: Tensor) -> None:
        drift = pyro.sample("drift", dist.Normal(0.0, 1.0))
        scale = pyro.sample("scale", dist.LogNormal(-2.0, 0.5))
        time = torch.arange(float(zero_data.size(-2))).unsqueeze(-1)
        level = drift.unsqueeze(-1) * time
        self.predict(dist.Normal(torch.zeros_like(level), scale.unsqueeze(-1)), level)


def test_forecasts():
    """``contrib.forecast``: our guide in a Forecaster, which is told the past that it is given, predicts a line."""
    time = torch.arange(20.0).unsqueeze(-1)
    data, covariates = 0.5 * time[:15], torch.zeros(20, 0)
    walk = Walk()
    guide = ShortRunGuide(walk, num_steps=3).condition_on(data, covariates[:15])
    forecaster = Forecaster(walk, data, covariates[:15], guide=guide, num_steps=5, log_every=0)
    found = forecaster(data, covariates, num_samples=50)
    assert found.shape == (50, 5, 1)
    torch.testing.assert_close(found.median(0).values, 0.5 * time[15:], rtol=0, atol=0.5)


# ---------------------------------------------------------------- handlers


def chain(x: Tensor) -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(a, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(b, 1.0), obs=x)


def mean_of(model: Any, site: str, *args: Any) -> float:
    pyro.clear_param_store()
    draws = ShortRunGuide(model, num_steps=10, start=Gaussian()).sample_posterior(*args, num_samples=4000)
    return draws[site].mean().item()


@pytest.mark.parametrize(
    ("handler", "exact"),
    [
        (lambda m: m, 2 * 4 / 9),  # of 4 data that are 2 each: E[a | x] = n x / (2 n + 1)
        (lambda m: poutine.condition(m, data={"b": torch.tensor(2.0)}), 1.0),  # E[a | b] = b / 2
        (lambda m: poutine.do(m, data={"b": torch.tensor(2.0)}), 0.0),  # what is set says nothing about a
        (lambda m: poutine.uncondition(poutine.condition(m, data={"b": torch.tensor(2.0)})), 0.0),
    ],
    ids=["model", "condition", "do", "uncondition"],
)
def test_handlers_around_a_model_change_its_posterior(handler, exact):
    model = handler(chain)
    assert mean_of(model, "a", torch.full((4,), 2.0)) == pytest.approx(exact, abs=0.06)  # four standard errors


# ---------------------------------------------------------------- discrete latents


@config_enumerate
def mixture(x: Tensor) -> None:
    locs = pyro.sample("locs", dist.Normal(torch.tensor([-3.0, 3.0]), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        which = pyro.sample("which", dist.Categorical(torch.ones(2)))
        pyro.sample("x", dist.Normal(locs[which], 1.0), obs=x)


def test_discrete_latents_are_inferred_after_training():
    x = torch.tensor([-3.2, -2.9, 3.1, 2.8, -3.0])
    hidden = poutine.block(mixture, hide=["which"])
    guide = ShortRunGuide(hidden, num_steps=3, start=Prior())
    svi = SVI(mixture, guide, adam(), TraceEnum_ELBO(max_plate_nesting=1))
    for _ in range(5):
        svi.step(x)
    drawn = poutine.trace(guide).get_trace(x)
    discrete = infer_discrete(poutine.replay(mixture, drawn), temperature=0, first_available_dim=-2)
    found = poutine.trace(discrete).get_trace(x).nodes["which"]["value"]
    assert found.tolist() == [0, 0, 1, 1, 0]


def test_predictions_of_a_trained_guide_with_its_own_loss():
    x = torch.full((4,), 2.0)
    guide = ShortRunGuide(chain, num_steps=5)
    svi = SVI(chain, guide, adam(), ShortRunELBO())
    for _ in range(3):
        svi.step(x)
    found = Predictive(chain, guide=guide, num_samples=200)(x)
    assert set(found) >= {"a", "b"} and found["b"].mean().item() == pytest.approx(16 / 9, abs=0.3)
    assert Trace_ELBO().loss(chain, guide, x) < 20
