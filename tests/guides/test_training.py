"""Training steps from one graph: the numbers of the eager ones, parameter by parameter, on every program."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from torch import Tensor, nn
from zoo import CASES, EXTRA, Case

from pyro_shortrun import (
    Annealed,
    GaussianReverse,
    Hamiltonian,
    Init,
    Langevin,
    Linearized,
    Mixture,
    PathDensity,
    Prior,
    Refine,
    ShortRunELBO,
    ShortRunGuide,
    StepSize,
)
from pyro_shortrun.compile import Compiler, Untouched
from pyro_shortrun.guides.training import _gap

STEPS = 3
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of rows that freeze, and of what is random


def steps(model: Callable[..., Any], args: tuple[Any, ...], compile: bool, count: int = 4, **options: Any) -> Any:
    """Losses and gradients of some calls from the same seed, and the guide."""
    pyro.clear_param_store()
    particles = options.pop("num_particles", 1)
    options = {k: v() if k != "create_plates" and callable(v) else v for k, v in options.items()}
    options.setdefault("dynamics", Langevin(StepSize(1e-3)))
    if options.get("start") is not None and isinstance(options["start"], str):
        options["start"] = {"diagonal": AutoDiagonalNormal, "full": AutoMultivariateNormal, "normal": AutoNormal}[
            options["start"]
        ](model)
    pyro.set_rng_seed(0)
    guide = ShortRunGuide(model, num_steps=STEPS, compile=compile, **{"start": Prior(), **options})
    if compile:
        guide._compiler = Compiler(Untouched())
    elbo, found = ShortRunELBO(particles), []
    for _ in range(count):
        loss = elbo.loss_and_grads(model, guide, *args)
        store = pyro.get_param_store()._params
        grads = {k: p.grad.clone() for k, p in store.items() if p.grad is not None}
        for p in store.values():
            p.grad = None
        found.append((loss, grads))
    return found, guide


def assert_same(a: list[Any], b: list[Any], rtol: float = 1e-4) -> None:
    for (loss, grads), (other, others) in zip(a, b, strict=True):
        assert loss == pytest.approx(other, rel=rtol, abs=1e-5)
        assert grads.keys() == others.keys()
        for name, grad in grads.items():
            scale = others[name].abs().max().item()
            torch.testing.assert_close(grad, others[name], rtol=10 * rtol, atol=rtol * scale + 1e-7)


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "pyro_shortrun" and r.levelno >= logging.WARNING]


@pytest.mark.parametrize("case", CASES + EXTRA, ids=lambda c: c.name)
def test_steps_of_every_program_are_the_eager_ones(case: Case, caplog):
    """The fourth call is from the graph alone: it is compared in the second and third."""
    model, args = case.make()
    options = {} if case.create_plates is None else dict(create_plates=case.create_plates)
    found, guide = steps(model, args, True, **options)
    assert not guide.steps.given_up and len(guide.steps._steps) == 1, warned(caplog)
    assert_same(found, steps(model, args, False, **options)[0])


def curved(x: Tensor) -> None:
    scale = pyro.param("scale", torch.tensor(1.3), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sin().sum(-1), scale), obs=x)


def encoder(x: Tensor) -> None:
    weight = pyro.param("weight", torch.tensor([0.3, -0.2]))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.unsqueeze(-1) * weight, 0.5).to_event(1))


ROWS: dict[str, dict[str, Any]] = {
    "path": dict(objective=PathDensity),
    "annealed": dict(objective=Annealed),
    "hamiltonian": dict(objective=Annealed, dynamics=lambda: Hamiltonian(0.01)),
    "annealed_diagonal": dict(objective=Annealed, start="diagonal"),
    "annealed_normal_3": dict(objective=Annealed, start="normal", num_particles=3),
    "linearized": dict(objective=Linearized, start="diagonal"),
    "mixture": dict(objective=Mixture),
    "reverse": dict(objective=lambda: GaussianReverse(fresh=8)),
    "noise_free": dict(objective=PathDensity, dynamics=lambda: Langevin(StepSize(0.01, per="dim"), noise=False)),
    "init": dict(objective=PathDensity, start=lambda: Init(pyro.infer.autoguide.init_to_sample)),
    "path_4": dict(objective=PathDensity, num_particles=4),
    "refine": dict(objective=Refine, start="diagonal"),
    "refine_encoder": dict(objective=Refine, start=lambda: encoder),
}


@pytest.mark.parametrize("options", ROWS.values(), ids=ROWS)
def test_every_objective_dynamics_and_start(options, caplog):
    x = torch.randn(4)
    found, guide = steps(curved, (x,), True, count=4, **options)
    assert len(guide.steps._steps) == 1, warned(caplog)
    assert_same(found, steps(curved, (x,), False, count=4, **options)[0])


def test_a_full_gaussian_start():
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.cumsum(0), 0.5).to_event(1), obs=x)

    options, x = dict(objective=Annealed, start="full"), torch.randn(3)
    found, guide = steps(model, (x,), True, **options)
    assert guide.steps._steps
    assert_same(found, steps(model, (x,), False, **options)[0])


@pytest.mark.parametrize("compile", [False, True])
def test_svi_trains_as_it_does_eagerly(compile):
    """Plain SVI sees the parameters of guide and model, and moves them alike."""
    found = []
    for backend in (None, Untouched()):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = ShortRunGuide(
            curved, num_steps=STEPS, step_size=StepSize(0.05), compile=backend is not None, start=Prior()
        )
        if backend is not None:
            guide._compiler = Compiler(backend)
        svi = SVI(curved, guide, pyro.optim.Adam({"lr": 0.05}), ShortRunELBO())
        x = torch.linspace(-1, 1, 4)
        losses = [svi.step(x) for _ in range(7)]
        found.append(torch.tensor([*losses, pyro.param("scale").item(), guide.step_sizes().item()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def guide_of(model: Callable[..., Any], **options: Any) -> ShortRunGuide:
    guide = ShortRunGuide(
        model, num_steps=STEPS, step_size=StepSize(0.01), compile=True, **{"start": Prior(), **options}
    )
    guide._compiler = Compiler(Untouched())
    return guide


def losses(guide: ShortRunGuide, *args: Any, count: int) -> list[float]:
    return [ShortRunELBO().loss_and_grads(guide.model, guide, *args) for _ in range(count)]


def test_other_shapes_are_other_graphs_and_other_values_are_not():
    guide = guide_of(curved)
    for x in (torch.randn(4), torch.randn(4), torch.randn(5), torch.randn(4)):
        losses(guide, x, count=2)
    assert len(guide.steps._steps) == 2


def test_what_a_model_takes_from_outside_is_noticed_at_the_next_comparison(caplog):
    outside = {"scale": 1.0}

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, outside["scale"]))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide, x = guide_of(model), torch.tensor(0.3)
    losses(guide, x, count=4)
    first = next(iter(guide.steps._steps.values()))
    outside["scale"] = 3.0
    losses(guide, x, count=1)  # the fourth from the graph, which is compared
    assert first not in guide.steps._steps.values()
    for scale in (1.0, 2.0, 3.0, 4.0):
        outside["scale"] = scale
        losses(guide, x, count=2)
    assert any("pass that as a tensor argument" in text for text in warned(caplog)) and guide.steps.given_up


@pytest.mark.parametrize("kind", ["branch", "item", "random"])
def test_what_cannot_be_traced_is_said_once_and_gives_the_eager_numbers(kind, caplog):
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if kind == "branch":
            z = z if z > 0 else 2 * z
        elif kind == "item":
            z = z * (1.0 + 0.0 * z.item())
        else:
            z = z + 0.1 * torch.randn(())
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x, found = torch.tensor(1.0), []
    for compile in (True, False):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = ShortRunGuide(model, num_steps=STEPS, step_size=StepSize(0.01), compile=compile, start=Prior())
        if compile:
            guide._compiler = Compiler(Untouched())
        found.append(losses(guide, x, count=3))
    assert kind == "random" or found[0] == pytest.approx(found[1], rel=1e-5)
    assert sum("not one graph" in text for text in warned(caplog)) == 1


def test_a_trace_that_goes_another_way_is_found_out(caplog):
    """Pyro's ``init_to_median`` catches the error of a trace and goes on with zeros."""
    x, options = torch.randn(4), dict(start=lambda: Init(pyro.infer.autoguide.init_to_median))
    found, guide = steps(curved, (x,), True, **options)
    assert guide.steps.given_up and any("another loss" in text for text in warned(caplog))
    assert_same(found, steps(curved, (x,), False, **options)[0])


