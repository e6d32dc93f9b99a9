"""Annealed: the weight against its formula, its gradients against autograd, its mean against the evidence."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import gaussian
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, AutoNormal
from runners import Runner, run
from torch import Tensor

from pyro_shortrun import Annealed, Init, Langevin, ShortRunGuide, ShortRunLangevin, StepSize
from pyro_shortrun.compile import Compiler, Untouched, density_of
from pyro_shortrun.density import Call
from pyro_shortrun.objectives.annealed import LangevinTransition
from pyro_shortrun.objectives.reverse_kernels import Mirror
from pyro_shortrun.runs import Gradients
from pyro_shortrun.starts import Base, GaussianBase, PriorBase

STEPS = 5


def curved() -> None:
    """Two dimensions, not Gaussian, three rows."""
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), torch.tensor([1.0, 2.0])).to_event(1))
        pyro.sample("y", dist.Normal(z.tanh().sum(-1), 0.5), obs=torch.tensor([1.0, -0.5, 0.2]))


def log_joint(z: Tensor) -> Tensor:
    prior = dist.Normal(0.0, torch.tensor([1.0, 2.0])).log_prob(z).sum(-1)
    return prior + dist.Normal(z.tanh().sum(-1), 0.5).log_prob(torch.tensor([1.0, -0.5, 0.2]))


def by_hand(log_base, u: Tensor, eta: Tensor, beta: Tensor, noise: Tensor, clip: float = math.inf) -> tuple:
    """End and sum of increments, from the formula, with a graph."""

    def mean(x: Tensor, k: int) -> Tensor:
        tempered = (1 - beta[k]) * log_base(x) + beta[k] * log_joint(x)
        (grad,) = torch.autograd.grad(tempered.sum(), x, create_graph=True)
        return x + (eta[k] * grad).clamp(-clip, clip)

    total = torch.zeros(u.shape[:-1])
    for k in range(len(eta)):
        forth = dist.Normal(mean(u, k), (2 * eta[k]).sqrt())
        new = forth.mean + (2 * eta[k]).sqrt() * noise[k]
        back = dist.Normal(mean(new, k), (2 * eta[k]).sqrt())
        total = total + (back.log_prob(u) - forth.log_prob(new)).sum(-1)
        u = new
    return u, total


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("kind", ["prior", "diagonal", "dense"])
@pytest.mark.parametrize("clip", [math.inf, 0.02])
def test_weight_and_its_gradients(kind: str, clip: float, compile: bool, monkeypatch):
    """In the start, step sizes, temperatures and the start's own parameters; whatever the size of a graph."""
    monkeypatch.setattr("pyro_shortrun.compile.compiler._STEPS_AT_MOST", 3)
    call = Call.of(curved, (), {})
    density = density_of(call.model, Compiler(Untouched()) if compile else None)
    loc = torch.randn(3, 2)
    scale = torch.rand(3, 2) + 0.5 if kind == "diagonal" else (torch.randn(3, 2, 2).tril() + 2 * torch.eye(2))
    leaves = [torch.randn(2, 3, 2), torch.rand(STEPS, 2) * 0.1 + 0.01, torch.linspace(0.2, 1.0, STEPS)]
    leaves = [t.requires_grad_() for t in (leaves if kind == "prior" else [*leaves, loc, scale])]
    u, eta, beta, *tensors = leaves
    base: Base = GaussianBase(*tensors) if tensors else PriorBase()
    noise = torch.randn(STEPS, 2, 3, 2)

    def log_base(x: Tensor) -> Tensor:
        if kind == "prior":
            return dist.Normal(0.0, torch.tensor([1.0, 2.0])).log_prob(x).sum(-1)
        if kind == "diagonal":
            return dist.Normal(tensors[0], tensors[1]).log_prob(x).sum(-1)
        return dist.MultivariateNormal(tensors[0], scale_tril=tensors[1]).log_prob(x)

    dynamics = Langevin(0.1, max_drift=clip)
    wanted = by_hand(log_base, u, eta, beta, noise, clip)
    result = run(Runner(density, dynamics, Annealed(), base=base, beta=beta), u, eta, noise, Gradients.GUIDE)
    found = result.end, result.increment
    back = [torch.randn_like(t) for t in wanted]
    options = dict(allow_unused=True, materialize_grads=True)
    slopes = [torch.autograd.grad(pair, leaves, back, **options) for pair in (found, wanted)]
    for a, b in zip((*found, *slopes[0]), (*wanted, *slopes[1]), strict=True):
        torch.testing.assert_close(a, b.tril() if b.shape == (3, 2, 2) else b, rtol=1e-4, atol=1e-5)
    assert result.info.log_det.shape == (STEPS,) and result.info.log_density.shape == (STEPS + 1,)
    torch.testing.assert_close(result.info.log_det.sum(), result.increment.mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("eta", [0.05, 0.3])
def test_mean_weight_is_the_evidence(eta: float):
    """``E[w] = p(x)`` by quadrature over the start and the noise of two steps, for any step size."""
    lam, m = 4.0, 0.5
    model, evidence = gaussian(lam, m)
    t, w = (torch.as_tensor(a) for a in __import__("numpy").polynomial.hermite_e.hermegauss(40))
    grid = torch.cartesian_prod(t, t, t).to(torch.get_default_dtype())
    weight = torch.cartesian_prod(w, w, w).prod(-1) / math.sqrt(2 * math.pi) ** 3
    call = Call.of(model, (len(grid),), {})
    u, noise = grid[:, :1].unsqueeze(0), grid[:, 1:].T.reshape(2, 1, -1, 1)
    runner = Runner(call.density, Langevin(0.1), Annealed(), base=PriorBase(), beta=torch.tensor([0.4, 1.0]))
    result = run(runner, u, torch.full((2, 1), eta), noise)
    log_w = call.density(result.end) + result.increment - dist.Normal(0.0, 1.0).log_prob(u[..., 0])
    mean = (weight * log_w.squeeze(0).to(weight).exp()).sum().log().item()
    assert mean == pytest.approx(evidence, abs=1e-3)


def test_bound_tightens_with_the_number_of_steps():
    """Gaps to log p(x) of a posterior N(1, 1/4) from the prior, 4000 rows: each a mean with an error below 0.01."""
    model, evidence = gaussian(4.0, 1.0)
    gaps = []
    for steps in (4, 16, 64):
        pyro.clear_param_store()
        guide = ShortRunGuide(model, num_steps=steps, step_size=StepSize(0.1), objective=Annealed())
        gaps.append(evidence - guide.log_weight(4000).item() / 4000)
    assert gaps[0] > gaps[1] > gaps[2] > -0.01 and gaps[2] < gaps[0] / 4


@pytest.mark.parametrize("start", [AutoNormal, AutoMultivariateNormal], ids=lambda s: s.__name__)
def test_svi_trains_start_steps_and_temperatures(start):
    model, evidence = gaussian(25.0, 1.0)
    pyro.set_rng_seed(0)
    guide = ShortRunGuide(model, num_steps=8, step_size=StepSize(0.005), objective=Annealed(), start=start(model))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO())
    rows = 6 if start is AutoNormal else 1  # a dense Gaussian would tie the rows together
    before = {k: v.detach().clone() for k, v in guide.setup(rows).named_parameters()}
    losses = [svi.step(rows) / rows for _ in range(150)]
    changed = [k for k, v in guide.named_parameters() if not torch.equal(v, before[k])]
    assert any("increments" in k for k in changed) and any("step_size" in k for k in changed)
    assert any("loc" in k for k in changed)
    assert sum(losses[-30:]) / 30 + evidence < 0.2 < losses[0] + evidence
    assert guide.objective.increments.sum().item() == pytest.approx(1.0)


