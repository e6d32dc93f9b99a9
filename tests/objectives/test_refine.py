"""Refine: the encoder's gradient is that of its own bound, the model's that of the log joint at the run's end."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.infer.reparam import LocScaleReparam
from torch import Tensor, nn

from pyro_shortrun import (
    EnergyELBO,
    Langevin,
    Persistent,
    Prior,
    Refine,
    ShortRunELBO,
    ShortRunGuide,
    StepSize,
    energy_prior,
)
from pyro_shortrun.energy import PriorRuns

Gradients = dict[str, Tensor]


def networks(sizes: tuple[int, int, int]) -> tuple[nn.Module, nn.Module]:
    """Decoder and encoder."""
    latent, hidden, data = sizes
    decoder = nn.Sequential(nn.Linear(latent, hidden), nn.Tanh(), nn.Linear(hidden, data))
    return decoder, nn.Sequential(nn.Linear(data, hidden), nn.Tanh(), nn.Linear(hidden, 2 * latent))


def one_layer(x: Tensor, energy: bool = False) -> tuple[Callable, Callable, tuple[Any, ...]]:
    decoder, encoder = networks((2, 5, x.shape[1]))
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0))

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            if energy:
                energy_prior("energy", net, z)
            pyro.sample("x", dist.Normal(decoder(z), 0.3).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide, (x,)


def with_energy(x: Tensor) -> tuple[Callable, Callable, tuple[Any, ...]]:
    return one_layer(x, energy=True)


def two_layers(x: Tensor) -> tuple[Callable, Callable, tuple[Any, ...]]:
    decoder, encoder = networks((3, 5, x.shape[1]))
    top = nn.Linear(1, 4)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        pyro.module("top", top)
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            loc, log_scale = top(z2).chunk(2, -1)
            z1 = pyro.sample("z1", dist.Normal(loc, log_scale.exp()).to_event(1))
            pyro.sample("x", dist.Normal(decoder(torch.cat([z1, z2], -1)), 0.3).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(x).chunk(2, -1)
            z2 = pyro.sample("z2", dist.Normal(loc[:, :1], log_scale[:, :1].exp()).to_event(1))
            below = loc[:, 1:] + z2
            pyro.sample("z1_decentered", dist.Normal(below, log_scale[:, 1:].exp()).to_event(1))

    return poutine.reparam(model, config={"z1": LocScaleReparam(0.0)}), guide, (x,)


def positive(x: Tensor) -> tuple[Callable, Callable, tuple[Any, ...]]:
    """A latent that is not real, moved by its logarithm."""
    decoder, encoder = networks((1, 5, x.shape[1]))

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Normal(decoder(z.unsqueeze(-1)), 0.3).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(x).unbind(-1)
            pyro.sample("z", dist.LogNormal(loc, log_scale.exp()))

    return model, guide, (x,)


def subsampled(x: Tensor) -> tuple[Callable, Callable, tuple[Any, ...]]:
    decoder, encoder = networks((2, 5, x.shape[1]))

    def model(index: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x), subsample=index):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.3).to_event(1), obs=x[index])

    def guide(index: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x), subsample=index):
            loc, log_scale = encoder(x[index]).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide, (torch.tensor([4, 1]),)


CASES = [one_layer, with_energy, two_layers, positive, subsampled]
every_case = pytest.mark.parametrize("make", CASES, ids=lambda f: f.__name__)
every_elbo = pytest.mark.parametrize("elbo", [Trace_ELBO(), ShortRunELBO()], ids=["Trace_ELBO", "ShortRunELBO"])


def data() -> Tensor:
    return torch.randn(6, 3)


def still(eta: float = 0.02, noise: bool = True) -> Langevin:
    return Langevin(StepSize(eta, learnable=False), noise=noise)


def step(elbo: Any, model: Callable, guide: Callable, args: tuple[Any, ...], seed: int = 1) -> tuple[float, Gradients]:
    """The loss of one step, and the gradients of all parameters."""
    pyro.set_rng_seed(seed)
    loss = elbo.loss_and_grads(model, guide, *args)
    found = {}
    for name, p in pyro.get_param_store().named_parameters():
        if p.grad is not None:
            found[name], p.grad = p.grad, None
    return loss, found


def of(grads: Gradients, part: str) -> Gradients:
    return {k: v for k, v in grads.items() if k.startswith(part)}


@every_elbo
@every_case
def test_the_start_gets_the_gradient_and_the_loss_of_its_own_bound(make, elbo):
    model, encoder, args = make(data())
    guide = ShortRunGuide(model, num_steps=3, start=encoder, objective=Refine(), dynamics=still()).setup(*args)
    loss, grads = step(elbo, model, guide, args)
    expected, vae = step(Trace_ELBO(), model, encoder, args)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert of(grads, "encoder") and of(grads, "decoder").keys() == of(vae, "decoder").keys()
    torch.testing.assert_close(of(grads, "encoder"), of(vae, "encoder"))
    assert not of(grads, "ShortRunGuide")


@every_elbo
@every_case
def test_the_model_gets_the_gradient_at_the_end_of_the_run(make, elbo):
    model, encoder, args = make(data())
    guide = ShortRunGuide(model, num_steps=3, start=encoder, objective=Refine(), dynamics=still()).setup(*args)
    _, grads = step(elbo, model, guide, args)
    pyro.set_rng_seed(1)
    end = {k: v.detach() for k, v in guide(*args).items()}
    poutine.trace(poutine.condition(model, data=end)).get_trace(*args).log_prob_sum().neg().backward()
    expected = {k: p.grad for k, p in pyro.get_param_store().named_parameters() if p.grad is not None}
    torch.testing.assert_close({k: v for k, v in grads.items() if not k.startswith("encoder")}, expected)


@every_case
def test_where_nothing_moves_it_is_the_encoder_alone(make):
    """K = 0, as the limit of steps that are small."""
    model, encoder, args = make(data())
    dynamics = still(1e-14, noise=False)
    guide = ShortRunGuide(model, num_steps=2, start=encoder, objective=Refine(), dynamics=dynamics).setup(*args)
    loss, grads = step(Trace_ELBO(), model, guide, args)
    expected, vae = step(Trace_ELBO(), model, encoder, args)
    assert loss == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(grads, vae, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal])
def test_autoguides_as_starts(kind):
    """Their bound's gradient at a point is that of the log joint, and in the scales of the entropy."""
    x = torch.tensor([1.5, -0.5])

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sinh(), 0.5).to_event(1), obs=x)

    start = kind(model)
    guide = ShortRunGuide(model, num_steps=2, start=start, objective=Refine(), dynamics=still(1e-14, False)).setup()
    _, grads = step(ShortRunELBO(), model, guide, ())
    pyro.set_rng_seed(1)
    z = guide()["z"].detach().requires_grad_()
    log_joint = dist.Normal(0.0, 1.0).log_prob(z).sum() + dist.Normal(z.sinh(), 0.5).log_prob(x).sum()
    (pull,) = torch.autograd.grad(log_joint, z)
    loc = next(v for k, v in grads.items() if "loc" in k)
    torch.testing.assert_close(loc, -pull)


