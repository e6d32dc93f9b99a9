"""What chains cost, and how right and how fast they are beside Pyro's NUTS, on seven models.

    python examples/benchmarks/chains.py             # some ten minutes on one core
    python examples/benchmarks/chains.py --smoke     # seconds, to see that it runs

The first table has milliseconds of one MALA transition of 1 and of 1024 chains, and their ratio, with `compile=False`
and with `compile=True` (compiling itself not counted). In the second, every line is a whole run as a user makes it:
`VectorizedMCMC(ShortRunLangevin(model, 10, adjust=True), 100)` of 64 chains and nothing else; the same with `Dense()`
scales; both from where chains began in version 0.1.0 (uniform in (-2, 2), a warm-up of 100 draws); and one chain of
NUTS, 200 + 500 draws.

    mean     largest error of a posterior mean in reference standard deviations (300 adjusted steps of 3000 chains)
    sd       largest relative error of a standard deviation, in %
    R-hat    ArviZ's, of split chains (one chain: of its halves), the worst of all coordinates
    ESS      ArviZ's bulk effective sample size, of the worst coordinate
    CPU      seconds of this process, fit, warm-up, tracing and compiling included
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS, config_enumerate
from pyro.infer.autoguide import init_to_uniform
from record import Table, Value, record
from torch import Tensor
from tqdm import tqdm

from pyro_shortrun import Init, ShortRunGuide, ShortRunLangevin, VectorizedMCMC
from pyro_shortrun.dynamics import Dense

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


def mixed_poisson() -> Made:
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


MODELS = [correlated, eight_schools, logistic, varying_intercepts, gaussian_process, mixture, mixed_poisson]


@dataclass(frozen=True)
class Budget:
    """How long to run; ``steps`` are transitions per draw of MALA."""

    nuts: tuple[int, int] = (200, 500)
    draws: int = 100
    steps: int = 10
    chains: int = 64
    many: int = 1024
    timed: int = 20
    reference: tuple[int, int] = (3000, 300)


SMOKE = Budget((5, 5), 5, 2, 8, 16, 3, (50, 5))


# ---------------------------------------------------------------- what a transition costs


def transition_ms(model: Callable, args: tuple, chains: int, compile: bool, budget: Budget) -> float:
    """Milliseconds per transition, of the second run of a kernel, set-up included."""
    kernel = ShortRunLangevin(model, budget.steps, adjust=True, start=Init(init_to_uniform), compile=compile)
    mcmc = VectorizedMCMC(kernel, budget.timed, 1, num_chains=chains, disable_progbar=True)
    for _ in range(2):
        begin = time.process_time()
        mcmc.run(*args)
    return (time.process_time() - begin) / ((budget.timed + 1) * budget.steps) * 1000


def costs(make: Callable[[], Made], budget: Budget) -> list[Value]:
    pyro.set_rng_seed(0)
    model, args = make()
    found = [transition_ms(model, args, c, compile, budget) for compile in (False, True) for c in (1, budget.many)]
    pairs = [(one, many, many / one) for one, many in (found[:2], found[2:])]
    return [make.__name__, *(value for values in pairs for value in values)]


# ---------------------------------------------------------------- runs


def ess_and_rhat(draws: dict[str, Tensor]) -> tuple[float, float]:
    """Worst bulk ESS and R-hat over all coordinates of ``{site: (chains, draws, ...)}``."""
    arrays = {k: v.numpy() for k, v in draws.items()}
    ess = az.ess(az.convert_to_dataset(arrays))
    if len(next(iter(arrays.values()))) == 1:  # R-hat needs two chains: take the halves of one
        arrays = {k: np.concatenate(np.array_split(v[:, : v.shape[1] // 2 * 2], 2, axis=1)) for k, v in arrays.items()}
    rhat = az.rhat(az.convert_to_dataset(arrays))
    return min(float(v.min()) for v in ess.values()), max(float(v.max()) for v in rhat.values())


def mala(model: Callable, budget: Budget, warmup: int | None = None, **options: Any) -> VectorizedMCMC:
    kernel = ShortRunLangevin(model, budget.steps, adjust=True, **options)
    return VectorizedMCMC(kernel, budget.draws, warmup, num_chains=budget.chains, disable_progbar=True)


METHODS: dict[str, Callable[[Callable, Budget], Any]] = {
    "default": mala,
    "Dense()": lambda m, b: mala(m, b, preconditioner=Dense()),
    "from U(-2, 2)": lambda m, b: mala(m, b, b.draws, start=Init(init_to_uniform)),
    "from U(-2, 2), Dense()": lambda m, b: mala(m, b, b.draws, start=Init(init_to_uniform), preconditioner=Dense()),
    "NUTS": lambda m, b: MCMC(NUTS(m), b.nuts[1], b.nuts[0], disable_progbar=True),
}


def flat(draws: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every coordinate of every site, ``(chains, draws)``, under a name of its own."""
    return {f"{k}[{i}]": v for k, d in draws.items() for i, v in enumerate(d.reshape(*d.shape[:2], -1).unbind(-1))}


def errors(draws: dict[str, Tensor], reference: dict[str, Tensor]) -> tuple[float, float]:
    """Worst errors of means, in sd, and of sds, in %."""
    mine, known = (torch.stack([d[k].flatten().double() for k in reference]) for d in (draws, reference))
    sd = known.std(1)
    return ((mine.mean(1) - known.mean(1)).abs() / sd).max().item(), 100 * (mine.std(1) / sd - 1).abs().max().item()


def runs(make: Callable[[], Made], budget: Budget) -> Iterator[list[Value]]:
    pyro.set_rng_seed(0)
    model, args = make()
    count, steps = budget.reference
    reference = flat(ShortRunGuide(model).sample_posterior(*args, num_samples=count, adjust=steps))
    for name, method in METHODS.items():
        pyro.set_rng_seed(1)
        pyro.clear_param_store()
        begin = time.process_time()
        mcmc = method(model, budget)
        mcmc.run(*args)
        draws = mcmc.get_samples(group_by_chain=True)
        seconds = time.process_time() - begin
        mean, sd = errors(flat(draws), reference)
        ess, rhat = ess_and_rhat(draws)
        yield [make.__name__, name, mean, sd, rhat, ess, seconds, ess / seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [make.__name__ for make in MODELS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="some models")
    parser.add_argument("--smoke", action="store_true", help="seconds only")
    parser.add_argument("--output", type=Path, help="folder for table.txt and results.json")
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    budget = SMOKE if options.smoke else Budget()
    forms = {"model": "18s"}
    for mode in ("eager", "compiled"):
        forms |= {f"{mode} x1": "12.2f", f"{mode} x{budget.many}": "15.2f", f"{mode} ratio": "15.1f"}
    transitions = Table("A transition, ms", forms)
    columns = {"model": "18s", "method": "24s", "mean": "8.3f", "sd": "8.1f", "R-hat": "8.3f", "ESS": "8.0f"}
    found = Table("Runs beside NUTS", columns | {"CPU": "7.1f", "ESS/CPU s": "10.1f"})
    models = MODELS[1:2] if options.smoke else [make for make in MODELS if make.__name__ in options.only]
    for make in tqdm(models, desc="models"):
        transitions.rows.append(costs(make, budget))
        for row in runs(make, budget):
            found.rows.append(row)
            tqdm.write(found.line(row))
    text = "\n\n".join("\n".join(table.lines()) for table in (transitions, found))
    print(text)
    record(options.output, [transitions, found])
    if options.output is not None:
        (options.output / "table.txt").write_text(text + "\n")


if __name__ == "__main__":
    main()
