"""The unconstrained log density of a Pyro program against Pyro's own trace, over the zoo and small models.

Each law runs over ``ALL``: the zoo of models and the small ones below, each of which is there for one feature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroParam
from pyro.ops.indexing import Vindex
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _ENUM_ALLOCATOR
from torch import Tensor, nn
from torch.distributions import biject_to
from zoo import CASES, EXTRA

from pyro_shortrun.density import Binder, Call, LogDensity, Program
from pyro_shortrun.density.layout import Arrow
from pyro_shortrun.density.trust import warn_if_rows_mix

# ------------------------------------------------------------------------------------------------ small models


def data(*shape: int) -> Tensor:
    """The same numbers in every dtype and on every device."""
    gen = torch.Generator(device="cpu").manual_seed(7)
    values = torch.randn(shape, generator=gen, dtype=torch.float64, device="cpu")
    return values.to(torch.empty(0))


def shared(x: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("n", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def local(x: Tensor, size: int | None = None) -> None:
    with pyro.plate("n", len(x), subsample_size=size) as i:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        s = pyro.sample("s", dist.Gamma(2.0, 1.0))
        pyro.sample("x", dist.Normal(z.prod(-1), s), obs=x[i])


def both(x: Tensor, size: int | None = None) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    with pyro.plate("n", len(x), subsample_size=size) as i:
        z = pyro.sample("z", dist.Normal(mu, tau))
        p = pyro.sample("p", dist.Beta(2.0, 3.0))
        pyro.sample("x", dist.Normal(torch.tanh(z), 0.1 + p), obs=x[i])


def constrained_rows(x: Tensor) -> None:
    with pyro.plate("n", len(x)):
        simplex = pyro.sample("simplex", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
        tril = pyro.sample("tril", dist.LKJCholesky(3, torch.tensor(2.0)))
        loc = (tril @ simplex.unsqueeze(-1)).squeeze(-1)
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


def extra_batch(x: Tensor) -> None:
    with pyro.plate("n", x.shape[-1]):
        z = pyro.sample("z", dist.Normal(torch.zeros(3, 1), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def outer_rows(y: Tensor) -> None:
    groups, members = pyro.plate("groups", y.shape[0], dim=-2), pyro.plate("members", y.shape[1], dim=-1)
    with groups:
        centre = pyro.sample("centre", dist.Normal(0.0, 2.0))
        with members:
            z = pyro.sample("z", dist.Normal(centre, 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)


def inner_coupled(y: Tensor) -> None:
    groups, members = pyro.plate("groups", y.shape[0], dim=-2), pyro.plate("members", y.shape[1], dim=-1)
    with groups:
        with members:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z.sum(-1, keepdim=True), 0.5), obs=y[:, :1])


def crossed(y: Tensor) -> None:
    groups, members = pyro.plate("groups", y.shape[0], dim=-2), pyro.plate("members", y.shape[1], dim=-1)
    with groups:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with members:
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with groups, members:
        pyro.sample("y", dist.Normal(a * b, 0.5), obs=y)


def coupled_by_data(x: Tensor) -> None:
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    pyro.sample("total", dist.Normal(z.sum(-1), 0.1), obs=torch.tensor(1.0))


def coupled_by_factor(x: Tensor) -> None:
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Normal(x, 1.0))
    pyro.factor("repulsion", -(z[..., 1:] * z[..., :-1]).sum(-1))


def coupled_by_latent(x: Tensor) -> None:
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Normal(x, 1.0))
    pyro.sample("top", dist.Uniform(0.0, z.exp().sum(-1)))


def words(x: Tensor) -> None:
    with pyro.plate("docs", 2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("words", len(x)):
        pyro.sample("x", dist.Normal(z[..., torch.arange(len(x)) % 2], 1.0), obs=x)


def factor_in_plate(x: Tensor) -> None:
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.deterministic("double", 2 * z)
        pyro.factor("energy", -((z - x) ** 4))
    pyro.factor("constant", torch.tensor(3.0))


def sequential(x: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    for i in pyro.plate("steps", len(x)):
        pyro.sample(f"x_{i}", dist.Normal(mu, 1.0), obs=x[i])


def missing_data(x: Tensor) -> None:
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        seen: Any = torch.arange(len(x)) % 2 == 0
        pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=seen)


def local_support(x: Tensor) -> None:
    with pyro.plate("n", len(x)):
        low = pyro.sample("low", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Uniform(low, low + 2.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def stepwise_support(x: Tensor, step: float = 0.0) -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    top = torch.where(a > step, torch.tensor(4.0), torch.tensor(1.0))  # no graph from top to a
    z = pyro.sample("z", dist.Uniform(0.0, top))
    with pyro.plate("n", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def param_support(x: Tensor) -> None:
    top = pyro.param("top", torch.tensor(3.0), constraint=constraints.positive)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Uniform(0.0, top))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


LOCS = (-1.0, 0.5, 2.0)


@config_enumerate
def mixture_rows(x: Tensor) -> None:
    with pyro.plate("n", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + torch.tensor(LOCS)[k], 0.5), obs=x)


@config_enumerate
def discrete_parent(x: Tensor) -> None:
    with pyro.plate("n", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
        z = pyro.sample("z", dist.Normal(torch.tensor(LOCS)[k], 0.5))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@config_enumerate
def nested_mixture(y: Tensor) -> None:
    groups, members = pyro.plate("groups", y.shape[0], dim=-2), pyro.plate("members", y.shape[1], dim=-1)
    with groups:
        z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
        j = pyro.sample("j", dist.Bernoulli(0.3))
        with members:
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
            pyro.sample("y", dist.Normal(z + j + torch.tensor(LOCS)[k], 0.5), obs=y)


@config_enumerate
def crossed_choice(y: Tensor) -> None:
    groups, members = pyro.plate("groups", y.shape[0], dim=-2), pyro.plate("members", y.shape[1], dim=-1)
    with groups:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with members:
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
    with groups, members:
        pyro.sample("y", dist.Normal(z + torch.tensor(LOCS)[k], 0.5), obs=y)


@config_enumerate
def masked_mixture(x: Tensor) -> None:
    keep: Any = torch.arange(len(x)) % 2 == 0
    with pyro.plate("n", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
        z = pyro.sample("z", dist.Normal(torch.tensor(LOCS)[k], 1.0))
        with poutine.mask(mask=keep):
            pyro.sample("x", dist.Normal(z + 2 * k, 0.5), obs=x)


@config_enumerate
def shared_choice(x: Tensor) -> None:
    k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Normal(Vindex(torch.tensor(LOCS))[k], 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@config_enumerate
def local_states(y: Tensor) -> None:
    transition = torch.tensor([[0.8, 0.2], [0.3, 0.7]])
    with pyro.plate("n", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        state = torch.tensor(0)
        for t in pyro.markov(range(y.shape[1])):
            state = pyro.sample(f"state_{t}", dist.Categorical(transition[state]))
            pyro.sample(f"y_{t}", dist.Normal(z * (1.0 + state), 0.5), obs=y[:, t])


def partly_scaled(x: Tensor) -> None:
    with pyro.plate("n", len(x)):
        with poutine.scale(scale=0.5):
            z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
        keep: Any = torch.arange(len(x)) != 1
        with poutine.mask(mask=keep), poutine.scale(scale=3.0):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def reparametrised(x: Tensor) -> None:
    with poutine.reparam(config={"z": LocScaleReparam(0.0)}):
        both(x)


SMALL: dict[str, tuple[Callable, tuple, tuple[int, int, Arrow | None]]] = {
    # name: model, arguments, (rows, size, arrow)
    "shared": (shared, (6,), (1, 1, None)),
    "local": (local, (6,), (6, 3, None)),
    "both": (both, (6,), (1, 14, Arrow(2, 6, 2, 1.0))),
    "one local": (local, (1,), (1, 3, None)),
    "both, one local": (both, (1,), (1, 4, Arrow(2, 1, 2, 1.0))),
    "subsampled local": (lambda x: local(x, 4), (6,), (4, 3, None)),
    "subsampled both": (lambda x: both(x, 4), (6,), (1, 10, Arrow(2, 4, 2, 1.5))),
    "constrained rows": (constrained_rows, (4, 3), (4, 5, None)),
    "extra batch": (extra_batch, (3, 4), (4, 3, None)),
    "outer rows": (outer_rows, (3, 4), (3, 5, None)),
    "inner coupled": (inner_coupled, (3, 4), (3, 4, None)),
    "crossed": (crossed, (3, 4), (1, 7, None)),
    "coupled by data": (coupled_by_data, (5,), (1, 5, None)),
    "coupled by factor": (coupled_by_factor, (5,), (1, 5, None)),
    "coupled by latent": (coupled_by_latent, (5,), (1, 6, None)),
    "words": (words, (5,), (1, 2, None)),
    "factor in plate": (factor_in_plate, (5,), (5, 1, None)),
    "sequential": (sequential, (3,), (1, 1, None)),
    "missing data": (missing_data, (5,), (5, 2, None)),
    "local support": (local_support, (5,), (5, 2, None)),
    "stepwise support": (stepwise_support, (5,), (1, 2, None)),
    "param support": (param_support, (5,), (5, 1, None)),
    "mixture rows": (mixture_rows, (5,), (5, 1, None)),
    "discrete parent": (discrete_parent, (5,), (5, 1, None)),
    "nested mixture": (nested_mixture, (3, 4), (3, 1, None)),
    "crossed choice": (crossed_choice, (3, 4), (1, 3, None)),
    "masked mixture": (masked_mixture, (5,), (5, 1, None)),
    "shared choice": (shared_choice, (5,), (1, 5, None)),
    "local states": (local_states, (4, 3), (4, 1, None)),
    "partly scaled": (partly_scaled, (5,), (5, 1, None)),
    "reparametrised": (reparametrised, (6,), (1, 14, Arrow(2, 6, 2, 1.0))),
}

# ---------------------------------------------------------------------------------------------- the oracle


@dataclass
class Bound:
    """A model bound as ShortRunGuide binds it, and what an independent evaluation needs."""

    model: Callable
    args: tuple
    call: Call

    @property
    def density(self) -> LogDensity:
        return self.call.model

    def point(self, chains: int = 1) -> Tensor:
        return 0.5 * torch.randn((chains, self.density.layout.rows, self.density.layout.size))


def bind(model: Callable, *args: Any, indices: Mapping | None = None, given: Mapping | None = None) -> Bound:
    program = Program(model)
    reading = program.draw(args, {}, indices, given)
    return Bound(model, args, Binder(program)(reading, args, {}, given))


ALL: dict[str, Callable[[], tuple[Callable, tuple]]] = {case.name: case.make for case in (*CASES, *EXTRA)}
ALL |= {name: lambda m=model, s=shape: (m, (data(*s),)) for name, (model, shape, _) in SMALL.items()}


@pytest.fixture(params=ALL)
def bound(request: pytest.FixtureRequest) -> Bound:
    model, args = ALL[request.param]()
    return bind(model, *args)


@pytest.fixture
def float64(clean_state: None) -> None:
    """Finite differences mean something in double precision only."""
    torch.set_default_dtype(torch.float64)


@dataclass
class Oracle:
    """Pyro's own numbers at one state: totals over the rows."""

    joint: Tensor
    prior: Tensor
    jacobian: Tensor  # as in log q
    scaled_jacobian: Tensor  # as in the joint
    values: dict[str, Tensor]


