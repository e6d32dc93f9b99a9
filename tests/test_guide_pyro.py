"""ShortRunGuide as a drop-in Pyro guide: every objective, handler, start and option that a Pyro user combines it with.

Two devices make laws out of most tests:

* A run of tiny noise-free steps (``FROZEN``) leaves its start where it is. From a start that *is* the posterior, the
  log weight of every particle then is the constant ``log p(x)``, whatever objective collects it.
* On a Gaussian target, noise-free steps are a linear map (``CONTRACTION``), so that the value and the density of every
  draw are known.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoDiscreteParallel,
    AutoGuideList,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_median,
    init_to_value,
)
from pyro.infer.importance import psis_diagnostic, vectorized_importance_weights
from pyro.nn import PyroModule, PyroParam
from pyro.ops.indexing import Vindex
from torch import Tensor, nn
from torch.distributions import constraints
from zoo import CASES, EXTRA, Case

from pyro_shortrun import Init, Langevin, Persistent, Prior, ShortRunGuide, StepSize

pytestmark = pytest.mark.filterwarnings("error")

ALL = {case.name: case for case in CASES + EXTRA}


def frozen() -> Langevin:
    """Steps so small that the run ends where it starts."""
    return Langevin(StepSize(1e-12, learnable=False), noise=False)


def contraction(eta: float = 0.1) -> Langevin:
    return Langevin(StepSize(eta, learnable=False), noise=False)


def close(dtype: torch.dtype) -> dict[str, float]:
    return {"rel": 1e-7, "abs": 1e-7} if dtype == torch.float64 else {"rel": 2e-5, "abs": 2e-5}


# ------------------------------------------------------------------------------------------------ Gaussian models
#
# Each has a known evidence and a guide `*_posterior` that is its exact posterior.


def local(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def local_posterior(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, math.sqrt(0.5)))


def positive(x: Tensor) -> None:
    """``local`` with ``z = exp(u)``: a constrained support."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.log(), 1.0), obs=x)


def positive_posterior(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.LogNormal(x / 2, math.sqrt(0.5)))


def nested(x: Tensor) -> None:
    """A shared latent above the local ones (an arrowhead), the locals positive."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.LogNormal(mu, 1.0))
        pyro.sample("x", dist.Normal(z.log(), 1.0), obs=x)


def nested_posterior(x: Tensor) -> None:
    precision = 1 + len(x) / 2
    mu = pyro.sample("mu", dist.Normal(x.sum() / 2 / precision, precision**-0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.LogNormal((mu + x) / 2, math.sqrt(0.5)))


def shared(x: Tensor) -> None:
    """No latent in any plate."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def shared_posterior(x: Tensor) -> None:
    precision = 1 + len(x)
    pyro.sample("mu", dist.Normal(x.sum() / precision, precision**-0.5))


@dataclass(frozen=True)
class Exact:
    model: Callable[[Tensor], None]
    posterior: Callable[[Tensor], None]
    own: float  # variance of the noise that no datum shares
    common: float  # variance of what all data share

    def evidence(self, x: Tensor) -> float:
        n = len(x)
        cov = self.own * torch.eye(n) + self.common * torch.ones(n, n)
        return dist.MultivariateNormal(torch.zeros(n), cov).log_prob(x).item()


EXACT = {
    "local": Exact(local, local_posterior, 2.0, 0.0),
    "positive": Exact(positive, positive_posterior, 2.0, 0.0),
    "nested": Exact(nested, nested_posterior, 2.0, 1.0),
    "shared": Exact(shared, shared_posterior, 1.0, 1.0),
}


def data(n: int = 5) -> Tensor:
    return torch.linspace(-1.0, 2.0, n)


def seeded(guide: Callable, seed: int = 7) -> Callable:
    """``guide`` from a seed of its own, so that what was drawn before it does not matter."""

    def start(*args: Any, **kwargs: Any) -> Any:
        torch.manual_seed(seed)
        return guide(*args, **kwargs)

    return start


