"""Energy priors: gradients of log Z against closed forms and quadrature, the loss under every ELBO, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

from pyro_shortrun import (
    EnergyELBO,
    Langevin,
    Persistent,
    Prior,
    ShortRunELBO,
    ShortRunGuide,
    StepSize,
    energy_prior,
    sample_prior,
)
from pyro_shortrun.compile import Compiler, Untouched
from pyro_shortrun.energy import PriorRuns, TiltedPrior
from pyro_shortrun.energy.negative import Negative
from pyro_shortrun.runs import RunInfo, ShortRun
from pyro_shortrun.starts import Replay

pytestmark = pytest.mark.filterwarnings("error")


class Quadratic(nn.Module):
    """``a z + c z^2 / 2``: the prior N(0, 1) becomes ``N(-a / (1 + c), 1 / (1 + c))``."""

    def __init__(self, c: float = 0.5, a: float = 0.0) -> None:
        super().__init__()
        self.c, self.a = nn.Parameter(torch.tensor(c)), nn.Parameter(torch.tensor(a))

    def forward(self, z: Tensor) -> Tensor:
        return self.a * z + self.c * z.square() / 2


def one_layer(energy: Callable, noise: float = 0.5) -> Callable:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            energy_prior("ebm", energy, z)
            pyro.sample("x", dist.Normal(z, noise), obs=x)

    return model


def silent(end: Tensor) -> RunInfo:
    """The record of a run in which nothing went wrong."""
    none = torch.zeros(end.shape[:2], dtype=torch.bool)
    return RunInfo(end.new_zeros(2), end.new_zeros(1), end.new_zeros(0), end.new_zeros(1, 1), none, none)


def log_z_grad(model: Callable, args: tuple, end: Tensor, params: list[Tensor]) -> list[Tensor]:
    """The gradient that negative samples ``end`` give, ``(chains, rows, size)``."""
    call = TiltedPrior(model).bind(args, {})
    assert call is not None
    return list(torch.autograd.grad(Negative.at(call, end, silent(end)).surrogate, params))


def sigma_points(mean: Tensor, cov: Tensor) -> Tensor:
    """Points whose equal-weight average is the exact expectation of any quadratic, ``(2 n, n)``."""
    root = math.sqrt(len(mean)) * torch.linalg.cholesky(cov).T
    return mean + torch.cat([root, -root])


# ---------------------------------------------------------------- the gradient of log Z


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


class Layered(nn.Module):
    """Parameters of z2 -> z1 and of a joint energy with two wells."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.s = nn.Parameter(torch.tensor(0.8)), nn.Parameter(torch.tensor(-0.3))
        self.height = nn.Parameter(torch.tensor(1.5))

    def energy(self, z1: Tensor, z2: Tensor) -> Tensor:
        return self.height * torch.exp(-(z1.square())) * torch.sigmoid(2 * z2)


def two_layers(net: Layered) -> Callable:
    def model(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(()), 1.0))
            z1 = pyro.sample("z1", dist.Normal(net.w * z2, net.s.exp()))
            energy_prior("ebm", net.energy, z1, z2)
            pyro.sample("x", dist.Normal(z1, 0.5), obs=x)

    return model


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
    for guide in (AutoNormal(model), ShortRunGuide(model, num_steps=3)):
        EnergyELBO(Trace_ELBO(), num_steps=3).loss_and_grads(model, guide, x)
    assert constant.grad.item() == pytest.approx(0.0, abs=1e-6)


# ---------------------------------------------------------------- under every ELBO

BASES = [
    Trace_ELBO(),
    TraceMeanField_ELBO(),
    TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False),
    RenyiELBO(0.0, num_particles=2),
]
BASES += [Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)]


