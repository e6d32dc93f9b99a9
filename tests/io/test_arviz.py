"""Export to ArviZ, whichever of its versions is installed: ``InferenceData`` (0.x) or ``DataTree`` (1.x)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, config_enumerate
from pyro.infer.autoguide import AutoNormal
from pyro.infer.mcmc.api import StreamingMCMC
from pyro.infer.reparam import LocScaleReparam
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import kl_divergence
from zoo import (
    CASES,
    EXTRA,
    eight_schools,
    make_dmm,
    make_eight_schools,
    make_hmm,
    make_masked,
    make_mixture,
    make_nested_both,
    make_subsampled_mixture,
    make_two_layer,
    subsampled_mixture,
    subsampled_mixture_plates,
)

from pyro_shortrun import Langevin, Persistent, ShortRunGuide, ShortRunLangevin, StepSize, VectorizedMCMC, to_arviz

NOISE = 0.8
KERNEL_STATS = {"lp", "acceptance_rate", "grad_norm", "step_size", "nonfinite", "diverging"}
GUIDE_STATS = {"log_p", "log_q", "lp", "nonfinite", "diverging"}
GROUPS = {
    "posterior",
    "sample_stats",
    "log_likelihood",
    "posterior_predictive",
    "prior",
    "prior_predictive",
    "observed_data",
}


def model(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, NOISE), obs=x)


def local(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


def data(n: int = 5) -> Tensor:
    return torch.linspace(-1.0, 2.0, n)


def posterior(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of ``loc``."""
    precision = 1 + len(x) / NOISE**2
    return x.sum() / NOISE**2 / precision, torch.as_tensor(precision**-0.5)


def evidence(x: Tensor) -> float:
    cov = NOISE**2 * torch.eye(len(x)) + 1.0
    return dist.MultivariateNormal(torch.zeros(len(x)), cov).log_prob(x).item()


def around_posterior(width: float) -> Callable:
    def start(x: Tensor) -> None:
        mean, deviation = posterior(x)
        pyro.sample("loc", dist.Normal(mean, width * deviation))

    return start


def still(target: Callable, start: Callable, **options: Any) -> ShortRunGuide:
    """A guide that stays where it starts."""
    dynamics = Langevin(StepSize(1e-9, learnable=False), noise=False)
    return ShortRunGuide(target, num_steps=1, dynamics=dynamics, start=start, **options)


def short(target: Callable, **options: Any) -> ShortRunGuide:
    return ShortRunGuide(target, num_steps=2, step_size=StepSize(1e-3, learnable=False), **options)


def export(target: Callable, *args: Any, create_plates: Callable | None = None, **options: Any) -> Any:
    options = {"num_samples": 3, "num_chains": 2, "num_prior": 4, **options}
    return to_arviz(short(target, create_plates=create_plates), *args, **options)


def groups(exported: Any) -> set[str]:
    return set(exported.children) if hasattr(exported, "children") else set(exported.groups())


def get(exported: Any, group: str, name: str) -> Tensor:
    return torch.tensor(exported[group][name].values)


def dims(exported: Any, group: str, name: str) -> tuple[str, ...]:
    """Those after (chain, draw)."""
    names = exported[group][name].dims
    if group != "observed_data":
        assert names[:2] == ("chain", "draw")
        names = names[2:]
    return names


def coord(exported: Any, group: str, name: str, dim: str) -> list:
    return exported[group][name].coords[dim].values.tolist()


def equal(a: Mapping[str, Tensor], exported: Any, group: str = "posterior") -> None:
    assert set(a) == set(exported[group].data_vars)
    for name, value in a.items():
        torch.testing.assert_close(get(exported, group, name).cpu(), value.cpu(), rtol=0, atol=0)


def log_weights(exported: Any) -> Tensor:
    return get(exported, "sample_stats", "log_p") - get(exported, "sample_stats", "log_q")


# ------------------------------------------------------------------------------------------------ every model


