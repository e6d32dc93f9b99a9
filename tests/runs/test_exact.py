"""Closed forms: a Gaussian posterior N(m, 1/lam) that the run meets from the prior N(0, 1)."""

from __future__ import annotations

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from runners import Runner, run
from torch import Tensor, nn

from pyro_shortrun import Init, Langevin, PathDensity, ShortRunGuide, StepSize
from pyro_shortrun.objectives import Lanczos
from pyro_shortrun.runs import Gradients

pytestmark = pytest.mark.filterwarnings("error")


def gaussian(lam: float, m: float):
    """Model with prior N(0, 1) and posterior N(m, 1/lam) in every row; returns (model, y, log evidence per row)."""
    y, var = m * lam / (lam - 1), 1 / (lam - 1)

    def model(rows: int) -> None:
        with pyro.plate("data", rows):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, math.sqrt(var)), obs=torch.full((rows,), y))

    evidence = dist.Normal(0.0, math.sqrt(1 + var)).log_prob(torch.tensor(y))
    return model, evidence.item()


def sigma_points(steps: int) -> Tensor:
    """Points in (u_0, eps_1..eps_K) whose average is the exact expectation of any quadratic."""
    n = steps + 1
    return math.sqrt(n) * torch.cat([torch.eye(n), -torch.eye(n)])


def exact_bound(lam: float, m: float, steps: int, eta: Tensor, noise: bool) -> Tensor:
    """``log p(x) - E[log w]`` of the path density, through the package, with no Monte Carlo error."""
    model, evidence = gaussian(lam, m)
    points = sigma_points(steps)
    guide = ShortRunGuide(model, num_steps=steps, step_size=0.001)
    call = guide._bind((len(points),), {})
    runner = Runner(call.density, Langevin(0.001, noise=noise), PathDensity())
    start = points[:, :1].unsqueeze(0)
    result = run(runner, start, eta.expand(steps, 1), points[:, 1:].T.reshape(steps, 1, -1, 1), Gradients.GUIDE)
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
    assert exact_kl(25.0, 1.0, 25, eta) == pytest.approx(0.311, abs=1e-3)
    assert exact_kl(25.0, 1.0, 25, 0.122**2 / 2) == pytest.approx(0.003, abs=5e-4)


def exact_kl(lam: float, m: float, steps: int, eta: float) -> float:
    a = 1 - eta * lam
    var = a ** (2 * steps) + 2 * eta * (1 - a ** (2 * steps)) / (1 - a * a)
    return 0.5 * (lam * var + lam * a ** (2 * steps) * m * m - 1 - math.log(lam * var))


@pytest.mark.parametrize("noise", [False, True])
def test_bound_equals_the_closed_form(noise):
    lam, m, steps, eta = 7.0, 0.8, 6, 0.05
    a = 1 - eta * lam
    var = a ** (2 * steps) + (2 * eta * (1 - a ** (2 * steps)) / (1 - a * a) if noise else 0.0)
    closed = 0.5 * (lam * var + lam * a ** (2 * steps) * m * m - 1 - math.log(lam * a ** (2 * steps)))
    assert exact_bound(lam, m, steps, torch.tensor(eta), noise).item() == pytest.approx(closed, abs=1e-12)


def linear_gaussian():
    weight = torch.tensor([[1.0, 0.5], [-0.3, 2.0], [0.7, 0.1]])
    scale = torch.tensor(0.7)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight.T, scale).to_event(1), obs=x)

    precision = torch.eye(2) + weight.T @ weight / scale**2
    cov = weight @ weight.T + scale**2 * torch.eye(3)
    return model, precision, lambda x: dist.MultivariateNormal(torch.zeros(3), cov).log_prob(x)


@pytest.mark.parametrize("per", ["shared", "step", "site", "dim"])
def test_log_q_of_a_linear_gaussian_model(per):
    """log q(u_K) = log N(u_0; 0, I) - K log|det(I - eta P)|, to 1e-10."""
    model, precision, _ = linear_gaussian()
    x = torch.randn(4, 3)
    guide = ShortRunGuide(model, num_steps=3, step_size=StepSize(0.05, per=per))
    trace = pyro.poutine.trace(guide).get_trace(x)
    aux = next(s for s in trace.nodes.values() if s["name"].endswith("_latent"))
    # Undo the affine map with the recorded trajectory of the same seed: u_0 from the prior, then closed form.
    pyro.set_rng_seed(3)
    call = guide._bind((x,), {})
    drawn, result = guide._run(call, 1, True, Gradients.NONE, keep_states=True)
    start = result.states[0, 0]
    expected = dist.Normal(0.0, 1.0).log_prob(start).sum(-1) - 3 * torch.logdet(torch.eye(2) - 0.05 * precision)
    torch.testing.assert_close((drawn.log_q - result.increment)[0], expected, rtol=0, atol=1e-10)
    assert aux["fn"].log_prob(aux["value"]).shape == (4,)


