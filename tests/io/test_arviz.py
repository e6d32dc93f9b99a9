"""Export to ArviZ, whichever of its versions is installed: ``InferenceData`` (0.x) or ``DataTree`` (1.x)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from exported import GROUPS, GUIDE_STATS, coord, dims, equal, export, get, groups, run_mcmc, run_vectorized, short
from programs import NOISE, data
from programs import located as model
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoNormal
from pyro.infer.mcmc.api import StreamingMCMC
from pyro.infer.reparam import LocScaleReparam
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from zoo import CASES, EXTRA, eight_schools, make_eight_schools

from pyro_shortrun import Persistent, Prior, ShortRunGuide, ShortRunLangevin, StepSize, VectorizedMCMC, to_arviz

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
        zoo_model,
        num_steps=2,
        step_size=StepSize(1e-6, learnable=False),
        create_plates=case.create_plates,
        start=Prior(),
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
            if group == "log_likelihood" and dims(out, group, name) == (f"{name}_observed",):
                continue  # some are masked
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
    guide = ShortRunGuide(zoo_model, num_steps=2, step_size=StepSize(1e-6, learnable=False), start=Prior())
    options = {"num_prior": 0, "log_likelihood": False, "posterior_predictive": False}
    out = to_arviz(guide, *args, num_samples=2, num_chains=2, **options)
    latent = [s.name for s in guide._first.layout.sites]
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        at = poutine.condition(zoo_model, {k: get(out, "posterior", k)[i, j] for k in latent})
        joint = poutine.trace(at).get_trace(*args).log_prob_sum()
        torch.testing.assert_close(get(out, "sample_stats", "log_p")[i, j], joint)


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


def test_names_that_would_be_alike_stay_apart():
    """Every site under a name of its own, those that need no change under theirs."""

    def alike() -> None:
        for i, name in enumerate(("a/b", "a.b", "lp", "lp_site", "a.b_site")):
            pyro.sample(name, dist.Normal(10.0 * i, 0.01))

    out = export(alike)
    means = {k: round(float(v.mean()) / 10) for k, v in out["posterior"].data_vars.items()}
    assert means == {"a.b_site_site": 0, "a.b": 1, "lp_site_site": 2, "lp_site": 3, "a.b_site": 4}
    assert {k: round(float(v.mean()) / 10) for k, v in out["prior"].data_vars.items()} == means


def test_dims_of_what_is_not_exported_are_refused():
    with pytest.raises(ValueError, match="dims names 'zz', which is not exported"):
        export(model, data(), dims={"zz": ["axis"]})


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


# ------------------------------------------------------------------------------------------------ errors


def streaming() -> StreamingMCMC:
    mcmc = StreamingMCMC(ShortRunLangevin(model, num_steps=2), 3, 3, disable_progbar=True)
    mcmc.run(data())
    return mcmc


ERRORS: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "a model": (lambda: model, {}, "ShortRunGuide.*function"),
    "another guide": (lambda: AutoNormal(model), {}, "ShortRunGuide.*AutoNormal"),
    "a class": (lambda: ShortRunGuide, {}, "source must be"),
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
