"""Objectives other than the path density: weights against formulas, tuned steps against closed forms, evidence."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import gaussian
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoNormal, init_to_value
from runners import Runner, run
from test_annealed import curved, log_joint
from torch import Tensor

from pyro_shortrun import (
    Annealed,
    GaussianReverse,
    Hamiltonian,
    Init,
    Langevin,
    Linearized,
    Mixture,
    PathDensity,
    Persistent,
    ShortRunELBO,
    ShortRunGuide,
    ShortRunLangevin,
    StepSize,
    to_arviz,
)
from pyro_shortrun.compile import Compiler, Untouched, density_of
from pyro_shortrun.density import Call
from pyro_shortrun.guides import tune_on_grid
from pyro_shortrun.objectives.reverse import weighed_by
from pyro_shortrun.objectives.reverse_kernels import Affine, Fit
from pyro_shortrun.runs import Gradients
from pyro_shortrun.starts import GaussianBase, PriorBase

STEPS = 5


def posterior(precisions: list[float], mean: float = 1.0) -> tuple[Callable[[], None], float]:
    """A model with a N(0, 1) prior and a posterior N(mean, 1 / precision) per coordinate; log evidence."""
    lam = torch.tensor(precisions)
    data, noise = lam * mean / (lam - 1), (lam - 1).rsqrt()

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(len(lam)), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z, noise).to_event(1), obs=data)

    return model, dist.Normal(0.0, (1 + noise**2).sqrt()).log_prob(data).sum().item()


def kl(eta: float, steps: int, precisions: list[float], mean: float = 1.0) -> float:
    """Exact KL of the law of a Langevin run, from N(0, 1), to the posterior."""
    total = 0.0
    for lam in precisions:
        a = 1 - eta * lam
        if abs(a) >= 1:
            return math.inf
        variance = a ** (2 * steps) + 2 * eta * (1 - a ** (2 * steps)) / (1 - a * a)
        total += 0.5 * (lam * variance + lam * (mean * a**steps) ** 2 - 1 - math.log(lam * variance))
    return total


# ---------------------------------------------------------------- Hamiltonian


def leapfrog(log_base, u: Tensor, eta: Tensor, beta: Tensor, kept: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """End and sum of increments, from the formula, with a graph."""
    total, v = torch.zeros(u.shape[:-1]), noise[0]
    for k in range(len(eta)):
        step = (2 * eta[k]).sqrt()
        middle = u + 0.5 * step * v
        tempered = (1 - beta[k]) * log_base(middle) + beta[k] * log_joint(middle)
        (grad,) = torch.autograd.grad(tempered.sum(), middle, create_graph=True)
        pushed = v + step * grad
        u = middle + 0.5 * step * pushed
        total = total + (dist.Normal(0.0, 1.0).log_prob(pushed) - dist.Normal(0.0, 1.0).log_prob(v)).sum(-1)
        v = kept * pushed + (1 - kept**2).sqrt() * noise[(k + 1) % len(eta)]
    return u, total


def prior(x: Tensor) -> Tensor:
    return dist.Normal(0.0, torch.tensor([1.0, 2.0])).log_prob(x).sum(-1)


def density(model: Callable, compile: bool):
    call = Call.of(model, (), {})
    return density_of(call.model, Compiler(Untouched()) if compile else None)


def assert_same_gradients(found: tuple, wanted: tuple, leaves: list[Tensor]) -> None:
    back = [torch.randn_like(t) for t in wanted]
    options = dict(allow_unused=True, materialize_grads=True)
    slopes = [torch.autograd.grad(pair, leaves, back, **options) for pair in (found, wanted)]
    for a, b in zip((*found, *slopes[0]), (*wanted, *slopes[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compile", [False, True])
def test_hamiltonian_weight_and_its_gradients(compile: bool, monkeypatch):
    monkeypatch.setattr("pyro_shortrun.compile.compiler._STEPS_AT_MOST", 3)
    dynamics = Hamiltonian(0.1, max_drift=math.inf)
    dynamics.setup(torch.zeros(()))
    u, eta = torch.randn(2, 3, 2, requires_grad=True), (torch.rand(STEPS, 2) * 0.1 + 0.01).requires_grad_()
    beta, noise = torch.linspace(0.2, 1.0, STEPS).requires_grad_(), torch.randn(STEPS, 2, 3, 2)
    wanted = leapfrog(prior, u, eta, beta, dynamics.kept, noise)
    runner = Runner(density(curved, compile), dynamics, Annealed(), base=PriorBase(), beta=beta)
    result = run(runner, u, eta, noise, Gradients.GUIDE)
    assert_same_gradients((result.end, result.increment), wanted, [u, eta, beta, dynamics.share_unconstrained])
    torch.testing.assert_close(result.info.log_det.sum(), result.increment.mean(), rtol=1e-4, atol=1e-5)
    assert result.info.log_density.shape == (STEPS + 1,)


def nodes(count: int, dimensions: int) -> tuple[Tensor, Tensor]:
    """Points and weights of Gauss-Hermite quadrature."""
    t, w = (torch.as_tensor(a).to(torch.get_default_dtype()) for a in np.polynomial.hermite_e.hermegauss(count))
    weight = torch.cartesian_prod(*[w] * dimensions).prod(-1) / math.sqrt(2 * math.pi) ** dimensions
    return torch.cartesian_prod(*[t] * dimensions), weight


def test_hamiltonian_mean_weight_is_the_evidence():
    """By quadrature over the start and the momenta of two steps."""
    model, evidence = gaussian(4.0, 0.5)
    grid, weight = nodes(40, 3)
    call = Call.of(model, (len(grid),), {})
    dynamics = Hamiltonian(0.1, damping=0.4)
    dynamics.setup(grid[0, 0])
    u, noise = grid[:, :1].unsqueeze(0), grid[:, 1:].T.reshape(2, 1, -1, 1)
    runner = Runner(call.density, dynamics, Annealed(), base=PriorBase(), beta=torch.tensor([0.4, 1.0]))
    result = run(runner, u, torch.full((2, 1), 0.1), noise)
    log_w = call.density(result.end) + result.increment - dist.Normal(0.0, 1.0).log_prob(u[..., 0])
    assert (weight * log_w.squeeze(0).exp()).sum().log().item() == pytest.approx(evidence, abs=1e-3)


@pytest.mark.parametrize("start", [None, AutoNormal])
def test_hamiltonian_is_trained_and_travels_further(start):
    """With little damping ten steps get closer than with all of it, at the same step size."""
    model, evidence = posterior([1.5, 100.0])
    gaps = {}
    for damping in (0.1, 0.99):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        dynamics = Hamiltonian(StepSize(0.003), damping=damping)
        guide = ShortRunGuide(
            model, num_steps=10, dynamics=dynamics, objective=Annealed(), start=start and start(model)
        )
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
        guide.setup()
        before = {k: v.detach().clone() for k, v in guide.named_parameters()}
        gaps[damping] = evidence + ShortRunELBO(2000).loss(model, guide)
        for _ in range(5):
            svi.step()
        changed = {k for k, v in guide.named_parameters() if not torch.equal(v, before[k])}
        assert changed == set(before) and any("share" in k for k in changed)
    if start is None:
        assert gaps[0.1] < gaps[0.99]


# ---------------------------------------------------------------- GaussianReverse


def learned(layout, eta: Tensor, dense: bool) -> Affine:
    """Coefficients from made-up runs."""
    fit = Fit(layout, eta, dense)
    u = torch.randn(len(eta), 50, layout.rows, layout.size)
    drift, before = eta[:, None, None] * (torch.randn_like(u) - u), u + 0.2 * torch.randn_like(u) + 0.03 * u
    fit.update(before, u, drift, torch.ones(50, layout.rows, dtype=torch.bool))
    return Affine(dense, fit.solve())


def reversed_by_hand(reverse: Affine, log_base, u, eta, beta, noise) -> tuple[Tensor, Tensor]:
    total = torch.zeros(u.shape[:-1])

    def drift(x: Tensor, k: int) -> Tensor:
        tempered = (1 - beta[k]) * log_base(x) + beta[k] * log_joint(x)
        return eta[k] * torch.autograd.grad(tempered.sum(), x, create_graph=True)[0]

    for k in range(len(eta)):
        forth = dist.Normal(u + drift(u, k), (2 * eta[k]).sqrt())
        new = forth.mean + (2 * eta[k]).sqrt() * noise[k]
        a, scale = drift(new, k), (2 * eta[k]).sqrt()
        b, slopes, whiten = (t[k] for t in reverse.parameters)
        if reverse.dense:
            mean = new - a + 2 * eta[k] * (b + torch.cat([new, a / (2 * eta[k])], -1) @ slopes)
            factor = torch.diag(scale) @ torch.linalg.inv(whiten)
        else:
            mean = new - a + 2 * eta[k] * (b + slopes[0] * new) + slopes[1] * a
            factor = torch.diag(scale / whiten)
        back = dist.MultivariateNormal(mean, scale_tril=factor)
        total = total + back.log_prob(u) - forth.log_prob(new).sum(-1)
        u = new
    return u, total


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("tempered", [False, True])
def test_reverse_weight_and_its_gradients(tempered: bool, dense: bool, compile: bool, monkeypatch):
    """In start, step sizes and temperatures, the coefficients held fixed."""
    monkeypatch.setattr("pyro_shortrun.compile.compiler._STEPS_AT_MOST", 3)
    u, eta = torch.randn(2, 3, 2, requires_grad=True), (torch.rand(STEPS, 2) * 0.1 + 0.01).requires_grad_()
    beta = torch.linspace(0.2, 1.0, STEPS).requires_grad_() if tempered else torch.ones(STEPS)
    noise, log_pi = torch.randn(STEPS, 2, 3, 2), density(curved, compile)
    reverse = learned(log_pi.layout, eta.detach(), dense)
    wanted = reversed_by_hand(reverse, prior, u, eta, beta, noise)
    objective = weighed_by(GaussianReverse(tempered), reverse)
    runner = Runner(log_pi, Langevin(0.1, max_drift=math.inf), objective, base=PriorBase(), beta=beta)
    result = run(runner, u, eta, noise, Gradients.GUIDE)
    assert_same_gradients((result.end, result.increment), wanted, [u, eta, beta] if tempered else [u, eta])


@pytest.mark.parametrize("tempered", [False, True])
def test_reverse_mean_weight_is_the_evidence(tempered: bool):
    """Whatever the coefficients are."""
    model, evidence = gaussian(4.0, 0.5)
    grid, weight = nodes(40, 3)
    call = Call.of(model, (len(grid),), {})
    eta = torch.full((2, 1), 0.1)
    objective = weighed_by(GaussianReverse(tempered), learned(Call.of(model, (4,), {}).density.layout, eta, False))
    u, noise = grid[:, :1].unsqueeze(0), grid[:, 1:].T.reshape(2, 1, -1, 1)
    beta = torch.tensor([0.4, 1.0]) if tempered else None
    runner = Runner(call.density, Langevin(0.1), objective, base=PriorBase(), beta=beta)
    result = run(runner, u, eta, noise)
    log_w = call.density(result.end) + result.increment - dist.Normal(0.0, 1.0).log_prob(u[..., 0])
    assert (weight * log_w.squeeze(0).exp()).sum().log().item() == pytest.approx(evidence, abs=1e-3)


@pytest.mark.parametrize("dense", [False, True])
def test_least_squares(dense: bool):
    """The coefficients that made-up steps were made with, rows that are not valid left out."""
    layout, eta = density(curved, False).layout, torch.full((2, 2), 0.1)
    u, slope = torch.randn(2, 4000, 3, 2), torch.randn(2, 4000, 3, 2)
    target = 2.0 + 0.5 * u - 0.3 * slope + torch.randn_like(u) / (2 * eta[0]).sqrt()
    valid = torch.rand(4000, 3) < 0.9
    before = u + 0.2 * (target - slope)
    before[:, ~valid] = 100.0
    fit = Fit(layout, eta, dense)
    for part in (slice(1000), slice(1000, 4000)):
        fit.update(before[:, part], u[:, part], 0.2 * slope[:, part], valid[part])
    intercept, slopes, whiten = fit.solve()
    eye = torch.eye(2)
    wanted = torch.cat([0.5 * eye, -0.3 * eye]) if dense else torch.tensor([[0.5, 0.5], [-0.3, -0.3]])
    torch.testing.assert_close(intercept, torch.full_like(intercept, 2.0), atol=0.1, rtol=0)
    torch.testing.assert_close(slopes, wanted.expand_as(slopes), atol=0.1, rtol=0)
    torch.testing.assert_close(whiten, (eye if dense else torch.ones(2)).expand_as(whiten), atol=0.05, rtol=0)


@pytest.mark.parametrize("precisions", [[25.0]], ids=str)
def test_tuned_step_is_the_best_with_noise(precisions: list[float]):
    """Within 5 % of the optimum of the exact KL (in s = sqrt(2 eta)), and the bound within 0.02 nats of its value."""
    pyro.set_rng_seed(0)
    steps, (model, evidence) = 25, posterior(precisions)
    best = min(np.linspace(0.02, 0.4, 2000) ** 2 / 2, key=lambda eta: kl(eta, steps, precisions))
    objective = GaussianReverse(fresh=2000)
    guide = ShortRunGuide(
        model, num_steps=steps, dynamics=Langevin(StepSize(best / 2, max=4 * best)), objective=objective
    )
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.02 ** (1 / 80)}), ShortRunELBO(1000))
    for _ in range(80):
        svi.step()
    eta = guide.step_sizes().item()
    assert math.sqrt(eta / best) == pytest.approx(1.0, abs=0.05)
    guide.eval()
    bound = -np.mean([ShortRunELBO(4000).loss(model, guide) for _ in range(10)])
    assert bound == pytest.approx(evidence - kl(eta, steps, precisions), abs=0.02)


def test_what_a_run_is_weighed_by_is_that_of_its_own_call():
    """Bounds do not depend on earlier calls: other data, other steps, training."""

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.3), obs=x)

    def make() -> ShortRunGuide:
        pyro.clear_param_store()
        objective = GaussianReverse(pilots=2000)
        return ShortRunGuide(model, num_steps=10, dynamics=Langevin(StepSize(0.02)), objective=objective)

    def bound(guide: ShortRunGuide, x: float) -> float:
        pyro.set_rng_seed(0)
        return -ShortRunELBO(2000).loss(model, guide, torch.tensor(x))

    fresh = bound(make(), 4.0)
    guide = make()
    bound(guide, 0.0)
    SVI(model, guide, pyro.optim.SGD({"lr": 0.0}), Trace_ELBO()).step(torch.tensor(0.0))
    guide.dynamics.step_size.assign(torch.tensor([0.001]))
    bound(guide, 0.0)
    guide.dynamics.step_size.assign(torch.tensor([0.02]))
    assert bound(guide, 4.0) == pytest.approx(fresh, rel=1e-4)
    assert bound(guide.eval(), 4.0) == pytest.approx(fresh, rel=1e-4)


@pytest.mark.parametrize("start", [AutoNormal, AutoIAFNormal, lambda model: Init(pyro.infer.autoguide.init_to_median)])
def test_reverse_takes_any_start_with_a_density(start):
    model, evidence = posterior([4.0, 9.0])
    guide = ShortRunGuide(model, num_steps=4, step_size=0.02, objective=GaussianReverse(pilots=512), start=start(model))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert all(math.isfinite(svi.step()) for _ in range(3))
    with pytest.raises(NotImplementedError, match="everywhere"):
        ShortRunGuide(model, objective=GaussianReverse(True), start=AutoIAFNormal(model))()


# ---------------------------------------------------------------- Mixture


@pytest.mark.parametrize("compile", [False, True])
def test_mixture_weight_and_its_gradients(compile: bool):
    copies, objective = 3, Mixture(3)
    u, eta = torch.randn(6, 3, 2, requires_grad=True), (torch.rand(STEPS, 2) * 0.1 + 0.01).requires_grad_()
    noise = torch.randn(STEPS, 6, 3, 2)
    log_q = prior(u)
    x, mean = u, u
    for k in range(STEPS):
        mean = x + eta[k] * torch.autograd.grad(log_joint(x).sum(), x, create_graph=True)[0]
        x = mean + (2 * eta[k]).sqrt() * noise[k]
    ends, means = x.unflatten(0, (2, copies)), mean.unflatten(0, (2, copies))
    terms = dist.Normal(means, (2 * eta[-1]).sqrt()).log_prob(ends[:, :1]).sum(-1)
    log_mixture = terms.logsumexp(1) - math.log(copies)
    runner = Runner(density(curved, compile), Langevin(0.1, max_drift=math.inf), objective)
    result = run(runner, u, eta, noise, Gradients.GUIDE, log_q=prior(u)).every(copies)
    assert_same_gradients((result.end, result.increment), (x[::copies], log_q[::copies] - log_mixture), [u, eta])


def test_mixture_bound_rises_to_the_runs_own():
    """Below the ELBO of the run, which the exact KL gives, for every M, and close to it for many."""
    model, evidence = posterior([4.0])
    own = evidence - kl(0.04, 25, [4.0])
    bounds = []
    for runs in (2, 8, 64):
        pyro.clear_param_store()
        guide = ShortRunGuide(model, num_steps=25, dynamics=Langevin(StepSize(0.04)), objective=Mixture(runs))
        bounds.append(-ShortRunELBO(4000).loss(model, guide))
    assert bounds[0] < bounds[1] < bounds[2] < own + 0.02 and bounds[2] > own - 0.05


def test_weights_of_a_mixture_average_to_the_evidence():
    model, evidence = posterior([4.0])
    guide = ShortRunGuide(model, num_steps=5, dynamics=Langevin(StepSize(0.05)), objective=Mixture(16)).setup()
    _, drawn = guide.weighted_draws((), {}, 20_000)
    weights = (drawn.log_p - drawn.log_q - evidence).exp()
    error = weights.std() / len(weights) ** 0.5
    assert error < 0.02 and (weights.mean() - 1).abs() < 4 * error


def test_mixture_tunes_by_svi():
    model, _ = posterior([25.0])
    pyro.set_rng_seed(0)
    guide = ShortRunGuide(model, num_steps=10, dynamics=Langevin(StepSize(0.002)), objective=Mixture(16))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    losses = [svi.step() for _ in range(60)]
    assert sum(losses[-20:]) < sum(losses[:20]) and guide.step_sizes() > 0.004
    assert guide()["z"].shape == (1,)


# ---------------------------------------------------------------- Linearized


@pytest.mark.parametrize("precisions", [[4.0], [4.0, 25.0]], ids=str)
@pytest.mark.parametrize("noise", [True, False])
def test_linearized_is_exact_on_gaussians(precisions: list[float], noise: bool):
    """Its mean is the ELBO of the run: in closed form with noise, and the path density's without."""
    steps, eta = 10, 0.02
    model, evidence = posterior(precisions)
    dynamics = Langevin(StepSize(eta), noise=noise)
    guide = ShortRunGuide(model, num_steps=steps, dynamics=dynamics, objective=Linearized())
    pyro.set_rng_seed(0)
    found = guide.log_weight(num_particles=4000).mean().item()
    if noise:
        assert found == pytest.approx(evidence - kl(eta, steps, precisions), abs=0.06)
        return
    guide.objective = PathDensity()
    pyro.set_rng_seed(0)
    assert found == pytest.approx(guide.log_weight(num_particles=4000).mean().item(), abs=1e-5)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("kind", ["prior", "gaussian"])
