"""A saved run goes on bit for bit; a file is whole whenever the process dies; what does not fit changes nothing."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import random
import signal
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

from pyro_shortrun import (
    Annealed,
    EnergyELBO,
    Langevin,
    Persistent,
    Prior,
    ShortRunGuide,
    ShortRunLangevin,
    StepSize,
    VectorizedMCMC,
    energy_prior,
    load_state,
    save_state,
    to_arviz,
)
from pyro_shortrun.io import stream_posterior, streaming
from pyro_shortrun.io.files import replacing
from pyro_shortrun.starts import Replay

X = torch.tensor([[0.5, -1.0], [1.5, 0.2], [-0.3, 0.8]], dtype=torch.float64)


class Energy(torch.nn.Module):
    """Quadratic, with a learned curvature."""

    def __init__(self) -> None:
        super().__init__()
        self.curvature = torch.nn.Parameter(torch.tensor(0.1, dtype=torch.float64))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.curvature * z.square().sum(-1)


class Run:
    """Everything that a training run with an energy prior, its replay buffer and a short-run guide consists of."""

    def __init__(self, optimiser: str, start: object) -> None:
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        self.energy, self.decoder = Energy(), torch.nn.Linear(2, 2).double()
        self.buffer, self.optimiser = Replay(50, 0.1), optimisers[optimiser]()
        how = {"start": start} if start is not None else {"objective": Annealed()}
        self.guide = ShortRunGuide(
            self.model, num_steps=3, dynamics=Langevin(StepSize(0.1)), **{"start": Prior(), **how}
        )
        loss = EnergyELBO(Trace_ELBO(), num_steps=3, step_size=0.1, start=self.buffer)
        self.svi = SVI(self.model, self.guide, self.optimiser, loss)
        self.guide.setup(X)

    def model(self, x: torch.Tensor) -> None:
        pyro.module("energy", self.energy)
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
            energy_prior("ebm", self.energy, z)
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    @property
    def parts(self) -> dict:
        names = ("guide", "energy", "decoder", "buffer", "optimiser")
        return {name: getattr(self, name) for name in names}

    def steps(self, count: int) -> list[float]:
        return [self.svi.step(X) for _ in range(count)]


optimisers = {
    "adam": lambda: pyro.optim.Adam({"lr": 0.01}),
    "clipped": lambda: pyro.optim.ClippedAdam({"lr": 0.01, "lrd": 0.99}),
    "scheduled": lambda: pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.01}, "gamma": 0.9}
    ),
}


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == b


@pytest.mark.parametrize("optimiser", optimisers)
def test_a_run_goes_on_bit_for_bit(tmp_path, optimiser):
    run = Run(optimiser, None)
    run.steps(3)
    save_state(tmp_path / "run.pt", **run.parts, epoch=3)
    wanted = run.steps(4)
    state = {k: copy.deepcopy(v.state_dict()) for k, v in run.parts.items() if k != "optimiser"}

    fresh = Run(optimiser, None)
    assert load_state(tmp_path / "run.pt", **fresh.parts) == {"epoch": 3}
    assert fresh.steps(4) == wanted
    assert all(same(fresh.parts[k].state_dict(), state[k]) for k in state)


def test_persistent_chains_go_on(tmp_path):
    run = Run("adam", Persistent())
    run.steps(3)
    save_state(tmp_path / "run.pt", **run.parts)
    wanted = run.steps(3)
    fresh = Run("adam", Persistent())
    load_state(tmp_path / "run.pt", **fresh.parts)
    assert fresh.steps(3) == wanted


def test_a_live_run_goes_back(tmp_path):
    """Optimisers that were stepped already take their state at once."""
    run = Run("adam", None)
    run.steps(2)
    save_state(tmp_path / "run.pt", **run.parts)
    wanted = run.steps(3)
    load_state(tmp_path / "run.pt", **run.parts)
    assert run.steps(3) == wanted


def test_random_states_of_all_generators(tmp_path):
    save_state(tmp_path / "r.pt")
    wanted = torch.rand(3), random.random(), np.random.rand(3)
    load_state(tmp_path / "r.pt")
    got = torch.rand(3), random.random(), np.random.rand(3)
    assert torch.equal(got[0], wanted[0]) and got[1] == wanted[1] and (got[2] == wanted[2]).all()


def test_a_generator_of_ones_own(tmp_path):
    mine = torch.Generator().manual_seed(4)
    save_state(tmp_path / "g.pt", mine=mine)
    wanted = torch.rand(3, generator=mine)
    load_state(tmp_path / "g.pt", mine=mine)
    assert torch.equal(torch.rand(3, generator=mine), wanted)


def test_parameter_store(tmp_path):
    pyro.clear_param_store()
    pyro.param("scale", torch.tensor(2.0), constraint=dist.constraints.positive)
    save_state(tmp_path / "s.pt", store=pyro.get_param_store())
    pyro.get_param_store()["scale"] = torch.tensor(5.0)
    live = pyro.get_param_store()._params["scale"]
    load_state(tmp_path / "s.pt", store=pyro.get_param_store())
    assert pyro.param("scale").item() == pytest.approx(2.0)
    assert pyro.get_param_store()._params["scale"] is live
    pyro.clear_param_store()
    with pytest.raises(ValueError, match="scale"):
        load_state(tmp_path / "s.pt", store=pyro.get_param_store())


def test_a_sampler_resumes(tmp_path):
    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))

    def sampler(num_samples: int) -> VectorizedMCMC:
        kernel = ShortRunLangevin(model, 2, adjust=True)
        return VectorizedMCMC(kernel, num_samples, 5, num_chains=3, disable_progbar=True)

    pyro.set_rng_seed(0)
    whole = sampler(6)
    whole.run()
    pyro.set_rng_seed(0)
    part = sampler(3)
    part.run()
    save_state(tmp_path / "m.pt", mcmc=part)
    rest = sampler(6)
    load_state(tmp_path / "m.pt", mcmc=rest)
    save_state(tmp_path / "n.pt", mcmc=rest)  # before it went on
    load_state(tmp_path / "n.pt", mcmc=rest)
    rest.run()
    assert torch.equal(rest.get_samples()["z"], whole.get_samples()["z"])


def normal(size: int = 2, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Callable:
    return lambda: pyro.sample("z", dist.Normal(torch.zeros(size, dtype=dtype), scale).to_event(1))


@pytest.mark.parametrize(
    ("model", "num_steps", "message"),
    [
        (normal(), 3, "of 2 adjusted steps .* this one of 3 adjusted steps"),
        (normal(3), 2, "another shape"),
        (normal(scale=2.0), 2, "another log density"),
        (normal(dtype=torch.float32), 2, "are torch.float64, this model's latents torch.float32"),
    ],
)
def test_a_sampler_of_another_kernel_or_model(model, num_steps, message):
    def sampler(model: Callable, num_steps: int) -> VectorizedMCMC:
        kernel = ShortRunLangevin(model, num_steps, adjust=True)
        return VectorizedMCMC(kernel, 2, 2, num_chains=3, disable_progbar=True)

    done, other = sampler(normal(), 2), sampler(model, num_steps)
    done.run()
    other.load_state_dict(done.state_dict())
    with pytest.raises(ValueError, match=message):
        other.run()


# ---------------------------------------------------------------- what does not fit


def test_what_does_not_fit_changes_nothing(tmp_path):
    first, second = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    save_state(tmp_path / "a.pt", first=first, second=second)
    other, wide = torch.nn.Linear(2, 1), torch.nn.Linear(3, 1)
    before = copy.deepcopy(other.state_dict()), copy.deepcopy(wide.state_dict())
    rng = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"'second' .* does not fit this Linear \(nothing was changed\).*weight"):
        load_state(tmp_path / "a.pt", first=other, second=wide)
    assert same(other.state_dict(), before[0]) and same(wide.state_dict(), before[1])
    assert torch.equal(rng, torch.get_rng_state())


def test_an_interrupt_changes_nothing(tmp_path, monkeypatch):
    first, second = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    save_state(tmp_path / "a.pt", first=first, second=second)
    other = torch.nn.Linear(2, 1)
    before = copy.deepcopy(other.state_dict())

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(second, "load_state_dict", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_state(tmp_path / "a.pt", first=other, second=second)
    assert same(other.state_dict(), before)


def test_another_dtype_is_named(tmp_path):
    """torch would round what it reads, and the run would not go on bit for bit."""
    save_state(tmp_path / "a.pt", net=torch.nn.Linear(2, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"'net' .*'weight' is torch.float32, saved torch.float64"):
        load_state(tmp_path / "a.pt", net=torch.nn.Linear(2, 1, dtype=torch.float32))
    pyro.clear_param_store()
    pyro.param("scale", torch.tensor(2.0, dtype=torch.float64))
    save_state(tmp_path / "s.pt", store=pyro.get_param_store())
    pyro.clear_param_store()
    pyro.param("scale", torch.tensor(2.0, dtype=torch.float32))
    with pytest.raises(ValueError, match=r"'scale' is torch.float32, saved torch.float64"):
        load_state(tmp_path / "s.pt", store=pyro.get_param_store())


def test_an_optimiser_of_parameters_without_names_is_refused(tmp_path):
    """All their states would be saved under one name."""
    run = Run("adam", None)
    run.steps(1)
    pyro.clear_param_store()
    with pytest.raises(ValueError, match="module_local_params.*torch.optim"):
        save_state(tmp_path / "a.pt", optimiser=run.optimiser)
    assert not list(tmp_path.iterdir())


def test_the_guide_must_be_set_up(tmp_path):
    run = Run("adam", None)
    save_state(tmp_path / "g.pt", guide=run.guide)
    with pytest.raises(ValueError, match=r"'guide'.*guide\.setup"):
        load_state(tmp_path / "g.pt", guide=ShortRunGuide(run.model, num_steps=3, start=Prior()))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, r"\['net'\] too"),
        ({"net": torch.nn.Linear(2, 1), "more": torch.nn.Linear(2, 1)}, r"no state of \['more'\]"),
        ({"net": torch.nn.Bilinear(2, 1, 1)}, "'net' .* is a Linear, got a Bilinear"),
    ],
)
def test_parts_and_names_must_agree(tmp_path, parts, message):
    save_state(tmp_path / "a.pt", net=torch.nn.Linear(2, 1))
    with pytest.raises(ValueError, match=message):
        load_state(tmp_path / "a.pt", **parts)


def test_newer_and_foreign_files(tmp_path):
    path = tmp_path / "a.pt"
    save_state(path)
    content = torch.load(path, weights_only=True)
    torch.save({**content, "format": 99}, path)
    with pytest.raises(ValueError, match="format 99.*update"):
        load_state(path)
    for foreign in ({"weight": torch.zeros(1)}, {"format": 1}, {"format": "new"}):
        torch.save(foreign, path)
        with pytest.raises(ValueError, match="no file of save_state"):
            load_state(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="damaged"):
        load_state(path)
    with pytest.raises(FileNotFoundError):
        load_state(tmp_path / "absent.pt")


def test_only_plain_values(tmp_path):
    with pytest.raises(TypeError, match=r"settings\['act'\] is a function"):
        save_state(tmp_path / "a.pt", settings={"act": torch.relu, "width": 3} | {"act": lambda x: x})
    assert not list(tmp_path.iterdir())
    values = {"history": [1.0, 2.0], "best": (3, None), "best_x": torch.ones(2), "np": np.arange(3), "n": np.float64(2)}
    save_state(tmp_path / "a.pt", **values)
    found = load_state(tmp_path / "a.pt")
    assert found["history"] == [1.0, 2.0] and found["best"] == (3, None) and found["np"].tolist() == [0, 1, 2]


def test_a_row_of_a_table_is_saved_alone(tmp_path):
    save_state(tmp_path / "a.pt", row=torch.zeros(1000, 1000)[3], twice=torch.ones(1).expand(2))
    assert (tmp_path / "a.pt").stat().st_size < 50_000
    assert load_state(tmp_path / "a.pt")["twice"].add_(1).tolist() == [2, 2]


# ---------------------------------------------------------------- death at any moment


def save_for_ever(path: str, begin: int) -> None:
    net, count = torch.nn.Linear(400, 400), begin
    while True:
        count += 1
        with torch.no_grad():
            net.weight.fill_(count)
            net.bias.fill_(count)
        save_state(path, net=net, count=count)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_twenty_kills_leave_a_whole_file(tmp_path):
    path, net, counts = tmp_path / "run.pt", torch.nn.Linear(400, 400), [0]
    save_state(path, net=net, count=0)
    for kill in range(20):
        process = multiprocessing.get_context("fork").Process(target=save_for_ever, args=(path, counts[-1]))
        process.start()
        time.sleep(0.1 * random.random())
        os.kill(process.pid, signal.SIGKILL if kill % 2 else signal.SIGTERM)
        process.join()
        counts.append(load_state(path, net=net)["count"])
        assert counts[-1] == 0 or ((net.weight == counts[-1]).all() and (net.bias == counts[-1]).all())
    assert counts == sorted(counts) and counts[-1] > 0
    save_state(path, net=net)  # removes what the dead have left
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


def test_two_processes_that_save_to_one_path(tmp_path):
    """Neither writes into the other's file: the last to end wins, whole."""
    path = tmp_path / "run.pt"
    with replacing(path) as first, replacing(path) as second:
        first.write_text("first, longer")
        second.write_text("second")
    assert path.read_text() == "first, longer" and len(list(tmp_path.iterdir())) == 1


