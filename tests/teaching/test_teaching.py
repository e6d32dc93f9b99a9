"""MCMC teaching: single steps against hand-written ones, Gaussian fixed points, students, resuming, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, ReweightedWakeSleep, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.reparam import LocScaleReparam
from teachers import MEAN, NOISE, ROOT, Around, Broken, Encoder, Gaussian, Linear, SigmaPoints, sgd, sigma_points, teach
from torch import Tensor, nn

from pyro_shortrun import Langevin, MCMCTeaching, Refiner, ShortRunGuide, StepSize
from pyro_shortrun.starts import Replay
from pyro_shortrun.teaching import AncestralSampler

# ------------------------------------------------------------------------------------------------ one step, by hand


def test_one_step_by_hand():
    """Proposals, gradient ascent on f, the contrast of means, the regression: every parameter to round-off."""
    energy, model, x = Gaussian(MEAN, ROOT), Linear(), torch.randn(6, 2)
    teaching = teach(energy, model)
    a, p = energy.a.detach().clone(), energy.p.detach().clone()
    pyro.set_rng_seed(1)
    losses = teaching.step(x)
    pyro.set_rng_seed(1)
    z = torch.randn(6, 2)
    proposed = refined = z
    for _ in range(3):
        refined = refined - 0.1 * (a + refined @ (p + p.T) / 2)
    torch.testing.assert_close(energy.a, a - 0.1 * (x.mean(0) - refined.mean(0)))
    torch.testing.assert_close(energy.p, p - 0.1 * (x.T @ x - refined.T @ refined) / 12)
    back = (proposed - refined) / NOISE**2  # of |refined - W z - b|^2 / 2 s^2, summed over rows, in W z + b
    torch.testing.assert_close(model.w.data, torch.eye(2) - 0.01 * back.T @ z)
    torch.testing.assert_close(model.b.data, -0.01 * back.sum(0))
    assert losses["student"] == pytest.approx(-dist.Normal(z, NOISE).log_prob(refined).sum().item())
    info = teaching.info
    assert info.displacement == pytest.approx((refined - proposed).norm(dim=1).mean().item())
    before = Gaussian(a.tolist(), p.tolist())
    assert info.gap == pytest.approx((before(refined).mean() - before(x).mean()).item())
    assert losses["energy"] == pytest.approx(-info.gap)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_regression_is_the_conditional_log_likelihood(elbo):
    """The prior's terms cancel exactly, in the value and in the prior's own gradient."""
    model = Linear()
    sampler = AncestralSampler(model)
    sampler.propose(torch.zeros(5, 2))
    x, z = torch.randn(5, 2), sampler._latents["z"]
    loss = elbo().differentiable_loss(model, sampler, x)
    loss.backward()
    assert loss.item() == pytest.approx(-dist.Normal(z, NOISE).log_prob(x).sum().item())
    assert model.loc.grad is None or model.loc.grad.abs().max() < 1e-12
    assert model.b.grad.abs().min() > 0


def test_drifts_are_sums():
    """Twice the rows, the same runs."""
    refiner, x = Refiner(Gaussian(MEAN, ROOT), 5, 0.1, noise=0.0), torch.randn(4, 2)
    once, twice = refiner(x).end, refiner(torch.cat([x, x])).end
    torch.testing.assert_close(twice, torch.cat([once, once]), rtol=0, atol=1e-14)


def test_weight_of_squared_energies():
    energy, x = Gaussian(MEAN, ROOT), torch.randn(6, 2)
    teaching = teach(energy, Linear())
    teaching.l2 = 0.5
    other = Gaussian(MEAN, ROOT)
    pyro.set_rng_seed(1)
    loss = teaching.step(x)["energy"]
    pyro.set_rng_seed(1)
    refined = teach(other, Linear()).sample(x).end
    squares = other(x).square().mean() + other(refined).square().mean()
    assert loss == pytest.approx((other(x).mean() - other(refined).mean() + 0.5 * squares).item())


@pytest.mark.parametrize("kind", ["zero", "schedule"])
def test_no_steps_leave_the_energy_alone(kind):
    energy = Gaussian(MEAN, ROOT)
    before = {k: v.clone() for k, v in energy.state_dict().items()}
    teaching = teach(energy, Linear(), num_steps=0 if kind == "zero" else lambda t: 0)
    x = torch.randn(5, 2)
    teaching.step(x)
    assert all(torch.equal(v, before[k]) for k, v in energy.state_dict().items())
    assert teaching.info.displacement == 0 and teaching.info.run is None
    refined = teaching.refiner(x, num_steps=0)
    assert torch.equal(refined.end, x)


@pytest.mark.parametrize("kind", ["no steps", "known"])
def test_statistics_of_an_energy_that_does_not_learn(kind):
    """Batch normalisation counts no batches where the energy is left as it is."""

    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x).square().sum(-1)

    energy = Normalised()
    teaching = teach(energy, Linear(), num_steps=0 if kind == "no steps" else 2)
    teaching.optim = None if kind == "known" else teaching.optim
    teaching.step(torch.randn(5, 2) + 3)
    assert not energy.norm.running_mean.any() and energy.norm.num_batches_tracked == 0 and energy.training


# ------------------------------------------------------------------------------------------------ where it converges to


ETA, ENERGY_LR, LR = 0.3, 0.2, 0.02


class CrossedNoise(Langevin):
    """One step whose noise has exact moments, crossed with the four sigma points of the latents."""

    def draw_noise(self, num_steps: int, like: Tensor) -> Tensor:
        assert like.shape == (1, 16, 2)
        return SigmaPoints(torch.zeros(2), 1.0).rsample().repeat(4, 1).expand(num_steps, *like.shape)


class Crossed(SigmaPoints):
    """Every sigma point four times."""

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return super().rsample().repeat_interleave(4, 0)


def moments(root: Tensor, steps: int, noise: float, iterations: int) -> tuple[Tensor, ...]:
    """The recursion of teaching for exact moments: ``W, b`` of the generator, mean and covariance of refined samples,
    ``P`` of the energy."""
    w, b, a, p = torch.eye(2), torch.zeros(2), torch.zeros(2), torch.zeros(2, 2)
    mean = torch.tensor(MEAN)
    for _ in range(iterations):
        step, moved, center, spread = torch.eye(2) - ETA * p, w, b, torch.zeros(2, 2)
        for _ in range(steps):
            moved, center = step @ moved, step @ center - ETA * a
            spread = step @ spread @ step + 2 * ETA * noise * torch.eye(2)
        refined = moved @ moved.T + spread
        seconds = root @ root.T + mean.outer(mean) - refined - center.outer(center)
        a, p = a - ENERGY_LR * (mean - center), p - ENERGY_LR * seconds / 2
        w, b = w - 4 * LR * (w - moved), b - 4 * LR * (b - center)  # a sum over four rows
    return w, b, center, refined, p


@pytest.mark.parametrize("noise", [False, True])
def test_gaussian_energy_and_linear_generator_converge_to_the_data(noise):
    """Teaching is the recursion of exact moments, whose limit has the data's mean and covariance S in the refined
    samples, a flat energy, and S - 2 K eta I in the generator."""
    root = (2 if noise else 1) * torch.tensor(ROOT)
    model, energy = Linear(1.0, Crossed if noise else SigmaPoints), Gaussian()
    sampler, steps = AncestralSampler(model), 1 if noise else 5
    dynamics = (CrossedNoise if noise else Langevin)(StepSize(ETA, learnable=False), noise=noise)
    student = SVI(model, sampler, sgd(LR / (4 if noise else 1)), Trace_ELBO())
    optim = torch.optim.SGD(energy.parameters(), lr=ENERGY_LR)
    teaching = MCMCTeaching(sampler, Refiner(energy, steps, dynamics=dynamics), student, optim)
    x = sigma_points(root).repeat(4 if noise else 1, 1)
    for _ in range(40):
        teaching.step(x)
    w, b, _, _, p = moments(root, steps, noise, 40)
    for found, exact in ((model.w, w), (model.b, b), (energy.p, p)):
        torch.testing.assert_close(found.data, exact)
    w, b, mean, refined, p = moments(root, steps, noise, 6000)
    target, lost = root @ root.T, 2 * steps * ETA * noise * torch.eye(2)
    close = dict(rtol=0, atol=1e-4)
    torch.testing.assert_close(refined, target, **close)
    torch.testing.assert_close(mean, torch.tensor(MEAN), **close)
    torch.testing.assert_close(w @ w.T, target - lost, **close)
    torch.testing.assert_close(b, torch.tensor(MEAN), **close)
    torch.testing.assert_close(p, torch.zeros(2, 2), **close)


# ------------------------------------------------------------------------------------------------ students


def test_latent_runs_begin_at_the_latents_of_the_sample():
    """A run that hardly moves stays there; one that moves goes towards the posterior given the refined sample."""
    model, x = Linear(), torch.randn(7, 2)
    dynamics = Langevin(StepSize(1e-12, learnable=False), noise=False)
    teaching = teach(
        Gaussian(MEAN, ROOT), model, lambda s: ShortRunGuide(model, num_steps=1, dynamics=dynamics, start=s)
    )
    teaching.step(x)
    guide, sampler = teaching.student[0].guide, teaching.sampler
    torch.testing.assert_close(guide(x)["z"], sampler._latents["z"])
    dynamics = Langevin(StepSize(0.1, learnable=False), noise=False)
    moving = ShortRunGuide(model, num_steps=200, dynamics=dynamics, start=sampler)
    w, b, loc = model.w.detach(), model.b.detach(), model.loc.detach()
    precision = torch.eye(2) + w.T @ w / NOISE**2
    mode = torch.linalg.solve(precision, (loc + (x - b) @ w / NOISE**2).T).T
    torch.testing.assert_close(moving(x)["z"], mode)


def test_variational_student_sees_refined_samples_alone():
    """The step is that of SVI on them."""
    energy, x = Gaussian(MEAN, ROOT), torch.randn(6, 2)
    model, encoder = Linear(), Encoder()
    start = {k: v.clone() for k, v in [*model.state_dict().items(), *encoder.state_dict().items()]}
    teaching = teach(energy, model, lambda s: encoder)
    pyro.set_rng_seed(2)
    loss = teaching.step(x)["student"]
    found = {k: v.clone() for k, v in [*model.state_dict().items(), *encoder.state_dict().items()]}
    pyro.clear_param_store()
    model.load_state_dict({k: start[k] for k in model.state_dict()})
    encoder.load_state_dict({k: start[k] for k in encoder.state_dict()})
    pyro.set_rng_seed(2)
    refined = teach(Gaussian(MEAN, ROOT), model).sample(x).end
    assert SVI(model, encoder, sgd(0.01), Trace_ELBO()).step(refined) == pytest.approx(loss)
    after = {k: v for k, v in [*model.state_dict().items(), *encoder.state_dict().items()]}
    for k, v in after.items():
        torch.testing.assert_close(v, found[k])


def test_dual_teaching():
    """A step on the data as well, and an encoder that learns from the latents of refined samples (model and guide
    swapped): its loss is -log q(z | refined) and the prior's constant."""
    model, encoder, x = Linear(), Encoder(), torch.randn(6, 2)
    sampler, energy = AncestralSampler(model), Gaussian(MEAN, ROOT)
    asleep = SVI(encoder, sampler, sgd(0.01), Trace_ELBO())
    awake = SVI(model, encoder, sgd(0.01), ReweightedWakeSleep(num_particles=2))
    optim = torch.optim.SGD(energy.parameters(), lr=0.1)
    teaching = MCMCTeaching(sampler, Refiner(energy, 2, 0.1), [asleep], optim, dual=awake)
    before = Encoder()
    before.load_state_dict(encoder.state_dict())
    losses = teaching.step(x)
    assert set(losses) == {"energy", "student", "dual"}
    assert not torch.equal(model.b.data, torch.zeros(2))
    assert not torch.equal(encoder.net.weight, before.net.weight)
    sampler.propose(x)
    z = sampler._latents["z"]
    pyro.clear_param_store()
    refined = torch.randn(6, 2)
    log_q = dist.Normal(encoder.net(refined), 0.5).log_prob(z).sum()
    prior = dist.Normal(model.loc, 1.0).log_prob(z).sum()
    found = Trace_ELBO().loss(encoder, sampler, refined)
    assert found == pytest.approx((prior - log_q).item())


