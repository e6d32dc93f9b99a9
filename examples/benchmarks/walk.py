"""How far one ``svi.step`` walks through the package, and what it costs: calls, changes of module, CPU milliseconds.

    python examples/benchmarks/walk.py [--compiled] [--against CHECKOUT] [--output DIR]

The walk is that of eight schools with K = 5, eager: the package's functions that are called, and those of the calls
that go straight from one module of the package into another. Generated code (the methods of dataclasses and named
tuples) and comprehensions are not counted. The cost is the CPU time per step, of the process, on five models with
K = 10, the least of several blocks. With ``--against``, another version's walk and costs stand beside it: both run in
processes of their own and in turns, block by block, and the ratio is the median of the blocks'. Versions that have a
module in another place are compared as they are; the house is what their imports say.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from record import Table, Value, record

import pyro_shortrun as short

BLOCKS = 9
NAMES = ("here", "other")
ROOT = Path(__file__).resolve().parents[2]
PACKAGE = str(Path(short.__file__).parent)


def eight_schools() -> tuple[Callable[..., Any], tuple[torch.Tensor, ...]]:
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def model(y: torch.Tensor, sigma: torch.Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    return model, (y, sigma)


def regression(rows: int, size: int) -> tuple[Callable[..., Any], tuple[torch.Tensor, ...]]:
    x = torch.randn(rows, size)
    y = torch.bernoulli(torch.sigmoid(x[:, 0] - x[:, 1]))

    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(size), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)

    return model, (x, y)


def generator(batch: int, latent: int, width: int) -> tuple[Callable[..., Any], tuple[torch.Tensor, ...]]:
    net = torch.nn.Sequential(torch.nn.Linear(latent, width), torch.nn.GELU(), torch.nn.Linear(width, 64))
    x = torch.randn(batch, 64)

    def model(x: torch.Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(latent), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)

    return model, (x,)


def mixed() -> tuple[Callable[..., Any], tuple[torch.Tensor, ...]]:
    group = torch.arange(200) % 10
    x = torch.randn(200)
    y = torch.poisson(torch.exp(0.3 * x + 0.1 * group))

    def model(group: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", 10):
            level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Poisson(torch.exp(slope * x + level[group])), obs=y)

    return model, (group, x, y)


MODELS: dict[str, Callable[[], tuple[Callable[..., Any], tuple[torch.Tensor, ...]]]] = {
    "eight schools": eight_schools,
    "logistic 1000 x 20": lambda: regression(1000, 20),
    "mixed Poisson, 11 latents": mixed,
    "generator, batch 64, 8 latents": lambda: generator(64, 8, 64),
    "generator, batch 100, 20 latents": lambda: generator(100, 20, 128),
}
OBJECTIVES = {"path density": short.PathDensity, "annealed": short.Annealed}


def step_of(model: str, objective: str, num_steps: int, compile: bool) -> Callable[[], float]:
    """A training step, set up."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    program, args = MODELS[model]()
    dynamics = short.Langevin(short.StepSize(1e-3))
    guide = short.ShortRunGuide(
        program, num_steps=num_steps, dynamics=dynamics, objective=OBJECTIVES[objective](), compile=compile
    )
    svi = SVI(program, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    svi.step(*args)
    svi.step(*args)
    return lambda: svi.step(*args)


def walk(step: Callable[[], float]) -> tuple[int, int]:
    """Calls of the package's functions in one step, and those from another of its modules."""
    calls = changes = 0

    def notice(frame: Any, event: str, _: Any) -> None:
        nonlocal calls, changes
        if event != "call" or frame.f_code.co_name.startswith("<") or not _is_own(frame):
            return
        calls += 1
        changes += _is_own(frame.f_back) and frame.f_back.f_code.co_filename != frame.f_code.co_filename

    sys.setprofile(notice)
    try:
        step()
    finally:
        sys.setprofile(None)
    return calls, changes


def _is_own(frame: Any) -> bool:
    return frame is not None and frame.f_code.co_filename.startswith(PACKAGE)


@dataclass
class Worker:
    """A process that takes the steps of one version of the package, asked for block by block."""

    folder: Path
    what: tuple[str, ...]

    def __post_init__(self) -> None:
        env = {**os.environ, "PYTHONPATH": str(self.folder.resolve()), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", __file__, "--worker", *self.what]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=env, cwd=self.folder
        )

    def ask(self) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("again\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.folder}: its steps of {self.what} failed.")
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def work(model: str, objective: str, compiled: str, steps: str) -> None:
    """What a :class:`Worker` runs: for every line that comes in, a walk (no steps), or milliseconds per step."""
    count = int(steps)
    step = step_of(model, objective, 10 if count else 5, compiled == "compiled")
    for _ in sys.stdin:
        print(*(walk(step) if not count else [milliseconds(step, count)]), flush=True)


def milliseconds(step: Callable[[], float], steps: int) -> float:
    """CPU time of a step."""
    begin = time.process_time()
    for _ in range(steps):
        step()
    return 1e3 * (time.process_time() - begin) / steps


def in_turns(folders: Sequence[Path], what: tuple[str, ...]) -> list[list[float]]:
    """Milliseconds of every block, by version."""
    workers = [Worker(folder, what) for folder in folders]
    found: list[list[float]] = [[] for _ in workers]
    for block in range(BLOCKS + 1):
        for i in range(len(workers))[:: -1 if block % 2 else 1]:
            value = float(workers[i].ask())
            if block:  # the first block is for caches
                found[i].append(value)
    for worker in workers:
        worker.close()
    return found


def costs(folders: Sequence[Path], modes: Sequence[str], steps: int) -> Table:
    form = {"model": "34s", "": "9s", "objective": "14s", "ms": "9.2f"}
    form |= {"other ms": "9.2f", "ratio": "6.3f"} if len(folders) > 1 else {}
    table = Table("CPU ms per step, K = 10", form)
    for mode, model, objective in itertools.product(modes, MODELS, OBJECTIVES):
        blocks = in_turns(folders, (model, objective, mode, str(steps)))
        row: list[Value] = [model, mode, objective, *map(min, blocks)]
        if len(blocks) > 1:
            row.append(statistics.median(a / b for a, b in zip(*blocks, strict=True)))
        table.rows.append(row)
    return table


def walks(folders: Sequence[Path]) -> Table:
    form = {"version": "9s", "objective": "14s", "calls": "6d", "changes of module": "17d"}
    table = Table("One step, eight schools, K = 5, eager", form)
    for folder, name in zip(folders, NAMES, strict=False):
        for objective in OBJECTIVES:
            worker = Worker(folder, ("eight schools", objective, "eager", "0"))
            table.rows.append([name, objective, *map(int, worker.ask().split())])
            worker.close()
    return table


def house(folders: Sequence[Path]) -> Table:
    """Modules and the arrows of imports between them, floors (the longest chain of arrows), and lines."""
    form = {"version": "9s", "modules": "7d", "arrows": "6d", "floors": "6d", "packages": "8d", "between them": "12d"}
    form |= {"their floors": "12d", "lines": "6d", "longest": "7d"}
    table = Table("The house", form)
    for folder, name in zip(folders, NAMES, strict=False):
        modules = _modules(folder / "pyro_shortrun")
        arrows = {(a, b) for a, file in modules.items() for b in _imports(a, file) if b in modules and a != b}
        rooms = {(a.split(".")[0], b.split(".")[0]) for a, b in arrows}
        between = {(a, b) for a, b in rooms if a != b}
        lines = [len(file.read_text().splitlines()) for file in (folder / "pyro_shortrun").rglob("*.py")]
        packages = {a.split(".")[0] for a in modules}
        row = [len(modules), len(arrows), _floors(arrows), len(packages), len(between), _floors(between)]
        table.rows.append([name, *row, sum(lines), max(lines)])
    return table


def _modules(root: Path) -> dict[str, Path]:
    found = {".".join(f.relative_to(root).with_suffix("").parts): f for f in root.rglob("*.py")}
    return {name: f for name, f in found.items() if f.name != "__init__.py"}


def _imports(module: str, file: Path) -> set[str]:
    """Modules of the package that a module names in relative imports."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            target = [*module.split(".")[: -node.level], *(node.module or "").split(".")]
            found.add(".".join(filter(None, target)))
    return found


def _floors(arrows: set[tuple[str, str]]) -> int:
    @cache
    def floor(name: str) -> int:
        return 1 + max((floor(b) for a, b in arrows if a == name), default=0)

    return max(floor(a) for a, _ in arrows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10, help="steps in a block")
    parser.add_argument("--compiled", action="store_true", help="compiled steps, too (minutes)")
    parser.add_argument("--against", type=Path, help="the checkout of another version, to stand beside this one")
    parser.add_argument("--smoke", action="store_true", help="a step of one model, to see that it runs")
    parser.add_argument("--output", type=Path, help="folder for walk.txt and results.json")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.worker:
        return work(*options.worker)
    folders = [ROOT, *([options.against] if options.against else [])]
    modes = ("eager", "compiled") if options.compiled else ("eager",)
    if options.smoke:
        for name in list(MODELS)[1:]:
            del MODELS[name]
    tables = [house(folders), walks(folders), costs(folders, modes, 1 if options.smoke else options.steps)]
    text = "\n\n".join("\n".join([t.title, *t.lines()]) for t in tables)
    print(text)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "walk.txt").write_text(text + "\n")
    record(options.output, tables)


if __name__ == "__main__":
    main()
