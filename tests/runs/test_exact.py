"""Closed forms: a Gaussian posterior N(m, 1/lam) that the run meets from the prior N(0, 1)."""

from __future__ import annotations

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import bent, gaussian, langevin_kl, parametrised
from pyro.infer import SVI, Trace_ELBO
from runners import short_run
from torch import Tensor

from pyro_shortrun import Init, Langevin, PathDensity, Prior, ShortRunGuide, StepSize
from pyro_shortrun.density import Call
from pyro_shortrun.runs import Gradients


def sigma_points(steps: int) -> Tensor:
    """Points in (u_0, eps_1..eps_K) whose average is the exact expectation of any quadratic."""
    n = steps + 1
    return math.sqrt(n) * torch.cat([torch.eye(n), -torch.eye(n)])


def exact_bound(lam: float, m: float, steps: int, eta: Tensor, noise: bool) -> Tensor:
    """``log p(x) - E[log w]`` of the path density, through the package, with no Monte Carlo error."""
    model, evidence = gaussian(lam, m)
    points = sigma_points(steps)
    guide = ShortRunGuide(model, num_steps=steps, step_size=0.001, start=Prior())
    call = guide._bind((len(points),), {})
    dynamics, start = Langevin(0.001, noise=noise), points[:, :1].unsqueeze(0)
    noises, options = points[:, 1:].T.reshape(steps, 1, -1, 1), dict(gradients=Gradients.GUIDE)
    result = short_run(call.density, dynamics, PathDensity(), start, eta.expand(steps, 1), noises, **options)
    log_q = dist.Normal(0.0, 1.0).log_prob(start).squeeze(-1) - result.increment
    return evidence - (call.density(result.end) - log_q).mean()


