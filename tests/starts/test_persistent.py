"""Persistent: a datum's run goes on where its last one ended."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import contraction, data, frozen, local, parametrised, recorded, shifted
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import Tensor

from pyro_shortrun import Persistent, ShortRunELBO, ShortRunGuide, StepSize


def test_persistent_run_continues(dtype):
    """Two runs of K noise-free steps are one run of 2 K steps; nothing moves in eval() mode."""
    x, shrink = data(), 0.8**3
    guide = ShortRunGuide(local, num_steps=3, dynamics=contraction(0.1), start=Persistent())
    first = guide(x)["z"]
    second = guide(x)["z"]
    torch.testing.assert_close(second, x / 2 + shrink * (first - x / 2))
    guide.eval()
    for _ in range(2):
        torch.testing.assert_close(guide(x)["z"], x / 2 + shrink * (second - x / 2))
    guide.train()
    guide.sample_posterior(x, num_samples=3)
    guide.trajectory(x)
    with torch.no_grad():
        guide(x)
    Predictive(local, guide=guide, num_samples=2)(x)
    torch.testing.assert_close(guide(x)["z"], x / 2 + shrink * (second - x / 2))


def test_the_first_run_starts_at_the_prior():
    """Not at another initialisation, by which a call's shapes are read: N(50, .1) is nowhere near the origin."""

    def model() -> None:
        with pyro.plate("data", 100):
            pyro.sample("z", dist.Normal(50.0, 0.1))

    guide = ShortRunGuide(model, num_steps=1, step_size=StepSize(1e-9), start=Persistent())
    torch.testing.assert_close(guide()["z"], torch.full((100,), 50.0), rtol=0, atol=0.6)  # six standard deviations


def test_persistent_states_are_kept_by_subsample_index():
    x = torch.arange(6.0)

    def model(index: Tensor) -> None:
        with pyro.plate("data", len(x), subsample=index):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    guide = ShortRunGuide(model, num_steps=2, dynamics=contraction(0.1), start=Persistent())
    last: dict[int, float] = {}
    for index in ([0, 1, 2], [2, 4, 0], [5, 1], [2, 1, 0]):
        z = guide(torch.tensor(index))["z"].tolist()
        for i, value in zip(index, z, strict=True):
            if i in last:
                assert value == pytest.approx(i / 2 + 0.64 * (last[i] - i / 2), rel=1e-4, abs=1e-4)
            last[i] = value
    visited = guide.start.visited
    assert visited.tolist() == [True, True, True, False, True, True]


@pytest.mark.parametrize("refresh", [1.0, 0.5])
def test_persistent_refresh_restarts_at_the_prior(refresh):
    x = torch.zeros(400)
    guide = ShortRunGuide(local, num_steps=1, dynamics=frozen(), start=Persistent(refresh=refresh))
    first, second = guide(x)["z"], guide(x)["z"]
    same = (second - first).abs() < 1e-4
    assert abs(same.sum().item() - 400 * (1 - refresh)) <= 5 * math.sqrt(400 * refresh * (1 - refresh)) + 1
    assert second[~same].std().item() == pytest.approx(1.0, rel=0.3)


def test_persistent_loss_is_the_log_joint_and_trains_the_model():
    """There is no bound: the step size stays, theta moves by the gradient at the draw."""
    (model, theta), x = parametrised("pyro.param", shifted, 0.3), data()
    guide, seen = recorded(ShortRunGuide(model, num_steps=2, step_size=StepSize(0.05), start=Persistent()))
    loss = Trace_ELBO(max_plate_nesting=1).loss_and_grads(model, guide, x)
    z = seen[-1]["z"]
    log_joint = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(0.3 + z, 1.0).log_prob(x)
    assert loss == pytest.approx(-log_joint.sum().item(), rel=1e-5)
    torch.testing.assert_close(theta().grad, -(x - z - 0.3).sum())
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(3):
        svi.step(x)
    (eta,) = [v for k, v in pyro.get_param_store().items() if k != "theta"]
    assert eta.item() == pytest.approx(0.05)
    assert theta().item() != pytest.approx(0.3)


# ------------------------------------------------------------------------------------------ whose chain it is


def kept(model: Callable, x: Tensor) -> ShortRunGuide:
    """A guide that has been at ``x``, and stays where it starts."""
    guide = ShortRunGuide(model, num_steps=1, dynamics=frozen(), start=Persistent())
    guide(x)
    return guide


