"""Short runs, AutoGuides, SVGD, NUTS and AutoDAIS on 16 posteriors of posteriordb, at equal numbers of gradients.

    python examples/benchmarks/gradients.py --data FOLDER            # FOLDER holds load_data.py and posteriordb/
    python examples/benchmarks/gradients.py --data FOLDER --quick    # 40 000 gradients: about two hours on one core
    python examples/benchmarks/gradients.py --smoke                  # seconds, on made-up data, without a reference

One line per posterior and method. Training ends after a number of gradients of the model's log density (a run of K
steps takes K; the Hessian products of log-determinants are not counted, but their seconds are) or, where that is
sooner, a number of seconds after the first steps; `seconds` is all of it, compilation included. The start of short runs
and of AutoDAIS is trained by itself for a quarter of the budget, then with the run. From draws made afresh:

    bound    mean log weight, a lower bound of log p(x), +- its Monte Carlo error; * where log q is not certain
    mean     largest error of a posterior mean in reference standard deviations
    sd       largest relative error of a standard deviation, in %
    SW       sliced Wasserstein-1 distance to the reference draws, all standardised by the reference, 100 directions
    k-hat    Pareto shape of the log weights (ArviZ); below 0.7 importance sampling would mend the draws

The output folder keeps what was measured: a call that was cut off goes on, and other `--methods` or `--only` add rows
to a table of the same settings. With `--jax-python`, a Python that has NumPyro, AutoDAIS takes part (base distribution:
diagonal or full Gaussian). `distance.png` shows SW along training, a geometric mean over the posteriors that all
methods were run on; a method keeps its last value where the clock stopped it.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import arviz as az
import matplotlib
import numpy as np
import pyro
import torch
from gradients_dais import auto_dais
from gradients_rivals import (
    ALONE,
    NUM_DRAWS,
    PROBE_DRAWS,
    RIVALS,
    START_RATE,
    Bound,
    Fitted,
    Meter,
    Method,
    fit_guide,
    train,
)
from posteriordb import load, made_up
from posteriordb_models import POSTERIORS, Draws
from pyro.infer import SVI
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from record import Table, record
from tqdm import tqdm

from pyro_shortrun import (
    Annealed,
    GaussianReverse,
    Hamiltonian,
    Langevin,
    Linearized,
    Mixture,
    PathDensity,
    Prior,
    ShortRunELBO,
    ShortRunGuide,
    StepSize,
)

matplotlib.use("Agg")

DIRECTIONS, LEVELS = 100, 1000
START_PARTICLES, FIRST_STEP, LOSSES = 8, 0.1, 20
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Budget:
    """Gradients and seconds of each cell."""

    gradients: int
    seconds: float


FULL, QUICK, SMOKE = Budget(400_000, 1200.0), Budget(40_000, 120.0), Budget(400, 5.0)


# ---------------------------------------------------------------- short runs


@dataclass(frozen=True)
class ShortRun:
    """A configuration: a guide to start from, or None for the prior, and other keyword arguments of a ShortRunGuide."""

    name: str
    start: Callable[[Callable], Any] | None
    options: Callable[[], dict[str, Any]]
    num_particles: int = 4
    rate: float = 0.02

    def method(self, num_steps: int, compiles: bool) -> Method:
        return Method(self.name, partial(short_run, self, num_steps, compiles))


def by_coordinate() -> Langevin:
    return Langevin(StepSize(FIRST_STEP, per="dim", max=1.0))


def leapfrog() -> Hamiltonian:
    return Hamiltonian(StepSize(FIRST_STEP, per="dim", max=1.0))


def learned_reverse() -> GaussianReverse:
    return GaussianReverse(True, fresh=16)


def shrink_steps(guide: ShortRunGuide, u: torch.Tensor) -> None:
    """Step sizes to FIRST_STEP times the conditional variances of the start's draws, ``(N, size)``."""
    conditional = 1 / torch.linalg.inv(u.T.cov().reshape(u.shape[1], -1)).diagonal()
    guide.dynamics.step_size.shrink(conditional.clamp(max=1.0))