class _WithoutData(Messenger):
    def _pyro_sample(self, msg: dict) -> None:
        if msg["is_observed"]:
            msg["mask"] = torch.tensor(False)


def oracle(bound: Bound, u: Tensor) -> Oracle:
    """The model conditioned on ``z(u)``, whose transforms are found from its own supports, one site at a time."""
    layout, indices = bound.density.layout, bound.call.bind.indices
    free, values = layout.unpack(u), {}
    sizes = {name: bound.call.reading.trace.nodes[name]["fn"].size for name in indices}

    def plates(*args: Any) -> None:
        for name, index in indices.items():
            pyro.plate(name, sizes[name], subsample=index)

    same_batch = poutine.trace(plates).get_trace()

    def run() -> poutine.Trace:
        model = poutine.replay(poutine.condition(bound.model, data=values), trace=same_batch)
        return poutine.trace(model).get_trace(*bound.args)

    for name in free:  # each support is read where the sites before it have their values
        fn = run().nodes[name]["fn"]
        values[name] = biject_to(fn.support)(free[name])
    trace = run()
    trace.compute_log_prob()
    joint, prior, jacobian, scaled = trace.log_prob_sum(), *torch.zeros(3)
    for name, z in values.items():
        site = trace.nodes[name]
        plated = [f for f in site["cond_indep_stack"] if f.vectorized]
        scale = math.prod((f.full_size or f.size) / f.size for f in plated)
        weight = scale if layout.is_arrow else 1.0
        transform = biject_to(site["fn"].support)
        terms = transform.log_abs_det_jacobian(free[name], z)
        keep = torch.ones(()) if site["mask"] is None else torch.as_tensor(site["mask"]).to(z)
        terms = keep * terms.reshape((*site["fn"].batch_shape, -1)).sum(-1)
        jacobian = jacobian + weight * terms.sum()
        scaled = scaled + scale * terms.sum()
        prior = prior + weight * (keep * site["fn"].log_prob(z)).sum()

    def summed_out(model: Callable) -> Tensor:
        elbo = TraceEnum_ELBO(max_plate_nesting=bound.call.reading.nesting)
        return torch.tensor(-elbo.loss(poutine.condition(model, data=values), plates, *bound.args))

    if bound.density.structure.summed:
        joint = summed_out(bound.model)
        if not any(p.scale != 1 for s in layout.sites for p in s.plates):  # Pyro would scale the prior
            prior = summed_out(_WithoutData()(bound.model))
    return Oracle(joint, prior, jacobian, scaled, values)