# ------------------------------------------------------------------------------------------------ objectives

ELBOS: dict[str, Callable[[], Any]] = {
    "Trace": lambda: Trace_ELBO(),
    "Trace-3": lambda: Trace_ELBO(num_particles=3),
    "Trace-3-vectorised": lambda: Trace_ELBO(num_particles=3, vectorize_particles=True),
    "MeanField": lambda: TraceMeanField_ELBO(),
    "MeanField-3-vectorised": lambda: TraceMeanField_ELBO(num_particles=3, vectorize_particles=True),
    "Graph": lambda: TraceGraph_ELBO(),
    "Graph-3-vectorised": lambda: TraceGraph_ELBO(num_particles=3, vectorize_particles=True),
    "Enum": lambda: TraceEnum_ELBO(strict_enumeration_warning=False),
    "Enum-3-vectorised": lambda: TraceEnum_ELBO(
        num_particles=3, vectorize_particles=True, strict_enumeration_warning=False
    ),
    "Renyi-3": lambda: RenyiELBO(alpha=0.0, num_particles=3),
    "Renyi-3-vectorised": lambda: RenyiELBO(alpha=0.5, num_particles=3, vectorize_particles=True),
}


@pytest.mark.parametrize("model", EXACT)
@pytest.mark.parametrize("elbo", ELBOS)
def test_loss_is_the_evidence_where_the_guide_is_the_posterior(elbo, model, dtype):
    exact, x = EXACT[model], data()
    guide = ShortRunGuide(exact.model, num_steps=2, dynamics=frozen(), start=exact.posterior)
    loss = ELBOS[elbo]()
    expected = -exact.evidence(x)
    assert loss.loss(exact.model, guide, x) == pytest.approx(expected, **close(dtype))
    assert loss.loss_and_grads(exact.model, guide, x) == pytest.approx(expected, **close(dtype))


def linear_log_weight(z: Tensor, x: Tensor, eta: float, steps: int) -> Tensor:
    """Per datum of ``local``, for a noise-free run from the prior: the law of its end is Gaussian."""
    shrink = (1 - 2 * eta) ** steps
    log_q = dist.Normal(x / 2 * (1 - shrink), shrink).log_prob(z)
    return dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(x) - log_q


