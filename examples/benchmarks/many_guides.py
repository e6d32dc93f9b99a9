"""Does a process that makes one guide after the other grow?

    python examples/benchmarks/many_guides.py --output many
    python examples/benchmarks/many_guides.py --smoke

As a study over data sets or a service does: a guide is made for the same model, trained for a few steps, drawn from and
forgotten, with graphs (``compile=True``: whole training steps by inductor) and without; and chains in the same way.
Each line of the table is a stretch of the loop: CPU seconds and growth of resident memory for each guide in it, of
which what torch keeps of source text of graphs, and how many of the guides made so far are alive.
"""

from __future__ import annotations

import argparse
import gc
import resource
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.fx.graph_module as fx
from record import Table, record
from torch import Tensor

from pyro_shortrun import ShortRunELBO, ShortRunGuide, ShortRunLangevin, ShortRunSVI, VectorizedMCMC

COLUMNS = {
    "kind": "<16s",
    "made": "5d",
    "CPU s": "7.2f",
    "RSS MB": "7.0f",
    "MB each": "8.3f",
    "source MB each": "14.3f",
    "alive": "6d",
}
_FEWER = 5  # compiled ones, which take longer


def model(x: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("groups", len(x)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("x", dist.Normal(theta, 10.0), obs=x)


def guide(x: Tensor, compile: bool) -> ShortRunGuide:
    made = ShortRunGuide(model, num_steps=10, compile=compile)
    svi = ShortRunSVI(model, made, pyro.optim.Adam({"lr": 0.01}), ShortRunELBO())
    for _ in range(5):
        svi.step(x)
    made.sample_posterior(x, num_samples=10)
    return made


def chains(x: Tensor) -> VectorizedMCMC:
    made = VectorizedMCMC(ShortRunLangevin(model, 5, adjust=True), 10, 10, num_chains=4, disable_progbar=True)
    made.run(x)
    made.get_samples()
    return made


KINDS: dict[str, Callable[[Tensor], Any]] = {
    "guides": lambda x: guide(x, False),
    "compiled guides": lambda x: guide(x, True),
    "chains": chains,
}


def resident() -> float:
    """MB, now."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20
    except OSError:  # not Linux: the most so far
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def sources() -> float:
    """MB of source text that torch keeps for tracebacks through graphs."""
    cache = getattr(getattr(fx, "_loader", None), "eval_cache", {})
    return sum(len(text) for text in cache.values()) / 2**20


def measure(table: Table, kind: str, count: int, stretches: int) -> None:
    make, refs = KINDS[kind], []
    print(table.head())
    for i in range(stretches):
        size = count // stretches
        before, kept, began = resident(), sources(), time.process_time()
        for _ in range(size):
            pyro.clear_param_store()
            refs.append(weakref.ref(make(torch.randn(8, generator=torch.Generator().manual_seed(len(refs))) * 10)))
        pyro.clear_param_store()
        gc.collect()
        took, now = time.process_time() - began, resident()
        alive = sum(ref() is not None for ref in refs)
        row = [kind, (i + 1) * size, took / size, now, (now - before) / size, (sources() - kept) / size, alive]
        table.rows.append(row)
        print(table.line(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--guides", type=int, default=100, help="how many of each kind; of compiled ones a fifth")
    parser.add_argument("--output", type=Path, help="folder for table.txt and results.json")
    parser.add_argument("--smoke", action="store_true", help="seconds only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    table = Table("One guide after the other", COLUMNS)
    for kind in KINDS:
        if options.smoke and kind == "compiled guides":
            continue  # inductor takes longer
        count = options.guides // _FEWER if kind == "compiled guides" else options.guides
        measure(table, kind, 2 if options.smoke else count, 1 if options.smoke else 4)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "table.txt").write_text("\n".join(table.lines()) + "\n")
    record(options.output, [table])


if __name__ == "__main__":
    main()