def test_guide_that_is_the_posterior_gives_the_evidence_as_elbo():
    """Noise-free, x = 0: the map u -> a^K u with a^K = lam^(-1/2) sends the prior to the posterior exactly."""
    lam, steps = 5.0, 4
    model, evidence = gaussian(lam, 0.0)
    eta = (1 - lam ** (-1 / (2 * steps))) / lam
    guide = ShortRunGuide(model, num_steps=steps, dynamics=Langevin(eta, noise=False))
    elbo = Trace_ELBO()
    losses = [elbo.loss(model, guide, 7) for _ in range(5)]
    assert losses == pytest.approx([-7 * evidence] * 5, abs=1e-10)


@pytest.mark.parametrize("noise", [False, True])
def test_exp_log_weight_is_unbiased_by_quadrature(noise):
    """For any fixed noise path, the integral of N(u_0) exp(log w) over u_0 is p(x) while the steps are invertible."""
    y = torch.tensor(0.6)

    def model(rows: int) -> None:
        with pyro.plate("data", rows):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(torch.tanh(2 * z), 0.8), obs=y.expand(rows))

    line = torch.linspace(-14, 14, 8001)
    eta, steps = torch.full((3, 1), 0.06), 3
    guide = ShortRunGuide(model, num_steps=steps, step_size=0.06)
    call = guide._bind((len(line),), {})
    runner = Runner(call.density, Langevin(0.06, noise=noise), PathDensity())
    joint = dist.Normal(0.0, 1.0).log_prob(line) + dist.Normal(torch.tanh(2 * line), 0.8).log_prob(y)
    evidence = torch.trapezoid(joint.exp(), line).item()
    for path in torch.randn(4, steps, 1, 1, 1):
        result = run(runner, line.reshape(1, -1, 1), eta, path.expand(steps, 1, len(line), 1))
        log_q = dist.Normal(0.0, 1.0).log_prob(line) - result.increment[0]
        log_w = call.density(result.end)[0] - log_q
        assert not result.info.singular.any()
        mean = torch.trapezoid((dist.Normal(0.0, 1.0).log_prob(line) + log_w).exp(), line)
        assert mean.item() == pytest.approx(evidence, rel=1e-9)


def test_renyi_bound_of_a_linear_gaussian_model_reaches_the_evidence():
    """IWAE over 2000 particles of a noise-free run; seeded, the tolerance is several standard errors."""
    model, _, evidence = linear_gaussian()
    x = torch.randn(3, 3)
    guide = ShortRunGuide(model, num_steps=6, dynamics=Langevin(0.02, noise=False))
    loss = RenyiELBO(num_particles=2000, vectorize_particles=True, max_plate_nesting=1).loss(model, guide, x)
    assert -loss == pytest.approx(evidence(x).sum().item(), abs=0.3)


# ------------------------------------------------------------------ which gradients flow where


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))

    def forward(self, z: Tensor) -> Tensor:
        return self.net(z)


def parametrised(kind: str):
    """The same model with its parameters as pyro.param, in a PyroModule or in a plain nn.Module."""
    if kind == "param":

        def model(x: Tensor) -> None:
            w = pyro.param("w", torch.tensor([[1.0, 0.5, 0.2], [-0.4, 0.3, 1.0]]))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
                pyro.sample("x", dist.Normal((z @ w).tanh(), 0.5).to_event(1), obs=x)

        return model, lambda: [pyro.param("w").unconstrained()]
    if kind == "PyroModule":

        class Model(pyro.nn.PyroModule):
            def __init__(self) -> None:
                super().__init__()
                self.decoder = pyro.nn.PyroModule[nn.Linear](2, 3)

            def forward(self, x: Tensor) -> None:
                with pyro.plate("data", len(x)):
                    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
                    pyro.sample("x", dist.Normal(self.decoder(z).tanh(), 0.5).to_event(1), obs=x)

        module = Model()
        return module, lambda: list(module.parameters())
    decoder = Decoder()

    def with_module(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.5).to_event(1), obs=x)

    return with_module, lambda: list(decoder.parameters())


