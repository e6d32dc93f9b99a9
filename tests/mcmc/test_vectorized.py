"""VectorizedMCMC: chains as a batch are the chains one by one, resume bit for bit, and recover known posteriors."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.mcmc.util import initialize_model
from targets import gaussian, quiet
from torch import Tensor

from pyro_shortrun import Init, ShortRunLangevin, StepSize, VectorizedMCMC, to_arviz
from pyro_shortrun.diagnostics import nested_rhat
from pyro_shortrun.dynamics import Dense, Diagonal
from pyro_shortrun.mcmc.convergence import groups_of


def schools(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * theta, 10.0), obs=y)


def data() -> Tensor:
    return torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0])


# ------------------------------------------------------------------------------------------ chains are independent


def halves(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("schools", len(y), subsample_size=2) as index:
        pyro.sample("y", dist.Normal(mu, 10.0), obs=y[index])


BATCHED = {
    "short runs": lambda: ShortRunLangevin(schools, 3, 0.05),
    "adjusted": lambda: ShortRunLangevin(schools, 3, adjust=True),
    "mini-batches": lambda: ShortRunLangevin(halves, 3, 0.05, persistent=True),
}


@pytest.mark.parametrize("size", [1, 3, 5, 100])
@pytest.mark.parametrize("name", BATCHED)
def test_batches_of_chains_change_nothing(name, size):
    draws = []
    for batch in (None, size):
        pyro.set_rng_seed(3)
        mcmc = quiet(BATCHED[name](), 4, 6, 5, chain_batch_size=batch)
        mcmc.run(data())
        draws.append(mcmc.get_samples()["mu"])
    torch.testing.assert_close(draws[1], draws[0], rtol=1e-6, atol=1e-8)


def test_draws_do_not_depend_on_other_chains():
    """Unadjusted chains share nothing but the step size: the first of five is the first of two."""
    start = {"mu": torch.randn(5), "tau": torch.randn(5), "theta": torch.randn(5, 5)}
    kernel = ShortRunLangevin(schools, 1, StepSize(0.01, learnable=False), persistent=True)
    ends = []
    for count in (2, 5):
        mcmc = quiet(kernel, 1, 0, count, initial_params={k: v[:count] for k, v in start.items()})
        noise = torch.zeros(1, count, 1, 7)
        kernel_open = kernel.open

        def opened(*args, noise=noise, kernel_open=kernel_open):
            session = kernel_open(*args)
            session.sampler.dynamics.draw_noise = lambda steps, like: noise
            return session

        kernel.open = opened  # type: ignore[method-assign]
        mcmc.run(data())
        kernel.open = kernel_open  # type: ignore[method-assign]
        ends.append(mcmc.unconstrained())
    torch.testing.assert_close(ends[0], ends[1][:2])


def test_model_that_is_not_batch_safe():
    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
        out = torch.stack([w @ row for row in x]).reshape(len(x), 2).sum(1)  # reshapes without a batch in mind
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(out, 1.0), obs=torch.ones(len(x)))

    mcmc = quiet(ShortRunLangevin(model, 2, adjust=True), 5, 5, 7)
    mcmc.run(torch.randn(4, 3))
    assert mcmc.get_samples(group_by_chain=True)["w"].shape == (7, 5, 2, 3)


def item() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z.item(), 1.0), obs=torch.tensor(0.0))


def branch() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    loc = z if z > 0 else -z
    pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor(0.0))


@pytest.mark.parametrize(
    "model, line", [(item, r"z\.item\(\).*test_vectorized\.py.*\.item\(\)"), (branch, r"if z > 0.*control flow")]
)
def test_operation_that_cannot_be_vectorised_is_named(model, line):
    mcmc = quiet(ShortRunLangevin(model, 2, adjust=True), 5, 5, 2)
    with pytest.raises(NotImplementedError, match=r"cannot be vectorised over chains at `.*" + line):
        mcmc.run()
    quiet(ShortRunLangevin(model, 2, adjust=True), 5, 5, 1).run()  # one chain needs no vmap


def test_code_without_lines_is_named_by_its_function():
    """As that of exec, or of a notebook that is gone."""
    names = {"pyro": pyro, "dist": dist}
    exec("def typed_in():\n    z = pyro.sample('z', dist.Normal(0.0, 1.0))\n    abs(z) if z > 0 else z\n", names)
    with pytest.raises(NotImplementedError, match=r"over chains in `typed_in` \(<string>:3\)"):
        quiet(ShortRunLangevin(names["typed_in"], 2, adjust=True), 5, 5, 2).run()


def test_site_that_cannot_be_vectorised_is_named():
    def model() -> None:
        logits = pyro.sample("logits", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("counts", dist.Multinomial(5, logits=logits), obs=torch.tensor([1.0, 2.0, 2.0]))

    with pytest.raises(NotImplementedError, match="site 'counts': the model cannot be vectorised"):
        quiet(ShortRunLangevin(model, 2, adjust=True), 5, 5, 2).run()


# ------------------------------------------------------------------------------------------ resume


KERNELS = {
    "short runs": lambda: ShortRunLangevin(schools, 3),
    "unadjusted": lambda: ShortRunLangevin(schools, 3, 0.02, persistent=True),
    "diagonal": lambda: ShortRunLangevin(schools, 3, adjust=True),
    "dense": lambda: ShortRunLangevin(schools, 3, adjust=True, preconditioner=Dense()),
    "restarted": lambda: ShortRunLangevin(schools, 3, adjust=True, persistent=False),
}


class Interrupt(Exception):
    pass


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("stop", [4, 10, 14], ids=["in warm-up", "after warm-up", "while sampling"])
def test_resumed_run_is_the_uninterrupted_one(name, stop, tmp_path):
    warmup, samples, chains = 10, 8, 4
    pyro.set_rng_seed(5)
    whole = quiet(KERNELS[name](), samples, warmup, chains)
    whole.run(data())

    done = []

    def interrupt(*_) -> None:
        done.append(None)
        if len(done) == stop:
            raise Interrupt

    pyro.set_rng_seed(5)
    first = quiet(KERNELS[name](), samples, warmup, chains, hook_fn=interrupt)
    with pytest.raises(Interrupt):
        first.run(data())
    torch.save(first.state_dict(), tmp_path / "state.pt")

    torch.randn(100)  # the random state is part of what is saved
    second = quiet(KERNELS[name](), samples, warmup, chains)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    second.run(data())
    for site, draws in whole.get_samples(group_by_chain=True).items():
        assert torch.equal(second.get_samples(group_by_chain=True)[site], draws)
    for stat, values in whole.sample_stats.items():
        assert torch.equal(second.sample_stats[stat], values)


def seeded_run(samples: int) -> VectorizedMCMC:
    pyro.set_rng_seed(5)
    mcmc = quiet(KERNELS["diagonal"](), samples, 5, 3)
    mcmc.run(data())
    return mcmc


def test_a_longer_run_begins_with_the_saved_draws():
    whole, short = seeded_run(12), seeded_run(7)
    longer = quiet(KERNELS["diagonal"](), 12, 5, 3)
    longer.load_state_dict(short.state_dict())
    longer.run(data())
    assert torch.equal(longer.unconstrained(), whole.unconstrained())
    with pytest.raises(ValueError, match="more than num_samples=6"):
        quiet(KERNELS["diagonal"](), 6, 5, 3).load_state_dict(short.state_dict())
    with pytest.raises(ValueError, match="num_chains=3, this one 4"):
        quiet(KERNELS["diagonal"](), 12, 5, 4).load_state_dict(short.state_dict())
    for kernel, args, message in (
        (ShortRunLangevin(gaussian, 3, adjust=True), (), "same model"),
        (KERNELS["diagonal"](), (data() + 10.0,), "same model and data"),
        (KERNELS["dense"](), (data(),), "preconditioner Diagonal, this one of .* Dense"),
        (KERNELS["short runs"](), (data(),), "this one of short runs"),
    ):
        other = quiet(kernel, 12, 5, 3)
        other.load_state_dict(short.state_dict())
        with pytest.raises(ValueError, match=message):
            other.run(*args)


def test_random_numbers_drawn_before_saving_change_nothing():
    whole, short = seeded_run(12), seeded_run(7)
    torch.randn(10), short.get_samples(5), to_arviz(short)
    longer = quiet(KERNELS["diagonal"](), 12, 5, 3)
    longer.load_state_dict(short.state_dict())
    longer.run(data())
    assert torch.equal(longer.unconstrained(), whole.unconstrained())


# ------------------------------------------------------------------------------------------ Pyro's interface


def test_interface_of_pyros_mcmc(capsys):
    seen = []
    kernel = ShortRunLangevin(schools, 2, adjust=True)
    mcmc = VectorizedMCMC(kernel, 6, 3, num_chains=4, hook_fn=lambda *a: seen.append(a))
    with pytest.raises(RuntimeError, match="run"):
        mcmc.get_samples()
    mcmc.run(data())
    assert "Sample" in capsys.readouterr().err  # the progress bar
    draws = mcmc.get_samples(group_by_chain=True)
    assert draws["theta"].shape == (4, 6, 5) and draws["tau"].shape == (4, 6) and (draws["tau"] > 0).all()
    assert mcmc.get_samples()["theta"].shape == (24, 5)
    assert mcmc.get_samples(num_samples=9)["theta"].shape == (9, 5)
    assert mcmc.get_samples()["mu"].equal(draws["mu"].flatten())
    report = mcmc.diagnostics()
    assert set(report) == {"mu", "tau", "theta", "divergences", "acceptance rate"}
    assert report["theta"]["r_hat"].shape == (5,) and list(report["divergences"]) == [f"chain {i}" for i in range(4)]
    mcmc.summary()
    assert "theta[4]" in capsys.readouterr().out
    assert [(a[2], a[3]) for a in seen] == [("Warmup", i) for i in range(3)] + [("Sample", i) for i in range(6)]
    assert seen[0][0] is kernel and seen[0][1]["theta"].shape == (4, 5)
    stats = mcmc.sample_stats
    assert all(v.shape == (4, 6) for v in stats.values())
    step = stats["step_size"]
    assert torch.equal(step, step[:1, :1].expand_as(step))


def test_default_warm_up_is_the_number_of_samples():
    assert VectorizedMCMC(ShortRunLangevin(gaussian), 7).warmup_steps == 7


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_samples=0), "num_samples must be an integer >= 1"),
        (dict(warmup_steps=-1), "warmup_steps must be an integer >= 0"),
        (dict(num_chains=0), "num_chains must be an integer >= 1"),
        (dict(chain_batch_size=0), "chain_batch_size must be an integer >= 1"),
        (dict(kernel="mala"), "kernel must be a ShortRunLangevin"),
        (dict(num_chains=3, initial_params={"z": torch.zeros(2, 3)}), r"initial_params\['z'\].*num_chains=3"),
    ],
)
def test_constructor_refuses(options, message):
    kernel = options.pop("kernel", ShortRunLangevin(gaussian))
    samples = options.pop("num_samples", 5)
    with pytest.raises(ValueError, match=message):
        VectorizedMCMC(kernel, samples, **options)


def told(mcmc: VectorizedMCMC, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    mcmc.summary()
    return capsys.readouterr().out


@pytest.mark.parametrize("repeats, groups, members", [(1, 6, 1), (2, 3, 2), (6, 1, 6)])
def test_summary_tells_nested_r_hat_of_chains_that_began_together(capsys, repeats, groups, members):
    starts = torch.randn(6 // repeats, 3).repeat_interleave(repeats, 0)
    mcmc = quiet(ShortRunLangevin(gaussian, 1, adjust=True), 5, 0, 6, initial_params={"z": starts})
    mcmc.run()
    out = told(mcmc, capsys)
    if groups == 1:  # nothing to compare with
        assert "Nested" not in out
        return
    worst = nested_rhat(mcmc, groups)["z"].max()
    assert f"Nested R-hat of {groups} groups of {members}: at most {worst:.3f} (site 'z')" in out


def test_summary_tells_the_acceptance(capsys):
    mcmc = quiet(ShortRunLangevin(gaussian, 1, adjust=True), 5, 3, 4)
    mcmc.run()
    rates = mcmc.sample_stats["acceptance_rate"].mean(1)
    out = told(mcmc, capsys)
    assert f"Acceptance: {rates.mean():.3f} (chains {rates.min():.3f} to {rates.max():.3f})" in out
    assert "Nested R-hat of 4 groups of 1" in out  # each from a draw of its own


def test_summary_of_one_chain_compares_nothing(capsys):
    mcmc = quiet(ShortRunLangevin(gaussian, 1, adjust=True), 5, 0, 1)
    mcmc.run()
    assert "Nested" not in told(mcmc, capsys)


@pytest.mark.parametrize(
    "points, groups", [([0, 0, 1, 1], 2), ([0, 1, 1, 0], 4), ([0, 0, 0, 1], 4), ([0, 1, 0, 1], 4), ([0, 0, 0, 0], 1)]
)
def test_groups_are_neighbours_of_equal_number(points, groups):
    """Otherwise every chain counts for itself."""
    assert groups_of({"a": torch.tensor(points), "b": torch.zeros(4, 2)}, 4) == groups
    assert groups_of(None, 4) == 4


def test_few_draws_have_no_diagnostics():
    mcmc = quiet(ShortRunLangevin(gaussian, adjust=True), 3, 0, 4)
    mcmc.run()
    with pytest.raises(ValueError, match=">= 4 draws"):
        mcmc.summary()


def test_potential_fn_draws_what_the_model_draws(dtype):
    """The same density, start and random numbers give the same draws."""
    y, start = data(), {"mu": torch.randn(6), "tau": torch.randn(6), "theta": torch.randn(6, 5)}

    def potential(params: dict[str, Tensor]) -> Tensor:
        mu, tau, theta = params["mu"], params["tau"].exp(), params["theta"]
        joint = dist.Normal(0.0, 5.0).log_prob(mu) + dist.HalfNormal(5.0).log_prob(tau) + params["tau"]
        rest = dist.Normal(0.0, 1.0).log_prob(theta) + dist.Normal(mu + tau * theta, 10.0).log_prob(y)
        return -(joint + rest.sum())

    ends = []
    for kernel in (
        ShortRunLangevin(schools, 3, adjust=True),
        ShortRunLangevin(potential_fn=potential, num_steps=3, adjust=True),
    ):
        pyro.set_rng_seed(2)
        mcmc = quiet(kernel, 4, 3, 6, initial_params=start)
        hooked = kernel.open

        def seeded(*args, hooked=hooked):
            session = hooked(*args)
            pyro.set_rng_seed(2)  # setting up a model draws from it
            return session

        kernel.open = seeded  # type: ignore[method-assign]
        mcmc.run(*([data()] if kernel.model else []))
        ends.append(mcmc.unconstrained())
    tolerance = 1e-8 if dtype is torch.float64 else 1e-2  # rounding grows along a chain
    torch.testing.assert_close(ends[0], ends[1], rtol=tolerance, atol=tolerance)


def test_potential_fn_of_pyro_runs_in_one_chain():
    start, potential, transforms, _ = initialize_model(schools, model_args=(data(),))
    kernel = ShortRunLangevin(potential_fn=potential, num_steps=3, adjust=True, transforms=transforms)
    one = quiet(kernel, 50, 20, 1, initial_params={k: v.unsqueeze(0) for k, v in start.items()})
    one.run()
    assert (one.get_samples()["tau"] > 0).all() and one.unconstrained().min() < 0


# ------------------------------------------------------------------------------------------ statistics


@pytest.mark.parametrize("preconditioner", [Diagonal(), Dense()], ids=["diagonal", "dense"])
def test_recovers_a_correlated_gaussian(preconditioner):
    """Within 0.05 sd and 10 % for 64 chains of 400 draws; the effective sample size is above 10,000, so that these are
    more than five standard errors."""
    kernel = ShortRunLangevin(gaussian, 10, adjust=True, preconditioner=preconditioner)
    mcmc = quiet(kernel, 400, 100, 64)
    mcmc.run()
    z, mean, variance = mcmc.get_samples()["z"], torch.tensor([1.0, -2.0, 0.5]), torch.tensor([1.0, 1.0, 2.0])
    assert ((z.mean(0) - mean).abs() < 0.05 * variance.sqrt()).all()
    assert ((z.var(0) / variance - 1).abs() < 0.1).all()
    assert abs(torch.corrcoef(z.T)[0, 1] - 0.8) < 0.03
    report = mcmc.diagnostics()["z"]
    assert (report["r_hat"] < 1.01).all() and (report["n_eff"] > 10_000).all()
    assert abs(mcmc.sample_stats["acceptance_rate"].mean() - 0.574) < 0.06


def test_recovers_a_posterior_from_starts_far_away():
    """Linear regression with known noise, posterior sds of 1e-3 to 1, from chains thousands of them away."""
    x = torch.randn(200, 3) * torch.tensor([1.0, 30.0, 0.03])
    y = x @ torch.tensor([1.0, -2.0, 0.5]) + 0.5 * torch.randn(200)

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 10.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    precision = x.T @ x / 0.25 + torch.eye(3) / 100
    mean, sd = torch.linalg.solve(precision, x.T @ y / 0.25), torch.linalg.inv(precision).diagonal().sqrt()
    start = Init(pyro.infer.autoguide.init_to_median, scale=20.0)
    mcmc = quiet(ShortRunLangevin(model, 10, adjust=True, start=start), 100, 100, 64)
    mcmc.run(x, y)
    w = mcmc.get_samples()["w"]
    assert ((w.mean(0) - mean).abs() < 0.1 * sd).all()
    assert ((w.std(0) / sd - 1).abs() < 0.1).all()
    assert (mcmc.diagnostics()["w"]["r_hat"] < 1.02).all()


def test_rows_are_accepted_and_tuned_apart():
    """Two hundred independent posteriors of unlike widths in one plate: each has its own acceptance and step size."""
    width = torch.logspace(-2, 2, 200)

    def model() -> None:
        with pyro.plate("data", 200):
            pyro.sample("z", dist.StudentT(5.0, width, width))

    mcmc = quiet(ShortRunLangevin(model, 5, adjust=True), 60, 100, 32)
    mcmc.run()
    z = mcmc.get_samples()["z"]
    centred = (z - width) / width / math.sqrt(5 / 3)
    assert centred.mean(0).abs().max() < 0.4  # some 300 effective draws each: 5 standard errors, and their maximum
    assert abs(centred.mean()) < 0.02 and abs(centred.var() - 1) < 0.15
