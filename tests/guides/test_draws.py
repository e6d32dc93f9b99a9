"""Draws of a guide: shapes, laws, batches, dtypes, and what its run tells."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import ALL, EXACT, close, contraction, data, linear_log_weight, local, nested, recorded
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_median
from torch import Tensor

from pyro_shortrun import Init, Langevin, Persistent, Prior, ShortRunGuide, StepSize


@pytest.mark.parametrize(
    "model,sites", [("shared", {"mu": ()}), ("local", {"z": (5,)}), ("nested", {"mu": (), "z": (5,)})]
)
def test_shapes_of_draws(model, sites):
    x = data()
    guide = ShortRunGuide(EXACT[model].model, num_steps=3, step_size=StepSize(0.02), start=Prior())
    draws = guide.sample_posterior(x, num_samples=4, num_chains=2)
    assert {k: v.shape for k, v in draws.items()} == {k: (2, 4, *shape) for k, shape in sites.items()}
    assert all(not v.requires_grad for v in draws.values())
    assert all(v.reshape(8, -1)[:, 0].unique().numel() == 8 for v in draws.values())  # runs of their own
    path = guide.trajectory(x, num_chains=2)
    assert {k: v.shape for k, v in path.items()} == {k: (4, 2, *shape) for k, shape in sites.items()}
    assert {k: v.shape for k, v in guide.median(x).items()} == sites
    quantiles = guide.quantiles([0.05, 0.5, 0.95], x)
    assert {k: v.shape for k, v in quantiles.items()} == {k: (3, *shape) for k, shape in sites.items()}
    assert all((v.diff(dim=0) > 0).all() for v in quantiles.values())
    values = guide(x)
    assert {k: v.shape for k, v in values.items()} == sites


def test_shapes_of_structured_sites():
    """A matrix of fewer free coordinates than elements, dotted names and a plate to the left."""
    for name, shapes in {
        "lkj": {"scale": (4,), "corr": (4, 4)},
        "nested_both": {"mu": (), "centre": (5, 1), "spread": (5, 1), "z": (5, 6)},
        "bnn": {"hidden.weight": (5, 2), "hidden.bias": (5,), "out.weight": (1, 5), "out.bias": (1,), "noise": ()},
    }.items():
        model, args = ALL[name].make()
        guide = ShortRunGuide(model, num_steps=1, step_size=StepSize(1e-5), start=Prior())
        draws = guide.sample_posterior(*args, num_samples=3, num_chains=2)
        assert {k: tuple(v.shape) for k, v in draws.items()} == {k: (2, 3, *s) for k, s in shapes.items()}, name
        assert {k: tuple(v.shape) for k, v in guide(*args).items()} == shapes, name
        pyro.clear_param_store()


def test_draws_have_the_law_of_the_run():
    """A noise-free linear run from the prior ends in a Gaussian of known mean and deviation."""
    x, shrink, samples = data(), 0.8**2, 4000
    guide = ShortRunGuide(local, num_steps=2, dynamics=contraction(0.1), start=Prior())
    mean = x / 2 * (1 - shrink)
    z = guide.sample_posterior(x, num_samples=samples // 2, num_chains=2)["z"].reshape(samples, 5)
    assert ((z.mean(0) - mean).abs() < 5 * shrink / math.sqrt(samples)).all()
    torch.testing.assert_close(z.std(0), torch.full((5,), shrink), rtol=0.1, atol=0)
    median = guide.median(x)["z"]
    assert ((median - mean).abs() < 5 * 1.25 * shrink / math.sqrt(1000)).all()
    low, high = guide.quantiles([0.1587, 0.8413], x)["z"]
    torch.testing.assert_close(high - low, torch.full((5,), 2 * shrink), rtol=0.2, atol=0)


def test_many_draws_are_split_into_chunks(monkeypatch):
    from pyro_shortrun.guides import simulation as module

    monkeypatch.setattr(module, "_NOISE_AT_ONCE", 12)
    guide = ShortRunGuide(local, num_steps=1, step_size=StepSize(0.02), start=Prior())
    draws = guide.sample_posterior(data(), num_samples=7, num_chains=3)["z"]
    assert draws.shape == (3, 7, 5)
    assert draws.unique().numel() == draws.numel()


@pytest.mark.parametrize("per", ["shared", "dim"])
def test_smaller_last_batch(per, dtype):
    """The number of rows may change between calls, and each call has the law of its own batch."""
    guide, seen = recorded(
        ShortRunGuide(local, num_steps=3, dynamics=Langevin(StepSize(0.1, per=per), noise=False), start=Prior())
    )
    elbo = Trace_ELBO(max_plate_nesting=1)
    for n in (8, 8, 3, 8, 1):
        x = data(8)[:n]
        loss = elbo.loss_and_grads(local, guide, x)
        assert seen[-1]["z"].shape == (n,)
        assert loss == pytest.approx(-linear_log_weight(seen[-1]["z"], x, 0.1, 3).sum().item(), **close(dtype))


def test_smaller_last_batch_beside_shared_latents():
    guide = ShortRunGuide(nested, num_steps=2, step_size=StepSize(0.02, per="dim"), start=Prior())
    svi = SVI(nested, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for n in (8, 3, 8):
        assert math.isfinite(svi.step(data(8)[:n]))
        assert guide(data(8)[:n])["z"].shape == (n,)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["eight_schools", "vae"])
def test_dtype_of_the_model_is_kept(kind, name):
    torch.set_default_dtype(kind)  # the fixture `clean_state` resets it
    model, args = ALL[name].make()
    guide = ShortRunGuide(model, num_steps=2, step_size=StepSize(0.01), start=Prior())
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert math.isfinite(svi.step(*args))
    assert all(v.dtype == kind for v in guide(*args).values())
    assert guide.step_sizes().dtype == kind
    assert all(p.dtype == kind for p in guide.parameters())
    assert all(v.dtype == kind for v in guide.sample_posterior(*args, num_samples=2).values())


def test_dtype_of_the_data_wins_over_the_default():
    """A float64 model in a float32 session."""
    torch.set_default_dtype(torch.float32)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.linspace(-1, 1, 4, dtype=torch.float64)
    for start in (Prior(), Init(init_to_median), Persistent(), AutoNormal(model)):
        guide = ShortRunGuide(model, num_steps=2, step_size=StepSize(0.05), start=start)
        SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(x)
        assert guide(x)["z"].dtype == torch.float64
        assert guide.step_sizes().dtype == torch.float64
        pyro.clear_param_store()


def test_info_of_a_linear_run(dtype):
    x, steps, eta = data(), 3, 0.1
    guide = ShortRunGuide(local, num_steps=steps, dynamics=contraction(eta), start=Prior())
    assert guide.info is None
    guide.setup(x)
    pyro.set_rng_seed(1)
    z = guide.trajectory(x)["z"].squeeze(1)
    pyro.set_rng_seed(1)
    end = guide(x)["z"]
    torch.testing.assert_close(end, z[-1])
    info = guide.info
    log_density = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(x)
    torch.testing.assert_close(info.log_density, log_density.mean(-1))  # per row, at every state
    torch.testing.assert_close(info.grad_norm, (x - 2 * z[:-1]).abs().mean(-1))
    torch.testing.assert_close(info.log_det, torch.full((steps,), math.log(1 - 2 * eta)))
    torch.testing.assert_close(info.step_size, torch.full((steps, 1), eta))
    assert info.frozen.shape == info.singular.shape == (1, 5)
    assert info.nonfinite == info.noninvertible == 0
    assert not any(t.requires_grad for t in (info.log_density, info.grad_norm, info.log_det, info.step_size))
    assert "in 3 steps, 0 of 5 rows frozen, 0 with a singular step" in repr(info)


def test_info_counts_steps_that_are_not_invertible():
    """The curvature of ``local`` is 2, so that eta = 0.6 folds the space over."""
    guide = ShortRunGuide(local, num_steps=2, dynamics=contraction(0.6), start=Prior())
    guide(data())
    assert guide.info.noninvertible == 5 and guide.info.nonfinite == 0
    guide.sample_posterior(data(), num_samples=3)
    assert guide.info.singular.shape == (3, 5)


def test_nothing_is_printed_or_logged(capfd, caplog):
    caplog.set_level("WARNING")
    x = data()
    guide = ShortRunGuide(local, num_steps=5, step_size=0.05, start=Prior())
    svi = SVI(local, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(x)
    guide.sample_posterior(x, num_samples=3)
    guide.quantiles([0.5], x)
    Predictive(local, guide=guide, num_samples=3)(x)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
