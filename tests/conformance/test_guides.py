"""Our guides as peers of Pyro's: what AutoNormal does in a program, they do. AutoNormal is a row of every law.

What differs on purpose is a test of its own at the end, and in the docs (Pyro's interfaces).
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    EnergyDistance,
    JitTrace_ELBO,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoCallable, AutoDelta, AutoGuideList, AutoNormal, init_to_value
from pyro.infer.reparam import LocScaleReparam
from torch import Tensor

from pyro_shortrun import (
    Annealed,
    Init,
    LangevinEncoderGuide,
    Prior,
    SemiImplicitGuide,
    ShortRunGuide,
)

N = 5


def shared(x: Tensor, scale: float = 1.0) -> Tensor:
    """Latents of all rows: a vector, and a positive one."""
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 0.3))
    with pyro.plate("data", len(x)):
        return pyro.sample("x", dist.Normal(scale * loc.sum(-1, keepdim=True), sigma), obs=x)


def local(x: Tensor, scale: float = 1.0) -> Tensor:
    """Latents of rows: a vector."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        return pyro.sample("x", dist.Normal(scale * z.sum(-1), 1.0), obs=x)


def data() -> Tensor:
    return torch.linspace(-1.0, 1.0, N)


def features(x: Tensor, scale: float = 1.0) -> Tensor:
    return torch.stack([x**k for k in range(N + 1)], -1)


SHAPES: dict[Callable, dict[str, tuple[int, ...]]] = {shared: {"loc": (2,), "sigma": ()}, local: {"z": (N, 2)}}
GUIDES: dict[str, Callable[[Callable], Any]] = {
    "AutoNormal": AutoNormal,
    "rule": lambda m: ShortRunGuide(m, num_steps=2),
    "prior": lambda m: ShortRunGuide(m, num_steps=2, start=Prior(), step_size=0.05),
    "AutoNormal, annealed": lambda m: ShortRunGuide(m, num_steps=2, start=AutoNormal(m), objective=Annealed()),
    "semi-implicit": lambda m: SemiImplicitGuide(m, num_mixtures=3),
    "encoder": lambda m: LangevinEncoderGuide(m, features, num_steps=1),
}
SINGLE = {k: v for k, v in GUIDES.items() if k != "encoder"}  # for latents of all rows
PAIRS = [(k, m) for m in (shared, local) for k in (SINGLE if m is shared else GUIDES)]
every = pytest.mark.parametrize(("kind", "model"), PAIRS, ids=[f"{k}-{m.__name__}" for k, m in PAIRS])


def shapes(values: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in values.items()}


def trained(guide: Any, model: Callable, steps: int = 2, elbo: Any = None) -> list[float]:
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo or Trace_ELBO())
    return [svi.step(data()) for _ in range(steps)]


# ---------------------------------------------------------------- a call


@every
def test_a_call_gives_every_latent_in_its_shape(kind, model):
    guide = GUIDES[kind](model)
    for _ in range(2):  # the first call creates
        assert shapes(guide(data())) == SHAPES[model]


@every
def test_a_trace_has_the_values_that_were_returned_at_finite_density(kind, model):
    guide = GUIDES[kind](model)
    trace = poutine.trace(guide).get_trace(data())
    values = trace.nodes["_RETURN"]["value"]
    assert set(values) == set(SHAPES[model])
    assert all(torch.equal(trace.nodes[k]["value"], v) for k, v in values.items())
    assert trace.log_prob_sum().isfinite()
    replayed = poutine.trace(poutine.replay(model, trace=trace)).get_trace(data())
    assert all(torch.equal(replayed.nodes[k]["value"], v) for k, v in values.items())
    assert replayed.log_prob_sum().isfinite()


@every
def test_keyword_arguments_reach_the_model(kind, model):
    if kind == "encoder":
        assert shapes(GUIDES[kind](model)(data(), scale=2.0)) == SHAPES[model]
        return
    seen: list[float] = []

    def spy(x: Tensor, scale: float = 1.0) -> Tensor:
        seen.append(scale)
        return model(x, scale)

    assert shapes(GUIDES[kind](spy)(data(), scale=2.0)) == SHAPES[model]
    assert set(seen) == {2.0}


@every
@pytest.mark.parametrize("sizes", [{}, {"num_particles": 2}, {"num_particles": 2, "vectorize_particles": True}])
def test_losses_are_finite_however_particles_are_drawn(kind, model, sizes):
    guide = GUIDES[kind](model)
    vectorised = "vectorize_particles" in sizes
    losses = trained(guide, model, elbo=Trace_ELBO(**sizes, **({"max_plate_nesting": 1} if vectorised else {})))
    assert all(abs(loss) < 1e6 for loss in losses)


@every
@pytest.mark.parametrize("elbo", [TraceMeanField_ELBO, TraceGraph_ELBO, lambda: RenyiELBO(num_particles=2)])
def test_other_losses_of_pyro(kind, model, elbo):
    assert all(abs(loss) < 1e6 for loss in trained(GUIDES[kind](model), model, elbo=elbo()))


