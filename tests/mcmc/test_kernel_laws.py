"""ShortRunLangevin: laws of its transitions, its tuning, its mini-batches."""

from __future__ import annotations

import logging
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from targets import COVARIANCE, curved, quiet, scalar, subsampled, walk
from torch import Tensor

from pyro_shortrun import Langevin, Prior, ShortRunLangevin, StepSize, VectorizedMCMC
from pyro_shortrun.dynamics import Dense, Diagonal
from pyro_shortrun.dynamics.metric import CrossMoments, DenseScales, DiagonalScales, Moments
from pyro_shortrun.mcmc.sampler import ChainState


@pytest.mark.parametrize("max_drift", [10.0, 0.05])
def test_log_transition_is_the_density_of_a_step(max_drift):
    dynamics = Langevin(0.1, max_drift=max_drift)
    u, grad, moved = torch.randn(3, 2, 4, 5).unbind(0)
    eta, one = torch.rand(5) + 0.01, torch.ones(5)
    mean = dynamics.step(u, grad, eta, torch.zeros_like(u), one)
    wanted = dist.Normal(mean, (2 * eta).sqrt()).log_prob(moved).sum(-1)
    torch.testing.assert_close(dynamics.log_transition(u, moved, grad, eta, one), wanted)


def lower(rows: int) -> Tensor:
    return torch.tensor([[0.7, 0.0], [0.4, 1.3]]).expand(rows, 2, 2)


SCALES = {
    "unit": None,
    "diagonal": DiagonalScales(torch.tensor([0.5, 2.0]).double()),
    "dense": DenseScales(lower(4).double()),
}


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("max_drift", [10.0, 0.1], ids=["", "clipped"])
def test_detailed_balance(scales, max_drift, dtype, device):
    """pi(u) f(u'|u) a(u, u') = pi(u') f(u|u') a(u', u), row by row, from the transitions themselves."""
    if dtype is not torch.float64:
        pytest.skip("exact to float64")
    sampler = walk(ShortRunLangevin(curved, adjust=True, dynamics=Langevin(0.05, max_drift=max_drift)))
    if SCALES[scales] is not None:
        sampler.adaptation.scales = type(SCALES[scales])(SCALES[scales].factor.to(device))
    eta = sampler.step_size(0)
    always = torch.full((5, 4), -math.inf)
    here = sampler.evaluate(torch.randn(5, 4, 2))
    white, one = sampler.adaptation.scales, torch.ones(2)

    def propose(state: ChainState, noise: Tensor) -> tuple[ChainState, Tensor, Tensor]:
        """Proposed state, acceptance probability, log f(proposal | state) up to the scales' constant."""
        moved, accept, finite = sampler.transition(state, eta, noise, always)
        assert finite.all()
        w, v = white.whiten(state.u), white.whiten(moved.u)
        return moved, accept, sampler.dynamics.log_transition(w, v, white.pull(state.grad), eta, one)

    there, accept, forth = propose(here, torch.randn(5, 4, 2))
    drift = sampler.dynamics.step(white.whiten(there.u), white.pull(there.grad), eta, torch.zeros(5, 4, 2), one)
    back_noise = (white.whiten(here.u) - drift) / (2 * eta).sqrt()
    again, accept_back, back = propose(there, back_noise)
    torch.testing.assert_close(again.u, here.u)
    left = here.log_density + forth + accept.log()
    right = there.log_density + back + accept_back.log()
    known = (accept > 0) & (accept_back > 0)  # not rounded to zero
    assert known.sum() > 15 and ((accept < 1) | (accept_back < 1)).any()
    torch.testing.assert_close(left[known], right[known], rtol=0, atol=1e-9)


def test_a_rejected_proposal_leaves_everything_as_it_was():
    sampler = walk(ShortRunLangevin(curved, adjust=True, step_size=0.3))
    state = sampler.evaluate(torch.randn(5, 4, 2))
    never = torch.zeros(5, 4)  # log of a uniform draw of one
    moved, accept, _ = sampler.transition(state, sampler.step_size(0), torch.randn(5, 4, 2), never)
    stayed = accept < 1
    assert stayed.any()
    for name in ("u", "grad", "log_density"):
        assert torch.equal(getattr(moved, name)[stayed], getattr(state, name)[stayed])


