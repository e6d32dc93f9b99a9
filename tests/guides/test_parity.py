"""What a user of AutoNormal does works with a ShortRunGuide in its place."""

from __future__ import annotations

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor

from pyro_shortrun import ShortRunELBO, ShortRunGuide, ShortRunSVI
from pyro_shortrun.amortized import LangevinEncoderGuide


def linear(x: Tensor, y: Tensor | None = None) -> Tensor:
    w = pyro.sample("w", dist.Normal(0.0, 10.0))
    line = pyro.deterministic("line", w * x)
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(line, 0.5), obs=y)


def points() -> tuple[Tensor, Tensor]:
    x = torch.linspace(-1.0, 1.0, 10)
    return x, 1.5 * x


def adam() -> pyro.optim.PyroOptim:
    return pyro.optim.Adam({"lr": 0.01})


def after_svi(guide: ShortRunGuide) -> None:
    svi = SVI(linear, guide, adam(), Trace_ELBO())
    for _ in range(2):
        svi.step(*(t.clone() for t in points()))  # equal, though not the same tensors


def after_run(guide: ShortRunGuide) -> None:
    ShortRunSVI(linear, guide, adam(), ShortRunELBO()).run(3, *points(), progress=False)


TRAINED = {
    "SVI": after_svi,
    "ShortRunSVI": after_run,
    "setup": lambda guide: guide.setup(*points()),
    "draws": lambda guide: guide.sample_posterior(*points(), num_samples=2),
}


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("how", TRAINED)
def test_predictive_on_new_inputs_draws_from_the_training_posterior(how, parallel):
    """N(1.5, 1 / 4 sum x^2): the fitted Gaussian is it."""
    guide = ShortRunGuide(linear, num_steps=3)
    TRAINED[how](guide)
    draws = Predictive(linear, guide=guide, num_samples=40, parallel=parallel)(torch.ones(3))
    assert draws["y"].shape == (40, 3)
    sd = (4 * points()[0].square().sum()) ** -0.5
    assert abs(draws["w"].mean() - 1.5) < 5 * sd / 40**0.5
    for other in (copy.deepcopy(guide), guide):
        assert abs(other.sample_posterior(torch.ones(2), num_samples=40)["w"].mean() - 1.5) < 5 * sd / 40**0.5
    left = pickle.loads(pickle.dumps(guide)).attach(linear)  # without data
    with pytest.raises(ValueError, match="guide.condition_on"):
        left(torch.ones(3))


def test_evaluation_on_other_data_is_no_training():
    guide = ShortRunGuide(linear, num_steps=3)
    after_svi(guide)
    x, y = points()
    assert guide.sample_posterior(x, -y, num_samples=50)["w"].mean() < -1.0
    with torch.no_grad():
        guide(x, -y)
    assert guide.sample_posterior(torch.ones(2), num_samples=50)["w"].mean() > 1.0


@pytest.mark.parametrize("compiled", [False, True])
def test_mini_batches_are_no_training_data(compiled):
    guide = ShortRunGuide(linear, num_steps=3)
    x, y = points()
    if compiled:
        batches = [(x[i : i + 5], y[i : i + 5]) for i in (0, 5)]
        ShortRunSVI(linear, guide, adam(), ShortRunELBO()).run(2, batches=batches, progress=False)
    else:
        svi = SVI(linear, guide, adam(), Trace_ELBO())
        for i in (0, 5):
            svi.step(x[i : i + 5], y[i : i + 5])
    with pytest.raises(ValueError, match=r"guide.condition_on\(\*training_args\)"):
        Predictive(linear, guide=guide, num_samples=2)(torch.ones(3))
    assert Predictive(linear, guide=guide.condition_on(x, y), num_samples=2)(torch.ones(3))["y"].shape == (2, 3)


def local(x: Tensor, y: Tensor | None = None) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z * x, 0.5), obs=y)


def test_local_latents_of_training_data_do_not_fit_other_data():
    guide = ShortRunGuide(local, num_steps=2, step_size=0.01)
    guide(*points())
    assert guide(torch.ones(10))["z"].shape == (10,)
    with pytest.raises(ValueError, match=r"site 'z'.*\(10,\).*\(3,\).*guide.condition_on"):
        guide(torch.ones(3))


def test_an_encoder_trained_on_batches_knows_none():
    guide = LangevinEncoderGuide(local, features=lambda x, y=None: torch.eye(len(x)))
    x, y = points()
    guide(x, y), guide(x, 2 * y)
    with pytest.raises(ValueError, match="guide.condition_on"):
        guide(x)


def test_deterministic_sites_are_among_the_draws():
    x, y = points()
    guide = ShortRunGuide(linear, num_steps=2)
    draws = guide.sample_posterior(x, y, num_samples=5, num_chains=2)
    assert draws["line"].shape == (2, 5, 10)
    torch.testing.assert_close(draws["line"], draws["w"].unsqueeze(-1) * x)
    assert set(guide.median(x, y)) == {"w"}  # as AutoNormal's


@config_enumerate
def mixture(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.5)).long()
        pyro.deterministic("own", loc[k])
        pyro.sample("x", dist.Normal(loc[k], 1.0), obs=x)


@pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal])
def test_discrete_sites_need_no_block_by_hand(kind):
    x = torch.tensor([-2.0, -1.5, 2.0, 2.5])
    guide = ShortRunGuide(mixture, num_steps=2, step_size=0.01, start=kind(mixture))
    svi = SVI(mixture, guide, adam(), TraceEnum_ELBO(max_plate_nesting=1))
    assert svi.step(x) > 0
    assert set(guide.sample_posterior(x, num_samples=3)) == {"loc"}  # what a summed out site decides is not known


def test_adjusted_steps_from_graphs_are_the_eager_ones(dtype):
    from pyro_shortrun.compile import Compiler, Untouched

    draws = []
    for compiler in (None, Compiler(Untouched())):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = ShortRunGuide(linear, num_steps=2).setup(*points())
        guide._compiler = compiler
        draws.append(guide.sample_posterior(*points(), num_samples=6, adjust=8)["w"])
    tolerance = 1e-8 if dtype is torch.float64 else 1e-4
    torch.testing.assert_close(*draws, rtol=tolerance, atol=tolerance)