def test_particles_and_draws():
    model, encoder, args = one_layer(data())
    guide = ShortRunGuide(model, num_steps=2, start=encoder, objective=Refine())
    for elbo in (ShortRunELBO(4), Trace_ELBO(4, vectorize_particles=True, max_plate_nesting=1)):
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
        assert all(math.isfinite(svi.step(*args)) for _ in range(3))
        assert math.isfinite(svi.evaluate_loss(*args))
    assert guide.sample_posterior(*args, num_samples=5)["z"].shape == (1, 5, 6, 2)
    with pytest.raises(ValueError, match="no weights"):
        guide.sample_posterior(*args, num_samples=5, resample=True)


def test_a_prior_start_and_an_energy():
    model, _, args = with_energy(data())
    guide = ShortRunGuide(model, num_steps=2, start=Prior(), objective=Refine())
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), EnergyELBO(Trace_ELBO(), num_steps=3))
    assert all(math.isfinite(svi.step(*args)) for _ in range(3))


def test_a_row_that_froze_keeps_its_gradient_and_leaks_nothing():
    """Runs that end where there is no density stay where they were."""
    scale = nn.Parameter(torch.tensor(-1.0))

    def model() -> None:
        with pyro.plate("data", 60):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(torch.where(z > 0.8, torch.nan, z), 0.5), obs=torch.full((60,), 2.0))

    def encoder() -> None:
        pyro.param("encoder", scale)
        with pyro.plate("data", 60):
            pyro.sample("z", dist.Normal(-1.0, pyro.param("encoder").exp()))

    guide = ShortRunGuide(model, num_steps=6, start=encoder, objective=Refine(), dynamics=still(0.05)).setup()
    for elbo in (Trace_ELBO(), ShortRunELBO()):
        with pytest.warns(UserWarning, match="non-finite") if elbo.__class__ is Trace_ELBO else poutine.block():
            loss, grads = step(elbo, model, guide, ())
        assert 0 < guide.info.nonfinite < 60
        expected, vae = step(Trace_ELBO(), model, encoder, ())
        assert loss == pytest.approx(expected) and torch.equal(grads["encoder"], grads["encoder"])
        torch.testing.assert_close(grads["encoder"], vae["encoder"])


# ---------------------------------------------------------------- step by acceptance


def accepted(eta: float, precision: float, size: int, steps: int) -> float:
    """Acceptance of a Langevin step on N(0, 1 / precision) in ``size`` dimensions, from where as many steps have gone
    from exact draws."""
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(100_000, size, generator=generator, device="cpu")

    def moved(u: Tensor) -> Tensor:
        return (1 - eta * precision) * u + (2 * eta) ** 0.5 * normal()

    def log_step(a: Tensor, b: Tensor) -> Tensor:
        return -(b - (1 - eta * precision) * a).square().sum(-1) / (4 * eta)

    u = normal() / precision**0.5
    for _ in range(steps):
        u = moved(u)
    new = moved(u)
    ratio = -0.5 * precision * (new.square() - u.square()).sum(-1) + log_step(new, u) - log_step(u, new)
    return ratio.clamp(max=0).exp().mean().item()