def test_linearized_weight_and_its_gradients(kind: str, compile: bool):
    u, eta = torch.randn(2, 3, 2, requires_grad=True), (torch.rand(STEPS, 2) * 0.1 + 0.01).requires_grad_()
    noise, scale = torch.randn(STEPS, 2, 3, 2), (torch.rand(3, 2) + 0.5).requires_grad_()
    eye = torch.eye(2)
    p = torch.diag(torch.tensor([1.0, 4.0])).expand(2, 3, 2, 2) if kind == "prior" else torch.diag_embed(scale**2)
    first, x = p, u
    for k in range(STEPS):
        grad = torch.autograd.grad(log_joint(x).sum(), x, create_graph=True)[0]
        columns = [torch.autograd.grad(g.sum(), x, create_graph=True)[0] for g in grad.unbind(-1)]
        a = eye + eta[k].unsqueeze(-1) * torch.stack(columns, -1)
        p = a @ p @ a.mT + 2 * torch.diag(eta[k])
        x = x + eta[k] * grad + (2 * eta[k]).sqrt() * noise[k]
    wanted = x, 0.5 * (torch.logdet(p) - torch.logdet(first))
    base = PriorBase() if kind == "prior" else GaussianBase(torch.zeros(3, 2), scale)
    runner = Runner(density(curved, compile), Langevin(0.1, max_drift=math.inf), Linearized(), base=base)
    result = run(runner, u, eta, noise, Gradients.GUIDE)
    assert_same_gradients((result.end, result.increment), wanted, [u, eta] + [scale] * (kind == "gaussian"))