def expected(site: Any) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names and sizes of a site's dimensions, by Pyro's own trace."""
    fn = site["fn"]
    plates = {f.dim: f.name for f in site["cond_indep_stack"] if f.vectorized}
    sizes = {f.name: f.size for f in site["cond_indep_stack"]}
    names = []
    for i, size in enumerate((*fn.batch_shape, *fn.event_shape)):
        plate = plates.get(i - len(fn.batch_shape))
        names.append(plate if plate is not None and sizes[plate] == size else f"{site['name']}_dim_{i}")
    return tuple(names), (*fn.batch_shape, *fn.event_shape)


@pytest.mark.parametrize("case", CASES + EXTRA, ids=lambda c: c.name)
def test_every_model_is_exported(case, dtype):
    zoo_model, args = case.make()
    guide = ShortRunGuide(
        zoo_model, num_steps=2, step_size=StepSize(1e-6, learnable=False), create_plates=case.create_plates
    )
    out = to_arviz(guide, *args, num_samples=3, num_chains=2, num_prior=4)
    nodes = poutine.trace(zoo_model).get_trace(*args).nodes
    sites = {k: s for k, s in nodes.items() if s["type"] == "sample" and not site_is_subsample(s)}
    computed = {"theta"} if case.name == "reparam" else set()
    observed = {k for k, s in sites.items() if s["is_observed"]} - computed
    latent = set(sites) - observed - computed - set(case.discrete)
    plates = {k: s for k, s in nodes.items() if s["type"] == "sample" and site_is_subsample(s)}

    assert groups(out) == (GROUPS - {"log_likelihood"} if case.name == "hmm" else GROUPS)
    wanted = {
        "posterior": (latent | computed, (2, 3)),
        "log_likelihood": (observed, (2, 3)),
        "posterior_predictive": (observed, (2, 3)),
        "prior_predictive": (observed, (1, 4)),
        "observed_data": (observed, ()),
    }
    for group in groups(out) & set(wanted):
        names, front = wanted[group]
        assert set(out[group].data_vars) == names
        for name in names:
            labels, sizes = expected(sites[name])
            if group == "log_likelihood":
                batch = len(sites[name]["fn"].batch_shape)
                labels, sizes = labels[:batch], sizes[:batch]
            assert dims(out, group, name) == labels
            assert out[group][name].shape == (*front, *sizes)
            assert np.isfinite(out[group][name].values).all()
    assert latent <= set(out["prior"].data_vars) <= latent | computed
    assert set(out["sample_stats"].data_vars) == GUIDE_STATS
    assert all(v.shape == (2, 3) for v in out["sample_stats"].data_vars.values())
    for group in groups(out):
        assert out[group].attrs["inference_library"] == "pyro_shortrun"
        for plate in set(plates) & set(out[group].coords):
            index, size = out[group].coords[plate].values, int(plates[plate]["fn"].size)
            if len(index) == size:
                assert index.tolist() == list(range(size))
            else:
                assert len(set(index.tolist())) == len(plates[plate]["value"])
                assert 0 <= index.min() <= index.max() < size


@pytest.mark.parametrize("case", [c for c in CASES + EXTRA if not c.discrete], ids=lambda c: c.name)
def test_log_p_is_the_log_joint_of_the_trace(case, dtype):
    zoo_model, args = case.make()
    guide = ShortRunGuide(zoo_model, num_steps=2, step_size=StepSize(1e-6, learnable=False))
    options = {"num_prior": 0, "log_likelihood": False, "posterior_predictive": False}
    out = to_arviz(guide, *args, num_samples=2, num_chains=2, **options)
    latent = [s.name for s in guide._first.layout.sites]
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        at = poutine.condition(zoo_model, {k: get(out, "posterior", k)[i, j] for k in latent})
        joint = poutine.trace(at).get_trace(*args).log_prob_sum()
        torch.testing.assert_close(get(out, "sample_stats", "log_p")[i, j], joint)


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

    def gamma_poisson(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(2.0, 0.5))
            pyro.sample("x", dist.Poisson(rate), obs=x)

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
    guide = ShortRunGuide(model, num_steps=steps, dynamics=Langevin(StepSize(eta, learnable=False), noise=False))
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


def test_weights_of_noisy_runs_estimate_the_evidence():
    """log_q is that given the noise path, for which importance weights are unbiased; seeded, 5 standard errors."""
    x = data()
    guide = ShortRunGuide(model, num_steps=5, step_size=StepSize(0.02, learnable=False))
    weights = (log_weights(to_arviz(guide, x, num_samples=1000, num_chains=4)) - evidence(x)).exp()
    assert weights.mean().item() == pytest.approx(1.0, abs=5 * weights.std().item() / 4000**0.5)


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

    guide = ShortRunGuide(poisson, num_steps=2, step_size=StepSize(1e6, max=1e7, learnable=False))
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


def test_masked_observations_count_nothing():
    masked, (y,) = make_masked()
    out = export(masked, y)
    level, spread = get(out, "posterior", "level"), get(out, "posterior", "spread")
    exact = dist.Normal(level, 0.1 + spread).log_prob(y)
    exact[..., ::3] = 0.0
    torch.testing.assert_close(get(out, "log_likelihood", "y"), exact)


def test_padding_counts_nothing():
    dmm, (x, lengths) = make_dmm()
    out = export(dmm, x, lengths)
    for t in range(5):
        values = get(out, "log_likelihood", f"x_{t + 1}")
        assert (values[..., t >= lengths] == 0).all()
        assert (values[..., t < lengths] < 0).all()


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
    exact = torch.where(keep, dist.Normal(loc, NOISE).log_prob(x), torch.zeros(()))
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


# ------------------------------------------------------------------------------------------------ names, coordinates


def test_data_are_broadcast_to_the_plates():
    def broadcast(x: Tensor) -> None:
        with pyro.plate("groups", 2, dim=-3), pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, NOISE), obs=x)

    x = data(4)
    out = export(broadcast, x)
    assert dims(out, "posterior", "z") == ("groups", "z_dim_1", "data")
    equal({"x": x.expand(2, 1, 4)}, out, "observed_data")
    exact = dist.Normal(get(out, "posterior", "z"), NOISE).log_prob(x)
    torch.testing.assert_close(get(out, "log_likelihood", "x"), exact)


def test_coordinates_of_a_subsampled_plate_are_its_indices():
    def subsampled(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample_size=4) as index:
            pyro.sample("x", dist.Normal(loc, NOISE), obs=x[index])

    x = torch.arange(20.0) / 10
    for out in (export(subsampled, x), to_arviz(run_mcmc(ShortRunLangevin(subsampled, 2, persistent=True), x))):
        for group in ("observed_data", "log_likelihood", "posterior_predictive"):
            index = coord(out, group, "x", "data")
            assert len(set(index)) == 4
            torch.testing.assert_close(get(out, "observed_data", "x"), x[index], rtol=0, atol=0)
        exact = dist.Normal(get(out, "posterior", "loc").unsqueeze(-1), NOISE).log_prob(x[index])
        torch.testing.assert_close(get(out, "log_likelihood", "x"), exact)


@pytest.mark.parametrize("plate", ["draw", "chain", "sample"])
def test_plates_that_arviz_would_mistake_are_renamed(plate):
    def named(x: Tensor) -> None:
        with pyro.plate(plate, len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    out = export(named, data())
    assert dims(out, "posterior", "z") == dims(out, "observed_data", "x") == (f"{plate}_plate",)
    assert out["posterior"]["z"].shape == (2, 3, 5)
    assert coord(out, "posterior", "z", f"{plate}_plate") == list(range(5))


@pytest.mark.parametrize("name", ["lp", "diverging", "log_p"])
def test_sites_named_like_a_statistic(name):
    def named(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample(name, dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    out = export(named, data())
    assert dims(out, "posterior", f"{name}_site") == ("data",)
    assert dims(out, "sample_stats", name) == ()


@pytest.mark.parametrize("name, exported", [("draw", "draw_site"), ("scope/z", "scope.z")])
def test_sites_named_as_arviz_does_not_allow(name, exported, tmp_path):
    def named(x: Tensor) -> None:
        z = pyro.sample(name, dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x.sum())

    out = export(named, data())
    assert get(out, "posterior", exported).shape == (2, 3)
    out.to_netcdf(str(tmp_path / "out.nc"))


def test_sequential_plates_have_no_dimension():
    def sequential(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"x_{i}", dist.Normal(loc, NOISE), obs=x[i])

    x = data(3)
    out = export(sequential, x)
    for i in range(3):
        exact = dist.Normal(get(out, "posterior", "loc"), NOISE).log_prob(x[i])
        torch.testing.assert_close(get(out, "log_likelihood", f"x_{i}"), exact)


@pytest.mark.parametrize("event_dim", [0, None], ids=["event_dim=0", "default"])
def test_deterministic_sites(event_dim):
    """Pyro's default event_dim takes the value's plate dims for event dims; the value is the same."""

    def computed(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.deterministic("twice", 2 * loc)
        pyro.deterministic("pair", torch.stack([loc, -loc], -1), event_dim=1)
        with pyro.plate("data", len(x)):
            mean = pyro.deterministic("mean", loc + torch.arange(len(x)), event_dim=event_dim)
            pyro.sample("x", dist.Normal(mean, NOISE), obs=x)

    out = export(computed, data())
    loc = get(out, "posterior", "loc")
    wanted = {
        "loc": loc,
        "twice": 2 * loc,
        "pair": torch.stack([loc, -loc], -1),
        "mean": loc.unsqueeze(-1) + torch.arange(5),
    }
    equal(wanted, out)
    assert dims(out, "posterior", "pair") == ("pair_dim_0",)
    assert dims(out, "posterior", "mean") in [("data",), ("mean_dim_0",)]
    assert set(out["observed_data"].data_vars) == set(out["posterior_predictive"].data_vars) == {"x"}


@pytest.mark.parametrize("centered", [0.0, 0.4])
def test_reparametrised_sites(centered):
    _, args = make_eight_schools()
    out = export(poutine.reparam(eight_schools, config={"theta": LocScaleReparam(centered)}), *args)
    mu, tau, auxiliary = (get(out, "posterior", k) for k in ("mu", "tau", "theta_decentered"))
    mu, tau = mu.unsqueeze(-1), tau.unsqueeze(-1)
    theta = mu + tau ** (1 - centered) * (auxiliary - centered * mu)
    torch.testing.assert_close(get(out, "posterior", "theta"), theta)
    assert dims(out, "posterior", "theta") == ("schools",)
    assert set(out["observed_data"].data_vars) == {"y"}


def test_names_and_coordinates_given_by_the_user():
    def vectors(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, NOISE).to_event(1), obs=x)

    x = data(6).reshape(3, 2)
    coords = {"data": list("abc"), "axis": ["east", "north"]}
    out = export(vectors, x, coords=coords, dims={"z": ["axis"], "x": ["data", "axis"]})
    for group, name, wanted in (
        ("posterior", "z", ("axis",)),
        ("prior", "z", ("axis",)),
        ("observed_data", "x", ("data", "axis")),
        ("posterior_predictive", "x", ("data", "axis")),
        ("log_likelihood", "x", ("data",)),
    ):
        assert dims(out, group, name) == wanted
        for dim in wanted:
            assert coord(out, group, name, dim) == coords[dim]


# ------------------------------------------------------------------------------------------------ groups


@pytest.mark.parametrize(
    "options,gone",
    [
        ({"num_prior": 0}, {"prior", "prior_predictive"}),
        ({"log_likelihood": False}, {"log_likelihood"}),
        ({"posterior_predictive": False}, {"posterior_predictive"}),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_groups_can_be_left_out(options, gone):
    assert groups(export(model, data(), **options)) == GROUPS - gone


def test_a_model_without_data():
    def energy() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("energy", -(z**4))

    out = export(energy)
    assert groups(out) == {"posterior", "sample_stats", "prior"}
    assert set(out["posterior"].data_vars) == {"z"}


def test_conditioned_model():
    """Data by ``poutine.condition`` are data like those by ``obs=``."""

    def free(n: int) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", n):
            pyro.sample("x", dist.Normal(loc, NOISE))

    x = data()
    pyro.set_rng_seed(3)
    conditioned = export(poutine.condition(free, {"x": x}), len(x))
    pyro.set_rng_seed(3)
    observed = export(model, x)
    assert groups(conditioned) == GROUPS
    for group in GROUPS:
        equal({k: get(observed, group, k) for k in observed[group].data_vars}, conditioned, group)


def test_conditioned_guide_needs_no_arguments():
    x = data()
    guide = short(model).setup(x).condition_on(x)
    pyro.set_rng_seed(2)
    out = to_arviz(guide, num_samples=3, num_chains=2)
    equal({"x": x}, out, "observed_data")
    pyro.set_rng_seed(2)
    again = to_arviz(guide.forget(), x, num_samples=3, num_chains=2)
    for group in GROUPS:
        equal({k: get(again, group, k) for k in again[group].data_vars}, out, group)


def test_a_start_without_density_has_no_weights():
    out = to_arviz(short(model, start=Persistent()), data(), num_samples=3, num_chains=2)
    assert set(out["sample_stats"].data_vars) == {"nonfinite", "diverging"}
    assert groups(out) == GROUPS


def test_a_learned_start_and_training_mode():
    """The last draws' statistics are exact in training mode as well, also where log q would be carried over."""
    guide = ShortRunGuide(model, num_steps=2, step_size=StepSize(0.01), start=AutoNormal(model), tune_every=3)
    guide(data())
    guide(data())
    stats = []
    for mode in (True, False):
        guide.train(mode)
        pyro.set_rng_seed(0)
        out = to_arviz(guide, data(), num_samples=3, num_chains=2)
        stats.append({k: get(out, "sample_stats", k) for k in GUIDE_STATS})
    equal(stats[0], out, "sample_stats")


