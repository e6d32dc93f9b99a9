"""Variational MCMC teaching: a VAE starts the runs of an energy-based model and is trained on where they end.

    python examples/variational_teaching.py                                  # scikit-learn's digits, minutes
    python examples/variational_teaching.py --data mnist.npz --images 10000  # 14 x 14 pixels; or a folder with an npz
    python examples/variational_teaching.py --condition label                # given the class
    python examples/variational_teaching.py --condition half                 # the lower half, given the upper
    python examples/variational_teaching.py --smoke                          # seconds, to see that it runs

    VAE alone    decoder and encoder by Trace_ELBO on the data, with ``--alone`` updates (no less time than teaching)
    taught       the same VAE after ``--warm`` updates, then by Trace_ELBO on refined samples, never on data
    dual         the same, on both in turn

With ``--condition``, energy, decoder and encoder know the label (one-hot) or the upper half of the image, and Langevin
dynamics moves the image (its lower half) alone. The table has the Frechet distance to the data of features of a small
classifier that is trained here (comparable within one run only), of the VAE's own draws and of refined samples; where
there is a label, also the share of draws that the classifier takes for what was asked for. Contexts are those of the
data. samples.png has draws over training, chains.png runs from the VAE's draws to refined samples.
"""

from __future__ import annotations

import argparse
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from teaching_images import (
    SIGMA,
    Energy,
    Features,
    batches,
    chain,
    draw,
    finish,
    images,
    mlp,
    options,
    seeded,
    show,
    table,
)
from torch import Tensor
from tqdm import tqdm

from pyro_shortrun import MCMCTeaching, Refiner
from pyro_shortrun.teaching import AncestralSampler

SNAPSHOTS = 4
METHODS = ("VAE alone", "taught", "dual")