def test_the_file_of_a_process_that_is_alive_stays(tmp_path):
    with replacing(tmp_path / "run.pt") as scratch:
        scratch.touch()
        save_state(tmp_path / "run.pt")
        assert scratch.exists()


def test_files_of_other_machines_go_when_they_are_old(tmp_path):
    """Whether their processes are alive cannot be known."""
    new, old = (tmp_path / f".run.pt.{name}.part" for name in ("elsewhere-1-ab", "cd"))
    new.touch(), old.touch()
    os.utime(old, (0, 0))
    save_state(tmp_path / "run.pt")
    assert new.exists() and not old.exists()


# ---------------------------------------------------------------- posteriors batch by batch


def rows(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def parts_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.stem != "stream")


def draws_of(paths: list) -> list:
    return [az.from_netcdf(p)["posterior"]["z"].values for p in paths]


def test_an_interrupted_stream_ends_with_the_same_draws(tmp_path):
    x = torch.arange(8, dtype=torch.float64)
    guide = ShortRunGuide(rows, num_steps=2, start=Prior()).setup(x[:3])
    options = {"num_samples": 4, "num_chains": 2, "num_prior": 0}
    whole = draws_of(stream_posterior(guide, x.split(3), tmp_path / "whole", **options))
    assert [d.shape for d in whole] == [(2, 4, 3), (2, 4, 3), (2, 4, 2)]

    def interrupted():
        yield from x.split(3)[:2]
        raise KeyboardInterrupt

    before = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        stream_posterior(guide, interrupted(), tmp_path / "cut", **options)
    assert torch.equal(before, torch.get_rng_state())
    (tmp_path / "cut" / "part-00001.nc").unlink()
    again = draws_of(stream_posterior(guide, x.split(3), tmp_path / "cut", **options))
    assert all((a == b).all() for a, b in zip(again, whole, strict=True))
    assert parts_in(tmp_path / "cut") == [f"part-0000{i}.nc" for i in range(3)]