def pairs(x: Tensor) -> None:
    """Arrowhead, and vectors as data."""
    top = pyro.sample("top", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(top, 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1), torch.ones(2)).to_event(1), obs=x)


@pytest.mark.parametrize("model, x", [(local, data()), (pairs, data().unsqueeze(-1).repeat(1, 2))])
def test_other_data_in_the_same_rows_are_refused_and_start_at_the_prior_in_eval(model, x):
    guide = kept(model, x)
    first = guide(x)["z"]
    with pytest.raises(ValueError, match=r"data of plate 'data' are others.*subsample=index"):
        guide(x + 1)
    torch.testing.assert_close(guide(x)["z"], first, rtol=0, atol=1e-4)  # the same data, and nothing was lost
    guide.eval()
    torch.testing.assert_close(guide(x)["z"], first, rtol=0, atol=1e-4)
    fresh = guide(x + 1)["z"]
    assert (fresh - first).abs().min() > 1e-3


def test_rows_of_data_that_have_not_changed_keep_their_chain():
    x = data()
    guide = kept(local, x)
    first = guide(x)["z"]
    guide.eval()
    other = torch.cat([x[:2], x[2:] + 1])
    same = (guide(other)["z"] - first).abs() < 1e-4
    assert same.tolist() == [True, True] + [False] * (len(x) - 2)


def test_indices_tell_rows_apart_whatever_their_data():
    """Such as data that are augmented anew in every epoch."""

    def model(x: Tensor, index: Tensor) -> None:
        with pyro.plate("data", 4, subsample=index):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = ShortRunGuide(model, num_steps=1, dynamics=frozen(), start=Persistent())
    index = torch.tensor([2, 0])
    first = guide(torch.zeros(2), index)["z"]
    torch.testing.assert_close(guide(torch.ones(2), index)["z"], first, rtol=0, atol=1e-4)
    guide.eval()
    torch.testing.assert_close(guide(torch.ones(2), index)["z"], first, rtol=0, atol=1e-4)


def test_states_of_the_first_version_load():
    x = data()
    guide = kept(local, x)
    state = {k: v for k, v in guide.state_dict().items() if not k.endswith("marks")}
    again = ShortRunGuide(local, num_steps=1, dynamics=frozen(), start=Persistent()).setup(x)
    again.load_state_dict(state)
    torch.testing.assert_close(again(x + 1)["z"], guide.eval()(x)["z"], rtol=0, atol=1e-4)


def test_longer_runs_from_the_prior_for_data_never_seen():
    """Their number may be another one; what is kept stays as it is."""
    guide = ShortRunGuide(local, num_steps=2, dynamics=contraction(0.1), start=Persistent())
    guide(data())
    kept_before = guide.start.store.clone()
    new = torch.linspace(-2.0, 2.0, 7)
    draws = guide.sample_posterior(new, num_samples=50, num_steps=60)["z"]
    torch.testing.assert_close(draws, (new / 2).expand(1, 50, 7), rtol=1e-3, atol=1e-3)
    assert guide.start.store.equal(kept_before) and guide.num_steps == 2
    for wrong in (0, 1.5):
        with pytest.raises(ValueError, match="num_steps"):
            guide.sample_posterior(new, num_steps=wrong)
    steps = ShortRunGuide(local, num_steps=2, step_size=StepSize(0.1, per="step"), start=Persistent())
    with pytest.raises(ValueError, match="num_steps is for runs without"):
        steps.sample_posterior(new, num_steps=3)


def test_the_loss_without_traces_is_that_of_trace_elbo():
    """Of a real latent and of a positive one: the log joint at the draw, and its gradient."""

    def model(x: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(0.7))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            w = pyro.sample("w", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Normal(z * w, scale), obs=x)

    x, found = data(), []
    for elbo in (Trace_ELBO(), ShortRunELBO()):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = ShortRunGuide(model, num_steps=2, dynamics=contraction(0.01), start=Persistent())
        for _ in range(3):
            pyro.param("scale", torch.tensor(0.7)).grad = None
            loss = elbo.loss_and_grads(model, guide, x)
            found += [loss, pyro.param("scale").grad.item()]
    assert found[:6] == pytest.approx(found[6:])
