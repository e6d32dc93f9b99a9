"""Two dynamics that a newcomer writes, each a class of a few lines: every objective and kernel takes what it can.

A tamed Langevin step, whose drift saturates (Hutzenthaler, Jentzen, Kloeden 2012), and an underdamped step by the
splitting BAOAB (Leimkuhler, Matthews 2013). Nothing else of the package knows them.
"""

from __future__ import annotations

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyro_shortrun import (
    Annealed,
    GaussianReverse,
    Hamiltonian,
    Langevin,
    Linearized,
    Mixture,
    PathDensity,
    Prior,
    ShortRunGuide,
    ShortRunLangevin,
    StepSize,
    VectorizedMCMC,
)
from pyro_shortrun.density import Call
from pyro_shortrun.dynamics import Dynamics, Jacobian, MomentumDynamics
from pyro_shortrun.dynamics.momentum import Arrived, Leap, gain
from pyro_shortrun.energy import PriorRuns
from pyro_shortrun.runs import Gradients, run
from pyro_shortrun.starts import PriorBase, StartDraw


class Tamed(Dynamics):
    """``u' = u + eta g / (1 + eta |g|) + sqrt(2 eta) eps``, by coordinate."""

    def __init__(self, step_size: StepSize | float, noise: bool = True) -> None:
        super().__init__(step_size)
        self.has_noise = noise

    def drift(self, grad: Tensor, step_size: Tensor, scale: Tensor) -> Tensor:
        full = step_size * scale * grad
        return full / (1 + full.abs())

    def jacobian(self, grad: Tensor, step_size: Tensor, scale: Tensor) -> Jacobian:
        full = step_size * scale * grad
        return Jacobian((step_size * scale) / (1 + full.abs()).square())


class Underdamped(MomentumDynamics):
    """Half a kick, half a drift, a refreshment, half a drift, half a kick: the first step's refreshment is the draw of
    the momentum that it begins with."""

    def __init__(self, step_size: StepSize | float, kept: float = 0.7) -> None:
        super().__init__(step_size)
        self.register_buffer("share", torch.as_tensor(kept))

    @property
    def kept(self) -> Tensor:
        return self.share

    def arrive(self, u: Tensor, momentum: Tensor, here: Leap, ahead: Leap, kept: Tensor, noise: Tensor) -> Arrived:
        begun = momentum + here.exists * here.drift / here.length + ahead.exists * ahead.drift / ahead.length
        refreshed = self.refreshed(begun, kept, noise)
        return Arrived(u + ahead.exists * 0.5 * ahead.length * (begun + refreshed), refreshed, gain(momentum, begun))


def gaussian(precision: float = 4.0):
    """Rows of ``z ~ N(0, 1)``, ``x | z ~ N(z, 1 / precision)``, at ``x = 1``, and log p(x) of a row."""

    def model(rows: int = 1) -> None:
        with pyro.plate("data", rows):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, precision**-0.5), obs=torch.ones(rows))

    return model, dist.Normal(0.0, (1 + 1 / precision) ** 0.5).log_prob(torch.tensor(1.0)).item()


def curved() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    mean = torch.stack([torch.tanh(a + b[..., 0]), torch.sin(b[..., 1]) * a], -1)
    pyro.sample("x", dist.Normal(mean, 0.5).to_event(1), obs=torch.tensor([0.3, -0.4]))


