"""Which step size each objective tunes, and how close its bound is, where the truth is known.

    python examples/benchmarks/tuning.py            # some minutes
    python examples/benchmarks/tuning.py --smoke    # seconds

The first table has Gaussian posteriors N(1, 1 / precision) from a N(0, 1) prior, K = 25 Langevin steps with one step
size ``s = sqrt(2 eta)``. ``s/best`` is what SVI tuned, over the step whose draws have the smallest KL divergence to the
posterior (in closed form); ``KL`` is that of the draws with the tuned step, and ``bound`` how far the objective's
bound, in eval mode, is below the exact evidence lower bound of the same draws (negative: an estimate that is too high).
Objectives that temper draw otherwise and have their gap to log p(x) instead.

The second table has a logistic regression (60 observations, 5 coefficients), its log evidence from importance sampling:
gaps of the tuned bounds to it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from record import Table, record
from torch import Tensor
from tqdm import tqdm

from pyro_shortrun import (
    Annealed,
    GaussianReverse,
    Hamiltonian,
    Langevin,
    Linearized,
    Mixture,
    PathDensity,
    ShortRunELBO,
    ShortRunGuide,
    StepSize,
)

STEPS = 25
TARGETS = [(4.0,), (25.0,), (100.0,), (4.0, 25.0)]
Model = Callable[[], None]


@dataclass(frozen=True)
class Budget:
    """How long to tune, and by how many runs a bound is measured."""

    updates: int = 100
    particles: int = 256
    draws: int = 20000


@dataclass(frozen=True)
class Way:
    """A way to account for a run.

    :param options: of the guide, from the model and a first step size.
    :param share: of the budget's particles.
    """

    options: Callable[[Model, StepSize], dict]
    share: float = 1.0


def gaussian(precisions: tuple[float, ...]) -> tuple[Model, float]:
    """A model with this posterior, and its log evidence."""
    lam = torch.tensor(precisions)
    data, noise = lam / (lam - 1), (lam - 1).rsqrt()

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros_like(lam), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z, noise).to_event(1), obs=data)

    return model, dist.Normal(0.0, (1 + noise**2).sqrt()).log_prob(data).sum().item()


def kl(s: float, precisions: tuple[float, ...]) -> float:
    """KL divergence of the draws with step ``s`` to the posterior."""
    eta, total = s * s / 2, 0.0
    for lam in precisions:
        a = 1 - eta * lam
        if abs(a) >= 1:
            return math.inf
        power = a ** (2 * STEPS)
        variance = power + 2 * eta * (1 - power) / (1 - a * a)
        total += 0.5 * (lam * variance + lam * power - 1 - math.log(lam * variance))
    return total


def logistic() -> tuple[Model, float]:
    """A regression and its log evidence."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=generator)
    y = torch.rand(60, generator=generator).lt(torch.sigmoid(x @ torch.randn(5, generator=generator))).to(x)

    def model() -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(5), 1.0).to_event(1))
        with pyro.plate("data", 60):
            pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)

    def log_joint(w: Tensor) -> Tensor:
        return dist.Bernoulli(logits=w @ x.T).log_prob(y).sum(-1) + dist.Normal(0.0, 1.0).log_prob(w).sum(-1)

    mode = torch.zeros(5)
    for _ in range(30):  # Newton
        hessian = torch.autograd.functional.hessian(log_joint, mode)
        slope = torch.autograd.functional.jacobian(log_joint, mode)
        mode = mode - torch.linalg.solve(hessian, slope)
    proposal = dist.MultivariateNormal(mode, precision_matrix=-hessian / 1.5)
    draws = proposal.sample((200000,))
    weights = log_joint(draws) - proposal.log_prob(draws)
    return model, (weights.logsumexp(0) - math.log(len(draws))).item()


def by_langevin(objective: Callable, start: Callable | None = None) -> Callable[[Model, StepSize], dict]:
    return lambda model, step: {
        "dynamics": Langevin(step),
        "objective": objective(),
        "start": start and start(model),
    }