@every
def test_handlers_around_a_guide_weigh_it(kind, model):
    """A scale of 3 triples log q, and a mask takes it out."""
    guide = GUIDES[kind](model)
    guide(data())
    pyro.set_rng_seed(1)
    plain = poutine.trace(guide).get_trace(data()).log_prob_sum()
    pyro.set_rng_seed(1)
    scaled = poutine.trace(poutine.scale(guide, scale=3.0)).get_trace(data()).log_prob_sum()
    torch.testing.assert_close(scaled, 3 * plain)
    assert poutine.trace(poutine.mask(guide, mask=False)).get_trace(data()).log_prob_sum() == 0


# ---------------------------------------------------------------- what is asked of it afterwards


@every
def test_medians_and_quantiles(kind, model):
    guide = GUIDES[kind](model)
    trained(guide, model)
    assert shapes(guide.median(data())) == SHAPES[model]
    found = guide.quantiles([0.1, 0.5, 0.9], data())
    assert set(found) == set(SHAPES[model])
    for name, shape in SHAPES[model].items():
        value = torch.as_tensor(found[name])
        assert value.shape == (3, *shape) and (value[0] <= value[1]).all() and (value[1] <= value[2]).all()


@every
@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(kind, model, parallel):
    guide = GUIDES[kind](model)
    trained(guide, model)
    sites = (*SHAPES[model], "x", "_RETURN")
    found = Predictive(model, guide=guide, num_samples=3, parallel=parallel, return_sites=sites)(data())
    sizes = {**{k: torch.Size(s).numel() for k, s in SHAPES[model].items()}, "x": N, "_RETURN": N}
    assert {k: (len(v), v[0].numel()) for k, v in found.items()} == {k: (3, n) for k, n in sizes.items()}


@every
def test_a_conditioned_model_is_a_model(kind, model):
    held = next(iter(SHAPES[model]))
    if len(SHAPES[model]) == 1:
        pytest.skip("nothing would be left to infer")
    model = poutine.condition(shared, data={held: torch.ones(2)})
    assert set(GUIDES[kind](model)(data())) == {"sigma"}


# ---------------------------------------------------------------- parameters


@pytest.mark.filterwarnings("ignore:.*not registered in the param store because requires_grad=False")  # pyro.module's
@every
def test_parameters_are_registered_trained_and_can_be_frozen(kind, model):
    guide = GUIDES[kind](model)
    guide(data())
    if kind == "encoder":  # its map is moved by its own chain, and is a buffer
        assert "chain.phi" in dict(guide.named_buffers())
        return
    names = [k for k, p in guide.named_parameters()]
    assert names and all(p.requires_grad for p in guide.parameters())
    before = {k: p.detach().clone() for k, p in guide.named_parameters()}
    guide.requires_grad_(False)
    trained(guide, model, steps=1)
    assert all(torch.equal(p, before[k]) for k, p in guide.named_parameters())
    guide.requires_grad_(True)
    trained(guide, model, steps=2)
    assert any(not torch.equal(p, before[k]) for k, p in guide.named_parameters())


@every
def test_a_state_goes_from_one_guide_to_another(kind, model):
    with pyro.settings.context(module_local_params=True):
        first, second = GUIDES[kind](model), GUIDES[kind](model)
        for guide in (first, second):
            guide(data())
        second.load_state_dict(first.state_dict())
        for (k, a), (_, b) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=k)


@every
def test_the_parameter_store_saves_and_loads_it(kind, model, tmp_path):
    guide = GUIDES[kind](model)
    trained(guide, model)
    before = {k: v.detach().clone() for k, v in pyro.get_param_store().items()}
    pyro.get_param_store().save(str(tmp_path / "store"))
    trained(guide, model)
    pyro.clear_param_store()
    pyro.get_param_store().load(str(tmp_path / "store"))
    assert {k: v.tolist() for k, v in pyro.get_param_store().items()} == {k: v.tolist() for k, v in before.items()}