def recorded(guide: Callable) -> tuple[Callable, list[dict[str, Tensor]]]:
    seen: list[dict[str, Tensor]] = []

    def record(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        seen.append({k: v.detach() for k, v in guide(*args, **kwargs).items()})
        return seen[-1]

    return record, seen


@pytest.mark.parametrize("vectorise", [False, True])
@pytest.mark.parametrize("alpha", [None, 0.0, 0.5])
def test_loss_of_a_linear_run_by_hand(alpha, vectorise, dtype):
    """The mean of the log weights; for Renyi, a bound of its own for every datum of the plate."""
    x, particles = data(), 4
    guide, seen = recorded(ShortRunGuide(local, num_steps=3, dynamics=contraction(0.1)))
    options: dict[str, Any] = {"num_particles": particles, "vectorize_particles": vectorise, "max_plate_nesting": 1}
    elbo = Trace_ELBO(**options) if alpha is None else RenyiELBO(alpha=alpha, **options)
    loss = elbo.loss(local, guide, x)
    z = torch.stack([values["z"] for values in seen]).reshape(particles, len(x))
    assert z.std(0).min() > 1e-3  # particles differ
    log_w = linear_log_weight(z, x, 0.1, 3)
    if alpha is None:
        expected = log_w.mean(0).sum()
    else:
        expected = (((1 - alpha) * log_w).logsumexp(0) - math.log(particles)).sum() / (1 - alpha)
    assert loss == pytest.approx(-expected.item(), **close(dtype))


@pytest.mark.parametrize("model", ["positive", "nested"])
def test_mean_field_elbo_agrees_with_trace_elbo(model, dtype):
    """On constrained supports, with noise: TraceMeanField_ELBO sees all of log q."""
    exact, x = EXACT[model], data()
    guide = ShortRunGuide(exact.model, num_steps=3, step_size=StepSize(0.05)).setup(x)
    losses, grads = [], []
    for elbo in (Trace_ELBO(), TraceMeanField_ELBO(), TraceGraph_ELBO()):
        pyro.set_rng_seed(4)
        losses.append(elbo.loss_and_grads(exact.model, guide, x))
        raw = guide.dynamics.step_size.value_unconstrained
        grads.append(raw.grad.item())
        raw.grad = None
    assert losses[1:] == [pytest.approx(losses[0], **close(dtype))] * 2
    assert grads[0] != 0
    assert grads[1:] == [pytest.approx(grads[0], rel=1e-4)] * 2


def test_importance_weights_and_psis(dtype):
    x = data()
    exact = ShortRunGuide(local, num_steps=2, dynamics=frozen(), start=local_posterior)
    log_w, *_ = vectorized_importance_weights(local, exact, x, num_samples=6, max_plate_nesting=1)
    torch.testing.assert_close(log_w, torch.full_like(log_w, EXACT["local"].evidence(x)))

    wide = ShortRunGuide(local, num_steps=1, dynamics=contraction(0.05))  # wider than the posterior: good weights
    assert psis_diagnostic(local, wide, x, num_particles=2000, max_simultaneous_particles=1000) < 0.5
    narrow = ShortRunGuide(local, num_steps=12, dynamics=contraction(0.15))  # collapsed on the mode: bad ones
    assert psis_diagnostic(local, narrow, x, num_particles=2000, max_simultaneous_particles=1000) > 0.7


# ------------------------------------------------------------------------------------------------ enumeration


def marginal_mixture(x: Tensor) -> None:
    """The zoo's mixture with its assignments summed out by hand."""
    k = 3
    weights = pyro.sample("weights", dist.Dirichlet(2.0 * torch.ones(k)))
    scale = pyro.sample("scale", dist.LogNormal(-0.5, 0.5))
    with pyro.plate("components", k):
        locs = pyro.sample("locs", dist.Normal(0.0, 4.0))
    with pyro.plate("rows", len(x)):
        parts = dist.Normal(locs, scale.unsqueeze(-1)).mask(True)
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(weights), parts), obs=x)


def mixture_start(x: Tensor) -> None:
    pyro.sample("weights", dist.Dirichlet(5.0 * torch.ones(3)))
    pyro.sample("scale", dist.LogNormal(-0.3, 0.1))
    with pyro.plate("components", 3):
        pyro.sample("locs", dist.Normal(torch.tensor([-4.0, 0.0, 3.0]), 0.1))


def marginal_subsampled_mixture(x: Tensor, subsample_size: int) -> None:
    locs = pyro.sample("locs", dist.Normal(torch.tensor([-2.0, 2.0]), 1.0).to_event(1))
    with pyro.plate("rows", len(x), subsample_size=subsample_size) as index:
        shift = pyro.sample("shift", dist.Normal(0.0, 0.5))
        parts = dist.Normal(locs + shift.unsqueeze(-1), 0.3)
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.4, 0.6])), parts), obs=x[index])


def subsampled_mixture_start(x: Tensor, subsample_size: int) -> None:
    pyro.sample("locs", dist.Normal(torch.tensor([-2.0, 2.0]), 0.1).to_event(1))
    with pyro.plate("rows", len(x), subsample_size=subsample_size):
        pyro.sample("shift", dist.Normal(0.0, 0.5))


