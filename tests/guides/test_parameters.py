"""Parameters of model and guide: who trains them, when, and by which gradient."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import ALL, KINDS, bent, data, decoder, linear_log_weight, local, parametrised, recorded, shifted
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import init_to_median
from torch import Tensor

from pyro_shortrun import Init, Langevin, Prior, ShortRunGuide, StepSize


def test_elbo_module_equals_svi():
    """``Trace_ELBO()(model, guide)`` with a torch optimiser walks the same path as SVI with Pyro's."""
    x, losses = data(), []
    for style in ("svi", "module"):
        pyro.clear_param_store()
        model = decoder()
        guide = ShortRunGuide(model, num_steps=3, step_size=StepSize(0.05), start=Prior()).setup(x)
        if style == "svi":
            svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.01}), Trace_ELBO())

            def step(svi=svi) -> float:
                return svi.step(x)
        else:
            loss_fn = Trace_ELBO()(model, guide)
            names = {name for name, _ in loss_fn.named_parameters()}
            assert len(names) == 2
            optimiser = torch.optim.SGD(loss_fn.parameters(), lr=0.01)

            def step(loss_fn=loss_fn, optimiser=optimiser) -> float:
                optimiser.zero_grad()
                loss = loss_fn(x)
                loss.backward()
                optimiser.step()
                return loss.item()

        pyro.set_rng_seed(5)
        losses.append([step() for _ in range(4)] + [model.theta.item(), guide.step_sizes().item()])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0][-2] != pytest.approx(0.3, abs=1e-3) and losses[0][-1] != pytest.approx(0.05, rel=1e-4)


def test_module_local_params():
    """Nothing in the parameter store, and two guides of the same model have step sizes of their own."""
    x = data()
    with pyro.settings.context(module_local_params=True):
        model = decoder()
        guides = [ShortRunGuide(model, num_steps=3, step_size=StepSize(0.05), start=Prior()).setup(x) for _ in range(2)]
        loss_fn = Trace_ELBO()(model, guides[0])
        optimiser = torch.optim.Adam(loss_fn.parameters(), lr=0.1)
        for _ in range(3):
            optimiser.zero_grad()
            loss_fn(x).backward()
            optimiser.step()
        assert not list(pyro.get_param_store().keys())
        assert guides[0].step_sizes().item() != pytest.approx(0.05, rel=1e-3)
        assert guides[1].step_sizes().item() == pytest.approx(0.05)
        assert model.theta.item() != pytest.approx(0.3, abs=1e-3)
        assert guides[0].sample_posterior(x, num_samples=2)["z"].shape == (1, 2, 5)


def step_size_path(tune_every: int, elbo: Any, optim: Any, steps: int = 7) -> tuple[list[float], list[float]]:
    """Step size and theta after every SVI step, from their initial values on."""
    model, theta = parametrised("pyro.param", shifted, 0.3)
    guide = ShortRunGuide(model, num_steps=3, step_size=StepSize(0.05), tune_every=tune_every, start=Prior()).setup(
        data()
    )
    svi = SVI(model, guide, optim, elbo)
    etas, thetas = [guide.step_sizes().item()], [theta().item()]
    for _ in range(steps):
        svi.step(data())
        etas.append(guide.step_sizes().item())
        thetas.append(theta().item())
    return etas, thetas


@pytest.mark.parametrize("optim", [lambda: pyro.optim.SGD({"lr": 0.01}), lambda: pyro.optim.Adam({"lr": 0.01})])
def test_tune_every_third_call(optim):
    """Step sizes change in calls 1, 4 and 7 only, also under an optimiser with momentum; theta changes in all."""
    etas, thetas = step_size_path(3, Trace_ELBO(), optim())
    changed = [a != b for a, b in pairwise(etas)]
    assert changed == [True, False, False, True, False, False, True]
    assert all(a != b for a, b in pairwise(thetas))


def test_vectorised_particles_are_one_training_call():
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    etas, thetas = step_size_path(3, elbo, pyro.optim.SGD({"lr": 0.01}))
    assert [a != b for a, b in pairwise(etas)] == [True, False, False, True, False, False, True]
    assert all(a != b for a, b in pairwise(thetas))


def test_calls_between_tunings_carry_the_log_determinant():
    """On a Gaussian target the log-determinants never change, so that the carried ones are exact."""
    x, eta, steps = data(), 0.1, 3
    dynamics = Langevin(StepSize(eta), noise=False)
    guide, seen = recorded(ShortRunGuide(local, num_steps=steps, dynamics=dynamics, tune_every=3, start=Prior()))
    elbo = Trace_ELBO(max_plate_nesting=1)
    for _ in range(4):
        loss = elbo.loss_and_grads(local, guide, x)
        assert loss == pytest.approx(-linear_log_weight(seen[-1]["z"], x, eta, steps).sum().item(), rel=1e-5)