def test_rows_that_freeze_are_counted_and_warned_of():
    class Wall(torch.autograd.Function):
        """Finite at the start of a run, and no further gradient beyond."""

        generate_vmap_rule = True

        @staticmethod
        def forward(z: Tensor) -> Tensor:
            return z.clone()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (z,) = ctx.saved_tensors
            return torch.where(z > 1.0, torch.nan, grad)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(Wall.apply(z), 1.0), obs=x)

    x, options = torch.zeros(64), dict(objective=Annealed, start="diagonal", dynamics=lambda: Langevin(StepSize(0.1)))
    found, guide = steps(model, (x,), True, **options)
    assert guide.steps._steps and guide.info.nonfinite > 0 and guide._watch._froze
    assert_same(found, steps(model, (x,), False, **options)[0])


def test_weights_of_a_network_get_their_gradients():
    torch.manual_seed(0)
    net = nn.Linear(2, 3)

    def model(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)

    x = torch.randn(5, 3)
    found, _ = steps(model, (x,), True)
    assert "net$$$weight" in found[-1][1]
    assert_same(found, steps(model, (x,), False)[0])


def test_gradients_may_be_changed_in_place(caplog):
    """Clipped together, for one: parameters that are added up have one gradient, that of a sum is one number."""

    def model(x: Tensor) -> None:
        a, b, c = (pyro.param(name, torch.zeros(4)) for name in "abc")
        z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        pyro.factor("f", c.sum())
        pyro.sample("x", dist.Normal(z + (a + b), 1.0).to_event(1), obs=x)

    guide, x = guide_of(model), torch.randn(4)
    losses(guide, x, count=3)
    before = gradients(guide, x)  # from the graph alone
    store = pyro.get_param_store()._params
    store["a"].grad.mul_(2.0)
    store["c"].grad.mul_(3.0)
    assert not warned(caplog)
    for name, factor in dict(a=2.0, b=1.0, c=3.0).items():
        torch.testing.assert_close(store[name].grad, factor * before[name])


