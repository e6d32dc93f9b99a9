"""Does a long training run leak, or meet more and more non-finite values?

    python examples/benchmarks/soak.py --output soak            # 30 minutes on one core
    python examples/benchmarks/soak.py --compile --minutes 60
    python examples/benchmarks/soak.py --smoke                  # seconds, to see that it runs

A generator of handwritten digits with an energy prior learns by an ``EnergyELBO`` with a replay buffer and a
ShortRunGuide whose step size is tuned, on mini-batches of another size in each step. Some rows are planted: a
factor pulls a latent of theirs over an edge behind which the density is NaN, so that their runs freeze, are counted and
left out. At each one of a hundred marks the state is saved and draws are made from prior and posterior.

Each line of the table is a tenth of the run: resident memory at its end, and its slope in MB per minute since the
first tenth, by least squares on means of the intervals between marks (standard error in parentheses); live Python
objects; per 1000 rows that were planted, those that froze; per 1000 steps, non-finite rows besides (guide and prior
runs); the mean gap of energies, the mean loss per datum, the step size that is tuned, and milliseconds of CPU time of a
step. Then the slopes over the last nine tenths, and over the second half, by steps: of resident memory, of what is
held of it (bytes in use in the C library's heap, if that is glibc: resident memory has pages besides that were used
once), and of the share that froze.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from record import Table, record
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

from pyro_shortrun import (
    Annealed,
    EnergyELBO,
    Langevin,
    ShortRunGuide,
    StepSize,
    energy_prior,
    sample_prior,
    save_state,
)
from pyro_shortrun.starts import Replay

LATENTS, EDGE, PULL = 8, 5.5, 500


def resident() -> float:
    """Megabytes."""
    try:
        import psutil

        return psutil.Process().memory_info().rss / 1e6
    except ImportError:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1.024e-3 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


class _Heap(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = [(name, ctypes.c_size_t) for name in "arena b c blocks mapped d e used free f".split()]


def held() -> float:
    """Megabytes that were asked for and not given back; NaN where the C library does not tell."""
    try:
        tell = ctypes.CDLL("libc.so.6").mallinfo2
    except (OSError, AttributeError):
        return math.nan
    tell.restype = _Heap
    heap = tell()
    return (heap.used + heap.mapped) / 1e6


class Energy(nn.Module):
    """Bounded, so that no length of training makes the tilted prior improper."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(LATENTS, 64), nn.GELU(), nn.Linear(64, 1))

    def forward(self, z: Tensor) -> Tensor:
        return 5 * self.net(z).squeeze(-1).tanh()


class Generator(nn.Module):
    """x | z ~ N(net(z), 0.3^2) with a tilted prior; planted rows are drawn to an edge, and fall over it."""

    def __init__(self, hidden: int, pixels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(LATENTS, hidden), nn.GELU(), nn.Linear(hidden, pixels))
        self.energy = Energy()

    def model(self, x: Tensor, planted: Tensor) -> None:
        pyro.module("net", self.net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENTS), 1.0).to_event(1))
            energy_prior("ebm", self.energy, z)
            pyro.factor("edge", -PULL * torch.where(planted, z[..., 0] + EDGE, 1.0).log())
            pyro.sample("x", dist.Normal(self.net(z), 0.3).to_event(1), obs=x)


@dataclass
class Interval:
    """Sums over the steps between two marks, and what was found at the second."""

    steps: int = 0
    rows: int = 0
    planted: int = 0
    frozen: int = 0
    others: int = 0
    loss: float = 0.0
    gap: float = 0.0
    seconds: float = 0.0
    memory: list[float] = field(default_factory=list)
    minutes: float = 0.0
    objects: int = 0
    held: float = 0.0
    step_size: float = 0.0


class Run:
    """Everything that is trained."""

    def __init__(self, options: argparse.Namespace) -> None:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        self.x = torch.tensor(load_digits().data, dtype=torch.get_default_dtype()) / 16
        self.planted = torch.arange(len(self.x)) % 50 == 0
        self.generator = Generator(options.hidden, self.x.shape[1])
        model = self.generator.model
        objective, step = Annealed(), Langevin(StepSize(0.01, max=0.05))
        self.guide = ShortRunGuide(
            model, num_steps=options.steps, dynamics=step, objective=objective, compile=options.compile
        )
        self.buffer = Replay(2000)
        self.loss = EnergyELBO(Trace_ELBO(), options.steps, 0.05, start=self.buffer, compile=options.compile)
        rate = {"ebm": 1e-4}
        self.optimiser = pyro.optim.Adam(lambda name: {"lr": rate.get(name.split("$$$")[0].split(".")[0], 1e-3)})
        self.svi = SVI(model, self.guide, self.optimiser, self.loss)
        self.sizes = options.sizes

    def step(self, interval: Interval) -> None:
        size = self.sizes[int(torch.randint(len(self.sizes), ()))]
        rows = torch.randint(len(self.x), (size,))
        planted = self.planted[rows]
        begin = time.process_time()
        loss = self.svi.step(self.x[rows], planted)
        interval.seconds += time.process_time() - begin
        frozen = self.guide.info.frozen.flatten()
        interval.steps += 1
        interval.rows += size
        interval.loss += loss
        interval.gap += sum(self.loss.info.gap.values())
        interval.planted += int(planted.sum())
        interval.frozen += int((frozen & planted).sum())
        interval.others += int((frozen & ~planted).sum()) + self.loss.info.excluded
        interval.memory.append(resident())

    def mark(self, interval: Interval, folder: Path, minutes: float) -> None:
        """What a long job does now and then."""
        parts = {"guide": self.guide, "generator": self.generator, "buffer": self.buffer, "optimiser": self.optimiser}
        save_state(folder / "run.pt", **parts)
        args = self.x[1:17], self.planted[1:17]
        self.guide.sample_posterior(*args, num_samples=4)
        sample_prior(self.generator.model, *args, num_samples=4, num_steps=5)
        gc.collect()
        interval.minutes, interval.objects, interval.held = minutes, len(gc.get_objects()), held()
        interval.step_size = float(self.guide.step_sizes())