SHORT_RUN = [
    ShortRun("annealed", AutoNormal, lambda: {"dynamics": by_coordinate(), "objective": Annealed()}),
    ShortRun("annealed, full", AutoMultivariateNormal, lambda: {"dynamics": by_coordinate(), "objective": Annealed()}),
    ShortRun("path density", AutoNormal, lambda: {"dynamics": by_coordinate(), "objective": PathDensity()}),
    ShortRun("hamiltonian, full", AutoMultivariateNormal, lambda: {"dynamics": leapfrog(), "objective": Annealed()}),
    ShortRun("reverse", AutoNormal, lambda: {"dynamics": by_coordinate(), "objective": learned_reverse()}, 16),
    ShortRun(
        "reverse, full",
        AutoMultivariateNormal,
        lambda: {"dynamics": by_coordinate(), "objective": learned_reverse()},
        16,
    ),
]
SHORT_RUN += [
    ShortRun("annealed, prior", None, lambda: {"dynamics": by_coordinate(), "objective": Annealed()}),
    ShortRun("path density, prior", None, lambda: {"dynamics": by_coordinate(), "objective": PathDensity()}),
    ShortRun("reverse, prior", None, lambda: {"dynamics": by_coordinate(), "objective": learned_reverse()}, 16),
    ShortRun("linearized", AutoNormal, lambda: {"dynamics": by_coordinate(), "objective": Linearized()}),
    ShortRun("mixture", AutoNormal, lambda: {"dynamics": by_coordinate(), "objective": Mixture(16)}, 1),
]
RECOMMENDED = "annealed, full"


def short_run(config: ShortRun, num_steps: int, compiles: bool, bound: Bound, meter: Meter) -> Fitted:
    start = Prior() if config.start is None else config.start(bound.model)
    options = {"start": start, **config.options()}
    guide = ShortRunGuide(bound.model, num_steps=num_steps, compile=compiles, **options).setup(*bound.args)
    if config.start is not None:
        started = fit_guide(guide.start, START_RATE, START_PARTICLES, bound, meter, ALONE)
        shrink_steps(guide, bound.free(started(PROBE_DRAWS)[1]))
        meter.restart()
    optimiser = pyro.optim.ClippedAdam({"lr": config.rate})
    svi = SVI(bound.model, guide, optimiser, ShortRunELBO(config.num_particles))

    def draws() -> Draws:
        return guide.sample_posterior(*bound.args, num_samples=PROBE_DRAWS)

    def step() -> None:
        svi.step(*bound.args)

    train(step, optimiser, config.rate, num_steps * runs_of(guide, config.num_particles), meter, draws)
    return fitted(guide, bound, NUM_DRAWS)


def runs_of(guide: ShortRunGuide, num_particles: int) -> int:
    """Runs that a step of training makes, pilots included."""
    pilots = guide.objective.fresh * 4 if isinstance(guide.objective, GaussianReverse) else 0
    return num_particles * guide.objective.copies + pilots


def fitted(guide: ShortRunGuide, bound: Bound, count: int) -> Fitted:
    """Draws with their weights; of an objective that has none, its value in `LOSSES` calls."""
    if guide.objective.weighs:
        _, drawn = guide.weighted_draws(bound.args, {}, count)
        assert drawn.log_p is not None and drawn.log_q is not None and guide.info is not None
        note = f"{guide.info.noninvertible} singular rows" if guide.info.noninvertible else ""
        return Fitted({k: v[None] for k, v in drawn.values.items()}, drawn.log_p - drawn.log_q, bool(note), note)
    elbo = ShortRunELBO(num_particles=100)
    values = torch.tensor([-elbo.loss(bound.model, guide, *bound.args) for _ in range(LOSSES)])
    draws = guide.sample_posterior(*bound.args, num_samples=count)
    return Fitted(draws, values, isinstance(guide.objective, Linearized), are_weights=False)


# ---------------------------------------------------------------- figures of merit