NEWCOMERS = {"tamed": lambda: Tamed(StepSize(0.1, per="dim")), "underdamped": lambda: Underdamped(StepSize(0.02))}
TAKES = {
    "tamed": [PathDensity, Annealed, partial(GaussianReverse, pilots=64, fresh=8), partial(Mixture, 3), Linearized],
    "underdamped": [Annealed],
}
PAIRS = [(name, make) for name, makes in TAKES.items() for make in makes]
IDS = [f"{name}-{type(make()).__name__}" for name, make in PAIRS]


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name, make", PAIRS, ids=IDS)
def test_the_gradient_of_the_step_size_is_that_of_the_whole_run(name, make, compile):
    """The node's own way back against autograd through all of it, and by finite differences of the weight."""
    objective = make()
    if compile and type(objective) not in (PathDensity, Annealed):
        pytest.skip("compiled for two objectives: graphs are slow to make")
    dynamics = NEWCOMERS[name]()
    guide = ShortRunGuide(curved, num_steps=3, dynamics=dynamics, objective=objective, compile=compile, start=Prior())
    call = guide.setup()._bind((), {})
    u, noise = torch.randn(objective.copies, 1, 3), torch.randn(3, objective.copies, 1, 3)
    value, prior = call.density.with_start(u)
    start = StartDraw(u, prior.detach(), value.detach(), PriorBase())
    weigh = objective.pilots(call.density.layout, torch.full((3, 3), 0.1), True)
    weigh = objective if weigh is None else weigh.objective()

    def increment(eta: Tensor, gradients: Gradients) -> Tensor:
        density = call.density if gradients is Gradients.GUIDE else Call.of(curved, (), {}).density
        return run(density, dynamics, weigh, start, eta, noise, gradients=gradients).increment.sum()

    etas = [torch.full((3, 3), 0.1, requires_grad=True) for _ in range(2)]
    kept, full = increment(etas[0], Gradients.GUIDE), increment(etas[1], Gradients.FULL)
    found = [torch.autograd.grad(value, eta)[0] for value, eta in zip((kept, full), etas, strict=True)]
    torch.testing.assert_close(kept, full, rtol=0, atol=1e-9)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-8)
    ahead, behind = (increment(torch.full((3, 3), 0.1 + s), Gradients.NONE) for s in (1e-5, -1e-5))
    assert found[0].sum().item() == pytest.approx(((ahead - behind) / 2e-5).item(), abs=1e-5)


@pytest.mark.parametrize("name, make", PAIRS, ids=IDS)
def test_weights_have_the_mean_that_they_promise(name, make):
    """``E[w] = p(x)`` of 4000 rows, within five standard errors (about one failure in 1.7 million seeds)."""
    model, evidence = gaussian()
    guide = ShortRunGuide(model, num_steps=4, dynamics=NEWCOMERS[name](), objective=make(), start=Prior())
    with torch.no_grad():
        _, draws = guide.weighted_draws((4000,), {}, 1)
    if draws.row_log_q is None:
        pytest.skip("an estimate, not a bound")
    call = Call.of(model, (4000,), {})
    weights = (call.density(draws.end) - draws.row_log_q - evidence).exp().flatten()
    assert weights.mean().item() == pytest.approx(1.0, abs=5 * weights.std().item() / 4000**0.5)
    assert weights.log().mean() < 0


@pytest.mark.parametrize("name", NEWCOMERS)
def test_svi_trains_it_with_its_start(name):
    model, evidence = gaussian(25.0)
    guide = ShortRunGuide(
        model, num_steps=4, dynamics=NEWCOMERS[name](), objective=Annealed(), start=AutoNormal(model, init_scale=0.5)
    )
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO())
    losses = [svi.step(6) / 6 for _ in range(150)]
    assert sum(losses[-30:]) / 30 + evidence < 0.2 < losses[0] + evidence