def close(actual: Any, expected: Any, rtol: float = 1e-9) -> None:
    """``rtol`` is for float64."""
    if torch.get_default_dtype() == torch.float32:
        rtol = max(rtol, 2e-4)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol)


# ------------------------------------------------------------------------------------------------ laws


def test_rows_sum_to_pyros_log_joint(bound: Bound) -> None:
    u = bound.point()
    expected = oracle(bound, u[0])
    rows = bound.density(u)
    assert rows.shape == (1, bound.density.layout.rows)
    close(rows.sum(), expected.joint + expected.scaled_jacobian)


def test_start_is_the_prior(bound: Bound) -> None:
    u = bound.point()
    expected = oracle(bound, u[0])
    value, prior = bound.density.with_start(u)
    close(value, bound.density(u))
    close(prior.sum(), expected.prior + expected.jacobian)


def test_gradient(float64: None, bound: Bound) -> None:
    density, u = bound.density, bound.point()
    _, grad = density.value_and_grad(u)
    h = 1e-5
    for i in torch.randperm(u.numel())[:4].tolist():
        e = torch.zeros_like(u).view(-1)
        e[i] = h
        slope = (density(u + e.view_as(u)).sum() - density(u - e.view_as(u)).sum()) / (2 * h)
        scale = 1 + grad.abs().max().item() + 1e-3 * abs(density(u).sum().item())
        torch.testing.assert_close(grad.view(-1)[i], slope, rtol=1e-6, atol=1e-7 * scale)


