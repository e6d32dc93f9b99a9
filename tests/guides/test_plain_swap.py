"""The plain swap: what a guide chooses by itself, and that its draws are the posterior's on raw data."""

from __future__ import annotations

import logging
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.reparam import LocScaleReparam
from torch.distributions import constraints

from pyro_shortrun import (
    Annealed,
    Gaussian,
    Hamiltonian,
    Langevin,
    PathDensity,
    Prior,
    ShortRunELBO,
    ShortRunGuide,
    StepSize,
)
from pyro_shortrun.density.call import Call
from pyro_shortrun.guides.refinement import _moving
from pyro_shortrun.starts import Normal, fitting
from pyro_shortrun.starts.newton import Paths


def units():
    return torch.tensor([1.0, 1e-3, 1e5])


def regression(x, y):
    """Raw covariates and a wide prior; its posterior is known."""
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1000.0 / units()).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def local(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def shared(x):
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(scale * z, 0.5), obs=x)


def batches(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=3) as index:
        pyro.sample("x", dist.Normal(loc, 0.5), obs=x[index])


def flat(x):
    loc = pyro.sample("loc", dist.ImproperUniform(constraints.real, (), ()))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def many(x):
    w = pyro.sample("w", dist.Normal(torch.zeros(301), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(w.sum(), 1.0), obs=x.sum())


def data():
    pyro.set_rng_seed(3)
    x = torch.randn(60, 3) @ torch.tensor([[1.0, 0.9, 0.9], [0.0, 0.4, 0.0], [0.0, 0.0, 0.4]])
    y = x @ torch.tensor([1.0, -2.0, 0.5]) + 0.5 * torch.randn(60)
    return x * units(), y


@pytest.mark.parametrize(
    "model,start,objective",
    [(local, Prior, PathDensity), (shared, Gaussian, Annealed), (flat, Gaussian, Annealed)]
    + [(batches, Prior, PathDensity), (many, Prior, PathDensity)],
    ids=lambda case: case.__name__,
)
def test_the_rule(model, start, objective):
    guide = ShortRunGuide(model, num_steps=2)
    assert "by rule" in repr(guide)
    guide.setup(torch.randn(6))
    assert (type(guide.start), type(guide.objective)) == (start, objective)
    assert f"start={start.__name__}" in repr(guide) and "step_size=" in repr(guide)


def test_the_rule_follows_what_is_given():
    x = torch.randn(6)
    for options, objective in [
        ({"dynamics": Langevin(0.1, noise=False)}, PathDensity),
        ({"start": Prior()}, PathDensity),
    ]:
        assert type(ShortRunGuide(shared, num_steps=2, **options).setup(x).objective) is objective
    pyro.clear_param_store()
    guide = ShortRunGuide(shared, num_steps=2, dynamics=Hamiltonian(0.05)).setup(x)
    assert isinstance(guide.start, Gaussian) and guide.step_sizes().item() == pytest.approx(0.05)
    pyro.clear_param_store()
    assert ShortRunGuide(shared, num_steps=2, step_size=StepSize(0.03)).setup(x).step_sizes() == pytest.approx(0.03)
    part = poutine.block(shared, hide=["scale"])
    with poutine.trace():
        pyro.sample("scale", dist.Delta(torch.tensor(1.0)))
        guide = ShortRunGuide(part, num_steps=2)
        guide(x)
    assert isinstance(guide.start, Prior)


def posterior(x, y):
    """Mean and covariance of the weights in units of theirs."""
    white = x / units()
    precision = white.mT @ white / 0.25 + torch.eye(3) / 1000.0**2
    covariance = torch.linalg.inv(precision)
    return covariance @ white.mT @ y / 0.25, covariance


@pytest.mark.parametrize("compile", [False, True])
def test_a_gaussian_posterior_in_raw_units(compile, dtype):
    """Means within .1 sd, deviations within 10 %, correlations within .1: of 2000 draws these fail one in a million."""
    x, y = data()
    mean, covariance = posterior(x, y)
    guide = ShortRunGuide(regression, num_steps=10, compile=compile)
    w = guide.sample_posterior(x, y, num_samples=2000)["w"][0] * units()
    sd = covariance.diagonal().sqrt()
    assert ((w.mean(0) - mean) / sd).abs().max() < 0.1
    assert (w.std(0) / sd - 1).abs().max() < 0.1
    assert (torch.corrcoef(w.T) - covariance / sd.outer(sd)).abs().max() < 0.1


def test_the_bound_is_the_evidence_and_losses_agree():
    """The start is the posterior: every weight is nearly log p(x), by Trace_ELBO as by ShortRunELBO."""
    x, y = data()
    mean, covariance = posterior(x, y)
    marginal = dist.MultivariateNormal(
        torch.zeros(60), x @ torch.diag((1000.0 / units()) ** 2) @ x.T + 0.25 * torch.eye(60)
    )
    guide = ShortRunGuide(regression, num_steps=5)
    for loss in (Trace_ELBO(), ShortRunELBO(num_particles=4)):
        value = loss.loss(regression, guide, x, y)
        assert value == pytest.approx(-marginal.log_prob(y).item(), abs=0.5)


def test_training_goes_on_from_the_fit_at_any_rate():
    """The parameters live in the coordinates of the fit: a rate of .1 does not throw it away."""
    x, y = data()
    mean, covariance = posterior(x, y)
    guide = ShortRunGuide(regression, num_steps=5)
    svi = SVI(regression, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(30):
        svi.step(x, y)
    assert guide.start.shift.abs().max() > 0 and guide.start.stretch.abs().max() > 0
    w = guide.sample_posterior(x, y, num_samples=2000)["w"][0] * units()
    sd = covariance.diagonal().sqrt()
    assert ((w.mean(0) - mean) / sd).abs().max() < 0.2 and (w.std(0) / sd - 1).abs().max() < 0.2


def test_gradients_of_the_start_are_those_of_the_bound():
    """In differences along the mean, with the same random numbers."""
    x = torch.randn(6)
    guide = ShortRunGuide(shared, num_steps=3).setup(x)

    def loss() -> torch.Tensor:
        pyro.set_rng_seed(4)
        return -guide.log_weight(x, num_particles=4).mean()

    shift = guide.start.shift_unconstrained
    (grad,) = torch.autograd.grad(loss(), shift)
    ahead, eps = torch.randn_like(grad), 1e-4
    with torch.no_grad():
        shift += eps * ahead
        above = loss()
        shift -= 2 * eps * ahead
        below = loss()
    assert ((above - below) / (2 * eps)).item() == pytest.approx((grad @ ahead).item(), rel=1e-4)


def test_pretrain_fits_again(caplog):
    x, y = data()
    guide = ShortRunGuide(regression, num_steps=2)
    with caplog.at_level(logging.INFO, "pyro_shortrun"):
        guide.pretrain(x, y)
    assert sum("Gaussian start: bound" in r.message for r in caplog.records) == 1
    first = guide.start.center.clone()
    guide.pretrain(x, y + 1)
    assert not torch.allclose(guide.start.center, first, rtol=1e-3)
    with pytest.raises(ValueError, match="pretrain is for start=Gaussian"):
        ShortRunGuide(local).pretrain(x[:, 0])


def test_state_comes_back():
    x, y = data()
    guide, other = (ShortRunGuide(regression, num_steps=3).setup(x, y) for _ in range(2))
    guide.start.factor.mul_(1.5)
    other.load_state_dict(guide.state_dict())
    draws = []
    for one in (guide, other):
        pyro.set_rng_seed(1)
        draws.append(one.sample_posterior(x, y, num_samples=5)["w"])
    assert torch.equal(*draws)


def test_adjusted_steps_and_weights_mend_draws():
    """A start that is half as wide as the posterior, and a run too short to widen it."""
    x, y = data()
    guide = ShortRunGuide(regression, num_steps=1, step_size=StepSize(1e-3)).setup(x, y)
    sd = guide.start.factor.square().sum(1).sqrt()
    guide.start.stretch = torch.full((3, 3), 0.0).fill_diagonal_(-5.0)

    def spread(**options):
        draws = guide.sample_posterior(x, y, num_samples=4000, **options)["w"][0]
        return (draws.std(0) / sd).max().item()

    assert spread(adjust=0) < 0.7
    assert spread() > 0.8
    assert spread(adjust=60) == pytest.approx(1.0, abs=0.08)
    assert 0.3 < guide.info.acceptance < 0.95
    assert spread(resample=True, adjust=0) > 0.7
    assert guide.info.k_hat > 0.5


def test_adjusted_steps_of_other_starts():
    """Rows from the prior, in their own coordinates."""
    x = torch.tensor([1.0, -2.0, 0.3])
    guide = ShortRunGuide(local, num_steps=2, step_size=StepSize(0.1))
    z = guide.sample_posterior(x, num_samples=4000, adjust=80)["z"][0]
    assert torch.allclose(z.mean(0), 0.8 * x, atol=0.05) and torch.allclose(z.var(0), torch.tensor(0.2), atol=0.02)


def test_what_a_gaussian_start_refuses():
    with pytest.raises(ValueError, match=r"\['w'\] have 301 values.*start=Prior\(\)"):
        ShortRunGuide(many, start=Gaussian()).setup(torch.randn(3))

    def thinned(x):
        with pyro.plate("data", len(x), subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x[index])

    with pytest.raises(ValueError, match=r"\['z'\] lie in a subsampled plate.*Gaussian"):
        ShortRunGuide(thinned, start=Gaussian()).setup(torch.randn(6))
    guide = ShortRunGuide(local, num_steps=2, start=Gaussian()).setup(torch.randn(4))
    with pytest.raises(ValueError, match="site 'z' has 5 values in a row, 4 when"):
        guide(torch.randn(5))


def test_a_back_off_that_reaches_its_floor_is_refused():
    def steep(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", -1e12 * z**2)

    with pytest.raises(ValueError, match=r"halved 20 times.*start=Gaussian\(\)"):
        ShortRunGuide(steep, step_size=0.1, start=Prior()).setup(torch.zeros(1))


def funnel(n):
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    pyro.sample("x", dist.Normal(torch.zeros(n), (v / 2).exp()).to_event(1))


def test_a_funnel_is_said(caplog):
    """And the same non-centred is not one, nor is a hierarchy that data pin."""

    def pinned(n):
        scale = pyro.sample("scale", dist.HalfCauchy(1.0))
        with pyro.plate("groups", 20):
            z = pyro.sample("z", dist.Normal(0.0, scale))
            pyro.sample("y", dist.Normal(z, 0.05), obs=torch.linspace(-2.0, 2.0, 20))

    centred = poutine.reparam(funnel, {"x": LocScaleReparam(0.0, shape_params=())})
    for model, said in ((funnel, True), (centred, False), (pinned, False)):
        pyro.clear_param_store()
        caplog.clear()
        ShortRunGuide(model, num_steps=2).setup(9)
        lines = [r.getMessage() for r in caplog.records if "funnel" in r.getMessage()]
        assert bool(lines) == said, lines
        assert not said or all(word in lines[0] for word in ("'x' and 'v'", "LocScaleReparam(0.0)"))


def test_modes_are_said(caplog):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 10.0))
        pyro.sample("other", dist.Normal(0.0, 1.0))
        pyro.factor("f", -0.5 * (z.abs() - 5.0) ** 2)

    ShortRunGuide(model, num_steps=2).setup()
    lines = [r.getMessage() for r in caplog.records if "another mode" in r.getMessage()]
    assert lines and all("values of 'z':" in line for line in lines)


def test_heavy_weights_are_said_once(caplog):
    """A start that is a fiftieth as wide as the posterior, and a run too short to widen it."""

    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    guide = ShortRunGuide(model, num_steps=1, step_size=StepSize(1e-6)).setup()
    guide.start.stretch = torch.full((1, 1), -40.0)
    for _ in range(2):
        guide.sample_posterior(num_samples=2000)
    assert guide.info.k_hat > 0.7
    (line,) = [r.getMessage() for r in caplog.records if "k-hat" in r.getMessage()]
    assert "most of all at 'z' (" in line and "LocScaleReparam" in line


def test_the_sites_that_weights_move():
    """Half of the weight on the first of four draws moves 'a' by .5 and 'b' by .1 standard deviations, 'c' not."""

    def model():
        for name in "abc":
            pyro.sample(name, dist.Normal(0.0, 1.0))

    layout = Call.of(model, (), {}).jointly().density.layout
    state = torch.tensor([[1.5, 1.0, 0.0], [-0.5, 0.8, 1.0], [-0.5, 1.2, -1.0], [-0.5, 0.6, 0.0]]).unsqueeze(1)
    weights = torch.tensor([0.5, 1 / 6, 1 / 6, 1 / 6])
    assert _moving(layout, state, weights.log()) == "'a'"
    assert _moving(layout, state[:, :, [1, 0, 2]], weights.log()) == "'b'"


@pytest.mark.parametrize(
    "options,weighed",
    [({}, True), ({"adjust": 0}, False), ({"resample": False}, False), ({"num_samples": 50}, False)]
    + [({"adjust": 0, "resample": True}, True)],
    ids=["default", "unadjusted", "not resampled", "few", "asked for"],
)
def test_when_draws_are_weighed(options, weighed):
    x = torch.tensor([1.0, -2.0, 0.3])
    guide = ShortRunGuide(shared, num_steps=2, step_size=StepSize(0.05))
    guide.sample_posterior(x, **{"num_samples": 200, **options})
    assert (guide.info.k_hat is not None) == weighed
    assert (guide.info.acceptance is not None) == (options.get("adjust") != 0)


def test_a_fit_that_does_not_converge_is_refused_and_goes_on(monkeypatch):
    """By its site, at set-up and at every use, until the fit has converged."""
    x, y = data()
    real = fitting.natural_fit
    monkeypatch.setattr(fitting, "natural_fit", lambda *a: real(*a, max_steps=3))
    monkeypatch.setattr(
        fitting,
        "laplace_on_paths",
        lambda *a: Paths(Normal(torch.zeros(4).double(), torch.eye(4).double()), -math.inf, ()),
    )

    def model(x, y):
        pyro.sample("fine", dist.Normal(0.0, 1.0))
        regression(x, y)

    guide = ShortRunGuide(model, num_steps=2)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"not converged at 'w' .*LocScaleReparam.*guide.pretrain"):
            guide.sample_posterior(x, y, num_samples=5)
    monkeypatch.undo()
    w = guide.sample_posterior(x, y, num_samples=2000)["w"][0] * units()
    mean, covariance = posterior(x, y)
    assert ((w.mean(0) - mean) / covariance.diagonal().sqrt()).abs().max() < 0.1


@pytest.mark.parametrize("start", [None, Gaussian()], ids=["by rule", "given"])
def test_flat_priors_can_be_fitted(start):
    """The posterior of a mean under a flat prior is N(mean, 1 / n)."""
    x = torch.tensor([101.0, 103.0, 99.0, 105.0])
    draws = ShortRunGuide(flat, num_steps=5, start=start).sample_posterior(x, num_samples=4000)["loc"][0]
    assert draws.mean().item() == pytest.approx(102.0, abs=0.05) and draws.std().item() == pytest.approx(0.5, abs=0.03)