def test_kernels_take_a_tamed_step():
    """Adjusted chains have the posterior N(.8, .2): mean and variance within five standard errors at the least
    effective number of draws seen, a tenth."""
    model, _ = gaussian()
    kernel = ShortRunLangevin(model, dynamics=Tamed(0.3), num_steps=2, persistent=True, adjust=True)
    mcmc = VectorizedMCMC(kernel, num_samples=200, warmup_steps=50, num_chains=20, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()["z"].flatten()
    assert draws.mean().item() == pytest.approx(0.8, abs=5 * (0.2 / 400) ** 0.5)
    assert draws.var().item() == pytest.approx(0.2, abs=5 * 0.2 * (2 / 400) ** 0.5)
    one = MCMC(ShortRunLangevin(model, dynamics=Tamed(0.1), num_steps=3), num_samples=5, disable_progbar=True)
    one.run()
    assert one.get_samples()["z"].shape == (5, 1)


def test_a_changed_step_has_not_the_density_and_the_jacobian_of_the_old_one():
    """Of a subclass of Langevin that changes its step; what it says anew counts."""

    class Pushed(Langevin):
        def mean(self, u: Tensor, grad: Tensor, step_size: Tensor, scale: Tensor) -> Tensor:
            return super().mean(u, grad, step_size, scale) + 0.1 * u

    class Jumping(Langevin):
        def step(self, u: Tensor, grad: Tensor, step_size: Tensor, noise: Tensor, scale: Tensor) -> Tensor:
            return self.mean(u, grad, step_size, scale)

    model, _ = gaussian()
    for objective in (PathDensity(), Linearized()):
        for dynamics in (Pushed(0.1), Jumping(0.1)):
            with pytest.raises(ValueError, match="needs the Jacobian"):
                ShortRunGuide(model, dynamics=dynamics, objective=objective, start=Prior())()
    for objective in (Annealed(), GaussianReverse(), Mixture(2)):
        ShortRunGuide(model, dynamics=Pushed(0.1), objective=objective, start=Prior())
        with pytest.raises(ValueError, match="noise"):
            ShortRunGuide(model, dynamics=Jumping(0.1), objective=objective, start=Prior())
    quiet = Langevin(0.1)
    quiet.noise = False
    assert not quiet.has_noise


def test_a_fresh_momentum_is_not_refreshed_by_the_noise_that_it_is():
    """At the first of K + 1 arrivals all of it is kept; else E[w] would not be p(x)."""

    class Recorded(Underdamped):
        def arrive(self, u: Tensor, momentum: Tensor, here: Leap, ahead: Leap, kept: Tensor, noise: Tensor) -> Arrived:
            seen.append((kept.item(), torch.equal(momentum, noise)))
            return super().arrive(u, momentum, here, ahead, kept, noise)

    model, _ = gaussian()
    density, seen = Call.of(model, (), {}).density, []
    u, eta = torch.zeros(1, 1, 1), torch.full((3, 1), 0.1)
    start = StartDraw(u, torch.zeros(1, 1), density(u), PriorBase())
    objective = Annealed()
    objective.setup(3, density.layout, u)
    run(density, Recorded(0.1, kept=0.7), objective, start, eta, torch.randn(3, 1, 1, 1), account=False)
    assert seen[0] == (1.0, True)
    assert [kept for kept, _ in seen[1:]] == pytest.approx([0.7] * 3) and not any(same for _, same in seen[1:])


def test_what_was_written_for_older_versions_is_refused_by_name():
    with pytest.raises(TypeError, match="Old.log_abs_det is not called: define Old.jacobian"):

        class Old(Dynamics):
            def log_abs_det(self, *args: Tensor) -> Tensor:
                return args[0]

    with pytest.raises(TypeError, match="Older.account is not called: define Older.transition"):

        class Older(PathDensity):
            def account(self, *args: Tensor) -> Tensor:
                return args[0]


def test_a_momentum_is_never_left_out():
    """Where runs move positions alone, a dynamics with momentum is refused and not taken for one without."""
    model, _ = gaussian()
    call = Call.of(model, (), {})
    for make in NEWCOMERS["underdamped"], lambda: Hamiltonian(0.1):
        with pytest.raises(NotImplementedError, match="not one of positions alone"):
            run(call.density, make(), PathDensity(), torch.zeros(1, 1, 1), torch.full((2, 1), 0.1), account=False)
        with pytest.raises(ValueError, match=type(make()).__name__):
            PriorRuns(dynamics=make())


def test_what_a_dynamics_cannot_do_is_refused_by_name():
    class Unknown(Dynamics):
        """Langevin's step, without a word about its Jacobian."""

    model, _ = gaussian()
    for objective in (PathDensity(), Linearized()):
        with pytest.raises(ValueError, match=f"{type(objective).__name__} needs the Jacobian.*Unknown"):
            ShortRunGuide(model, dynamics=Unknown(0.1), objective=objective, start=Prior())()
    ShortRunGuide(model, dynamics=Unknown(0.1), objective=Annealed(), start=Prior()).setup()
    for objective in (PathDensity(), GaussianReverse(), Mixture(2), Linearized()):
        with pytest.raises(ValueError, match="Underdamped"):
            ShortRunGuide(model, dynamics=Underdamped(0.1), objective=objective, start=Prior())
    for objective in (Annealed(), Mixture(2)):
        with pytest.raises(ValueError, match="noise"):
            ShortRunGuide(model, dynamics=Tamed(0.1, noise=False), objective=objective, start=Prior())
    with pytest.raises((ValueError, NotImplementedError), match="Underdamped"):
        ShortRunLangevin(model, dynamics=Underdamped(0.1))
