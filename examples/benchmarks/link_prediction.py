"""Links of dynamic graphs, detected and predicted by VGRNN, SI-VGRNN and short runs; beside the published figures.

    python examples/benchmarks/link_prediction.py --data DIR                   # enron10.npz, dblp.npz; an hour
    python examples/benchmarks/link_prediction.py --data DIR --sets enron10    # some of them
    python examples/benchmarks/link_prediction.py --data DIR --quick           # minutes: fewer epochs and seeds
    python examples/benchmarks/link_prediction.py --smoke                      # a generated graph, to see that it runs

Protocol (Hajiramezanali et al., NeurIPS 2019): the last three snapshots are for testing. *Prediction*: inner products
of the prior means of z_t, which know the snapshots before t, on all edges of snapshot t and as many pairs without an
edge. *New links*: the same on edges that the snapshot before does not have. *Detection*: a model whose networks see
graphs without 15 % of the edges of every snapshot (the likelihood of the training snapshots has them all, as in the
authors' code); inner products of the guide's means on the hidden edges that are for testing, 10 % of all. Area under
the ROC curve (AUC) and average precision (AP) in percent, means over the three snapshots, then mean and standard
deviation over seeds. The last epoch counts, there is no selection on the test snapshots: the best test epoch, as some
reports have it, is worth more than any difference in the table.

    VGRNN                Gaussian guide; the graph GRU stays as it was drawn, as in the authors' released code
    SI-VGRNN             the same with a guide network that is fed with noise (see examples/vgrnn.py)
    VGRNN, GRU trained   every weight trained
    short run            as VGRNN without a guide network: Langevin steps that go on from epoch to epoch
                         (ShortRunGuide, Persistent)

All seeds of a row train at once, as a batch dimension, so minutes are for all of them together. A row is compared with
the first by a paired test (same seeds, so same initial networks, and same negative pairs).

Results are kept in cells.json of the output folder as they come; the same command goes on from there.

The data files have `edges` (rows t, i, j; undirected), `num_steps` and `num_nodes`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.reparam import LocScaleReparam
from record import Table, record
from scipy.stats import ttest_rel
from torch import Tensor
from tqdm import tqdm

from pyro_shortrun import Langevin, Persistent, ShortRunGuide, StepSize

sys.path.insert(0, str(Path(__file__).parents[1]))
from vgrnn import (  # noqa: E402
    VGRNN,
    Gaussian,
    NoiseFed,
    Snapshot,
    communities,
    means,
    model_of,
    non_edges,
    scores,
    train,
)

TEST = 3  # snapshots
COLUMNS = ("prediction AUC", "prediction AP", "new AUC", "new AP", "detection AUC", "detection AP")
# Means and standard deviations as the papers report them.
PUBLISHED = {
    "enron10": {
        "published: VGRNN": ((93.10, 0.57), (93.29, 0.69), (88.43, 0.75), (87.57, 0.57), (94.41, 0.73), (95.17, 0.41)),
        "published: SI-VGRNN": (
            (93.93, 1.03),
            (94.44, 0.85),
            (88.60, 0.95),
            (87.88, 0.84),
            (95.03, 1.07),
            (96.31, 0.72),
        ),
    },
    "dblp": {
        "published: VGRNN": ((85.95, 0.49), (87.77, 0.79), (77.09, 0.23), (79.63, 0.94), (88.67, 1.57), (89.74, None)),
        "published: SI-VGRNN": (
            (85.45, 0.91),
            (88.36, 0.73),
            (77.95, 0.41),
            (81.26, 0.38),
            (89.15, 1.31),
            (89.90, None),
        ),
    },
}


@dataclass(frozen=True)
class Kind:
    """A row of the table."""

    name: str
    noisy: bool = False
    train_recurrence: bool = False
    short: bool = False


KINDS = (
    Kind("VGRNN"),
    Kind("SI-VGRNN", noisy=True),
    Kind("VGRNN, GRU trained", train_recurrence=True),
    Kind("short run", short=True),
)


def load(folder: str | None, name: str) -> Tensor:
    """``(T, N, N)``, symmetric, without loops."""
    if folder is None:
        return communities(30, 6, 3, seed=0)
    with np.load(Path(folder) / f"{name}.npz") as file:
        steps, nodes = int(file["num_steps"]), int(file["num_nodes"])
        t, i, j = file["edges"].T.astype(int)
    out = torch.zeros(steps, nodes, nodes)
    out[t, i, j] = out[t, j, i] = 1
    return out


def hide(adjacency: Tensor, seeds: Sequence[int]) -> tuple[list[Snapshot], list[list[Tensor]]]:
    """Snapshots of which every seed sees 85 % of the edges of its own choice, and the 10 % to detect, ``[t][seed]``."""
    snapshots, hidden = [], []
    for t, now in enumerate(adjacency):
        seen, tests = [], []
        for seed in seeds:
            edges = torch.triu(now).nonzero()
            edges = edges[np.random.default_rng([seed, t]).permutation(len(edges))]
            tests.append(edges[: len(edges) // 10])
            away = edges[: len(edges) * 3 // 20]
            graph = now.clone()
            graph[away[:, 0], away[:, 1]] = graph[away[:, 1], away[:, 0]] = 0
            seen.append(graph)
        snapshots.append(Snapshot(now, len(seeds), torch.stack(seen)))
        hidden.append(tests)
    return snapshots, hidden


def judge_predictions(z: Tensor, adjacency: Tensor, seeds: Sequence[int]) -> np.ndarray:
    """AUC and AP in percent, of all edges and of new ones, for each seed; ``z`` are means, ``(T, seeds, N, d)``."""
    out = []
    for i, seed in enumerate(seeds):
        rng, found = np.random.default_rng(seed), []
        for t in range(len(adjacency) - TEST, len(adjacency)):
            every = torch.triu(adjacency[t]).nonzero()
            new = torch.triu(adjacency[t] * (1 - adjacency[t - 1])).nonzero()
            pairs = [(edges, non_edges(adjacency[t], len(edges), rng)) for edges in (every, new)]
            found.append([value for pair in pairs for value in scores(z[t, i], *pair)])
        out.append(np.mean(found, 0))
    return 100 * np.array(out)


def judge_detection(z: Tensor, adjacency: Tensor, hidden: list[list[Tensor]], seeds: Sequence[int]) -> np.ndarray:
    out = []
    for i, seed in enumerate(seeds):
        rng = np.random.default_rng(seed)
        tests = range(len(adjacency) - TEST, len(adjacency))
        found = [scores(z[t, i], hidden[t][i], non_edges(adjacency[t], len(hidden[t][i]), rng)) for t in tests]
        out.append(np.mean(found, 0))
    return 100 * np.array(out)


def fresh(kind: Kind, adjacency: Tensor, seeds: Sequence[int]) -> VGRNN:
    pyro.clear_param_store()
    pyro.set_rng_seed(seeds[0])
    return VGRNN(adjacency.shape[-1], seeds, train_recurrence=kind.train_recurrence)


class Store:
    """Results in a file, by what they depend on, so that a command that was interrupted goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known = json.loads(path.read_text()) if path.exists() else {}

    def get(self, key: str, compute: Callable[[], tuple[np.ndarray, Sequence[float]]]) -> dict[str, list]:
        if key not in self.known:
            values, minutes = compute()
            self.known[key] = {"values": values.tolist(), "minutes": list(minutes)}
            self.path.write_text(json.dumps(self.known, indent=1))
        return self.known[key]