def test_hessian_product(float64: None, bound: Bound) -> None:
    density, h = bound.density, 1e-5
    u = bound.point().requires_grad_()
    vectors = torch.randn((2, *u.shape))
    _, grad = density.value_and_grad(u, create_graph=True)
    products = density.hessian_product(u, grad, create_graph=False)(vectors)
    assert products.shape == vectors.shape
    for v, product in zip(vectors, products, strict=True):
        up, down = density.value_and_grad(u + h * v)[1], density.value_and_grad(u - h * v)[1]
        scale = 1 + grad.abs().max().item() + product.abs().max().item()
        torch.testing.assert_close(product, (up - down) / (2 * h), rtol=1e-6, atol=1e-7 * scale)


@pytest.mark.parametrize("vmap", [True, False], ids=["vmap", "loop"])
def test_chains_are_independent(bound: Bound, vmap: bool) -> None:
    density, u = bound.density, bound.point(chains=3)
    vectorizes = density.structure.vectorizes
    vectorizes.update({} if vmap else {"density": False, "hessian": False})
    vectors = torch.randn((2, *u.shape))

    def everything(u: Tensor, vectors: Tensor) -> list[Tensor]:
        u = u.clone().requires_grad_()
        value, grad = density.value_and_grad(u, create_graph=True)
        products = density.hessian_product(u, grad, create_graph=False)(vectors)
        values, jacobian = density.constrain(u)
        return [value, grad, products.movedim(0, 1), *density.with_start(u), *values.values(), jacobian]

    together = everything(u, vectors)
    apart = [everything(u[c : c + 1], vectors[:, c : c + 1]) for c in range(3)]
    for whole, *parts in zip(together, *apart, strict=True):
        scale = 1 + whole.detach().abs().max()
        close(whole / scale, torch.cat(parts) / scale)
    assert density.structure.summed or vectorizes.get("density", True) == vmap
    assert vectorizes.get("hessian", True) == vmap