@pytest.mark.parametrize("hidden", [False, True])
def test_enumerated_model_equals_its_marginal(hidden, dtype):
    """Loss and step-size gradient, with the discrete site visible to the guide or hidden by ``poutine.block``."""
    model, (x,) = ALL["mixture"].make()
    x = x[::5]
    seen = poutine.block(model, hide=["assignment"]) if hidden else model
    results = []
    for guided, full, elbo in [
        (seen, model, TraceEnum_ELBO(max_plate_nesting=1)),
        (marginal_mixture, marginal_mixture, Trace_ELBO()),
    ]:
        dynamics = Langevin(StepSize(1e-3), noise=True)
        guide = ShortRunGuide(guided, num_steps=4, dynamics=dynamics, start=seeded(mixture_start)).setup(x)
        assert set(guide(x)) == {"weights", "scale", "locs"}
        loss = elbo.loss_and_grads(full, guide, x)
        results.append((loss, guide.dynamics.step_size.value_unconstrained.grad.item()))
        pyro.clear_param_store()
    assert results[0] == pytest.approx(results[1], rel=1e-7 if dtype == torch.float64 else 1e-3)


def test_subsampled_enumerated_model_equals_its_marginal(dtype):
    case = ALL["subsampled_mixture"]
    model, (x, size) = case.make()
    index = torch.tensor([3, 1, 4, 15, 9, 2, 6, 5])
    results = []
    for full, elbo in [(model, TraceEnum_ELBO(max_plate_nesting=1)), (marginal_subsampled_mixture, Trace_ELBO())]:
        guide = ShortRunGuide(
            full,
            num_steps=3,
            dynamics=Langevin(StepSize(1e-3)),
            start=seeded(subsampled_mixture_start),
            create_plates=lambda x, size: pyro.plate("rows", len(x), subsample=index),
        ).setup(x, size)
        assert guide(x, size)["shift"].shape == (8,)
        loss = elbo.loss_and_grads(full, guide, x, size)
        results.append((loss, guide.dynamics.step_size.value_unconstrained.grad.item()))
        pyro.clear_param_store()
    assert results[0] == pytest.approx(results[1], rel=1e-7 if dtype == torch.float64 else 1e-3)


def test_states_enumerated_along_markov_train():
    case = ALL["hmm"]
    model, (y,) = case.make()
    guide = ShortRunGuide(model, num_steps=2, step_size=StepSize(1e-4))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), TraceEnum_ELBO(max_plate_nesting=1))
    assert all(math.isfinite(svi.step(y[:2, :3])) for _ in range(2))
    assert set(guide(y[:2, :3])) == {"transition", "locs", "scale"}


# ------------------------------------------------------------------------------------------------ prediction


