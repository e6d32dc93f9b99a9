"""The plain swap, ``ShortRunGuide(model)`` and nothing else, beside every rival on 27 posteriors in raw coordinates.

    python examples/benchmarks/posteriors.py --data FOLDER --jax-python PYTHON    # everything; hours on one core
    python examples/benchmarks/posteriors.py --data FOLDER --methods "plain swap" # one row for each posterior
    python examples/benchmarks/posteriors.py --quick       # five programs with data made here, some minutes
    python examples/benchmarks/posteriors.py --smoke       # seconds

FOLDER holds load_data.py and posteriordb/ (without it, the programs with data made here), PYTHON is one that has
NumPyro (without it, NumPyro's methods are left out). Each method ends by its own rule: AutoGuides and AutoDAIS after
2000 steps of a falling rate, NUTS after 500 + 1000 draws, chains after 64 x (200 + 16); or, with ``--seconds``, after
so many CPU seconds. The reference are posteriordb's draws, or four chains of NumPyro's NUTS with 300 + 2000 draws in
coordinates in which the posterior has about unit scales; without NumPyro, 256 chains of VectorizedMCMC. These are kept
in ``reference/`` of the output folder.

    mean     largest error of a posterior mean in reference standard deviations
    sd       largest relative error of a standard deviation, in %
    corr     largest error of a correlation
    k-hat    Pareto shape of the log weights
    bound    lower bound of log p(x), in nats; programs with flat priors have it up to a constant
    CPU      seconds for the fit and 1000 draws, compilation and all first calls included, imports not

Errors of guides are from 4000 draws more, those of chains from their own 1000. Each cell is a process of its own, which
is ended after ``--limit`` CPU seconds. The output folder keeps what was measured: a call that was cut off goes on.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import multiprocessing
import resource
import statistics
import time
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyro
import torch
from posteriordb import load
from posteriors_methods import METHODS, Budget, Found
from posteriors_models import KNOWN, MADE, POSTERIORS, SEED, Draws
from posteriors_numpyro import ask, long_run, request_of
from record import Table, Value, record
from tqdm import tqdm

matplotlib.use("Agg")

IN_JAX = {"NumPyro NUTS": "nuts", "AutoDAIS": "dais"}
QUICK = ["mixed Poisson", "negative binomial", "Student errors", "AR(2) around 100", "50 groups, centred"]
REFERENCE = Budget(nuts=(300, 2000), chains=(256, 400, 40))
SMOKE = Budget(50, 100, 20, (5, 5), (4, 4, 4))
RIGHT = 0.1


# ---------------------------------------------------------------- posteriors and their references


@dataclass(frozen=True)
class Problem:
    """A posterior with its data, and reference draws by parameter, ``(draws,)``."""

    name: str
    args: tuple[np.ndarray, ...]
    reference: Draws

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(map(torch.as_tensor, self.args))

    def errors(self, draws: Draws) -> tuple[float, float, float]:
        """Worst errors of means (in sd), of sds (in %), and of correlations."""
        found = POSTERIORS[self.name].parameters(draws)
        names = [k for k in self.reference if k in found]
        mine, known = (np.stack([np.ravel(d[k]).astype(float) for k in names]) for d in (found, self.reference))
        mean, sd, gap = (mine.mean(1) - known.mean(1)) / known.std(1), mine.std(1) / known.std(1) - 1, np.zeros(1)
        if len(names) > 1:
            gap = np.corrcoef(mine) - np.corrcoef(known)
        return float(np.abs(mean).max()), float(100 * np.abs(sd).max()), float(np.nan_to_num(np.abs(gap), nan=1).max())


def problem(name: str, loader: Any, cache: Path, python: str | None, budget: Budget) -> Problem:
    if name in KNOWN:
        known = loader.posterior(name)
        reference = {k: np.ravel(v) for k, v in known["draws"].items()}
        return Problem(name, POSTERIORS[name].arguments(known["data"]), reference)
    args = MADE[name].arguments(np.random.default_rng(SEED))
    path = cache / f"{name}.npz"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        np.savez(path, **reference_draws(name, args, python, budget))
    with np.load(path) as data:
        return Problem(name, args, {k: np.ravel(data[k]) for k in data.files})


def reference_draws(name: str, args: tuple[np.ndarray, ...], python: str | None, budget: Budget) -> Draws:
    """Of a long run, ``(chains, draws)``, its R-hat told."""
    pyro.clear_param_store()
    if python is not None:
        draws = long_run(python, name, MADE[name].model, args, budget).draws
    else:
        draws = METHODS["VectorizedMCMC"](MADE[name].model, tuple(map(torch.as_tensor, args)), budget).draws
    found = MADE[name].parameters(draws)
    tqdm.write(f"reference of {name}: R-hat {max(map(rhat, found.values())):.4f}")
    return found


def rhat(draws: np.ndarray) -> float:
    """Of chains ``(chains, draws)``, split in halves."""
    halves = np.concatenate(np.split(draws[:, : draws.shape[1] // 2 * 2], 2, axis=1))
    within, between = halves.var(1, ddof=1).mean(), halves.mean(1).var(ddof=1)
    return float(math.sqrt((1 - 1 / halves.shape[1]) + between / within))


# ---------------------------------------------------------------- cells


@dataclass
class Row:
    """A line of the table; None where there is no figure, infinite errors where a method failed, ``note`` why."""

    posterior: str
    method: str
    seed: int
    budget: str
    mean: float = math.inf
    sd: float = math.inf
    corr: float = math.inf
    k_hat: float | None = None
    bound: float | None = None
    seconds: float | None = None
    note: str = ""

    @property
    def worst(self) -> float:
        return max(self.mean, self.sd / 100, self.corr)

    @property
    def values(self) -> list[Value]:
        figures = [self.mean, self.sd, self.corr, self.k_hat, self.bound, self.seconds]
        return [self.posterior, self.method, self.seed, *figures, self.note[:60]]


COLUMNS = {"posterior": "39s", "method": "24s", "seed": "4d", "mean": "8.3f", "sd": "7.1f", "corr": "6.3f"}
COLUMNS |= {"k-hat": "6.2f", "bound": "11.2f", "CPU": "7.1f", "note": "s"}


def found_by(method: str, known: Problem, budget: Budget, seed: int, python: str | None) -> Found:
    if method in IN_JAX:
        assert python is not None
        return ask(python, IN_JAX[method], known.name, known.args, request_of(budget, seed))
    pyro.set_rng_seed(seed)
    pyro.clear_param_store()
    return METHODS[method](POSTERIORS[known.name].model, known.tensors, budget)


def work(row: Row, known: Problem, budget: Budget, python: str | None, limit: float, answer: Any) -> None:
    """A cell, in a process of its own."""
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(limit), math.ceil(limit) + 5))
    began = time.process_time()
    try:
        found = found_by(row.method, known, budget, row.seed, python)
        row.k_hat, row.bound, row.seconds = found.k_hat, found.bound, found.seconds
        if all(np.isfinite(v).all() for v in found.draws.values()):
            row.mean, row.sd, row.corr = known.errors(found.draws)
        else:
            row.note = "draws are not finite"
    except Exception as reason:  # whatever a method raises is its failure
        row.note, row.seconds = f"{type(reason).__name__}: {' '.join(str(reason).split())}", time.process_time() - began
    answer.send(asdict(row))


def cell(row: Row, known: Problem, budget: Budget, python: str | None, limit: float) -> Row:
    context = multiprocessing.get_context("fork")  # with everything imported
    mine, its = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(row, known, budget, python, limit, its))
    process.start()
    its.close()
    try:
        found = Row(**mine.recv())
    except EOFError:
        found = replace(row, note=f"ended after {limit:g} CPU seconds, or by a signal", seconds=limit)
    process.join()
    return found


class Results:
    """Rows in a file, written after each; those of an earlier call are kept."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows = [Row(**row) for row in json.loads(path.read_text())] if path.exists() else []

    def has(self, row: Row) -> bool:
        key = row.posterior, row.method, row.seed, row.budget
        return any((r.posterior, r.method, r.seed, r.budget) == key for r in self.rows)

    def add(self, row: Row) -> None:
        names = list(POSTERIORS)
        self.rows = sorted([*self.rows, row], key=lambda r: (names.index(r.posterior), r.budget, r.seed))
        self._path.write_text(json.dumps([asdict(r) for r in self.rows], indent=1))


