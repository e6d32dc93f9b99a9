"""MALA by VectorizedMCMC against the reference draws of posteriordb: errors in means and deviations, R-hat, ESS, time.

    python examples/benchmarks/posteriordb.py --data FOLDER           # FOLDER holds load_data.py and posteriordb/
    python examples/benchmarks/posteriordb.py --data FOLDER --dense   # with a dense preconditioner
    python examples/benchmarks/posteriordb.py --data FOLDER --uniform # from U(-2, 2), not from a fitted Gaussian
    python examples/benchmarks/posteriordb.py --smoke                 # seconds, on made-up data, without a reference

One line per posterior. `mean` is the largest error of a posterior mean in reference standard deviations, `sd` the
largest relative error of a standard deviation; ESS (bulk) and R-hat are ArviZ's, the worst over parameters. A row is
good if the mean is within 0.1, the sd within 15 % and R-hat below 1.01.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import arviz as az
import numpy as np
import pyro
import torch
from posteriordb_models import POSTERIORS, Posterior
from pyro.infer.autoguide import init_to_uniform
from record import Table, Value, record
from tqdm import tqdm

from pyro_shortrun import Init, ShortRunLangevin, VectorizedMCMC
from pyro_shortrun.dynamics import Dense, Diagonal

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Budget:
    """How long to run."""

    num_chains: int = 64
    num_samples: int = 400
    warmup_steps: int = 200
    num_steps: int = 20


def load(folder: Path) -> Any:
    """The loader module that lies beside the data."""
    spec = importlib.util.spec_from_file_location("load_data", folder / "load_data.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sample(posterior: Posterior, data: dict, budget: Budget, options: argparse.Namespace) -> tuple[Arrays, float]:
    """Draws ``{parameter: (chains, draws)}`` and seconds."""
    pyro.set_rng_seed(0)
    start = Init(init_to_uniform) if options.uniform else None
    metric = Dense() if options.dense else Diagonal()
    kernel = ShortRunLangevin(posterior.model, budget.num_steps, adjust=True, preconditioner=metric, start=start)
    mcmc = VectorizedMCMC(
        kernel, budget.num_samples, budget.warmup_steps, num_chains=budget.num_chains, disable_progbar=True
    )
    begin = time.perf_counter()
    mcmc.run(*posterior.arguments(data))
    seconds = time.perf_counter() - begin
    draws = posterior.parameters(mcmc.get_samples(group_by_chain=True))
    return {k: v.numpy() for k, v in draws.items()}, seconds


COLUMNS = {"posterior": "42s", "dim": "3d", "mean": "7.3f", "sd": "7.3f", "R-hat": "7.4f", "ESS": "7.0f"}
COLUMNS |= {"seconds": "7.1f"}


def line(name: str, draws: Arrays, reference: Arrays | None, seconds: float) -> tuple[list[Value], bool]:
    """One row of the table, and whether it is good."""
    dataset = az.convert_to_dataset(draws)
    rhat = max(float(v) for v in az.rhat(dataset).values())
    ess = min(float(v) for v in az.ess(dataset).values())
    mean, sd, good = None, None, False
    if reference is not None:
        mean = max(abs(draws[k].mean() - r.mean()) / r.std() for k, r in reference.items())
        sd = max(abs(draws[k].std() / r.std() - 1) for k, r in reference.items())
        good = mean < 0.1 and sd < 0.15 and rhat < 1.01
    return [name, len(draws), mean, sd, rhat, ess, seconds], good


def made_up() -> dict:
    """A small regression in the format of sblri."""
    x = torch.randn(50, 3)
    return {"X": x.tolist(), "y": (x.sum(-1) + torch.randn(50)).tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with load_data.py and posteriordb/")
    parser.add_argument("--only", nargs="*", help="names of posteriors (default: all)")
    parser.add_argument("--uniform", action="store_true", help="start from U(-2, 2), as version 0.1.0 did")
    parser.add_argument("--dense", action="store_true", help="dense instead of diagonal preconditioner")
    parser.add_argument("--output", type=Path, help="folder for table.txt and results.json")
    parser.add_argument("--smoke", action="store_true", help="seconds only, made-up data")
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    table = Table(f"MALA, {'dense' if options.dense else 'diagonal'} preconditioner", COLUMNS)
    good: list[bool] = []
    if options.smoke:
        posterior = POSTERIORS["sblri-blr"]
        draws, seconds = sample(posterior, made_up(), Budget(4, 20, 20, 2), options)
        table.rows.append(line("made-up regression", draws, None, seconds)[0])
    elif options.data is None:
        parser.error("--data is needed: the folder with load_data.py and posteriordb/ (or --smoke)")
    else:
        loader = load(options.data)
        for name in tqdm(options.only or list(POSTERIORS), desc="posteriors"):
            known = loader.posterior(name)
            draws, seconds = sample(POSTERIORS[name], known["data"], Budget(), options)
            row, is_good = line(name, draws, known["draws"], seconds)
            table.rows.append(row)
            good.append(is_good)
    text = "\n".join([*table.lines(), *([f"good: {sum(good)} of {len(good)}"] if good else [])])
    print(text)
    record(options.output, [table])
    if options.output is not None:
        (options.output / "table.txt").write_text(text + "\n")


if __name__ == "__main__":
    main()