def test_improper_prior_is_not_exported(caplog):
    def improper(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.ImproperUniform(dist.constraints.real, (), ()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, NOISE), obs=x)

    mcmc = run_vectorized(ShortRunLangevin(improper, num_steps=2, adjust=True), data())
    with caplog.at_level(logging.WARNING, "pyro_shortrun"):
        out = to_arviz(mcmc)
    assert groups(out) == GROUPS - {"prior", "prior_predictive"}
    assert "no prior is exported" in caplog.text


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


# ------------------------------------------------------------------------------------------------ chains


def run_mcmc(kernel: Any, *args: Any, **options: Any) -> MCMC:
    mcmc = MCMC(kernel, num_samples=6, warmup_steps=4, disable_progbar=True, **options)
    mcmc.run(*args)
    return mcmc


def run_vectorized(kernel: ShortRunLangevin, *args: Any, **options: Any) -> VectorizedMCMC:
    mcmc = VectorizedMCMC(kernel, num_samples=6, warmup_steps=4, num_chains=3, disable_progbar=True, **options)
    mcmc.run(*args)
    return mcmc


CHAINS: dict[str, Callable[[Callable, Tensor], Any]] = {
    "MALA": lambda m, x: run_mcmc(ShortRunLangevin(m, num_steps=2, adjust=True), x),
    "ULA": lambda m, x: run_mcmc(ShortRunLangevin(m, num_steps=2, step_size=0.01, persistent=True), x),
    "short runs": lambda m, x: run_mcmc(ShortRunLangevin(m, num_steps=2), x),
    "vectorized MALA": lambda m, x: run_vectorized(ShortRunLangevin(m, num_steps=2, adjust=True), x),
    "vectorized ULA": lambda m, x: run_vectorized(ShortRunLangevin(m, 2, step_size=0.01, persistent=True), x),
    "vectorized short runs": lambda m, x: run_vectorized(ShortRunLangevin(m, num_steps=2), x),
    "NUTS": lambda m, x: run_mcmc(NUTS(m), x),
}
each_chain = pytest.mark.parametrize("kind", CHAINS)