def test_latents_are_forgotten_after_the_student():
    """A sampler that hides in another guide is found out too: its latents are not those of the observed data."""
    model, x = Linear(), torch.randn(4, 2)
    teaching = teach(Gaussian(), model)
    hidden = SVI(model, lambda x: teaching.sampler(x), sgd(0.01), Trace_ELBO())
    teaching.dual = (hidden,)
    with pytest.raises(ValueError, match="no latents of these 4 rows"):
        teaching.step(x)


def test_known_energy_is_left_alone():
    """The generator alone learns, here the mean of a Gaussian energy."""
    energy, model = Gaussian([-1.0, -2.0], [[1.0, 0.0], [0.0, 1.0]]), Linear(1.0)
    sampler = AncestralSampler(model)
    student = SVI(model, sampler, sgd(0.01), Trace_ELBO())
    teaching = MCMCTeaching(sampler, Refiner(energy, 8, 0.4, noise=0.0), student, None)
    for _ in range(30):
        teaching.step(torch.zeros(20, 2))
    torch.testing.assert_close(model.b.data, torch.tensor([1.0, 2.0]), rtol=0, atol=0.02)
    assert energy.a.tolist() == [-1.0, -2.0]


# ------------------------------------------------------------------------------------------------ saving


@pytest.mark.parametrize("scheme", ["regression", "latent runs", "variational"])
def test_resuming_is_bit_for_bit(scheme, tmp_path):
    x = torch.randn(8, 2)

    def make() -> MCMCTeaching:
        pyro.clear_param_store()
        energy, model = Gaussian(), Linear()
        sampler = AncestralSampler(model)
        guides = {
            "regression": sampler,
            "latent runs": ShortRunGuide(model, num_steps=3, step_size=0.01, start=sampler),
            "variational": Encoder(),
        }
        student = SVI(model, guides[scheme], pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        replay = Replay(20) if scheme == "variational" else None
        refiner = Refiner(energy, lambda t: 1 + t % 3, 0.05, replay=replay)
        return MCMCTeaching(sampler, refiner, student, torch.optim.Adam(energy.parameters(), lr=0.01))

    def go(teaching: MCMCTeaching, seed: int) -> list[dict]:
        pyro.set_rng_seed(seed)
        return [teaching.step(x) for _ in range(3)]

    first = make()
    go(first, 0)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    expected = go(first, 1)
    second = make()
    second.setup(x)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.iteration == 3
    assert go(second, 1) == expected


def test_loading_before_setup_is_refused():
    first = teach(Gaussian(), Linear())
    first.step(torch.randn(4, 2))
    pyro.clear_param_store()
    with pytest.raises(ValueError, match=r"'linear.*setup\(x\)"):
        teach(Gaussian(), Linear()).load_state_dict(first.state_dict())


# ------------------------------------------------------------------------------------------------ refusals


def dual_regression() -> None:
    model, energy = Linear(), Gaussian()
    sampler = AncestralSampler(model)
    svi = SVI(model, sampler, sgd(0.01), Trace_ELBO())
    MCMCTeaching(sampler, Refiner(energy), svi, torch.optim.SGD(energy.parameters(), lr=0.1), dual=svi)


def two_observed(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=x)
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def wrong_shape(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=torch.zeros(len(x), 3))


def no_latents(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1), obs=x)