# ---------------------------------------------------------------- what they share


OBJECTIVES = {
    "annealed": lambda: dict(objective=Annealed(), step_size=0.01),
    "hamiltonian": lambda: dict(objective=Annealed(), dynamics=Hamiltonian(StepSize(0.01))),
    "reverse": lambda: dict(objective=GaussianReverse(pilots=64), step_size=0.01),
    "tempered reverse": lambda: dict(objective=GaussianReverse(True, pilots=64), step_size=0.01),
    "diagonal reverse": lambda: dict(objective=GaussianReverse(dense=False, pilots=64), step_size=0.01),
    "mixture": lambda: dict(objective=Mixture(4), step_size=0.01),
    "linearized": lambda: dict(objective=Linearized(), step_size=0.01),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_runs_rows_and_trajectories(name: str):
    """Rows in a plate, SVI with both losses, draws, trajectories, evaluation, and a run without gradients."""
    guide = ShortRunGuide(curved, num_steps=3, **OBJECTIVES[name]())
    for elbo in (Trace_ELBO(), ShortRunELBO(2)):
        svi = SVI(curved, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
        assert all(math.isfinite(svi.step()) for _ in range(2))
    assert math.isfinite(svi.evaluate_loss())
    assert guide.sample_posterior(num_samples=5)["z"].shape == (1, 5, 3, 2)
    assert guide.trajectory(num_chains=4)["z"].shape == (4, 4, 3, 2)
    assert guide().keys() == {"z"} and guide.info.log_det.shape == (3,)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_row_that_meets_no_finite_density_is_frozen(name: str):
    def model() -> None:
        with pyro.plate("data", 40):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(torch.where(z > 1.5, z / 0.0, z), 1.0), obs=torch.full((40,), 3.0))

    pyro.set_rng_seed(0)
    options = OBJECTIVES[name]()
    options.pop("step_size", None)
    options.setdefault("dynamics", Langevin(StepSize(0.3)))
    if name == "hamiltonian":
        options["dynamics"] = Hamiltonian(StepSize(0.3))
    guide = ShortRunGuide(model, num_steps=4, **options)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    with pytest.warns(UserWarning, match="non-finite"):
        assert math.isfinite(svi.step())
    assert 0 < guide.info.nonfinite and guide.step_sizes().isfinite().all()
    assert guide()["z"].isfinite().all()


def test_refusals():
    model, _ = posterior([4.0])
    with pytest.raises(ValueError, match="Annealed"):
        ShortRunGuide(model, dynamics=Hamiltonian(0.1))
    with pytest.raises(ValueError, match="Langevin"):
        ShortRunGuide(model, dynamics=Hamiltonian(0.1), objective=GaussianReverse())
    with pytest.raises(ValueError, match="damping"):
        Hamiltonian(0.1, damping=1.5)
    with pytest.raises(ValueError, match="at least 2"):
        Mixture(1)
    for wrong in (0, 10.5, "a", True):
        with pytest.raises(ValueError, match="pilots"):
            GaussianReverse(pilots=wrong)
        with pytest.raises(ValueError, match="num_runs"):
            Mixture(wrong if wrong else 0.5)
    with pytest.raises(ValueError, match="tempered"):
        GaussianReverse(PathDensity())
    for objective in (Mixture(4), GaussianReverse()):
        with pytest.raises(ValueError, match="noise"):
            ShortRunGuide(model, dynamics=Langevin(0.1, noise=False), objective=objective)
    for objective in (Mixture(4), GaussianReverse(), Linearized()):
        with pytest.raises(NotImplementedError, match=type(objective).__name__):
            ShortRunLangevin(model, objective=objective)
    model, _ = posterior([4.0, 9.0])
    with pytest.raises(NotImplementedError, match="covariance of the start"):
        ShortRunGuide(model, objective=Linearized(), start=AutoIAFNormal(model))()
    with pytest.raises(NotImplementedError, match="Langevin"):
        ShortRunLangevin(model, dynamics=Hamiltonian(0.1))


def test_a_subsampled_model_with_global_latents():
    """Weights of local parts; those that cannot be are refused by name."""

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 6, subsample_size=2):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(2))

    for name in ("hamiltonian", "reverse", "tempered reverse"):
        guide = ShortRunGuide(model, num_steps=3, **OBJECTIVES[name]())
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        assert all(math.isfinite(svi.step()) for _ in range(2))
        pyro.clear_param_store()
    for name, word in (("mixture", "Mixture"), ("linearized", "Linearized")):
        with pytest.raises(NotImplementedError, match=word):
            ShortRunGuide(model, num_steps=3, **OBJECTIVES[name]())()
    with pytest.raises(NotImplementedError, match="dense"):
        ShortRunGuide(model, objective=GaussianReverse(dense=True)).setup()