class Task(ABC):
    """What is drawn and what it is conditioned on."""

    shape: tuple[int, ...]  # of an image

    def __init__(self, images: Tensor, labels: Tensor, features: Features) -> None:
        self.images, self.labels, self.features = images, labels, features
        self.data, self.context = self.split()

    @abstractmethod
    def split(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The part of every image that is drawn, and contexts."""

    def whole(self, x: Tensor, *context: Tensor) -> Tensor:
        """Images from draws."""
        return x

    def scores(self, x: Tensor) -> dict[str, float]:
        """Of draws for the contexts of the first images."""
        whole = self.whole(x, *(c[: len(x)] for c in self.context))
        return {"distance": self.features.distance(whole, self.images)}

    def right(self, x: Tensor) -> float:
        """Share of draws that the classifier takes for what the data were."""
        whole = self.whole(x, *(c[: len(x)] for c in self.context))
        return (self.features.labels(whole) == self.labels[: len(x)]).float().mean().item()


class Free(Task):
    """Whole images, unconditionally."""

    def split(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.images, ()


class Labelled(Task):
    """Whole images given their class."""

    def split(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.images, (torch.nn.functional.one_hot(self.labels, 10).to(self.images.dtype),)

    def scores(self, x: Tensor) -> dict[str, float]:
        return {**super().scores(x), "right class": self.right(x)}


class Completed(Task):
    """The lower half of images given the upper one."""

    def split(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        upper, lower = self.images.tensor_split(2, -1)
        return lower, (upper,)

    def whole(self, x: Tensor, *context: Tensor) -> Tensor:
        return torch.cat([*context, x], -1)

    def scores(self, x: Tensor) -> dict[str, float]:
        return {**super().scores(x), "right class": self.right(x)}


TASKS: dict[str, type[Task]] = {"none": Free, "label": Labelled, "half": Completed}


def make_vae(task: Task, args: argparse.Namespace) -> tuple[Callable, Callable]:
    size, given = task.data.shape[1], sum(c.shape[1] for c in task.context)
    decoder = mlp(args.latents + given, args.hidden, args.hidden, size)
    encoder = mlp(size + given, args.hidden, args.hidden, 2 * args.latents)

    def model(x: Tensor, *context: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(args.latents), 1.0).to_event(1))
            image = torch.tanh(decoder(torch.cat([z, *context], -1)))
            pyro.sample("x", dist.Normal(image, SIGMA).to_event(1), obs=x)

    def guide(x: Tensor, *context: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(torch.cat([x, *context], -1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.clamp(-6, 2).exp()).to_event(1))

    return model, guide


def on_data(model: Callable, guide: Callable, count: int, task: Task, args: argparse.Namespace) -> None:
    svi = SVI(model, guide, pyro.optim.Adam({"lr": args.lr}), Trace_ELBO())
    for x, *context in tqdm(batches([task.data, *task.context], args.batch, count), "on data", count):
        svi.step(x, *context)


def make_teaching(method: str, task: Task, args: argparse.Namespace) -> MCMCTeaching:
    model, guide = make_vae(task, args)
    on_data(model, guide, args.warm, task, args)
    size = task.data.shape[1] + sum(c.shape[1] for c in task.context)
    energy = Energy(size, args.hidden)
    optim = torch.optim.Adam(energy.parameters(), lr=args.energy_lr, betas=(0.5, 0.999))
    refiner = Refiner(energy, args.steps, args.step_size, noise=args.noise, compile=args.compile)
    # Data hold the VAE; without them, it must follow the energy slowly, or both run in circles.
    lr = args.lr if method == "dual" else args.taught_lr
    svi = SVI(model, guide, pyro.optim.Adam({"lr": lr}), Trace_ELBO())
    return MCMCTeaching(AncestralSampler(model), refiner, svi, optim, dual=svi if method == "dual" else ())


def alone(task: Task, args: argparse.Namespace) -> Tensor:
    model, guide = make_vae(task, args)
    on_data(model, guide, args.alone, task, args)
    like = [part[: args.samples] for part in (task.data, *task.context)]
    return AncestralSampler(model).propose(*like)


def train(teaching: MCMCTeaching, name: str, task: Task, args: argparse.Namespace) -> list[Tensor]:
    """Refined samples over training."""
    progress = tqdm(batches([task.data, *task.context], args.batch, args.iterations), name, args.iterations)
    snapshots: list[Tensor] = []
    for i, (x, *context) in enumerate(progress):
        teaching.step(x, *context)
        progress.set_postfix(gap=f"{teaching.info.gap:.3f}", moved=f"{teaching.info.displacement:.2f}")
        if (i + 1) % max(1, args.iterations // SNAPSHOTS) == 0 and len(snapshots) < SNAPSHOTS:
            some = [part[:64] for part in (task.data, *task.context)]
            snapshots.append(task.whole(draw(teaching, args, *some).end, *some[1:]))
    return snapshots


def pictures(task: Task, teaching: MCMCTeaching, snapshots: list[Tensor], args: argparse.Namespace) -> None:
    figure, axes = plt.subplots(1, len(snapshots) + 1, figsize=(3 * len(snapshots) + 3, 3.2), layout="constrained")
    for i, (ax, x) in enumerate(zip(axes, snapshots, strict=False)):
        show(ax, x, 8, task.shape, f"refined, {i + 1}/{len(snapshots)} of training")
    show(axes[-1], task.images[:64], 8, task.shape, "data")
    figure.savefig(Path(args.output) / "samples.png", dpi=150)
    some = [part[:8] for part in (task.data, *task.context)]
    states = [task.whole(x, *some[1:]) for x in chain(teaching, args, *some)]
    figure, ax = plt.subplots(figsize=(5, 5), layout="constrained")
    rows = torch.stack(states, 1).flatten(0, 1)
    show(ax, rows, len(states), task.shape, "along a row: from the VAE's draw to the refined sample")
    figure.savefig(Path(args.output) / "chains.png", dpi=150)


def named(scores: dict[str, float], where: str) -> dict[str, float]:
    return {f"{k}, {where}": v for k, v in scores.items()}


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    pyro.enable_validation(False)
    if args.smoke:
        args.iterations, args.images, args.hidden, args.steps, args.batch, args.compile = 4, 200, 32, 3, 20, False
        args.samples, args.seeds, args.classifier, args.warm, args.alone = 100, 2, 20, 4, 8
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    x, y, shape = images(args.data, args.images, labels=args.condition != "none")
    task = TASKS[args.condition](x, y, Features(x, y, args.classifier))
    task.shape = shape
    half = task.images[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    floor = task.features.distance(*half.tensor_split(2))
    found: dict[str, list[dict[str, float]]] = {"data (one half to the other)": [{"distance, generator": floor}]}
    like = [part[: args.samples] for part in (task.data, *task.context)]
    for _ in seeded(args):
        for method in args.methods:
            pyro.clear_param_store()
            began = time.perf_counter()
            if method == "VAE alone":
                row = named(task.scores(alone(task, args)), "generator")
            else:
                teaching = make_teaching(method, task, args)
                snapshots = train(teaching, method, task, args)
                drawn = draw(teaching, args, *like)
                row = named(task.scores(drawn.start), "generator") | named(task.scores(drawn.end), "refined")
            found.setdefault(method, []).append({**row, "seconds": time.perf_counter() - began})
    title = (
        f"Frechet distance to the data, {args.iterations} iterations, {args.seeds} seeds, condition {args.condition}"
    )
    finish(args, table(title, found), "teaching.txt")
    if args.methods != ["VAE alone"]:
        pictures(task, teaching, snapshots, args)
    print(f"teaching.txt, samples.png and chains.png are in {folder}/")


def parser() -> argparse.ArgumentParser:
    out = options(__doc__, "teaching-output")
    out.add_argument("--condition", choices=list(TASKS), default="none")
    out.add_argument("--lr", type=float, default=1e-3, help="of decoder and encoder where they see data")
    out.add_argument("--taught-lr", type=float, default=2e-4, help="the same where they see no data")
    out.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    out.add_argument("--warm", type=int, default=1000, help="updates on the data before teaching; 0: from scratch")
    out.add_argument("--alone", type=int, default=4000, help="updates of the VAE alone")
    out.add_argument("--samples", type=int, default=2000)
    out.add_argument("--classifier", type=int, default=600, help="updates of the classifier")
    return out


if __name__ == "__main__":
    main(parser().parse_args())
