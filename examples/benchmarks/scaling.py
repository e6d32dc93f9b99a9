"""How cost grows: rows, latents, steps and chains, measured; ranks, as a plan from measured figures of single ranks.

    python examples/benchmarks/scaling.py             # some ten minutes on two cores
    python examples/benchmarks/scaling.py --quick     # some minutes
    python examples/benchmarks/scaling.py --smoke     # seconds, to see that it runs

`growth`: a generator with a hidden layer of 64 units and 64 pixels, float32, one thread. One of rows, latents of a row,
steps K and chains is varied and the others are held. Milliseconds of CPU time (the least of some rounds: other
processes count less than in wall time) and peak memory above what was resident before, in MB: of a step of SVI that
tunes, with the default objective (path density) and annealed; of ``sample_posterior`` for chains. The exponent is the
slope of log time in log size over the upper half of the sizes: 1 is proportional, below 1 fixed costs still count.

`ranks`: the module that ``examples/distributed.py`` trains, under gloo on this machine: milliseconds of an all-reduce
of its gradients, and of 8 bytes.

`plan`: simulated, for networks that are assumed and not measured. With n ranks a step takes
``compute + 2 (n - 1) / n * bytes / bandwidth + 2 (n - 1) * latency`` (a ring; nothing overlaps), where ``compute``
is the measured CPU time of one rank's rows. Weak: every rank has as many rows, whatever n is; efficiency is compute
over the step. Strong: all ranks together have the rows that one rank would have; speed-up is over one rank.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import torch.distributed as torch_distributed
from pyro.infer import SVI, Trace_ELBO
from record import Table, record
from speed import aligned, peak
from torch import Tensor, multiprocessing, nn
from tqdm import tqdm

from pyro_shortrun import Annealed, Langevin, ShortRunGuide, StepSize

sys.path.append(str(Path(__file__).parents[1]))  # for distributed.py
PIXELS = 64


@dataclass(frozen=True)
class Size:
    """Of a problem."""

    rows: int = 256
    latents: int = 8
    steps: int = 10
    chains: int = 1


@dataclass(frozen=True)
class Network:
    """Bytes per second and seconds of a message."""

    name: str
    bandwidth: float
    latency: float

    def all_reduce(self, size: float, ranks: int) -> float:
        """Seconds, by a ring."""
        return 2 * (ranks - 1) / ranks * size / self.bandwidth + 2 * (ranks - 1) * self.latency


@dataclass(frozen=True)
class Budget:
    """Sizes and rounds.

    :param weak: rows of a rank; ``strong``: rows of one rank alone, a power of two times ``max_ranks``.
    """

    rounds: int = 7
    rows: Sequence[int] = (64, 256, 1024, 4096)
    latents: Sequence[int] = (4, 8, 16, 32)
    steps: Sequence[int] = (5, 10, 20, 40)
    chains: Sequence[int] = (1, 4, 16, 64)
    ranks: Sequence[int] = (1, 2, 4)
    hidden: int = 256
    weak: int = 256
    strong: int = 4096
    max_ranks: int = 64


QUICK = Budget(3, (64, 256, 1024), (4, 8, 16), (5, 10, 20), (1, 8, 64), (1, 2))
SMOKE = Budget(1, (4, 8), (2, 3), (1, 2), (1, 2), (1,), 8, 4, 8, 2)
NETWORKS = (Network("10 Gbit/s, 50 us", 1.25e9, 50e-6), Network("200 Gbit/s, 5 us", 25e9, 5e-6))


# ---------------------------------------------------------------- one process


def make_model(latents: int) -> Callable[[Tensor], None]:
    net = nn.Sequential(nn.Linear(latents, 64), nn.GELU(), nn.Linear(64, PIXELS))

    def model(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(latents), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 0.3).to_event(1), obs=x)

    return model


def training(size: Size, **options: Any) -> Callable[[], Any]:
    model, x = make_model(size.latents), torch.randn(size.rows, PIXELS)
    guide = ShortRunGuide(model, num_steps=size.steps, dynamics=Langevin(StepSize(1e-3)), **options)
    return functools.partial(SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO()).step, x)


def drawing(size: Size) -> Callable[[], Any]:
    model, x = make_model(size.latents), torch.randn(size.rows, PIXELS)
    guide = ShortRunGuide(model, num_steps=size.steps, dynamics=Langevin(StepSize(1e-3)))
    return lambda: guide.sample_posterior(x, num_samples=1, num_chains=size.chains)


def cpu_seconds(work: Callable[[], Any], rounds: int) -> float:
    """The least of some calls, after a first one."""
    work()
    found = []
    for _ in range(rounds):
        begin = time.process_time()
        work()
        found.append(time.process_time() - begin)
    return min(found)


def cost(make: Callable[[], Callable[[], Any]], rounds: int) -> tuple[float, float]:
    """Milliseconds and megabytes (NaN where the system does not tell)."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    gc.collect()
    work = make()
    milliseconds = 1000 * cpu_seconds(work, rounds)
    try:
        return milliseconds, peak(work, "cpu") / 1e6
    except (OSError, AttributeError):  # not Linux
        return milliseconds, math.nan


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Slope of the upper half in log-log."""
    half = min(len(sizes) // 2, len(sizes) - 2)
    return float(np.polyfit(np.log(sizes[half:]), np.log(np.maximum(values[half:], 1e-9)), 1)[0])


def growth(axis: str, sizes: Sequence[int], rounds: int) -> dict[str, Any]:
    """Of training, or of drawing for chains."""
    points = [replace(Size(), **{axis: size}) for size in sizes]
    ways: dict[str, Callable[[Size], Callable[[], Any]]] = {
        "path density": training,
        "annealed": lambda size: training(size, objective=Annealed()),
    }
    if axis == "chains":
        ways = {"draws": drawing}
    costs = {
        way: [cost(functools.partial(make, p), rounds) for p in tqdm(points, desc=f"{axis}, {way}")]
        for way, make in ways.items()
    }
    fits = {way: [exponent(sizes, c) for c in zip(*found, strict=True)] for way, found in costs.items()}
    return {"axis": axis, "sizes": list(sizes), "costs": costs, "exponents": fits}


def growth_table(found: dict[str, Any]) -> Table:
    costs, fits = found["costs"], found["exponents"]
    head = [found["axis"], *(f"{way}, {unit}" for way in costs for unit in ("ms", "MB"))]
    rows = [
        [str(size), *(f"{value:.3g}" for way in costs for value in costs[way][i])]
        for i, size in enumerate(found["sizes"])
    ]
    rows.append(["exponent", *(f"{value:.2f}" for way in costs for value in fits[way])])
    held = ", ".join(f"{k} = {v}" for k, v in vars(Size()).items() if k != found["axis"])
    return aligned(f"Measured: {found['axis']} ({held})", head, rows)


# ---------------------------------------------------------------- ranks


def step_of_rank(rows: int, hidden: int) -> Callable[[], Any]:
    """The step that the distributed example trains by, without averaging."""
    from distributed import PIXELS, Loss, random

    x = torch.randn(rows, PIXELS)
    loss = Loss(hidden, random(), x)
    optimiser = torch.optim.Adam(loss.parameters(), lr=1e-3)

    def step() -> None:
        optimiser.zero_grad()
        loss(x).backward()
        optimiser.step()

    return step


def seconds_of(tensor: Tensor, rounds: int) -> float:
    """The least wall time of an all-reduce."""
    found = []
    for _ in range(rounds):
        torch_distributed.barrier()
        begin = time.perf_counter()
        torch_distributed.all_reduce(tensor)
        found.append(time.perf_counter() - begin)
    return min(found)


def one_rank(rank: int, ranks: int, port: int, budget: Budget, path: str) -> None:
    from distributed import PIXELS, Loss, gradients_size, random

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch_distributed.init_process_group("gloo")
    size = gradients_size(Loss(budget.hidden, random(), torch.randn(4, PIXELS)))
    whole, least = (seconds_of(torch.zeros(n // 4), 10 * budget.rounds) for n in (size, 8))
    if rank == 0:
        Path(path).write_text(json.dumps({"ranks": ranks, "bytes": size, "ms": 1e3 * whole, "ms 8 bytes": 1e3 * least}))
    torch_distributed.destroy_process_group()


def measure_ranks(budget: Budget) -> list[dict[str, float]]:
    from distributed import free_port

    found = []
    for ranks in tqdm(budget.ranks, desc="ranks"):
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "found.json")
            multiprocessing.spawn(one_rank, (ranks, free_port(), budget, path), nprocs=ranks)
            found.append(json.loads(Path(path).read_text()))
    return found


def compute(budget: Budget) -> dict[int, float]:
    """Milliseconds of CPU of a step by rows of a rank: all that the plan needs."""
    found = {}
    rows = {budget.weak, *(budget.strong // n for n in powers(budget.max_ranks))}
    for size in tqdm(sorted(rows), desc="steps of a rank"):
        pyro.clear_param_store()
        found[size] = 1000 * cpu_seconds(step_of_rank(size, budget.hidden), budget.rounds)
    return found


def powers(last: int) -> list[int]:
    return [2**i for i in range(int(math.log2(last)) + 1)]


def plan(ms: dict[int, float], size: float, budget: Budget) -> list[dict[str, Any]]:
    """Simulated figures for every number of ranks and network."""
    found = []
    for ranks in powers(budget.max_ranks):
        line: dict[str, Any] = {"ranks": ranks, "MB sent": 2 * (ranks - 1) / ranks * size / 1e6}
        for network in NETWORKS:
            wait = 1000 * network.all_reduce(size, ranks)
            weak, strong = ms[budget.weak] + wait, ms[budget.strong // ranks] + wait
            line[network.name] = {
                "all-reduce ms": wait,
                "rows/s": 1000 * ranks * budget.weak / weak,
                "efficiency": ms[budget.weak] / weak,
                "speed-up": ms[budget.strong] / strong,
            }
        found.append(line)
    return found


def rank_tables(
    reduced: list[dict[str, float]], ms: dict[int, float], lines: list[dict], budget: Budget
) -> list[Table]:
    gloo = [[f"{r['ranks']}", f"{r['bytes'] / 1024:.0f}", f"{r['ms']:.3g}", f"{r['ms 8 bytes']:.3g}"] for r in reduced]
    steps = [[str(rows), f"{value:.3g}", f"{1000 * rows / value:.0f}"] for rows, value in ms.items()]
    return [
        aligned("Measured: all-reduce under gloo, this machine", ["ranks", "kB", "ms", "ms, 8 bytes"], gloo),
        aligned("Measured: CPU time of one rank's step", ["rows", "ms", "rows/s"], steps),
        *(plan_table(network.name, lines, budget) for network in NETWORKS),
    ]


def plan_table(network: str, lines: list[dict], budget: Budget) -> Table:
    formats = {"all-reduce ms": ".2f", "rows/s": ".0f", "efficiency": ".2f", "speed-up": ".1f"}
    cells = [
        [f"{line['ranks']}", f"{line['MB sent']:.2f}", *(format(line[network][k], f) for k, f in formats.items())]
        for line in lines
    ]
    title = f"SIMULATED from the measured steps, assumed network: {network}"
    title += f"; weak: {budget.weak} rows a rank, strong: {budget.strong} in all"
    return aligned(title, ["ranks", "MB sent", "all-reduce ms", "rows/s", "weak eff.", "strong speed-up"], cells)


# ---------------------------------------------------------------- all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds")
    parser.add_argument("--smoke", action="store_true", help="seconds only")
    parser.add_argument(
        "--output", type=Path, default=Path("scaling-output"), help="folder for scaling.txt and results.json"
    )
    options = parser.parse_args()
    budget = SMOKE if options.smoke else QUICK if options.quick else Budget()
    torch.set_num_threads(1)
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: large blocks go back to the system at once
    found = [growth(axis, getattr(budget, axis), budget.rounds) for axis in ("rows", "latents", "steps", "chains")]
    reduced, ms = measure_ranks(budget), compute(budget)
    lines = plan(ms, reduced[0]["bytes"], budget)
    tables = [*map(growth_table, found), *rank_tables(reduced, ms, lines, budget)]
    text = "\n\n".join("\n".join([t.title, *t.lines()]) for t in tables)
    print(text)
    record(options.output, tables)
    (options.output / "scaling.txt").write_text(text + "\n")


if __name__ == "__main__":
    main()
