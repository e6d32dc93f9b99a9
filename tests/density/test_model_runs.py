"""How often a training step runs the model: nothing is computed that no one reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from pyro_shortrun import Annealed, EnergyELBO, Langevin, ShortRunGuide, StepSize, energy_prior

K = 5
REAL, POSITIVE = dist.Normal(0.3, 1.0), dist.LogNormal(0.3, 1.0)


def counted(latent: Any, energy: bool = False) -> tuple[Callable[[Tensor], None], list[int]]:
    """A model of one latent, and a list that is one longer after each of its runs."""
    runs: list[int] = []

    def model(x: Tensor) -> None:
        runs.append(1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", latent)
            if energy:
                energy_prior("ebm", lambda z: 0.1 * z.square(), z)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return model, runs


def encoder(law: Callable) -> Callable[[Tensor], None]:
    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", law(loc, 0.5))

    return guide


def steps(model: Callable, guide: Callable, loss: Any, runs: list[int]) -> int:
    """Runs of the model in one step, after the first."""
    svi, x = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss), torch.tensor([0.5, 1.0])
    svi.step(x)
    runs.clear()
    svi.step(x)
    return len(runs)


@pytest.mark.parametrize(
    "latent,options,count",
    [
        # The start; a gradient at each state but the last; the last; the way back; the ELBO's own trace.
        (REAL, {}, 1 + K + 1 + K + 1),
        # Besides, the way back of the site's value and log-Jacobian.
        (POSITIVE, {}, 1 + K + 1 + K + 1 + 1),
        # One more arrival, there and back, is the end, where it lands.
        (REAL, dict(objective=Annealed()), 1 + (K + 1) + 1 + (K + 1) + 1),
        (REAL, dict(start=encoder(dist.Normal)), 2 + K + 1 + K + 1),
        # Besides, the draw of the start as a state and its log-Jacobian, there and back.
        (POSITIVE, dict(start=encoder(dist.LogNormal)), 2 + K + 1 + K + 1 + 1 + 4),
    ],
    ids=["real", "positive", "annealed", "from a guide", "positive, from a guide"],
)
def test_training_step(latent, options, count):
    model, runs = counted(latent)
    guide = ShortRunGuide(model, num_steps=K, dynamics=Langevin(StepSize(0.05)), **options)
    assert steps(model, guide, Trace_ELBO(), runs) == count


@pytest.mark.parametrize("l2", [0.0, 0.1])
def test_step_with_negative_runs(l2):
    """The start, a gradient at each state but the last, the last and all that is read there; the ELBO's own trace."""
    model, runs = counted(REAL, energy=True)
    assert steps(model, encoder(dist.Normal), EnergyELBO(Trace_ELBO(), num_steps=K, l2=l2), runs) == 1 + K + 1 + 1