def test_a_gradient_that_is_rounding_is_no_reason_to_give_up(caplog):
    """That of what is added to all logits is zero, whatever a sum leaves of it in single precision."""
    torch.set_default_dtype(torch.float32)

    class Rounding(Untouched):
        def build(self, module: Any, inputs: list[Tensor]) -> Any:
            def run(*values: Tensor) -> tuple[Tensor, ...]:
                summary, *record = module(*values)
                return summary, *(t + 3 * torch.finfo(t.dtype).eps if t.is_floating_point() else t for t in record)

            return run

    def model(x: Tensor) -> None:
        shift = pyro.param("shift", torch.tensor(0.3))
        z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        pyro.sample("x", dist.Categorical(logits=z + shift), obs=x)

    guide, x = guide_of(model, start=AutoDiagonalNormal(model), objective=Annealed()), torch.tensor(1)
    guide._compiler = Compiler(Rounding())
    losses(guide, x, count=4)
    assert not guide.steps.given_up, warned(caplog)


def test_numbers_that_are_not_finite_hide_no_others():
    inf = float("inf")
    assert _gap(torch.tensor([inf, 1.0]), torch.tensor([inf, 2.0])) == pytest.approx(0.5)
    assert _gap(torch.tensor([inf, 1.0]), torch.tensor([1.0, inf])) == inf
    assert _gap(torch.tensor([inf]), torch.tensor([inf])) == 0.0


def test_tensors_that_are_not_contiguous(caplog):
    """As the columns of a data frame are: what is a view of them stays one in the graph."""
    first, second = torch.randn(2, 5).t(), torch.randn(2, 5).t()

    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        terms = [(m.t().reshape(-1).view(2, 5) * w.unsqueeze(-1)).sum(0) for m in (first, second)]
        pyro.sample("x", dist.Normal(terms[0] + terms[1].sin(), 1.0).to_event(1), obs=x)

    x = torch.randn(5)
    found, guide = steps(model, (x,), True)
    assert not guide.steps.given_up, warned(caplog)
    assert_same(found, steps(model, (x,), False)[0])


def test_what_is_kept_for_the_way_back_keeps_its_strides(caplog):
    """Solutions of triangular systems lie in memory column by column."""
    factor = torch.eye(4) + 0.3 * torch.ones(4, 4).tril(-1)

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        columns = 0.1 * torch.outer(torch.arange(4.0), z).exp()
        solved = torch.linalg.solve_triangular(factor, columns, upper=False)
        pyro.sample("x", dist.Normal(solved.mT.reshape(8).sin(), 1.0).to_event(1), obs=x)

    options, x = dict(objective=Annealed, start="diagonal"), torch.randn(8)
    found, guide = steps(model, (x,), True, **options)
    assert not guide.steps.given_up, warned(caplog)
    assert_same(found, steps(model, (x,), False, **options)[0])


