"""Chains start at a fitted Gaussian, and move in its coordinates."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import init_to_uniform
from targets import COVARIANCE, MEAN, curved, gaussian, quiet, regression, regression_data, subsampled
from torch import Tensor
from torch.distributions import constraints

from pyro_shortrun import Annealed, Gaussian, Init, PathDensity, Prior, ShortRunGuide, ShortRunLangevin, StepSize
from pyro_shortrun.dynamics import Dense
from pyro_shortrun.mcmc.short_runs import ShortRuns


def counts(x: Tensor, group: Tensor, y: Tensor) -> None:
    """A mixed Poisson regression whose covariate has scale 100."""
    slope, spread = pyro.sample("slope", dist.Normal(0.0, 1.0)), pyro.sample("spread", dist.HalfNormal(1.0))
    with pyro.plate("groups", 5):
        shift = pyro.sample("shift", dist.Normal(0.0, spread))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Poisson((shift[group] + slope * x).exp()), obs=y)


def counts_data() -> tuple[Tensor, ...]:
    group = torch.arange(5).repeat_interleave(12)
    x = 100 * torch.randn(60)
    return x, group, dist.Poisson((0.3 * torch.randn(5)[group] + 0.01 * x).exp()).sample()


# ------------------------------------------------------------------------------------------------ exact


@pytest.mark.parametrize("options", [dict(adjust=True), dict(), dict(persistent=True)], ids=["adjusted", "runs", "ULA"])
def test_coordinates_of_a_gaussian_are_its_own(options, dtype):
    """There the log density is that of N(0, I), and a chain's first states are draws of the posterior."""
    session = ShortRunLangevin(gaussian, 3, **options).open(5, 4, (), {})
    frame, tolerance = session.target.frame, 1e-8 if dtype is torch.float64 else 1e-3
    torch.testing.assert_close(frame.factor @ frame.factor.T, COVARIANCE(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(frame.center, MEAN(), rtol=tolerance, atol=tolerance)
    v = session.sampler.fresh(5)
    wanted = dist.Normal(0.0, 1.0).log_prob(v.u).sum(-1)
    torch.testing.assert_close(v.log_density, wanted, rtol=tolerance, atol=10 * tolerance)
    torch.testing.assert_close(session.target.params(v.u)["z"], frame.outward(v.u)[:, 0])
    torch.testing.assert_close(session.target.states(session.target.params(v.u)), v.u, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", [dict(adjust=True), dict()], ids=["adjusted", "runs"])
def test_log_densities_and_states_are_told_in_unconstrained_space(options):
    args = regression_data()
    mcmc = quiet(ShortRunLangevin(regression, 2, **options), 4, 3, 5)
    mcmc.run(*args)
    u, model = mcmc.unconstrained(), mcmc.target.call.model
    wanted = model(u.flatten(0, 1)).reshape(5, 4)
    torch.testing.assert_close(mcmc.sample_stats["lp"], wanted.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        model.constrain(u[:, 1])[0]["noise"], mcmc.get_samples(group_by_chain=True)["noise"][:, 1]
    )


def test_short_runs_from_a_gaussian_are_tuned_by_its_bound():
    for given, kind in ((None, Annealed), (PathDensity(), PathDensity)):
        sampler = ShortRunLangevin(gaussian, 3, objective=given).open(2, 3, (), {}).sampler
        assert isinstance(sampler, ShortRuns) and isinstance(sampler._objective, kind)
    sampler = ShortRunLangevin(gaussian, 3, start=Prior()).open(2, 3, (), {}).sampler
    assert isinstance(sampler, ShortRuns) and isinstance(sampler._objective, PathDensity)
    with pytest.raises(NotImplementedError, match="Annealed needs the density of the start"):
        quiet(ShortRunLangevin(gaussian, 3, start=init_guide, objective=Annealed()), 2, 2, 2).run()


def init_guide() -> None:
    pyro.sample("z", dist.MultivariateNormal(torch.zeros(3), torch.eye(3)))


# ------------------------------------------------------------------------------------------------ the rule


def wide() -> None:
    pyro.sample("z", dist.Normal(torch.zeros(301), 1.0).to_event(1))


@pytest.mark.parametrize(
    "model, args, options",
    [
        (curved, (), dict(adjust=True)),
        (wide, (), dict(adjust=True)),
        (subsampled, (torch.ones(8), 4), dict(persistent=True)),
        (gaussian, (), dict(persistent=True, step_size=0.01)),
        (gaussian, (), dict(persistent=True, step_size=StepSize(0.01, learnable=False))),
        (gaussian, (), dict(adjust=True, start=Init(init_to_uniform))),
        (gaussian, (), dict(start=Prior())),
    ],
    ids=["rows", "many", "mini-batches", "own step", "own StepSize", "Init", "Prior"],
)
def test_otherwise_chains_move_in_the_latents_own_units(model, args, options):
    assert ShortRunLangevin(model, 1, **options).open(2, 0, args, {}).target.frame is None


def test_initial_params_want_no_fit():
    start = {"z": torch.randn(2, 3)}
    session = ShortRunLangevin(gaussian, 1, adjust=True).open(2, 0, (), {}, start)
    assert session.target.frame is None and torch.equal(session.state.u[:, 0], start["z"])
    session = ShortRunLangevin(gaussian, 1, adjust=True, start=Gaussian()).open(2, 0, (), {}, start)
    torch.testing.assert_close(session.all_params()["z"], start["z"])


def test_a_gaussian_of_the_users_is_fitted_to_each_run_or_taken_as_it_is():
    given = Gaussian()
    kernel = ShortRunLangevin(regression, 2, adjust=True, start=given)
    frames = [kernel.open(2, 0, (x, y), {}).target.frame for x, y in (regression_data(), regression_data())]
    assert not given.is_fitted and not frames[0].is_equal(frames[1])
    args = regression_data()
    guide = ShortRunGuide(regression).setup(*args)
    again = ShortRunLangevin(regression, 2, adjust=True, start=guide.start).open(2, 0, args, {})
    assert again.target.frame.is_equal(guide.start.frame)


def test_mini_batches_are_nothing_to_fit_to():
    with pytest.raises(ValueError, match="plate 'data' shows a mini-batch"):
        ShortRunLangevin(subsampled, 2, persistent=True, start=Gaussian()).open(2, 0, (torch.ones(8), 4), {})


def test_a_fit_that_fails_is_no_obstacle(monkeypatch, caplog):
    def fails(self, call):
        raise ValueError("no Gaussian has a finite bound")

    monkeypatch.setattr(Gaussian, "pretrain", fails)
    session = ShortRunLangevin(gaussian, 2, adjust=True).open(2, 0, (), {})
    assert session.target.frame is None and "no Gaussian to start from" in caplog.text
    with pytest.raises(ValueError, match="finite bound"):
        ShortRunLangevin(gaussian, 2, adjust=True, start=Gaussian()).open(2, 0, (), {})


def test_warm_up_is_short_where_nobody_has_chosen_it():
    short, told = (quiet(ShortRunLangevin(gaussian, 250, adjust=True), 5, w, 2) for w in (None, 4))
    short.run(), told.run()
    assert (short.warmup_steps, told.warmup_steps) == (2, 4)
    again = quiet(ShortRunLangevin(gaussian, 250, adjust=True), 6, None, 2)
    again.load_state_dict(short.state_dict())
    again.run()
    assert again.warmup_steps == 2 and torch.equal(again.unconstrained()[:, :5], short.unconstrained())


def test_saved_chains_keep_their_coordinates():
    mcmc = quiet(ShortRunLangevin(gaussian, 2, adjust=True), 3, 2, 2)
    mcmc.run()
    other = quiet(ShortRunLangevin(gaussian, 2, adjust=True, start=Init(init_to_uniform)), 5, 2, 2)
    other.load_state_dict(mcmc.state_dict())
    other.run()
    assert other.target.frame.is_equal(mcmc.target.frame)
    plain = quiet(ShortRunLangevin(gaussian, 2, adjust=True, start=Init(init_to_uniform)), 3, 2, 2)
    plain.run()
    with pytest.raises(ValueError, match="did not begin at a fitted Gaussian"):
        mcmc.load_state_dict(plain.state_dict())
        mcmc.run()


# ------------------------------------------------------------------------------------------------ what it is for


def test_an_improper_prior_is_no_obstacle():
    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.ImproperUniform(constraints.real, (), ()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 2.0), obs=x)

    x = 50 + torch.randn(16)
    for options in (dict(adjust=True), dict()):
        mcmc = quiet(ShortRunLangevin(model, 5, **options), 50, 20, 40)
        mcmc.run(x)
        loc = mcmc.get_samples()["loc"]  # the posterior is N(mean(x), 1 / 4); two thousand draws, 500 of them effective
        assert abs(loc.mean() - x.mean()) < 0.1 and abs(loc.std() - 0.5) < 0.1


@pytest.mark.parametrize("preconditioner", [None, Dense()], ids=["default", "dense"])
def test_a_covariate_of_scale_one_hundred(preconditioner):
    """From U(-2, 2) the slopes are thousands of standard deviations off and hardly move."""
    args = counts_data()
    mcmc = quiet(ShortRunLangevin(counts, 10, adjust=True, preconditioner=preconditioner), 60, 30, 32)
    mcmc.run(*args)
    slope, report = mcmc.get_samples()["slope"], mcmc.diagnostics()
    assert max(report[name]["r_hat"].max() for name in ("slope", "spread", "shift")) < 1.1
    assert slope.std() < 0.01 and abs(slope.mean() - 0.01) < 5 * slope.std()


def test_discrete_latents_are_summed_out():
    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.25)).long()
            pyro.sample("x", dist.Normal(loc[k], 1.0), obs=x)

    x = torch.tensor([-2.0, -1.5, 2.0, 2.5])
    mcmc = quiet(ShortRunLangevin(model, 2, adjust=True), 4, 4, 3)
    mcmc.run(x)
    assert set(mcmc.get_samples()) == {"loc"}
    loc = mcmc.get_samples(group_by_chain=True)["loc"]
    parts = [dist.Normal(loc[..., i, None], 1.0).log_prob(x) for i in (0, 1)]
    mixture = torch.logaddexp(parts[0] + torch.tensor(0.75).log(), parts[1] + torch.tensor(0.25).log()).sum(-1)
    wanted = mixture + dist.Normal(0.0, 3.0).log_prob(loc).sum(-1)
    torch.testing.assert_close(mcmc.sample_stats["lp"], wanted, rtol=1e-5, atol=1e-5)
