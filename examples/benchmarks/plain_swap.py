"""The plain swap, ``ShortRunGuide(model)`` and nothing else, beside AutoNormal, AutoMultivariateNormal and Pyro's NUTS.

    python examples/benchmarks/plain_swap.py                 # programs with data made here, some minutes
    python examples/benchmarks/plain_swap.py --data FOLDER   # and posteriordb (load_data.py and posteriordb/ in FOLDER)
    python examples/benchmarks/plain_swap.py --smoke         # seconds

One line per posterior and method, from 2000 draws (NUTS: 500 + 1000), each method to its own convergence: AutoGuides
take 2000 steps of Adam whose rate falls from .05 to .0005. The reference are posteriordb's draws, or 400 adjusted steps
of 4000 chains.

    mean     largest error of a posterior mean in reference standard deviations
    sd       largest relative error of a standard deviation, in %
    corr     largest error of a correlation
    k-hat    Pareto shape of the log weights
    bound    lower bound of log p(x), in nats
    CPU      seconds of this process, everything included
"""

from __future__ import annotations

import argparse
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from posteriordb import load
from posteriordb_models import POSTERIORS
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from record import Table, Value, record
from torch import Tensor
from tqdm import tqdm

from pyro_shortrun import ShortRunGuide, psis

Draws = dict[str, Tensor]


@dataclass(frozen=True)
class Budget:
    """Numbers of draws, of steps of AutoGuides, and of NUTS's warm-up and draws."""

    draws: int = 2000
    steps: int = 2000
    nuts: tuple[int, int] = (500, 1000)
    reference: tuple[int, int] = (4000, 400)


SMOKE = Budget(200, 20, (5, 5), (200, 20))


# ---------------------------------------------------------------- programs, in raw coordinates


@dataclass(frozen=True)
class Problem:
    """A program, its arguments, its parameters as ``{name: (draws,)}`` from draws of its sites, and reference draws."""

    name: str
    model: Callable[..., Any]
    args: tuple[Any, ...]
    parameters: Callable[[Draws], Draws]
    reference: Draws | None = None


def flat(draws: Draws) -> Draws:
    """Every coordinate of every site, ``(chains, draws, *shape)``, under a name of its own."""
    return {f"{k}[{i}]": v for k, d in draws.items() for i, v in enumerate(d.reshape(*d.shape[:2], -1).unbind(-1))}


def logistic() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Correlated covariates of scales .001, 1 and 100000, and wide priors."""
    x = torch.randn(300, 3) @ torch.tensor([[1.0, 0.9, 0.9], [0.0, 0.4, 0.0], [0.0, 0.0, 0.4]])
    y = dist.Bernoulli(logits=x @ torch.tensor([1.0, -2.0, 0.5])).sample()
    x = x * torch.tensor([1e-3, 1.0, 1e5])

    def model(x: Tensor, y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 100.0))
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 10_000.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=a + x @ w), obs=y)

    return model, (x, y)


def schools() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Eight schools, non-centred."""
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def model(y: Tensor) -> None:
        mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", 8):
            e = pyro.sample("e", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * e, sigma), obs=y)

    return model, (y,)


def mixed_poisson() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """20 groups, covariates of scales 1 and 100."""
    group, x, b = torch.arange(200) % 20, torch.randn(200, 2) * torch.tensor([1.0, 100.0]), 0.5 * torch.randn(20)
    y = dist.Poisson((0.5 + 0.3 * x[:, 0] + 0.004 * x[:, 1] + b[group]).exp()).sample()

    def model(x: Tensor, y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 10.0))
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 10.0).to_event(1))
        s = pyro.sample("s", dist.HalfNormal(1.0))
        with pyro.plate("groups", 20):
            e = pyro.sample("e", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Poisson((a + x @ w + s * e[group]).exp()), obs=y)

    return model, (x, y)


