"""Starts: run of no length is its start, learned starts are trained, initialisations and priors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import (
    SEEN,
    close,
    contraction,
    data,
    data_plate,
    frozen,
    hierarchy,
    local,
    positive,
    recorded,
    seeded,
    subsampled,
    subsampled_rows,
)
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_median,
    init_to_value,
)
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_shortrun import Init, Prior, ShortRunGuide, StepSize


@pytest.mark.parametrize(
    "auto", [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal]
)
@pytest.mark.parametrize("model", [hierarchy, positive], ids=["hierarchy", "rows"])
def test_run_of_no_length_is_its_start(model, auto, dtype):
    """Same loss and same gradients as the start guide by itself."""
    x, results = data(), []
    for inside in (False, True):
        pyro.clear_param_store()
        start = auto(model, init_loc_fn=init_to_median)
        guide = seeded(start)
        if inside:
            guide = ShortRunGuide(model, num_steps=2, dynamics=frozen(), start=guide).setup(x)
        Trace_ELBO().loss(model, guide, x)
        for value in pyro.get_param_store().values():
            assert value.requires_grad
        loss = Trace_ELBO().loss_and_grads(model, guide, x)
        store = pyro.get_param_store()
        grads = {name: store[name].unconstrained().grad for name in store.keys()}
        assert grads and all(g is not None and g.abs().sum() > 0 for g in grads.values())
        results.append((loss, torch.cat([grads[name].flatten() for name in sorted(grads)])))
    assert results[1][0] == pytest.approx(results[0][0], **close(dtype))
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-4, atol=1e-5)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        loc, raw = self.net(x.unsqueeze(-1)).unbind(-1)
        return loc, raw.exp()


class PyroEncoder(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = PyroModule[nn.Linear](1, 2)

    def forward(self, x: Tensor) -> None:
        loc, raw = self.net(x.unsqueeze(-1)).unbind(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, raw.exp()))


class PlainEncoder(nn.Module):
    """Not a PyroModule: Pyro registers its parameters as those of a submodule of the guide."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()

    def forward(self, x: Tensor) -> None:
        loc, scale = self.encoder(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale))


def encoder_function() -> Callable[[Tensor], None]:
    encoder = Encoder()

    def start(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        loc, scale = encoder(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale))

    return start


LEARNED: dict[str, Callable[[], Any]] = {
    "AutoNormal": lambda: AutoNormal(local),
    "AutoMultivariateNormal": lambda: AutoMultivariateNormal(local),
    "pyro.module in a function": encoder_function,
    "nn.Module": PlainEncoder,
    "PyroModule": PyroEncoder,
}


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("setup", [False, True])
def test_learned_start_is_trained_by_svi(name, setup):
    """Every parameter of the start moves, from the first call on, and the loss falls under the same noise."""
    x = data()
    guide = ShortRunGuide(local, num_steps=2, dynamics=contraction(0.02), start=LEARNED[name]())
    if setup:
        guide.setup(x)
    pyro.set_rng_seed(3)
    before = Trace_ELBO().loss(local, guide, x)
    svi = SVI(local, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(num_particles=4))
    initial = {k: v.detach().clone() for k, v in pyro.get_param_store().items()}
    assert initial
    for _ in range(20):
        svi.step(x)
    for key, value in pyro.get_param_store().items():
        assert not torch.equal(value, initial[key]), key
    pyro.set_rng_seed(3)
    assert Trace_ELBO().loss(local, guide, x) < before


def test_learned_start_through_a_linear_run(dtype):
    """``d loss / d loc`` by hand: the end is ``m + a^K (loc - m + s eps)`` and its density is Gaussian."""
    x, eta, steps = data(), 0.1, 3

    def start(x: Tensor) -> None:
        loc = pyro.param("loc", torch.full((len(x),), 0.5))
        scale = pyro.param("scale", torch.full((len(x),), 0.8))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale))

    guide, seen = recorded(ShortRunGuide(local, num_steps=steps, dynamics=contraction(eta), start=start))
    Trace_ELBO(max_plate_nesting=1).loss_and_grads(local, guide, x)
    loc, scale = (torch.full((len(x),), v, requires_grad=True) for v in (0.5, 0.8))
    shrink = (1 - 2 * eta) ** steps
    mean, deviation = x / 2 + shrink * (loc - x / 2), shrink * scale
    eps = ((seen[-1]["z"] - mean) / deviation).detach()
    z = mean + deviation * eps
    log_w = (
        dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(x) - dist.Normal(mean, deviation).log_prob(z)
    )
    (-log_w.sum()).backward()
    torch.testing.assert_close(pyro.param("loc").grad, loc.grad)
    raw = pyro.param("scale").unconstrained()
    torch.testing.assert_close(raw.grad, scale.grad)


