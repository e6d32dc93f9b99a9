"""Importance weights, simulation-based calibration and nested R-hat against what is known exactly."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import NOISE, located_at
from programs import located as model
from pyro import poutine
from pyro.infer.autoguide import (
    AutoDelta,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from torch import Tensor, nn

from pyro_shortrun import (
    LangevinEncoderGuide,
    Linearized,
    Persistent,
    Prior,
    ShortRunGuide,
    ShortRunLangevin,
    StepSize,
    VectorizedMCMC,
    energy_prior,
    psis,
    to_arviz,
)
from pyro_shortrun.diagnostics import SBC, Chains, Trained, nested_rhat, plot_ecdf, plot_ranks, sbc
from pyro_shortrun.diagnostics.psis import _smooth, _weigh
from pyro_shortrun.diagnostics.sbc import _rank
from pyro_shortrun.diagnostics.uniformity import UniformBand, holm, symmetry_pvalue
from pyro_shortrun.guides.smoothing import smoothed


def local(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.log(), NOISE), obs=x)


def prior_only(z_scale: float) -> Callable:
    """A guide ``N(0, z_scale^2)``; without data the posterior is N(0, 1)."""

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(0.0, z_scale))

    return guide


def exact_guide(x: Tensor) -> None:
    pyro.sample("loc", dist.Normal(*located_at(x)))


def draws(width: float = 1.0, shift: float = 0.0, count: int = 99) -> Callable:
    """Draws that are ``width`` times as wide as the posterior, moved by ``shift`` of its standard deviations."""

    def posterior(conditioned: Callable, x: Tensor) -> dict[str, Tensor]:
        site = poutine.trace(conditioned).get_trace(x).nodes["x"]
        assert site["is_observed"]
        mean, deviation = located_at(site["value"])
        return {"loc": mean + deviation * (shift + width * torch.randn(count))}

    return posterior


def calibrate(posterior: Callable, *args: Any, target: Callable = model, **options: Any) -> SBC:
    return sbc(target, posterior, *(args or (torch.zeros(5),)), seed=0, progress=False, **options)


# ------------------------------------------------------------------------------------------------ importance weights


def test_exact_posterior_has_equal_weights():
    found = psis(model, exact_guide, torch.linspace(-1.0, 2.0, 5), num_samples=200)
    assert found.k == -torch.inf and found.rows is None
    torch.testing.assert_close(found.ess, torch.tensor(200.0))
    torch.testing.assert_close(found.log_weights, torch.full((200,), -np.log(200.0)))
    assert "fine" in str(found)


@pytest.mark.parametrize("k", [0.2, 0.6, 0.9])
def test_k_of_pareto_weights(k):
    """``U ** -k`` has tail index 1 / k. Standard error of the fit about (1 + k) / sqrt(600) = 0.07: 3 of these."""
    log_w = -k * torch.rand(40000, 1).log()
    found = _smooth(log_w, torch.zeros_like(log_w))
    assert abs(found.k.item() - k) < 0.22
    torch.testing.assert_close(found.log_weights.exp().sum(0), torch.ones(1))
    torch.testing.assert_close(found.ess, 1 / found.log_weights.exp().square().sum(0))


def test_rows_of_a_plate():
    """N(0, s^2) for N(0, 1) has ``k = 1 - s^2`` (s < 1) in the limit, and weights that are bounded for s > 1."""
    target = poutine.block(poutine.mask(local, mask=True), hide=[])

    def latent(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(0.0, 1.0))

    x = torch.zeros(3)
    narrow = psis(latent, prior_only(0.5), x, num_samples=2500)
    assert narrow.rows is not None and narrow.rows.k.shape == (3,) and narrow.rows.log_weights.shape == (2500, 3)
    assert (0.4 < narrow.rows.k).all() and (narrow.rows.k < 1.1).all()
    assert narrow.k > 0.5 and narrow.ess < narrow.rows.ess.min()
    assert "rows: " in str(narrow)
    wide = psis(latent, prior_only(1.2), x)
    assert wide.rows is not None and (wide.rows.k < 0.4).all()
    right = psis(latent, prior_only(1.0), x)
    assert right.rows is not None and (right.rows.k == -torch.inf).all() and right.k == -torch.inf
    assert psis(target, prior_only(1.0), x).k > -torch.inf


def test_verdict_in_words():
    log_p = -torch.rand(1000, 1).log()
    bad = _smooth(1.5 * log_p, torch.zeros_like(log_p))
    assert bad.threshold == pytest.approx(1 - 1 / 3)
    heavy = psis(
        model, lambda x: pyro.sample("loc", dist.Normal(located_at(x)[0], 0.2 * located_at(x)[1])), torch.zeros(5)
    )
    assert "do not use" in str(heavy)


def test_weights_of_a_run_are_those_that_are_exported():
    x = torch.linspace(-1.0, 2.0, 3)
    guide = ShortRunGuide(local, num_steps=3, step_size=StepSize(0.02, learnable=False), start=Prior())
    own, runs = guide.weighted_draws((x,), {}, 50)
    pyro.set_rng_seed(1)
    own, runs = guide.weighted_draws((x,), {}, 50)
    pyro.set_rng_seed(1)
    log_p, log_q = _weigh(own, guide, (x,), {}, 50)
    assert log_p.shape == (50, 3)
    torch.testing.assert_close((log_p - log_q).sum(1), runs.log_p - runs.log_q)
    assert psis(local, guide, x, num_samples=30).rows.k.shape == (3,)


def test_guides_without_density_are_refused():
    x = torch.zeros(3)
    with pytest.raises(NotImplementedError, match="start=Persistent"):
        psis(local, ShortRunGuide(local, start=Persistent()), x)
    with pytest.raises(NotImplementedError, match="objective=Linearized"):
        psis(local, ShortRunGuide(local, objective=Linearized(), start=Prior()), x)
    with pytest.raises(NotImplementedError, match="LangevinEncoderGuide"):
        psis(local, LangevinEncoderGuide(local, nn.Linear(1, 4)), x)
    with pytest.raises(ValueError, match="guide's"):
        psis(local, ShortRunGuide(model, start=Prior()), x)


def test_weights_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="num_samples must be >= 25"):
        psis(model, exact_guide, torch.zeros(5), num_samples=24)
    with pytest.raises(ValueError, match="at draw 0"):
        psis(model, exact_guide, torch.full((5,), torch.nan))

    def subsampled(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=2) as i:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, NOISE), obs=x[i])

    with pytest.raises(ValueError, match="full plate"):
        psis(subsampled, ShortRunGuide(subsampled, start=Prior()), torch.zeros(5))


def test_both_doors_to_arviz(monkeypatch):
    weights = np.random.default_rng(0).normal(size=(2, 100))
    lines, k = smoothed(weights)
    assert lines.shape == (2, 100) and k.shape == (2,)
    stats = ModuleType("arviz_stats.base")
    stats.array_stats = SimpleNamespace(psislw=lambda ary: (-ary, ary.sum(-1)))
    monkeypatch.setitem(sys.modules, "arviz_stats", ModuleType("arviz_stats"))
    monkeypatch.setitem(sys.modules, "arviz_stats.base", stats)
    monkeypatch.setattr(az, "__version__", "1.3.0")
    np.testing.assert_array_equal(smoothed(weights)[0], weights)


# ------------------------------------------------------------------------------------------------ uniform ranks


def test_pvalue_of_few_ranks_is_that_of_all_of_them():
    """4 ranks of 3 values: all 81 are equally probable."""
    band = UniformBand(4, 3)
    every = [np.array(r) for r in itertools.product(range(3), repeat=4)]
    levels = np.array([band.level(r) for r in every])
    for ranks, level in zip(every, levels, strict=True):
        assert band.pvalue(ranks) == pytest.approx((levels <= level * (1 + 1e-9)).mean())


def test_band_holds_with_its_probability():
    """Within 3 standard errors of 4000 simulations, from above: counts are integers."""
    band, rng = UniformBand(60, 100), np.random.default_rng(0)
    counts = band.counts(rng.integers(0, 100, (60, 4000)))
    low, high = (limit[:, None] for limit in band.limits(0.9))
    inside = ((low <= counts) & (counts <= high)).all(0).mean()
    assert 0.9 - 0.015 < inside < 0.93


def test_band_is_that_of_arviz():
    utils = pytest.importorskip("arviz.stats.ecdf_utils")
    band = UniformBand(50, 20)
    theirs = utils.ecdf_confidence_band(50, band.points, band.points, prob=0.95, method="optimized")
    for ours, wanted in zip(band.limits(0.95), theirs, strict=True):
        assert np.abs(ours / 50 - wanted).max() <= 1.001 / 50


def test_symmetry_of_few_values_is_that_of_all_signs():
    distance = np.array([0.45, 0.31, 0.22, 0.13, 0.07, 0.02])
    every = [0.5 + distance * s for s in itertools.product((-1, 1), repeat=6)]
    found = [symmetry_pvalue(v) for v in every]
    for size, p in found:
        assert p == pytest.approx(np.mean([other >= size - 1e-9 for other, _ in found]))
    by_hand = max(abs((every[5] <= t).mean() - (1 - every[5] <= t).mean()) for t in np.linspace(0, 1, 1001))
    assert found[5][0] == pytest.approx(by_hand)


def test_holm():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])


# ------------------------------------------------------------------------------------------------ calibration


def test_exact_draws_are_calibrated():
    """Fails for 5 % of seeds, by the definition of the adjusted p-values."""
    found = calibrate(draws())
    assert found.names == ("loc", "log_likelihood") and found.ranks.shape == (100, 2)
    assert 0 <= found.ranks.min() and found.ranks.max() <= 99
    assert min(found.adjusted.values()) > 0.05 and found.asymmetry["loc"][2] > 0.05
    assert "no sign of miscalibration" in found.summary()


def test_narrow_draws_are_not():
    found = calibrate(draws(width=0.5))
    assert found.adjusted["loc"] < 1e-3 and found.asymmetry["loc"][2] > 0.05
    assert "not calibrated" in found.summary()


@pytest.mark.parametrize("shift", [-1.0, 1.0])
def test_shifted_draws_are_asymmetric(shift):
    bias, _, pvalue = calibrate(draws(shift=shift)).asymmetry["loc"]
    assert bias * shift > 0.1 and pvalue < 1e-3


def test_likelihood_notices_draws_that_ignore_the_data():
    found = calibrate(lambda m, x: {"loc": torch.randn(99)})
    assert found.pvalues["loc"] > 0.01 and found.adjusted["log_likelihood"] < 1e-6


def test_quantities_are_named_and_chosen():
    x = torch.zeros(2)

    def posterior(conditioned: Callable, x: Tensor) -> dict[str, Tensor]:
        return {"z": torch.randn(2, 60, 2).exp(), "unknown": torch.ones(3)}  # two chains, thinned

    options: dict[str, Any] = {"num_simulations": 2, "num_draws": 20}
    found = calibrate(posterior, x, target=local, statistics={"mean": lambda v: v["z"].mean(-1)}, **options)
    assert found.names == ("z[0]", "z[1]", "mean", "log_likelihood") and found.ranks.max() <= 20

    def masked(x: Tensor) -> None:
        with pyro.plate("data", 2), poutine.mask(mask=torch.tensor([True, False])):
            z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, NOISE), obs=x)

    assert calibrate(posterior, x, target=masked, **options).names == ("z[0]", "log_likelihood")


def test_ties_are_broken_at_random():
    """Truth and 3 draws all equal: each rank has probability 1/4, within 4 standard errors of 4000 columns."""
    counts = _rank(torch.zeros(4, 4000)).bincount(minlength=4) / 4000
    assert ((counts - 0.25).abs() < 4 * (0.1875 / 4000) ** 0.5).all()
    assert _rank(torch.tensor([[2.0], [1.0], [3.0], [1.5]])).tolist() == [2]


def test_seed_repeats_a_run_and_leaves_the_state():
    before = torch.get_rng_state()
    first, second = (calibrate(draws(), num_simulations=3).ranks for _ in range(2))
    assert (first == second).all() and (torch.get_rng_state() == before).all()


def test_data_that_are_arguments_are_replaced():
    seen = []

    def posterior(conditioned: Callable, x: Tensor, both: dict) -> dict[str, Tensor]:
        value = poutine.trace(conditioned).get_trace(x, both).nodes["x"]["value"]
        seen.append((x == value).all() and (both["x"] == value).all() and (both["other"] == 0).all())
        return {"loc": torch.randn(99)}

    x = torch.zeros(5)
    calibrate(posterior, x, {"x": x, "other": torch.zeros(5)}, target=lambda x, both: model(x), num_simulations=2)
    assert len(seen) == 2 and all(seen)


def test_parameters_and_their_store_stay():
    net = nn.Linear(1, 1)
    pyro.param("noise", torch.tensor(0.7), constraint=dist.constraints.positive)
    pyro.param("AutoNormal.locs.loc", torch.tensor(5.0))
    store = pyro.get_param_store()
    tensors = {k: (v, v.detach().clone()) for k, v in store.get_state()["params"].items()}
    weights = [p.detach().clone() for p in net.parameters()]

    def parametric(x: Tensor) -> None:
        pyro.module("net", net)
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            mean = net(loc.reshape(1)).squeeze()
            pyro.sample("x", dist.Normal(mean, pyro.param("noise", torch.tensor(1.0))), obs=x)

    def posterior(conditioned: Callable, x: Tensor) -> dict[str, Tensor]:
        assert pyro.param("noise").item() == pytest.approx(0.7)
        with torch.no_grad():
            store.get_state()["params"]["noise"].add_(1.0)  # a posterior that does not keep to itself
        return Trained(AutoNormal, pyro.optim.Adam({"lr": 0.1}), num_steps=3)(conditioned, x)

    found = calibrate(posterior, target=parametric, num_simulations=2)
    assert found.names == ("loc", "log_likelihood")
    now = store.get_state()["params"]
    assert set(now) == set(tensors)
    for name, (tensor, value) in tensors.items():
        assert now[name] is tensor
        torch.testing.assert_close(tensor, value, rtol=0, atol=0)
    for parameter, value in zip(net.parameters(), weights, strict=True):
        assert parameter.requires_grad and parameter.grad is None
        torch.testing.assert_close(parameter, value, rtol=0, atol=0)


@pytest.mark.parametrize(
    "make",
    [AutoNormal, lambda m: ShortRunGuide(m, num_steps=2, step_size=0.01, start=Prior())],
    ids=["AutoNormal", "ShortRunGuide"],
)
def test_guides_are_trained_anew(make):
    guides: list[Any] = []

    def remember(conditioned: Callable) -> Any:
        guides.append(make(conditioned))
        return guides[-1]

    trained = Trained(remember, pyro.optim.Adam({"lr": 0.1}), num_steps=2, num_draws=9)
    found = calibrate(trained, num_simulations=2, num_draws=9)
    assert found.ranks.shape == (2, 2) and guides[0] is not guides[1] and not len(pyro.get_param_store())


def test_trained_guide_finds_the_posterior():
    """AutoNormal is exact here; means of 2000 draws within 4 standard errors and the optimiser's 0.05."""
    x = torch.linspace(0.0, 2.0, 5)
    trained = Trained(AutoNormal, pyro.optim.Adam({"lr": 0.05}), num_steps=300, num_draws=2000)
    loc = trained(model, x)["loc"]
    assert abs(loc.mean() - located_at(x)[0]) < 0.1 and abs(loc.std() / located_at(x)[1] - 1) < 0.2


