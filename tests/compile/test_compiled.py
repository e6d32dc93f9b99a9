"""Compiled evaluation: equal to the eager one for every model, and never stale."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import traced
from pyro.infer import SVI, Trace_ELBO
from runners import short_run
from torch import Tensor, nn
from zoo import CASES, EXTRA, Case

from pyro_shortrun import Langevin, PathDensity, Prior, ShortRunGuide, ShortRunLangevin, StepSize, VectorizedMCMC
from pyro_shortrun.compile import Compiler, Untouched
from pyro_shortrun.density import Call
from pyro_shortrun.objectives import Exact, Lanczos
from pyro_shortrun.runs import Gradients


def short(model: Callable, compile: bool, **options) -> ShortRunGuide:
    dynamics = Langevin(StepSize(0.01, learnable=False))
    guide = ShortRunGuide(model, num_steps=3, dynamics=dynamics, compile=compile, **{"start": Prior(), **options})
    if compile:
        guide._compiler = Compiler(Untouched())
    return guide


def draws(guide: ShortRunGuide, *args, num_samples: int = 4) -> dict[str, Tensor]:
    pyro.set_rng_seed(1)
    return guide.sample_posterior(*args, num_samples=num_samples)


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Our own warnings: dynamo logs its traces too."""
    return [r.getMessage() for r in caplog.records if r.name == "pyro_shortrun" and r.levelno >= logging.WARNING]


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES + EXTRA, ids=lambda c: c.name)
@pytest.mark.parametrize("chains", [1, 4])
def test_graph_gives_value_and_gradient(case: Case, chains: int, caplog):
    model, args = case.make()
    call = Call.of(model, args, {})
    u = call.prior(chains).detach()
    compiler = Compiler(Untouched())
    density = traced(call, compiler)
    value, grad = density.value_and_grad(u)
    wanted, slope = call.density.value_and_grad(u)
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(grad, slope)
    with torch.no_grad():
        torch.testing.assert_close(density(u), wanted)
    assert len(compiler._graphs) == 2 and not warned(caplog)


@pytest.mark.parametrize("name", ["eight_schools", "vae", "mixture"])
def test_inductor_gives_what_eager_gives(name):
    case = next(c for c in CASES + EXTRA if c.name == name)
    model, args = case.make()
    call = Call.of(model, args, {})
    u = call.prior(4).detach()
    density = traced(call, Compiler())
    value, grad = density.value_and_grad(u)
    wanted, slope = call.density.value_and_grad(u)
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(grad, slope)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)


def generator(decoder: Decoder) -> Callable:
    def model(x: Tensor, size: int | None = None, scale: float = 1.0) -> None:
        pyro.module("decoder", decoder)
        width = pyro.param("width", torch.tensor(0.5), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x), subsample_size=size) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(2), scale).to_event(1))
            pyro.sample("x", dist.Normal(decoder.layer(z), width).to_event(1), obs=x[index])

    return model


def test_changes_of_data_parameters_shapes_and_numbers_are_seen():
    """One guide, one cache of graphs; after each change the draws are the eager ones."""
    decoder = Decoder()
    model, x = generator(decoder), torch.randn(6, 3)
    compiled, eager = short(model, True), short(model, False)

    def check(*args) -> None:
        assert_same(draws(compiled, *args), draws(eager, *args))

    check(x)
    first = len(compiled._compiler._graphs)
    check(torch.randn(6, 3))
    with torch.no_grad():
        decoder.layer.weight.mul_(3.0)
        decoder.layer.bias.add_(1.0)
    check(x)
    pyro.get_param_store()["width"] = torch.tensor(0.2)
    check(x)
    with torch.no_grad():
        pyro.get_param_store()._params["width"].add_(0.7)
    check(x)
    assert len(compiled._compiler._graphs) == first  # nothing but tensors changed
    check(torch.randn(9, 3))
    check(x, None, 0.3)
    assert len(compiled._compiler._graphs) == 3 * first


def test_mini_batches_are_inputs():
    decoder = Decoder()
    model, x = generator(decoder), torch.randn(20, 3)
    options = dict(create_plates=lambda x, size: pyro.plate("data", len(x), subsample_size=size))
    compiled, eager = short(model, True, **options), short(model, False, **options)
    for seed in range(3):
        results = []
        for guide in (compiled, eager):
            pyro.set_rng_seed(seed)
            results.append(guide.sample_posterior(x, 5, num_samples=2))
        assert_same(*results)
    assert len(compiled._compiler._graphs) == 2


