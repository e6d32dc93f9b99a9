"""ShortRunSVI: the steps of Pyro bit for bit, batches, and what a run gives however it ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, ReweightedWakeSleep, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from scripted import Scripted
from small import data, local, mixture_rows, shared
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pyro_shortrun import Langevin, Prior, ShortRunELBO, ShortRunGuide, ShortRunSVI, StepSize, load_state, save_state
from pyro_shortrun.guides import FitResult
from pyro_shortrun.guides.fit import MAX_NONFINITE


def x() -> Tensor:
    return data(8)


def short_run(model: Callable) -> ShortRunGuide:
    return ShortRunGuide(model, num_steps=2, dynamics=Langevin(StepSize(0.05)), start=Prior())


def continuous(model: Callable) -> AutoNormal:
    return AutoNormal(poutine.block(model, hide=["k"]))


def make(loss=None, guide=AutoNormal, model=shared, optim=None, kind: type = ShortRunSVI) -> SVI:
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    return kind(model, guide(model), optim or pyro.optim.Adam({"lr": 0.02}), loss or Trace_ELBO())


def parameters() -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a and a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------- steps


def enumerated() -> TraceEnum_ELBO:
    return TraceEnum_ELBO(max_plate_nesting=1)


def renyi() -> RenyiELBO:
    return RenyiELBO(alpha=0.5, num_particles=2)


LOSSES = [
    (Trace_ELBO, short_run, shared),
    (ShortRunELBO, short_run, shared),
    (renyi, short_run, shared),
    (enumerated, short_run, mixture_rows),
    (Trace_ELBO, AutoNormal, shared),
    (TraceMeanField_ELBO, AutoNormal, shared),
    (renyi, AutoNormal, shared),
    (enumerated, continuous, mixture_rows),
]


@pytest.mark.parametrize("loss, guide, model", LOSSES, ids=lambda v: v.__name__)
def test_run_is_steps_of_pyro(loss, guide, model):
    plain = make(loss(), guide, model, kind=SVI)
    expected = [plain.step(x()) for _ in range(12)]
    after = parameters()
    result = make(loss(), guide, model).run(12, x(), progress=False)
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
    expected = [plain.step(x()) for _ in range(5)]
    assert make(optim=OPTIMISERS[name]()).run(5, x(), progress=False).losses.tolist() == expected


def test_schedulers_are_stepped_by_the_callback():
    def rates(optim) -> set[float]:
        return {s.get_last_lr()[0] for s in optim.optim_objs.values()}

    optim = OPTIMISERS["scheduler"]()
    make(optim=optim).run(4, x(), progress=False)
    assert rates(optim) == {0.05}
    optim = OPTIMISERS["scheduler"]()
    step = lambda done, loss: optim.step() if done % 2 == 0 else None  # noqa: E731
    make(optim=optim).run(4, x(), progress=False, callback=step)
    assert rates(optim) == {0.0125}


def test_several_losses_are_summed():
    def wake() -> ReweightedWakeSleep:
        return ReweightedWakeSleep(num_particles=2, vectorize_particles=False)

    plain = make(wake(), kind=SVI)
    expected = [sum(plain.step(x())) for _ in range(3)]
    assert make(wake()).run(3, x(), progress=False).losses.tolist() == expected


def test_models_that_subsample_and_keyword_arguments():
    plain = make(guide=short_run, model=local, kind=SVI)
    expected = [plain.step(x(), size=3) for _ in range(4)]
    svi = make(guide=short_run, model=local)
    assert svi.run(4, x(), size=3, progress=False).losses.tolist() == expected


# ---------------------------------------------------------------- batches


def test_batches_cycle():
    seen = []

    def model(x: Tensor, scale: float = 1.0) -> None:
        seen.append((x.tolist(), scale))
        shared(x)

    batches = [(x()[:4], 2.0), [x()[4:7]], x()[7:]]
    make(guide=lambda m: lambda *args: pyro.sample("mu", dist.Normal(0.0, 1.0)), model=model).run(
        7, batches=batches, progress=False
    )
    once = [(x()[:4].tolist(), 2.0), (x()[4:7].tolist(), 1.0), (x()[7:].tolist(), 1.0)]
    assert seen == [*once, *once, once[0]]


class Shuffled:
    """Rows in pairs, in another order in every pass."""

    def __iter__(self) -> Iterator[Tensor]:
        yield from x()[torch.randperm(8)].split(2)


@pytest.mark.parametrize("batches", [Shuffled(), list(torch.arange(8.0).split(3))], ids=["new order", "list"])
def test_batches_go_on_bit_for_bit_after_whole_passes(batches):
    count = 2 * len(list(batches))
    batches = batches if isinstance(batches, Shuffled) else [batch.to(x()) for batch in batches]
    whole = make().run(2 * count, batches=batches, progress=False).losses
    svi = make()
    assert torch.equal(whole, torch.cat([svi.run(count, batches=batches, progress=False).losses for _ in range(2)]))


def test_loaders():
    def steps(loader: DataLoader) -> list[float]:
        svi = make(kind=SVI)
        return [svi.step(*batch) for _ in range(2) for batch in loader]

    loader = DataLoader(TensorDataset(x()), batch_size=3)
    assert make().run(6, batches=loader, progress=False).losses.tolist() == steps(loader)


def test_batches_that_run_out():
    svi = make()
    with pytest.raises(ValueError, match="no batch, or no more"):
        svi.run(5, batches=iter([x(), x(), x()]), progress=False)
    assert len(svi.result.losses) == 3
    with pytest.raises(ValueError, match="no batch, or no more"):
        svi.run(5, batches=[], progress=False)


# ---------------------------------------------------------------- ends


def test_callback_sees_every_step_and_may_end_the_run():
    seen = []

    def callback(step: int, loss: float) -> bool:
        seen.append((step, loss))
        return step == 4

    result = make().run(9, x(), progress=False, callback=callback)
    assert seen == list(enumerate(result.losses.tolist(), 1)) and len(seen) == 4
    assert not result.interrupted
    assert len(make().run(3, x(), progress=False, callback=lambda step, loss: step).losses) == 3  # 1 is not True


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
    assert len(svi.run(3, x(), progress=False).losses) == 0
    assert all(not p.grad.any() for p in pyro.get_param_store()._params.values())


def test_nonfinite_losses_move_nothing_and_are_counted():
    weight = iter([1.0, math.nan, math.inf, 1.0])

    def loss(model, guide, x):
        mu = pyro.param("mu", torch.tensor(0.5))
        return mu.square() * next(weight)

    after = []
    svi = make(loss)
    result = svi.run(4, x(), progress=False, callback=lambda *_: after.append(parameters()["mu"].item()))
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
    whole = make(guide=short_run).run(20, x(), progress=False).losses
    svi = make(guide=short_run)
    assert torch.equal(whole, torch.cat([svi.run(10, x(), progress=False).losses for _ in range(2)]))


@pytest.mark.parametrize("guide", [short_run, AutoNormal])
def test_goes_on_from_a_file_bit_for_bit(guide, tmp_path):
    whole = make(guide=guide).run(200, x(), progress=False).losses
    svi = make(guide=guide)
    first = svi.run(100, x(), progress=False).losses
    save_state(tmp_path / "run.pt", guide=svi.guide, optim=svi.optim)
    svi = make(guide=guide)
    svi.guide(x())  # creates its parameters
    load_state(tmp_path / "run.pt", guide=svi.guide, optim=svi.optim)
    assert torch.equal(whole, torch.cat([first, svi.run(100, x(), progress=False).losses]))


# ---------------------------------------------------------------- what a user sees


def test_progress_bar_has_the_smoothed_loss(capsys):
    assert make().run(3, x(), progress=False).losses.shape == (3,)
    assert capsys.readouterr().err == ""
    Scripted([4.0, 2.0, math.nan]).run(3)
    shown = capsys.readouterr().err
    assert "3/3" in shown and "loss 3" in shown


BAD = {
    "num_steps must be": {"num_steps": 0},
    "num_steps must": {"num_steps": 2.0},
    "batches are the arguments": {"args": (1,), "batches": [1]},
    "batches must be a DataLoader": {"batches": torch.zeros(3)},
    "got a int": {"batches": 3},
    "window must be 10 steps": {"num_steps": 100, "window": 5},
    "two windows no more than": {"num_steps": 100, "window": 51},
    "window must be an integer": {"window": True},
    "num_steps must be 100 at least, got 99": {"num_steps": 99, "stop_when_converged": True},
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
    result = svi.run(2, x(), progress=False)
    assert isinstance(result, FitResult) and svi.result is result
