"""Energy gaps and run lengths: quadratic energies, whose tilted prior and unadjusted chains are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_shortrun import Langevin, Prior, ShortRunGuide, StepSize, energy_prior
from pyro_shortrun.diagnostics import energy_gap, run_length
from pyro_shortrun.energy import PriorRuns

NOISE = 0.5


def make(curvature: float) -> Callable:
    """``c z^2 / 2``: the prior becomes ``N(0, 1 / (1 + c))``."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            energy_prior("ebm", lambda z: curvature * z.square() / 2, z)
            pyro.sample("x", dist.Normal(z, NOISE), obs=x)

    return model


def exact_guide(curvature: float) -> Callable:
    precision = 1 + curvature + 1 / NOISE**2

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / NOISE**2 / precision, precision**-0.5))

    return guide


def variance(curvature: float, step_size: float, num_steps: int) -> float:
    """Of an unadjusted chain from N(0, 1)."""
    value, shrink = 1.0, 1 - step_size * (1 + curvature)
    for _ in range(num_steps):
        value = shrink**2 * value + 2 * step_size
    return value


@pytest.mark.parametrize("kind", ["guide", "short run", "draws"])
def test_gap_of_a_quadratic_energy(kind):
    """``c / 2 (E z^2 | x - Var_K)`` within 5 of its standard errors; seeded."""
    c, x = 1.5, torch.randn(40)
    precision = 1 + c + 1 / NOISE**2
    second = 1 / precision + (x / NOISE**2 / precision).square().mean().item()
    source = exact_guide(c)
    if kind == "short run":  # m + r^K (u_0 - m) from N(0, 1): its second moment is known too
        shrink = 0.6**3
        step = StepSize(0.4 / precision)
        source = ShortRunGuide(make(c), num_steps=3, dynamics=Langevin(step, noise=False), start=Prior())
        mean = x / NOISE**2 / precision
        second = ((mean * (1 - shrink)).square().mean() + shrink**2).item()
    if kind == "draws":
        source = {"z": torch.full((10, 40), 2.0)}
        second = 4.0
    found = energy_gap(make(c), source, x, num_samples=100, runs=PriorRuns(10, 0.05))
    expected = c / 2 * (second - variance(c, 0.05, 10))
    assert found.gap["ebm"] == pytest.approx(expected, abs=5 * found.error["ebm"])
    assert 0 < found.error["ebm"] < 0.1 and found.nonfinite == 0
    assert found.posterior["ebm"] == pytest.approx(c / 2 * second, abs=5 * found.posterior_error["ebm"] + 1e-5)
    assert ("not zero" in found.summary()) == (abs(found.gap["ebm"]) > 4 * found.error["ebm"])


def test_gap_is_zero_at_maximum_likelihood():
    """Data whose second moment is that of the model: ``E_x E[z^2 | x]`` is the tilted prior's variance."""
    c = 1.0
    marginal = math.sqrt(1 / (1 + c) + NOISE**2)
    x = dist.Normal(0.0, marginal).icdf((torch.arange(400) + 0.5) / 400)
    x = x * marginal / x.square().mean().sqrt()
    found = energy_gap(make(c), exact_guide(c), x, num_samples=50, runs=PriorRuns(60, 0.02))
    assert abs(found.gap["ebm"]) < 5 * found.error["ebm"] + 0.01 and found.error["ebm"] < 0.01
    assert "zero within its error" in found.summary()


def test_gap_has_the_opposite_sign_of_the_losses():
    from pyro.infer import SVI, Trace_ELBO

    from pyro_shortrun import EnergyELBO

    x, elbo = torch.full((200,), 3.0), EnergyELBO(Trace_ELBO(), num_steps=10, step_size=0.05)
    SVI(make(1.0), exact_guide(1.0), pyro.optim.Adam({}), elbo).step(x)
    gap = energy_gap(make(1.0), exact_guide(1.0), x, runs=PriorRuns(10, 0.05))
    assert gap.gap["ebm"] == pytest.approx(-elbo.info.gap["ebm"], abs=0.3) and gap.gap["ebm"] > 1


def test_energies_along_the_run_follow_the_chain():
    """``c / 2 Var_K`` and its change, within 5 standard errors; the energy still falls after 4 small steps."""
    c, eta, lengths = 3.0, 0.02, (2, 4, 16, 64)
    found = run_length(make(c), torch.zeros(50), num_steps=lengths, runs=PriorRuns(4, eta), num_samples=100)
    exact = [c / 2 * variance(c, eta, k) for k in lengths]
    error = found.energy_error["ebm"]
    assert ((found.energy["ebm"] - torch.tensor(exact)).abs() < 5 * error).all() and (error < 0.1).all()
    assert found.change["ebm"] == pytest.approx(exact[3] - exact[1], abs=5 * found.change_error["ebm"])
    slope = (exact[3] - exact[1]) / 4  # over log2 of 4, 16 and 64, which are evenly spaced
    assert found.trend["ebm"] == pytest.approx(slope, abs=5 * found.trend_error["ebm"])
    # minus log density: (1 + c) / 2 Var_K and a constant
    total = (1 + c) / 2 * variance(c, eta, 64) + 0.5 * math.log(2 * math.pi)
    assert found.energy["-log density"][-1].item() == pytest.approx(total, abs=0.05)
    assert found.too_short and "still change at K = 4" in found.summary() and "4-step" in found.summary()
    assert found.mmd[0] > 4 * found.mmd_error[0] and abs(found.mmd[-1]) < 5 * found.mmd_error[-1]