def other_latents() -> None:
    model = Linear()
    guide = ShortRunGuide(
        poutine.reparam(model, config={"z": LocScaleReparam(0.0)}), num_steps=2, start=AncestralSampler(model)
    )
    guide.start.propose(X)
    guide(X)


class Steep(nn.Module):
    """A parameter at the edge of where it has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(-1) * self.w.sqrt()


class Flat(nn.Module):
    """One value too few."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return (self.w * x).sum()


def nan(x: Tensor) -> Tensor:
    x = x.clone()
    x[0, 0] = torch.nan
    return x


X = torch.zeros(4, 2, dtype=torch.float64)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "energy": (lambda: Refiner(lambda x: x), "energy must be an nn.Module"),
    "steps": (lambda: Refiner(Gaussian(), num_steps=-1), "num_steps must be an integer"),
    "step size": (lambda: Refiner(Gaussian(), step_size=-1.0), "step_size must be a finite number > 0"),
    "noise": (lambda: Refiner(Gaussian(), noise=-1.0)(X), "noise, the factor"),
    "both": (lambda: Refiner(Gaussian(), step_size=0.1, dynamics=Langevin(0.1)), "or dynamics"),
    "reference": (lambda: Refiner(Gaussian(), reference=1.0), "reference must be"),
    "replay": (lambda: Refiner(Gaussian(), replay=10), "replay must be"),
    "replay and context": (lambda: Refiner(Around(), replay=Replay()).go_on(X, X), "replay mixes the rows"),
    "replay and regression": (lambda: teach(Gaussian(), Linear(), replay=Replay()), "let the student have an encoder"),
    "dual and regression": (dual_regression, "not of the observed data"),
    "values": (lambda: Refiner(Flat())(X), "'energy' has shape"),
    "refiner": (lambda: MCMCTeaching(Linear(), Gaussian(), None, None), "refiner must be a Refiner"),
    "student": (lambda: MCMCTeaching(Linear(), Refiner(Gaussian()), None, None), "student must be a pyro.infer.SVI"),
    "l2": (
        lambda: MCMCTeaching(Linear(), Refiner(Gaussian()), SVI(None, None, sgd(1), Trace_ELBO()), None, l2=-1.0),
        "l2 must be",
    ),
    "optim": (
        lambda: MCMCTeaching(Linear(), Refiner(Gaussian()), SVI(None, None, sgd(1), Trace_ELBO()), sgd(1.0)),
        "optim must be a torch optimiser",
    ),
    "optim of another": (
        lambda: MCMCTeaching(
            Linear(),
            Refiner(Gaussian()),
            SVI(None, None, sgd(1), Trace_ELBO()),
            torch.optim.SGD(Linear().parameters(), lr=1.0),
        ),
        "energy's parameter 'a'",
    ),
    "optim of nothing": (
        lambda: teach(Gaussian().requires_grad_(False), Linear()),
        "nothing to train: pass optim=None",
    ),
    "not finite": (lambda: teach(Gaussian(), Linear()).step(nan(X)), "x has values that are not finite"),
    "integers": (lambda: teach(Gaussian(), Linear()).step(X.long()), "floating-point"),
    "graph": (
        lambda: teach(Around(), Linear()).step(X, X * nn.Parameter(torch.ones(2))),
        "context 0 requires gradients",
    ),
    "context rows": (lambda: teach(Around(), Linear()).step(X, X[:2]), "context 0 has 2 rows and x has 4"),
    "two sites": (lambda: AncestralSampler(two_observed).propose(X), "which one is x"),
    "site": (lambda: AncestralSampler(Linear(), site="y").propose(X), "'y' is not one of them"),
    "shape": (lambda: AncestralSampler(wrong_shape).propose(X), r"shape \(4, 3\) and x has \(4, 2\)"),
    "latents": (lambda: AncestralSampler(no_latents).propose(X), "no latent sites"),
    "unknown rows": (lambda: AncestralSampler(Linear())(X), "has no latents of these 4 rows"),
    "latents of another model": (other_latents, "drew no latent 'z_decentered'"),
    "all broken": (lambda: teach(Broken(-100.0), Linear()).step(X), "every run of the energy-based model"),
    "energy's gradient": (lambda: teach(Steep(), Linear()).step(X), "gradient in parameter 'w' is not finite"),
    "data's energy": (lambda: teach(Broken(5.0), Linear()).step(X + 100), "energy of the data is not finite"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_two_observed_sites_with_a_name():
    assert AncestralSampler(two_observed, site="x").propose(torch.zeros(4, 2)).shape == (4, 2)


def test_output():
    """With the noise of the observations instead of the mean."""
    sampler = AncestralSampler(Linear(noise=3.0), output=lambda fn: fn.sample())
    assert sampler.propose(torch.zeros(2000, 2)).var().item() == pytest.approx(10.0, rel=0.15)
