"""Exported log densities: weights against evidences, pointwise likelihoods against log probs, predictions in law."""

from __future__ import annotations

import logging
import math

import arviz as az
import pyro
import pyro.distributions as dist
import pytest
import torch
from exported import (
    GROUPS,
    around_posterior,
    coord,
    dims,
    equal,
    evidence,
    export,
    get,
    groups,
    log_weights,
    short,
    still,
)
from programs import NOISE, data, gamma_poisson
from programs import located as model
from programs import located_at as posterior
from pyro import poutine
from pyro.infer import config_enumerate
from torch import Tensor
from torch.distributions import kl_divergence
from zoo import (
    make_dmm,
    make_hmm,
    make_masked,
    make_mixture,
    make_nested_both,
    make_subsampled_mixture,
    make_two_layer,
    subsampled_mixture_plates,
)

from pyro_shortrun import Langevin, Prior, ShortRunGuide, StepSize, energy_prior, to_arviz

# ------------------------------------------------------------------------------------------------ densities


def test_log_likelihood_is_the_log_prob_at_the_draws():
    x = data()
    out = export(model, x)
    loc = get(out, "posterior", "loc")
    torch.testing.assert_close(get(out, "log_likelihood", "x"), dist.Normal(loc.unsqueeze(-1), NOISE).log_prob(x))
    equal({"x": x}, out, "observed_data")


def test_draws_are_those_of_the_guide():
    """Chains and draws are filled in order from independent runs."""
    guide, options = short(model).setup(data()), {"num_samples": 3, "num_chains": 2}
    pyro.set_rng_seed(1)
    draws = guide.sample_posterior(data(), **options)
    pyro.set_rng_seed(1)
    equal(draws, to_arviz(guide, data(), **options))


def test_weights_of_the_exact_posterior_are_the_evidence(dtype):
    x = data()
    out = to_arviz(still(model, around_posterior(1.0)), x, num_samples=20, num_chains=2)
    tol = 1e-6 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(log_weights(out), torch.full((2, 20), evidence(x)), rtol=0, atol=tol)


def test_weights_are_densities_of_constrained_sites(dtype):
    """Gamma-Poisson, started at its posterior: the evidence is negative binomial, and no Jacobian is left over."""
    counts = torch.tensor([0.0, 3.0, 11.0])

    def start(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.Gamma(2.0 + x, 1.5))

    out = to_arviz(still(gamma_poisson, start), counts, num_samples=20, num_chains=2)
    exact = dist.GammaPoisson(torch.tensor(2.0), torch.tensor(0.5)).log_prob(counts).sum()
    tol = 1e-6 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(log_weights(out), exact.expand(2, 20), rtol=0, atol=tol)
    jacobian = get(out, "posterior", "rate").log().sum(-1)
    torch.testing.assert_close(get(out, "sample_stats", "lp") - get(out, "sample_stats", "log_p"), jacobian)


@pytest.mark.parametrize("prior", [dist.Normal, dist.LogNormal])
def test_weights_in_a_subsampled_plate_are_constant_at_the_exact_posterior(prior, dtype):
    """Both densities count a batch alike, whether or not they scale it to the full plate."""

    def subsampled(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=4) as index:
            z = pyro.sample("z", prior(0.0, 1.0))
            z = z.log() if prior is dist.LogNormal else z
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def start(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=4) as index:
            pyro.sample("z", prior(x[index] / 2, 0.5**0.5))

    guide = still(subsampled, start, create_plates=lambda x: pyro.plate("data", len(x), subsample_size=4))
    weights = log_weights(to_arviz(guide, data(12), num_samples=20, num_chains=2))
    tol = 1e-6 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close(weights, weights.mean().expand(2, 20), rtol=0, atol=tol)


def test_noise_free_run_has_a_closed_form():
    """K steps shrink the prior to ``N(m (1 - a), a^2)``, ``a = (1 - eta / s^2)^K``: log q and the bound follow."""
    x, eta, steps = data(), 0.02, 3
    guide = ShortRunGuide(
        model, num_steps=steps, dynamics=Langevin(StepSize(eta, learnable=False), noise=False), start=Prior()
    )
    out = to_arviz(guide, x, num_samples=1000, num_chains=4)
    mean, deviation = posterior(x)
    shrink = (1 - eta / deviation**2) ** steps
    q, p = dist.Normal(mean * (1 - shrink), shrink), dist.Normal(mean, deviation)
    loc = get(out, "posterior", "loc")
    torch.testing.assert_close(get(out, "sample_stats", "log_q"), q.log_prob(loc))
    weights = log_weights(out)
    bound = evidence(x) - kl_divergence(q, p).item()
    error = weights.std().item() / len(weights.flatten()) ** 0.5
    assert weights.mean().item() == pytest.approx(bound, abs=5 * error)
    assert weights.mean().item() < evidence(x)