def test_constrain_and_unconstrain(bound: Bound) -> None:
    density, u = bound.density, bound.point()
    values, jacobian = density.constrain(u)
    expected = oracle(bound, u[0])
    assert values.keys() == expected.values.keys()
    for name, value in values.items():
        close(value[0], expected.values[name])
    close(jacobian.sum(), expected.jacobian)
    # A transform such as stick-breaking loses some digits on the way back.
    close(density.unconstrain({k: v[0] for k, v in values.items()}), u[0], rtol=1e-7)


def test_rows_do_not_mix(bound: Bound) -> None:
    density, u = bound.density, bound.point()
    rows = density.layout.rows
    before = torch.stack([*density.with_start(u), density.constrain(u)[1]])
    for i in {0, rows // 2, rows - 1} if rows > 1 else ():
        moved = u.clone()
        moved[:, i] += 0.5 * torch.randn(u.shape[-1])
        after = torch.stack([*density.with_start(moved), density.constrain(moved)[1]])
        others = torch.arange(rows) != i
        close(after[..., others], before[..., others])
        masked = before[0, 0, i] == 0
        assert masked or (after[0, :, i] - before[0, :, i]).abs() > 1e-3


# ------------------------------------------------------------------------------------------- rows and supports


@pytest.mark.parametrize("name", SMALL)
def test_rows(name: str) -> None:
    model, shape, expected = SMALL[name]
    layout = bind(model, data(*shape)).density.layout
    assert (layout.rows, layout.size, layout.arrow) == expected


def test_rows_in_closed_form() -> None:
    x = data(6)
    density = bind(local, x).density
    u = torch.randn((2, 6, 3))
    z, t = u[..., :2], u[..., 2]
    s = t.exp()
    expected = (
        dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
        + dist.Gamma(2.0, 1.0).log_prob(s)
        + dist.Normal(z.prod(-1), s).log_prob(x)
        + t
    )
    close(density(u), expected)


def test_enumerated_rows_in_closed_form() -> None:
    y = data(3, 4)
    density = bind(nested_mixture, y).density
    u = torch.randn((1, 3, 1))
    z = u.exp()
    terms = []
    for j, weight in ((0.0, 0.7), (1.0, 0.3)):
        mean = (z + j).unsqueeze(-1) + torch.tensor(LOCS)  # (1, 3, 1, 3)
        inner = dist.Normal(mean, 0.5).log_prob(y.unsqueeze(-1)) + torch.tensor([0.2, 0.3, 0.5]).log()
        terms.append(inner.logsumexp(-1).sum(-1) + math.log(weight))
    prior = dist.LogNormal(0.0, 1.0).log_prob(z) + u
    close(density(u), torch.stack(terms).logsumexp(0) + prior.squeeze(-1))


def test_prior_below_a_discrete_parent() -> None:
    density = bind(discrete_parent, data(5)).density
    u = torch.randn((2, 5, 1))
    mixture = dist.Normal(torch.tensor(LOCS), 0.5).log_prob(u) + torch.tensor([0.2, 0.3, 0.5]).log()
    value, prior = density.with_start(u)
    close(prior, mixture.logsumexp(-1))
    close(value - prior, dist.Normal(u.squeeze(-1), 1.0).log_prob(data(5)).expand(2, 5))


def test_support_moves_with_the_chain() -> None:
    density = bind(local_support, data(5)).density
    u = torch.randn((3, 5, 2))
    values, jacobian = density.constrain(u)
    s = u[..., 1].sigmoid()
    close(values["z"], u[..., 0] + 2 * s)
    close(jacobian, (2 * s * (1 - s)).log())


@pytest.mark.parametrize("step", [0.0, 4.0])  # nearly all draws of the prior lie below 4
def test_support_moves_without_a_graph(step: float) -> None:
    density = bind(stepwise_support, data(5), step).density
    u = torch.tensor([[[step + 1, 0.3]], [[step - 1, 0.3]]])
    values, jacobian = density.constrain(u)
    s, top = torch.tensor(0.3).sigmoid(), torch.tensor([4.0, 1.0])
    close(values["z"], top * s)
    close(jacobian.squeeze(-1), (top * s * (1 - s)).log())
    for c in range(2):
        close(density.unconstrain({k: v[c] for k, v in values.items()}), u[c])


def test_mask_moves_with_the_chain() -> None:
    """Either draw of the shared latent at set-up must not decide the mask of the log-Jacobian later."""

    def model(x: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        keep: Any = a > 0
        with pyro.plate("n", len(x)):
            with poutine.mask(mask=keep):
                z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    density = bind(model, data(5)).density
    u = torch.randn((2, 1, 6))
    u[:, 0, 0] = torch.tensor([1.0, -1.0])
    close(density.constrain(u)[1].squeeze(-1), torch.stack([u[0, 0, 1:].sum(), torch.zeros(())]))


def test_control_flow_runs_chain_by_chain() -> None:
    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.Normal(mu, 2.0 if mu > 0 else 1.0), obs=x)

    x = data(5)
    density = bind(model, x).density
    u = torch.tensor([0.5, -0.5]).reshape(2, 1, 1)
    expected = dist.Normal(u.squeeze(-1), torch.tensor([[2.0], [1.0]])).log_prob(x).sum(-1, keepdim=True)
    close(density(u), expected + dist.Normal(0.0, 1.0).log_prob(u).squeeze(-1))
    assert density.structure.vectorizes["density"] is False


def test_elements_that_mix_are_reported() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z - z.mean(-1, keepdim=True), 1.0), obs=x)

    bound = bind(model, data(5))
    with pytest.warns(UserWarning, match="plate 'n' influence each other"):
        warn_if_rows_mix(bound.density, bound.point())


