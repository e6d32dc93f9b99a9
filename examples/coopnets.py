"""CoopNets: an energy-based model and a generator that teach each other, with and without the generator's own MCMC.

    python examples/coopnets.py                                  # scikit-learn's handwritten digits, minutes
    python examples/coopnets.py --data mnist.npz --images 10000  # 14 x 14 pixels; or a folder with an npz
    python examples/coopnets.py --toy                            # eight Gaussians in the plane
    python examples/coopnets.py --smoke                          # seconds, to see that it runs

The generator draws, Langevin dynamics in the energy-based model refines, the energy learns from data and refined
samples, the generator from the refined samples alone: by regression on the latents that made them, or after a few
Langevin steps of these latents. "Alone" is the same generator trained on the data by short runs of its latents, with
``--alone`` times as many updates, so that it has about the time that teaching has.

The table has the distance of the generator's own draws and of refined samples to the data: on images the Frechet
distance of features of a small classifier that is trained here (comparable within one run only), in the plane the
squared maximum mean discrepancy. samples.png has draws over training, chains.png runs from generator to refined sample.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
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

from pyro_shortrun import Langevin, MCMCTeaching, Refiner, ShortRunGuide, StepSize
from pyro_shortrun.evaluation import squared_mmd
from pyro_shortrun.teaching import AncestralSampler

SNAPSHOTS = 4


@dataclass(frozen=True)
class Problem:
    """Data, the distance of samples to them, how to draw them, and the generator's noise and last layer."""

    data: Tensor
    distance: Callable[[Tensor, Tensor], float]
    name: str
    draw: Callable[[plt.Axes, Tensor, str], None]
    sigma: float
    last: Callable[[Tensor], Tensor]
    shape: tuple[int, ...] = ()


def eight(n: int) -> Tensor:
    """Eight Gaussians on a circle."""
    angle = 2 * math.pi * torch.randint(8, (n,)) / 8
    return torch.stack([angle.cos(), angle.sin()], -1) + 0.08 * torch.randn(n, 2)


def plane(ax: plt.Axes, x: Tensor, title: str) -> None:
    ax.scatter(*x[:1000].T, s=2)
    ax.set(xlim=(-1.8, 1.8), ylim=(-1.8, 1.8), aspect="equal", xticks=[], yticks=[])
    ax.set_title(title, fontsize=8)


def make_problem(args: argparse.Namespace) -> Problem:
    torch.manual_seed(0)
    if args.toy:
        return Problem(eight(5000), squared_mmd, "squared MMD", plane, 0.1, lambda h: h)
    x, y, shape = images(args.data, args.images, labels=False)
    features = Features(x, y, args.classifier)

    def drawn(ax: plt.Axes, x: Tensor, title: str) -> None:
        show(ax, x[:64], 8, shape, title)

    return Problem(x, features.distance, "Frechet distance", drawn, SIGMA, torch.tanh, shape)


def make_generator(problem: Problem, args: argparse.Namespace) -> Callable:
    decoder = mlp(args.latents, args.hidden, args.hidden, problem.data.shape[1])

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(args.latents), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(problem.last(decoder(z)), problem.sigma).to_event(1), obs=x)

    return model


def latent_runs(model: Callable, args: argparse.Namespace, **options) -> ShortRunGuide:
    """Langevin dynamics of the latents given x."""
    dynamics = Langevin(StepSize(args.latent_step, learnable=False))
    return ShortRunGuide(model, num_steps=args.latent_steps, dynamics=dynamics, compile=args.compile, **options)


def alone(problem: Problem, args: argparse.Namespace) -> Tensor:
    model = make_generator(problem, args)
    sampler = AncestralSampler(model)
    # Runs that begin at draws from the prior, whose density nobody asks for: alternating back-propagation.
    svi = SVI(model, latent_runs(model, args, start=sampler), pyro.optim.Adam({"lr": args.alone_lr}), Trace_ELBO())
    count = args.alone * args.iterations
    for (x,) in tqdm(batches([problem.data], args.batch, count), "alone", count, leave=False):
        sampler.propose(x)
        svi.step(x)
    return sampler.propose(problem.data[: args.samples])