def doubled(x: Tensor, y: Tensor | None = None) -> None:
    """Locals, a function of them, and what may be unobserved."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.deterministic("twice", 2 * z)
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.sample("new", dist.Normal(z, 0.1), obs=y)


MODES = {"plain": contextlib.nullcontext, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(parallel, mode, dtype):
    """Draws of the posterior and functions of the same draws; also where the data are made inside the mode."""
    guide = ShortRunGuide(local, num_steps=2, dynamics=frozen(), start=local_posterior)
    samples = 2000 if parallel else 30
    with MODES[mode]():
        x = data(4)
        predictive = Predictive(doubled_local, guide=guide, num_samples=samples, parallel=parallel)
        draws = predictive(x)
    assert set(draws) >= {"z", "twice", "x"}
    z = draws["z"]
    assert z.shape == (samples, 4) and z.std(0).min() > 0.3
    torch.testing.assert_close(draws["twice"], 2 * z)
    error = (z.mean(0) - data(4) / 2).abs() / math.sqrt(0.5 / samples)
    assert error.max() < 5  # standard errors


def doubled_local(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.deterministic("twice", 2 * z)
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize("mode", MODES)
def test_every_public_call_works_in_every_mode(mode):
    """Also the first one, which creates the parameters; and what it creates can be trained afterwards."""
    with MODES[mode]():
        x = data(4)
        guide = ShortRunGuide(nested, num_steps=2, step_size=StepSize(0.01))
        guide.setup(x)
        assert guide(x)["z"].shape == (4,)
        assert guide.sample_posterior(x, num_samples=3)["mu"].shape == (1, 3)
        assert guide.trajectory(x)["mu"].shape == (3, 1)
        assert math.isfinite(Trace_ELBO().loss(nested, guide, x))
    before = guide.step_sizes()
    svi = SVI(nested, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    svi.step(data(4))
    assert guide.step_sizes() != before


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_no_graph_where_none_is_wanted(mode):
    guide = ShortRunGuide(local, num_steps=2, step_size=StepSize(0.01))
    with MODES[mode]():
        assert not guide(data())["z"].requires_grad
        assert torch.is_inference_mode_enabled() == (mode == "inference_mode")
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def linear(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w * x, 0.5), obs=y)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("inference_mode", [False, True])
def test_condition_on_keeps_the_training_posterior(parallel, inference_mode):
    """Predictive passes test inputs to the guide; its draws are those of the training data all the same."""
    with torch.inference_mode(inference_mode):
        x = torch.linspace(-1.0, 1.0, 10)
        y = 1.5 * x
        precision = 1 + 4 * (x**2).sum().item()
        mean = 4 * (x * y).sum().item() / precision

        def posterior(x: Tensor, y: Tensor | None = None) -> None:
            assert y is not None
            p = 1 + 4 * (x**2).sum()
            pyro.sample("w", dist.Normal(4 * (x * y).sum() / p, p**-0.5))

        guide = ShortRunGuide(linear, num_steps=2, dynamics=frozen(), start=posterior).setup(x, y)
        with pytest.raises(ValueError, match="condition_on"):
            Predictive(linear, guide=guide, num_samples=2, parallel=parallel)(torch.ones(3))
        assert guide.condition_on(x, y) is guide
        samples = 500
        draws = Predictive(linear, guide=guide, num_samples=samples, parallel=parallel)(torch.ones(3))
        assert draws["y"].shape == (samples, 3)
        w = draws["w"].flatten()
        assert abs(w.mean().item() - mean) < 5 * (precision * samples) ** -0.5
        assert w.std().item() == pytest.approx(precision**-0.5, rel=0.2)
        for mine, direct in [
            (guide.sample_posterior(torch.ones(3), num_samples=samples), guide.sample_posterior(x, y)),
            (guide.median(), guide.median(x, y)),
        ]:
            assert abs(mine["w"].mean() - direct["w"].mean()) < 7 * (precision * samples) ** -0.5
        assert guide.forget() is guide
        with pytest.raises(ValueError, match="condition_on"):
            guide(torch.ones(3))
        flipped = guide.sample_posterior(x, -y, num_samples=samples)["w"].mean().item()
        assert abs(flipped + mean) < 5 * (precision * samples) ** -0.5


# ------------------------------------------------------------------------------------------------ parameters


def trainable(x: Tensor) -> None:
    theta = pyro.param("theta", torch.tensor(0.3))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(theta + z, 1.0), obs=x)


class Decoder(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.theta = PyroParam(torch.tensor(0.3))

    def forward(self, x: Tensor) -> None:
        theta = self.theta
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(theta + z, 1.0), obs=x)


def test_elbo_module_equals_svi():
    """``Trace_ELBO()(model, guide)`` with a torch optimiser walks the same path as SVI with Pyro's."""
    x, losses = data(), []
    for style in ("svi", "module"):
        pyro.clear_param_store()
        model = Decoder()
        guide = ShortRunGuide(model, num_steps=3, step_size=StepSize(0.05)).setup(x)
        if style == "svi":
            svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.01}), Trace_ELBO())

            def step(svi=svi) -> float:
                return svi.step(x)
        else:
            loss_fn = Trace_ELBO()(model, guide)
            names = {name for name, _ in loss_fn.named_parameters()}
            assert len(names) == 2
            optimiser = torch.optim.SGD(loss_fn.parameters(), lr=0.01)

            def step(loss_fn=loss_fn, optimiser=optimiser) -> float:
                optimiser.zero_grad()
                loss = loss_fn(x)
                loss.backward()
                optimiser.step()
                return loss.item()

        pyro.set_rng_seed(5)
        losses.append([step() for _ in range(4)] + [model.theta.item(), guide.step_sizes().item()])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0][-2] != pytest.approx(0.3, abs=1e-3) and losses[0][-1] != pytest.approx(0.05, rel=1e-4)