def test_a_random_density_is_reported() -> None:
    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.Normal(nn.functional.dropout(mu + torch.ones(len(x))), 1.0), obs=x)

    bound = bind(model, data(20))
    with pytest.warns(UserWarning, match="log density is random"):
        warn_if_rows_mix(bound.density, bound.point())


# ------------------------------------------------------------------------------------------------ subsampling

BATCH = (5, 1, 7, 2)


def drift(bound: Bound, u: Tensor) -> dict[str, Tensor]:
    _, grad = bound.density.value_and_grad(u)
    return bound.density.layout.unpack(grad * bound.density.layout.drift_scale(u))


def test_drift_of_locals_does_not_depend_on_the_batch() -> None:
    x, index = data(10), torch.tensor(BATCH)
    full, batch = bind(local, x), bind(local, x, 4, indices={"n": index})
    assert batch.density.layout.row_plates[0].scale == 2.5
    u = full.point()
    everything, part = drift(full, u), drift(batch, u[:, index])
    for name in everything:
        close(part[name], everything[name][:, index])
    close(batch.density(u[:, index]), 2.5 * full.density(u)[:, index])
    close(batch.density.with_start(u[:, index])[1], full.density.with_start(u)[1][:, index])  # not scaled


def test_drift_of_shared_latents_is_the_scaled_sum() -> None:
    x, index = data(10), torch.tensor(BATCH)
    full, batch = bind(both, x), bind(both, x, 4, indices={"n": index})
    u = full.point()
    free = full.density.layout.unpack(u)
    part = {k: v[:, index] if v.dim() > 1 else v for k, v in free.items()}
    everything, some = drift(full, u), drift(batch, batch.density.layout.pack(part))
    for name in ("z", "p"):
        close(some[name], everything[name][:, index])
    mu, tau = (free[k].clone().requires_grad_() for k in ("mu", "tau"))
    z = free["z"][:, index]
    likelihood = dist.Normal(mu.unsqueeze(-1), tau.exp().unsqueeze(-1)).log_prob(z).sum()
    prior = dist.Normal(0.0, 2.0).log_prob(mu) + dist.LogNormal(0.0, 1.0).log_prob(tau.exp()) + tau
    expected = torch.autograd.grad((prior + 2.5 * likelihood).sum(), (mu, tau))
    close((some["mu"], some["tau"]), expected)


