"""Runs that are interrupted, by Ctrl-C, SIGTERM or lack of memory, anywhere: what they change is as before or whole."""

from __future__ import annotations

import random
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pyro
import pytest
import torch
from faulty import RUNS, Chains, Run, Teaching, same
from torch import Tensor

import pyro_shortrun
from pyro_shortrun import ShortRunLangevin, VectorizedMCMC
from pyro_shortrun.mcmc.chains import Session

PACKAGE = Path(pyro_shortrun.__file__).parent
# Whose lines are interrupted: what keeps state, not what restores the state of handlers.
KEEPERS = ["runs", "mcmc", "amortized", "teaching", "starts/kept.py", "energy/elbo.py", "guides/short_run.py"]
KEPT = PACKAGE / "starts/kept.py"
FILES = {str(f) for name in KEEPERS for f in ([PACKAGE / name] if "." in name else (PACKAGE / name).glob("*.py"))}
assert all(Path(f).exists() for f in FILES)


class Alarm:
    """Raises when the package comes to its ``moment``-th line."""

    def __init__(self, moment: float, fault: type[BaseException] = KeyboardInterrupt) -> None:
        self.moment, self.fault, self.lines = moment, fault, 0

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in FILES:
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.moment:
                raise self.fault
        return self

    def __enter__(self) -> Alarm:
        self.before = sys.gettrace()
        sys.settrace(self)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.settrace(self.before)


@contextmanager
def signals_raise() -> Iterator[None]:
    """SIGTERM as a job that wants to clean up sets it; SIGINT as Python does, but not for a job in the background."""

    def stop(*_: Any) -> None:
        raise SystemExit(143)

    handlers = {signal.SIGTERM: stop, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


FAULTS = {
    "Ctrl-C": (lambda: signal.raise_signal(signal.SIGINT), KeyboardInterrupt),
    "SIGTERM": (lambda: signal.raise_signal(signal.SIGTERM), SystemExit),
    "memory": (lambda: (_ for _ in ()).throw(MemoryError), MemoryError),
}


def clean() -> bool:
    return torch.is_grad_enabled() and not pyro.poutine.runtime._PYRO_STACK


def check_state(state: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> None:
    """Every part is as it was or as the whole step leaves it."""
    for name, value in state.items():
        assert name not in before or same(value, before[name]) or same(value, after[name]), name


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("fault", FAULTS)
def test_an_interrupt_in_the_model_leaves_no_trace(kind, fault):
    """Whenever the model runs: what was interrupted is as before, but for random numbers, and goes on."""
    run, x = RUNS[kind](), torch.randn(4, 3)
    run.step(x)
    left = [0]
    act, error = FAULTS[fault]

    def trouble() -> None:
        left[0] -= 1
        if left[0] == 0:
            act()

    for runs in (1, 2, 4):
        before = run.state()
        left[0], run.net.trouble = runs, trouble
        with signals_raise(), pytest.raises(error):
            run.step(x)
        run.net.trouble = lambda: None
        if kind != "teaching" or runs == 1:  # the first model run of a step is the sampler's, the energy learns next
            assert all(same(v, run.state()[k]) for k, v in before.items())
        assert clean()
        assert run.step(x).isfinite().all()


def learned(run: Run, x: Tensor, alarm: Alarm) -> dict[str, Any]:
    """The state after two steps, the second of which may be interrupted."""
    run.step(x)
    pyro.set_rng_seed(1)
    with suppress(KeyboardInterrupt), alarm:
        run.step(x)
    return run.state()


def fresh(kind: str) -> Run:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    return RUNS[kind]()


@pytest.mark.parametrize("kind", ["guide", "encoder", "energy", "teaching"])
def test_a_step_that_is_interrupted_anywhere(kind):
    x = torch.linspace(-1, 1, 12).reshape(4, 3)
    run = fresh(kind)
    run.step(x)
    before = run.state()
    whole = Alarm(float("inf"))
    after = learned(fresh(kind), x, whole)
    for moment in random.Random(0).sample(range(1, whole.lines), 8):
        run = fresh(kind)
        check_state(learned(run, x, Alarm(moment)), before, after)
        assert clean()
        assert run.step(x).isfinite().all()


def test_a_replay_buffer_that_is_interrupted_while_it_is_written():
    """Its states are written before they are counted."""
    x = torch.randn(4, 3)
    run = Teaching()
    run.step(x)
    source = KEPT.read_text().splitlines()
    lines = [n for n, line in enumerate(source, 1) if "self.written += " in line]
    written = int(run.replay.written)

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename != str(KEPT):
            return None
        if event == "line" and frame.f_lineno in lines:
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        with pytest.raises(KeyboardInterrupt):
            run.step(x)
    finally:
        sys.settrace(None)
    assert int(run.replay.written) == written and run.replay.store.isfinite().all()
    run.step(x)
    assert int(run.replay.written) == written + 4


@pytest.mark.parametrize(
    "options", [{"adjust": True}, {"persistent": True}, {}], ids=["adjusted", "chain", "short runs"]
)
def test_chains_that_are_interrupted_anywhere(options):
    """Draws, statistics and the count of draws agree, and a saved run goes on to its end."""
    net, x = Chains().net, torch.randn(4, 3)

    def chains() -> VectorizedMCMC:
        pyro.set_rng_seed(1)
        return VectorizedMCMC(ShortRunLangevin(net.model, 2, **options), 3, 2, num_chains=2, disable_progbar=True)

    whole = Alarm(float("inf"))
    with whole:
        chains().run(x)
    for moment in random.Random(0).sample(range(whole.lines // 3, whole.lines), 6):
        mcmc = chains()
        with suppress(KeyboardInterrupt), Alarm(moment):
            mcmc.run(x)
        assert clean()
        if mcmc._session is not None and mcmc._rng:
            agree(mcmc)
            longer = chains()
            longer.load_state_dict(mcmc.state_dict())
            longer.run(x)
            assert longer.get_samples(group_by_chain=True)["z"].shape == (2, 3, 4, 2)
    mcmc.run(x)
    assert mcmc.get_samples(group_by_chain=True)["z"].shape == (2, 3, 4, 2)


def agree(mcmc: VectorizedMCMC) -> None:
    saved = mcmc.state_dict()
    kept = max(saved["session"]["done"] - mcmc.warmup_steps, 0)
    assert saved["states"].shape[1] == kept == mcmc.sample_stats["lp"].shape[1]
    assert saved["states"].isfinite().all()


def test_a_draw_that_was_not_kept_is_not_counted(monkeypatch):
    """Between a draw and its record: as where a warning is an error."""
    net = Chains().net
    kernel, looks = ShortRunLangevin(net.model, 2, adjust=True), dict(hook_fn=lambda *_: None)  # draw by draw
    mcmc = VectorizedMCMC(kernel, 4, 2, num_chains=2, disable_progbar=True, **looks)
    tell, told = Session._warn_once, []

    def interrupted(self: Session, *args: Any) -> None:
        tell(self, *args)
        told.append(None)
        if len(told) == 4:
            raise UserWarning

    monkeypatch.setattr(Session, "_warn_once", interrupted)
    with pytest.raises(UserWarning):
        mcmc.run(torch.randn(4, 3))
    assert mcmc.unconstrained().shape[1] == 1
    agree(mcmc)


def test_modes_of_an_energy_are_restored():
    run = Teaching()
    run.energy.train()
    with warnings.catch_warnings(), pytest.raises(KeyboardInterrupt):
        run.energy.fault = lambda x: (_ for _ in ()).throw(KeyboardInterrupt)
        run.step(torch.randn(4, 3))
    assert run.energy.training