def minutes_since(began: tuple[float, float]) -> tuple[float, float]:
    """Wall and CPU."""
    return (time.perf_counter() - began[0]) / 60, (time.process_time() - began[1]) / 60


def by_guide(
    kind: Kind, adjacency: Tensor, task: str, args: argparse.Namespace, name: str
) -> tuple[np.ndarray, tuple[float, float]]:
    """A model with a guide network: columns of the task, ``(seeds, 2 or 4)``, and minutes of training."""
    net, kept = fresh(kind, adjacency, args.seeds), len(adjacency) - TEST
    data, hidden = [Snapshot(a, len(args.seeds)) for a in adjacency], []
    if task == "detection":
        data, hidden = hide(adjacency, args.seeds)
    began = time.perf_counter(), time.process_time()
    family = NoiseFed() if kind.noisy else Gaussian()
    guide = train(net, family, data[:kept], args.epochs, num_mixtures=args.num_mixtures, name=name)
    minutes = minutes_since(began)
    prior, posterior = means(net, guide, data)
    if task == "detection":
        return judge_detection(posterior, adjacency, hidden, args.seeds), minutes
    return judge_predictions(prior, adjacency, args.seeds), minutes


def by_short_runs(
    kind: Kind, adjacency: Tensor, args: argparse.Namespace, name: str
) -> tuple[np.ndarray, tuple[float, float]]:
    """The same model without a guide network."""
    net = fresh(kind, adjacency, args.seeds)
    data, kept = [Snapshot(a, len(args.seeds)) for a in adjacency], len(adjacency) - TEST

    def make(steps: int, **options: object) -> tuple[object, ShortRunGuide]:
        sites = {f"z_{t}": LocScaleReparam(0.0) for t in range(len(data))}  # one step size for all snapshots
        model = poutine.reparam(model_of(net, scale=1.0), config=sites)
        dynamics = Langevin(StepSize(args.step_size, learnable=False), max_drift=1.0)
        return model, ShortRunGuide(model, num_steps=steps, dynamics=dynamics, tune_every=10**9, **options)

    began = time.perf_counter(), time.process_time()
    model, guide = make(args.run, start=Persistent())
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in tqdm(range(args.short_epochs), desc=name, mininterval=5):
        svi.step(data[:kept])
    minutes = minutes_since(began)
    z = torch.zeros(len(data), len(args.seeds), net.nodes, net.latent)
    with torch.no_grad():
        for t in range(kept, len(data)):
            model, guide = make(args.judge_run)
            drawn = {k: v[0, 0] for k, v in guide.sample_posterior(data[:t], num_samples=1).items()}
            traced = poutine.trace(poutine.condition(model, data=drawn)).get_trace(data[:t])
            x, h = net.begin()
            for i in range(t):
                h = net.step(i, data[i].graph, x, traced.nodes[f"z_{i}"]["value"], h)
            z[t] = net.prior(h)[0]
    return judge_predictions(z, adjacency, args.seeds), minutes


