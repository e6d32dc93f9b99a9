"""Predictive, conditioning, and calls without gradients."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import EXACT, MODES, data, frozen, local, nested
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import Tensor

from pyro_shortrun import Prior, ShortRunGuide, StepSize


def means(draws: dict[str, Tensor], sites: set[str]) -> Tensor:
    """Means over the first axis (of logarithms, where values are positive), one after another."""
    values = [draws[k].log() if draws[k].min() > 0 else draws[k] for k in sorted(sites)]
    return torch.cat([v.reshape(len(v), -1).mean(0) for v in values])


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize(
    "model,mode", [*((model, "plain") for model in EXACT), ("nested", "no_grad"), ("nested", "inference_mode")]
)
def test_predictive(model, parallel, mode):
    """Draws of the posterior and functions of the same draws; also where the data are made inside the mode."""
    exact, samples = EXACT[model], 1000 if parallel else 20
    sites = {"local": {"z"}, "positive": {"z"}, "nested": {"z", "mu"}, "shared": {"mu"}}[model]

    def predicted(x: Tensor) -> None:
        exact.model(x)
        pyro.sample("new", dist.Normal(0.0, 1.0))

    guide = ShortRunGuide(exact.model, num_steps=2, dynamics=frozen(), start=exact.posterior)
    with MODES[mode]():
        x = data(4)
        draws = Predictive(predicted, guide=guide, num_samples=samples, parallel=parallel)(x)
        reference = Predictive(exact.posterior, {}, num_samples=2000, parallel=True)(x)
    assert set(draws) >= {*sites, "x", "new"}
    for site in sites:
        shape = (samples, 4) if site == "z" else (samples,)
        assert draws[site].squeeze().shape == shape
        assert draws[site].std(0).min() > 0.1
    error = (means(draws, sites) - means(reference, sites)).abs() * math.sqrt(samples)
    assert error.max() < 5 * math.sqrt(2)  # standard errors; no posterior here is wider than 1


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("dim", [-1, -2])
def test_predictive_of_plates_with_explicit_dims(parallel, dim):
    """Predictive's own plate takes dims of the model's plates when it runs the guide."""

    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), dim=dim):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x.reshape(-1, *[1] * (-1 - dim)))

    guide = ShortRunGuide(model, num_steps=2, step_size=StepSize(0.05), start=Prior())
    draws = Predictive(model, guide=guide, num_samples=4, parallel=parallel)(data())
    assert draws["mu"].squeeze().shape == (4,)
    assert draws["mu"].unique().numel() == 4


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_conditions_the_model_on_the_draws(parallel):
    def doubled(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.deterministic("twice", 2 * z)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = ShortRunGuide(doubled, num_steps=2, step_size=0.05, start=Prior())
    draws = Predictive(doubled, guide=guide, num_samples=5, parallel=parallel)(data())
    assert draws["z"].shape == (5, 5)
    torch.testing.assert_close(draws["twice"], 2 * draws["z"])


@pytest.mark.parametrize("mode", MODES)
def test_every_public_call_works_in_every_mode(mode):
    """Also the first one, which creates the parameters; and what it creates can be trained afterwards."""
    with MODES[mode]():
        x = data(4)
        guide = ShortRunGuide(nested, num_steps=2, step_size=StepSize(0.01), start=Prior())
        guide.setup(x)
        assert guide(x)["z"].shape == (4,)
        assert guide.sample_posterior(x, num_samples=3)["mu"].shape == (1, 3)
        assert guide.trajectory(x)["mu"].shape == (3, 1)
        assert math.isfinite(Trace_ELBO().loss(nested, guide, x))
    before = guide.step_sizes()
    svi = SVI(nested, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    svi.step(data(4))
    assert guide.step_sizes() != before


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_no_graph_where_none_is_wanted(mode):
    guide = ShortRunGuide(local, num_steps=2, step_size=StepSize(0.01), start=Prior())
    with MODES[mode]():
        assert not guide(data())["z"].requires_grad
        assert torch.is_inference_mode_enabled() == (mode == "inference_mode")
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def linear(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w * x, 0.5), obs=y)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("inference_mode", [False, True])
def test_condition_on_keeps_the_training_posterior(parallel, inference_mode):
    """Predictive passes test inputs to the guide; its draws are those of the training data all the same."""
    with torch.inference_mode(inference_mode):
        x = torch.linspace(-1.0, 1.0, 10)
        y = 1.5 * x
        precision = 1 + 4 * (x**2).sum().item()
        mean = 4 * (x * y).sum().item() / precision

        def posterior(x: Tensor, y: Tensor | None = None) -> None:
            assert y is not None
            p = 1 + 4 * (x**2).sum()
            pyro.sample("w", dist.Normal(4 * (x * y).sum() / p, p**-0.5))

        guide = ShortRunGuide(linear, num_steps=2, dynamics=frozen(), start=posterior).setup(x, y)
        assert guide.condition_on(x, y) is guide
        samples = 500 if parallel else 100
        draws = Predictive(linear, guide=guide, num_samples=samples, parallel=parallel)(torch.ones(3))
        assert draws["y"].shape == (samples, 3)
        w = draws["w"].flatten()
        assert abs(w.mean().item() - mean) < 5 * (precision * samples) ** -0.5
        assert w.std().item() == pytest.approx(precision**-0.5, rel=0.4)
        for mine, direct in [
            (guide.sample_posterior(torch.ones(3), num_samples=samples), guide.sample_posterior(x, y)),
            (guide.median(), guide.median(x, y)),
        ]:
            assert abs(mine["w"].mean() - direct["w"].mean()) < 7 * (precision * samples) ** -0.5
        assert guide.forget() is guide
        flipped = guide.sample_posterior(x, -y, num_samples=samples)["w"].mean().item()
        assert abs(flipped + mean) < 5 * (precision * samples) ** -0.5


def test_arguments_reach_the_model_as_they_are():
    """Lists, dicts and keyword arguments are the caller's own objects."""
    cache: list[int] = []
    table = {"scale": torch.tensor(1.0)}
    seen = []

    def model(x: Tensor, cache: list[int], *, table: dict[str, Tensor]) -> None:
        seen.append((x, cache, table))
        cache.append(len(x))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, table["scale"]))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = data()
    ShortRunGuide(model, num_steps=1, step_size=StepSize(0.05), start=Prior())(x, cache, table=table)
    assert seen and all(a is x and b is cache and c is table for a, b, c in seen)
    assert len(cache) == len(seen)