@pytest.mark.parametrize("kind", ["param", "PyroModule", "nn.Module"])
@pytest.mark.parametrize("start", ["prior", "init"])
def test_model_gradient_is_that_at_fixed_z(kind, start):
    from pyro.infer.autoguide import init_to_median

    model, parameters = parametrised(kind)
    x = torch.randn(5, 3)
    begin = Init(init_to_median) if start == "init" else None
    guide = ShortRunGuide(model, num_steps=4, step_size=StepSize(0.05, per="dim"), start=begin)
    guide.setup(x)
    trace = pyro.poutine.trace(guide).get_trace(x)
    z = trace.nodes["z"]["value"]
    loss = -pyro.poutine.trace(pyro.poutine.replay(model, trace)).get_trace(x).log_prob_sum() + trace.log_prob_sum()
    raw = guide.dynamics.step_size.value_unconstrained
    got = torch.autograd.grad(loss, [*parameters(), raw])
    fixed = pyro.poutine.condition(model, {"z": z.detach()})
    wanted = torch.autograd.grad(-pyro.poutine.trace(fixed).get_trace(x).log_prob_sum(), parameters())
    for a, b in zip(got[:-1], wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    assert got[-1].abs().min() > 0


@pytest.mark.parametrize("logdet", [None, Lanczos(3, 2)], ids=["exact", "lanczos"])
@pytest.mark.parametrize("noise", [False, True])
def test_step_size_gradient_is_that_of_the_unrolled_graph(noise, logdet):
    """The node with recomputed steps against plain autograd through everything, same start, noise and probes."""
    model, _ = parametrised("param")
    guide = ShortRunGuide(model, num_steps=5, step_size=0.05)
    call = guide._bind((torch.randn(3, 3),), {})
    runner = Runner(call.density, Langevin(0.05, noise=noise), PathDensity(logdet))
    start = torch.randn(2, 3, 2)
    noises = torch.randn(5, 2, 3, 2)
    grads = []
    for mode in (Gradients.GUIDE, Gradients.FULL):
        pyro.set_rng_seed(1)  # the same probes
        u, eta = start.clone().requires_grad_(), torch.full((5, 2), 0.05).requires_grad_()
        result = run(runner, u, eta, noises, mode)
        weights = torch.randn(result.end.shape, generator=torch.Generator().manual_seed(2))
        loss = (weights * result.end).sum() + (result.increment * torch.tensor([[1.0, 2.0, -1.0]])).sum()
        grads.append((loss.detach(), *torch.autograd.grad(loss, (u, eta))))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_full_gradient_equals_finite_differences():
    model, parameters = parametrised("param")
    x = torch.randn(4, 3)
    guide = ShortRunGuide(model, num_steps=3, step_size=0.05, full_gradient=True).setup(x)
    elbo = Trace_ELBO()

    def loss() -> Tensor:
        pyro.set_rng_seed(5)
        return elbo.differentiable_loss(model, guide, x)

    (w,) = parameters()
    (grad,) = torch.autograd.grad(loss(), w)
    for index in [(0, 0), (1, 2)]:
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                w[index] += sign * 1e-5
            values.append(loss().item())
            with torch.no_grad():
                w[index] -= sign * 1e-5
        assert grad[index].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)


def test_without_tuning_no_graph_is_kept():
    """Live tensors after a run do not grow with K, and nothing in the result requires gradients."""
    import gc

    model, _ = parametrised("nn.Module")
    x = torch.randn(6, 3)
    counts = []
    for steps in (5, 50):
        guide = ShortRunGuide(model, num_steps=steps, step_size=StepSize(0.01, learnable=False)).setup(x)
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
    guide = ShortRunGuide(model, num_steps=steps, dynamics=Langevin(0.01, noise=False))
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


def curved_run(checkpoint: bool, gradients: Gradients = Gradients.GUIDE, steps: int = 11):
    """A run on a curved density, noise drawn by the run itself; end, increment and step-size gradient."""

    def model() -> None:
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z.tanh().sum(-1), 0.5), obs=torch.ones(3))

    call = ShortRunGuide(model, num_steps=steps, step_size=0.05)._bind((), {})
    pyro.set_rng_seed(3)
    eta = torch.full((steps, 2), 0.05, requires_grad=True)
    runner = Runner(call.density, Langevin(0.05), PathDensity(), checkpoint=checkpoint)
    result = run(runner, torch.randn(1, 3, 2), eta, None, gradients)
    if gradients is not Gradients.NONE:
        (result.end.square().sum() + result.increment.sum()).backward()
    return result, eta.grad


@pytest.mark.parametrize("at_once", [2**20, 6, 24])
def test_checkpointed_run_has_the_same_gradient(at_once, monkeypatch):
    """Also where the noise is drawn in several parts, and drawn again on the way back."""
    monkeypatch.setattr("pyro_shortrun.runs.noise._NOISE_AT_ONCE", at_once)
    (plain, wanted), (checked, grad) = curved_run(False), curved_run(True)
    torch.testing.assert_close(checked.end, plain.end, rtol=0, atol=0)
    torch.testing.assert_close(grad, wanted)
    after = torch.rand(3)
    curved_run(True)
    torch.testing.assert_close(torch.rand(3), after, rtol=0, atol=0)  # drawing again left the generator alone


def test_untuned_run_keeps_nothing_per_step(monkeypatch):
    """Whatever K is, no more noise is there at once than is to be drawn at once, and nothing is on a tape."""
    monkeypatch.setattr("pyro_shortrun.runs.noise._NOISE_AT_ONCE", 12)
    asked = []
    draw = Langevin.draw_noise
    monkeypatch.setattr(Langevin, "draw_noise", lambda self, k, like: asked.append(k) or draw(self, k, like))
    for steps in (3, 60):
        result, _ = curved_run(False, Gradients.NONE, steps)
        assert result.states is None and not result.end.requires_grad and set(asked) <= {2, 1}
