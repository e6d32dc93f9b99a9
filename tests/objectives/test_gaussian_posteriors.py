"""Objectives on Gaussian posteriors: bounds, tuned steps and weights against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import gaussian, langevin_kl, posterior
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from pyro_shortrun import (
    Annealed,
    GaussianReverse,
    Hamiltonian,
    Langevin,
    Linearized,
    Mixture,
    PathDensity,
    Prior,
    ShortRunELBO,
    ShortRunGuide,
    StepSize,
)


def test_bound_tightens_with_the_number_of_steps():
    """Gaps to log p(x) of a posterior N(1, 1/4) from the prior, 4000 rows: each a mean with an error below 0.01."""
    model, evidence = gaussian(4.0, 1.0)
    gaps = []
    for steps in (4, 16, 64):
        pyro.clear_param_store()
        guide = ShortRunGuide(model, num_steps=steps, step_size=StepSize(0.1), objective=Annealed(), start=Prior())
        gaps.append(evidence - guide.log_weight(4000).item() / 4000)
    assert gaps[0] > gaps[1] > gaps[2] > -0.01 and gaps[2] < gaps[0] / 4


@pytest.mark.parametrize("start", [AutoNormal, AutoMultivariateNormal], ids=lambda s: s.__name__)
def test_svi_trains_start_steps_and_temperatures(start):
    model, evidence = gaussian(25.0, 1.0)
    pyro.set_rng_seed(0)
    guide = ShortRunGuide(model, num_steps=8, step_size=StepSize(0.005), objective=Annealed(), start=start(model))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    rows = 6 if start is AutoNormal else 1  # a dense Gaussian would tie the rows together
    before = {k: v.detach().clone() for k, v in guide.setup(rows).named_parameters()}
    losses = [svi.step(rows) / rows for _ in range(90)]
    changed = [k for k, v in guide.named_parameters() if not torch.equal(v, before[k])]
    assert any("increments" in k for k in changed) and any("step_size" in k for k in changed)
    assert any("loc" in k for k in changed)
    assert sum(losses[-20:]) / 20 + evidence < 0.2 < losses[0] + evidence
    assert guide.objective.increments.sum().item() == pytest.approx(1.0)


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


def test_tuned_step_is_the_best_with_noise():
    """Within 5 % of the optimum of the exact KL (in s = sqrt(2 eta)), and the bound within 0.02 nats of its value."""
    steps, precisions = 12, [25.0]
    model, evidence = posterior(precisions)
    best = min(np.linspace(0.02, 0.4, 2000) ** 2 / 2, key=lambda eta: langevin_kl(eta, steps, precisions))
    objective = GaussianReverse(fresh=1000)
    guide = ShortRunGuide(
        model, num_steps=steps, dynamics=Langevin(StepSize(best / 2, max=4 * best)), objective=objective, start=Prior()
    )
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.02 ** (1 / 60)}), ShortRunELBO(500))
    for _ in range(60):
        svi.step()
    eta = guide.step_sizes().item()
    assert math.sqrt(eta / best) == pytest.approx(1.0, abs=0.05)
    guide.eval()
    bound = -np.mean([ShortRunELBO(4000).loss(model, guide) for _ in range(10)])
    assert bound == pytest.approx(evidence - langevin_kl(eta, steps, precisions), abs=0.02)


def test_mixture_bound_rises_to_the_runs_own():
    """Below the ELBO of the run, which the exact KL gives, for every M, and close to it for many."""
    model, evidence = posterior([4.0])
    own = evidence - langevin_kl(0.04, 25, [4.0])
    bounds = []
    for runs in (2, 8, 64):
        pyro.clear_param_store()
        guide = ShortRunGuide(
            model, num_steps=25, dynamics=Langevin(StepSize(0.04)), objective=Mixture(runs), start=Prior()
        )
        bounds.append(-ShortRunELBO(4000).loss(model, guide))
    assert bounds[0] < bounds[1] < bounds[2] < own + 0.02 and bounds[2] > own - 0.05


def test_mixture_tunes_by_svi():
    model, _ = posterior([25.0])
    pyro.set_rng_seed(0)
    guide = ShortRunGuide(model, num_steps=10, dynamics=Langevin(StepSize(0.002)), objective=Mixture(16), start=Prior())
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    losses = [svi.step() for _ in range(60)]
    assert sum(losses[-20:]) < sum(losses[:20]) and guide.step_sizes() > 0.004
    assert guide()["z"].shape == (1,)


@pytest.mark.parametrize("precisions", [[4.0], [4.0, 25.0]], ids=str)
@pytest.mark.parametrize("noise", [True, False])
def test_linearized_is_exact_on_gaussians(precisions: list[float], noise: bool):
    """Its mean is the ELBO of the run: in closed form with noise, and the path density's without."""
    steps, eta = 10, 0.02
    model, evidence = posterior(precisions)
    dynamics = Langevin(StepSize(eta), noise=noise)
    guide = ShortRunGuide(model, num_steps=steps, dynamics=dynamics, objective=Linearized(), start=Prior())
    pyro.set_rng_seed(0)
    found = guide.log_weight(num_particles=4000).mean().item()
    if noise:
        assert found == pytest.approx(evidence - langevin_kl(eta, steps, precisions), abs=0.06)
        return
    guide.objective = PathDensity()
    pyro.set_rng_seed(0)
    assert found == pytest.approx(guide.log_weight(num_particles=4000).mean().item(), abs=1e-5)


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
        guide = ShortRunGuide(
            model, num_steps=25, dynamics=Langevin(StepSize(0.03)), objective=objective, start=Prior()
        )
        bounds.append(-ShortRunELBO(2000).loss(model, guide))
    assert bounds[0] > evidence + 0.1 and bounds[1] < evidence - 1
