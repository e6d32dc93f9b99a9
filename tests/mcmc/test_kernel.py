"""ShortRunLangevin: its life inside Pyro's MCMC, wrong input, models that are hard on it."""

from __future__ import annotations

import json
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, config_enumerate
from pyro.infer.mcmc.api import StreamingMCMC
from pyro.infer.mcmc.util import initialize_model
from targets import gaussian, quiet, regression, regression_data, scalar, subsampled
from torch import Tensor

from pyro_shortrun import Init, Langevin, PathDensity, Persistent, Prior, ShortRunLangevin, StepSize
from pyro_shortrun.dynamics import Dense, Diagonal, Identity

# ------------------------------------------------------------------------------------------------ in Pyro's MCMC


MODES = {
    "short runs": dict(num_steps=4, step_size=0.02),
    "unadjusted": dict(num_steps=4, step_size=0.005, persistent=True),
    "adjusted": dict(num_steps=4, adjust=True),
    "restarted": dict(num_steps=4, adjust=True, persistent=False),
}


@pytest.mark.parametrize("mode", MODES)
def test_runs_in_pyros_mcmc(mode, capsys):
    args = regression_data()
    mcmc = MCMC(ShortRunLangevin(regression, **MODES[mode]), 6, 4, disable_progbar=True)
    mcmc.run(*args)
    draws = mcmc.get_samples()
    assert draws["w"].shape == (6, 2) and (draws["noise"] > 0).all()
    report = mcmc.diagnostics()
    assert report["divergences"] == {"chain 0": []}
    assert 0 <= report["acceptance rate"]["chain 0"] <= 1
    stats = report["sample_stats"]["chain 0"].values
    assert {k: v.shape for k, v in stats.items()} == {k: (6,) for k in stats}
    assert set(stats) == {"lp", "acceptance_rate", "grad_norm", "step_size", "nonfinite"}
    assert stats["step_size"].unique().numel() == 1
    mcmc.summary()
    assert "noise" in capsys.readouterr().out


def test_log_density_reported_is_that_of_the_draw():
    args = regression_data()
    mcmc = MCMC(ShortRunLangevin(regression, 3, adjust=True), 4, 4, disable_progbar=True)
    mcmc.run(*args)
    _, potential, transforms, _ = initialize_model(regression, model_args=args)
    draws = mcmc.get_samples()
    free = {k: transforms[k](v) if k in transforms else v for k, v in draws.items()}
    wanted = torch.stack([-potential({k: v[i] for k, v in free.items()}) for i in range(4)])
    torch.testing.assert_close(mcmc.diagnostics()["sample_stats"]["chain 0"].values["lp"], wanted.detach())


def test_chains_one_after_the_other_start_and_tune_afresh():
    kernel = ShortRunLangevin(regression, 2, adjust=True)
    with pytest.warns(UserWarning, match="available_cpu"):
        mcmc = MCMC(kernel, 4, 3, num_chains=50, disable_progbar=True)
    mcmc.run(*regression_data())
    draws = mcmc.get_samples(group_by_chain=True)["w"]
    assert draws.shape == (50, 4, 2) and len(draws[:, 0, 0].unique()) == 50
    assert set(mcmc.diagnostics()["acceptance rate"]) == {f"chain {i}" for i in range(50)}


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_chains_in_processes(context, monkeypatch, device):
    if device.type != "cpu" and context == "fork":
        pytest.skip("CUDA needs spawn")
    monkeypatch.setattr("torch.multiprocessing.cpu_count", lambda: 4)
    kernel = ShortRunLangevin(regression, 2, adjust=True)
    mcmc = MCMC(kernel, 4, 3, num_chains=2, mp_context=context, disable_progbar=True)
    mcmc.run(*regression_data())
    draws = mcmc.get_samples(group_by_chain=True)
    assert draws["w"].shape == (2, 4, 2) and (draws["noise"] > 0).all()
    assert not torch.equal(draws["w"][0], draws["w"][1])
    assert mcmc.diagnostics()["sample_stats"]["chain 1"].values["lp"].shape == (4,)


def test_streaming_mcmc():
    mcmc = StreamingMCMC(ShortRunLangevin(regression, 4, adjust=True), 30, 20, disable_progbar=True)
    mcmc.run(*regression_data())
    statistics = mcmc.get_statistics()
    assert statistics[(0, "noise")]["mean"] > 0 and statistics[(0, "w")]["variance"].shape == (2,)