def tuned(lam: float, m: float, steps: int, noise: bool, start: float) -> tuple[float, float]:
    """Minimise the exact bound over one shared step size by the gradient that the run reports."""
    raw = torch.tensor(math.log(start), requires_grad=True)
    optimiser = torch.optim.LBFGS([raw], max_iter=60, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = exact_bound(lam, m, steps, raw.exp(), noise)
        loss.backward()
        return loss

    optimiser.step(closure)
    return raw.exp().item(), closure().item()


@pytest.mark.parametrize("lam,steps,m", [(4.0, 5, 1.0), (25.0, 25, 1.0), (100.0, 10, 1.0), (25.0, 8, 2.0)])
def test_noise_free_optimum_has_kl_half_log_one_plus_m_squared(lam, steps, m):
    eta, kl = tuned(lam, m, steps, noise=False, start=0.3 / lam)
    assert kl == pytest.approx(0.5 * math.log(1 + m * m), abs=1e-7)
    assert eta == pytest.approx((1 - ((1 + m * m) * lam) ** (-1 / (2 * steps))) / lam, rel=1e-4)


def test_path_density_chooses_the_published_step_with_noise():
    """lam = 25, K = 25: s = 0.0773, bound 0.8555, where the exact KL is 0.311 (its own optimum is at s = 0.122)."""
    eta, bound = tuned(25.0, 1.0, 25, noise=True, start=0.004)
    s = math.sqrt(2 * eta)
    assert s == pytest.approx(0.0773, rel=2e-3)
    assert bound == pytest.approx(0.8555, abs=1e-4)
    assert langevin_kl(eta, 25, [25.0]) == pytest.approx(0.311, abs=1e-3)
    assert langevin_kl(0.122**2 / 2, 25, [25.0]) == pytest.approx(0.003, abs=5e-4)


@pytest.mark.parametrize("noise", [False, True])
def test_bound_equals_the_closed_form(noise):
    lam, m, steps, eta = 7.0, 0.8, 6, 0.05
    a = 1 - eta * lam
    var = a ** (2 * steps) + (2 * eta * (1 - a ** (2 * steps)) / (1 - a * a) if noise else 0.0)
    closed = 0.5 * (lam * var + lam * a ** (2 * steps) * m * m - 1 - math.log(lam * a ** (2 * steps)))
    assert exact_bound(lam, m, steps, torch.tensor(eta), noise).item() == pytest.approx(closed, abs=1e-12)


def test_guide_that_is_the_posterior_gives_the_evidence_as_elbo():
    """Noise-free, x = 0: the map u -> a^K u with a^K = lam^(-1/2) sends the prior to the posterior exactly."""
    lam, steps = 5.0, 4
    model, evidence = gaussian(lam, 0.0)
    eta = (1 - lam ** (-1 / (2 * steps))) / lam
    guide = ShortRunGuide(model, num_steps=steps, dynamics=Langevin(eta, noise=False), start=Prior())
    elbo = Trace_ELBO()
    losses = [elbo.loss(model, guide, 7) for _ in range(5)]
    assert losses == pytest.approx([-7 * evidence] * 5, abs=1e-10)


def test_without_tuning_no_graph_is_kept():
    """Live tensors after a run do not grow with K, and nothing in the result requires gradients."""
    import gc

    model, _ = parametrised("pyro.module", bent, 0.4)
    x = torch.randn(6)
    counts = []
    for steps in (5, 50):
        guide = ShortRunGuide(model, num_steps=steps, step_size=StepSize(0.01, learnable=False), start=Prior()).setup(x)
        call = guide._bind((x,), {})
        peak = Peak()
        with peak:
            _, result = guide._run(call, 1, False, Gradients.NONE)
        assert not result.end.requires_grad
        counts.append(peak.largest)
        del result, call, guide
        gc.collect()
    assert counts[1] <= counts[0] + 64  # bytes; the noise and the record of scalars are not counted


class Peak(torch.utils._python_dispatch.TorchDispatchMode):
    """Largest number of live state-sized bytes seen at any operation."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self._live = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        import weakref

        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, Tensor) and 6 <= t.numel() <= 24:
                key = id(t)
                self._live[key] = weakref.ref(t, functools.partial(lambda k, _: self._live.pop(k, None), key))
        self.largest = max(self.largest, len(self._live))
        return out


def test_tuning_through_svi_moves_the_step_towards_the_optimum():
    """Noise-free Gaussian, 64 rows: SVI reaches the closed-form step within 10 % (statistical; seeded)."""
    lam, m, steps = 9.0, 1.0, 5
    model, _ = gaussian(lam, m)
    guide = ShortRunGuide(model, num_steps=steps, dynamics=Langevin(0.01, noise=False), start=Prior())
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(150):
        svi.step(64)
    best = (1 - ((1 + m * m) * lam) ** (-1 / (2 * steps))) / lam
    assert guide.step_sizes().item() == pytest.approx(best, rel=0.1)


def test_learned_start_leaves_a_support_with_parameters_alone():
    """The model's gradient is that at fixed z_K, also where the start's map to unconstrained space holds theta."""
    from torch.distributions import constraints

    def model(x: Tensor) -> None:
        high = pyro.param("high", torch.tensor(2.0), constraint=constraints.positive)
        z = pyro.sample("z", dist.Uniform(0.0, high))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def start(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.3))
        pyro.sample("z", dist.TransformedDistribution(dist.Normal(loc, 0.5), [dist.transforms.SigmoidTransform()]))

    x = torch.tensor(0.4)
    guide = ShortRunGuide(model, num_steps=5, step_size=StepSize(0.05), start=start).setup(x)
    Trace_ELBO().differentiable_loss(model, guide, x).backward()
    assert pyro.param("high").unconstrained().grad.item() == pytest.approx(1.0, abs=1e-10)  # d log(high) / d log(high)
    assert pyro.param("loc").grad.abs() > 0


def test_masked_latents_add_nothing_to_the_bound():
    from pyro.infer.autoguide import init_to_mean

    mask = torch.tensor([True, False, True])

    def model(rows: Tensor) -> None:
        with pyro.plate("data", len(rows)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=rows)

    masked = pyro.poutine.mask(model, mask=mask)
    losses = []
    for program, x in ((masked, torch.zeros(3)), (model, torch.zeros(2))):
        guide = ShortRunGuide(program, num_steps=2, step_size=StepSize(0.1), start=Init(init_to_mean, 0.7))
        loss = Trace_ELBO(num_particles=20000, vectorize_particles=True, max_plate_nesting=1).loss(program, guide, x)
        losses.append(loss)
    assert losses[0] == pytest.approx(losses[1], abs=0.05)  # several standard errors


def test_untuned_run_keeps_nothing_per_step(monkeypatch):
    """Whatever K is, no more noise is there at once than is to be drawn at once, and nothing is on a tape."""

    def model() -> None:
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z.tanh().sum(-1), 0.5), obs=torch.ones(3))

    monkeypatch.setattr("pyro_shortrun.runs.noise._NOISE_AT_ONCE", 12)
    asked = []
    draw = Langevin.draw_noise
    monkeypatch.setattr(Langevin, "draw_noise", lambda self, k, like: asked.append(k) or draw(self, k, like))
    for steps in (3, 60):
        density = Call.of(model, (), {}).density
        eta = torch.full((steps, 2), 0.05, requires_grad=True)
        result = short_run(density, Langevin(0.05), PathDensity(), torch.randn(1, 3, 2), eta)
        assert result.states is None and not result.end.requires_grad and set(asked) <= {2, 1}
