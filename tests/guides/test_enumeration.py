"""Models with discrete sites: the guide and the loss are those of the marginal."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import ALL, seeded
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from torch import Tensor

from pyro_shortrun import Langevin, Prior, ShortRunGuide, StepSize


def marginal_mixture(x: Tensor) -> None:
    """The zoo's mixture with its assignments summed out by hand."""
    k = 3
    weights = pyro.sample("weights", dist.Dirichlet(2.0 * torch.ones(k)))
    scale = pyro.sample("scale", dist.LogNormal(-0.5, 0.5))
    with pyro.plate("components", k):
        locs = pyro.sample("locs", dist.Normal(0.0, 4.0))
    with pyro.plate("rows", len(x)):
        parts = dist.Normal(locs, scale.unsqueeze(-1)).mask(True)
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(weights), parts), obs=x)


def mixture_start(x: Tensor) -> None:
    pyro.sample("weights", dist.Dirichlet(5.0 * torch.ones(3)))
    pyro.sample("scale", dist.LogNormal(-0.3, 0.1))
    with pyro.plate("components", 3):
        pyro.sample("locs", dist.Normal(torch.tensor([-4.0, 0.0, 3.0]), 0.1))


def marginal_subsampled_mixture(x: Tensor, subsample_size: int) -> None:
    locs = pyro.sample("locs", dist.Normal(torch.tensor([-2.0, 2.0]), 1.0).to_event(1))
    with pyro.plate("rows", len(x), subsample_size=subsample_size) as index:
        shift = pyro.sample("shift", dist.Normal(0.0, 0.5))
        parts = dist.Normal(locs + shift.unsqueeze(-1), 0.3)
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.4, 0.6])), parts), obs=x[index])


def subsampled_mixture_start(x: Tensor, subsample_size: int) -> None:
    pyro.sample("locs", dist.Normal(torch.tensor([-2.0, 2.0]), 0.1).to_event(1))
    with pyro.plate("rows", len(x), subsample_size=subsample_size):
        pyro.sample("shift", dist.Normal(0.0, 0.5))


@pytest.mark.parametrize("hidden", [False, True])
def test_enumerated_model_equals_its_marginal(hidden, dtype):
    """Loss and step-size gradient, with the discrete site visible to the guide or hidden by ``poutine.block``."""
    model, (x,) = ALL["mixture"].make()
    x = x[::5]
    seen = poutine.block(model, hide=["assignment"]) if hidden else model
    results = []
    for guided, full, elbo in [
        (seen, model, TraceEnum_ELBO(max_plate_nesting=1)),
        (marginal_mixture, marginal_mixture, Trace_ELBO()),
    ]:
        dynamics = Langevin(StepSize(1e-3), noise=True)
        guide = ShortRunGuide(guided, num_steps=4, dynamics=dynamics, start=seeded(mixture_start)).setup(x)
        assert set(guide(x)) == {"weights", "scale", "locs"}
        loss = elbo.loss_and_grads(full, guide, x)
        results.append((loss, guide.dynamics.step_size.value_unconstrained.grad.item()))
        pyro.clear_param_store()
    assert results[0] == pytest.approx(results[1], rel=1e-7 if dtype == torch.float64 else 1e-3)


def test_subsampled_enumerated_model_equals_its_marginal(dtype):
    case = ALL["subsampled_mixture"]
    model, (x, size) = case.make()
    index = torch.tensor([3, 1, 4, 15, 9, 2, 6, 5])
    results = []
    for full, elbo in [(model, TraceEnum_ELBO(max_plate_nesting=1)), (marginal_subsampled_mixture, Trace_ELBO())]:
        guide = ShortRunGuide(
            full,
            num_steps=3,
            dynamics=Langevin(StepSize(1e-3)),
            start=seeded(subsampled_mixture_start),
            create_plates=lambda x, size: pyro.plate("rows", len(x), subsample=index),
        ).setup(x, size)
        assert guide(x, size)["shift"].shape == (8,)
        loss = elbo.loss_and_grads(full, guide, x, size)
        results.append((loss, guide.dynamics.step_size.value_unconstrained.grad.item()))
        pyro.clear_param_store()
    assert results[0] == pytest.approx(results[1], rel=1e-7 if dtype == torch.float64 else 1e-3)


def test_states_enumerated_along_markov_train():
    case = ALL["hmm"]
    model, (y,) = case.make()
    guide = ShortRunGuide(model, num_steps=2, step_size=StepSize(1e-4), start=Prior())
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), TraceEnum_ELBO(max_plate_nesting=1))
    assert all(math.isfinite(svi.step(y[:2, :3])) for _ in range(2))
    assert set(guide(y[:2, :3])) == {"transition", "locs", "scale"}


def test_a_support_that_depends_on_what_is_enumerated_is_refused_by_name():
    @config_enumerate
    def model():
        b = pyro.sample("b", dist.Bernoulli(0.5))
        pyro.sample("z", dist.Uniform(-1.0, 1.0 + b))

    guide = ShortRunGuide(model, num_steps=2, start=Prior())
    with pytest.raises(NotImplementedError, match="support of latent site 'z' depends on a site that is enumerated"):
        guide.log_weight()
