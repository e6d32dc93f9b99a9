"""The verdict of a fit: how often it is wrong, where it ends a run, and how it is told."""

from __future__ import annotations

import math

import pytest
import torch
from scripted import Scripted
from torch import Tensor

from pyro_shortrun.guides.verdict import verdict


def noise(seed: int, size: int, correlation: float = 0.0) -> Tensor:
    """Standard normal, as seen by an eye on one step after another with a correlation."""
    gen = torch.Generator(device="cpu").manual_seed(seed)
    draws = torch.randn(size, generator=gen, dtype=torch.float64, device="cpu").tolist()
    values = draws[:1]
    for draw in draws[1:]:
        values.append(correlation * values[-1] + math.sqrt(1 - correlation**2) * draw)
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def rate(window: int, drift: float = 0.0, correlation: float = 0.0) -> float:
    """How often 600 sequences are called converged, of which the mean falls by ``drift`` standard errors a window."""
    error = math.sqrt(2 / window * (1 + correlation) / (1 - correlation))
    slope = drift * error / window * torch.arange(2 * window, dtype=torch.float64, device="cpu")
    said = [verdict(noise(seed, 2 * window, correlation) - slope, window)[2] for seed in range(600)]
    return sum(said) / len(said)


@pytest.mark.parametrize("window", [50, 250])
def test_false_alarms(window):
    """5 % of runs around a constant mean: 2.7 standard deviations of 600 allowed either way."""
    assert 0.026 < 1 - rate(window) < 0.074


def test_false_alarms_where_losses_are_alike_for_longer():
    """About 11 % at a correlation of .9 in windows of 250."""
    assert 0.07 < 1 - rate(250, correlation=0.9) < 0.16


@pytest.mark.parametrize("drift, low, high", [(2.0, 0.4, 0.7), (3.0, 0.17, 0.3), (4.0, 0.02, 0.1), (8.0, 0.0, 0.0)])
def test_misses(drift, low, high):
    """Of a drift by 2, 3, 4 and 8 standard errors in a window: 1 in 2, 1 in 4, 1 in 20, none."""
    assert low <= rate(250, drift) <= high


def test_change_and_error_are_those_of_the_windows():
    losses = torch.cat([torch.full((100,), 9.0), torch.full((100,), 5.0)]).double().cpu()
    losses += 0.5 * (-1) ** torch.arange(200, device="cpu")
    change, error, converged = verdict(losses, 100)
    assert change == pytest.approx(-4.0) and error == pytest.approx(0.0, abs=1e-12) and not converged


def test_nonfinite_losses_are_left_out():
    losses = noise(0, 300)
    holes = torch.stack([losses, torch.full_like(losses, math.nan)], 1).flatten()
    assert verdict(holes, 150) == verdict(losses, 150)


def test_losses_without_noise():
    assert verdict(torch.full((200,), 3.7e5), 50)[2]
    assert verdict(3.7e5 + 0.02 * torch.arange(200, device="cpu") / 200, 50)[2]  # float32 has no more digits
    assert not verdict(torch.arange(200.0, device="cpu"), 50)[2]


def test_early_stop_is_the_verdict_after_a_window():
    falling = 30 * torch.exp(-torch.arange(4000, dtype=torch.float64, device="cpu") / 150)
    losses = falling + noise(1, 4000)
    result = Scripted(losses).run(4000, progress=False, stop_when_converged=True, window=200)
    done = len(result.losses)
    assert result.converged and done % 200 == 0 and 400 < done < 4000
    assert (result.change, result.error, True) == verdict(losses[:done], 200)
    assert not any(verdict(losses[:n], 200)[2] for n in range(400, done, 200))
    assert falling[done - 200 : done].mean() < 0.3  # of the noise of one step
    whole = Scripted(losses).run(done, progress=False, window=200)
    assert (whole.change, whole.error) == (result.change, result.error)


def test_a_falling_loss_is_not_stopped():
    losses = -0.02 * torch.arange(1000, device="cpu") + noise(2, 1000)
    result = Scripted(losses).run(1000, progress=False, stop_when_converged=True)
    assert len(result.losses) == 1000 and not result.converged and result.window == 250


# ---------------------------------------------------------------- what a user reads


def said(losses, num_steps: int, **options) -> str:
    return repr(Scripted(losses).run(num_steps, progress=False, **options))


def test_result_is_one_line():
    drift = 0.02 * torch.arange(1000, device="cpu")
    assert "still falling by" in said(noise(0, 1000) - drift, 1000)
    assert "per window of 250 steps: run on" in said(noise(0, 1000) - drift, 1000)
    assert "lower the learning rate" in said(noise(0, 1000) + drift, 1000)
    assert said(noise(0, 1000) + 31.9, 1000).endswith("converged") and "loss 31.9" in said(noise(0, 1000) + 31.9, 1000)
    assert "two windows of 50 are needed" in said(noise(0, 99), 99)
    assert said([7.0] * 3, 3).endswith("loss 7, too few steps to say whether it falls (two windows of 50 are needed)")
    assert "\n" not in said([math.nan] * 3, 3)


def test_a_run_that_ends_early_is_judged_by_what_there_is():
    result = Scripted([*noise(0, 200), KeyboardInterrupt()]).run(4000, progress=False)
    assert result.window == 50 and math.isfinite(result.change)