OPTIONS = {"num_samples": 4, "num_chains": 2, "num_prior": 0}


def test_any_number_of_ranks_draws_the_same(tmp_path):
    x = torch.arange(10, dtype=torch.float64).split(2)
    guide = ShortRunGuide(rows, num_steps=2, start=Prior()).setup(x[0])
    whole = stream_posterior(guide, x, tmp_path / "whole", seed=7, **OPTIONS)
    for batches in (x, iter(x)):  # with items by index, and without
        folder = tmp_path / type(batches).__name__
        second = stream_posterior(guide, batches, folder, seed=7, rank=1, ranks=2, **OPTIONS)
        assert [p.name for p in second] == ["part-00001.nc", "part-00003.nc"]
        for rank in range(3):  # the rest, by another number of ranks
            stream_posterior(guide, x, folder, seed=7, rank=rank, ranks=3, **OPTIONS)
        assert parts_in(folder) == [p.name for p in whole]
        assert all((a == b).all() for a, b in zip(draws_of(sorted(folder.glob("*.nc"))), draws_of(whole), strict=True))
    with pytest.raises(ValueError, match="rank must be"):
        stream_posterior(guide, x, tmp_path, rank=2, ranks=2)


def test_a_folder_is_of_one_job(tmp_path):
    """Parts that are there are not drawn again, so a job that would draw others is refused."""
    x = torch.arange(6, dtype=torch.float64)
    guide = ShortRunGuide(rows, num_steps=2, start=Prior()).setup(x[:3])
    stream_posterior(guide, x.split(3), tmp_path, **OPTIONS)
    stream_posterior(guide, iter(x.split(3)), tmp_path, **OPTIONS)
    with pytest.raises(ValueError, match="another seed"):
        stream_posterior(guide, x.split(3), tmp_path, seed=1, **OPTIONS)
    with pytest.raises(ValueError, match="another number of batches"):
        stream_posterior(guide, x.split(2), tmp_path, **OPTIONS)
    with pytest.raises(ValueError, match="another num_chains"):
        stream_posterior(guide, x.split(3), tmp_path, num_samples=4, num_prior=0)
    with torch.no_grad():
        next(guide.parameters()).add_(0.1)
    with pytest.raises(ValueError, match="another parameter '.*: give this one a folder of its own"):
        stream_posterior(guide, x.split(3), tmp_path, **OPTIONS)