@every
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_have_the_values_and_are_apart(kind, model, how):
    guide = GUIDES[kind](model)
    trained(guide, model)
    if how == "deepcopy":
        other = copy.deepcopy(guide)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(guide))
    else:
        file = io.BytesIO()
        torch.save(guide, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    if how != "deepcopy" and kind != "AutoNormal":
        other.attach(model)
    mine, its = dict(guide.named_parameters()), dict(other.named_parameters())
    assert list(mine) == list(its)
    assert all(torch.equal(mine[k], its[k]) and mine[k] is not its[k] for k in mine)
    if kind != "AutoNormal":
        assert shapes(other(data())) == SHAPES[model]


# ---------------------------------------------------------------- lists


def split(model: Callable) -> tuple[Callable, Callable]:
    return poutine.block(model, hide=["sigma"]), poutine.block(model, expose=["sigma"])


@pytest.mark.parametrize("kind", SINGLE)
@pytest.mark.parametrize("nested", [False, True])
def test_a_part_of_a_list_and_of_a_list_of_lists(kind, nested):
    visible, rest = split(shared)
    guide, part = AutoGuideList(shared), SINGLE[kind](visible)
    if nested:
        inner = AutoGuideList(visible)
        inner.append(part)
        part = inner
    guide.append(AutoDelta(rest))  # first what the run is given
    guide.append(part)
    assert shapes(guide(data())) == SHAPES[shared]
    assert all(abs(loss) < 1e6 for loss in trained(guide, shared))
    assert shapes(guide.median(data())) == SHAPES[shared]


def test_a_function_beside_a_run():
    """AutoCallable, with its own median."""
    visible, rest = split(shared)

    def sigma(x: Tensor) -> dict[str, Tensor]:
        loc = pyro.param("sigma_loc", torch.tensor(0.0))
        return {"sigma": pyro.sample("sigma", dist.LogNormal(loc, 0.1))}

    guide = AutoGuideList(shared)
    guide.append(AutoCallable(rest, sigma, lambda x: {"sigma": torch.tensor(1.0)}))
    guide.append(ShortRunGuide(visible, num_steps=2))
    assert all(abs(loss) < 1e6 for loss in trained(guide, shared))
    assert guide.median(data())["sigma"] == 1.0


# ---------------------------------------------------------------- plates, starts, reparametrisation


@pytest.mark.parametrize("kind", ["AutoNormal", "prior", "semi-implicit"])
def test_plates_with_given_indices(kind):
    """``create_plates`` and ``subsample=``: guide and model see the rows that the user chose."""
    index = torch.tensor([3, 1])

    def plates(x: Tensor, index: Tensor) -> Any:
        return pyro.plate("data", N, subsample=index)

    def model(x: Tensor, index: Tensor) -> None:
        with pyro.plate("data", N, subsample=index) as i:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])

    makers = {
        "AutoNormal": lambda: AutoNormal(model, create_plates=plates),
        "prior": lambda: ShortRunGuide(model, num_steps=2, start=Prior(), create_plates=plates),
        "semi-implicit": lambda: SemiImplicitGuide(model, num_mixtures=3, create_plates=plates),
    }
    guide = makers[kind]()
    trace = poutine.trace(guide).get_trace(data(), index)
    assert trace.nodes["z"]["value"].shape == (2,)
    elbo, losses = Trace_ELBO(), []
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    for rows in (index, torch.tensor([0, 4])):
        losses.append(svi.step(data(), rows))
    assert all(abs(loss) < 1e6 for loss in losses)


def test_init_loc_fn_is_where_it_starts():
    """As AutoNormal's ``init_loc_fn``: a run of no length ends there."""
    value = {"loc": torch.tensor([0.3, -0.2]), "sigma": torch.tensor(1.5)}
    start = Init(init_to_value(values=value), scale=1e-6)
    ours = ShortRunGuide(shared, num_steps=1, step_size=1e-9, start=start)(data())
    theirs = AutoNormal(shared, init_loc_fn=init_to_value(values=value), init_scale=1e-6)(data())
    for name in value:
        torch.testing.assert_close(ours[name], value[name], rtol=0, atol=1e-3)
        torch.testing.assert_close(theirs[name], value[name], rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", SINGLE)
def test_reparametrised_sites_are_given_under_their_new_names(kind):
    def hierarchy(x: Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, scale))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    model = poutine.reparam(hierarchy, config={"z": LocScaleReparam(0.0)})
    guide = SINGLE[kind](model)
    assert set(guide(data())) >= {"scale", "z_decentered"}
    assert Predictive(model, guide=guide, num_samples=2)(data())["z"].shape[0] == 2


# ---------------------------------------------------------------- what differs on purpose


@pytest.mark.parametrize("kind", [k for k in GUIDES if k != "AutoNormal"])
def test_jit_is_refused_by_name(kind):
    """torch.jit would freeze the draws of a run; ``compile=True`` is ours."""
    guide = GUIDES[kind](local)
    with pytest.raises(NotImplementedError, match="use the ELBO without Jit"):
        trained(guide, local, elbo=JitTrace_ELBO(ignore_jit_warnings=True))


def test_a_pickled_guide_has_no_model_and_says_so():
    """As AutoGuide's, which then fails in the middle of something; ours names the remedy."""
    other = pickle.loads(pickle.dumps(GUIDES["prior"](local)))
    with pytest.raises(RuntimeError, match=r"guide\.attach\(model\)"):
        other(data())


def test_likelihood_free_losses():
    """EnergyDistance puts its plate where ``max_plate_nesting`` says, which must be left of the model's own plates:
    a run has read these without the plate around it."""
    for nesting, reason in ((1, "give it a dim to the left of -1"), (2, None)):
        pyro.clear_param_store()
        elbo = EnergyDistance(num_particles=2, max_plate_nesting=nesting)
        svi = SVI(local, GUIDES["prior"](local), pyro.optim.Adam({"lr": 0.01}), elbo)
        if reason is None:
            assert abs(svi.step(data())) < 1e6
            continue
        with pytest.raises(ValueError, match=reason):
            svi.step(data())