def test_persistent_starts_have_no_reverse():
    model, _ = gaussian(4.0, 1.0)
    with pytest.raises(NotImplementedError, match="no density"):
        ShortRunGuide(model, objective=GaussianReverse(), start=Persistent()).log_weight(3)


# ---------------------------------------------------------------- grids


def test_grid_finds_the_best_step_with_common_randomness():
    """Of a noise-free run on a Gaussian the best step is known; the same call gives the same table."""
    model, _ = gaussian(25.0, 1.0)
    dynamics = Langevin(StepSize(0.00076, learnable=False), noise=False)
    guide = ShortRunGuide(model, num_steps=25, dynamics=dynamics)
    tables = []
    for _ in range(2):
        pyro.set_rng_seed(0)
        guide.setup(50).dynamics.step_size.assign(torch.tensor([0.00076]))
        tables.append(tune_on_grid(guide, 50, factors=(1.0, 2.0, 4.0, 8.0), num_particles=64))
        assert guide.step_sizes().item() == pytest.approx(0.00076 * 4)  # eta = 0.00304 is best
    assert tables[0].best == 4.0
    torch.testing.assert_close(tables[0].bound, tables[1].bound, rtol=0, atol=0)


def test_grid_leaves_out_what_is_not_valid():
    model, _ = gaussian(25.0, 1.0)
    guide = ShortRunGuide(model, num_steps=5, dynamics=Langevin(StepSize(0.01, max=0.5)))
    grid = tune_on_grid(guide, 10, factors=(1.0, 10.0, 1000.0))  # 0.1 * 25 > 1, and 10 > max
    assert grid.best == 1.0 and grid.factors.tolist() == [1.0, 10.0] and grid.invalid[1] > 0.9
    with pytest.raises(ValueError, match="valid"):
        tune_on_grid(guide, 10, factors=(10.0, 1000.0))
    assert guide.step_sizes().item() == pytest.approx(0.01)