def test_evaluation_is_exact_between_tunings():
    """``SVI.evaluate_loss`` and ``eval()`` mode do not use carried log-determinants; training in between does."""
    model, (x,) = ALL["two_layer"].make()
    guide = ShortRunGuide(model, num_steps=2, step_size=StepSize(0.02), tune_every=3, start=Prior()).setup(x)
    svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.0}), Trace_ELBO())

    def seeded_call(call: Callable[[Tensor], float], training: bool) -> float:
        guide.train(training)
        pyro.set_rng_seed(5)
        return call(x)

    svi.step(x)
    carried = seeded_call(svi.step, True)
    exact = seeded_call(svi.evaluate_loss, True)
    assert carried != pytest.approx(exact, rel=1e-5)
    assert seeded_call(svi.evaluate_loss, False) == pytest.approx(exact, rel=1e-5)
    assert seeded_call(svi.step, False) == pytest.approx(exact, rel=1e-5)


def test_evaluation_does_not_change_the_training():
    """What training carries from its last tuned run is not replaced by an evaluation on other data."""
    model, (x,) = ALL["two_layer"].make()
    paths = []
    for evaluate in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model, _ = ALL["two_layer"].make()
        guide = ShortRunGuide(model, num_steps=2, step_size=StepSize(0.02), tune_every=3, start=Prior())
        svi = SVI(model, guide, pyro.optim.SGD({"lr": 1e-4}), Trace_ELBO())
        losses = []
        for i in range(5):
            pyro.set_rng_seed(i)
            losses.append(svi.step(x))
            if evaluate:
                svi.evaluate_loss(5 * x[:3])
                guide.sample_posterior(5 * x[:3], num_samples=2)
        paths.append(losses)
    assert paths[1] == pytest.approx(paths[0], rel=1e-6)


def test_evaluation_neither_tunes_nor_counts():
    x = data()
    guide = ShortRunGuide(local, num_steps=2, step_size=StepSize(0.05), tune_every=2, start=Prior())
    svi = SVI(local, guide, pyro.optim.SGD({"lr": 0.01}), Trace_ELBO())
    svi.step(x)
    eta = guide.step_sizes()
    svi.evaluate_loss(x)
    guide.sample_posterior(x, num_samples=2)
    Predictive(local, guide=guide, num_samples=1)(x)
    guide.eval()
    guide(x)
    guide.train()
    svi.step(x)  # the second training call
    assert guide.step_sizes() == eta
    svi.step(x)
    assert guide.step_sizes() != eta


@pytest.mark.parametrize("start", [None, Init(init_to_median)], ids=["prior", "init"])
@pytest.mark.parametrize("kind", KINDS[:3])
def test_parameters_get_the_gradient_at_fixed_draws(kind, start):
    """By default: ``grad_theta log p(x, z_K)`` with ``z_K`` held fixed, and nothing through the run."""
    (model, leaf), x = parametrised(kind, bent, 0.4), data()
    size = StepSize(0.1, per="dim")
    guide, seen = recorded(ShortRunGuide(model, num_steps=4, step_size=size, start=start))
    Trace_ELBO(max_plate_nesting=1).loss_and_grads(model, guide, x)
    theta = torch.tensor(0.4, requires_grad=True)
    z = seen[-1]["z"]
    log_joint = dist.Normal(theta, 1.0).log_prob(z) + dist.Normal((theta * z).tanh(), 0.7).log_prob(x)
    (expected,) = torch.autograd.grad(-log_joint.sum(), theta)
    torch.testing.assert_close(leaf().grad, expected)
    assert size.value_unconstrained.grad.abs().min() > 0


@pytest.mark.parametrize("kind", KINDS[:3])
def test_full_gradient_is_that_of_the_bound(kind, dtype):
    """Central differences of the loss under a fixed seed, in theta and in the step size."""
    (model, leaf), x = parametrised(kind, bent, 0.4), data()
    guide = ShortRunGuide(model, num_steps=4, step_size=StepSize(0.1), full_gradient=True, start=Prior()).setup(x)
    elbo = Trace_ELBO(max_plate_nesting=1)
    pyro.set_rng_seed(2)
    elbo.loss_and_grads(model, guide, x)
    store = pyro.get_param_store()
    raw = [store[name].unconstrained() for name in store.keys()]
    assert len(raw) == 2
    width, tolerance = (1e-5, 1e-7) if dtype == torch.float64 else (1e-2, 2e-2)
    for param in raw:
        value, losses = param.detach().clone(), []
        for sign in (1, -1):
            param.data = value + sign * width
            pyro.set_rng_seed(2)
            losses.append(elbo.loss(model, guide, x))
        param.data = value
        expected = (losses[0] - losses[1]) / (2 * width)
        assert param.grad.item() == pytest.approx(expected, rel=tolerance, abs=tolerance)
    # and it is another one than the default's
    grad = leaf().grad.item()
    guide.full_gradient = False
    for param in raw:
        param.grad = None
    pyro.set_rng_seed(2)
    elbo.loss_and_grads(model, guide, x)
    assert abs(leaf().grad.item() - grad) > 1e-2