@pytest.mark.parametrize("base", BASES, ids=lambda b: type(b).__name__)
def test_adds_the_gradient_of_log_z_and_nothing_else(base):
    """Loss and guide gradients are the base's; the energy's differ by the negative phase's."""
    energy, x = Quadratic(0.5, 0.3), torch.tensor([0.3, -1.0, 2.0])
    model = one_layer(energy)
    guide = AutoNormal(model)
    guide(x)
    elbo = EnergyELBO(base, num_steps=4)
    pyro.set_rng_seed(0)
    expected = base.loss_and_grads(model, guide, x)
    params = [energy.c, energy.a, *guide.parameters()]
    before = [p.grad.clone() for p in params]
    for p in params:
        p.grad = None
    negative = elbo._negative(model, (x,), {})
    elbo._negative = lambda *_: negative  # so that the base sees the same random numbers
    pyro.set_rng_seed(0)
    assert elbo.loss_and_grads(model, guide, x) == pytest.approx(expected)
    added = torch.autograd.grad(elbo_surrogate(model, x, elbo), params[:2], allow_unused=True)
    assert all(g is not None for g in added)
    after = [p.grad for p in params]
    for a, b in zip(after[2:], before[2:], strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.allclose(after[0], before[0])
    assert set(elbo.info.gap) == {"ebm"} and math.isfinite(elbo.info.gap["ebm"])


def elbo_surrogate(model: Callable, x: Tensor, elbo: EnergyELBO) -> Tensor:
    call = TiltedPrior(model).bind((x,), {})
    assert call is not None
    end = elbo.runs.make(call, 1).end
    return Negative.at(call, end, silent(end)).surrogate


@pytest.mark.parametrize("base", [Trace_ELBO(), TraceMeanField_ELBO()], ids=lambda b: type(b).__name__)
def test_differentiable_loss(base):
    energy, x = Quadratic(0.5), torch.tensor([0.3, -1.0])
    model = one_layer(energy)
    guide = AutoDelta(model)
    guide(x)
    elbo = EnergyELBO(base, num_steps=4)
    pyro.set_rng_seed(0)
    loss = elbo.differentiable_loss(model, guide, x)
    loss.backward()
    grad = energy.c.grad.clone()
    energy.c.grad = None
    pyro.set_rng_seed(0)
    assert elbo.loss_and_grads(model, guide, x) == pytest.approx(loss.item())
    torch.testing.assert_close(grad, energy.c.grad)
    assert elbo.loss(model, guide, x) == pytest.approx(base.loss(model, guide, x))
    module = elbo(model, guide)  # torch-style training
    assert module(x).item() == pytest.approx(loss.item())


def test_short_run_elbo_as_base():
    energy, x = Quadratic(0.5), torch.tensor([0.3, -1.0])
    model = one_layer(energy)
    guide = ShortRunGuide(model, num_steps=3)
    elbo = EnergyELBO(ShortRunELBO(), num_steps=4)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    losses = [svi.step(x), svi.evaluate_loss(x)]
    assert all(math.isfinite(v) for v in losses)
    assert "ebm$$$c" in pyro.get_param_store() and elbo.info.gap == {} and elbo.info.negative
    with pytest.raises(NotImplementedError, match="l2 needs the energies"):
        EnergyELBO(ShortRunELBO(), num_steps=4, l2=0.1).loss_and_grads(model, guide, x)


def test_enumerated_sites():
    """A mixture's component comes before the energy and is summed out in runs of the prior."""
    energy = Quadratic(0.5)

    @config_enumerate
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])))
            z = pyro.sample("z", dist.Normal(torch.tensor([-1.0, 1.0])[k], 1.0))
            energy_prior("ebm", energy, z)
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    guide = AutoNormal(poutine.block(model, hide=["k"]))
    x = torch.tensor([0.3, -1.0, 0.5])
    elbo = EnergyELBO(TraceEnum_ELBO(max_plate_nesting=1), num_steps=4)
    assert math.isfinite(elbo.loss_and_grads(model, guide, x))
    assert energy.c.grad is not None