@each_chain
def test_chains_are_exported(kind):
    x = data()
    mcmc = CHAINS[kind](model, x)
    out = to_arviz(mcmc, num_prior=4)
    assert groups(out) == GROUPS
    equal(mcmc.get_samples(group_by_chain=True), out)
    shape = (3 if "vectorized" in kind else 1, 6)
    loc = get(out, "posterior", "loc")
    assert loc.shape == shape
    torch.testing.assert_close(get(out, "log_likelihood", "x"), dist.Normal(loc.unsqueeze(-1), NOISE).log_prob(x))
    assert out["posterior_predictive"]["x"].shape == (*shape, 5)
    equal({"x": x}, out, "observed_data")
    stats = out["sample_stats"]
    assert set(stats.data_vars) == ({"diverging"} if kind == "NUTS" else KERNEL_STATS)
    assert all(v.shape == shape for v in stats.data_vars.values())
    assert stats["diverging"].dtype == bool


@pytest.mark.parametrize("kind", [k for k in CHAINS if k != "NUTS"])
def test_statistics_of_chains_are_those_of_their_draws(kind):
    x = data()
    mcmc = CHAINS[kind](local, x)
    out = to_arviz(mcmc, num_prior=0)
    if "vectorized" in kind:
        stats = mcmc.sample_stats
    else:
        stats = {k: v.unsqueeze(0) for k, v in mcmc.diagnostics()["sample_stats"]["chain 0"].values.items()}
    equal({**stats, "diverging": stats["nonfinite"] > 0}, out, "sample_stats")
    z = get(out, "posterior", "z")
    joint = dist.LogNormal(0.0, 1.0).log_prob(z) + dist.Normal(z, NOISE).log_prob(x) + z.log()
    rest = get(out, "sample_stats", "lp") - joint.sum(-1)
    torch.testing.assert_close(rest, rest.mean().expand_as(rest), rtol=0, atol=1e-5)  # up to a constant
    rate = get(out, "sample_stats", "acceptance_rate")
    assert ((rate >= 0) & (rate <= 1)).all()
    assert (get(out, "sample_stats", "step_size") > 0).all()