def test_module_local_params():
    """Nothing in the parameter store, and two guides of the same model have step sizes of their own."""
    x = data()
    with pyro.settings.context(module_local_params=True):
        model = Decoder()
        guides = [ShortRunGuide(model, num_steps=3, step_size=StepSize(0.05)).setup(x) for _ in range(2)]
        loss_fn = Trace_ELBO()(model, guides[0])
        optimiser = torch.optim.Adam(loss_fn.parameters(), lr=0.1)
        for _ in range(3):
            optimiser.zero_grad()
            loss_fn(x).backward()
            optimiser.step()
        assert not list(pyro.get_param_store().keys())
        assert guides[0].step_sizes().item() != pytest.approx(0.05, rel=1e-3)
        assert guides[1].step_sizes().item() == pytest.approx(0.05)
        assert model.theta.item() != pytest.approx(0.3, abs=1e-3)
        assert guides[0].sample_posterior(x, num_samples=2)["z"].shape == (1, 2, 5)


def step_size_path(tune_every: int, elbo: Any, optim: Any, steps: int = 7) -> tuple[list[float], list[float]]:
    """Step size and theta after every SVI step, from their initial values on."""
    guide = ShortRunGuide(trainable, num_steps=3, step_size=StepSize(0.05), tune_every=tune_every).setup(data())
    svi = SVI(trainable, guide, optim, elbo)
    etas, thetas = [guide.step_sizes().item()], [pyro.param("theta").item()]
    for _ in range(steps):
        svi.step(data())
        etas.append(guide.step_sizes().item())
        thetas.append(pyro.param("theta").item())
    return etas, thetas


@pytest.mark.parametrize("optim", [lambda: pyro.optim.SGD({"lr": 0.01}), lambda: pyro.optim.Adam({"lr": 0.01})])
def test_tune_every_third_call(optim):
    """Step sizes change in calls 1, 4 and 7 only, also under an optimiser with momentum; theta changes in all."""
    etas, thetas = step_size_path(3, Trace_ELBO(), optim())
    changed = [a != b for a, b in zip(etas, etas[1:])]
    assert changed == [True, False, False, True, False, False, True]
    assert all(a != b for a, b in zip(thetas, thetas[1:]))


def test_tune_every_counts_svi_steps_with_several_particles():
    """The particles of one SVI step are one training call, looped or vectorised."""
    for vectorise in (True, False):
        pyro.clear_param_store()
        elbo = Trace_ELBO(num_particles=2, vectorize_particles=vectorise)
        etas, _ = step_size_path(3, elbo, pyro.optim.SGD({"lr": 0.01}), steps=4)
        assert [a != b for a, b in zip(etas, etas[1:])] == [True, False, False, True], f"{vectorise=}"


def test_calls_between_tunings_carry_the_log_determinant():
    """On a Gaussian target the log-determinants never change, so that the carried ones are exact."""
    x, eta, steps = data(), 0.1, 3
    dynamics = Langevin(StepSize(eta), noise=False)
    guide, seen = recorded(ShortRunGuide(local, num_steps=steps, dynamics=dynamics, tune_every=3))
    elbo = Trace_ELBO(max_plate_nesting=1)
    for _ in range(4):
        loss = elbo.loss_and_grads(local, guide, x)
        assert loss == pytest.approx(-linear_log_weight(seen[-1]["z"], x, eta, steps).sum().item(), rel=1e-5)


