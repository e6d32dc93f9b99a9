"""Runs in a metric that pilot chains have found."""

from __future__ import annotations

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor

from pyro_shortrun import Annealed, Gaussian, Langevin, PathDensity, Prior, ShortRunGuide, StepSize
from pyro_shortrun.dynamics import Dense, Diagonal
from pyro_shortrun.guides import metric as found

PRECISION = [[4.0, 1.8, 0.0], [1.8, 1.0, 0.0], [0.0, 0.0, 25.0]]


def correlated() -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.factor("data", -0.5 * (z - 1) @ torch.tensor(PRECISION) @ (z - 1) + 0.5 * z.square().sum())


def rows(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z * torch.tensor([1.0, 8.0]), 0.5).to_event(1), obs=x)


CASES = {"one row": (correlated, ()), "rows": (rows, (torch.tensor([[0.3, 1.0], [-0.5, 2.0]]),))}
STARTS = {"prior": lambda model: Prior(), "mean field": AutoNormal, "full rank": AutoMultivariateNormal}


@pytest.mark.parametrize("objective", [PathDensity, Annealed])
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("case", CASES)
def test_a_scale_of_one_half_is_a_quarter_of_the_step(case, start, objective, monkeypatch):
    """``u' = u + L (eta L^T grad + sqrt(2 eta) eps)``: runs, weights, and what they are trained by."""
    if (case, start) == ("rows", "full rank"):
        pytest.skip("its density is known of single rows alone")
    model, args = CASES[case]
    args = tuple(t.to(torch.get_default_dtype()) for t in args)
    monkeypatch.setattr(found, "pilot_metric", lambda density, u, *_: torch.full_like(u[0], 0.5))
    results = []
    for metric, eta in ((Diagonal(), 0.008), (None, 0.002)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)  # of where the start guides begin
        dynamics = Langevin(StepSize(eta))
        guide = ShortRunGuide(
            model, num_steps=4, dynamics=dynamics, start=STARTS[start](model), objective=objective(), metric=metric
        ).setup(*args)
        pyro.set_rng_seed(1)
        weights = guide.log_weight(*args, num_particles=3)
        loss = SVI(model, guide, pyro.optim.SGD({"lr": 0.0}), Trace_ELBO()).step(*args)
        draws = guide.sample_posterior(*args, num_samples=3, adjust=0)["z"]
        raw = dynamics.step_size.value_unconstrained
        (grad,) = torch.autograd.grad(guide.log_weight(*args, num_particles=2).sum(), [raw])
        share = raw.sigmoid() * (1 - raw.sigmoid()) * dynamics.step_size.max / eta  # d log eta / d raw
        results.append((weights.detach(), torch.tensor(loss), guide.trajectory(*args)["z"], draws, grad / share))
    for mine, plain in zip(*results, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("metric", [Diagonal(), Dense()], ids=["diagonal", "dense"])
def test_pilot_chains_find_the_scales_of_a_gaussian(metric):
    guide = ShortRunGuide(correlated, num_steps=4, start=Prior(), metric=metric).setup()
    covariance = torch.linalg.inv(torch.tensor(PRECISION))
    factor = guide.metric.factor
    if isinstance(metric, Dense):
        white = torch.linalg.solve_triangular(factor, covariance, upper=False)
        white = torch.linalg.solve_triangular(factor, white.T, upper=False)
        assert (torch.linalg.eigvalsh(white).log().abs() < 0.2).all()
    else:
        assert torch.equal(factor, factor.diag().diag())
        ratio = factor.diag()[2] ** 2 / covariance[2, 2]  # the other two have a scale between sd and conditional sd
        assert abs(ratio.log()) < 0.2


def test_rows_have_one_metric():
    x = torch.randn(40, 2)
    guide = ShortRunGuide(rows, num_steps=4, start=Prior(), metric=Diagonal()).setup(x)
    sd = torch.tensor([1 + 4, 1 + 4 * 64.0]).rsqrt()
    assert ((guide.metric.factor.diag() / sd).log().abs() < 0.15).all()
    assert guide(torch.randn(7, 2))["z"].shape == (7, 2)


def test_from_the_prior_a_metric_is_worth_a_lot():
    """Worst error of a mean in sd; scales .2 to 2.2, correlation .9."""
    sd, errors = torch.linalg.inv(torch.tensor(PRECISION)).diagonal().sqrt(), []
    for metric in (None, Dense()):
        pyro.clear_param_store()
        guide = ShortRunGuide(correlated, start=Prior(), objective=Annealed(learnable=False), metric=metric)
        z = guide.sample_posterior(num_samples=2000)["z"][0]
        errors.append(((z.mean(0) - 1).abs() / sd).max().item())
    assert errors[1] < 0.15 < errors[0]


def test_a_metric_is_state():
    guide = ShortRunGuide(correlated, num_steps=2, start=Prior(), metric=Dense()).setup()
    state = guide.state_dict()
    assert torch.equal(state["metric.factor"], guide.metric.factor)
    pyro.clear_param_store()
    other = ShortRunGuide(correlated, num_steps=2, start=Prior(), metric=Dense()).setup()
    other.load_state_dict(state)
    assert torch.equal(other.metric.factor, guide.metric.factor)
    assert torch.equal(copy.deepcopy(guide).metric.factor, guide.metric.factor)


def wide() -> None:
    pyro.sample("z", dist.Normal(torch.zeros(301), 1.0).to_event(1))


def thinned(x: Tensor) -> None:
    with pyro.plate("data", len(x), subsample_size=2) as i:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])


@pytest.mark.parametrize(
    "model, options, message",
    [
        (correlated, dict(start=Gaussian()), "coordinates of its own"),
        (correlated, dict(), "coordinates of its own"),
        (wide, dict(start=Prior()), "301 coordinates"),
        (thinned, dict(start=Prior()), "subsampled plate"),
        (correlated, dict(metric="dense"), "metric must be a Preconditioner"),
    ],
    ids=["Gaussian", "default", "many", "subsampled", "kind"],
)
def test_where_there_is_none(model, options, message):
    with pytest.raises(ValueError, match=message):
        ShortRunGuide(model, **{"metric": Diagonal(), **options}).setup(*((torch.ones(4),) if model is thinned else ()))