def khat(weights: Tensor) -> float:
    flat = weights.flatten().cpu().numpy()
    if hasattr(az, "psislw"):
        return float(az.psislw(flat)[1])
    from arviz_stats.base import array_stats

    return float(array_stats.psislw(-flat)[1])  # as of a log likelihood


@pytest.mark.parametrize("width,low,high", [(1.5, -math.inf, 0.3), (0.1**0.5, 0.45, 1.35)])
def test_pareto_khat_of_the_weights(width, low, high):
    """For ``q = N(m, (w s)^2)`` the weights' tail index is ``k = 1 - w^2`` if w < 1, and they are bounded otherwise."""
    out = to_arviz(still(model, around_posterior(width)), data())
    assert low < khat(log_weights(out)) < high


def test_frozen_rows_are_counted():
    """Steps of size 1e6 on a Poisson log rate overflow: the rows stay, and the draw is marked."""

    def poisson(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Poisson(rate.exp()), obs=x)

    guide = ShortRunGuide(poisson, num_steps=2, step_size=StepSize(1e6, max=1e7, learnable=False), start=Prior())
    with pytest.warns(UserWarning, match="non-finite"):
        out = to_arviz(guide, torch.tensor([1.0, 4.0]), num_samples=3, num_chains=2)
    nonfinite = get(out, "sample_stats", "nonfinite")
    assert nonfinite.max() > 0
    assert (get(out, "sample_stats", "diverging") == (nonfinite > 0)).all()


# ------------------------------------------------------------------------------------------------ pointwise likelihood


@pytest.mark.parametrize("hidden", [False, True])
def test_mixture_sums_the_assignment_out(hidden):
    mixture, (x,) = make_mixture()
    target = poutine.block(mixture, hide=["assignment"]) if hidden else mixture
    out = export(target, x)
    weights, locs, scale = (get(out, "posterior", k) for k in ("weights", "locs", "scale"))
    terms = dist.Normal(locs.unsqueeze(-2), scale[..., None, None]).log_prob(x[:, None])
    torch.testing.assert_close(
        get(out, "log_likelihood", "x"), (weights.log().unsqueeze(-2) + terms).logsumexp(-1), rtol=1e-5, atol=1e-5
    )


def test_subsampled_mixture_is_not_scaled():
    mixture, (x, size) = make_subsampled_mixture()
    out = export(mixture, x, size, create_plates=subsampled_mixture_plates)
    index = torch.tensor(coord(out, "log_likelihood", "x", "rows"))
    locs, shift = get(out, "posterior", "locs"), get(out, "posterior", "shift")
    terms = dist.Normal(locs.unsqueeze(-2) + shift.unsqueeze(-1), 0.3).log_prob(x[index, None])
    exact = (torch.tensor([0.4, 0.6]).log() + terms).logsumexp(-1)
    torch.testing.assert_close(get(out, "log_likelihood", "x"), exact, rtol=1e-5, atol=1e-5)
    equal({"x": x[index]}, out, "observed_data")


def test_hidden_markov_model_has_no_pointwise_likelihood(caplog):
    target, args = make_hmm()
    with caplog.at_level(logging.WARNING, "pyro_shortrun"):
        out = export(target, *args)
    assert groups(out) == GROUPS - {"log_likelihood"}
    (record,) = [r for r in caplog.records if "log_likelihood" in r.getMessage()]
    assert all(f"'y_{t}'" in record.getMessage() for t in range(8))


