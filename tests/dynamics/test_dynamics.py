"""Laws of every dynamics and of step sizes. A new dynamics is a row of ``DYNAMICS``."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_shortrun import Langevin, ShortRunGuide, StepSize
from pyro_shortrun.objectives import Exact

DYNAMICS = {
    "langevin": lambda: Langevin(0.05),
    "gradient": lambda: Langevin(0.05, noise=False),
    "clipped": lambda: Langevin(0.05, max_drift=0.05),
    "per site": lambda: Langevin(StepSize(0.05, per="site")),
    "per dim": lambda: Langevin(StepSize(0.05, per="dim")),
}


def curved(rows: int):
    """A non-Gaussian target with two sites in every row."""

    def model() -> None:
        with pyro.plate("data", rows):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            mean = torch.stack([torch.tanh(a + b[..., 0]), torch.sin(b[..., 1]) * a], -1)
            pyro.sample("x", dist.Normal(mean, 0.5).to_event(1), obs=torch.tensor([0.3, -0.4]).expand(rows, 2))

    return model


@pytest.mark.parametrize("name", DYNAMICS)
def test_log_abs_det_is_that_of_the_step(name):
    """The reported determinant against the Jacobian of ``step`` itself, by autograd, row by row."""
    dynamics = DYNAMICS[name]()
    guide = ShortRunGuide(curved(3), num_steps=1, dynamics=dynamics)
    density = guide._bind((), {}).density
    eta = dynamics.step_size(density.layout, 1)[0]
    scale = density.layout.drift_scale(eta)
    u, noise = torch.randn(1, 3, 3), torch.randn(1, 3, 3)

    def step(state: Tensor) -> Tensor:
        _, grad = density.value_and_grad(state, create_graph=True)
        return dynamics.step(state, grad, eta, noise, scale)

    jacobian = torch.autograd.functional.jacobian(step, u)[0, :, :, 0]
    wanted = torch.stack([torch.linalg.slogdet(jacobian[i, :, i])[1] for i in range(3)])
    leaf = u.clone().requires_grad_()
    _, grad = density.value_and_grad(leaf, create_graph=True)
    product = density.hessian_product(leaf, grad, create_graph=False)
    value, singular = Exact()(product, dynamics.jacobian(grad, eta, scale).slope, density.layout)
    torch.testing.assert_close(value[0], wanted, rtol=0, atol=1e-10)
    assert singular.shape == (1, 3)


@pytest.mark.parametrize("name", DYNAMICS)
def test_a_step_at_zero_noise_climbs_and_rows_do_not_mix(name):
    dynamics = DYNAMICS[name]()
    density = ShortRunGuide(curved(4), num_steps=1, dynamics=dynamics)._bind((), {}).density
    eta = dynamics.step_size(density.layout, 1)[0]
    scale = density.layout.drift_scale(eta)
    u = torch.randn(1, 4, 3)
    value, grad = density.value_and_grad(u)
    new = dynamics.step(u, grad, eta, torch.zeros_like(u), scale)
    assert (density(new) > value).all()
    other = u.clone()
    other[:, 0] += 1.0
    _, grad = density.value_and_grad(other)
    moved = dynamics.step(other, grad, eta, torch.zeros_like(u), scale)
    torch.testing.assert_close(moved[:, 1:], new[:, 1:], rtol=0, atol=1e-12)


def test_noise_has_variance_two_eta():
    dynamics = Langevin(0.08)
    noise = torch.randn(1, 1, 5)
    moved = dynamics.step(torch.zeros(1, 1, 5), torch.zeros(1, 1, 5), torch.tensor(0.08), noise, torch.ones(5))
    torch.testing.assert_close(moved, math.sqrt(2 * 0.08) * noise)


def test_no_coordinate_drifts_further_than_max_drift():
    grad = torch.tensor([[[1e12, -1e12, 3.0]]])
    moved = Langevin(0.1, noise=False, max_drift=2.0).step(
        torch.zeros_like(grad), grad, torch.tensor(0.1), torch.zeros_like(grad), torch.ones(3)
    )
    torch.testing.assert_close(moved, torch.tensor([[[2.0, -2.0, 0.3]]]))


# ------------------------------------------------------------------ step sizes


def layout_of(model):
    return ShortRunGuide(model, num_steps=4)._bind((), {}).density.layout


@pytest.mark.parametrize("per,count", [("shared", 1), ("step", 4), ("site", 2), ("dim", 3)])
def test_forms_of_step_size(per, count):
    layout = layout_of(curved(5))
    step = StepSize(0.2, per=per)
    step.setup(layout, 4, torch.zeros(()))
    assert step.value.numel() == count
    values = step(layout, 4)
    assert values.shape == (4, layout.size)
    torch.testing.assert_close(values, torch.full((4, 3), 0.2))
    named = step.by_site(layout)
    if per in ("site", "dim"):
        assert set(named) == {"a", "b"}
    else:
        assert named.numel() == count


@pytest.mark.parametrize("raw", [-1e9, -50.0, 0.0, 50.0, 1e9])
def test_step_sizes_stay_inside_their_bounds(raw):
    step = StepSize(0.2, max=0.5)
    step.setup(layout_of(curved(2)), 1, torch.zeros(()))
    with torch.no_grad():
        step.value_unconstrained.fill_(raw)
    assert 0 < step.value.item() <= 0.5


def test_local_coordinates_of_an_arrowhead_share_their_step():
    def model() -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(w, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(4))

    layout = layout_of(model)
    step = StepSize(0.2, per="dim")
    step.setup(layout, 4, torch.zeros(()))
    assert step.value.numel() == 2
    assert step.by_site(layout)["z"].shape == (4,)


def test_a_fixed_step_size_is_no_parameter():
    guide = ShortRunGuide(curved(2), num_steps=2, step_size=StepSize(0.1, learnable=False)).setup()
    assert not list(guide.parameters())
    assert guide.step_sizes().item() == pytest.approx(0.1)


# ------------------------------------------------------------------ the first guess is backed off, an object is not


def stiff() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 0.05), obs=torch.tensor(0.3))  # curvature 401


def test_a_number_too_large_is_halved_until_pilot_runs_are_invertible(caplog):
    guide = ShortRunGuide(stiff, num_steps=5, step_size=0.1).setup()
    assert guide.step_sizes().item() * 401 < 1
    assert guide.dynamics.max_drift == 1.0
    assert "step_size 0.1 is too large" in caplog.text and "StepSize(0.1)" in caplog.text


def test_a_step_size_object_is_taken_as_it_is_and_its_singular_steps_are_reported(caplog):
    guide = ShortRunGuide(stiff, num_steps=5, step_size=StepSize(0.1)).setup()
    guide()
    assert guide.step_sizes().item() == pytest.approx(0.1)
    assert guide.info.noninvertible == 1
    assert "too large" not in caplog.text and "not reliable" in caplog.text


def test_a_number_that_fits_is_kept(caplog):
    guide = ShortRunGuide(curved(16), num_steps=5, step_size=0.05).setup()
    assert guide.step_sizes().item() == pytest.approx(0.05)
    assert not caplog.text