WAYS: dict[str, Way] = {
    "PathDensity": Way(by_langevin(PathDensity), 0.25),
    "Linearized": Way(by_langevin(Linearized), 0.25),
    "Mixture(64)": Way(by_langevin(lambda: Mixture(64)), 0.25),
    "GaussianReverse": Way(by_langevin(lambda: GaussianReverse(pilots=2**14, fresh=2000)), 4.0),
    "Annealed": Way(by_langevin(Annealed)),
    "Annealed, Hamiltonian": Way(lambda _, step: {"dynamics": Hamiltonian(step), "objective": Annealed()}),
    "GaussianReverse(tempered)": Way(by_langevin(lambda: GaussianReverse(True, fresh=128))),
}
LEARNED: dict[str, Way] = {
    "Annealed, AutoNormal": Way(by_langevin(Annealed, AutoNormal)),
    "GaussianReverse, AutoNormal": Way(by_langevin(lambda: GaussianReverse(fresh=128), AutoNormal)),
    "GaussianReverse(tempered), AutoNormal": Way(by_langevin(lambda: GaussianReverse(True, fresh=128), AutoNormal)),
    "GaussianReverse(tempered), AutoMultivariateNormal": Way(
        by_langevin(lambda: GaussianReverse(True, fresh=128), AutoMultivariateNormal)
    ),
}


def tune(model: Model, way: Way, step: StepSize, budget: Budget) -> tuple[ShortRunGuide, float, float]:
    """A trained guide, its bound, and the bound's error."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    options = way.options(model, step)
    guide = ShortRunGuide(model, num_steps=STEPS, **options)
    particles = max(2, round(budget.particles * way.share))
    decay = pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.02 ** (1 / budget.updates)})
    svi = SVI(model, guide, decay, ShortRunELBO(particles))
    for _ in range(budget.updates):
        svi.step()
    guide.eval()
    with torch.no_grad():
        weights = torch.cat(
            [guide.log_weight(num_particles=min(2000, budget.draws)) for _ in range(budget.draws // 2000)]
        )
    return guide, weights.mean().item(), (weights.std() / len(weights) ** 0.5).item()


def gaussian_table(budget: Budget, targets: list, names: list[str]) -> Table:
    forms = {"precisions": ">12s", "objective": "26s", "s/best": "7.3f", "KL": "8.4f", "bound": "9.4f", "+-": "7.4f"}
    table = Table(f"Gaussian posteriors, K = {STEPS}", forms)
    for precisions in targets:
        model, evidence = gaussian(precisions)
        best = min(np.linspace(0.02, 0.4, 4000).tolist(), key=lambda s: kl(s, precisions))
        label = ", ".join(f"{p:g}" for p in precisions)
        table.rows.append([label, "(exact)", 1.0, kl(best, precisions), "", ""])
        for name in tqdm(names, desc=label):
            step = StepSize(best**2 / 4, max=2 * best**2)
            guide, bound, error = tune(model, WAYS[name], step, budget)
            s = math.sqrt(2 * guide.step_sizes().item())
            tempers = guide.objective.tempers
            exact = evidence - (0.0 if tempers else kl(s, precisions))
            value = None if tempers else kl(s, precisions)
            table.rows.append([label, name, s / best, value, exact - bound, error])
    return table


def logistic_table(budget: Budget, ways: dict[str, Way]) -> Table:
    model, evidence = logistic()
    title = f"logistic regression, log Z = {evidence:.3f}"
    table = Table(title, {"objective": "50s", "gap": "7.3f", "+-": "7.3f"})
    for name, way in tqdm(ways.items(), desc="logistic"):
        _, bound, error = tune(model, way, StepSize(0.01), budget)
        table.rows.append([name, evidence - bound, error])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of objectives (default: all)")
    parser.add_argument("--output", type=Path, help="folder for tuning.txt and results.json")
    parser.add_argument("--smoke", action="store_true", help="seconds only")
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    budget = Budget(2, 8, 2000) if options.smoke else Budget()
    names = options.only or (["PathDensity", "GaussianReverse"] if options.smoke else list(WAYS))
    ways = {k: w for k, w in {**WAYS, **LEARNED}.items() if k in names or not (options.only or options.smoke)}
    first = gaussian_table(budget, TARGETS[1:2] if options.smoke else TARGETS, [n for n in names if n in WAYS])
    second = logistic_table(budget, ways)
    text = "\n".join([*first.lines(), "", second.title, *second.lines()])
    print(text)
    record(options.output, [first, second])
    if options.output is not None:
        (options.output / "tuning.txt").write_text(text + "\n")


if __name__ == "__main__":
    main()
