"""Saving, loading and copying a guide; parameters seen by optimisers and by the next run."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import KINDS, data, decoder, parametrised, shifted
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoMultivariateNormal, AutoNormal, init_to_median
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_shortrun import Init, Langevin, Persistent, Prior, ShortRunGuide, StepSize


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        s = pyro.sample("s", dist.LogNormal(0.0, 0.3))
        pyro.sample("x", dist.Normal(z, s), obs=x)


def subsampled(x: Tensor) -> None:
    with pyro.plate("data", len(x), subsample_size=3) as index:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        s = pyro.sample("s", dist.LogNormal(0.0, 0.3))
        pyro.sample("x", dist.Normal(z, s), obs=x[index])


def data_plate(x: Tensor) -> pyro.plate:
    return pyro.plate("data", len(x), subsample_size=3)


class Encoder(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = PyroModule[nn.Linear](1, 4)

    def forward(self, x: Tensor) -> None:
        loc, scale, loc_s, scale_s = self.net(x.unsqueeze(-1)).unbind(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale.exp()))
            pyro.sample("s", dist.LogNormal(loc_s, scale_s.exp()))


MAKERS: dict[str, Callable[[], ShortRunGuide]] = {
    "prior": lambda: ShortRunGuide(model, num_steps=3, step_size=StepSize(0.02), start=Prior()),
    "per dim": lambda: ShortRunGuide(
        model, num_steps=3, step_size=StepSize(0.02, per="dim"), tune_every=2, start=Prior()
    ),
    "number": lambda: ShortRunGuide(model, num_steps=3, step_size=0.02, start=Prior()),
    "fixed": lambda: ShortRunGuide(model, num_steps=3, step_size=StepSize(0.02, learnable=False), start=Prior()),
    "Init": lambda: ShortRunGuide(model, num_steps=3, step_size=StepSize(0.02), start=Init(init_to_median)),
    "Persistent": lambda: ShortRunGuide(model, num_steps=3, step_size=StepSize(0.02), start=Persistent(0.1)),
    "AutoNormal": lambda: ShortRunGuide(model, num_steps=3, step_size=StepSize(0.02), start=AutoNormal(model)),
    "AutoMultivariateNormal": lambda: ShortRunGuide(
        model, num_steps=3, step_size=StepSize(0.02), start=AutoMultivariateNormal(model)
    ),
    "PyroModule": lambda: ShortRunGuide(model, num_steps=3, step_size=StepSize(0.02), start=Encoder()),
    "subsampled": lambda: ShortRunGuide(
        subsampled, num_steps=3, step_size=StepSize(0.02), create_plates=data_plate, start=AutoNormal(subsampled)
    ),
}


def model_of(guide: ShortRunGuide) -> Callable:
    return subsampled if guide.create_plates else model


def train(guide: ShortRunGuide, steps: int, seed: int = 0, lr: float = 0.01) -> list[float]:
    full = guide.model
    svi = SVI(full, guide, pyro.optim.SGD({"lr": lr}), Trace_ELBO())
    pyro.set_rng_seed(seed)
    return [svi.step(data()) for _ in range(steps)]


def draw(guide: ShortRunGuide, seed: int = 11) -> dict[str, Tensor]:
    pyro.set_rng_seed(seed)
    return {k: v.detach() for k, v in guide(data()).items()}


def through_pickle(guide: Any) -> Any:
    return pickle.loads(pickle.dumps(guide))


def through_torch(guide: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(guide, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


DUPLICATES = {"pickle": through_pickle, "torch.save": through_torch, "deepcopy": copy.deepcopy}

# Every kind of guide by pickle, and every way of copying for the kinds whose parts Pyro itself would damage.
each_copy = pytest.mark.parametrize(
    "maker,duplicate",
    [
        pytest.param(make, duplicate, id=f"{name}-{how}")
        for name, make in MAKERS.items()
        for how, duplicate in DUPLICATES.items()
        if how == "pickle" or name in ("prior", "AutoNormal", "PyroModule")
    ],
)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert set(a) == set(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)


def equal_steps(a: Tensor | dict[str, Tensor], b: Tensor | dict[str, Tensor]) -> None:
    equal(a if isinstance(a, dict) else {"": a}, b if isinstance(b, dict) else {"": b})


# ------------------------------------------------------------------------------------------------ whole guides


@each_copy
def test_a_copy_does_not_damage_the_live_guide(maker, duplicate):
    """Its draws and its further training are as if it had never been copied."""
    runs = []
    for copied in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = maker()
        train(guide, 3)
        models = [m.model for m in guide.modules() if hasattr(m, "_model")]
        if copied:
            duplicate(guide)
            assert [m.model for m in guide.modules() if hasattr(m, "_model")] == models
            assert guide.info is not None
        guide.eval()
        values = draw(guide)
        guide.train()
        runs.append((values, train(guide, 3, seed=4)))
    equal(*(values for values, _ in runs))
    assert runs[0][1] == runs[1][1]


@each_copy
def test_a_copy_before_the_first_call(maker, duplicate):
    """A guide that was never called is copied too, and then set up by its own first call."""
    guide = maker()
    loaded = duplicate(guide).attach(model_of(guide))
    assert math.isfinite(train(guide, 1)[0])
    for part in loaded.modules():  # an AutoGuide that has seen no data needs its model as well
        if hasattr(part, "_model") and part._model is None:
            part._model = (model_of(guide),)
    pyro.clear_param_store()
    assert math.isfinite(train(loaded, 1)[0])


@each_copy
def test_loaded_guide_works_after_attach(maker, duplicate):
    """Same draws, same step sizes, same further losses, in a process whose parameter store knows nothing of it."""
    pyro.set_rng_seed(0)
    guide = maker()
    train(guide, 4)
    loaded = duplicate(guide)
    guide.eval()
    values, etas = draw(guide), guide.step_sizes()
    guide.train()
    losses = train(guide, 3, seed=4)
    pyro.clear_param_store()
    assert loaded.attach(model_of(guide)) is loaded
    equal_steps(loaded.step_sizes(), etas)
    loaded.eval()
    equal(draw(loaded), values)
    loaded.train()
    assert train(loaded, 3, seed=4) == losses


def test_a_copy_is_independent():
    """With parameters of its own (``module_local_params``), training one leaves the other alone."""
    with pyro.settings.context(module_local_params=True):
        guide = MAKERS["AutoNormal"]().setup(data())
        other = copy.deepcopy(guide).attach(model)
        before = {k: v.detach().clone() for k, v in guide.named_parameters()}
        loss_fn = Trace_ELBO()(model, other)
        optimiser = torch.optim.SGD(loss_fn.parameters(), lr=0.01)
        loss_fn(data()).backward()
        optimiser.step()
        for name, value in guide.named_parameters():
            assert torch.equal(value, before[name]), name
        assert all(not torch.equal(v, before[k]) for k, v in other.named_parameters())


def test_copy_forgets_the_conditioning_data():
    """Data stay with the live guide."""
    guide = MAKERS["prior"]().setup(data()).condition_on(data(3))
    loaded = through_pickle(guide).attach(model)
    assert guide(data(3))["z"].shape == (3,)
    assert guide()["z"].shape == (3,)
    assert loaded(data(5))["z"].shape == (5,)


def test_part_of_a_list_is_copied_with_it():
    """Pyro's AutoGuideList and AutoNormal lose their models when they are pickled, and get them back by hand."""
    hidden, seen = poutine.block(model, expose=["s"]), poutine.block(model, expose=["z"])
    guide = AutoGuideList(model)
    guide.append(AutoNormal(hidden))
    guide.append(ShortRunGuide(seen, num_steps=2, step_size=StepSize(0.02), start=Prior()))
    svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.01}), Trace_ELBO())
    svi.step(data())
    pyro.set_rng_seed(3)
    loss = Trace_ELBO().loss(model, guide, data())
    loaded = through_pickle(guide)
    assert guide[1].model is seen and guide[1].master() is guide
    loaded._model, loaded[0]._model = (model,), (hidden,)
    loaded[1].attach(seen)
    pyro.set_rng_seed(3)
    assert Trace_ELBO().loss(model, loaded, data()) == loss