def test_initial_params_and_hooks():
    seen = []
    start = {"w": torch.tensor([5.0, 6.0]), "noise": torch.tensor(2.0)}
    kernel = ShortRunLangevin(regression, 1, StepSize(1e-12, learnable=False), persistent=True)
    mcmc = MCMC(kernel, 2, 1, initial_params=start, disable_progbar=True, hook_fn=lambda *a: seen.append((a[2], a[3])))
    mcmc.run(*regression_data())
    draws = mcmc.get_samples()
    torch.testing.assert_close(draws["w"][-1], start["w"], rtol=0, atol=1e-4)
    torch.testing.assert_close(draws["noise"][-1], start["noise"].exp(), rtol=0, atol=1e-4)
    assert seen == [("Warmup", 0), ("Sample", 0), ("Sample", 1)]


def test_other_params_than_the_last_ones_are_honoured():
    kernel = ShortRunLangevin(regression, 1, StepSize(1e-12, learnable=False), persistent=True)
    kernel.setup(0, *regression_data())
    given = {"w": torch.tensor([5.0, 6.0]), "noise": torch.tensor(2.0)}
    moved = kernel.sample(given)
    torch.testing.assert_close(moved["w"], given["w"], rtol=0, atol=1e-4)


def test_support_that_depends_on_another_site():
    def model() -> None:
        low = pyro.sample("low", dist.Uniform(0.0, 1.0))
        pyro.sample("high", dist.Uniform(low, 3.0))

    for mcmc in (
        MCMC(ShortRunLangevin(model, 5, adjust=True), 40, 20, disable_progbar=True),
        quiet(ShortRunLangevin(model, 5, adjust=True), 10, 20, 4),
    ):
        mcmc.run()
        draws = mcmc.get_samples()
        assert ((draws["low"] > 0) & (draws["low"] < draws["high"]) & (draws["high"] < 3)).all()


def test_save_params_and_json():
    kernel = ShortRunLangevin(regression, 2, adjust=True)
    mcmc = MCMC(kernel, 3, 2, save_params=["w"], disable_progbar=True)
    mcmc.run(*regression_data())
    assert set(mcmc.get_samples()) == {"w"}
    assert json.loads(json.dumps(kernel.logging()))["acc. prob"]


def test_potential_fn_in_pyros_mcmc():
    args = regression_data()
    start, potential, transforms, _ = initialize_model(regression, model_args=args)
    draws = []
    for kernel in (
        ShortRunLangevin(regression, 3, adjust=True),
        ShortRunLangevin(potential_fn=potential, num_steps=3, adjust=True, transforms=transforms),
    ):
        pyro.set_rng_seed(1)
        mcmc = MCMC(kernel, 10, 10, initial_params=start, disable_progbar=True)
        mcmc.run(*args)
        draws.append(mcmc.get_samples())
    assert draws[1]["noise"].min() > 0
    assert all(v.shape == draws[1][k].shape for k, v in draws[0].items())


def test_kernel_pickles_before_and_after_a_run():
    kernel = ShortRunLangevin(regression, 2, adjust=True)
    args = regression_data()
    for _ in range(2):
        copy = pickle.loads(pickle.dumps(kernel))
        mcmc = MCMC(copy, 2, 2, disable_progbar=True)
        mcmc.run(*args)
        kernel.setup(2, *args)


def test_nothing_reaches_the_parameter_store_or_the_users_dynamics():
    dynamics = Langevin(0.05)
    mcmc = quiet(ShortRunLangevin(regression, 3, dynamics=dynamics), 2, 5, 2)
    mcmc.run(*regression_data())
    assert not list(pyro.get_param_store().keys())
    assert not dynamics.step_size.is_set_up


# ------------------------------------------------------------------------------------------------ wrong input


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(), "either a model or potential_fn"),
        (dict(model=gaussian, potential_fn=scalar(1.0)), "either a model or potential_fn"),
        (dict(model=gaussian, num_steps=0), "num_steps must be an integer >= 1"),
        (dict(model=gaussian, step_size=-0.1), "step_size must be a finite number > 0"),
        (dict(model=gaussian, step_size=math.inf), "step_size must be a finite number > 0"),
        (dict(model=gaussian, step_size=0.1, dynamics=Langevin(0.1)), "not both"),
        (dict(model=gaussian, dynamics="langevin"), "dynamics must be a Dynamics"),
        (dict(model=gaussian, preconditioner="diagonal", adjust=True), "preconditioner must be a Preconditioner"),
        (dict(model=gaussian, preconditioner=Diagonal()), "set persistent=True or adjust=True"),
        (dict(model=gaussian, target_accept_prob=1.0), "target_accept_prob"),
        (dict(model=gaussian, adjust=True, dynamics=Langevin(0.1, noise=False)), "needs dynamics with noise"),
        (dict(model=gaussian, step_size=lambda t: 0.1), "set persistent=True, adjust=False"),
        (dict(model=gaussian, step_size=lambda t: 0.1, adjust=True), "set persistent=True, adjust=False"),
        (dict(model=gaussian, start=Persistent()), "persistent=True"),
        (dict(model=gaussian, start=3), "start must be"),
        (dict(potential_fn=scalar(1.0), start=Prior()), "start needs a model"),
        (dict(model=gaussian, adjust="False"), "must be True or False"),
        (dict(model=gaussian, adjust=True, objective=PathDensity()), "objective tunes short runs"),
        (dict(model=gaussian, target_accept_prob=0.6), "without adjust=True"),
        (dict(model=gaussian, transforms={}), "transforms go with potential_fn"),
    ],
)
def test_constructor_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        ShortRunLangevin(**options)


