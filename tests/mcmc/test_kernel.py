"""ShortRunLangevin: laws of its transitions, its tuning, and its life inside Pyro's MCMC."""

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
from torch import Tensor

from pyro_shortrun import Init, Langevin, PathDensity, Persistent, Prior, ShortRunLangevin, StepSize, VectorizedMCMC
from pyro_shortrun.dynamics import Dense, Diagonal, Identity
from pyro_shortrun.dynamics.metric import CrossMoments, DenseScales, DiagonalScales, Moments
from pyro_shortrun.mcmc.langevin_chain import LangevinChain
from pyro_shortrun.mcmc.sampler import ChainState


def gaussian() -> None:
    """N(mean, covariance), asymmetric and correlated."""
    pyro.sample("z", dist.MultivariateNormal(MEAN(), COVARIANCE()))


def MEAN() -> Tensor:
    return torch.tensor([1.0, -2.0, 0.5])


def COVARIANCE() -> Tensor:
    return torch.tensor([[1.0, 0.8, 0.0], [0.8, 1.0, 0.3], [0.0, 0.3, 2.0]])


def curved() -> None:
    """Four rows of two coordinates, not Gaussian."""
    with pyro.plate("data", 4):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.LogNormal(0.0, 0.5))
        pyro.sample("x", dist.Normal(torch.sin(a) * b, 0.7), obs=torch.tensor([0.3, -0.4, 2.0, 0.0]))


def regression(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, noise), obs=y)


def regression_data() -> tuple[Tensor, Tensor]:
    x = torch.randn(30, 2)
    return x, x.sum(-1) + 0.5 * torch.randn(30)


def scalar(precision: float, mean: float = 0.0):
    """A potential for N(mean, 1 / precision)."""
    return lambda params: 0.5 * precision * (params["u"] - mean).square().sum()


def walk(kernel: ShortRunLangevin, chains: int = 1, warmup: int = 0, **options) -> LangevinChain:
    sampler = kernel.open(chains, warmup, (), {}, **options).sampler
    assert isinstance(sampler, LangevinChain)
    return sampler


def quiet(kernel: ShortRunLangevin, samples: int, warmup: int, chains: int = 1, **options) -> VectorizedMCMC:
    return VectorizedMCMC(kernel, samples, warmup, num_chains=chains, disable_progbar=True, **options)


# ------------------------------------------------------------------------------------------ exact laws


@pytest.mark.parametrize("max_drift", [10.0, 0.05])
def test_log_transition_is_the_density_of_a_step(max_drift):
    dynamics = Langevin(0.1, max_drift=max_drift)
    u, grad, moved = torch.randn(3, 2, 4, 5).unbind(0)
    eta, one = torch.rand(5) + 0.01, torch.ones(5)
    mean = dynamics.step(u, grad, eta, torch.zeros_like(u), one)
    wanted = dist.Normal(mean, (2 * eta).sqrt()).log_prob(moved).sum(-1)
    torch.testing.assert_close(dynamics.log_transition(u, moved, grad, eta, one), wanted)


def lower(rows: int) -> Tensor:
    return torch.tensor([[0.7, 0.0], [0.4, 1.3]]).expand(rows, 2, 2)


SCALES = {
    "unit": None,
    "diagonal": DiagonalScales(torch.tensor([0.5, 2.0]).double()),
    "dense": DenseScales(lower(4).double()),
}


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("max_drift", [10.0, 0.1], ids=["", "clipped"])
def test_detailed_balance(scales, max_drift, dtype, device):
    """pi(u) f(u'|u) a(u, u') = pi(u') f(u|u') a(u', u), row by row, from the transitions themselves."""
    if dtype is not torch.float64:
        pytest.skip("exact to float64")
    sampler = walk(ShortRunLangevin(curved, adjust=True, dynamics=Langevin(0.05, max_drift=max_drift)))
    if SCALES[scales] is not None:
        sampler.adaptation.scales = type(SCALES[scales])(SCALES[scales].factor.to(device))
    eta = sampler.step_size(0)
    always = torch.full((5, 4), -math.inf)
    here = sampler.evaluate(torch.randn(5, 4, 2))
    white, one = sampler.adaptation.scales, torch.ones(2)

    def propose(state: ChainState, noise: Tensor) -> tuple[ChainState, Tensor, Tensor]:
        """Proposed state, acceptance probability, log f(proposal | state) up to the scales' constant."""
        moved, accept, finite = sampler.transition(state, eta, noise, always)
        assert finite.all()
        w, v = white.whiten(state.u), white.whiten(moved.u)
        return moved, accept, sampler.dynamics.log_transition(w, v, white.pull(state.grad), eta, one)

    there, accept, forth = propose(here, torch.randn(5, 4, 2))
    drift = sampler.dynamics.step(white.whiten(there.u), white.pull(there.grad), eta, torch.zeros(5, 4, 2), one)
    back_noise = (white.whiten(here.u) - drift) / (2 * eta).sqrt()
    again, accept_back, back = propose(there, back_noise)
    torch.testing.assert_close(again.u, here.u)
    left = here.log_density + forth + accept.log()
    right = there.log_density + back + accept_back.log()
    known = (accept > 0) & (accept_back > 0)  # not rounded to zero
    assert known.sum() > 15 and ((accept < 1) | (accept_back < 1)).any()
    torch.testing.assert_close(left[known], right[known], rtol=0, atol=1e-9)


