"""What chains cost, and effective samples per second of MALA and of Pyro's NUTS on six models.

    python examples/benchmarks/chains.py             # about eight minutes on one core
    python examples/benchmarks/chains.py --smoke     # seconds, to see that it runs

`x1`, `x1024`: milliseconds of one MALA transition of 1 and of 1024 chains, and their ratio, with `compile=False` and
with `compile=True` (compiling itself not counted); all else is with `compile=False`. ESS/s: bulk effective
sample size of the worst coordinate (ArviZ's estimator for all) over the wall time of warm-up and sampling together, for
NUTS (one chain), and for MALA with a diagonal or a dense preconditioner in one chain or 256. R-hat is ArviZ's, of split
chains (one chain: of its halves), the worst of all coordinates.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS, config_enumerate
from record import Table, Value, record
from torch import Tensor
from tqdm import tqdm

from pyro_shortrun import ShortRunLangevin, VectorizedMCMC
from pyro_shortrun.dynamics import Dense, Diagonal, Preconditioner

Made = tuple[Callable, tuple[Tensor, ...]]


def correlated() -> Made:
    """A Gaussian in 10 dimensions with correlations 0.9."""
    covariance = 0.9 * torch.ones(10, 10) + 0.1 * torch.eye(10)

    def model() -> None:
        pyro.sample("z", dist.MultivariateNormal(torch.zeros(10), covariance))

    return model, ()


def eight_schools() -> Made:
    """Non-centred."""
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def model(y: Tensor, sigma: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        eta = pyro.sample("eta", dist.Normal(torch.zeros(8), 1.0).to_event(1))
        with pyro.plate("schools", 8):
            pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)

    return model, (y, sigma)


def logistic() -> Made:
    """100 observations, 5 correlated features."""
    x = torch.randn(100, 5) @ torch.randn(5, 5) / 5**0.5
    y = dist.Bernoulli(logits=x.sum(-1)).sample()

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(5), 2.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)

    return model, (x, y)


def varying_intercepts() -> Made:
    """A hierarchical regression: 12 groups of 10."""
    group = torch.arange(12).repeat_interleave(10)
    x = torch.randn(120)
    y = torch.randn(12)[group] + 0.5 * x + 0.7 * torch.randn(120)

    def model(x: Tensor, y: Tensor) -> None:
        mu, slope = pyro.sample("mu", dist.Normal(0.0, 2.0)), pyro.sample("slope", dist.Normal(0.0, 2.0))
        tau, noise = pyro.sample("tau", dist.HalfNormal(1.0)), pyro.sample("noise", dist.HalfNormal(1.0))
        with pyro.plate("groups", 12):
            shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mu + tau * shift[group] + slope * x, noise), obs=y)

    return model, (x, y)


def gaussian_process() -> Made:
    """Hyper-parameters of a GP regression on 30 points."""
    x = torch.linspace(0, 5, 30)
    y = torch.sin(x) + 0.3 * torch.randn(30)

    def model(x: Tensor, y: Tensor) -> None:
        length = pyro.sample("length", dist.LogNormal(0.0, 0.5))
        amplitude = pyro.sample("amplitude", dist.HalfNormal(1.0))
        noise = pyro.sample("noise", dist.HalfNormal(0.5))
        kernel = amplitude**2 * torch.exp(-0.5 * ((x.unsqueeze(-1) - x) / length) ** 2)
        covariance = kernel + (noise**2 + 1e-4) * torch.eye(len(x))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros_like(y), covariance), obs=y)

    return model, (x, y)


def mixture() -> Made:
    """Two components whose assignments are enumerated."""
    x = torch.cat([torch.randn(20) - 2.0, torch.randn(30) + 2.0])

    @config_enumerate
    def model(x: Tensor) -> None:
        share = pyro.sample("share", dist.Beta(2.0, 2.0))
        low, gap = pyro.sample("low", dist.Normal(0.0, 3.0)), pyro.sample("gap", dist.LogNormal(1.0, 0.5))
        locs = torch.stack([low, low + gap])
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(share)).long()
            pyro.sample("x", dist.Normal(locs[k], 1.0), obs=x)

    return model, (x,)


MODELS = [correlated, eight_schools, logistic, varying_intercepts, gaussian_process, mixture]


@dataclass(frozen=True)
class Budget:
    """How long to run; ``steps`` are transitions per draw of MALA."""

    nuts: int = 500
    mala: int = 400
    warmup: int = 200
    steps: int = 10
    chains: int = 256
    many: int = 1024
    timed: int = 10


def ess_and_rhat(draws: dict[str, Tensor]) -> tuple[float, float]:
    """Worst bulk ESS and R-hat over all coordinates of ``{site: (chains, draws, ...)}``."""
    arrays = {k: v.numpy() for k, v in draws.items()}
    ess = az.ess(az.convert_to_dataset(arrays))
    if len(next(iter(arrays.values()))) == 1:  # R-hat needs two chains: take the halves of one
        arrays = {k: np.concatenate(np.array_split(v[:, : v.shape[1] // 2 * 2], 2, axis=1)) for k, v in arrays.items()}
    rhat = az.rhat(az.convert_to_dataset(arrays))
    return min(float(v.min()) for v in ess.values()), max(float(v.max()) for v in rhat.values())


def run(mcmc: Any, args: tuple) -> tuple[float, float]:
    """ESS per second and R-hat."""
    begin = time.perf_counter()
    mcmc.run(*args)
    seconds = time.perf_counter() - begin
    ess, rhat = ess_and_rhat(mcmc.get_samples(group_by_chain=True))
    return ess / seconds, rhat


def mala(model: Callable, chains: int, preconditioner: Preconditioner, budget: Budget) -> VectorizedMCMC:
    kernel = ShortRunLangevin(model, budget.steps, adjust=True, preconditioner=preconditioner)
    return VectorizedMCMC(kernel, budget.mala, budget.warmup, num_chains=chains, disable_progbar=True)


def transition_ms(model: Callable, args: tuple, chains: int, compile: bool, budget: Budget) -> float:
    """Milliseconds per transition, median of draws; set-up left out."""
    stamps: list[float] = []
    kernel = ShortRunLangevin(model, budget.steps, adjust=True, compile=compile)
    mcmc = VectorizedMCMC(
        kernel,
        budget.timed,
        1,
        num_chains=chains,
        disable_progbar=True,
        hook_fn=lambda *_: stamps.append(time.perf_counter()),
    )
    mcmc.run(*args)
    return float(np.median(np.diff(stamps))) / budget.steps * 1000


def line(make: Callable[[], Made], budget: Budget) -> list[Value]:
    """One row of the table."""
    pyro.set_rng_seed(0)
    model, args = make()
    costs = [transition_ms(model, args, c, compile, budget) for compile in (False, True) for c in (1, budget.many)]
    nuts = MCMC(NUTS(model), budget.nuts, budget.warmup, disable_progbar=True)
    figures = [
        run(mcmc, args)
        for mcmc in (
            nuts,
            mala(model, 1, Dense(), budget),
            mala(model, budget.chains, Diagonal(), budget),
            mala(model, budget.chains, Dense(), budget),
        )
    ]
    pairs = [(one, many, many / one) for one, many in (costs[:2], costs[2:])]
    return [make.__name__, *(value for values in (*pairs, *figures) for value in values)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [make.__name__ for make in MODELS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="some models")
    parser.add_argument("--smoke", action="store_true", help="seconds only")
    parser.add_argument("--output", type=Path, help="folder for chains.txt and results.json")
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    logging.getLogger("pyro_shortrun").setLevel(logging.ERROR)
    budget = Budget(5, 5, 5, 2, 8, 16, 3) if options.smoke else Budget()
    columns = ["NUTS", "dense x1", f"diagonal x{budget.chains}", f"dense x{budget.chains}"]
    head = f"{'':18s} {'ms/step, eager':>17s} {'ms/step, compiled':>17s}" + "".join(f" {c:>16s}" for c in columns)
    costs = 2 * f" {'x1':>5s} {f'x{budget.many}':>5s} {'ratio':>5s}"
    heads = f"{'model':18s}" + costs + 4 * f" {'ESS/s':>9s} {'R-hat':>6s}"
    forms = {"model": "18s"}
    for mode in ("eager", "compiled"):
        forms |= {f"ms/step, {mode}: x1": "5.2f", f"x{budget.many}, {mode}": "5.2f", f"ratio, {mode}": "5.1f"}
    for column in columns:
        forms |= {f"{column}: ESS/s": "9.1f", f"R-hat, {column}": "6.3f"}
    table = Table("Transitions of MALA, and effective draws", forms)
    models = MODELS[:2] if options.smoke else [make for make in MODELS if make.__name__ in options.only]
    for make in tqdm(models, desc="models"):
        table.rows.append(line(make, budget))
    text = "\n".join([head, heads, *map(table.line, table.rows)])
    print(text)
    record(options.output, [table])
    if options.output is not None:
        (options.output / "chains.txt").write_text(text + "\n")


if __name__ == "__main__":
    main()
