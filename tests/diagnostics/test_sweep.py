"""Sweeps over lengths and step sizes: noise-free runs on a Gaussian, whose every number is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from pyro_shortrun import Annealed, GaussianReverse, Langevin, Linearized, Persistent, Prior, ShortRunGuide, StepSize
from pyro_shortrun.diagnostics import step_sweep

NOISE = 0.5
PRECISION = 1 + 1 / NOISE**2
STEPS, FACTORS = (1, 2, 4, 8), (0.5, 1.0, 2.0)


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


def exact_step(num_steps: int) -> float:
    """With which noise-free runs from N(0, 1) end at a posterior with mean 0 exactly."""
    return (1 - PRECISION ** (-0.5 / num_steps)) / PRECISION


def noise_free(num_steps: int, step_size: float, model: Callable = model) -> ShortRunGuide:
    return ShortRunGuide(model, num_steps=num_steps, dynamics=Langevin(StepSize(step_size), noise=False), start=Prior())


def test_log_joint_and_bound_follow_their_closed_forms():
    """u_K - m = r^K (u_0 - m), so that with the same u_0 in all cells nothing but r^K differs; seeded."""
    x, eta = torch.tensor([1.0, -0.5, 2.0]), 0.03
    sweep = step_sweep(noise_free(4, eta), x, num_steps=STEPS, factors=FACTORS, num_samples=400)
    shrink = torch.tensor([[(1 - f * eta * PRECISION) ** k for f in FACTORS] for k in STEPS])
    evidence = dist.Normal(0.0, math.sqrt(1 + NOISE**2)).log_prob(x).sum()
    top = evidence + len(x) * 0.5 * math.log(PRECISION / (2 * math.pi))
    squares = -2 * (sweep.log_joint - top) / PRECISION / shrink.square()  # of u_0 - m, summed over rows
    torch.testing.assert_close(squares, squares[:1, :1].expand_as(squares), rtol=2e-4, atol=0)
    mean = x / (1 + NOISE**2)
    expected = top - 0.5 * PRECISION * shrink.square() * (1 + mean.square()).sum()
    assert ((sweep.log_joint - expected).abs() < 5 * sweep.log_joint_error).all()
    entropy = sweep.bound - sweep.log_joint - len(x) * shrink.log()  # that of N(0, 1), by the same draws
    torch.testing.assert_close(entropy, entropy[:1, :1].expand_as(entropy), rtol=2e-4, atol=0)
    ratio = sweep.displacement / (1 - shrink)
    torch.testing.assert_close(ratio, ratio[:1, :1].expand_as(ratio), rtol=2e-4, atol=0)
    assert (sweep.nonfinite == 0).all() and (sweep.singular == 0).all() and (sweep.seconds > 0).all()
    torch.testing.assert_close(sweep.step_size, eta * torch.tensor(FACTORS), check_dtype=False)


def test_the_exact_cell_is_the_best():
    """There the bound and the importance estimate are the evidence, draw by draw."""
    x = torch.zeros(3)
    sweep = step_sweep(noise_free(4, exact_step(4)), x, num_steps=(1, 4, 32), factors=(0.25, 1.0, 4.0))
    evidence = dist.Normal(0.0, math.sqrt(1 + NOISE**2)).log_prob(x).sum().item()
    assert sweep.bound[1, 1].item() == pytest.approx(evidence, abs=1e-4)
    assert sweep.log_likelihood[1, 1].item() == pytest.approx(evidence, abs=1e-4)
    assert sweep.bound_error[1, 1] < 1e-4 and (sweep.bound <= evidence + 4 * sweep.bound_error + 1e-4).all()
    assert sweep.best == (4, 1.0)
    assert "largest bound: K = 4, factor 1" in sweep.summary() and len(sweep.summary().splitlines()) == 11


def test_weights_of_a_subsampled_plate_count_for_the_full_one():
    def subsampled(x: Tensor) -> None:
        with pyro.plate("data", 30, subsample=torch.arange(3)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, NOISE), obs=x)

    sweep = step_sweep(noise_free(4, exact_step(4), subsampled), torch.zeros(3), factors=(1.0,), num_steps=(4,))
    evidence = 30 * dist.Normal(0.0, math.sqrt(1 + NOISE**2)).log_prob(torch.tensor(0.0)).item()
    assert sweep.bound.item() == pytest.approx(evidence, rel=1e-5)
    assert sweep.log_likelihood.item() == pytest.approx(evidence, rel=1e-5)


@pytest.mark.parametrize("trained", [False, True])
def test_a_trained_guide_stays_as_it_is(trained):
    x = torch.randn(3)
    guide = ShortRunGuide(model, num_steps=4, dynamics=Langevin(StepSize(0.05, per="step")), start=Prior())
    if trained:
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
        for _ in range(3):
            svi.step(x)
    guide.setup(x)
    info, calls, before = guide.info, guide._calls, {k: v.clone() for k, v in guide.state_dict().items()}
    sweep = step_sweep(guide, x, num_samples=8)
    assert sweep.num_steps == (1, 2, 4, 8, 16) and sweep.bound.isfinite().all()
    assert guide.info is info and guide._calls == calls and guide.training and guide.num_steps == 4
    for name, value in guide.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_its_own_cell_is_the_guide_itself():
    """With the same random numbers, what ``log_weight`` gives; for every objective that can be there."""
    x = torch.randn(3)
    for objective in (None, Annealed(), Linearized(), GaussianReverse(pilots=64, fresh=64)):
        pyro.clear_param_store()
        dynamics = Langevin(StepSize(0.05, learnable=False))
        guide = ShortRunGuide(model, num_steps=4, dynamics=dynamics, objective=objective, start=Prior()).setup(x)
        pyro.set_rng_seed(1)
        guide.setup(x)  # as a sweep does, and draws from the prior
        with torch.no_grad():
            expected = guide.log_weight(x, num_particles=32).mean().item()
        pyro.set_rng_seed(1)
        sweep = step_sweep(guide, x, num_steps=(4,), factors=(1.0,), num_samples=32)
        close = 0.5 if isinstance(objective, GaussianReverse) else 1e-4  # which remembers earlier pilots
        assert sweep.bound.item() == pytest.approx(expected, abs=close)
        assert math.isnan(sweep.log_likelihood.item()) == isinstance(objective, Linearized)


@pytest.mark.parametrize("start", [Prior(), None], ids=["prior", "default"])
def test_other_lengths_are_annealed_as_guides_of_that_length(start):
    """Temperatures are stretched over the run: those that are even stay even."""
    found, x = [], torch.randn(3)
    for own in (4, 8):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        dynamics, objective = Langevin(StepSize(0.05, learnable=False)), Annealed()
        guide = ShortRunGuide(lone, num_steps=own, dynamics=dynamics, objective=objective, start=start).setup(x)
        pyro.set_rng_seed(1)
        found.append(step_sweep(guide, x, num_steps=(2, 8), factors=(1.0,), num_samples=16))
    torch.testing.assert_close(found[0].bound, found[1].bound)
    torch.testing.assert_close(found[0].log_joint, found[1].log_joint)


def lone(x: torch.Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.StudentT(3.0, loc, 1.0), obs=x)


def test_trained_temperatures_are_stretched():
    objective = Annealed()
    objective.register_buffer("increments", torch.tensor([0.4, 0.4, 0.1, 0.1]))
    wanted = {2: [0.8, 1.0], 4: [0.4, 0.8, 0.9, 1.0], 8: [0.2, 0.4, 0.6, 0.8, 0.85, 0.9, 0.95, 1.0]}
    for steps, beta in wanted.items():
        torch.testing.assert_close(objective.resized(steps).temperatures(steps, torch.zeros(1)), torch.tensor(beta))


def test_without_a_density_the_log_joint_decides():
    guide = ShortRunGuide(model, num_steps=4, dynamics=Langevin(StepSize(0.05), noise=False), start=Persistent())
    sweep = step_sweep(guide, torch.randn(3), num_steps=(2, 8), factors=(1.0, 2.0))
    assert sweep.bound.isnan().all() and sweep.log_likelihood.isnan().all()
    assert sweep.best == (8, 2.0) and "largest log joint: K = 8, factor 2" in sweep.summary()


def test_cells_that_are_not_valid_are_never_best():
    """A step with eta * precision > 1 is singular for the path density."""
    sweep = step_sweep(noise_free(2, 0.1), torch.zeros(2), num_steps=(1, 2), factors=(3.0, 4.0))
    assert (sweep.singular == 1).all() and sweep.best is None and "smaller factors" in sweep.summary()
    assert step_sweep(noise_free(2, 0.1), torch.zeros(2), num_steps=(2,), factors=(1.0, 4.0)).best == (2, 1.0)


def test_bad_arguments_are_refused():
    x = torch.zeros(2)
    for factors in ((), (0.0,), (-1.0,), ("a",), (math.inf,)):
        with pytest.raises(ValueError, match="factors"):
            step_sweep(noise_free(2, 0.1), x, factors=factors)
    for steps in ((), (0,), (2.5,)):
        with pytest.raises(ValueError, match="num_steps"):
            step_sweep(noise_free(2, 0.1), x, num_steps=steps)
    with pytest.raises(ValueError, match="num_samples"):
        step_sweep(noise_free(2, 0.1), x, num_samples=1)
    with pytest.raises(ValueError, match="ShortRunGuide"):
        step_sweep(model, x)


def test_plot_has_a_line_for_each_length():
    sweep = step_sweep(noise_free(4, 0.03), torch.zeros(2), num_steps=(2, 4), factors=FACTORS)
    axes = sweep.plot()
    for ax, value in zip(axes, (sweep.log_joint, sweep.bound), strict=True):
        for container, row in zip(ax.containers, value, strict=True):
            assert container.lines[0].get_xdata().tolist() == sweep.step_size.tolist()
            assert container.lines[0].get_ydata().tolist() == row.tolist()
    assert [t.get_text() for t in axes[0].get_legend().get_texts()] == ["K = 2", "K = 4"]
