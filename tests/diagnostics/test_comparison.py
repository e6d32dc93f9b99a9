"""Draws against a reference: known shifts and scales, NUTS and long chains on a conjugate model, refusals."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyro_shortrun import Langevin, Prior, ShortRunGuide, ShortRunLangevin, StepSize, VectorizedMCMC
from pyro_shortrun.diagnostics import compare_with_nuts
from pyro_shortrun.diagnostics.reference import wasserstein

X, NOISE = 1.0, 0.5
PRECISION = 1 + 1 / NOISE**2
MEAN = X / (1 + NOISE**2)


def model(x: Tensor) -> None:
    with pyro.plate("data", 2):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x.expand(2))


def exact(*shape: int) -> Tensor:
    return MEAN + torch.randn(*shape, 2) / math.sqrt(PRECISION)


def test_shifted_and_scaled_draws_are_off_by_just_that():
    """The source is an affine map of the reference itself, so that every number is known without Monte Carlo error."""
    loc, mix = torch.tensor([5.0, -2.0, 0.0]), torch.tensor([[2.0, 0.0, 0.0], [0.4, 0.3, 0.0], [0.0, 0.0, 1.0]])
    z = loc + torch.randn(4, 500, 3) @ mix.T
    sd = z.flatten(0, 1).std(0)
    shift, scale = torch.tensor([0.5, 0.0, 0.0]), torch.tensor([1.0, 0.6, 1.0])
    moved = (z - z.mean((0, 1))) * scale + z.mean((0, 1)) + shift * sd
    found = compare_with_nuts(model, {"z": moved}, reference={"z": z})
    torch.testing.assert_close(found.error, shift, atol=1e-4, rtol=0, check_dtype=False)
    torch.testing.assert_close(found.sd_ratio, scale, rtol=1e-4, atol=0, check_dtype=False)
    assert found.wasserstein[0].item() == pytest.approx(0.5, rel=1e-4)
    assert found.wasserstein[1].item() == pytest.approx(0.4 * math.sqrt(2 / math.pi), rel=0.05)  # of 0.4 |N(0, 1)|
    assert found.wasserstein[2] < 1e-5 and (found.wasserstein_noise > 0).all()
    assert found.correlation_error < 1e-5 and found.conclusive
    assert found.names == ("z[0]", "z[1]", "z[2]")
    assert found.verdicts == ("mean 0.50 sd too high", "too narrow", "agrees")
    assert "2 of 3 coordinates differ" in found.summary() and "z[1] (too narrow)" in found.summary()


def test_lost_correlation_is_found():
    corr = torch.tensor([[1.0, 0.8], [0.8, 1.0]])
    z = torch.randn(2, 2000, 2) @ torch.linalg.cholesky(corr).T
    found = compare_with_nuts(model, {"z": torch.randn(2, 2000, 2)}, reference={"z": z})
    assert found.correlation_error == pytest.approx(0.8, abs=0.1) and found.correlation_at == ("z[0]", "z[1]")
    assert found.verdicts == ("agrees", "agrees") and found.sliced > 3 * found.wasserstein.max()


def test_monte_carlo_errors_are_right():
    """Over 100 pairs of 2-d samples the standardised errors have unit spread."""
    found = [compare_with_nuts(model, {"z": exact(2, 50)}, reference={"z": exact(2, 50)}) for _ in range(100)]
    mean = torch.cat([f.error / f.mean_error for f in found])
    log_sd = torch.cat([f.sd_ratio.log() / (f.sd_error / f.sd_ratio) for f in found])
    for score in (mean, log_sd):
        assert score.square().mean().sqrt().item() == pytest.approx(1.0, abs=0.3)


def test_nuts_agrees_with_the_closed_form_and_finds_a_short_run():
    """Runs that end at m + r^K (u_0 - m): mean r^K m too low, and r^K sd too wide."""
    shrink, x = 0.8, torch.tensor(X)
    short = Langevin(StepSize((1 - shrink) / PRECISION), noise=False)
    found = compare_with_nuts(model, {"z": exact(1000)}, x, num_samples=100, warmup_steps=50, num_chains=2)
    assert found.conclusive and found.verdicts == ("agrees", "agrees")
    assert "All 2 coordinates agree" in found.summary()
    guide = ShortRunGuide(model, num_steps=2, dynamics=short, start=Prior())
    found = compare_with_nuts(model, guide, x, reference={"z": exact(4, 500)})
    bias = -(shrink**2) * MEAN * math.sqrt(PRECISION)
    assert ((found.error - bias).abs() < 5 * found.mean_error).all()
    assert ((found.sd_ratio - shrink**2 * math.sqrt(PRECISION)).abs() < 5 * found.sd_error).all()
    assert all("too low, too wide" in v for v in found.verdicts)


def test_every_source_and_reference():
    x = torch.tensor(X)
    reference = VectorizedMCMC(
        ShortRunLangevin(model, num_steps=2, adjust=True), 60, 60, num_chains=16, disable_progbar=True
    )
    with pytest.raises(ValueError, match="no draws yet"):
        compare_with_nuts(model, {"z": exact(10)}, x, reference=reference)
    reference.run(x)
    mcmc = MCMC(NUTS(model), 50, 50, disable_progbar=True)
    with pytest.raises(ValueError, match="no draws yet"):
        compare_with_nuts(model, mcmc, x, reference=reference)
    mcmc.run(x)
    auto = AutoNormal(model)
    auto(x)
    for source in (
        mcmc,
        reference,
        {"z": exact(2, 50)},
        lambda x: pyro.sample("z", dist.Normal(MEAN, 0.5).expand([2])),
    ):
        found = compare_with_nuts(model, source, x, reference=reference)
        assert found.conclusive and found.names == ("z[0]", "z[1]")
        assert (found.error.abs() < 6 * found.mean_error + 0.1).all()
    few = {"z": exact(2, 20)}
    assert compare_with_nuts(model, auto, x, reference=few).error.isfinite().all()


def test_a_reference_that_has_not_converged_gives_no_conclusion():
    apart = {"z": exact(2, 100) + torch.tensor([0.0, 3.0]).reshape(2, 1, 1)}
    stuck = {"z": torch.ones(2, 100, 2)}
    found = compare_with_nuts(model, stuck, reference={"z": exact(2, 100)})
    assert all("too narrow" in v for v in found.verdicts) and found.source_ess.tolist() == [1.0, 1.0]
    for reference in (apart, stuck):
        found = compare_with_nuts(model, {"z": exact(200)}, reference=reference)
        assert not found.conclusive and set(found.verdicts) == {"no conclusion"}
        assert "No conclusion" in found.summary() and "differ" not in found.summary()


def test_many_coordinates_are_cut_short():
    z = torch.randn(2, 500, 40)
    moved = z + z.std((0, 1)) * torch.arange(40) / 10
    text = compare_with_nuts(model, {"z": moved}, reference={"z": z}).summary()
    assert "z[39]" in text.splitlines()[1] and "20 more coordinates" in text


def test_bad_arguments_are_refused():
    good = {"z": exact(2, 50)}
    with pytest.raises(ValueError, match="no draws of site 'z'"):
        compare_with_nuts(model, {"y": exact(50)}, reference=good)
    with pytest.raises(ValueError, match="draws of 'z' have shape"):
        compare_with_nuts(model, {"z": torch.zeros(50, 3)}, reference=good)
    with pytest.raises(ValueError, match="source must be a guide"):
        compare_with_nuts(model, 3, reference=good)
    with pytest.raises(ValueError, match=">= 4 draws"):
        compare_with_nuts(model, good, reference={"z": exact(2, 3)})
    with pytest.raises(ValueError, match="num_chains"):
        compare_with_nuts(model, good, num_chains=0)


def test_wasserstein_of_samples_of_different_sizes():
    a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [0.0], [1.0], [3.0]])
    assert wasserstein(a, b).item() == wasserstein(b, a).item() == 0.5


def test_exact_draws_need_no_chains():
    x = torch.tensor(X)
    found = compare_with_nuts(model, {"z": exact(400).numpy()}, x, reference={"z": exact(400)})
    assert found.names == ("z[0]", "z[1]") and found.conclusive


def test_guide_before_model_is_refused():
    with pytest.raises(ValueError, match="model comes first"):
        compare_with_nuts(ShortRunGuide(model, start=Prior()), model, torch.tensor(X))  # type: ignore[arg-type]
