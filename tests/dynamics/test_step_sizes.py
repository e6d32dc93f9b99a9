"""Step sizes of a guide: per step, site and dimension, tuned, fixed, bounded."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import data, hierarchy, local
from pyro.infer import (
    SVI,
    Trace_ELBO,
)
from torch import Tensor

from pyro_shortrun import Langevin, ShortRunGuide, StepSize

pytestmark = pytest.mark.filterwarnings("error")


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
    guide = ShortRunGuide(two_sites, num_steps=steps, dynamics=Langevin(size, noise=False)).setup(x)
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
    guide = ShortRunGuide(model, num_steps=2, step_size=size).setup(data())
    before = size.value.detach().clone()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(2):
        svi.step(data())
    assert (size.value != before).all()
    assert (size.value > 0).all() and (size.value < size.max).all()
    etas = guide.step_sizes()
    assert isinstance(etas, dict) == (per in ("site", "dim"))


def test_fixed_step_sizes_stay():
    guide = ShortRunGuide(local, num_steps=2, step_size=StepSize(0.05, learnable=False))
    svi = SVI(local, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    svi.step(data())
    assert guide.step_sizes().item() == pytest.approx(0.05)
    assert not list(guide.parameters())


def test_step_size_stays_inside_its_bounds():
    """Whatever the optimiser does to the parameter below."""
    guide = ShortRunGuide(local, num_steps=2, step_size=StepSize(0.05, max=0.2)).setup(data())
    (raw,) = guide.parameters()
    for push, bound in [(30.0, 0.2), (-30.0, 0.0)]:
        raw.data.fill_(push)
        assert 0 <= guide.step_sizes().item() <= 0.2
        assert guide.step_sizes().item() == pytest.approx(bound, abs=1e-6)
        assert guide(data())["z"].isfinite().all()


def test_noise(dtype):
    """With noise two runs from one start differ by ``sqrt(2 eta) eps``; without, they agree."""
    x, eta = torch.zeros(2000), 0.05

    def start(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(torch.ones(len(x))))

    quiet = ShortRunGuide(local, num_steps=1, dynamics=Langevin(eta, noise=False), start=start)
    torch.testing.assert_close(quiet(x)["z"], torch.full_like(x, 1 - 2 * eta))
    noisy = ShortRunGuide(local, num_steps=1, dynamics=Langevin(StepSize(eta), noise=True), start=start)
    jump = noisy(x)["z"] - (1 - 2 * eta)
    assert abs(jump.mean().item()) < 5 * math.sqrt(2 * eta / 2000)
    assert jump.std().item() == pytest.approx(math.sqrt(2 * eta), rel=0.1)