def test_chains_of_mcmc_stay_apart(monkeypatch):
    """Two chains, one after the other in this process."""
    monkeypatch.setattr("pyro.infer.mcmc.api.mp.cpu_count", lambda: 1)
    with pytest.warns(UserWarning, match="sequentially"):
        mcmc = run_mcmc(ShortRunLangevin(model, num_steps=2, adjust=True), data(), num_chains=2)
    out = to_arviz(mcmc, num_prior=0)
    equal(mcmc.get_samples(group_by_chain=True), out)
    reports = mcmc.diagnostics()["sample_stats"]
    lp = torch.stack([reports[f"chain {i}"].values["lp"] for i in range(2)])
    torch.testing.assert_close(get(out, "sample_stats", "lp").cpu(), lp, rtol=0, atol=0)
    assert not torch.equal(lp[0], lp[1])


def test_divergences_of_nuts():
    """A step size far too large; what Pyro reports is what is exported."""
    mcmc = MCMC(NUTS(model, step_size=1e4, adapt_step_size=False), 20, warmup_steps=0, disable_progbar=True)
    mcmc.run(data())
    diverging = get(to_arviz(mcmc, num_prior=0), "sample_stats", "diverging")
    assert diverging.shape == (1, 20)
    assert diverging[0].nonzero().flatten().tolist() == mcmc.diagnostics()["divergences"]["chain 0"]
    assert diverging.any()