def test_chains_give_one_draw_each():
    kernel = lambda m: ShortRunLangevin(m, num_steps=1, adjust=True)  # noqa: E731
    found = calibrate(Chains(kernel, warmup_steps=5, num_chains=9), num_simulations=2, num_draws=9)
    assert found.ranks.shape == (2, 2)


def test_a_guide_is_a_posterior():
    def posterior(m: Callable, *a: Any) -> dict[str, Tensor]:
        return ShortRunGuide(m, num_steps=2, start=Prior()).sample_posterior(*a, num_samples=99)

    assert calibrate(posterior, num_simulations=2).ranks.shape == (2, 2)


def factored(x: Tensor) -> None:
    model(x)
    pyro.factor("penalty", torch.tensor(-1.0))


def tilted(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    energy_prior("energy", lambda z: z.square(), z)
    pyro.sample("x", dist.Normal(z, 1.0).expand([len(x)]).to_event(1), obs=x)


def subsampled(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=2) as i:
        pyro.sample("x", dist.Normal(loc, NOISE), obs=x[i])


def improper(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.ImproperUniform(dist.constraints.real, (), ()))
    pyro.sample("x", dist.Normal(loc, 1.0).expand([len(x)]).to_event(1), obs=x)


def unobserved(x: Tensor) -> None:
    pyro.sample("loc", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    "target, match",
    [
        (factored, "'penalty' is a pyro.factor"),
        (tilted, "'energy' is a pyro.factor"),
        (subsampled, "subsampled plate"),
        (poutine.scale(model, scale=2.0), "'loc' lies in poutine.scale"),
        (improper, "'loc' has an improper prior"),
        (unobserved, "observes nothing"),
    ],
    ids=["factor", "energy", "subsampled", "scale", "improper", "unobserved"],
)
def test_models_that_cannot_be_simulated_are_refused(target, match):
    with pytest.raises(ValueError, match=match):
        calibrate(draws(), target=target)


@pytest.mark.parametrize(
    "given, match",
    [
        ({"loc": torch.zeros(5)}, "5 draws"),
        ({"loc": torch.zeros(())}, "wanted"),
        ({"loc": torch.full((99,), torch.nan)}, "not all finite"),
        ({"other": torch.zeros(99)}, "not of"),
    ],
    ids=["few", "shape", "nan", "site"],
)
def test_draws_that_cannot_be_ranked_are_refused(given, match):
    with pytest.raises(ValueError, match=match):
        calibrate(lambda m, x: given)


def test_names_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="'a'"):
        calibrate(draws(), sites=["a"])
    with pytest.raises(ValueError, match="rename"):
        calibrate(draws(), statistics={"loc": lambda v: v["loc"]})