def test_a_graph_that_went_stale_in_another_way_is_made_anew(caplog):
    outside = {"shift": torch.tensor(0.0), "scale": 1.0}

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + outside["shift"], outside["scale"]), obs=x.sum())

    compiled, eager = short(model, True), short(model, False)
    x = torch.tensor([1.0, 2.0, -1.0])
    assert_same(draws(compiled, x), draws(eager, x))
    outside["shift"] = torch.tensor(5.0)
    assert_same(draws(compiled, x), draws(eager, x))
    outside["scale"] = 2.0  # a number in the trace
    assert_same(draws(compiled, x), draws(eager, x))
    assert not warned(caplog)


def test_a_model_that_cannot_be_traced_runs_eagerly_and_says_so_once(caplog):
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        loc = z if z > 0 else 2 * z
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    compiled, eager = short(model, True), short(model, False)
    x = torch.tensor(1.0)
    for _ in range(2):
        assert_same(draws(compiled, x, num_samples=1), draws(eager, x, num_samples=1))
    assert len(warned(caplog)) == 1 and "compile=True has no effect" in warned(caplog)[0]


def test_training_gives_the_eager_losses():
    """Tuned and untuned calls mixed; weights move in between."""
    losses = []
    for compile in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        decoder = Decoder()
        guide = ShortRunGuide(
            generator(decoder), num_steps=3, step_size=StepSize(0.05), tune_every=2, compile=compile, start=Prior()
        )
        if compile:
            guide._compiler = Compiler(Untouched())
        svi = SVI(guide.model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
        pyro.set_rng_seed(1)
        losses.append([svi.step(torch.ones(4, 3)) for _ in range(6)])
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [dict(), dict(persistent=True, step_size=0.01), dict(adjust=True)], ids=str)
def test_kernels(options):
    x = torch.randn(6, 3)
    results = []
    for compile in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        kernel = ShortRunLangevin(generator(Decoder()), 3, compile=compile, **options)
        if compile:
            kernel._compiler = Compiler(Untouched())
        mcmc = VectorizedMCMC(kernel, 3, 3, num_chains=4, disable_progbar=True)
        mcmc.run(x)
        results.append(mcmc.get_samples())
        assert not compile or kernel._compiler._graphs
    assert_same(*results)


def test_pickles_without_graphs():
    guide = short(generator(Decoder()), True)
    draws(guide, torch.randn(6, 3))
    copy = pickle.loads(pickle.dumps(guide._compiler))
    assert isinstance(copy.backend, Untouched) and not copy._graphs


def test_ever_changing_shapes_end_in_eager_runs(monkeypatch, caplog):
    monkeypatch.setattr("pyro_shortrun.compile.compiler._GRAPHS_AT_MOST", 2)
    model = generator(Decoder())
    compiled, eager = short(model, True), short(model, False)
    for size in (2, 3, 4):
        x = torch.randn(size, 3)
        assert_same(draws(compiled, x), draws(eager, x))
    assert len(compiled._compiler._graphs) == 2
    assert len(warned(caplog)) == 1 and "changed more than 2 times" in warned(caplog)[0]


@pytest.mark.parametrize("case", CASES + EXTRA, ids=lambda c: c.name)
def test_tuned_runs_give_the_eager_bound_and_gradient(case: Case, caplog):
    """Increments, step-size gradient and every statistic of a taped run, per-dimension steps, several chains."""
    model, args = case.make()
    call = Call.of(model, args, {})
    u, layout = call.prior(1 if case.discrete else 2).detach(), call.density.layout  # those are run one by one
    noise, compiler = torch.randn(2, *u.shape), Compiler(Untouched())
    density = traced(call, compiler)
    found: list[tuple[Tensor, ...]] = []
    frozen: list[Tensor] = []
    for each in (call.density, density):
        eta = torch.full((2, layout.size), 1e-3, requires_grad=True)
        result = short_run(each, Langevin(1e-3), PathDensity(Exact()), u, eta, noise, gradients=Gradients.GUIDE)
        (result.end.tanh().sum() + result.increment.sum()).backward()
        info = result.info
        found.append((result.end, result.increment, eta.grad, info.log_density, info.grad_norm, info.log_det))
        frozen.append(info.frozen)
    for compiled, eager in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
    assert torch.equal(*frozen)
    assert {key[0][0] for key in compiler._graphs} == {"forward", "last", "backward"} and not warned(caplog)