class PerComponent(nn.Module):
    """``c_k z^2 / 2``: an energy of a discrete latent."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.tensor([0.2, 2.0]))

    def forward(self, z: Tensor, k: Tensor) -> Tensor:
        return self.c[k] * z.square() / 2


def mixture(energy: Callable) -> Callable:
    """k ~ (0.3, 0.7), z ~ N(-1 or 1, 1), tilted by an energy of both."""

    @config_enumerate
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])))
            z = pyro.sample("z", dist.Normal(torch.tensor([-1.0, 1.0])[k], 1.0))
            energy_prior("ebm", energy, z, k)
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    return model


def test_energies_of_enumerated_sites(dtype):
    """The gradient of log Z at 100,000 exact draws, within 5 standard errors of the quadrature's."""
    energy, axis = PerComponent(), torch.linspace(-8, 8, 2001)
    joint = torch.stack([p * dist.Normal(m, 1.0).log_prob(axis).exp() for p, m in ((0.3, -1.0), (0.7, 1.0))])
    weights = joint * torch.stack([-energy(axis, torch.tensor(k)) for k in (0, 1)]).exp()
    (exact,) = torch.autograd.grad((weights.sum() * (axis[1] - axis[0])).log(), [energy.c])
    z = axis[weights.detach().sum(0).multinomial(100_000, replacement=True)].reshape(1, -1, 1)
    (found,) = log_z_grad(mixture(energy), (torch.zeros(100_000),), z, [energy.c])
    assert ((found / 100_000 - exact).abs() < 5 / math.sqrt(100_000)).all()
    guide = AutoNormal(poutine.block(mixture(energy), hide=["k"]))
    elbo = EnergyELBO(TraceEnum_ELBO(max_plate_nesting=1), num_steps=4)
    assert math.isfinite(elbo.loss_and_grads(mixture(energy), guide, torch.zeros(3)))


def test_energies_where_the_guide_enumerates():
    def part() -> Tensor:
        k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
        return pyro.sample("z", dist.Normal(torch.tensor([-1.0, 1.0])[k], 1.0))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = part()
            energy_prior("ebm", lambda z: z.square(), z)
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            part()

    elbo = EnergyELBO(TraceEnum_ELBO(max_plate_nesting=1), num_steps=4)
    assert math.isfinite(elbo.loss_and_grads(model, guide, torch.zeros(3)))


def test_masked_energies_do_not_count():
    """Neither in the statistics nor in the penalty."""
    energy, x = Quadratic(0.5), torch.tensor([1.0, -1.0, 2.0])

    def masked(z: Tensor) -> Tensor:
        return torch.where(x > 0, energy(z), 1e6 * energy.c)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)), poutine.mask(mask=x > 0):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            energy_prior("ebm", masked, z)
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)), poutine.mask(mask=x > 0):
            pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))

    elbo = EnergyELBO(Trace_ELBO(), num_steps=4, l2=0.1)
    elbo.loss_and_grads(model, guide, x)
    assert abs(elbo.info.gap["ebm"]) < 100 and elbo.info.negative["ebm"] < 100
    assert abs(energy.c.grad.item()) < 100


def test_l2_reaches_the_energy_alone():
    energy, x = Quadratic(0.5), torch.tensor([0.3, -1.0])
    model = one_layer(energy)
    guide = AutoDelta(model)
    guide(x)
    grads = []
    for l2 in (0.0, 0.1):
        pyro.set_rng_seed(0)
        energy.c.grad = guide.z_unconstrained.grad = None
        elbo = EnergyELBO(Trace_ELBO(), num_steps=4, l2=l2)
        elbo.loss_and_grads(model, guide, x)
        grads.append((energy.c.grad.clone(), guide.z_unconstrained.grad.clone()))
    pyro.set_rng_seed(0)
    negative = elbo._negative(model, (x,), {})
    z = guide.median(x)["z"].detach()
    penalty = 0.1 * ((energy(z).square()).sum() + negative.squares)
    (exact,) = torch.autograd.grad(penalty, [energy.c])
    torch.testing.assert_close(grads[1][0] - grads[0][0], exact)
    torch.testing.assert_close(grads[1][1], grads[0][1])


# ---------------------------------------------------------------- learning


ETA, ETA_POSTERIOR, NOISE = 0.05, 0.015, 0.2
MEAN, VARIANCE = 0.8, 0.54  # of the data x = z + NOISE * eps