# ------------------------------------------------------------------------------------------------ state dicts


def saved(state: dict) -> dict:
    """Through a file that holds no pickled code."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_state_dict_round_trip(maker):
    """A new guide of a new process continues the training of the old one, loss by loss."""
    guide = maker().setup(data())
    train(guide, 4)
    state = saved(guide.state_dict())
    assert state
    losses = train(guide, 4, seed=9)

    pyro.clear_param_store()
    other = maker().setup(data())
    assert set(other.state_dict()) == set(state)
    other.load_state_dict(state)
    assert train(other, 4, seed=9) == losses
    assert set(saved(other.state_dict())) == set(state)


def test_state_dict_of_an_elbo_module_with_its_optimiser():
    """``Trace_ELBO()(model, guide)`` and Adam with its moments."""

    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = decoder()
        guide = ShortRunGuide(model, num_steps=3, step_size=StepSize(0.02), start=AutoNormal(model)).setup(data())
        loss_fn = Trace_ELBO()(model, guide)
        return loss_fn, torch.optim.Adam(loss_fn.parameters(), lr=0.02)

    def steps(loss_fn: nn.Module, optimiser: torch.optim.Optimizer, seed: int) -> list[float]:
        pyro.set_rng_seed(seed)
        losses = []
        for _ in range(3):
            optimiser.zero_grad()
            loss = loss_fn(data())
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        return losses

    with pyro.settings.context(module_local_params=True):
        loss_fn, optimiser = start()
        steps(loss_fn, optimiser, 1)
        state = saved({"module": loss_fn.state_dict(), "optimiser": optimiser.state_dict()})
        losses = steps(loss_fn, optimiser, 2)
        loss_fn, optimiser = start()
        loss_fn.load_state_dict(state["module"])
        optimiser.load_state_dict(state["optimiser"])
        assert steps(loss_fn, optimiser, 2) == losses


def test_persistent_states_are_in_the_state_dict(dtype):
    guide = ShortRunGuide(model, num_steps=2, dynamics=Langevin(0.05, noise=False), start=Persistent())
    assert not any("store" in key for key in guide.state_dict())
    end = torch.stack([*guide(data()).values()], -1).detach()
    state = saved(guide.state_dict())
    assert state["start.store"].shape == (5, 2) and state["start.visited"].all()
    torch.testing.assert_close(state["start.store"][:, 0], end[:, 0])
    torch.testing.assert_close(state["start.store"][:, 1].exp(), end[:, 1])
    following = guide(data())["z"]

    other = ShortRunGuide(model, num_steps=2, dynamics=Langevin(0.05, noise=False), start=Persistent()).setup(data())
    assert not other.start.visited.any()
    other.load_state_dict(state)
    torch.testing.assert_close(other(data())["z"], following)


def test_state_dict_does_not_depend_on_the_call():
    """What one call leaves behind (info, carried log-determinants) is not state."""
    guide = MAKERS["prior"]().setup(data())
    before = set(guide.state_dict())
    train(guide, 2)
    guide.sample_posterior(data(), num_samples=2)
    assert set(guide.state_dict()) == before == {"dynamics.step_size.value_unconstrained"}


def test_state_dict_refuses_another_kind_of_step_size():
    state = MAKERS["prior"]().setup(data()).state_dict()
    pyro.clear_param_store()
    with pytest.raises(RuntimeError, match="size mismatch.*step_size"):
        MAKERS["per dim"]().setup(data()).load_state_dict(state)


# ------------------------------------------------------------------------------------------------ parameter store


@pytest.mark.parametrize("name", ["prior", "per dim", "number", "Init", "AutoNormal", "subsampled"])
def test_parameter_store_round_trip(name):
    """Pyro's own way: the store's state is saved, and a new guide with the same names finds its values there.

    That is so for PyroParams. A start made of plain nn.Parameters or buffers (an nn.Linear, AutoMultivariateNormal,
    Persistent) is not restored from the store by Pyro; the state dict has them.
    """
    maker = MAKERS[name]
    pyro.set_rng_seed(0)
    guide = maker().setup(data())
    train(guide, 4)
    state = copy.deepcopy(pyro.get_param_store().get_state())
    etas, losses = guide.step_sizes(), train(guide, 3, seed=9)

    pyro.clear_param_store()
    pyro.get_param_store().set_state(state)
    other = maker().setup(data())
    equal_steps(other.step_sizes(), etas)
    assert train(other, 3, seed=9) == losses


def test_a_step_size_from_the_store_is_not_backed_off():
    """A first guess given as a number is reduced at set-up where it is too large; a trained value is not."""

    def tight(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.05), obs=x)

    ShortRunGuide(tight, num_steps=2, step_size=StepSize(0.09), start=Prior()).setup(data())
    state = copy.deepcopy(pyro.get_param_store().get_state())
    pyro.clear_param_store()
    assert ShortRunGuide(tight, num_steps=2, step_size=0.08, start=Prior()).setup(data()).step_sizes() < 0.01
    pyro.clear_param_store()
    pyro.get_param_store().set_state(state)
    other = ShortRunGuide(tight, num_steps=2, step_size=0.08, start=Prior()).setup(data())
    assert other.step_sizes().item() == pytest.approx(0.09, rel=1e-5)


# ------------------------------------------------------------------------------------------------ parameters


EXPECTED = {  # what a torch optimiser sees after setup()
    "prior": {"dynamics.step_size.value_unconstrained"},
    "per dim": {"dynamics.step_size.value_unconstrained"},
    "number": {"dynamics.step_size.value_unconstrained"},
    "fixed": set(),
    "Init": {"dynamics.step_size.value_unconstrained"},
    "Persistent": {"dynamics.step_size.value_unconstrained"},
    "PyroModule": {"dynamics.step_size.value_unconstrained", "start.net.weight", "start.net.bias"},
}


@pytest.mark.parametrize("name", MAKERS)
def test_setup_creates_every_parameter(name):
    guide = MAKERS[name]()
    assert not [k for k, _ in guide.named_parameters() if "step_size" in k]
    assert guide.setup(data()) is guide
    names = {k for k, _ in guide.named_parameters()}
    if name in EXPECTED:
        assert names == EXPECTED[name]
    else:
        assert sum(k.startswith("start.") for k in names) >= 2
    train(guide, 2)
    assert {k for k, _ in guide.named_parameters()} == names
    guide.setup(data())
    assert {k for k, _ in guide.named_parameters()} == names


def test_setup_twice_changes_nothing():
    guide = MAKERS["AutoNormal"]().setup(data())
    train(guide, 2)
    before = {k: v.clone() for k, v in guide.state_dict().items()}
    guide.setup(data())
    equal(guide.state_dict(), before)


@pytest.mark.parametrize("name", ["prior", "AutoNormal", "PyroModule"])
def test_torch_optimiser_trains_the_guide(name):
    guide = MAKERS[name]().setup(data())
    before = {k: v.detach().clone() for k, v in guide.named_parameters()}
    optimiser = torch.optim.SGD(guide.parameters(), lr=0.01)
    loss = Trace_ELBO().differentiable_loss(model, guide, data())
    loss.backward()
    optimiser.step()
    for key, value in guide.named_parameters():
        assert not torch.equal(value, before[key]), key
        assert value.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_parameter_changes_the_next_run(kind, dtype):
    """Noise-free steps go to ``(x - theta) / 2`` at rate ``1 - 2 eta``, with the theta of the moment."""
    shifting, leaf = parametrised(kind, shifted, 0.3)
    x, eta, steps = data(), 0.1, 3
    shrink = (1 - 2 * eta) ** steps
    guide = ShortRunGuide(shifting, num_steps=steps, dynamics=Langevin(eta, noise=False), start=Prior()).setup(x)
    for theta in (0.3, 1.7, 0.9):
        leaf().data.fill_(theta)
        path = guide.trajectory(x)["z"].squeeze(1)
        mean = (x - theta) / 2
        torch.testing.assert_close(path[-1], mean + shrink * (path[0] - mean))


def test_a_changed_step_size_changes_the_next_run(dtype):
    """Set through the module, as an optimiser would, or through the parameter store."""
    size = StepSize(0.1)
    guide = ShortRunGuide(decoder(), num_steps=1, dynamics=Langevin(size, noise=False), start=Prior()).setup(data())

    def check(eta: float) -> None:
        path = guide.trajectory(data())["z"].squeeze(1)
        mean = (data() - 0.3) / 2
        torch.testing.assert_close(path[-1], mean + (1 - 2 * eta) * (path[0] - mean))
        assert guide.step_sizes().item() == pytest.approx(eta, rel=1e-5)

    check(0.1)
    size.value = torch.tensor([0.2])
    check(0.2)
    with torch.no_grad():
        size.value_unconstrained.fill_(0.0)
    check(0.5)


def test_changed_data_change_the_next_run(dtype):
    guide = ShortRunGuide(decoder(), num_steps=2, dynamics=Langevin(0.1, noise=False), start=Prior())
    for shift in (0.0, 3.0, -1.0):
        x = data() + shift
        path = guide.trajectory(x)["z"].squeeze(1)
        mean = (x - 0.3) / 2
        torch.testing.assert_close(path[-1], mean + 0.64 * (path[0] - mean))


@pytest.mark.parametrize("start", [Prior, lambda: AutoNormal(model)])
def test_two_guides_of_one_model_have_states_of_their_own(start):
    """Under ``module_local_params``: training one, or not, makes no difference to the other."""
    losses = []
    for alone in (True, False):
        with pyro.settings.context(module_local_params=True):
            guides = [ShortRunGuide(model, num_steps=2, step_size=StepSize(0.02), start=start()) for _ in range(2)]
            for guide in guides:
                pyro.set_rng_seed(0)
                guide.setup(data())
            loss_fns = [Trace_ELBO()(model, guide) for guide in guides]
            optimisers = [torch.optim.SGD(f.parameters(), lr=0.01) for f in loss_fns]
            for i in range(3):
                for which in (0,) if alone else (1, 0):
                    pyro.set_rng_seed(i + 10 * which)
                    optimisers[which].zero_grad()
                    loss = loss_fns[which](data())
                    loss.backward()
                    optimisers[which].step()
            losses.append(loss.item())
    assert losses[0] == losses[1]


def test_training_changes_the_step_size_every_time():
    """A guard for the tests above: the training they compare is not idle."""
    guide = MAKERS["prior"]().setup(data())
    etas = [guide.step_sizes().item()]
    for i in range(3):
        train(guide, 1, seed=i)
        etas.append(guide.step_sizes().item())
    assert all(a != b for a, b in pairwise(etas))
