"""tune_on_grid: the best of some step sizes with common random numbers."""

from __future__ import annotations

import pyro
import pytest
import torch
from programs import gaussian

from pyro_shortrun import Langevin, Prior, ShortRunGuide, StepSize
from pyro_shortrun.guides import tune_on_grid


def test_grid_finds_the_best_step_with_common_randomness():
    """Of a noise-free run on a Gaussian the best step is known; the same call gives the same table."""
    model, _ = gaussian(25.0, 1.0)
    dynamics = Langevin(StepSize(0.00076, learnable=False), noise=False)
    guide = ShortRunGuide(model, num_steps=25, dynamics=dynamics, start=Prior())
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
    guide = ShortRunGuide(model, num_steps=5, dynamics=Langevin(StepSize(0.01, max=0.5)), start=Prior())
    grid = tune_on_grid(guide, 10, factors=(1.0, 10.0, 1000.0))  # 0.1 * 25 > 1, and 10 > max
    assert grid.best == 1.0 and grid.factors.tolist() == [1.0, 10.0] and grid.invalid[1] > 0.9
    with pytest.raises(ValueError, match="valid"):
        tune_on_grid(guide, 10, factors=(10.0, 1000.0))
    assert guide.step_sizes().item() == pytest.approx(0.01)