def soak(run: Run, minutes: float, marks: int) -> Iterator[Interval]:
    """Intervals of one length."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for mark in tqdm(range(1, marks + 1), desc="soak", mininterval=5):
            interval = Interval()
            while not interval.steps or time.perf_counter() - begin < 60 * minutes * mark / marks:
                run.step(interval)
            run.mark(interval, Path(folder), (time.perf_counter() - begin) / 60)
            yield interval


def slope(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Of least squares, and its standard error."""
    if len(x) < 3:
        return math.nan, math.nan
    x, y = x - x.mean(), y - y.mean()
    found = (x @ y) / (x @ x)
    return found, float(np.sqrt(np.square(y - found * x).sum() / (len(x) - 2) / (x @ x)))


def per(found: list[Interval], count: str, of: str) -> float:
    """Thousandths of sums over intervals."""
    return 1000 * sum(getattr(i, count) for i in found) / max(sum(getattr(i, of) for i in found), 1)


def table(found: list[Interval]) -> Table:
    """A line for each tenth."""
    forms = {"minutes": "7.2f", "steps": "7d", "RSS MB": "7.1f", "MB/min": "8.3f", "s.e.": "6.3f", "objects": "8d"}
    forms |= {"planted": "8.0f", "others": "7.2f", "gap": "7.3f", "loss": "7.2f", "step": "7.4f", "CPU ms": "8.1f"}
    lines = Table("Each tenth of the run", forms)
    minutes, memory = np.array([i.minutes for i in found]), np.array([np.mean(i.memory) for i in found])
    tenth = len(found) // 10
    for end in range(tenth, len(found) + 1, tenth):
        part, last = found[end - tenth : end], found[end - 1]
        steps = sum(i.steps for i in part)
        row = [last.minutes, sum(i.steps for i in found[:end]), last.memory[-1]]
        row += [*slope(minutes[tenth:end], memory[tenth:end]), last.objects]
        row += [per(part, "frozen", "planted"), per(part, "others", "steps"), sum(i.gap for i in part) / steps]
        row += [sum(i.loss for i in part) / sum(i.rows for i in part), last.step_size]
        lines.rows.append([*row, 1000 * sum(i.seconds for i in part) / steps])
    return lines


def slopes(found: list[Interval]) -> Table:
    """By thousands of steps, over the last nine tenths and the second half: of memory, what is held, and what froze."""
    forms = {
        "last intervals": "14d",
        "memory MB": "9.3f",
        "s.e.": "6.3f",
        "held MB": "7.4f",
        "se held": "7.4f",
        "drift of frozen": "15.1f",
        "its s.e.": "8.1f",
    }
    lines = Table("Slopes per 1000 steps; frozen of 1000 planted rows", forms)
    for part in (found[len(found) // 10 :], found[len(found) // 2 :]):
        steps = np.cumsum([i.steps for i in part]) / 1000
        memory = slope(steps, np.array([np.mean(i.memory) for i in part]))
        held = slope(steps, np.array([i.held for i in part]))
        frozen = slope(steps, np.array([per([i], "frozen", "planted") for i in part]))
        lines.rows.append([len(part), *memory, *held, *frozen])
    return lines


def draw(found: list[Interval], path: Path) -> None:
    minutes = [i.minutes for i in found]
    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 5), sharex=True, layout="constrained")
    above.plot(minutes, [np.mean(i.memory) for i in found])
    above.set(ylabel="resident memory, MB", ylim=(0, None))
    below.plot(minutes, [per([i], "frozen", "planted") for i in found], label="planted rows that froze, per 1000")
    below.plot(minutes, [per([i], "others", "steps") for i in found], label="others, per 1000 steps")
    below.set(xlabel="minutes", ylabel="non-finite", ylim=(0, None))
    below.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="how long (default: 30)")
    parser.add_argument("--compile", action="store_true", help="compile runs, once for each size of a batch")
    parser.add_argument("--smoke", action="store_true", help="seconds only")
    parser.add_argument(
        "--output", type=Path, default=Path("soak-output"), help="folder for soak.txt, soak.png and results.json"
    )
    options = parser.parse_args()
    options.hidden, options.steps, options.sizes, options.marks = 64, 6, tuple(range(16, 49)), 100
    if options.compile:
        options.sizes = (16, 32, 48)
    if options.smoke:
        options.minutes, options.hidden, options.steps, options.sizes, options.marks = 0.0, 8, 2, (8, 9), 10
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "(?s).*met a non-finite")  # they are planted
    found = list(soak(Run(options), options.minutes, options.marks))
    tables = [table(found), slopes(found)]
    text = "\n\n".join("\n".join(t.lines()) for t in tables)
    print(text)
    record(options.output, tables)
    (options.output / "soak.txt").write_text(text + "\n")
    draw(found, options.output / "soak.png")


if __name__ == "__main__":
    main()