def local(x: Tensor) -> None:
    with pyro.plate("data", len(x), subsample_size=2) as index:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


@config_enumerate
def endless() -> None:
    pyro.sample("n", dist.Poisson(3.0))


def test_setup_refuses():
    x = torch.randn(6)
    with pytest.raises(ValueError, match="mini-batch"):
        ShortRunLangevin(subsampled, adjust=True).setup(0, x, 2)
    with pytest.raises(NotImplementedError, match="'z' lies in a subsampled plate"):
        ShortRunLangevin(local, persistent=True).setup(0, x)
    with pytest.raises(ValueError, match="needs initial_params"):
        ShortRunLangevin(potential_fn=scalar(1.0), adjust=True).setup(0)
    with pytest.raises(ValueError, match="'n'"):
        ShortRunLangevin(endless).setup(0)
    kernel = ShortRunLangevin(gaussian)
    kernel.initial_params = {"z": torch.zeros(3)}
    with pytest.raises(ValueError, match="pass start="):
        kernel.setup(0)
    kernel = ShortRunLangevin(gaussian, adjust=True)
    kernel.initial_params = {"z": torch.zeros(4)}
    with pytest.raises(ValueError, match=r"initial_params\['z'\] has shape"):
        kernel.setup(0)
    kernel.initial_params = {}
    with pytest.raises(ValueError, match="lack the site 'z'"):
        kernel.setup(0)
    kernel.initial_params = {"z": torch.zeros(3), "y": torch.zeros(3)}
    with pytest.raises(ValueError, match="'y', which is not one of the sites"):
        kernel.setup(0)
    kernel.initial_params = {"z": torch.zeros(3, dtype=torch.long)}
    with pytest.raises(ValueError, match="must be a floating-point tensor"):
        kernel.setup(0)
    with pytest.raises(RuntimeError, match="setup"):
        ShortRunLangevin(gaussian).sample({})
    with pytest.raises(ValueError, match="site 'x'"):
        ShortRunLangevin(regression_nan, adjust=True).setup(0)
    with pytest.raises(ValueError, match="schedule gave 0.0 at transition 0"):
        mcmc = quiet(ShortRunLangevin(gaussian, step_size=lambda t: 0.0, persistent=True), 1, 0)
        mcmc.run()


def regression_nan() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(math.nan))


def cliff(params: dict[str, Tensor]) -> Tensor:
    """N(0, 1) that is NaN beyond 1."""
    u = params["u"]
    return torch.where(u < 1, 0.5 * u.square(), torch.nan).sum()


def test_nonfinite_proposals_are_rejected_and_counted():
    start = {"u": torch.zeros(50, 1)}
    kernel = ShortRunLangevin(potential_fn=cliff, num_steps=5, step_size=0.5, persistent=True)
    mcmc = quiet(kernel, 10, 0, 50, initial_params=start)
    with pytest.warns(UserWarning, match="chains met a non-finite density"):
        mcmc.run()
    assert (mcmc.get_samples()["u"] < 1).all()
    assert mcmc.sample_stats["nonfinite"].sum() > 0
    kernel = ShortRunLangevin(potential_fn=cliff, num_steps=5, adjust=True)
    mcmc = quiet(kernel, 10, 10, 50, initial_params=start)
    mcmc.run()  # a rejected proposal is nothing to warn about
    assert (mcmc.get_samples()["u"] < 1).all()
    bad = mcmc.diagnostics()["divergences"]
    assert sum(map(len, bad.values())) == (mcmc.sample_stats["nonfinite"] > 0).sum()