def robust() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Student-t errors of unknown degrees of freedom, Cauchy priors."""
    x = torch.randn(100, 3) * torch.tensor([1.0, 1e-3, 1e5])
    y = 100 + x @ torch.tensor([2.0, 3000.0, -1e-5]) + 0.5 * dist.StudentT(3.0).sample((100,))

    def model(x: Tensor, y: Tensor) -> None:
        a = pyro.sample("a", dist.Cauchy(0.0, 10.0))
        w = pyro.sample("w", dist.Cauchy(torch.zeros(3), 2500.0).to_event(1))
        s, nu = pyro.sample("s", dist.HalfCauchy(5.0)), pyro.sample("nu", dist.Gamma(2.0, 0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.StudentT(nu, a + x @ w, s), obs=y)

    return model, (x, y)


MADE = {"logistic": logistic, "eight schools": schools, "mixed Poisson": mixed_poisson, "robust": robust}


def problems(data: Path | None, only: list[str] | None) -> Iterator[Problem]:
    for name, make in MADE.items():
        if not only or name in only:
            pyro.set_rng_seed(3)
            yield Problem(name, *make(), flat)
    loader = load(data) if data is not None else None
    for name, known in POSTERIORS.items() if loader is not None else ():
        if not only or name in only:
            found = loader.posterior(name)
            reference = {k: torch.as_tensor(np.asarray(v)).flatten() for k, v in found["draws"].items()}
            yield Problem(name, known.model, known.arguments(found["data"]), known.parameters, reference)


# ---------------------------------------------------------------- methods


@dataclass(frozen=True)
class Found:
    """Draws ``(1, draws, *shape)`` by site, Pareto shape and bound where there are some, CPU seconds."""

    draws: Draws
    k_hat: float | None
    bound: float | None
    seconds: float


def swap(problem: Problem, budget: Budget, adjust: int | None) -> Found:
    began = time.process_time()
    guide = ShortRunGuide(problem.model)
    draws = guide.sample_posterior(*problem.args, num_samples=budget.draws, adjust=adjust)
    seconds = time.process_time() - began
    _, drawn = guide.weighted_draws(problem.args, {}, budget.draws)
    assert drawn.log_p is not None and drawn.log_q is not None
    k_hat = psis(problem.model, guide, *problem.args).k.item()
    return Found(draws, k_hat, (drawn.log_p - drawn.log_q).mean().item(), seconds)


def auto(problem: Problem, budget: Budget, kind: Any) -> Found:
    began = time.process_time()
    guide = kind(problem.model)
    rate = {"lr": 0.05, "lrd": 0.01 ** (1 / budget.steps)}
    svi, losses = SVI(problem.model, guide, pyro.optim.ClippedAdam(rate), Trace_ELBO()), []
    for _ in range(budget.steps):
        losses.append(svi.step(*problem.args))
    sample = Predictive(problem.model, guide=guide, num_samples=budget.draws)
    sites = {k: v for k, v in sample(*problem.args).items() if k in guide(*problem.args)}
    seconds = time.process_time() - began
    bound = -float(np.mean(losses[-len(losses) // 10 :]))
    try:
        k_hat = psis(problem.model, guide, *problem.args).k.item()
    except RuntimeError:  # a model that cannot be vectorised over draws
        k_hat = math.nan
    return Found({k: v.unsqueeze(0) for k, v in sites.items()}, k_hat, bound, seconds)


def nuts(problem: Problem, budget: Budget) -> Found:
    began, (warmup, count) = time.process_time(), budget.nuts
    mcmc = MCMC(NUTS(problem.model), count, warmup, disable_progbar=True)
    mcmc.run(*problem.args)
    return Found(mcmc.get_samples(group_by_chain=True), None, None, time.process_time() - began)


METHODS: dict[str, Callable[[Problem, Budget], Found]] = {
    "plain swap": lambda p, b: swap(p, b, None),
    "plain swap, adjust=0": lambda p, b: swap(p, b, 0),
    "AutoNormal": lambda p, b: auto(p, b, AutoNormal),
    "AutoMultivariateNormal": lambda p, b: auto(p, b, AutoMultivariateNormal),
    "NUTS": nuts,
}


# ---------------------------------------------------------------- the table


COLUMNS = {"posterior": "38s", "method": "24s", "mean": "8.3f", "sd": "7.1f", "corr": "6.3f", "k-hat": "6.2f"}
COLUMNS |= {"bound": "11.2f", "CPU": "7.1f"}


def errors(draws: Draws, reference: Draws) -> tuple[float, float, float]:
    """Worst errors of means (in sd), of sds (in %), and of correlations."""
    names = list(reference)
    mine, known = (torch.stack([d[k].flatten().double() for k in names]) for d in (draws, reference))
    sd = known.std(1)
    mean = ((mine.mean(1) - known.mean(1)).abs() / sd).max()
    gap = (torch.corrcoef(mine) - torch.corrcoef(known)).abs().max() if len(names) > 1 else torch.zeros(())
    return mean.item(), 100 * (mine.std(1) / sd - 1).abs().max().item(), gap.item()


def reference_of(problem: Problem, budget: Budget) -> Draws:
    if problem.reference is not None:
        return problem.reference
    count, steps = budget.reference
    return flat(ShortRunGuide(problem.model).sample_posterior(*problem.args, num_samples=count, adjust=steps))


def rows(problem: Problem, methods: list[str], budget: Budget, seed: int) -> Iterator[list[Value]]:
    pyro.set_rng_seed(1000)
    pyro.clear_param_store()
    reference = reference_of(problem, budget)
    for name in methods:
        pyro.set_rng_seed(seed)
        pyro.clear_param_store()
        began = time.process_time()
        try:
            found = METHODS[name](problem, budget)
        except (ValueError, RuntimeError) as reason:
            tqdm.write(f"{problem.name}, {name}: {str(reason).splitlines()[0][:200]}")
            yield [problem.name, name, math.inf, math.inf, math.inf, None, None, time.process_time() - began]
            continue
        draws = {k: v for k, v in problem.parameters(found.draws).items() if k in reference}
        yield [problem.name, name, *errors(draws, reference), found.k_hat, found.bound, found.seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with load_data.py and posteriordb/")
    parser.add_argument("--only", nargs="*", help="names of posteriors (default: all)")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder for table.txt and results.json")
    parser.add_argument("--smoke", action="store_true", help="seconds only")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    budget, only = (SMOKE, ["eight schools"]) if options.smoke else (Budget(), options.only)
    table = Table("The plain swap", COLUMNS)
    print(table.head())
    for problem in problems(options.data, only):
        for row in rows(problem, options.methods, budget, options.seed):
            table.rows.append(row)
            print(table.line(row), flush=True)
    right = {m: sum(max(r[2], r[3] / 100, r[4]) < 0.1 for r in table.rows if r[1] == m) for m in options.methods}
    summary = "right in all three columns: " + ", ".join(f"{m} {n}" for m, n in right.items())
    print(summary)
    record(options.output, [table])
    if options.output is not None:
        (options.output / "table.txt").write_text("\n".join([*table.lines(), summary]) + "\n")


if __name__ == "__main__":
    main()