def test_runs_that_are_long_enough_are_recognised():
    found = run_length(make(3.0), torch.zeros(50), num_steps=(10, 40, 160), runs=PriorRuns(step_size=0.05))
    assert not found.too_short and "look long enough" in found.summary()
    assert (found.mmd[1:].abs() < 5 * found.mmd_error[1:]).all()
    assert (found.nonfinite == 0).all()


def test_rows_that_are_not_finite_are_counted():
    """From |z| > 1 an energy of z^4 with steps of 1 flies away, where no drift is clipped."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            energy_prior("ebm", lambda z: z.pow(4), z)
            pyro.sample("x", dist.Normal(z, NOISE), obs=x)

    dynamics = Langevin(StepSize(0.9, learnable=False), noise=False, max_drift=math.inf)
    runs = PriorRuns(20, dynamics=dynamics)
    found = run_length(model, torch.zeros(20), num_steps=(2, 20, 40), runs=runs, num_samples=8)
    assert found.nonfinite[0] <= found.nonfinite[1] <= found.nonfinite[2] and found.nonfinite[2] > 0
    assert "met a non-finite" in found.summary()
    gap = energy_gap(model, {"z": torch.zeros(4, 20)}, torch.zeros(20), num_samples=8, runs=runs)
    assert gap.nonfinite > 0 and "not finite" in gap.summary()


def test_step_sizes_of_single_steps_go_on_with_the_last():
    dynamics = Langevin(StepSize(0.02, per="step", learnable=False))
    found = run_length(make(1.0), torch.zeros(5), num_steps=(2, 4, 8), runs=PriorRuns(4, dynamics=dynamics))
    assert found.energy["ebm"].shape == (3,) and len(dynamics.step_size.value) == 4


def test_plot_shows_the_numbers():
    found = run_length(make(1.0), torch.zeros(5), num_steps=(2, 4, 8), runs=PriorRuns(4))
    left, right = found.plot()
    for container, name in zip(left.containers, found.energy, strict=True):
        assert container.lines[0].get_xdata().tolist() == [2, 4, 8]
        assert container.lines[0].get_ydata().tolist() == found.energy[name].tolist()
    assert right.containers[0].lines[0].get_ydata().tolist() == found.mmd[:-1].tolist()
    assert [t.get_text() for t in left.get_legend().get_texts()][0] == "trained, K = 4"


def test_bad_arguments_are_refused():
    def plain(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    x = torch.zeros(3)
    for call in (lambda: energy_gap(plain, {}, x), lambda: run_length(plain, x)):
        with pytest.raises(ValueError, match="no energy_prior"):
            call()
    for steps in ((40,), (40, 20), (20, 80), (20, 40), ()):
        with pytest.raises(ValueError, match="num_steps must"):
            run_length(make(1.0), x, num_steps=steps)
    with pytest.raises(ValueError, match="num_samples"):
        run_length(make(1.0), x, num_samples=3)
    with pytest.raises(ValueError, match="num_samples"):
        energy_gap(make(1.0), exact_guide(1.0), x, num_samples=3)
    with pytest.raises(ValueError, match="site 'z'"):
        energy_gap(make(1.0), {"y": torch.zeros(10, 3)}, x)


def wells(x: Tensor) -> None:
    """Two modes with a wall of 24 nats between them."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        energy_prior("ebm", lambda z: 1.5 * (z.square() - 4).square(), z)
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


@pytest.mark.parametrize(
    "model, step_size, lengths, doubt",
    [(make(8.0), 1e-6, (10, 20, 40), "not forgotten"), (wells, 0.004, (100, 200, 400), "not forgotten")]
    + [(make(8.0), 0.2, (20, 40, 80), "virial is")],
    ids=["tiny steps", "two modes", "large steps"],
)
def test_constant_energies_do_not_fool_it(model, step_size, lengths, doubt):
    """Energies that stay, since runs hardly move, stay in the mode they fell into, or overshoot for ever."""
    found = run_length(model, torch.zeros(10), num_steps=lengths, runs=PriorRuns(lengths[0], step_size))
    assert not found.too_short and not found.conclusive
    assert doubt in found.summary() and "long enough" not in found.summary()


def test_virial_and_memory_follow_the_chain():
    """``(1 + c) Var_K`` and the correlation ``shrink^(L - K)``, for equal variances."""
    c, eta = 1.0, 0.05
    found = run_length(make(c), torch.zeros(40), num_steps=(20, 26), runs=PriorRuns(20, eta), num_samples=250)
    for steps, value, error in zip(found.num_steps, found.virial, found.virial_error, strict=True):
        assert abs(value.item() - (1 + c) * variance(c, eta, steps)) < 5 * error.item()
    assert found.memory == pytest.approx((1 - eta * (1 + c)) ** 6, abs=0.04)  # error 0.01


def test_stopped_rows_are_no_conclusion():
    found = run_length(make(1.0), torch.zeros(4), num_steps=(10, 20), runs=PriorRuns(10))
    assert found.stopped == 0 and found.conclusive
    stopped = replace(found, stopped=0.2)
    assert not stopped.conclusive and (stopped.too_short or "20% of the rows stopped" in stopped.summary())


def test_errors_of_the_gap_count_dependent_draws_once():
    """Every draw ten times over is worth a tenth of the draws."""
    z = torch.randn(4, 30, 1)
    errors = [
        energy_gap(make(1.0), {"z": draws}, torch.zeros(1), runs=PriorRuns(2)).posterior_error["ebm"]
        for draws in (z, z.repeat_interleave(10, 1))
    ]
    assert errors[1] > 0.8 * errors[0]