def data(n: int = 1000) -> Tensor:
    """Exactly these moments, so that maximum likelihood is z ~ N(0.8, 0.5)."""
    x = torch.randn(n)
    return MEAN + math.sqrt(VARIANCE) * (x - x.mean()) / x.std(correction=0)


def langevin_variance(precision: float, eta: float) -> float:
    """The stationary variance of unadjusted Langevin steps on a Gaussian."""
    return 1 / (precision * (1 - eta * precision / 2))


def fixed_point(eta_posterior: float) -> float:
    """The tilted prior's precision at which both phases have the same second moment, biases of the steps included."""

    def gap(precision: float) -> float:
        posterior = precision + NOISE**-2
        spread = langevin_variance(posterior, eta_posterior) + VARIANCE * (NOISE**-2 / posterior) ** 2
        return spread - langevin_variance(precision, ETA)

    low, high = 1.0, 4.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if gap(middle) < 0 else (low, middle)
    return low


def learned(guide_of: Callable, steps: int = 80) -> tuple[float, float]:
    """Mean and precision of the tilted prior after training on :func:`data`."""
    energy = Quadratic(0.0)
    model = one_layer(energy, NOISE)
    x = data()
    schedule = pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.15}, "gamma": 0.96})
    svi = SVI(model, guide_of(model), schedule, EnergyELBO(Trace_ELBO(), num_steps=50, step_size=ETA))
    for _ in range(steps):
        svi.step(x)
        schedule.step()
    precision = 1 + energy.c.item()
    return -energy.a.item() / precision, precision


def amortised(model: Callable) -> Callable:
    """The family of linear Gaussian guides has the exact posterior in it."""

    def guide(x: Tensor) -> None:
        slope, shift = pyro.param("slope", torch.tensor(0.9)), pyro.param("shift", torch.tensor(0.0))
        scale = pyro.param("scale", torch.tensor(0.2), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x + shift, scale))

    return guide


def maximum_likelihood(model: Callable) -> Callable:
    return ShortRunGuide(model, num_steps=20, dynamics=Langevin(StepSize(ETA_POSTERIOR, learnable=False)))


@pytest.mark.parametrize(("guide", "eta"), [(amortised, 1e-9), (maximum_likelihood, ETA_POSTERIOR)])
def test_both_schemes_learn_a_tilted_gaussian(guide, eta):
    """Truth: mean 0.8, precision 2; the steps' biases move the fixed point of learning to a known place near it."""
    mean, precision = learned(guide)
    assert fixed_point(eta) == pytest.approx(2.0, abs=0.15)
    assert mean == pytest.approx(0.8, abs=0.06)
    assert precision == pytest.approx(fixed_point(eta), abs=0.2)


def test_learning_rates_by_name():
    energy, x = Quadratic(0.5), torch.tensor([0.3, -1.0])

    def model(x: Tensor) -> None:
        pyro.param("bias", torch.tensor(0.0))
        one_layer(energy)(x)

    optimiser = pyro.optim.Adam(lambda name: {"lr": 0.0 if name.startswith("ebm.") else 0.1})
    guide = AutoNormal(model)
    SVI(model, guide, optimiser, EnergyELBO(Trace_ELBO(), num_steps=2)).step(x)
    assert energy.c.item() == pytest.approx(0.5)
    assert guide.locs.z.abs().min() > 0.05


class Tilt(PyroModule):
    def __init__(self) -> None:
        super().__init__("tilt")
        self.c = PyroParam(torch.tensor(0.5), dist.constraints.positive)

    def forward(self, z: Tensor) -> Tensor:
        return self.c * z.square() / 2


class Whole(PyroModule):
    """A PyroModule model that owns its energy."""

    def __init__(self) -> None:
        super().__init__()
        self.tilt = Tilt()

    def forward(self, x: Tensor) -> None:
        one_layer(self.tilt)(x)