@pytest.mark.parametrize("kind", ["MALA", "vectorized MALA", "NUTS"])
def test_chains_on_other_data(kind):
    mcmc, other = CHAINS[kind](model, data()), data(3) + 5
    out = to_arviz(mcmc, other, num_prior=4)
    equal(mcmc.get_samples(group_by_chain=True), out)
    equal({"x": other}, out, "observed_data")
    assert out["log_likelihood"]["x"].shape[2:] == (3,)


def energy(params: Mapping[str, Tensor]) -> Tensor:
    return 0.5 * params["z"].square().sum()


POTENTIALS: dict[str, tuple[Callable[[], Any], set[str]]] = {
    "MCMC": (
        lambda: run_mcmc(
            ShortRunLangevin(potential_fn=energy, num_steps=2, adjust=True), initial_params={"z": torch.zeros(4)}
        ),
        KERNEL_STATS,
    ),
    "VectorizedMCMC": (
        lambda: run_vectorized(
            ShortRunLangevin(potential_fn=energy, num_steps=2, adjust=True), initial_params={"z": torch.zeros(3, 4)}
        ),
        KERNEL_STATS,
    ),
    "NUTS": (lambda: run_mcmc(NUTS(potential_fn=energy), initial_params={"z": torch.zeros(4)}), {"diverging"}),
}