def test_plot_has_a_panel_for_each_quantity():
    ranks = torch.randint(0, 20, (50, 3), device="cpu")
    found = SBC(ranks, ("a", "b", "c"), 19)
    panels = found.plot(columns=2)
    assert [p.get_title() for p in panels] == ["a", "b", "c"]
    line = plot_ecdf(found, difference=False)[1].lines[0]
    wanted = [(ranks[:, 1] < cut).double().mean().item() for cut in range(1, 20)]
    np.testing.assert_allclose(line.get_ydata(), wanted)


# ------------------------------------------------------------------------------------------------ nested R-hat


def by_hand(z: Tensor, groups: int) -> float:
    """Equations 5 to 8 of the paper, in loops."""
    size = len(z) // groups
    chain = [[z[k * size + m].tolist() for m in range(size)] for k in range(groups)]
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    var = lambda values: sum((v - mean(values)) ** 2 for v in values) / max(len(values) - 1, 1)  # noqa: E731
    means = [[mean(c) for c in group] for group in chain]
    within = mean([var(means[k]) + mean([var(c) for c in chain[k]]) for k in range(groups)])
    return (1 + var([mean(m) for m in means]) / within) ** 0.5


@pytest.mark.parametrize("groups, members, length", [(3, 4, 5), (3, 4, 1), (4, 1, 6), (2, 2, 2)])
def test_nested_rhat_is_the_formula(groups, members, length):
    z = torch.randn(groups * members, length, 2) + torch.arange(groups * members).reshape(-1, 1, 1)
    found = nested_rhat(z, groups)
    wanted = [by_hand(z[..., i], groups) for i in range(2)]
    torch.testing.assert_close(found, torch.tensor(wanted))
    if hasattr(az, "rhat_nested"):
        ids = np.repeat(np.arange(groups), members)
        theirs = az.rhat_nested(z[..., 0].cpu().numpy(), superchain_ids=ids, method="identity")
        assert length < 4 or theirs == pytest.approx(wanted[0], rel=1e-4)