# ------------------------------------------------------------------------------------------------ handlers


@pytest.mark.parametrize("model", [local, mixture_rows, discrete_parent])
def test_scale_multiplies_all_but_the_jacobian(model: Callable) -> None:
    x = data(5)
    plain, scaled = bind(model, x), bind(poutine.scale(model, scale=0.25), x)
    u = plain.point()
    jacobian = plain.density.constrain(u)[1]
    close(scaled.density(u) - jacobian, 0.25 * (plain.density(u) - jacobian))
    close(scaled.density.with_start(u)[1], plain.density.with_start(u)[1])


def test_a_masked_row_is_flat() -> None:
    x = data(5)
    keep: Any = torch.arange(5) != 2
    plain, masked = bind(local, x), bind(poutine.mask(local, mask=keep), x)
    u = plain.point()
    some, everything = masked.density.with_start(u), plain.density.with_start(u)
    close(torch.stack(some), torch.stack(everything) * keep)


def test_condition_makes_a_latent_data() -> None:
    x = data(6)
    plain, conditioned = bind(both, x), bind(poutine.condition(both, data={"tau": torch.tensor(1.5)}), x)
    assert [s.name for s in conditioned.density.layout.sites] == ["mu", "z", "p"]
    assert conditioned.density.structure.data == {"tau", "x"}
    u = conditioned.point()
    free = conditioned.density.layout.unpack(u) | {"tau": torch.tensor([math.log(1.5)])}
    close(conditioned.density(u), plain.density(plain.density.layout.pack(free)) - math.log(1.5))


def test_blocked_discrete_sites_are_summed_out() -> None:
    x = data(5)
    expected = bind(mixture_rows, x)
    u = expected.point()

    def plain(x: Tensor) -> None:
        with pyro.plate("n", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + torch.tensor(LOCS)[k], 0.5), obs=x)

    for model in (
        poutine.block(plain, hide=["k"]),
        poutine.block(poutine.block(plain, hide=["k"]), hide=["x"]),
        poutine.scale(poutine.block(plain, hide=["k"]), scale=1.0),
        poutine.block(mixture_rows, expose=["z", "x"]),
    ):
        close(bind(model, x).density(u), expected.density(u))