@pytest.mark.parametrize("preconditioner", [Identity(), Diagonal(), Dense()], ids=lambda p: type(p).__name__)
def test_preconditioners_and_starts_run(preconditioner):
    kernel = ShortRunLangevin(gaussian, 2, preconditioner=preconditioner, persistent=True, step_size=0.1)
    mcmc = quiet(kernel, 3, 40, 4)
    mcmc.run()
    kernel = ShortRunLangevin(
        gaussian, 2, preconditioner=preconditioner, adjust=True, start=Init(pyro.infer.autoguide.init_to_median)
    )
    mcmc = quiet(kernel, 3, 40, 4)
    mcmc.run()
    assert mcmc.get_samples()["z"].isfinite().all()


# ------------------------------------------------------------------------------------------------ what the review found


def walk_in_a_plate() -> None:
    plate = pyro.plate("t", 6)
    with plate:
        e = pyro.sample("e", dist.Normal(0.0, 1.0))
    z = e.cumsum(-1)
    with plate:
        pyro.sample("x", dist.Normal(z, 0.3), obs=torch.arange(6.0))


def threshold() -> None:
    with pyro.plate("data", 2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("f", -3.0 * ((z > 0).all()).to(z.dtype))


def test_rows_that_influence_each_other_are_moved_together(caplog):
    cumulative = torch.ones(6, 6).tril()
    precision = torch.eye(6) + cumulative.T @ cumulative / 0.09
    mean = torch.linalg.solve(precision, cumulative.T @ torch.arange(6.0) / 0.09)
    sd = torch.linalg.inv(precision).diagonal().sqrt()
    mcmc = quiet(ShortRunLangevin(walk_in_a_plate, 10, adjust=True, preconditioner=Dense()), 100, 100, 64)
    mcmc.run()
    e = mcmc.get_samples()["e"]
    assert ((e.mean(0) - mean).abs() < 0.1 * sd).all() and ((e.std(0) / sd - 1).abs() < 0.1).all()
    assert "elements of plate 't' influence each other" in caplog.text


def test_coupling_without_a_gradient_is_found():
    mcmc = quiet(ShortRunLangevin(threshold, 5, adjust=True), 100, 60, 128)
    mcmc.run()
    share = (mcmc.get_samples()["z"] > 0).all(-1).float().mean().item()
    exact = 0.25 * math.exp(-3) / (0.75 + 0.25 * math.exp(-3))
    assert abs(share - exact) < 0.006


def test_dropout_is_warned_about():
    dropout = torch.nn.Dropout(0.5)

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(dropout(z).sum(), 1.0), obs=torch.tensor(1.0))

    with pytest.warns(UserWarning, match="log density is random"):
        ShortRunLangevin(model, adjust=True).setup(0)


def stiff() -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 20):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.ones(20))


def test_too_large_a_step_is_backed_off_or_warned_about(caplog):
    """Curvature 21: at eta = 0.1 the chain bounces between the limits of the drift."""
    mcmc = quiet(ShortRunLangevin(stiff, 5, 0.1, persistent=True), 200, 20, 32)
    mcmc.run()
    assert "too large for this model" in caplog.text
    eta = mcmc.sample_stats["step_size"][0, 0]
    wanted = 1 / (21 * (1 - eta * 21 / 2))
    assert abs(mcmc.get_samples()["loc"].var() / wanted - 1) < 0.15
    insisting = ShortRunLangevin(stiff, 50, StepSize(0.2, learnable=False), persistent=True)
    with pytest.warns(UserWarning, match="the chains bounce"):
        quiet(insisting, 2, 5, 4).run()


@pytest.mark.parametrize("warmup", [20, 200])
def test_dense_preconditioner_survives_few_draws(warmup):
    """Fifty dimensions, one chain, one step per draw: 20 draws are too few to fit anything, 200 make no scale wrong by
    more than a factor of a few."""
    sd = torch.logspace(-2, 1, 50)

    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(50), sd).to_event(1))

    start = Init(pyro.infer.autoguide.init_to_uniform)
    mcmc = quiet(ShortRunLangevin(model, 1, adjust=True, preconditioner=Dense(), start=start), 200, warmup)
    mcmc.run()
    factor = mcmc._session.sampler.adaptation.factor[0]
    if warmup == 20:
        assert torch.equal(factor, torch.eye(50))
    else:
        assert torch.linalg.svdvals(factor / sd.unsqueeze(-1)).max() < 6
        assert mcmc.sample_stats["acceptance_rate"].mean() > 0.1


def test_hooks_may_write_into_params():
    def spoil(kernel, params, stage, i) -> None:
        params["w"].fill_(1000.0)

    kernel = ShortRunLangevin(regression, 2, adjust=True)
    MCMC(kernel, 4, 2, hook_fn=spoil, disable_progbar=True).run(*regression_data())
    assert kernel._session.state.u.abs().max() < 100