# ---------------------------------------------------------------- summary and picture


SUMMARY = {"method": "24s", "budget": "12s", "rows": "5d", "right": "5d", "mean < .1": "9d", "sd < 10 %": "9d"}
SUMMARY |= {"corr < .1": "9d", "failed": "6d", "median CPU": "10.1f", "largest CPU": "11.1f"}


def summary(rows: list[Row]) -> list[list[Value]]:
    """How often each method is right, over posteriors and seeds."""
    lines: list[list[Value]] = []
    for method, budget in dict.fromkeys((r.method, r.budget) for r in rows):
        own = [r for r in rows if (r.method, r.budget) == (method, budget)]
        seconds = [r.seconds for r in own if r.seconds is not None]
        good = [sum(x) for x in ([r.worst < RIGHT for r in own], [r.mean < RIGHT for r in own])]
        good += [sum(r.sd < 100 * RIGHT for r in own), sum(r.corr < RIGHT for r in own)]
        failed = sum(not math.isfinite(r.mean) for r in own)
        lines.append([method, budget, len(own), *good, failed, statistics.median(seconds), max(seconds)])
    order = [*METHODS, *IN_JAX]
    return sorted(lines, key=lambda line: (line[1], order.index(str(line[0]))))


def draw_errors(rows: list[Row], path: Path) -> None:
    """Worst error against CPU seconds: every cell, and each method's median."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    for method in [m for m in [*METHODS, *IN_JAX] if any(r.method == m for r in rows)]:
        own = [(r.seconds, min(max(r.worst, 1e-2), 1e2)) for r in rows if r.method == method and r.seconds]
        x, y = np.array(own).T
        dots = axes.scatter(x, y, s=12, alpha=0.3, linewidths=0)
        median = (float(np.median(x)), float(np.median(y)))
        axes.scatter(*median, s=90, color=dots.get_facecolor()[:, :3], edgecolors="black", zorder=3, label=method)
    axes.axhline(RIGHT, color="grey", linestyle=":")
    axes.set(xscale="log", yscale="log", xlabel="CPU seconds, 1000 draws", ylabel="worst of the three errors")
    axes.set_title("Small: a posterior; large: the median; at the top what failed; below the dotted line: right")
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ---------------------------------------------------------------- the command


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with load_data.py and posteriordb/")
    parser.add_argument("--jax-python", help="a Python with NumPyro")
    parser.add_argument("--only", nargs="*", help="names of posteriors (default: all)")
    parser.add_argument("--methods", nargs="*", choices=[*METHODS, *IN_JAX], help="names of methods (default: all)")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--seconds", type=float, nargs="*", default=[], help="CPU seconds, instead of each one's rule")
    parser.add_argument("--limit", type=float, default=300.0, help="CPU seconds after which a cell is ended")
    parser.add_argument("--quick", action="store_true", help="five programs")
    parser.add_argument("--smoke", action="store_true", help="seconds only, one program, no claim")
    parser.add_argument("--output", type=Path, default=Path("posteriors-output"), help="folder for the results")
    options = parser.parse_args()
    known = [*KNOWN, *MADE] if options.data is not None else list(MADE)
    options.only = options.only or (["AR(2) around 100"] if options.smoke else QUICK if options.quick else known)
    if unknown := set(options.only) - set(known):
        parser.error(f"no posteriors {sorted(unknown)}; there are {known} (posteriordb's with --data)")
    options.methods = options.methods or [*METHODS, *(IN_JAX if options.jax_python else [])]
    if options.jax_python is None and set(options.methods) & set(IN_JAX):
        parser.error(f"{list(IN_JAX)} need --jax-python")
    return options


def cells(options: argparse.Namespace, results: Results) -> Iterator[tuple[Row, Budget]]:
    """What is missing, one posterior after the other."""
    base = SMOKE if options.smoke else Budget()
    limits = [replace(base, seconds=s) for s in options.seconds] or [base]
    for name in options.only:
        for budget in limits:
            label = "own rule" if budget.seconds is None else f"{budget.seconds:g} s"
            for method in options.methods:
                for seed in options.seeds:
                    row = Row(name, method, seed, label)
                    if not results.has(row):
                        yield row, budget


def main() -> None:
    options = arguments()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    results, reference = Results(options.output / "cells.json"), SMOKE if options.smoke else REFERENCE
    loader = None if options.data is None else load(options.data)
    table, known = Table("The plain swap and its rivals", COLUMNS), None
    print(table.head())
    for row, budget in cells(options, results):
        if known is None or known.name != row.posterior:
            pyro.set_rng_seed(zlib.crc32(row.posterior.encode()))
            known = problem(row.posterior, loader, options.output / "reference", options.jax_python, reference)
        results.add(row := cell(row, known, budget, options.jax_python, options.limit))
        print(table.line(row.values), flush=True)
    table.rows = [r.values for r in results.rows]
    total = Table("Right in all three columns: means < .1 sd, sds < 10 %, correlations < .1", SUMMARY)
    total.rows = summary(results.rows)
    text = "\n".join(["", total.title, *total.lines()])
    print(text)
    (options.output / "table.txt").write_text("\n".join([*table.lines(), text, ""]))
    record(options.output, [total, table])
    draw_errors(results.rows, options.output / "errors.png")


if __name__ == "__main__":
    main()