def test_chains_by_themselves_have_ordinary_rhat():
    """``sqrt((N - 1) / N + B / W)``, but for the factor."""
    z = torch.randn(4, 50) + torch.arange(4.0).unsqueeze(1)
    ordinary = float(az.rhat(z.cpu().numpy(), method="identity"))
    assert ordinary**2 - 49 / 50 == pytest.approx(nested_rhat(z, 4).item() ** 2 - 1, rel=1e-4)


def test_nested_rhat_of_chains_and_exports():
    """Chains that begin at the same points by ``initial_params``."""
    kernel = ShortRunLangevin(model, num_steps=1, step_size=1e-6, persistent=True)
    starts = {"loc": torch.tensor([-1.0, 0.0, 1.0]).repeat_interleave(4)}
    mcmc = VectorizedMCMC(kernel, 13, 0, num_chains=12, initial_params=starts, disable_progbar=True)
    mcmc.run(torch.zeros(5))
    found = nested_rhat(mcmc, superchains=3)["loc"]
    assert found > 10
    torch.testing.assert_close(nested_rhat(mcmc.get_samples(group_by_chain=True), 3)["loc"], found)
    exported = to_arviz(mcmc, num_prior=0, log_likelihood=False, posterior_predictive=False)
    torch.testing.assert_close(nested_rhat(exported, 3)["loc"].to(found), found)


