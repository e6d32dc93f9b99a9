"""Rows, supports and subsampling of small models, in closed form."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from small import (
    LOCS,
    SMALL,
    Bound,
    bind,
    both,
    close,
    data,
    discrete_parent,
    local,
    local_support,
    nested_mixture,
    stepwise_support,
)
from torch import Tensor, nn

from pyro_shortrun.density.trust import warn_if_rows_mix


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