def test_a_rejected_proposal_leaves_everything_as_it_was():
    sampler = walk(ShortRunLangevin(curved, adjust=True, step_size=0.3))
    state = sampler.evaluate(torch.randn(5, 4, 2))
    never = torch.zeros(5, 4)  # log of a uniform draw of one
    moved, accept, _ = sampler.transition(state, sampler.step_size(0), torch.randn(5, 4, 2), never)
    stayed = accept < 1
    assert stayed.any()
    for name in ("u", "grad", "log_density"):
        assert torch.equal(getattr(moved, name)[stayed], getattr(state, name)[stayed])


def test_bias_of_the_unadjusted_chain_is_the_closed_form():
    """On a Gaussian u' = a u + b eps: the stationary variance b^2 / (1 - a^2) = 1 / (lambda (1 - eta lambda / 2))."""
    precision, eta = 4.0, 0.2
    kernel = ShortRunLangevin(potential_fn=scalar(precision), step_size=eta, persistent=True)
    sampler = walk(kernel, initial_params={"u": torch.zeros(1, 1)})
    at, always = sampler.evaluate(torch.tensor([[[1.0]], [[0.0]]])), torch.zeros(2, 1)
    noise = torch.tensor([[[0.0]], [[1.0]]])
    a, b = sampler.transition(at, sampler.step_size(0), noise, always)[0].u.flatten()
    wanted = 1 / (precision * (1 - eta * precision / 2))
    torch.testing.assert_close(b**2 / (1 - a**2), torch.tensor(wanted))
    # The same from one draw each of 4,000 chains; the relative error of a variance is sqrt(2 / 4000).
    mcmc = quiet(
        ShortRunLangevin(potential_fn=scalar(precision), num_steps=200, step_size=eta, persistent=True),
        1,
        0,
        4000,
        initial_params={"u": torch.zeros(4000, 1)},
    )
    mcmc.run()
    assert abs(mcmc.get_samples()["u"].var().item() / wanted - 1) < 5 * math.sqrt(2 / 4000)