def test_a_blocked_latent_takes_the_value_it_is_given() -> None:
    x = data(6)
    mu, tau = torch.tensor(0.3), torch.tensor(1.5)
    blocked = bind(poutine.block(both, hide=["mu", "tau"]), x, given={"mu": mu, "tau": tau})
    conditioned = bind(poutine.condition(both, data={"mu": mu, "tau": tau}), x)
    assert blocked.density.layout.rows == 6
    u = blocked.point()
    close(blocked.density(u), conditioned.density(u))


# ------------------------------------------------------------------------------------------------ parameters


def param_model() -> tuple[Callable, Callable]:
    def model(x: Tensor) -> None:
        weight = pyro.param("weight", torch.tensor(0.7), constraint=constraints.positive)
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(weight * z, 1.0), obs=x)

    return model, lambda: pyro.param("weight").unconstrained()


def pyro_module_model() -> tuple[Callable, Callable]:
    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = PyroParam(torch.tensor(0.7), constraints.positive)

        def forward(self, x: Tensor) -> None:
            with pyro.plate("n", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(self.weight * z, 1.0), obs=x)

    model = Model()
    return model, lambda: model.weight_unconstrained


def nn_module_model() -> tuple[Callable, Callable]:
    net = nn.Linear(1, 1)

    def model(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(net(z.unsqueeze(-1)).squeeze(-1), 1.0), obs=x)

    return model, lambda: net.weight


@pytest.mark.parametrize("make", [param_model, pyro_module_model, nn_module_model])
def test_parameters_are_read_anew(make: Callable) -> None:
    model, parameter = make()
    before = bind(model, data(5))
    u = before.point()
    value, theta = before.density(u).sum(), parameter()
    (grad,) = torch.autograd.grad(value, theta)
    close(grad, torch.autograd.grad(oracle(before, u[0]).joint, theta)[0])
    with torch.no_grad():
        theta += 0.5
    after = bind(model, data(5)).density(u).sum()
    assert (after - value).abs() > 1e-2
    close(after, oracle(before, u[0]).joint)
    close(before.density(u).sum(), after)


def test_a_support_follows_its_parameter() -> None:
    u = bind(param_support, data(5)).point()
    with torch.no_grad():
        pyro.param("top").unconstrained().copy_(torch.tensor(5.0).log())
    values, jacobian = bind(param_support, data(5)).density.constrain(u)
    s = u.squeeze(-1).sigmoid()
    close(values["z"], 5 * s)
    close(jacobian, (5 * s * (1 - s)).log())


# ------------------------------------------------------------------------------------------------ a good guest


@pytest.mark.parametrize("validation", [True, False])
@pytest.mark.parametrize("name", ["both", "subsampled both", "nested mixture", "local support", "param support", "vae"])
def test_an_evaluation_leaves_no_trace(name: str, validation: bool) -> None:
    model, args = ALL[name]()
    bound = bind(model, *args)
    u = bound.point(chains=2)
    store = {k: v.clone() for k, v in pyro.get_param_store().named_parameters()}
    _ENUM_ALLOCATOR.set_first_available_dim(-7)
    _ENUM_ALLOCATOR.allocate()
    allocator = deepcopy(vars(_ENUM_ALLOCATOR))
    state = torch.get_rng_state()

    def evaluate() -> None:
        bound.density.value_and_grad(u)
        bound.density.with_start(u)
        values, _ = bound.density.constrain(u)
        bound.density.unconstrain({k: v[0] for k, v in values.items()})

    with pyro.validation_enabled(validation):
        seen = poutine.trace(evaluate).get_trace()
        assert torch.get_rng_state().equal(state)
        bind(model, *args)
        flags = pyro.poutine.runtime.am_i_wrapped(), pyro.infer.util.is_validation_enabled()
        assert flags == (False, validation)
        assert dist.Normal(0.0, 1.0)._validate_args == validation
    assert set(seen.nodes) == {"_INPUT", "_RETURN"}
    assert vars(_ENUM_ALLOCATOR) == allocator
    after = dict(pyro.get_param_store().named_parameters())
    assert after.keys() == store.keys()
    for key, value in store.items():
        assert after[key].equal(value)