@pytest.mark.parametrize("make", [lambda: one_layer(Tilt()), Whole], ids=["function", "module"])
def test_pyro_modules_are_trained(make):
    model = make()
    elbo = EnergyELBO(Trace_ELBO(), num_steps=2)
    svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.1}), elbo)
    svi.step(torch.tensor([3.0, -4.0]))
    (name,) = [k for k in pyro.get_param_store() if k.endswith("c")]
    assert pyro.param(name).item() != pytest.approx(0.5)


# ---------------------------------------------------------------- the negative phase


def test_the_decoder_does_not_run_in_the_negative_phase():
    calls = []

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            energy_prior("ebm", lambda z: z.square(), z)
            calls.append(z)
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    prior = TiltedPrior(model)
    call = prior.bind((torch.zeros(3),), {})
    EnergyELBO(Trace_ELBO(), num_steps=10).runs.make(call, 2)
    assert len(calls) == 1


def test_plain_factors_and_data_are_no_part_of_the_prior():
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.factor("likelihood", -5 * (z - 3).square())
        pyro.sample("y", dist.Normal(z, 0.1), obs=x)
        energy_prior("ebm", lambda z: z.square(), z)

    call = TiltedPrior(model).bind((torch.tensor(2.0),), {})
    u = torch.tensor([[[0.3]], [[-1.0]]])
    exact = dist.Normal(0.0, 1.0).log_prob(u).squeeze(-1) - u.squeeze(-1).square()
    torch.testing.assert_close(call.density(u), exact)


def test_latents_after_the_last_energy_are_not_run():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(()), 1.0))
            energy_prior("ebm", lambda z: z.square(), z2)
            z1 = pyro.sample("z1", dist.Normal(z2, 1.0))
            pyro.sample("x", dist.Normal(z1, 0.5), obs=x)

    call = TiltedPrior(model).bind((torch.zeros(3),), {})
    assert [s.name for s in call.density.layout.sites] == ["z2"]


def test_compiled_runs_equal_eager_ones():
    x, ends = torch.zeros(4), []
    energy, runs = Quadratic(0.5), EnergyELBO(Trace_ELBO(), num_steps=6).runs
    for compile in (False, True):
        prior = TiltedPrior(one_layer(energy), compile)
        if compile:
            prior._compiler = Compiler(Untouched())
        for c in (0.5, 2.0):  # a changed parameter changes the result
            energy.c.data.fill_(c)
            pyro.set_rng_seed(3)
            call = prior.bind((x,), {})
            ends.append(runs.make(call, 2).end)
        if compile:
            assert len(prior._compiler._graphs) == 2  # of the steps and of the end, not of each call
    torch.testing.assert_close(ends[:2], ends[2:])
    assert not torch.allclose(ends[0], ends[1])


def test_another_batch_size_is_compiled_once():
    energy = Quadratic(0.5)
    elbo = EnergyELBO(Trace_ELBO(), num_steps=6, start=Replay(50))
    elbo._prior = TiltedPrior(one_layer(energy), compile=True)
    elbo._prior._compiler = compiler = Compiler(Untouched())
    counts = []
    for size in (4, 7, 4, 7):
        elbo.loss_and_grads(elbo._prior.model, encoder, torch.zeros(size))
        energy.c.data += 0.1
        counts.append(len(compiler._graphs))
    assert counts[1:] == [2 * counts[0]] * 3 and compiler._renewals == 0


@pytest.mark.parametrize("start", [Replay(50, refresh=0.0), Persistent()], ids=lambda s: type(s).__name__)
def test_runs_that_go_on(start):
    """Steps too small to get anywhere in one run do so in many: the variance falls from 1 towards 1 / 9."""
    model, x = one_layer(Quadratic(8.0)), torch.zeros(50)
    elbo = EnergyELBO(Trace_ELBO(), num_steps=2, step_size=0.01, start=start)
    guide = AutoDelta(model)
    guide(x)
    means = []
    for _ in range(60):
        elbo.loss_and_grads(model, guide, x)
        means.append(elbo.info.negative["ebm"])
    assert means[0] > 2.5 and sum(means[-10:]) / 10 < 1.0  # 4 at the start, 8 / 18 in the end