def test_short_runs_have_the_closed_form_law():
    """K steps on N(m, 1/lambda) from N(0, 1): mean m (1 - a^K), variance a^2K + 2 eta (1 - a^2K) / (1 - a^2)."""
    precision, mean, eta, steps, count = 5.0, 1.5, 0.05, 6, 20000

    def model() -> None:
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        pyro.factor("tilt", -0.5 * precision * (u - mean) ** 2 + 0.5 * u**2)

    kernel = ShortRunLangevin(model, steps, StepSize(eta, learnable=False))
    mcmc = quiet(kernel, 2, 0, count // 2)
    mcmc.run()
    u = mcmc.get_samples()["u"]
    power = (1 - eta * precision) ** steps
    variance = power**2 + 2 * eta * (1 - power**2) / (1 - (1 - eta * precision) ** 2)
    assert abs(u.mean().item() - mean * (1 - power)) < 5 * math.sqrt(variance / count)
    assert abs(u.var().item() / variance - 1) < 5 * math.sqrt(2 / count)
    draws = mcmc.get_samples(group_by_chain=True)["u"]
    assert abs(torch.corrcoef(draws.T)[0, 1].item()) < 5 / math.sqrt(count / 2)


def test_warm_up_finds_the_step_of_the_path_density():
    """N(1, 1/25) from N(0, 1) with K = 25: the bound is best at eta = 0.0030 (s = 0.077); see PathDensity."""
    precision, steps = 25.0, 25

    def negative_bound(eta: float) -> float:
        a = 1 - eta * precision
        power, mean = a**steps, 1.0
        variance = power**2 + 2 * eta * (1 - power**2) / (1 - a**2)
        return 0.5 * precision * (variance + (power * mean) ** 2) - steps * math.log(a)

    grid = torch.linspace(0.0005, 0.02, 400).tolist()
    best = min(grid, key=negative_bound)
    assert abs(best - 0.0030) < 2e-4

    def model() -> None:
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        pyro.factor("tilt", -0.5 * precision * (u - 1.0) ** 2 + 0.5 * u**2)

    mcmc = quiet(ShortRunLangevin(model, steps, StepSize(0.01)), 2, 80, 64)
    mcmc.run()
    tuned = mcmc.sample_stats["step_size"]
    assert torch.equal(tuned, tuned[:1, :1].expand_as(tuned))  # tuning ends with the warm-up
    assert abs(tuned[0, 0].item() / best - 1) < 0.15


def test_moments_are_those_of_all_values():
    batches = torch.randn(4, 7, 2, 3) * torch.tensor([1.0, 5.0, 0.1])
    for dense in (False, True):
        moments = (CrossMoments if dense else Moments)(torch.zeros(2, 3))
        for batch in batches:
            moments.update(batch)
        for row in range(2):
            wanted = torch.cov(batches[:, :, row].flatten(0, 1).T)
            found = moments.scatter[row] / (moments.count - 1)
            torch.testing.assert_close(found, wanted if dense else wanted.diagonal())
        shrunk = moments.covariance
        torch.testing.assert_close(shrunk.diagonal(dim1=-2, dim2=-1), moments.scatter.diagonal(dim1=-2, dim2=-1) / 27)
        if dense:  # 28 draws in 3 dimensions
            torch.testing.assert_close(shrunk[:, 0, 1], moments.scatter[:, 0, 1] / 27 * 28**2 / (28**2 + 12**2))


def test_scales_of_a_gaussian_are_exact_from_unconverged_chains(dtype):
    if dtype is not torch.float64:
        pytest.skip("exact to float64")
    covariance = COVARIANCE()
    precision = torch.linalg.inv(covariance)
    draws = torch.cov(torch.randn(3, 50) * torch.tensor([[10.0], [0.1], [3.0]]))  # nothing like the posterior
    grads = precision @ draws @ precision
    factor = Dense().fit(draws[None], grads[None], torch.eye(3)[None])[0]
    torch.testing.assert_close(factor @ factor.T, covariance)
    variances = torch.tensor([4.0, 1e-6, 9.0])
    spread = torch.tensor([0.01, 7.0, 1.0])
    factor = Diagonal().fit(spread[None], (spread / variances**2)[None], torch.ones(1, 3))[0]
    torch.testing.assert_close(factor**2, variances)


def test_scales_stay_where_nothing_moved():
    previous = torch.full((1, 2), 3.0)
    factor = Diagonal().fit(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 1.0]]), previous)
    assert factor.tolist() == [[3.0, 1.0]]
    eye = torch.eye(2)[None]
    assert torch.equal(Dense().fit(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), eye), eye)


# ------------------------------------------------------------------------------------------ mini-batches


def subsampled(x: Tensor, size: int) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x), subsample_size=size) as index:
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x[index])


def test_every_transition_of_every_chain_has_its_own_mini_batch():
    x = torch.arange(20.0).sqrt()
    kernel = ShortRunLangevin(subsampled, persistent=True, step_size=1e-3)
    sampler = kernel.open(3, 0, (x, 4), {}).sampler
    u = torch.zeros(3, 1, 1)
    grads = torch.stack([sampler.evaluate(u).grad.flatten() for _ in range(50)])
    assert len(grads.flatten().unique()) > 100  # sums of 4 of 20 numbers
    error = x.std() * 20 / math.sqrt(4 * 150)
    assert abs(grads.mean() - x.sum()) < 5 * error  # unbiased
    indices = sampler.target.current(3)._batches["data"]
    assert indices.shape == (3, 4) and all(len(set(row.tolist())) == 4 for row in indices)


def test_sgld_with_a_decaying_schedule_finds_the_posterior():
    x = torch.randn(200) + 2.0
    seen = []

    def schedule(t: int) -> float:
        seen.append(t)
        return 2e-3 * (1 + t / 50) ** -0.33

    kernel = ShortRunLangevin(subsampled, num_steps=5, step_size=schedule, persistent=True)
    mcmc = quiet(kernel, 100, 60, 32)
    mcmc.run(x, 50)
    assert seen == list(range(160 * 5))
    loc = mcmc.get_samples()["loc"]
    sd = 1 / math.sqrt(200)
    assert abs(loc.mean() - x.mean()) < 0.2 * sd
    assert 0.9 < loc.std() / sd < 1.5  # the noise of the mini-batches comes on top
    stats = mcmc.sample_stats["step_size"]
    torch.testing.assert_close(stats[0, -1], torch.tensor(2e-3 * (1 + 799 / 50) ** -0.33))


# ------------------------------------------------------------------------------------------ in Pyro's MCMC


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


# ------------------------------------------------------------------------------------------ wrong input


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


# ------------------------------------------------------------------------------------------ what the review found


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

    mcmc = quiet(ShortRunLangevin(model, 1, adjust=True, preconditioner=Dense()), 200, warmup)
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