@pytest.mark.parametrize("target", [0.6, 0.9])
@pytest.mark.parametrize("first", [1e-3, 0.5])
def test_the_step_comes_to_the_wanted_acceptance(first, target):
    """On a Gaussian posterior of precision 10, of a run of one step from exact draws."""
    loc = torch.zeros(300, 4)

    def model() -> None:
        with pyro.plate("data", 300):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1 / 3).to_event(1), obs=loc)

    def encoder() -> None:
        with pyro.plate("data", 300):
            pyro.sample("z", dist.Normal(loc, 0.1**0.5).to_event(1))

    guide = ShortRunGuide(model, num_steps=1, step_size=first, start=encoder, objective=Refine(accept=target))
    guide._acceptance.every = 1
    for _ in range(60):
        guide()
    eta = guide.step_sizes().item()
    assert accepted(eta, 10.0, 4, 1) == pytest.approx(target, abs=0.05)
    assert guide.dynamics.step_size.max == max(1.0, 10 * first)


def test_steps_by_site_each_follow_their_own_acceptance():
    def model() -> None:
        with pyro.plate("data", 300):
            for name, scale in (("wide", 1.0), ("narrow", 0.05)):
                pyro.sample(name, dist.Normal(torch.zeros(3), scale).to_event(1))

    steps = StepSize(0.01, per="site", max=10.0)
    guide = ShortRunGuide(model, num_steps=2, step_size=steps, start=Prior(), objective=Refine(0.8))
    guide._acceptance.every = 1
    for _ in range(60):
        guide()
    found = {k: v.item() for k, v in guide.step_sizes().items()}
    assert accepted(found["wide"], 1.0, 3, 2) == pytest.approx(0.8, abs=0.05)
    assert accepted(found["narrow"], 400.0, 3, 2) == pytest.approx(0.8, abs=0.05)


def test_a_stiff_model_begins_with_a_small_step():
    def model() -> None:
        with pyro.plate("data", 50):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1e-3).to_event(1), obs=torch.ones(50, 4))

    guide = ShortRunGuide(model, num_steps=3, start=Prior(), objective=Refine())
    z = guide()["z"]
    assert guide.step_sizes() < 1e-5 and z.isfinite().all()


def test_what_decides_whether_the_step_moves():
    model, encoder, args = one_layer(data())
    options: dict[str, Any] = dict(num_steps=1, start=encoder)
    assert ShortRunGuide(model, **options, objective=Refine()).adapts
    assert ShortRunGuide(model, **options, objective=Refine(), step_size=StepSize(0.1)).adapts
    assert not ShortRunGuide(model, **options, objective=Refine(accept=None)).adapts
    assert not ShortRunGuide(model, **options, objective=Refine(), dynamics=still()).adapts
    assert ShortRunGuide(model, num_steps=1, start=Persistent()).adapts
    assert not ShortRunGuide(model, num_steps=1, start=Persistent(), step_size=StepSize(0.1)).adapts
    assert not ShortRunGuide(model, num_steps=1, start=Prior()).adapts


# ---------------------------------------------------------------- bad input


def test_refusals():
    model, encoder, args = one_layer(data())
    with pytest.raises(ValueError, match="full_gradient"):
        ShortRunGuide(model, start=encoder, objective=Refine(), full_gradient=True)
    for accept in (0, 1.0, "high"):
        with pytest.raises(ValueError, match="accept"):
            Refine(accept=accept)  # type: ignore[arg-type]

    def scored(x: Tensor) -> None:
        rate = pyro.param("rate", torch.ones(len(x), 2))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Poisson(rate).to_event(1), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(k, 1.0).to_event(1))

    with pytest.raises(NotImplementedError, match="'k' is not reparametrised"):
        ShortRunGuide(model, start=scored, objective=Refine()).setup(*args)

    def mixed() -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 10, subsample_size=2):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(2))

    with pytest.raises(NotImplementedError, match="Refine cannot weigh a subsampled"):
        ShortRunGuide(mixed, start=Prior(), objective=Refine(accept=None))()


@pytest.mark.parametrize("first", [1e-3, 0.9])
def test_negative_runs_follow_their_acceptance(first):
    """In a prior N(0, I) that the energy leaves as it is."""

    class Flat(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return 0 * z.sum(-1)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            energy_prior("flat", Flat(), z)
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(4)), 1.0).to_event(1))

    runs = PriorRuns(1, dynamics=Langevin(StepSize(first, max=10.0, learnable=False)), accept=0.8)
    runs._acceptance.every = 1
    elbo = EnergyELBO(Trace_ELBO(), runs=runs)
    x = torch.randn(300, 4)
    for _ in range(60):
        elbo.loss_and_grads(model, guide, x)
    assert accepted(runs.moves.step_size.current.item(), 1.0, 4, 1) == pytest.approx(0.8, abs=0.05)
    with pytest.raises(ValueError, match="accept"):
        PriorRuns(accept=1.5)