@pytest.mark.parametrize("make", [lambda: Replay(50), Persistent], ids=["Replay", "Persistent"])
def test_states_are_saved_and_loaded(make):
    """Into a start that has not been called, too."""
    start, model, x = make(), one_layer(Quadratic()), torch.zeros(7)
    guide = AutoDelta(model)
    guide(x)
    EnergyELBO(Trace_ELBO(), num_steps=2, start=start).loss_and_grads(model, guide, x)
    again = make()
    again.load_state_dict(start.state_dict())
    assert torch.equal(again.store, start.store) and again.store.abs().sum() > 0
    EnergyELBO(Trace_ELBO(), num_steps=2, start=again).loss_and_grads(model, guide, x)
    assert not torch.equal(again.store, start.store)


def encoder(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x, 0.5))


def test_replay_takes_other_batch_sizes():
    start, model = Replay(10), one_layer(Quadratic())
    elbo = EnergyELBO(Trace_ELBO(), num_steps=2, start=start)
    for size in (4, 7, 12, 1):
        elbo.loss_and_grads(model, encoder, torch.zeros(size))
    assert int(start.written) == 4 + 7 + 10 + 1


def test_frozen_rows_are_not_replayed():
    """They would freeze again: new draws of the prior take their place."""
    start = Replay(40, refresh=0.0)
    call = TiltedPrior(one_layer(Quadratic())).bind((torch.zeros(40),), {})
    elbo = EnergyELBO(Trace_ELBO(), num_steps=20, start=start)
    frozen = torch.arange(40) % 2 == 0
    end = torch.where(frozen, 7.0, 0.25).reshape(1, 40, 1)
    start.setup(call.density)
    elbo._keep(call, ShortRun(end, end, end, replace(silent(end), frozen=frozen.unsqueeze(0))))
    assert not (start.store == 7.0).any() and (start.store == 0.25).sum() == 20


def test_replay_of_another_model_is_refused():
    start = Replay(50)
    elbo = EnergyELBO(Trace_ELBO(), num_steps=2, start=start)
    elbo.runs.make(TiltedPrior(one_layer(Quadratic())).bind((torch.zeros(3),), {}), 1)
    with pytest.raises(ValueError, match="rows of 1 coordinates and the model now has 2"):
        elbo.runs.make(TiltedPrior(two_layers(Layered())).bind((torch.zeros(3),), {}), 1)


def test_methods_as_models_keep_their_graphs():
    """``obj.model`` is a new object each time."""

    class Owner:
        def model(self, x: Tensor) -> None:
            one_layer(Quadratic())(x)

    owner, elbo = Owner(), EnergyELBO(Trace_ELBO(), num_steps=2)
    elbo.loss_and_grads(owner.model, encoder, torch.zeros(3))
    prior = elbo._prior
    elbo.loss_and_grads(owner.model, encoder, torch.zeros(3))
    assert elbo._prior is prior


def test_rows_that_are_not_finite_are_left_out():
    def energy(z: Tensor) -> Tensor:
        return torch.where(z > 0.5, torch.full_like(z, torch.nan), z.square())

    model, x = one_layer(energy), torch.zeros(40)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(()) - 3, 0.1))

    elbo = EnergyELBO(Trace_ELBO(), num_steps=20)
    with pytest.warns(UserWarning, match="are left out"):
        elbo.loss_and_grads(model, guide, x)
    assert 0 < elbo.info.excluded < 40
    elbo.loss_and_grads(model, guide, x)  # warned about once
    assert math.isfinite(elbo.info.negative["ebm"])


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("energy", "message"),
    [
        (lambda z: z.unsqueeze(-1), r"energy 'ebm' has shape \(3, 1\).*\(data\).*shape \(3,\).*squeeze\(-1\)"),
        (lambda z: z.sum(), r"shape \(\), but.*one value per element"),
        (lambda z: torch.ones(2, 7), r"shape \(2, 7\).*does not fit the plates.*one value per element"),
        (lambda z: z.expand(2, 3), r"shape \(2, 3\).*sum over the latents' own dimensions"),
        (lambda z: 3.0, "must give a tensor"),
    ],
)
def test_shapes_of_energies(energy, message):
    with pytest.raises(ValueError, match=message):
        one_layer(energy)(torch.zeros(3))


