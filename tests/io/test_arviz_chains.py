"""Chains in ArviZ: draws and statistics of MCMC and VectorizedMCMC, and ArviZ's own functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from exported import (
    GROUPS,
    KERNEL_STATS,
    around_posterior,
    coord,
    dims,
    equal,
    export,
    get,
    groups,
    local,
    run_mcmc,
    run_vectorized,
    still,
)
from programs import NOISE, data
from programs import located as model
from programs import located_at as posterior
from pyro.infer import MCMC, NUTS
from torch import Tensor
from zoo import make_subsampled_mixture, subsampled_mixture

from pyro_shortrun import ShortRunLangevin, to_arviz

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