def test_every_call_has_its_own_increments():
    """They cost nothing extra, so that calls between tunings need not carry those of another run."""
    model, _ = gaussian(4.0, 1.0)
    guide = ShortRunGuide(model, num_steps=3, step_size=0.05, objective=Annealed(), tune_every=3)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(3):
        svi.step(4)
        assert not guide.info.carried and guide.info.log_det.abs().sum() > 0


def test_a_row_that_meets_no_finite_density_is_frozen():
    def model() -> None:
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("wall", torch.where(z > 3.0, torch.nan, -0.5 * z**2))

    call = Call.of(model, (), {})
    u = torch.tensor([[0.0, 0.1, 0.2, 0.3]]).unsqueeze(-1)
    noise = torch.zeros(2, 1, 4, 1)
    noise[1, 0, 2] = 20.0
    eta = torch.full((2, 1), 0.1, requires_grad=True)
    runner = Runner(call.density, Langevin(0.1), Annealed(), base=PriorBase(), beta=torch.tensor([0.5, 1.0]))
    result = run(runner, u, eta, noise, Gradients.GUIDE)
    assert result.info.frozen[0].tolist() == [False, False, True, False] and result.end.isfinite().all()
    (result.end.sum() + result.increment.sum()).backward()
    assert eta.grad.isfinite().all()


