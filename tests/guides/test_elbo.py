"""ShortRunELBO against Trace_ELBO: the same numbers and gradients, and clear refusals."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import local
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from torch import Tensor
from zoo import CASES, EXTRA, Case

from pyro_shortrun import Annealed, Langevin, Persistent, Prior, ShortRunELBO, ShortRunGuide, StepSize
from pyro_shortrun.compile import Compiler, Untouched

NAMES = ["eight_schools", "baseball", "vae", "nested_inner", "scaled", "masked", "bnn", "nested_both"]
SOME = [c for c in CASES + EXTRA if c.name in NAMES]


def step(case: Case, loss, compile: bool = False, **options) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of three steps and the parameters after them."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, args = case.make()
    dynamics = Langevin(StepSize(1e-3))
    options.setdefault("dynamics", dynamics)
    guide = ShortRunGuide(
        model, num_steps=3, compile=compile, create_plates=case.create_plates, **{"start": Prior(), **options}
    )
    if compile:
        guide._compiler = Compiler(Untouched())
    svi = SVI(model, guide, pyro.optim.SGD({"lr": 1e-4}), loss)
    losses = []
    for i in range(3):
        pyro.set_rng_seed(i)
        losses.append(svi.step(*args))
    return losses, {k: v.detach().clone() for k, v in pyro.get_param_store().items()}


def assert_same(a: tuple, b: tuple) -> None:
    torch.testing.assert_close(torch.tensor(a[0]), torch.tensor(b[0]), rtol=1e-5, atol=1e-5)
    assert a[1].keys() == b[1].keys()
    for name in a[1]:
        torch.testing.assert_close(a[1][name], b[1][name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("case", SOME, ids=lambda c: c.name)
def test_equals_trace_elbo(case: Case, compile: bool):
    assert_same(step(case, ShortRunELBO(), compile), step(case, Trace_ELBO()))


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("name", ["eight_schools", "vae", "nested_inner"])
def test_equals_trace_elbo_annealed(name: str, compile: bool):
    case = next(c for c in SOME if c.name == name)
    assert_same(
        step(case, ShortRunELBO(), compile, objective=Annealed()), step(case, Trace_ELBO(), objective=Annealed())
    )


@pytest.mark.parametrize("start", [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal], ids=lambda s: s.__name__)
def test_equals_trace_elbo_with_a_learned_start(start: Callable):
    case = next(c for c in SOME if c.name == "eight_schools")
    model, _ = case.make()
    found = []
    for loss, compile in ((Trace_ELBO(), False), (ShortRunELBO(), True)):
        pyro.set_rng_seed(5)
        pyro.clear_param_store()
        found.append(step(case, loss, compile, objective=Annealed(), start=start(model)))
    assert_same(*found)


def test_particles_are_averaged():
    model, args = next(c for c in SOME if c.name == "vae").make()
    guide = ShortRunGuide(model, num_steps=2, dynamics=Langevin(StepSize(0.01)), start=Prior())
    pyro.set_rng_seed(1)
    weights = guide.log_weight(*args, num_particles=5)
    assert weights.shape == (5,) and weights.std() > 0
    pyro.set_rng_seed(1)
    assert ShortRunELBO(num_particles=5).loss(model, guide, *args) == pytest.approx(-weights.mean().item())


def moving(x: Tensor) -> None:
    top = pyro.param("top", torch.tensor(2.0))
    z = pyro.sample("z", dist.Uniform(torch.zeros(()), top))
    pyro.sample("x", dist.Normal(z, 1.0), obs=x.sum())


def test_refusals():
    x = torch.ones(3)
    loss = ShortRunELBO()
    with pytest.raises(ValueError, match="AutoNormal: use Trace_ELBO"):
        loss.loss_and_grads(local, AutoNormal(local), x)
    with pytest.raises(ValueError, match="another model"):
        loss.loss_and_grads(moving, ShortRunGuide(local, start=Prior()), x)
    with pytest.raises(NotImplementedError, match="Persistent"):
        ShortRunGuide(local, start=Persistent()).setup(x).log_weight(x)
    with pytest.raises(NotImplementedError, match="support depends on parameters"):
        loss.loss_and_grads(moving, ShortRunGuide(moving, start=Prior()), x)


def test_weights_that_are_to_be_trained_again_get_gradients():
    """Whether the model reaches anything trainable is looked at in every call."""
    weight = torch.nn.Linear(1, 1)
    weight.requires_grad_(False)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(weight(z), 1.0).to_event(1), obs=x)

    guide = ShortRunGuide(model, num_steps=2, dynamics=Langevin(StepSize(0.01)), compile=True, start=Prior())
    guide._compiler = Compiler(Untouched())
    x = torch.ones(3, 1)
    ShortRunELBO().loss_and_grads(model, guide, x)
    assert weight.weight.grad is None
    weight.requires_grad_(True)
    ShortRunELBO().loss_and_grads(model, guide, x)
    assert weight.weight.grad is not None and weight.weight.grad.abs().sum() > 0


def test_handlers_around_the_loss_are_refused():
    guide = ShortRunGuide(local, num_steps=2, start=Prior())
    with pytest.raises(NotImplementedError, match="use Trace_ELBO"), poutine.scale(scale=0.5):
        ShortRunELBO().loss_and_grads(local, guide, torch.ones(3))


def test_a_start_that_was_called_before():
    start = AutoNormal(local)
    start(torch.ones(3))
    with pytest.raises(ValueError, match="pass a function, start=lambda"):
        ShortRunGuide(local, start=start)
    guide = ShortRunGuide(local, num_steps=2, start=lambda *args: start(*args))
    assert ShortRunELBO().loss(local, guide, torch.ones(3)) > 0
