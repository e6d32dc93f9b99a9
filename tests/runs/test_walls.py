"""Rows that meet a state without a finite density stay at their last finite one, and leak nothing."""

from __future__ import annotations

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from pyro_shortrun import Langevin, ShortRunGuide


def nan_value(z: Tensor) -> Tensor:
    return torch.where(z > 1, math.nan, 0.0)


def infinite_value(z: Tensor) -> Tensor:
    return torch.where(z > 1, -math.inf, 0.0)


def nan_gradient(z: Tensor) -> Tensor:
    """Zero everywhere; its gradient is zero below 1 and NaN above."""
    return torch.where(z > 1, (0 * torch.where(z > 1, z, 1.0)).sqrt(), 0.0)


def walled(wall):
    """Rows with ``x = 4`` are drawn towards 2 and meet the wall at 1; rows with ``x = -4`` do not."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("wall", wall(z))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return model


def zero(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Delta(torch.zeros(len(x))))


@pytest.mark.parametrize(
    "wall,steps", [(nan_value, 4), (nan_value, 10), (infinite_value, 4), (infinite_value, 10), (nan_gradient, 10)]
)
def test_rows_that_leave_the_finite_region_stay_at_their_last_finite_state(wall, steps):
    """From 0 and without noise ``z_k = +-2 (1 - 0.8^k)`` at eta = 0.1, so that the fourth step would pass the wall."""
    model, x = walled(wall), torch.tensor([4.0, -4.0, 4.0, -4.0, -4.0])
    guide = ShortRunGuide(model, num_steps=steps, dynamics=Langevin(0.1, noise=False), start=zero)
    svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.0}), Trace_ELBO())
    with pytest.warns(UserWarning, match="2 of 5 rows.*last finite state.*Try a smaller step_size") as caught:
        loss = svi.step(x)
    assert len(caught) == 1
    assert math.isfinite(loss)
    with warnings.catch_warnings(record=True) as again:
        warnings.simplefilter("always")
        assert svi.step(x) == pytest.approx(loss)
        svi.evaluate_loss(x)
        z = guide(x)["z"]
    assert not again, "warned more than once"
    below, other = 2 * (1 - 0.8**3), -2 * (1 - 0.8**steps)
    torch.testing.assert_close(z, torch.tensor([below, other, below, other, other]))
    assert guide.info is not None
    assert guide.info.frozen.tolist() == [[True, False, True, False, False]]
    assert guide.info.nonfinite == 2
    assert guide.info.log_density.isfinite().all() and guide.info.grad_norm.isfinite().all()
    assert "2 of 5 rows frozen" in repr(guide.info)


def test_run_that_ends_before_the_wall_freezes_nothing():
    model, x = walled(nan_value), torch.tensor([4.0, -4.0])
    guide = ShortRunGuide(model, num_steps=3, dynamics=Langevin(0.1, noise=False), start=zero)
    torch.testing.assert_close(guide(x)["z"], torch.tensor([1.0, -1.0]) * 2 * (1 - 0.8**3))
    assert guide.info is not None and guide.info.nonfinite == 0


def test_every_row_frozen_at_the_start():
    """Starts whose gradients are all NaN already: nothing can move, which would look like a posterior."""
    model, x = walled(nan_gradient), torch.tensor([1.0, 2.0])

    def start(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(torch.full((len(x),), 1.5)))

    guide = ShortRunGuide(model, num_steps=3, dynamics=Langevin(0.1), start=start)
    with pytest.raises(ValueError, match="gradient .* first at site 'wall'"):
        Trace_ELBO().loss(model, guide, x)