@pytest.mark.parametrize("kind", POTENTIALS)
def test_potential_functions_have_draws_and_statistics_only(kind):
    make, stats = POTENTIALS[kind]
    mcmc = make()
    out = to_arviz(mcmc)
    assert groups(out) == {"posterior", "sample_stats"}
    equal(mcmc.get_samples(group_by_chain=True), out)
    assert dims(out, "posterior", "z") == ("z_dim_0",)
    assert set(out["sample_stats"].data_vars) == stats


@pytest.mark.skipif(not hasattr(az, "from_pyro"), reason="arviz 1.x has no from_pyro")
@each_chain
def test_from_pyro(kind):
    """ArviZ's own door sees the same draws, likelihoods and divergences."""
    mcmc = CHAINS[kind](model, data())
    ours, theirs = to_arviz(mcmc, num_prior=0), az.from_pyro(mcmc)
    for group in ("posterior", "log_likelihood", "observed_data"):
        assert set(ours[group].data_vars) == set(theirs[group].data_vars)
        for name in ours[group].data_vars:
            torch.testing.assert_close(get(theirs, group, name), get(ours, group, name))
    assert (theirs["sample_stats"]["diverging"].values == ours["sample_stats"]["diverging"].values).all()


# ------------------------------------------------------------------------------------------------ errors


def streaming() -> StreamingMCMC:
    mcmc = StreamingMCMC(ShortRunLangevin(model, num_steps=2), 3, 3, disable_progbar=True)
    mcmc.run(data())
    return mcmc