@dataclass(frozen=True)
class Reference:
    """Reference draws ``{parameter: (draws,)}``."""

    draws: Arrays

    @property
    def _moments(self) -> tuple[np.ndarray, np.ndarray]:
        stacked = np.stack(list(self.draws.values()))
        return stacked.mean(1), stacked.std(1)

    def errors(self, draws: Arrays) -> tuple[float, float]:
        """Of means, in reference standard deviations, and of standard deviations, in %; the worst over parameters."""
        mean, sd = self._moments
        found = np.stack([draws[k] for k in self.draws])
        return float(np.abs((found.mean(1) - mean) / sd).max()), float(100 * np.abs(found.std(1) / sd - 1).max())

    def distance(self, draws: Arrays) -> float:
        """Sliced Wasserstein-1 distance: means over random directions of the distance of one-dimensional quantiles."""
        mean, sd = self._moments
        directions = np.random.default_rng(0).standard_normal((DIRECTIONS, len(mean)))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        levels = (np.arange(LEVELS) + 0.5) / LEVELS

        def quantiles(x: Arrays) -> np.ndarray:
            standardised = (np.stack([x[k] for k in self.draws]) - mean[:, None]) / sd[:, None]
            return np.quantile(directions @ standardised, levels, axis=1)

        return float(np.abs(quantiles(draws) - quantiles(self.draws)).mean())


def flat(bound: Bound, draws: Draws) -> Arrays:
    """Parameters of the reference, ``(draws,)`` each."""
    return {k: v.reshape(-1).numpy() for k, v in bound.posterior.parameters(draws).items()}


def khat(log_weights: np.ndarray) -> float:
    """Pareto k-hat, by whichever function this ArviZ has."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if hasattr(az, "psislw"):
            return float(az.psislw(log_weights.copy())[1])
        from arviz_stats.base import array_stats  # ArviZ 1.x takes minus the log weights, as of a log likelihood

        return float(array_stats.psislw(-log_weights)[1])


@dataclass
class Row:
    """A line of the table; None where there is no figure."""

    posterior: str
    method: str
    bound: float | None = None
    error: float | None = None
    estimate: bool = False
    mean: float | None = None
    sd: float | None = None
    distance: float | None = None
    khat: float | None = None
    gradients: int = 0
    seconds: float = 0.0
    note: str = ""
    curve: list[tuple[int, float]] | None = None

    HEAD = f"{'posterior':40s} {'method':24s} {'bound':>12s}    error   mean   sd %     SW k-hat gradients seconds"

    def __str__(self) -> str:
        star = "*" if self.estimate else " "
        figures = [
            f"{_number(self.bound, 12, 2)}{star} +-{_number(self.error, 6, 3)} {_number(self.mean, 6, 3)}",
            f"{_number(self.sd, 6, 1)} {_number(self.distance, 6, 3)} {_number(self.khat, 5, 2)}",
            f"{self.gradients:9d} {self.seconds:7.1f}  {self.note}",
        ]
        return f"{self.posterior:40s} {self.method:24s} {' '.join(figures)}".rstrip()


# A table's columns in the order of these fields.
FIELDS = ["posterior", "method", "bound", "error", "mean", "sd", "distance", "khat", "gradients", "seconds", "note"]
FORMS = {"posterior": "40s", "method": "24s", "bound": "12.2f", "+-": "6.3f", "mean": "6.3f", "sd %": "6.1f"}
FORMS |= {"SW": "6.3f", "k-hat": "5.2f", "gradients": "9d", "seconds": "7.1f", "note": "s"}


def _number(value: float | None, width: int, digits: int) -> str:
    if value is None or not math.isfinite(value):
        return "-".rjust(width)
    text = f"{value:{width}.{digits}f}"
    return text if len(text) <= width else f"{value:{width}.0e}"


def measure(row: Row, bound: Bound, fitted: Fitted, reference: Reference | None) -> None:
    """Fills in what is known of a fit."""
    row.estimate, row.note = fitted.estimate, fitted.note
    if fitted.log_weights is not None:
        log_weights = fitted.log_weights.numpy()
        row.bound, row.error = float(log_weights.mean()), float(log_weights.std() / len(log_weights) ** 0.5)
        row.khat = khat(log_weights) if fitted.are_weights and np.isfinite(log_weights).all() else None
    draws = flat(bound, fitted.draws)
    if not all(np.isfinite(v).all() for v in draws.values()):
        row.note += " draws are not finite"
    elif reference is not None:
        row.mean, row.sd = reference.errors(draws)
        row.distance = reference.distance(draws)


def cell(method: Method, name: str, bound: Bound, reference: Reference | None, budget: Budget, seed: int) -> Row:
    """Fit and measure; a method that fails says why in its note."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    row = Row(name, method.name)
    probe = None if reference is None else lambda draws: reference.distance(flat(bound, draws))
    meter = Meter(budget.gradients, budget.seconds, probe)
    try:
        measure(row, bound, method.fit(bound, meter), reference)
    except Exception as reason:
        row.note = f"{type(reason).__name__}: {str(reason).splitlines()[0][:100] if str(reason) else ''}"
    row.gradients, row.seconds, row.curve = meter.spent, meter.elapsed, meter.curve
    return row