def test_independent_sites_beside_tied_ones_are_kept(caplog):
    """``x`` hangs on its group's assignment together with its neighbours; ``w`` does not."""

    @config_enumerate
    def tied(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", 2, dim=-2):
            which = pyro.sample("which", dist.Bernoulli(0.5))
            with pyro.plate("members", 3, dim=-1):
                pyro.sample("x", dist.Normal(loc + which, 1.0), obs=x)
        with pyro.plate("others", 3):
            pyro.sample("w", dist.Normal(loc, 1.0), obs=x[0])

    x = data(6).reshape(2, 3)
    with caplog.at_level(logging.WARNING, "pyro_shortrun"):
        out = export(tied, x)
    assert "['x']" in caplog.text
    exact = dist.Normal(get(out, "posterior", "loc").unsqueeze(-1), 1.0).log_prob(x[0])
    assert set(out["log_likelihood"].data_vars) == {"w"}
    torch.testing.assert_close(get(out, "log_likelihood", "w"), exact)
    assert set(out["posterior_predictive"].data_vars) == {"x", "w"}


def test_masked_observations_are_no_data_points():
    masked, (y,) = make_masked()
    out = export(masked, y)
    level, spread = get(out, "posterior", "level"), get(out, "posterior", "spread")
    seen = torch.arange(y.numel()).reshape(y.shape) % 3 != 0 if y.dim() > 1 else torch.arange(len(y)) % 3 != 0
    exact = dist.Normal(level, 0.1 + spread).log_prob(y)[..., seen]
    torch.testing.assert_close(get(out, "log_likelihood", "y"), exact)
    assert coord(out, "log_likelihood", "y", "y_observed") == seen.nonzero().flatten().tolist()
    assert out["posterior_predictive"]["y"].shape[2:] == out["observed_data"]["y"].shape == y.shape


def by_handler(loc: Tensor, y: Tensor, keep: Tensor) -> None:
    with poutine.mask(mask=keep):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def by_distribution(loc: Tensor, y: Tensor, keep: Tensor) -> None:
    pyro.sample("y", dist.Normal(loc, 1.0).expand(y.shape).mask(keep), obs=y)


def by_nan(loc: Tensor, y: Tensor, keep: Tensor) -> None:
    pyro.sample("y", dist.NanMaskedNormal(loc, 1.0), obs=torch.where(keep, y, torch.tensor(math.nan)))


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")
@pytest.mark.parametrize("way", [by_handler, by_distribution, by_nan])
def test_however_they_are_masked(way):
    """In two plates, one number for each element that is there, and az.loo counts these."""
    y = data(6).reshape(3, 2)
    keep = torch.tensor([[True, False], [True, True], [False, True]])

    def both(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("c", 2, dim=-1), pyro.plate("n", 3, dim=-2):
            way(loc, y, keep)

    out = to_arviz(short(both), y, num_samples=20, num_chains=2, num_prior=0)
    exact = dist.Normal(get(out, "posterior", "loc").unsqueeze(-1), 1.0).log_prob(y[keep])
    torch.testing.assert_close(get(out, "log_likelihood", "y"), exact)
    assert coord(out, "log_likelihood", "y", "y_observed") == [0, 2, 3, 5]
    assert az.loo(out).n_data_points == 4


def test_vectors_of_which_a_part_is_there_are_one_data_point():
    y, nan = data(6).reshape(3, 2), math.nan
    y[0] = nan
    y[1, 0] = nan

    def vectors(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 3):
            pyro.sample("y", dist.NanMaskedMultivariateNormal(loc.expand(2), torch.eye(2)), obs=y)

    out = to_arviz(short(vectors), y, num_samples=5, num_chains=2, num_prior=0, posterior_predictive=False)
    each = dist.Normal(get(out, "posterior", "loc")[..., None, None], 1.0, validate_args=False).log_prob(y[1:])
    torch.testing.assert_close(get(out, "log_likelihood", "y"), each.nansum(-1))
    assert coord(out, "log_likelihood", "y", "y_observed") == [1, 2]


def test_a_mask_that_moves_keeps_what_is_ever_observed():
    def moving(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("n", len(x)), poutine.mask(mask=loc < torch.tensor([-9.0, 0.0, 9.0])):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    x = data(3)
    out = to_arviz(short(moving), x, num_samples=20, num_chains=2, num_prior=0)
    loc = get(out, "posterior", "loc").unsqueeze(-1)
    exact = torch.where(loc < torch.tensor([0.0, 9.0]), dist.Normal(loc, 1.0).log_prob(x[1:]), torch.zeros(()))
    torch.testing.assert_close(get(out, "log_likelihood", "x"), exact)


def test_padding_is_no_data():
    dmm, (x, lengths) = make_dmm()
    out = export(dmm, x, lengths)
    for t in range(5):
        if (t < lengths).any():
            values = get(out, "log_likelihood", f"x_{t + 1}")
            assert values.shape[2] == (t < lengths).sum() and (values < 0).all()
        else:
            assert f"x_{t + 1}" not in out["log_likelihood"].data_vars


def test_factors_are_named(caplog):
    """A censored likelihood as a factor is in the posterior, and in nothing else."""
    t, censored = torch.tensor([0.5, 1.2, 3.0]), torch.tensor([False, False, True])

    def survival(t: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(1.0, 1.0))
        with pyro.plate("n", len(t)):
            with poutine.mask(mask=~censored):
                pyro.sample("t", dist.Exponential(rate), obs=t)
            with poutine.mask(mask=censored):
                pyro.factor("survived", -rate * t)

    with caplog.at_level(logging.WARNING, "pyro_shortrun"):
        out = export(survival, t)
    assert "pyro.factor terms ['survived']" in caplog.text
    assert out["log_likelihood"]["t"].shape[2:] == (2,)


def test_the_energy_of_a_prior_is_no_such_factor(caplog):
    def tilted(x: Tensor) -> None:
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            energy_prior("ebm", lambda z: 0.1 * z.square(), z)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with caplog.at_level(logging.WARNING, "pyro_shortrun"):
        export(tilted, data(3))
    assert "pyro.factor" not in caplog.text


def test_obs_mask():
    """Pyro makes of a partly observed site a data site, a latent and a deterministic site."""
    keep = torch.tensor([True, False, True, True, False])

    def partly(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, NOISE), obs=x, obs_mask=keep)

    x = data()
    out = export(partly, x)
    loc = get(out, "posterior", "loc").unsqueeze(-1)
    exact = dist.Normal(loc, NOISE).log_prob(x)[..., keep]
    torch.testing.assert_close(get(out, "log_likelihood", "x_observed"), exact)
    filled = torch.where(keep, x, get(out, "posterior", "x_unobserved"))
    torch.testing.assert_close(get(out, "posterior", "x"), filled, rtol=0, atol=0)


def test_multivariate_events_are_one_observation():
    two_layer, (x,) = make_two_layer()
    out = export(two_layer, x)
    assert dims(out, "observed_data", "x") == ("rows", "x_dim_1")
    assert dims(out, "log_likelihood", "x") == ("rows",)

    def multivariate(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.MultivariateNormal(loc, torch.eye(3)), obs=x)

    x = data(12).reshape(4, 3)
    out = export(multivariate, x)
    loc = get(out, "posterior", "loc").unsqueeze(-2)
    exact = dist.MultivariateNormal(loc, torch.eye(3)).log_prob(x)
    torch.testing.assert_close(get(out, "log_likelihood", "x"), exact)


def test_nested_plates():
    nested, (y,) = make_nested_both()
    out = export(nested, y)
    assert dims(out, "posterior", "z") == dims(out, "observed_data", "y") == ("groups", "members")
    assert dims(out, "posterior", "centre") == ("groups", "centre_dim_1")
    exact = dist.Normal(get(out, "posterior", "z"), 0.5).log_prob(y)
    torch.testing.assert_close(get(out, "log_likelihood", "y"), exact)


# ------------------------------------------------------------------------------------------------ in distribution


def check_moments(draws: Tensor, mean: Tensor, cov: Tensor) -> None:
    """Means and covariances of Gaussian ``(draws, dim)`` within 5 standard errors."""
    error = (cov.diagonal() / len(draws)).sqrt()
    assert ((draws.mean(0) - mean).abs() < 5 * error).all()
    spread = ((cov.diagonal().unsqueeze(-1) * cov.diagonal() + cov**2) / len(draws)).sqrt()
    assert ((draws.T.cov() - cov).abs() < 5 * spread).all()


def test_predictions_and_prior_in_distribution():
    """Joint moments of ``(loc, x_1, ..., x_n)``; more draws than are made at once; seeded."""
    x = data()
    out = to_arviz(still(model, around_posterior(1.0)), x, num_samples=1500, num_chains=2, num_prior=3000)
    center, deviation = posterior(x)
    for latent, replicated, mean, var in (
        ("posterior", "posterior_predictive", center, deviation**2),
        ("prior", "prior_predictive", torch.zeros(()), torch.ones(())),
    ):
        joint = torch.cat([get(out, latent, "loc").unsqueeze(-1), get(out, replicated, "x")], -1).flatten(0, 1)
        cov = var + NOISE**2 * torch.eye(6)
        cov[0, 0] = var
        check_moments(joint, mean.expand(6), cov)


def test_discrete_latents_are_drawn_anew():
    """``P(k = 1) = 0.7`` in every row of the predictions, whatever the datum's own assignment; seeded, 5 sigma."""

    @config_enumerate
    def sides(x: Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.1))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.7))
            pyro.sample("x", dist.Normal(20 * k - 10, scale), obs=x)

    out = export(sides, torch.tensor([-10.0, 10.0]), num_samples=500, num_prior=1000)
    for group in ("posterior_predictive", "prior_predictive"):
        right = (get(out, group, "x") > 0).flatten(0, 1).to(torch.get_default_dtype())
        assert ((right.mean(0) - 0.7).abs() < 5 * (0.21 / 1000) ** 0.5).all()
        assert abs(right.T.cov()[0, 1].item()) < 5 * 0.21 / 1000**0.5