@pytest.mark.parametrize("plates", [None, data_plate])
def test_automatic_start_follows_the_subsample_of_every_call(plates, dtype):
    """Data by data, ``AutoNormal`` is put at the datum's index: every draw tells the indices that it was made for."""
    x = torch.arange(50.0) / 50
    start = AutoNormal(subsampled_rows, create_plates=plates, init_scale=1e-3)
    guide = ShortRunGuide(subsampled_rows, num_steps=2, dynamics=frozen(), start=start, create_plates=plates)
    guide(x)
    guide.start.locs.z.data.copy_(torch.arange(50.0))
    calls: dict[str, Callable[[], Tensor]] = {
        "call": lambda: guide(x)["z"],
        "sample_posterior": lambda: guide.sample_posterior(x, num_samples=2)["z"][0, 0],
        "trajectory": lambda: guide.trajectory(x)["z"][-1, 0],
        "smaller batch": lambda: guide(x, 2)["z"],
        "draws of a smaller batch": lambda: guide.sample_posterior(x, 2, num_samples=2)["z"][0, 0],
    }
    for name, draw in calls.items():
        SEEN.clear()
        z = draw()
        assert z.round().tolist() == SEEN[-1].tolist(), name


@pytest.mark.parametrize("create_plates", [None, data_plate])
def test_automatic_start_before_the_first_call(create_plates):
    """``setup`` alone is enough, with the start's plates in place."""
    model, x = subsampled, torch.arange(50.0) / 50
    start = AutoNormal(model, create_plates=create_plates)
    guide = ShortRunGuide(model, num_steps=2, step_size=StepSize(0.01), start=start, create_plates=create_plates)
    guide.setup(x)
    names = {name for name, _ in guide.named_parameters()}
    assert {"start.locs.mu_unconstrained", "start.locs.z_unconstrained"} & names or {
        "start.locs.mu",
        "start.locs.z",
    } <= names
    assert guide.sample_posterior(x, num_samples=4)["z"].shape == (1, 4, 3)
    assert guide.trajectory(x)["mu"].shape == (3, 1)
    assert guide.median(x)["mu"].shape == ()


def test_init_start_is_a_gaussian_around_the_initialisation(dtype):
    """``u_0 = init + scale * eps`` in unconstrained space, and its density is in the loss."""
    x, scale = data(), 0.2
    start = Init(init_to_value(values={"z": torch.full((5,), 2.0)}), scale=scale)
    guide, seen = recorded(ShortRunGuide(positive, num_steps=2, dynamics=frozen(), start=start))
    loss = Trace_ELBO(max_plate_nesting=1).loss(positive, guide, x)
    u = seen[-1]["z"].log()
    log_q = dist.Normal(math.log(2.0), scale).log_prob(u)
    log_p = dist.Normal(0.0, 1.0).log_prob(u) + dist.Normal(u, 1.0).log_prob(x)
    assert loss == pytest.approx(-(log_p - log_q).sum().item(), **close(dtype))
    draws = guide_draws(ShortRunGuide(positive, num_steps=1, dynamics=frozen(), start=Init(init_to_median)), x)
    torch.testing.assert_close(draws.std((0, 1)), torch.full((5,), 0.1), rtol=0.25, atol=0.0)


def guide_draws(guide: ShortRunGuide, x: Tensor) -> Tensor:
    return guide.sample_posterior(x, num_samples=200)["z"].log()


def test_prior_start_draws_from_the_prior():
    guide = ShortRunGuide(positive, num_steps=1, dynamics=frozen(), start=Prior())
    u = guide_draws(guide, data())
    assert abs(u.mean().item()) < 5 / math.sqrt(1000)
    assert u.std().item() == pytest.approx(1.0, rel=0.1)