def test_grid_with_pilots():
    """Every candidate is weighed by its own pilots."""
    model, _ = posterior([25.0])
    options = dict(dynamics=Langevin(StepSize(0.00185)), objective=GaussianReverse(pilots=512, fresh=256))
    guide = ShortRunGuide(model, num_steps=25, **options)
    pyro.set_rng_seed(0)
    assert tune_on_grid(guide, factors=(0.25, 1.0, 4.0, 16.0), num_particles=1000).best == 4.0  # 0.0074 is best


# ---------------------------------------------------------------- starts


def test_improper_priors_are_no_start():
    def model() -> None:
        b = pyro.sample("b", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("y", dist.Normal(b, 1.0), obs=torch.tensor(3.0))

    with pytest.raises(ValueError, match="'b' has an improper prior"):
        ShortRunGuide(model)()
    start = AutoNormal(model, init_loc_fn=init_to_value(values={"b": torch.tensor(1.0)}))
    guide = ShortRunGuide(model, num_steps=3, start=start, objective=GaussianReverse(pilots=64))
    assert math.isfinite(guide.log_weight().item())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_first_guess_of_the_step_is_backed_off(name: str):
    """Whatever the objective, on a stiff model with a wide heavy-tailed prior, and nothing is NaN."""

    def model() -> None:
        b = pyro.sample("b", dist.StudentT(2.0, torch.zeros(3), 10.0).to_event(1))
        scale = pyro.sample("scale", dist.HalfCauchy(5.0))
        with pyro.plate("data", 100):
            pyro.sample("y", dist.Normal(b.sum(), 0.01 + scale), obs=torch.full((100,), 2.0))

    pyro.set_rng_seed(0)
    options = OBJECTIVES[name]()
    if "dynamics" in options:
        options["dynamics"] = Hamiltonian(0.001)
    else:
        options["step_size"] = 0.1
    guide = ShortRunGuide(model, num_steps=10, **options)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert all(math.isfinite(svi.step()) for _ in range(5))
    assert "dynamics" in options or guide.step_sizes() < 0.1
    assert all(v.isfinite().all() for v in guide().values())


# ---------------------------------------------------------------- what a weight is worth


def masked() -> None:
    """log p(x) = -1.4305; the other latent is out of the density."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with poutine.mask(mask=False):
        pyro.sample("m", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 0.5), obs=torch.tensor(1.0))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_masked_latents(name: str):
    """Do not count, or are refused by name."""
    options = OBJECTIVES[name]()
    guide = ShortRunGuide(masked, num_steps=20, **options)
    if name in ("annealed", "hamiltonian"):
        weights = guide.log_weight(num_particles=4000).detach()
        assert weights.mean() < -1.43 and (weights.logsumexp(0) - math.log(4000)).item() == pytest.approx(
            -1.4305, abs=0.1
        )
        return
    with pytest.raises(NotImplementedError, match="'m' lies in poutine.mask"):
        guide.log_weight()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_only_importance_weights_are_exported(name: str):
    model, _ = posterior([4.0])
    guide = ShortRunGuide(model, num_steps=3, **OBJECTIVES[name]())
    stats = to_arviz(guide, num_samples=10, num_chains=2)["sample_stats"]
    assert ("log_q" in stats) == (name != "linearized")


def test_an_objective_for_two_models():
    objective = GaussianReverse(pilots=64)
    for precisions in ([4.0], [4.0, 9.0]):
        model, _ = posterior(precisions)
        guide = ShortRunGuide(model, num_steps=3 + len(precisions), step_size=0.01, objective=objective)
        assert math.isfinite(guide.log_weight().item())


def test_grid_with_pilots_in_any_order():
    model, _ = posterior([25.0])
    options = dict(dynamics=Langevin(StepSize(0.0074)), objective=GaussianReverse(pilots=1000))
    guide = ShortRunGuide(model, num_steps=25, **options).setup()
    found = set()
    for factors in ((0.1, 1.0, 8.0), (8.0, 1.0, 0.1)):
        for mode in (True, False):
            guide.train(mode)
            pyro.set_rng_seed(0)
            found.add(tune_on_grid(guide, factors=factors, num_particles=500).best)
    assert found == {1.0}
    with pytest.raises(ValueError, match="max_invalid"):
        tune_on_grid(guide, max_invalid=5)
    for factors in (1.0, ["a"]):
        with pytest.raises(ValueError, match="factors"):
            tune_on_grid(guide, factors=factors)
    with pytest.raises(ValueError, match="ShortRunGuide"):
        tune_on_grid(AutoNormal(model))


def test_calls_between_tunings_make_no_pilots():
    """They carry the increments of the last tuned run."""
    model, _ = posterior([4.0])
    guide = ShortRunGuide(model, num_steps=3, step_size=0.05, objective=GaussianReverse(pilots=64), tune_every=3)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    carried = []
    for _ in range(6):
        assert math.isfinite(svi.step())
        carried.append(guide.info.carried)
    assert carried == [False, True, True] * 2


@pytest.mark.parametrize("options", [{}, {"objective": Annealed(), "dynamics": Hamiltonian(0.1)}])
def test_a_step_that_was_backed_off_is_still_the_guides_own(options: dict):
    """It has one name in Pyro's store, in which SVI tunes it."""
    model, _ = posterior([25.0])
    guide = ShortRunGuide(model, num_steps=3, **(options or {"step_size": 0.1}))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step()
    names = set(pyro.get_param_store().keys())
    before = guide.step_sizes().clone()
    svi.step()
    assert set(pyro.get_param_store().keys()) == names and guide.step_sizes() != before
    assert {n for n in names if "step_size" in n} == {"ShortRunGuide.dynamics.step_size.value"}


def test_linearized_is_no_bound_where_there_are_modes():
    """Above the evidence (by quadrature) on a posterior with several modes, where a bound is far below."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(10, 2, generator=generator) * 2
    data = torch.tanh(weight @ torch.randn(2, generator=generator)) + 0.3 * torch.randn(10, generator=generator)

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(torch.tanh(weight @ z), 0.3).to_event(1), obs=data)

    line = torch.linspace(-6, 6, 1001)
    grid = torch.cartesian_prod(line, line)
    joint = dist.Normal(torch.tanh(grid @ weight.T), 0.3).log_prob(data).sum(-1)
    joint = joint + dist.Normal(0.0, 1.0).log_prob(grid).sum(-1)
    evidence = (joint.logsumexp(0) + 2 * math.log(12 / 1000)).item()
    bounds = []
    for objective in (Linearized(), GaussianReverse()):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = ShortRunGuide(model, num_steps=25, dynamics=Langevin(StepSize(0.03)), objective=objective)
        bounds.append(-ShortRunELBO(2000).loss(model, guide))
    assert bounds[0] > evidence + 0.1 and bounds[1] < evidence - 1