def test_evaluation_neither_tunes_nor_counts():
    x = data()
    guide = ShortRunGuide(local, num_steps=2, step_size=StepSize(0.05), tune_every=2)
    svi = SVI(local, guide, pyro.optim.SGD({"lr": 0.01}), Trace_ELBO())
    svi.step(x)
    eta = guide.step_sizes()
    svi.evaluate_loss(x)
    guide.sample_posterior(x, num_samples=2)
    Predictive(local, guide=guide, num_samples=1)(x)
    guide.eval()
    guide(x)
    guide.train()
    svi.step(x)  # the second training call
    assert guide.step_sizes() == eta
    svi.step(x)
    assert guide.step_sizes() != eta


# ------------------------------------------------------------------------------------------------ gradients


def curved(theta: Tensor, x: Tensor) -> None:
    """Every part of the log density depends on theta, and no Hessian is constant."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        pyro.sample("x", dist.Normal((theta * z).tanh(), 0.7), obs=x)


def curved_param(x: Tensor) -> None:
    curved(pyro.param("theta", torch.tensor(0.4)), x)


class CurvedModule(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.theta = PyroParam(torch.tensor(0.4))

    def forward(self, x: Tensor) -> None:
        curved(self.theta, x)


def curved_nn() -> Callable[[Tensor], None]:
    module = nn.Module()
    module.theta = nn.Parameter(torch.tensor(0.4))

    def model(x: Tensor) -> None:
        pyro.module("decoder", module)
        curved(module.theta, x)

    return model


KINDS: dict[str, Callable[[], Callable]] = {
    "pyro.param": lambda: curved_param,
    "PyroModule": CurvedModule,
    "pyro.module": curved_nn,
}


def theta_of(names: list[str]) -> Tensor:
    (name,) = [n for n in names if n.endswith("theta")]
    return pyro.get_param_store()[name].unconstrained()


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_get_the_gradient_at_fixed_draws(kind, dtype):
    """By default: ``grad_theta log p(x, z_K)`` with ``z_K`` held fixed, and nothing through the run."""
    model, x = KINDS[kind](), data()
    guide, seen = recorded(ShortRunGuide(model, num_steps=4, step_size=StepSize(0.1)))
    Trace_ELBO(max_plate_nesting=1).loss_and_grads(model, guide, x)
    theta = torch.tensor(0.4, requires_grad=True)
    z = seen[-1]["z"]
    log_joint = dist.Normal(theta, 1.0).log_prob(z) + dist.Normal((theta * z).tanh(), 0.7).log_prob(x)
    (expected,) = torch.autograd.grad(-log_joint.sum(), theta)
    grad = theta_of(list(pyro.get_param_store().keys())).grad
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_full_gradient_is_that_of_the_bound(kind, dtype):
    """Central differences of the loss under a fixed seed, in theta and in the step size."""
    model, x = KINDS[kind](), data()
    guide = ShortRunGuide(model, num_steps=4, step_size=StepSize(0.1), full_gradient=True).setup(x)
    elbo = Trace_ELBO(max_plate_nesting=1)
    pyro.set_rng_seed(2)
    elbo.loss_and_grads(model, guide, x)
    store = pyro.get_param_store()
    raw = [store[name].unconstrained() for name in store.keys()]
    assert len(raw) == 2
    width, tolerance = (1e-5, 1e-7) if dtype == torch.float64 else (1e-2, 2e-2)
    for param in raw:
        value, losses = param.detach().clone(), []
        for sign in (1, -1):
            param.data = value + sign * width
            pyro.set_rng_seed(2)
            losses.append(elbo.loss(model, guide, x))
        param.data = value
        expected = (losses[0] - losses[1]) / (2 * width)
        assert param.grad.item() == pytest.approx(expected, rel=tolerance, abs=tolerance)
    # and it is another one than the default's
    grad = theta_of(list(store.keys())).grad.item()
    guide.full_gradient = False
    for param in raw:
        param.grad = None
    pyro.set_rng_seed(2)
    elbo.loss_and_grads(model, guide, x)
    assert abs(theta_of(list(store.keys())).grad.item() - grad) > 1e-2