@dataclass
class Results:
    """Rows in a file, written after each; those of an earlier call with the same settings are kept."""

    path: Path
    settings: str

    def __post_init__(self) -> None:
        known = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.rows = [Row(**row) for row in known["rows"]] if known.get("settings") == self.settings else []

    def has(self, posterior: str, method: str) -> bool:
        return any((row.posterior, row.method) == (posterior, method) for row in self.rows)

    def add(self, row: Row) -> None:
        names = [*POSTERIORS, row.posterior]
        self.rows = sorted([*self.rows, row], key=lambda r: names.index(r.posterior))
        rows = [asdict(row) for row in self.rows]
        self.path.write_text(json.dumps({"settings": self.settings, "rows": rows}, indent=1))


# ---------------------------------------------------------------- summary and picture


def summary(rows: list[Row]) -> list[str]:
    """In how many posteriors each method is better than others, the recommended configuration first."""
    found = {(r.posterior, r.method): r for r in rows}
    names = list(dict.fromkeys(r.posterior for r in rows))
    methods = sorted(dict.fromkeys(r.method for r in rows), key=lambda m: m != RECOMMENDED)

    def wins(method: str, rival: str) -> str:
        both = [n for n in names if (n, method) in found and (n, rival) in found]
        pairs = [(found[n, method].bound, found[n, rival].bound) for n in both]
        pairs = [(a, b) for a, b in pairs if a is not None and b is not None]
        return f"{sum(a > b for a, b in pairs):2d} of {len(pairs):2d}" if pairs else "-"

    rivals = ["AutoNormal", "AutoDAIS", "AutoDAIS, full"]
    lines = [f"{'posteriors where':24s} " + " ".join(f"{'> ' + r:>16s}" for r in rivals) + "  mean < 0.2 geo-mean SW"]
    for method in methods:
        own = [found[n, method] for n in names if (n, method) in found]
        good = sum(r.mean is not None and r.mean < 0.2 for r in own)
        distances = [r.distance for r in own if r.distance]
        average = f"{math.exp(np.log(distances).mean()):11.4f}" if distances else f"{'-':>11s}"
        mark = "  <- recommended" if method == RECOMMENDED else ""
        against = " ".join(f"{wins(method, r):>16s}" for r in rivals)
        lines.append(f"{method:24s} {against}    {good:2d} of {len(own):2d} {average}{mark}")
    return lines


def average_curve(rows: list[Row]) -> tuple[list[int], list[float]]:
    """Geometric mean over posteriors; from the first mark that all of them have."""
    curves = [dict(r.curve) for r in rows if r.curve]
    marks = sorted({mark for curve in curves for mark in curve})
    marks = [mark for mark in marks if all(mark >= min(curve) for curve in curves)]
    last = [[curve[max(m for m in curve if m <= mark)] for curve in curves] for mark in marks]
    return marks, [float(np.exp(np.log(values).mean())) for values in last]