@pytest.mark.parametrize("name", ["eight_schools", "vae"])
def test_inductor_gives_the_eager_step_size_gradient(name):
    case = next(c for c in CASES + EXTRA if c.name == name)
    model, args = case.make()
    call = Call.of(model, args, {})
    u = call.prior(1).detach()
    noise, grads = torch.randn(4, *u.shape), []
    for density in (call.density, traced(call, Compiler())):
        eta = torch.full((4, call.density.layout.size), 1e-3, requires_grad=True)
        result = short_run(density, Langevin(1e-3), PathDensity(), u, eta, noise, gradients=Gradients.GUIDE)
        (result.end.tanh().sum() + result.increment.sum()).backward()
        grads.append(eta.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)


def test_a_part_of_a_run_that_cannot_be_traced_runs_eagerly(caplog):
    """Here: what needs second derivatives."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z: Tensor) -> Tensor:
            return z.square()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad: Tensor) -> Tensor:
            raise RuntimeError("no derivative")

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(Once.apply(z), 1.0), obs=x)

    guide = ShortRunGuide(model, num_steps=2, step_size=StepSize(0.01), compile=True, start=Prior())
    guide._compiler = Compiler(Untouched())
    with pytest.raises(RuntimeError, match="no derivative"):  # eager says what is wrong
        guide(torch.tensor(1.0))
    assert len(warned(caplog)) == 1


def test_settings_are_part_of_what_a_graph_is_known_by():
    model, x = generator(Decoder()), torch.randn(6, 3)
    guide = ShortRunGuide(
        model, num_steps=2, step_size=StepSize(0.01), objective=PathDensity(Lanczos(1, 1)), compile=True, start=Prior()
    )
    guide._compiler = Compiler(Untouched())
    values = []
    for iterations in (1, 2):
        guide.objective.logdet.num_iterations = iterations
        pyro.set_rng_seed(0)
        values.append(guide.log_weight(x).item())
    eager = ShortRunGuide(
        model, num_steps=2, step_size=StepSize(0.01), objective=PathDensity(Lanczos(1, 2)), start=Prior()
    )
    pyro.set_rng_seed(0)
    assert values[0] != values[1] == pytest.approx(eager.log_weight(x).item())


def test_what_does_not_matter_makes_no_new_graph():
    guide, x = short(generator(Decoder()), True), torch.randn(6, 3)
    draws(guide, x)
    count = len(guide._compiler._graphs)
    pyro.param("unrelated", torch.zeros(2))
    guide.eval()
    draws(guide, x)
    assert len(guide._compiler._graphs) == count


def test_a_parameter_of_another_shape_is_seen():
    def model(x: Tensor) -> None:
        shift = pyro.param("shift", torch.zeros(1))
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + shift, 1.0), obs=x)

    compiled, eager, x = short(model, True), short(model, False), torch.randn(3)
    assert_same(draws(compiled, x), draws(eager, x))
    del pyro.get_param_store()["shift"]
    pyro.param("shift", torch.tensor([1.0, -5.0, 2.0]))
    assert_same(draws(compiled, x), draws(eager, x))


def test_what_changes_from_call_to_call_ends_in_eager_runs(caplog):
    outside = {"scale": 1.0}

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, outside["scale"]), obs=x)

    compiled, eager, x = short(model, True), short(model, False), torch.tensor(1.0)
    for i in range(7):
        outside["scale"] = 1.0 + i
        assert_same(draws(compiled, x), draws(eager, x))
    assert len(warned(caplog)) == 1 and "pass that as a tensor argument" in warned(caplog)[0]


def test_small_changes_of_a_large_log_density_are_seen():
    """In float32, too: the tolerance is that of the first comparison's rounding."""
    outside, x = {"scale": 1.0}, torch.randn(20000, dtype=torch.float32)

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(10, dtype=torch.float32), outside["scale"]).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(), 1.0).expand([20000]).to_event(1), obs=x)

    compiled, eager = short(model, True), short(model, False)
    for scale in (1.0, 0.5):
        outside["scale"] = scale
        assert_same(draws(compiled, x, num_samples=1), draws(eager, x, num_samples=1))
