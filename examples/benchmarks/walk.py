"""How far one ``svi.step`` walks through the package, and what it costs: calls, changes of module, CPU milliseconds.

    python examples/benchmarks/walk.py [--compiled] [--output DIR]

The walk is that of eight schools with K = 5, eager: the package's functions that are called, and those of the calls
that go straight from one module of the package into another. Generated code (the methods of dataclasses and named
tuples) and comprehensions are not counted. The cost is the CPU time per step, of the process, on five models with
K = 10, the least of several blocks; ratios to another version are those of two runs in turns.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from record import Table, record

import pyro_shortrun as short

BLOCKS = 5
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


def milliseconds(step: Callable[[], float], steps: int) -> float:
    """CPU time of a step, the least of several blocks."""
    blocks = []
    for _ in range(BLOCKS):
        begin = time.process_time()
        for _ in range(steps):
            step()
        blocks.append((time.process_time() - begin) / steps)
    return 1e3 * min(blocks)


def walks() -> Table:
    table = Table(
        "One step, eight schools, K = 5, eager", {"objective": "14s", "calls": "6d", "changes of module": "17d"}
    )
    for objective in OBJECTIVES:
        table.rows.append([objective, *walk(step_of("eight schools", objective, 5, compile=False))])
    return table


def costs(modes: Sequence[bool], steps: int) -> Table:
    form = {"model": "34s", "": "9s", **{o: "12.2f" for o in OBJECTIVES}}
    table = Table("CPU ms per step, K = 10", form)
    for compile in modes:
        for model in MODELS:
            found = [milliseconds(step_of(model, o, 10, compile), steps) for o in OBJECTIVES]
            table.rows.append([model, "compiled" if compile else "eager", *found])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="steps in a block")
    parser.add_argument("--compiled", action="store_true", help="compiled steps, too (minutes)")
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--output", type=Path, help="folder for walk.txt and results.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    modes = (False, True) if options.compiled else (False,)
    tables = [walks(), costs(modes, 1 if options.smoke else options.steps)]
    text = "\n\n".join("\n".join([t.title, *t.lines()]) for t in tables)
    print(text)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "walk.txt").write_text(text + "\n")
    record(options.output, tables)


if __name__ == "__main__":
    main()