def draw_distances(rows: list[Row], references: list[Reference], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    methods = list(dict.fromkeys(r.method for r in rows))
    ran = {m: {r.posterior for r in rows if r.method == m} for m in methods}
    common = set.intersection(*ran.values())
    rows = [r for r in rows if r.posterior in common]
    for method in methods:
        marks, values = average_curve([r for r in rows if r.method == method])
        if marks:
            axes.plot(marks, values, marker="o", linewidth=2.5 if method == RECOMMENDED else 1, label=method)
    if references:
        axes.axhline(math.exp(np.mean([np.log(floor(r)) for r in references])), color="grey", linestyle=":")
    axes.set(xscale="log", yscale="log", xlabel="gradient evaluations", ylabel="sliced Wasserstein-1 distance")
    axes.set_title(f"Geometric mean over the {len(common)} posteriors that all were run on; dotted: exact draws")
    if axes.get_legend_handles_labels()[1]:
        axes.legend()
    figure.savefig(path)
    plt.close(figure)


def floor(reference: Reference) -> float:
    """The distance of as many draws from the reference itself."""
    chosen = np.random.default_rng(1).permutation(len(next(iter(reference.draws.values()))))[:PROBE_DRAWS]
    return reference.distance({k: v[chosen] for k, v in reference.draws.items()})


# ---------------------------------------------------------------- the command


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with load_data.py and posteriordb/")
    parser.add_argument("--only", nargs="*", help="names of posteriors (default: all)")
    parser.add_argument("--methods", nargs="*", help="names of methods (default: all)")
    parser.add_argument("--steps", type=int, default=20, help="K of short runs and AutoDAIS (default: 20)")
    parser.add_argument("--gradients", type=int, help="of each cell, instead of the default")
    parser.add_argument("--seconds", type=float, help="of each cell, instead of the default")
    parser.add_argument("--quick", action="store_true", help="small budgets")
    parser.add_argument("--smoke", action="store_true", help="seconds only, made-up data")
    parser.add_argument("--compile", action="store_true", help="compile short runs")
    parser.add_argument("--jax-python", help="a Python with NumPyro, for AutoDAIS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("gradients-output"), help="folder for the results")
    options = parser.parse_args()
    if not options.smoke and options.data is None:
        parser.error("--data is needed: the folder with load_data.py and posteriordb/ (or --smoke)")
    return options


def chosen_methods(options: argparse.Namespace) -> list[Method]:
    steps = 3 if options.smoke else options.steps
    dais = partial(auto_dais, options.jax_python, steps, options.seed)
    methods = [
        *(config.method(steps, options.compile) for config in SHORT_RUN),
        *RIVALS,
        Method("AutoDAIS", partial(dais, "diagonal")),
        Method("AutoDAIS, full", partial(dais, "cholesky")),
    ]
    wanted = options.methods or (["annealed", "AutoNormal", "SVGD"] if options.smoke else [m.name for m in methods])
    unknown = set(wanted) - {m.name for m in methods}
    if unknown:
        raise SystemExit(f"no methods {sorted(unknown)}; there are {[m.name for m in methods]}")
    return [m for m in methods if m.name in wanted]


def problems(options: argparse.Namespace) -> dict[str, tuple[Bound, Reference | None]]:
    """Posteriors by name, with their references."""
    if options.smoke:
        return {"made-up regression": (Bound(POSTERIORS["sblri-blr"], made_up()), None)}
    loader = load(options.data)
    found: dict[str, tuple[Bound, Reference | None]] = {}
    for name in options.only or list(POSTERIORS):
        known = loader.posterior(name)
        reference = Reference({k: v.reshape(-1) for k, v in known["draws"].items()})
        found[name] = Bound(POSTERIORS[name], known["data"]), reference
    return found


def main() -> None:
    options = arguments()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    base = SMOKE if options.smoke else QUICK if options.quick else FULL
    budget = Budget(options.gradients or base.gradients, options.seconds or base.seconds)
    settings = f"{budget.gradients} gradients or {budget.seconds:g} s a cell; K = {options.steps}; seed {options.seed}"
    options.output.mkdir(parents=True, exist_ok=True)
    known, methods = problems(options), chosen_methods(options)
    results = Results(options.output / "cells.json", settings)
    print(f"{settings}; {NUM_DRAWS} draws\n{Row.HEAD}")
    for name, (bound, reference) in known.items():
        for method in tqdm(methods, desc=name, leave=False):
            if not results.has(name, method.name):
                results.add(row := cell(method, name, bound, reference, budget, options.seed))
                tqdm.write(str(row))
    lines = summary(results.rows)
    print("\n".join(["", *lines]))
    (options.output / "table.txt").write_text("\n".join([settings, Row.HEAD, *map(str, results.rows), "", *lines, ""]))
    record(options.output, [Table(settings, FORMS, [[getattr(r, k) for k in FIELDS] for r in results.rows])])
    references = [reference for _, reference in known.values() if reference is not None]
    draw_distances(results.rows, references, options.output / "distance.png")


if __name__ == "__main__":
    main()