def test_runs_are_one_object_or_its_four_parts():
    """The same draws of both spellings, in training and out of it; both at once are refused."""
    model, x, found = one_layer(Quadratic()), torch.zeros(3), []
    parts = dict(num_steps=3, dynamics=Langevin(0.05), start=Prior())
    for options in (parts, dict(runs=PriorRuns(**parts))):
        pyro.set_rng_seed(0)
        elbo = EnergyELBO(Trace_ELBO(), **options)
        elbo.loss_and_grads(model, encoder, x)
        found.append((elbo.info.negative["ebm"], sample_prior(model, x, num_samples=2, **options)["x"].tolist()))
        for extra in parts:
            both = {extra: parts[extra], "runs": PriorRuns()}
            for call in (lambda o=both: EnergyELBO(Trace_ELBO(), **o), lambda o=both: sample_prior(model, x, **o)):
                with pytest.raises(ValueError, match=f"runs or {extra}, not both"):
                    call()
    assert found[0] == found[1]
    with pytest.raises(ValueError, match="runs must be a PriorRuns object"):
        EnergyELBO(Trace_ELBO(), runs=40)


def test_refusals():
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="energy 'ebm' must be a function"):
        one_layer(3.0)(x)
    model = one_layer(Quadratic())
    guide = AutoDelta(model)
    with pytest.raises(ValueError, match="base_elbo must be an ELBO object"):
        EnergyELBO(Trace_ELBO)
    with pytest.raises(ValueError, match="num_steps"):
        EnergyELBO(Trace_ELBO(), num_steps=0)
    with pytest.raises(ValueError, match="step_size"):
        EnergyELBO(Trace_ELBO(), step_size=-1.0)
    with pytest.raises(ValueError, match="num_chains"):
        EnergyELBO(Trace_ELBO(), num_chains=0)
    with pytest.raises(ValueError, match="l2"):
        EnergyELBO(Trace_ELBO(), l2=-0.1)
    with pytest.raises(ValueError, match="not both"):
        EnergyELBO(Trace_ELBO(), step_size=0.1, dynamics=Langevin(0.1))
    with pytest.raises(ValueError, match="refresh"):
        Replay(refresh=2.0)
    with pytest.raises(NotImplementedError, match="RenyiELBO has no differentiable_loss"):
        EnergyELBO(RenyiELBO()).differentiable_loss(model, guide, x)

    def plain(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 0.5), obs=x)

    with pytest.raises(ValueError, match="no energy_prior"):
        EnergyELBO(Trace_ELBO()).loss_and_grads(plain, AutoDelta(plain), x)
    with pytest.raises(NotImplementedError, match="poutine.scale weighs site 'z'"):
        EnergyELBO(Trace_ELBO()).loss_and_grads(poutine.scale(model, 0.1), guide, x)
    with poutine.scale(scale=0.1), pytest.raises(NotImplementedError, match="around EnergyELBO"):
        EnergyELBO(Trace_ELBO()).loss_and_grads(model, guide, x)

    def partly_thinned() -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", 60, subsample_size=6):
            energy_prior("ebm", Quadratic(), pyro.sample("z", dist.Normal(mu, 1.0)))

    with pytest.raises(NotImplementedError, match="mu 1, z 10, ebm 10"):
        TiltedPrior(partly_thinned).bind((), {})

    def across() -> None:
        with pyro.plate("data", 60, subsample_size=6):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        energy_prior("ebm", lambda z: z.square().sum(), z)

    with pytest.raises(NotImplementedError, match="z 10, ebm 1"):
        TiltedPrior(across).bind((), {})
    broken = one_layer(lambda z: z * torch.nan)
    with pytest.raises(ValueError, match="energies may have diverged"):
        EnergyELBO(Trace_ELBO()).loss_and_grads(broken, guide, x)