def taught(latent: bool, problem: Problem, args: argparse.Namespace) -> tuple[MCMCTeaching, list[Tensor]]:
    """A trained pair, and its refined samples over training."""
    model = make_generator(problem, args)
    sampler, energy = AncestralSampler(model), Energy(problem.data.shape[1], args.hidden)
    guide = latent_runs(model, args, start=sampler) if latent else sampler
    student = SVI(model, guide, pyro.optim.Adam({"lr": args.lr, "betas": (0.5, 0.999)}), Trace_ELBO())
    optim = torch.optim.Adam(energy.parameters(), lr=args.energy_lr, betas=(0.5, 0.999))
    refiner = Refiner(energy, args.steps, args.step_size, noise=args.noise, compile=args.compile)
    teaching, snapshots = MCMCTeaching(sampler, refiner, student, optim), []
    progress = tqdm(
        batches([problem.data], args.batch, args.iterations), "latent runs" if latent else "regression", args.iterations
    )
    for i, (x,) in enumerate(progress):
        teaching.step(x)
        progress.set_postfix(gap=f"{teaching.info.gap:.3f}", moved=f"{teaching.info.displacement:.2f}")
        if (i + 1) % max(1, args.iterations // SNAPSHOTS) == 0 and len(snapshots) < SNAPSHOTS:
            snapshots.append(draw(teaching, args, problem.data[:1000]).end)
    return teaching, snapshots


def pictures(problem: Problem, teaching: MCMCTeaching, snapshots: list[Tensor], args: argparse.Namespace) -> None:
    figure, axes = plt.subplots(1, len(snapshots) + 1, figsize=(3 * len(snapshots) + 3, 3.2), layout="constrained")
    for i, (ax, x) in enumerate(zip(axes, snapshots, strict=False)):
        problem.draw(ax, x, f"refined, {i + 1}/{len(snapshots)} of training")
    problem.draw(axes[-1], problem.data[: len(snapshots[0])], "data")
    figure.savefig(Path(args.output) / "samples.png", dpi=150)
    states = chain(teaching, args, problem.data[:400])
    if problem.data.shape[1] == 2:
        figure, axes = plt.subplots(1, len(states), figsize=(2 * len(states), 2.2), layout="constrained")
        for i, (ax, x) in enumerate(zip(axes, states, strict=True)):
            problem.draw(ax, x, f"{i}/{len(states) - 1} of a run")
    else:
        figure, ax = plt.subplots(figsize=(5, 5), layout="constrained")
        rows = torch.stack([x[:8] for x in states], 1).flatten(0, 1)
        show(ax, rows, len(states), problem.shape, "along a row: from the generator's draw to the refined sample")
    figure.savefig(Path(args.output) / "chains.png", dpi=150)


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    pyro.enable_validation(False)
    if args.toy:
        args.latents, args.hidden, args.step_size, args.noise, args.latent_step = 4, 128, 0.01, 0.1, 0.002
    if args.smoke:
        args.iterations, args.images, args.hidden, args.steps, args.batch, args.compile = 4, 200, 32, 3, 20, False
        args.samples, args.seeds, args.classifier, args.latent_steps = 100, 2, 20, 2
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    problem = make_problem(args)
    like = problem.data[: args.samples]
    half = problem.data[torch.randperm(len(problem.data))]
    found: dict[str, list[dict[str, float]]] = {
        "data (one half to the other)": [{"generator": problem.distance(*half.tensor_split(2))}],
        "generator alone": [],
        "taught by regression": [],
        "taught with latent runs": [],
    }
    for _ in seeded(args):
        began = time.perf_counter()
        made = alone(problem, args)
        seconds = time.perf_counter() - began
        found["generator alone"].append({"generator": problem.distance(made, problem.data), "seconds": seconds})
        for latent, name in ((False, "taught by regression"), (True, "taught with latent runs")):
            pyro.clear_param_store()
            began = time.perf_counter()
            teaching, snapshots = taught(latent, problem, args)
            seconds = time.perf_counter() - began
            drawn = draw(teaching, args, like)
            distances = {
                k: problem.distance(v, problem.data) for k, v in (("generator", drawn.start), ("refined", drawn.end))
            }
            found[name].append({**distances, "seconds": seconds})
    title = f"{problem.name} to the data, {args.iterations} iterations, {args.seeds} seeds"
    finish(args, table(title, found), "coopnets.txt")
    pictures(problem, teaching, snapshots, args)
    print(f"coopnets.txt, samples.png and chains.png are in {folder}/")


def parser() -> argparse.ArgumentParser:
    out = options(__doc__, "coopnets-output")
    out.add_argument("--toy", action="store_true", help="two-dimensional data, with settings of their own")
    out.add_argument("--lr", type=float, default=2e-4, help="of the taught generator")
    out.add_argument("--alone", type=int, default=2, help="times as many updates of the generator alone")
    out.add_argument("--alone-lr", type=float, default=1e-3)
    out.add_argument("--latent-steps", type=int, default=10)
    out.add_argument("--latent-step", type=float, default=0.005, help="eta")
    out.add_argument("--samples", type=int, default=2000)
    out.add_argument("--classifier", type=int, default=600, help="updates of the classifier")
    return out


if __name__ == "__main__":
    main(parser().parse_args())