def test_bias_of_the_unadjusted_chain_is_the_closed_form():
    """On a Gaussian u' = a u + b eps: the stationary variance b^2 / (1 - a^2) = 1 / (lambda (1 - eta lambda / 2))."""
    precision, eta = 4.0, 0.2
    kernel = ShortRunLangevin(potential_fn=scalar(precision), step_size=eta, persistent=True)
    sampler = walk(kernel, initial_params={"u": torch.zeros(1, 1)})
    at, always = sampler.evaluate(torch.tensor([[[1.0]], [[0.0]]])), torch.zeros(2, 1)
    noise = torch.tensor([[[0.0]], [[1.0]]])
    a, b = sampler.transition(at, sampler.step_size(0), noise, always)[0].u.flatten()
    wanted = 1 / (precision * (1 - eta * precision / 2))
    torch.testing.assert_close(b**2 / (1 - a**2), torch.tensor(wanted))
    # The same from one draw each of 4,000 chains; the relative error of a variance is sqrt(2 / 4000).
    mcmc = quiet(
        ShortRunLangevin(potential_fn=scalar(precision), num_steps=200, step_size=eta, persistent=True),
        1,
        0,
        4000,
        initial_params={"u": torch.zeros(4000, 1)},
    )
    mcmc.run()
    assert abs(mcmc.get_samples()["u"].var().item() / wanted - 1) < 5 * math.sqrt(2 / 4000)


def test_short_runs_have_the_closed_form_law():
    """K steps on N(m, 1/lambda) from N(0, 1): mean m (1 - a^K), variance a^2K + 2 eta (1 - a^2K) / (1 - a^2)."""
    precision, mean, eta, steps, count = 5.0, 1.5, 0.05, 6, 20000

    def model() -> None:
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        pyro.factor("tilt", -0.5 * precision * (u - mean) ** 2 + 0.5 * u**2)

    kernel = ShortRunLangevin(model, steps, StepSize(eta, learnable=False), start=Prior())
    mcmc = quiet(kernel, 2, 0, count // 2)
    mcmc.run()
    u = mcmc.get_samples()["u"]
    power = (1 - eta * precision) ** steps
    variance = power**2 + 2 * eta * (1 - power**2) / (1 - (1 - eta * precision) ** 2)
    assert abs(u.mean().item() - mean * (1 - power)) < 5 * math.sqrt(variance / count)
    assert abs(u.var().item() / variance - 1) < 5 * math.sqrt(2 / count)
    draws = mcmc.get_samples(group_by_chain=True)["u"]
    assert abs(torch.corrcoef(draws.T)[0, 1].item()) < 5 / math.sqrt(count / 2)


def test_warm_up_finds_the_step_of_the_path_density():
    """N(1, 1/25) from N(0, 1) with K = 25: the bound is best at eta = 0.0030 (s = 0.077); see PathDensity."""
    precision, steps = 25.0, 25

    def negative_bound(eta: float) -> float:
        a = 1 - eta * precision
        power, mean = a**steps, 1.0
        variance = power**2 + 2 * eta * (1 - power**2) / (1 - a**2)
        return 0.5 * precision * (variance + (power * mean) ** 2) - steps * math.log(a)

    grid = torch.linspace(0.0005, 0.02, 400).tolist()
    best = min(grid, key=negative_bound)
    assert abs(best - 0.0030) < 2e-4

    def model() -> None:
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        pyro.factor("tilt", -0.5 * precision * (u - 1.0) ** 2 + 0.5 * u**2)

    mcmc = quiet(ShortRunLangevin(model, steps, StepSize(0.01), start=Prior()), 2, 80, 64)
    mcmc.run()
    tuned = mcmc.sample_stats["step_size"]
    assert torch.equal(tuned, tuned[:1, :1].expand_as(tuned))  # tuning ends with the warm-up
    assert abs(tuned[0, 0].item() / best - 1) < 0.15


def test_moments_are_those_of_all_values():
    batches = torch.randn(4, 7, 2, 3) * torch.tensor([1.0, 5.0, 0.1])
    for dense in (False, True):
        moments = (CrossMoments if dense else Moments)(torch.zeros(2, 3))
        for batch in batches:
            moments.update(batch)
        for row in range(2):
            wanted = torch.cov(batches[:, :, row].flatten(0, 1).T)
            found = moments.scatter[row] / (moments.count - 1)
            torch.testing.assert_close(found, wanted if dense else wanted.diagonal())
        shrunk = moments.covariance
        torch.testing.assert_close(shrunk.diagonal(dim1=-2, dim2=-1), moments.scatter.diagonal(dim1=-2, dim2=-1) / 27)
        if dense:  # 28 draws in 3 dimensions
            torch.testing.assert_close(shrunk[:, 0, 1], moments.scatter[:, 0, 1] / 27 * 28**2 / (28**2 + 12**2))


def test_scales_of_a_gaussian_are_exact_from_unconverged_chains(dtype):
    if dtype is not torch.float64:
        pytest.skip("exact to float64")
    covariance = COVARIANCE()
    precision = torch.linalg.inv(covariance)
    draws = torch.cov(torch.randn(3, 50) * torch.tensor([[10.0], [0.1], [3.0]]))  # nothing like the posterior
    grads = precision @ draws @ precision
    factor = Dense().fit(draws[None], grads[None], torch.eye(3)[None])[0]
    torch.testing.assert_close(factor @ factor.T, covariance)
    variances = torch.tensor([4.0, 1e-6, 9.0])
    spread = torch.tensor([0.01, 7.0, 1.0])
    factor = Diagonal().fit(spread[None], (spread / variances**2)[None], torch.ones(1, 3))[0]
    torch.testing.assert_close(factor**2, variances)


def test_scales_stay_where_nothing_moved():
    previous = torch.full((1, 2), 3.0)
    factor = Diagonal().fit(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 1.0]]), previous)
    assert factor.tolist() == [[3.0, 1.0]]
    eye = torch.eye(2)[None]
    assert torch.equal(Dense().fit(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), eye), eye)