@pytest.mark.parametrize("shape, groups", [((4, 5), 3), ((4, 5), 1), ((4,), 2), ((4, 1), 4), ((0, 3), 2)])
def test_chains_that_make_no_groups_are_refused(shape, groups):
    with pytest.raises(ValueError, match="group"):
        nested_rhat(torch.zeros(shape), groups)


def test_rows_need_a_guide_that_draws_them_apart():
    """A guide that draws all rows from one joint Gaussian has no density of a single row."""
    x = torch.randn(3)
    assert psis(local, AutoMultivariateNormal(local), x, num_samples=30).rows is None
    run = ShortRunGuide(local, start=AutoMultivariateNormal(local), num_steps=2, step_size=StepSize(0.01))
    assert psis(local, run, x, num_samples=30).rows is None
    assert psis(local, prior_only(1.0), x, num_samples=30).rows is not None


@pytest.mark.parametrize("make", [AutoDelta, AutoLaplaceApproximation])
def test_points_have_no_weights(make):
    with pytest.raises(NotImplementedError, match="a point"):
        psis(model, make(model), torch.randn(3), num_samples=30)


def test_guides_are_set_up_before_they_are_weighed():
    assert psis(model, AutoLowRankMultivariateNormal(model), torch.randn(3), num_samples=30).ess > 1