def test_what_is_drawn_may_depend_on_what_was_filled_in_place(caplog):
    def model(x: Tensor) -> None:
        shape = torch.ones(3)
        shape[0] = pyro.param("a", torch.tensor(2.0), constraint=dist.constraints.positive)
        z = pyro.sample("z", dist.Gamma(shape, 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(), 1.0), obs=x)

    x = torch.tensor(2.0)
    found, guide = steps(model, (x,), True)
    assert not guide.steps.given_up, warned(caplog)
    assert_same(found, steps(model, (x,), False)[0])


# ---------------------------------------------------------------- what is noticed in every call


def gradients(guide: ShortRunGuide, *args: Any) -> dict[str, Tensor | None]:
    """Of one step, from the same seed each time."""
    pyro.set_rng_seed(3)
    store = pyro.get_param_store()._params
    for p in store.values():
        p.grad = None
    losses(guide, *args, count=1)
    return {k: None if p.grad is None else p.grad.clone() for k, p in store.items()}


def test_parameters_that_are_frozen_and_thawed():
    guide, x = guide_of(curved), torch.randn(4)
    losses(guide, x, count=5)
    scale = pyro.get_param_store()._params["scale"]
    assert gradients(guide, x)["scale"] is not None
    scale.requires_grad_(False)
    assert gradients(guide, x)["scale"] is None
    scale.requires_grad_(True)
    assert gradients(guide, x)["scale"] is not None


def test_a_parameter_with_another_constraint():
    def model(x: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(1.5), constraint=dist.constraints.positive)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, scale), obs=x)

    guide, x = guide_of(model), torch.tensor(2.0)
    losses(guide, x, count=5)
    del pyro.get_param_store()["scale"]
    pyro.param("scale", torch.tensor(1.5), constraint=dist.constraints.greater_than(1.0))
    found = gradients(guide, x)
    guide.steps.given_up = True
    with guide.eagerly():
        known = gradients(guide, x)
    torch.testing.assert_close(found["scale"], known["scale"], rtol=1e-4, atol=1e-6)


def test_one_tensor_as_two_arguments_and_in_a_closure():
    x, y = torch.randn(3), torch.randn(3)

    def model(a: Tensor, b: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("a", dist.Normal(z + x, 1.0).to_event(1), obs=a)
        pyro.sample("b", dist.Normal(2 * z, 1.0).to_event(1), obs=b)

    pairs = [(x, x)] * 3 + [(x, y), (y, x), (y, y)]
    found = []
    for compile in (True, False):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = ShortRunGuide(model, num_steps=STEPS, dynamics=Langevin(StepSize(0.01)), start=Prior(), compile=compile)
        if compile:
            guide._compiler = Compiler(Untouched())
        found.append([losses(guide, *pair, count=1)[0] for pair in pairs])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


NETS = ["weights of its own", "a changing buffer"]


@pytest.mark.parametrize("kind", [*NETS, "an object", "a part of a buffer"])
def test_what_a_graph_would_get_wrong_is_eager(kind, caplog):
    net = nn.BatchNorm1d(2) if kind == "a changing buffer" else nn.Linear(2, 2)
    calls = torch.zeros(2)

    def model(x: Any) -> None:
        data = x.data if isinstance(x, Batch) else x
        if kind == "a changing buffer":
            pyro.module("net", net)
        elif kind == "a part of a buffer":
            calls[0] += 1.0
        with pyro.plate("data", len(data)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z) if kind in NETS else z, 1.0).to_event(1), obs=data)

    class Batch:
        data = torch.randn(4, 2)

    guide = ShortRunGuide(model, num_steps=2, step_size=StepSize(0.01), start=Prior(), compile=True)
    guide._compiler = Compiler(Untouched())
    losses(guide, Batch() if kind == "an object" else torch.randn(4, 2), count=4)
    assert guide.steps.given_up and sum("not one graph" in text for text in warned(caplog)) == 1
    if kind == "weights of its own":
        assert net.weight.grad is not None


def test_settings_of_the_guide():
    guide, x = guide_of(curved), torch.randn(4)
    losses(guide, x, count=3)
    guide.num_steps = 5
    losses(guide, x, count=2)
    assert len(guide.info.grad_norm) == 5 and len(guide.steps._steps) == 2


def test_an_interrupt_of_a_comparison_keeps_gradients(monkeypatch):
    guide, x = guide_of(curved), torch.randn(4)
    losses(guide, x, count=2)
    scale = pyro.get_param_store()._params["scale"]
    scale.grad = torch.tensor(100.0)
    monkeypatch.setattr(guide, "log_weight", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        losses(guide, x, count=1)
    assert scale.grad == 100.0