class Disk(Sequence):
    """Batches that are made when they are asked for; ``alive`` counts those still held by anyone at that moment."""

    def __init__(self) -> None:
        self.made: list[weakref.ref] = []
        self.alive: list[int] = []

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> torch.Tensor:
        gc.collect()
        self.alive.append(sum(made() is not None for made in self.made))
        batch = torch.full((3,), float(i), dtype=torch.float64)
        self.made.append(weakref.ref(batch))
        return batch


def test_a_stream_holds_one_batch(tmp_path, monkeypatch):
    """Neither batches nor draws of earlier parts are kept, and what needs no drawing is not read."""
    exported, disk = [], Disk()

    def export(*args, **kwargs):
        gc.collect()
        assert all(found() is None for found in exported)
        found = to_arviz(*args, **kwargs)
        exported.append(weakref.ref(found))
        return found

    monkeypatch.setattr(streaming, "to_arviz", export)
    guide = ShortRunGuide(rows, num_steps=2, start=Prior()).setup(torch.zeros(3, dtype=torch.float64))
    for rank in range(2):
        stream_posterior(guide, disk, tmp_path, rank=rank, ranks=2, **OPTIONS)
    assert len(exported) == 6 and max(disk.alive) == 0
    stream_posterior(guide, disk, tmp_path, **OPTIONS)
    assert len(disk.made) == 6
    disk.alive.clear()
    stream_posterior(guide, (disk[i] for i in range(6)), tmp_path / "iterated", **OPTIONS)
    assert max(disk.alive) <= 1  # the batch before, in the loop over the iterator


def test_batches_are_tensors_or_tuples(tmp_path):
    guide = ShortRunGuide(rows, num_steps=2, start=Prior())
    with pytest.raises(TypeError, match="batch 0 is a dict"):
        stream_posterior(guide, [{"x": X}], tmp_path)
    with pytest.raises(ValueError, match=r"give x\.split"):
        stream_posterior(guide, X, tmp_path)