def test_every_transition_of_every_chain_has_its_own_mini_batch():
    x = torch.arange(20.0).sqrt()
    kernel = ShortRunLangevin(subsampled, persistent=True, step_size=1e-3)
    sampler = kernel.open(3, 0, (x, 4), {}).sampler
    u = torch.zeros(3, 1, 1)
    grads = torch.stack([sampler.evaluate(u).grad.flatten() for _ in range(50)])
    assert len(grads.flatten().unique()) > 100  # sums of 4 of 20 numbers
    error = x.std() * 20 / math.sqrt(4 * 150)
    assert abs(grads.mean() - x.sum()) < 5 * error  # unbiased
    indices = sampler.target.current(3).batches["data"]
    assert indices.shape == (3, 4) and all(len(set(row.tolist())) == 4 for row in indices)


def test_sgld_with_a_decaying_schedule_finds_the_posterior():
    x = torch.randn(200) + 2.0
    seen = []

    def schedule(t: int) -> float:
        seen.append(t)
        return 2e-3 * (1 + t / 50) ** -0.33

    kernel = ShortRunLangevin(subsampled, num_steps=5, step_size=schedule, persistent=True)
    mcmc = quiet(kernel, 100, 60, 32)
    mcmc.run(x, 50)
    assert seen == list(range(160 * 5))
    loc = mcmc.get_samples()["loc"]
    sd = 1 / math.sqrt(200)
    assert abs(loc.mean() - x.mean()) < 0.2 * sd
    assert 0.9 < loc.std() / sd < 1.5  # the noise of the mini-batches comes on top
    stats = mcmc.sample_stats["step_size"]
    torch.testing.assert_close(stats[0, -1], torch.tensor(2e-3 * (1 + 799 / 50) ** -0.33))


def test_first_guess_with_mini_batches_hardly_widens_the_posterior(caplog):
    """The gradient's variance over batches is N^2 s^2 (1 - n / N) / n; its part of the chain's variance a tenth."""
    pyro.set_rng_seed(0)
    x, n = 3 + torch.randn(400), 40

    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x), subsample_size=n) as index:
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x[index])

    kernel = ShortRunLangevin(model, 10, persistent=True)
    mcmc = VectorizedMCMC(kernel, 40, 60, num_chains=32, disable_progbar=True)
    with caplog.at_level(logging.WARNING, "pyro_shortrun"):
        mcmc.run(x)
    assert "mini-batch gradients" in caplog.text
    noise = len(x) ** 2 * x.var().item() * (1 - n / len(x)) / n
    assert mcmc.sample_stats["step_size"].mean().item() == pytest.approx(0.2 / noise, rel=0.4)
    draws = mcmc.get_samples()["mu"]
    assert draws.mean().item() == pytest.approx(x.mean().item(), abs=0.02)
    assert draws.std().item() == pytest.approx(math.sqrt(1.1 / len(x)), rel=0.15)