def test_refusals():
    model, _ = gaussian(4.0, 1.0)
    for start in (Init(pyro.infer.autoguide.init_to_median), AutoIAFNormal(model), AutoMultivariateNormal(model)):
        guide = ShortRunGuide(model, num_steps=2, objective=Annealed(), start=start)
        with pytest.raises(NotImplementedError, match=r"start=Prior\(\), AutoNormal"):
            guide(3)
    pyro.clear_param_store()
    ShortRunGuide(model, num_steps=2, objective=Annealed()).setup(3)
    with pytest.raises(ValueError, match="2 temperatures for 4 steps.*clear_param_store"):
        ShortRunGuide(model, num_steps=4, objective=Annealed())(3)
    with pytest.raises(ValueError, match="noise"):
        ShortRunGuide(model, dynamics=Langevin(0.1, noise=False), objective=Annealed())
    with pytest.raises(NotImplementedError, match="ShortRunGuide"):
        ShortRunLangevin(model, objective=Annealed())


def test_a_row_whose_gradient_is_not_finite_does_not_spoil_the_others():
    def model() -> None:
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("kink", -(z - 1.0).abs().sqrt())

    call = Call.of(model, (), {})
    u = torch.tensor([1.0, 0.2, -0.5]).reshape(1, 3, 1)  # the first on the kink
    leaves = [torch.full((2, 1), 0.01), torch.tensor([0.5, 1.0]), torch.zeros(3, 1), torch.ones(3, 1)]
    eta, beta, loc, scale = (t.requires_grad_() for t in leaves)
    runner = Runner(call.density, Langevin(0.1), Annealed(), base=GaussianBase(loc, scale), beta=beta)
    result = run(runner, u, eta, torch.randn(2, 1, 3, 1), Gradients.GUIDE)
    assert result.info.frozen[0].tolist() == [True, False, False]
    grads = torch.autograd.grad(result.increment.sum(), (eta, beta, loc, scale))
    assert all(g.isfinite().all() for g in grads) and grads[2][1:].abs().sum() > 0 and grads[2][0] == 0


def test_a_gaussian_start_has_its_own_gradient_in_an_arrowhead():
    """Also where a subsampled plate makes the local part of log q count several times."""

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 6, subsample_size=2):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(2))

    density = Call.of(model, (), {}).density
    u, loc, scale = torch.randn(1, 1, 3), torch.randn(1, 3), torch.rand(1, 3) + 0.5
    step = LangevinTransition(Langevin(0.1), GaussianBase(loc, scale), Mirror())
    _, _, slope = step.evaluate(density, u.requires_grad_(), (loc, scale), create_graph=False)
    torch.testing.assert_close(slope * density.layout.drift_scale(u), (loc - u) / scale.square())
