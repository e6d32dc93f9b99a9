"""ShortRunSVI: Pyro's steps bit for bit, what a run gives and how it ends, and how often the verdict is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, RenyiELBO, ReweightedWakeSleep, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from small import data, local, shared
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pyro_shortrun import Langevin, ShortRunELBO, ShortRunGuide, ShortRunSVI, StepSize, load_state, save_state
from pyro_shortrun.guides import FitResult
from pyro_shortrun.guides.fit import MAX_NONFINITE, verdict

X = data(8)


def short_run(model: Callable) -> ShortRunGuide:
    return ShortRunGuide(model, num_steps=2, dynamics=Langevin(StepSize(0.05)))


def make(loss=None, guide=AutoNormal, model: Callable = shared, optim=None, kind: type = ShortRunSVI) -> SVI:
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    return kind(model, guide(model), optim or pyro.optim.Adam({"lr": 0.02}), loss or Trace_ELBO())


def parameters() -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a and a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------- steps


LOSSES = [
    (Trace_ELBO, short_run),
    (ShortRunELBO, short_run),
    (lambda: RenyiELBO(alpha=0.5, num_particles=2), short_run),
    (TraceEnum_ELBO, short_run),
    (Trace_ELBO, AutoNormal),
    (TraceMeanField_ELBO, AutoNormal),
    (TraceEnum_ELBO, AutoNormal),
    (lambda: RenyiELBO(alpha=0.5, num_particles=2), AutoNormal),
]


@pytest.mark.parametrize("loss, guide", LOSSES)
def test_run_is_steps_of_pyro(loss, guide):
    plain = make(loss(), guide, kind=SVI)
    expected = [plain.step(X) for _ in range(12)]
    after = parameters()
    result = make(loss(), guide).run(12, X, progress=False)
    assert result.losses.dtype == torch.float64 and result.losses.device.type == "cpu"
    assert result.losses.tolist() == expected
    assert_equal(parameters(), after)


OPTIMISERS = {
    "clipped": lambda: pyro.optim.ClippedAdam({"lr": 0.02}),
    "own rates": lambda: pyro.optim.SGD(lambda name: {"lr": 1e-3 if "loc" in name else 1e-4}),
    "clip_args": lambda: pyro.optim.Adam({"lr": 0.02}, {"clip_norm": 1.0}),
    "scheduler": lambda: pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "gamma": 0.5}
    ),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_any_optimiser_of_pyro(name):
    plain = make(optim=OPTIMISERS[name](), kind=SVI)
    expected = [plain.step(X) for _ in range(5)]
    assert make(optim=OPTIMISERS[name]()).run(5, X, progress=False).losses.tolist() == expected


def test_schedulers_are_stepped_by_the_callback():
    def rates(optim) -> set[float]:
        return {s.get_last_lr()[0] for s in optim.optim_objs.values()}

    optim = OPTIMISERS["scheduler"]()
    make(optim=optim).run(4, X, progress=False)
    assert rates(optim) == {0.05}
    optim = OPTIMISERS["scheduler"]()
    step = lambda done, loss: optim.step() if done % 2 == 0 else None  # noqa: E731
    make(optim=optim).run(4, X, progress=False, callback=step)
    assert rates(optim) == {0.0125}


def test_several_losses_are_summed():
    def wake() -> ReweightedWakeSleep:
        return ReweightedWakeSleep(num_particles=2, vectorize_particles=False)

    plain = make(wake(), kind=SVI)
    expected = [sum(plain.step(X)) for _ in range(3)]
    assert make(wake()).run(3, X, progress=False).losses.tolist() == expected


def test_models_that_subsample_and_keyword_arguments():
    plain = make(guide=short_run, model=local, kind=SVI)
    expected = [plain.step(X, size=3) for _ in range(4)]
    svi = make(guide=short_run, model=local)
    assert svi.run(4, X, size=3, progress=False).losses.tolist() == expected


# ---------------------------------------------------------------- batches


def test_batches_cycle():
    seen = []

    def model(x: Tensor, scale: float = 1.0) -> None:
        seen.append((x.tolist(), scale))
        shared(x)

    batches = [(X[:4], 2.0), [X[4:7]], X[7:]]
    make(guide=lambda m: lambda *args: pyro.sample("mu", dist.Normal(0.0, 1.0)), model=model).run(
        7, batches=batches, progress=False
    )
    once = [(X[:4].tolist(), 2.0), (X[4:7].tolist(), 1.0), (X[7:].tolist(), 1.0)]
    assert seen == [*once, *once, once[0]]


def test_loader_goes_on_bit_for_bit_after_whole_passes():
    def loader() -> DataLoader:
        kept = torch.Generator(device=X.device)
        return DataLoader(TensorDataset(X), batch_size=2, shuffle=True, generator=kept.manual_seed(3))

    whole = make().run(16, batches=loader(), progress=False).losses
    svi, batches = make(), loader()
    parts = [svi.run(8, batches=batches, progress=False).losses for _ in range(2)]
    assert torch.equal(whole, torch.cat(parts))


def test_batches_that_run_out():
    svi = make()
    with pytest.raises(ValueError, match="no batch, or no more"):
        svi.run(5, batches=iter([X, X, X]), progress=False)
    assert len(svi.result.losses) == 3
    with pytest.raises(ValueError, match="no batch, or no more"):
        svi.run(5, batches=[], progress=False)


# ---------------------------------------------------------------- ends


def test_callback_sees_every_step_and_may_end_the_run():
    seen = []

    def callback(step: int, loss: float) -> bool:
        seen.append((step, loss))
        return step == 4

    result = make().run(9, X, progress=False, callback=callback)
    assert seen == list(enumerate(result.losses.tolist(), 1)) and len(seen) == 4
    assert not result.interrupted


class Scripted(ShortRunSVI):
    """Losses that are known; what is no number is raised."""

    def __init__(self, losses) -> None:
        super().__init__(shared, shared, pyro.optim.SGD({"lr": 1.0}), Trace_ELBO())
        self.script = iter(losses)

    def step(self, *args, **kwargs):
        loss = next(self.script)
        if isinstance(loss, BaseException):
            raise loss
        return float(loss)


def test_interrupt_returns_what_was_done():
    result = Scripted([*range(30), KeyboardInterrupt()]).run(100, progress=False)
    assert result.interrupted and result.losses.tolist() == list(range(30))
    assert "30 steps in" in repr(result) and "interrupted" in repr(result)


def test_other_exceptions_keep_what_was_done():
    svi = Scripted([1, 2, OSError("the disk")])
    with pytest.raises(OSError, match="the disk"):
        svi.run(100, progress=False)
    assert svi.result.losses.tolist() == [1.0, 2.0]


def test_a_failed_step_leaves_no_gradient():
    def loss(model, guide, *args):
        pyro.param("w", torch.tensor(1.0))
        guide(*args)
        for value in pyro.get_param_store()._params.values():
            value.sum().backward()
        raise KeyboardInterrupt

    svi = make(loss)
    assert len(svi.run(3, X, progress=False).losses) == 0
    assert all(not p.grad.any() for p in pyro.get_param_store()._params.values())


def test_nonfinite_losses_move_nothing_and_are_counted():
    weight = iter([1.0, math.nan, math.inf, 1.0])

    def loss(model, guide, x):
        mu = pyro.param("mu", torch.tensor(0.5))
        return mu.square() * next(weight)

    after = []
    svi = make(loss)
    result = svi.run(4, X, progress=False, callback=lambda *_: after.append(parameters()["mu"].item()))
    assert result.num_nonfinite == 2 and "2 steps were not finite" in repr(result)
    assert after[0] == after[1] == after[2] > after[3]
    assert math.isfinite(result.loss)


def test_many_nonfinite_losses_end_the_run():
    few = [math.nan] * (MAX_NONFINITE - 1)
    assert Scripted([*few, 1.0, *few, 1.0]).run(2 * MAX_NONFINITE, progress=False).num_nonfinite == len(few) * 2
    svi = Scripted([5.0, *few, math.inf, 1.0])
    with pytest.raises(RuntimeError, match=f"inf at step {MAX_NONFINITE + 1} .* No parameter moved since step 1"):
        svi.run(100, progress=False)
    assert svi.result.num_nonfinite == MAX_NONFINITE and svi.result.losses[0] == 5.0


def test_goes_on_in_the_same_process():
    whole = make(guide=short_run).run(20, X, progress=False).losses
    svi = make(guide=short_run)
    assert torch.equal(whole, torch.cat([svi.run(10, X, progress=False).losses for _ in range(2)]))


@pytest.mark.parametrize("guide", [short_run, AutoNormal])
def test_goes_on_from_a_file_bit_for_bit(guide, tmp_path):
    whole = make(guide=guide).run(200, X, progress=False).losses
    svi = make(guide=guide)
    first = svi.run(100, X, progress=False).losses
    save_state(tmp_path / "run.pt", guide=svi.guide, optim=svi.optim)
    svi = make(guide=guide)
    svi.guide(X)  # creates its parameters
    load_state(tmp_path / "run.pt", guide=svi.guide, optim=svi.optim)
    assert torch.equal(whole, torch.cat([first, svi.run(100, X, progress=False).losses]))


# ---------------------------------------------------------------- the verdict


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
    """About 15 % at a correlation of .9 in windows of 250."""
    assert 0.08 < 1 - rate(250, correlation=0.9) < 0.22


@pytest.mark.parametrize("drift, low, high", [(2.0, 0.4, 0.7), (3.0, 0.12, 0.28), (4.0, 0.0, 0.07), (8.0, 0.0, 0.0)])
def test_misses(drift, low, high):
    """Of a drift by 2, 3, 4 and 8 standard errors in a window: 1 in 2, 1 in 5, 1 in 30, none."""
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


# ---------------------------------------------------------------- what a user sees


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


def test_progress_bar_has_the_smoothed_loss(capsys):
    assert make().run(3, X, progress=False).losses.shape == (3,)
    assert capsys.readouterr().err == ""
    Scripted([4.0, 2.0, math.nan]).run(3)
    shown = capsys.readouterr().err
    assert "3/3" in shown and "loss 3" in shown


BAD = {
    "num_steps must be": {"num_steps": 0},
    "num_steps must": {"num_steps": 2.0},
    "batches are the arguments": {"args": (X,), "batches": [X]},
    "batches must be a DataLoader": {"batches": X},
    "got a int": {"batches": 3},
    "window must be 10 steps": {"num_steps": 100, "window": 5},
    "two windows no more than": {"num_steps": 100, "window": 51},
    "window must be an integer": {"window": True},
    "num_steps=99 is too few": {"num_steps": 99, "stop_when_converged": True},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    options = {"num_steps": 10, "args": (), "progress": False, **BAD[message]}
    svi = Scripted([])
    with pytest.raises(ValueError, match=message):
        svi.run(options.pop("num_steps"), *options.pop("args"), **options)
    assert svi.result is None


def test_other_optimisers_are_refused_as_by_pyro():
    with pytest.raises(ValueError, match="PyroOptim"):
        make(optim=torch.optim.Adam([torch.zeros(1, requires_grad=True)]))


def test_result_is_kept():
    svi = make()
    result = svi.run(2, X, progress=False)
    assert isinstance(result, FitResult) and svi.result is result