ERRORS: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "a model": (lambda: model, {}, "ShortRunGuide.*function"),
    "another guide": (lambda: AutoNormal(model), {}, "ShortRunGuide.*AutoNormal"),
    "a class": (lambda: ShortRunGuide, {}, "to_arviz takes"),
    "StreamingMCMC": (streaming, {}, "StreamingMCMC"),
    "MCMC not run": (lambda: MCMC(NUTS(model), 3), {}, "run"),
    "VectorizedMCMC not run": (lambda: VectorizedMCMC(ShortRunLangevin(model), 3), {}, "run"),
    "num_samples=0": (lambda: short(model), {"num_samples": 0}, "num_samples"),
    "num_samples=True": (lambda: short(model), {"num_samples": True}, "num_samples"),
    "num_chains=-1": (lambda: short(model), {"num_chains": -1}, "num_chains"),
    "num_chains=1.5": (lambda: short(model), {"num_chains": 1.5}, "num_chains"),
    "num_prior=-1": (lambda: short(model), {"num_prior": -1}, "num_prior"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    make, options, match = ERRORS[case]
    source = make()
    with pytest.raises(ValueError, match=match):
        to_arviz(source, data(), **options)


# ------------------------------------------------------------------------------------------------ ArviZ's own functions


def posterior_draws(draws: int = 1000) -> Any:
    return to_arviz(still(model, around_posterior(1.0)), data(), num_samples=draws, num_prior=10)


def test_summary():
    """Means and R-hat of exact posterior draws; seeded, 5 standard errors."""
    table = az.summary(posterior_draws())
    mean, deviation = posterior(data())
    assert list(table.index) == ["loc"]
    assert float(table["mean"]["loc"]) == pytest.approx(mean.item(), abs=5 * deviation.item() / 4000**0.5 + 0.006)
    assert float(table["r_hat"]["loc"]) < 1.02
    assert float(table["ess_bulk"]["loc"]) > 3000


def exact_loo(x: Tensor) -> float:
    """``sum_i log p(x_i | all others)``."""
    total = 0.0
    for i in range(len(x)):
        mean, deviation = posterior(torch.cat([x[:i], x[i + 1 :]]))
        total += dist.Normal(mean, (deviation**2 + NOISE**2) ** 0.5).log_prob(x[i]).item()
    return total


def test_loo():
    result = az.loo(posterior_draws(), pointwise=True)
    elpd = result.elpd if hasattr(result, "elpd") else result.elpd_loo
    assert float(elpd) == pytest.approx(exact_loo(data()), abs=0.1)
    assert result.pareto_k.shape == (5,)
    assert result.pareto_k.dims == ("data",)


@pytest.mark.skipif(not hasattr(az, "loo_approximate_posterior"), reason="arviz 0.x has none")
def test_loo_of_an_approximation():
    """Draws that are half as wide again as the posterior, weighed by log_p and log_q."""
    out = to_arviz(still(model, around_posterior(1.5)), data())
    stats = out["sample_stats"]
    result = az.loo_approximate_posterior(out, stats["log_p"], stats["log_q"])
    assert float(result.elpd) == pytest.approx(exact_loo(data()), abs=0.1)


@pytest.mark.parametrize("kind", ["guide", "vectorized short runs"])
def test_plot_trace(kind):
    out = export(model, data(), num_samples=10) if kind == "guide" else to_arviz(CHAINS[kind](model, data()))
    for name in ("plot_trace", "plot_trace_dist"):
        if hasattr(az, name):
            assert getattr(az, name)(out) is not None


NETCDF: dict[str, Callable[[], Any]] = {
    "guide": lambda: export(local, data()),
    "subsampled": lambda: export(subsampled_mixture, *make_subsampled_mixture()[1]),
    "MCMC": lambda: to_arviz(CHAINS["MALA"](model, data())),
    "VectorizedMCMC": lambda: to_arviz(CHAINS["vectorized MALA"](model, data())),
    "coordinates": lambda: export(model, data(3), coords={"data": ["a", "b", "c"]}),
}


@pytest.mark.parametrize("kind", NETCDF)
def test_netcdf_round_trip(kind, tmp_path):
    pytest.importorskip("h5netcdf")
    out = NETCDF[kind]()
    path = str(tmp_path / "draws.nc")
    out.to_netcdf(path)
    back = az.from_netcdf(path)
    assert groups(back) == groups(out)
    for group in groups(out):
        assert back[group].attrs["inference_library"] == out[group].attrs["inference_library"] == "pyro_shortrun"
        assert set(back[group].data_vars) == set(out[group].data_vars)
        for name, variable in out[group].data_vars.items():
            assert back[group][name].dims == variable.dims
            np.testing.assert_array_equal(back[group][name].values, variable.values)
            for dim in variable.dims:
                assert coord(back, group, name, dim) == coord(out, group, name, dim)


def test_observations_without_a_plate():
    def free(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    out = export(free, data())
    assert out["log_likelihood"]["x"].shape[2:] == data().shape
    exact = dist.Normal(get(out, "posterior", "loc").unsqueeze(-1), 1.0).log_prob(data())
    torch.testing.assert_close(get(out, "log_likelihood", "x"), exact)
    assert len(get(out, "posterior_predictive", "x")[0, 0].unique()) == len(data())


def test_sites_that_were_not_kept(caplog):
    mcmc = MCMC(ShortRunLangevin(model, 2, adjust=True), 4, 2, save_params=[], disable_progbar=True)

    def two(x: Tensor) -> None:
        pyro.sample("other", dist.Normal(0.0, 1.0))
        model(x)

    mcmc = MCMC(ShortRunLangevin(two, 2, adjust=True), 4, 2, save_params=["other"], disable_progbar=True)
    mcmc.run(data())
    out = to_arviz(mcmc)
    assert set(out["posterior"].data_vars) == {"other"} and "not kept" in caplog.text
    assert "log_likelihood" not in groups(out) and "sample_stats" in groups(out)