def empirical(x: Tensor) -> None:
    """A prior that is made of the data."""
    loc = pyro.sample("loc", dist.Normal(x.mean(), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, NOISE), obs=x)


def test_models_that_use_their_data_otherwise_are_refused():
    with pytest.raises(ValueError, match="more than obs="):
        calibrate(draws(), torch.zeros(4), target=empirical, num_simulations=2)


@pytest.mark.parametrize(
    "posterior, match",
    [
        (ShortRunGuide(model, start=Prior()), "a function of"),
        (ShortRunGuide, "a function of"),
        (lambda *_: model, "by site"),
    ],
)
def test_what_is_no_posterior_is_refused(posterior, match):
    with pytest.raises(ValueError, match=match):
        sbc(model, posterior, torch.zeros(4), num_simulations=1, progress=False)


def test_statistics_keep_the_draws():
    with pytest.raises(ValueError, match="statistic 'm' has shape"):
        calibrate(draws(), torch.zeros(4), num_simulations=1, statistics={"m": lambda z: z["loc"].mean()})


def test_more_draws_are_thinned_evenly():
    """One draw and a half for each rank: the last third of them counts too."""
    given = torch.cat([torch.full((100,), -9.0), torch.full((50,), 9.0)])
    found = sbc(
        model, lambda *_: {"loc": given.numpy()}, torch.zeros(4), num_simulations=1, num_draws=99, progress=False
    )
    assert found.ranks[0, 0] == 66


def test_histogram_of_ranks_counts_all():
    import matplotlib.pyplot as plt

    found = SBC(torch.arange(100).reshape(100, 1), ("z",), 99)
    (axes,) = plot_ranks(found)
    assert [s.get_data().values.tolist() for s in axes.patches] == [[10.0] * 10] and axes.get_title() == "z"
    low, high = axes.collections[0].get_paths()[0].vertices[:, 1].min(), axes.collections[0].get_datalim(axes.transData)
    assert low == 5 and high.y1 == 16  # 95 % of Binomial(100, 1 / 10)
    with pytest.raises(ValueError, match="bins=101"):
        plot_ranks(found, bins=101)
    plt.close("all")
