"""What does the first compiled call cost, in a process that finds nothing on disk, and in the next one?

    python examples/benchmarks/first_calls.py --output first
    python examples/benchmarks/first_calls.py --smoke

Three training steps (K = 20, ``Annealed`` from ``AutoDiagonalNormal``, ``ShortRunELBO``), of which the first is eager
and the second compiles, in a process of their own: CPU seconds of the process, without what importing takes, and of the
C++ compiler that it starts. "cold": inductor's folder is empty. "warm": a second process, with the folder of the first.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pyro
import torch
from record import Table, record
from speed import diagonal
from speed_models import Case, eight_schools, logistic

from pyro_shortrun import ShortRunSVI

MODELS = {"schools": eight_schools, "logistic-5000x50": partial(logistic, 5000, 50)}
COLUMNS = {
    "model": "<18s",
    "cache": "<6s",
    "CPU s": "7.1f",
    "compiler s": "10.1f",
    "both": "6.1f",
}


def steps(case: Case, compile: bool) -> dict[str, float]:
    """CPU seconds of three steps, and of child processes."""
    guide, elbo = diagonal(case.model, 20, case.step_size, compile)
    svi = ShortRunSVI(case.model, guide, pyro.optim.Adam({"lr": 0.001}), elbo)

    began = time.process_time()
    for _ in range(3):
        svi.step(*case.args)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"first": time.process_time() - began, "compiler": used.ru_utime + used.ru_stime}


def child(name: str, compile: bool) -> None:
    """Prints what :func:`steps` gives."""
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    print(json.dumps(steps(MODELS[name]("cpu"), compile)))


def measured(name: str, folder: str, compile: bool) -> dict[str, float]:
    """In a process of its own."""
    argv = [sys.executable, "-W", "ignore", __file__, "--child", name, *(() if compile else ("--smoke",))]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, help="folder for table.txt and results.json")
    parser.add_argument("--smoke", action="store_true", help="eager, seconds only")
    parser.add_argument("--child", choices=MODELS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, not options.smoke)
        return
    torch.set_num_threads(1)
    table = Table("Three training steps, the first compiled call among them, K = 20", COLUMNS)
    print(table.head())
    for name in list(MODELS)[: 1 if options.smoke else None]:
        with tempfile.TemporaryDirectory() as folder:
            for cache in ("cold", "warm"):
                found = measured(name, folder, not options.smoke)
                both = found["first"] + found["compiler"]
                table.rows.append([name, cache, found["first"], found["compiler"], both])
                print(table.line(table.rows[-1]), flush=True)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "table.txt").write_text("\n".join(table.lines()) + "\n")
    record(options.output, [table])


if __name__ == "__main__":
    main()