def settings(kind: Kind, args: argparse.Namespace) -> str:
    """What else a row depends on."""
    if kind.short:
        return f", run {args.run} of {args.step_size}, judged after {args.judge_run}"
    return f", K {args.num_mixtures}" if kind.noisy else ""


def find(
    kind: Kind, name: str, adjacency: Tensor, store: Store, args: argparse.Namespace
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A row: column to values over seeds, and minutes (wall, CPU) for all of it."""
    out, spent = {}, np.zeros(2)
    for task in args.tasks:
        title = f"{name} {kind.name} {task}"
        epochs = args.short_epochs if kind.short else args.epochs
        key = f"{title}, {epochs} epochs, seeds {args.seeds}{settings(kind, args)}"
        if args.show and key not in store.known:
            continue
        if not kind.short:
            found = store.get(key, lambda task=task, title=title: by_guide(kind, adjacency, task, args, title))
        elif task == "prediction":
            found = store.get(key, lambda title=title: by_short_runs(kind, adjacency, args, title))
        else:
            continue
        columns = COLUMNS[4:] if task == "detection" else COLUMNS[:4]
        out |= dict(zip(columns, np.array(found["values"]).T, strict=True))
        spent += found["minutes"]
    return out, spent


def show(value: tuple[float, float | None] | None) -> str:
    if value is None:
        return f"{'-':>16}"
    return f"{value[0]:>9.2f} +-{value[1]:>4.2f}" if value[1] is not None else f"{value[0]:>9.2f}       "


def row(name: str, values: Sequence[tuple[float, float | None] | None], minutes: str = "") -> str:
    return f"{name:<20}" + "".join(show(v) for v in values) + f"{minutes:>14}"


def compare(name: str, first: str, a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> list[str]:
    """Paired differences of seeds."""
    lines = []
    for column in COLUMNS:
        if column in a and column in b and len(a[column]) > 1:
            d = a[column] - b[column]
            error, p = d.std(ddof=1) / math.sqrt(len(d)), ttest_rel(a[column], b[column]).pvalue
            verdict = "inside one standard error: no claim" if abs(d.mean()) <= error else f"p = {p:.3f}"
            lines.append(f"{name} - {first}, {column:<15}{d.mean():>+7.2f} +- {error:.2f} (s.e.)  {verdict}")
    return lines


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    if args.quick:
        args.epochs, args.short_epochs, args.seeds = 250, 60, args.seeds[:3]
    if args.smoke:
        args.epochs, args.short_epochs, args.seeds, args.data, args.sets = 2, 2, [0, 1], None, ["generated"]
        args.run, args.judge_run = 2, 3
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    if args.data is None and args.sets != ["generated"]:
        raise SystemExit("pass --data DIR with enron10.npz and dblp.npz (or --smoke)")
    tables: list[Table] = []
    lines, store = [], Store(folder / "cells.json")
    for name in args.sets:
        adjacency = load(args.data, name)
        head = [
            f"{name}: {adjacency.shape[1]} nodes, {len(adjacency)} snapshots; {len(args.seeds)} seeds, {args.epochs} "
            f"epochs (short run {args.short_epochs}), last epoch; minutes for all seeds: wall (CPU)",
            f"{'':<20}" + "".join(f"{c:>16}" for c in COLUMNS) + f"{'minutes':>14}",
        ]
        print("\n".join(head), flush=True)
        lines += head
        tables.append(Table(head[0], {"model": "20s", **dict.fromkeys(COLUMNS, ">16s"), "minutes": ">14s"}))
        found: dict[str, dict[str, np.ndarray]] = {}
        for kind in (k for k in KINDS if args.models is None or k.name in args.models):
            found[kind.name], spent = find(kind, name, adjacency, store, args)
            if not found[kind.name]:
                continue
            columns = (found[kind.name].get(c) for c in COLUMNS)
            values = [None if v is None else (float(v.mean()), float(v.std(ddof=1))) for v in columns]
            minutes = f"{spent[0]:.1f} ({spent[1]:.1f})"
            lines.append(row(kind.name, values, minutes))
            tables[-1].rows.append([kind.name, *(show(v).strip() for v in values), minutes])
            print(lines[-1], flush=True)
        tail = [row(k, v) for k, v in PUBLISHED.get(name, {}).items()]
        first = next(iter(found))
        for other in list(found)[1:]:
            tail += compare(other, first, found[other], found[first])
        print("\n".join([*tail, ""]), flush=True)
        lines += [*tail, ""]
        (folder / "links.txt").write_text("\n".join(lines) + "\n")
        record(folder, tables)


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--data", help="folder with enron10.npz and dblp.npz")
    out.add_argument("--sets", nargs="+", default=["enron10", "dblp"])
    out.add_argument("--models", nargs="+", choices=[k.name for k in KINDS], help="some rows only")
    out.add_argument("--tasks", nargs="+", default=["prediction", "detection"], choices=["prediction", "detection"])
    out.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    out.add_argument("--epochs", type=int, default=1000)
    out.add_argument("--num-mixtures", type=int, default=5, help="K of SI-VGRNN")
    out.add_argument("--short-epochs", type=int, default=300)
    out.add_argument("--run", type=int, default=5, help="steps of a short run in training")
    out.add_argument("--judge-run", type=int, default=100, help="steps from the prior, for the test snapshots")
    out.add_argument("--step-size", type=float, default=0.005, help="eta, in units of the prior's variance")
    out.add_argument("--output", default="links-output")
    out.add_argument("--show", action="store_true", help="the table of what cells.json holds; runs nothing")
    out.add_argument("--quick", action="store_true", help="three seeds, a quarter of the epochs")
    out.add_argument("--smoke", action="store_true", help="tiny settings, to see that it runs")
    return out


if __name__ == "__main__":
    main(parser().parse_args())
