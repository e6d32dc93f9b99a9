"""The gradient of log Z of an energy prior against closed forms and quadrature."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.infer.reparam import LocScaleReparam
from tilted import Layered, Quadratic, log_z_grad, one_layer, sigma_points, two_layers
from torch import Tensor, nn

from pyro_shortrun import EnergyELBO, Prior, ShortRunGuide, energy_prior
from pyro_shortrun.energy import TiltedPrior


def test_quadratic_energy():
    """log Z = a^2 / (2 (1 + c)) - log(1 + c) / 2 per row."""
    energy, rows = Quadratic(0.5, 0.3), 4
    points = sigma_points(-energy.a.detach().reshape(1) / 1.5, torch.tensor([[1 / 1.5]]))
    end = points.reshape(-1, 1, 1).expand(-1, rows, 1)
    found = log_z_grad(one_layer(energy), (torch.zeros(rows),), end, [energy.c, energy.a])
    log_z = rows * (energy.a**2 / (2 * (1 + energy.c)) - (1 + energy.c).log() / 2)
    exact = torch.autograd.grad(log_z, [energy.c, energy.a])
    torch.testing.assert_close(found, list(exact), rtol=1e-5, atol=1e-5)


def test_subsampling_scales_log_z():
    energy = Quadratic(0.5)

    def model(x: Tensor) -> None:
        with pyro.plate("data", 60, subsample_size=6):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            energy_prior("ebm", energy, z)
            pyro.sample("x", dist.Normal(z, 0.5), obs=x[:6])

    end = sigma_points(torch.zeros(1), torch.tensor([[1 / 1.5]])).reshape(-1, 1, 1).expand(-1, 6, 1)
    (found,) = log_z_grad(model, (torch.zeros(60),), end, [energy.c])
    torch.testing.assert_close(found, torch.tensor(-60 / 3.0), rtol=1e-5, atol=1e-5)


def test_runs_do_not_depend_on_subsampling():
    """A subsampled plate scales log densities by 10, and must not change what the runs sample: 5 standard errors."""

    def model() -> None:
        with pyro.plate("data", 60, subsample_size=6):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            energy_prior("ebm", Quadratic(1.0), z)

    call = TiltedPrior(model).bind((), {})
    end = EnergyELBO(Trace_ELBO(), num_steps=30).runs.make(call, 1000).end
    assert end.square().mean().item() == pytest.approx(0.5 / 0.9, rel=5 * math.sqrt(2 / 6000))


def test_global_and_local_latents():
    """mu ~ N(0, 1), z_i ~ N(mu, 1) with energies c z_i^2 / 2: log Z = -log det(I + c S) / 2, S = I + 1 1'."""
    energy, rows = Quadratic(0.7), 3

    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            energy_prior("ebm", energy, z)
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    precision = torch.eye(rows + 1) * 1.7
    precision[0, 0], precision[0, 1:], precision[1:, 0] = 1.0 + rows, -1.0, -1.0
    precision[1:, 1:] = torch.eye(rows) * (1 + 0.7)
    end = sigma_points(torch.zeros(rows + 1), precision.inverse()).unsqueeze(1)
    (found,) = log_z_grad(model, (torch.zeros(rows),), end, [energy.c])
    cov = torch.eye(rows) + torch.ones(rows, rows)
    log_z = -torch.logdet(torch.eye(rows) + energy.c * cov) / 2
    torch.testing.assert_close(found, *torch.autograd.grad(log_z, [energy.c]), rtol=1e-5, atol=1e-5)


def quadrature(net: Layered) -> tuple[Tensor, Tensor, Tensor]:
    """log Z on a grid, and the grid's points and probabilities."""
    axis = torch.linspace(-7, 7, 801)
    z1, z2 = torch.meshgrid(axis, axis, indexing="ij")
    log_p = dist.Normal(0.0, 1.0).log_prob(z2) + dist.Normal(net.w * z2, net.s.exp()).log_prob(z1) - net.energy(z1, z2)
    log_z = log_p.flatten().logsumexp(0) + 2 * math.log(axis[1] - axis[0])
    return log_z, torch.stack([z2.flatten(), z1.flatten()], -1), log_p.detach().flatten().softmax(0)


def test_parameters_of_a_conditional_prior_against_quadrature(dtype):
    """100,000 exact negative samples of two layers: within 5 standard errors of the quadrature's gradient."""
    net = Layered()
    log_z, points, p = quadrature(net)
    params = [net.w, net.s, net.height]
    exact = torch.stack(torch.autograd.grad(log_z, params))
    end = points[p.multinomial(100_000, replacement=True)].reshape(1, -1, 2)
    found = torch.stack(log_z_grad(two_layers(net), (torch.zeros(100_000),), end, params)) / 100_000
    assert ((found - exact).abs() < 5 / math.sqrt(100_000)).all()  # integrands vary by about one
    assert exact[0].abs() > 0.01 and exact[1].abs() > 0.01  # and these are not zero


def test_noncentred_layers_have_the_same_gradient_through_the_energy():
    net = Layered()
    log_z, points, p = quadrature(net)
    params = [net.w, net.s, net.height]
    exact = torch.stack(torch.autograd.grad(log_z, params))
    z2, z1 = points[p.multinomial(100_000, replacement=True)].unbind(-1)
    end = torch.stack([z2, (z1 - net.w.detach() * z2) / net.s.detach().exp()], -1).unsqueeze(0)
    model = poutine.reparam(two_layers(net), config={"z1": LocScaleReparam(0.0)})
    found = torch.stack(log_z_grad(model, (torch.zeros(100_000),), end, params)) / 100_000
    assert ((found - exact).abs() < 5 / math.sqrt(100_000)).all()


def test_runs_give_the_gradient():
    """400 small steps from the prior for 20,000 rows: within 5 standard errors and the bias of the step, 2 %."""
    energy, x = Quadratic(0.5, 0.3), torch.zeros(20_000)
    elbo = EnergyELBO(Trace_ELBO(), num_steps=60, step_size=0.05)
    guide = AutoDelta(one_layer(energy))
    guide(x)
    elbo.loss_and_grads(one_layer(energy), guide, x)
    z = guide.median(x)["z"].detach()
    positive = torch.stack([(z.square() / 2).mean(), z.mean()])
    log_z = energy.a**2 / (2 * (1 + energy.c)) - (1 + energy.c).log() / 2
    exact = positive + torch.stack(torch.autograd.grad(log_z, [energy.c, energy.a]))
    found = torch.stack([energy.c.grad, energy.a.grad]) / len(x)
    torch.testing.assert_close(found, exact, rtol=0.02, atol=5 / math.sqrt(len(x)))


def test_constant_energy_has_no_gradient():
    constant = nn.Parameter(torch.tensor(0.7))
    model = one_layer(lambda z: pyro.param("constant", constant).expand(z.shape))
    x = torch.randn(7)
    for guide in (AutoNormal(model), ShortRunGuide(model, num_steps=3, start=Prior())):
        EnergyELBO(Trace_ELBO(), num_steps=3).loss_and_grads(model, guide, x)
    assert constant.grad.item() == pytest.approx(0.0, abs=1e-6)
