"""EnergyELBO: the loss under every ELBO, what it learns, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.nn import PyroModule, PyroParam
from tilted import Quadratic, encoder, log_z_grad, one_layer, silent
from torch import Tensor, nn

from pyro_shortrun import EnergyELBO, Langevin, Prior, ShortRunELBO, ShortRunGuide, StepSize, energy_prior, sample_prior
from pyro_shortrun.energy import PriorRuns, TiltedPrior
from pyro_shortrun.energy.negative import Negative
from pyro_shortrun.starts import Replay

# ------------------------------------------------------------------------------------------------ under every ELBO


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
    guide = ShortRunGuide(model, num_steps=3, start=Prior())
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


# ------------------------------------------------------------------------------------------------ learning


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
    return ShortRunGuide(
        model, num_steps=20, dynamics=Langevin(StepSize(ETA_POSTERIOR, learnable=False)), start=Prior()
    )


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


# ------------------------------------------------------------------------------------------------ refusals


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


# ------------------------------------------------------------------------------------------ without EnergyELBO


def tilted_by(net: torch.nn.Module) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            energy_prior("ebm", lambda z: net(z.unsqueeze(-1)).squeeze(-1), z)
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    return model


def by_svi(model: Callable, guide: Callable, elbo: Any, x: Tensor) -> None:
    SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo).step(x)


@pytest.mark.parametrize("kind", [ShortRunGuide, AutoNormal])
def test_an_energy_that_is_trained_without_log_z_is_told(kind):
    model = tilted_by(torch.nn.Linear(1, 1))
    with pytest.warns(UserWarning, match="energy 'ebm' is trained without its log Z.*EnergyELBO"):
        by_svi(model, kind(model), Trace_ELBO(), torch.randn(5))


def test_so_it_is_with_the_loss_of_short_runs():
    model = tilted_by(torch.nn.Linear(1, 1))
    with pytest.warns(UserWarning, match="EnergyELBO"):
        by_svi(model, ShortRunGuide(model, start=Prior()), ShortRunELBO(), torch.randn(5))


@pytest.mark.parametrize("elbo", [Trace_ELBO, ShortRunELBO])
def test_an_energy_that_is_trained_with_it_is_not(elbo):
    """Nor one that is frozen, nor where a model is evaluated or its posterior drawn."""
    net, x = torch.nn.Linear(1, 1), torch.randn(5)
    model = tilted_by(net)
    guide = ShortRunGuide(model, num_steps=2, start=Prior())
    by_svi(model, guide, EnergyELBO(elbo(), num_steps=2), x)
    elbo().loss(model, guide, x)
    guide.sample_posterior(x, num_samples=2)
    MCMC(NUTS(model), num_samples=2, warmup_steps=2, disable_progbar=True).run(x)
    net.requires_grad_(False)
    by_svi(model, guide, elbo(), x)
