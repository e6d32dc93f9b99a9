"""A density among Pyro's handlers and parameters, and that it leaves no trace."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import KINDS, parametrised
from pyro import poutine
from pyro.distributions import constraints
from pyro.poutine.runtime import _ENUM_ALLOCATOR
from small import ALL, LOCS, bind, both, close, data, discrete_parent, local, mixture_rows, oracle, param_support
from torch import Tensor


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


def weighed(weight: Tensor, x: Tensor) -> None:
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(weight * z, 1.0), obs=x)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_parameters_are_read_anew(kind: str) -> None:
    model, parameter = parametrised(kind, weighed, 0.7, constraints.positive)
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
