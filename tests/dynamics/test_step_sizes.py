"""Step sizes: per step, site and dimension, tuned, fixed, bounded, backed off; and a step without noise."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import data, hierarchy, local
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from pyro_shortrun import Langevin, Prior, ShortRunGuide, StepSize


def two_sites(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(torch.zeros(2), torch.tensor([0.5, 2.0])).to_event(1))
        pyro.sample("x", dist.Normal(a + b.sum(-1), 1.0), obs=x)


def two_sites_gradient(a: Tensor, b: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    residual = x - a - b.sum(-1)
    return residual - a, residual.unsqueeze(-1) - b / torch.tensor([0.25, 4.0])


@pytest.mark.parametrize("per", ["shared", "step", "site", "dim"])
def test_step_sizes_per_step_site_and_dimension(per, dtype):
    """Every step of a noise-free run is ``u + eta * grad`` with its own eta; ``step_sizes`` says which."""
    x, steps = data(), 3
    size = StepSize(0.1, per=per)
    guide = ShortRunGuide(two_sites, num_steps=steps, dynamics=Langevin(size, noise=False), start=Prior()).setup(x)
    count = {"shared": 1, "step": steps, "site": 2, "dim": 3}[per]
    assert size.value.shape == (count,)
    with torch.no_grad():
        size.value = 0.05 * (1 + torch.arange(float(count)))
    etas = guide.step_sizes()
    eta_a, eta_b = torch.full((steps,), 0.05), torch.full((steps, 1), 0.05)
    if per == "shared":
        assert etas.shape == () and etas.item() == pytest.approx(0.05)
    elif per == "step":
        assert etas.tolist() == pytest.approx([0.05, 0.10, 0.15])
        eta_a, eta_b = etas, etas.unsqueeze(-1)
    else:
        assert set(etas) == {"a", "b"}
        if per == "site":
            assert etas["a"].item() == pytest.approx(0.05) and etas["b"].item() == pytest.approx(0.10)
            eta_b = torch.full((steps, 1), 0.10)
        else:  # unconstrained shapes; elements of the plate share theirs
            assert etas["a"].shape == (5,) and etas["b"].shape == (5, 2)
            assert etas["a"].tolist() == pytest.approx([0.05] * 5)
            torch.testing.assert_close(etas["b"], torch.tensor([0.10, 0.15]).expand(5, 2))
            eta_b = torch.tensor([0.10, 0.15]).expand(steps, 2)
    path = guide.trajectory(x)
    a, b = path["a"].squeeze(1), path["b"].squeeze(1)
    assert a.shape == (steps + 1, 5) and b.shape == (steps + 1, 5, 2)
    for k in range(steps):
        grad_a, grad_b = two_sites_gradient(a[k], b[k], x)
        torch.testing.assert_close(a[k + 1], a[k] + eta_a[k] * grad_a)
        torch.testing.assert_close(b[k + 1], b[k] + eta_b[k] * grad_b)


@pytest.mark.parametrize("per", ["shared", "step", "site", "dim"])
@pytest.mark.parametrize("model", [hierarchy, two_sites], ids=["arrowhead", "rows"])
def test_every_kind_of_step_size_is_tuned(per, model):
    size = StepSize(0.02, per=per)
    guide = ShortRunGuide(model, num_steps=2, step_size=size, start=Prior()).setup(data())
    before = size.value.detach().clone()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(2):
        svi.step(data())
    assert (size.value != before).all()
    assert (size.value > 0).all() and (size.value < size.max).all()
    etas = guide.step_sizes()
    assert isinstance(etas, dict) == (per in ("site", "dim"))


def test_fixed_step_sizes_stay():
    guide = ShortRunGuide(local, num_steps=2, step_size=StepSize(0.05, learnable=False), start=Prior())
    svi = SVI(local, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    svi.step(data())
    assert guide.step_sizes().item() == pytest.approx(0.05)
    assert not list(guide.parameters())


@pytest.mark.parametrize("raw", [-1e9, -50.0, 0.0, 50.0, 1e9])
def test_step_size_stays_inside_its_bounds(raw):
    """Whatever the optimiser does to the parameter below."""
    guide = ShortRunGuide(local, num_steps=2, step_size=StepSize(0.05, max=0.2), start=Prior()).setup(data())
    (leaf,) = guide.parameters()
    leaf.data.fill_(raw)
    assert 0 < guide.step_sizes().item() <= 0.2
    assert guide.step_sizes().item() == pytest.approx(0.2 * torch.tensor(raw).sigmoid().item(), abs=1e-6)
    assert guide(data())["z"].isfinite().all()


def test_local_coordinates_of_an_arrowhead_share_their_step():
    def model() -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(w, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(4))

    layout = ShortRunGuide(model, num_steps=4, start=Prior())._bind((), {}).density.layout
    step = StepSize(0.2, per="dim")
    step.setup(layout, 4, torch.zeros(()))
    assert step.value.numel() == 2
    assert step.by_site(layout)["z"].shape == (4,)


def curved(rows: int):
    """A non-Gaussian target with two sites in every row."""

    def model() -> None:
        with pyro.plate("data", rows):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            mean = torch.stack([torch.tanh(a + b[..., 0]), torch.sin(b[..., 1]) * a], -1)
            pyro.sample("x", dist.Normal(mean, 0.5).to_event(1), obs=torch.tensor([0.3, -0.4]).expand(rows, 2))

    return model


@pytest.mark.parametrize("dynamics", [Langevin(0.05), Langevin(0.05, max_drift=0.05)], ids=["", "clipped"])
def test_a_step_at_zero_noise_climbs_and_rows_do_not_mix(dynamics):
    density = ShortRunGuide(curved(4), num_steps=1, dynamics=dynamics, start=Prior())._bind((), {}).density
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


def stiff() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 0.05), obs=torch.tensor(0.3))  # curvature 401


def test_a_number_too_large_is_halved_until_pilot_runs_are_invertible(caplog):
    guide = ShortRunGuide(stiff, num_steps=5, step_size=0.1, start=Prior()).setup()
    assert guide.step_sizes().item() * 401 < 1
    assert guide.dynamics.max_drift == 1.0
    assert "step_size 0.1 is too large" in caplog.text and "StepSize(0.1)" in caplog.text


def test_a_step_size_object_is_taken_as_it_is_and_its_singular_steps_are_reported(caplog):
    guide = ShortRunGuide(stiff, num_steps=5, step_size=StepSize(0.1), start=Prior()).setup()
    guide()
    assert guide.step_sizes().item() == pytest.approx(0.1)
    assert guide.info.noninvertible == 1
    assert "is too large for this model" not in caplog.text and "not reliable" in caplog.text


def test_a_number_that_fits_is_kept(caplog):
    guide = ShortRunGuide(curved(16), num_steps=5, step_size=0.05, start=Prior()).setup()
    assert guide.step_sizes().item() == pytest.approx(0.05)
    assert not caplog.text
