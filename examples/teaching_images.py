"""Images, networks and scores that the examples of MCMC teaching share."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import pyro
import torch
from benchmarks.image_files import read_images
from torch import Tensor, nn

from pyro_shortrun import MCMCTeaching, Refiner
from pyro_shortrun.diagnostics import plot_images
from pyro_shortrun.evaluation import frechet_distance
from pyro_shortrun.teaching import Refined

SIGMA = 0.3  # noise of a pixel, on images in [-1, 1]


def mlp(*sizes: int) -> nn.Sequential:
    layers = [nn.Sequential(nn.Linear(a, b), nn.GELU()) for a, b in zip(sizes[:-2], sizes[1:-1], strict=True)]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


class Energy(nn.Module):
    """One value per row, of the data and what it is conditioned on."""

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.net = mlp(size, hidden, hidden, 1)

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        return self.net(torch.cat([x, *context], -1)).squeeze(-1)


class Pictures(NamedTuple):
    """Images in [-1, 1], flattened, their labels, and the shape of one."""

    x: Tensor
    y: Tensor
    shape: tuple[int, ...]


def images(path: str | None, count: int = 0, labels: bool = True) -> Pictures:
    """Images of a file; those of 28 x 28 pixels are averaged to 14 x 14. Where there are no labels, those of ten
    clusters stand in for them."""
    found = read_images(path, labels)
    x, y, shape = found.train, found.train_labels, found.shape
    if path is None and y is not None and found.test_labels is not None:  # few enough to need them all
        x, y = torch.cat([x, found.test]), torch.cat([y, found.test_labels])
    if count:
        x, y = x[:count], None if y is None else y[:count]
    if y is None:
        from sklearn.cluster import KMeans

        y = torch.tensor(KMeans(10, n_init=1, random_state=0).fit_predict(x.numpy()), dtype=torch.long)
    if shape == (28, 28):
        x, shape = nn.functional.avg_pool2d(x.reshape(-1, 1, 28, 28), 2).flatten(1), (14, 14)
    return Pictures(2 * x - 1, y, shape)


class Features:
    """The last hidden layer of a small classifier that is trained on these images, with some noise."""

    def __init__(self, x: Tensor, y: Tensor, iterations: int) -> None:
        generator = torch.Generator().manual_seed(0)  # the same features for every seed of the models
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = mlp(x.shape[1], 128, 32, 10)
        optim = torch.optim.Adam(self.net.parameters(), lr=1e-3)
        for _ in range(iterations):
            index = torch.randint(len(x), (100,), generator=generator)
            noisy = x[index] + 0.1 * torch.randn(100, x.shape[1], generator=generator)
            loss = nn.functional.cross_entropy(self.net(noisy), y[index])
            optim.zero_grad()
            loss.backward()
            optim.step()

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        return self.net[:-1](x)

    @torch.no_grad()
    def labels(self, x: Tensor) -> Tensor:
        """What the classifier takes the images for."""
        return self.net(x).argmax(-1)

    def distance(self, a: Tensor, b: Tensor) -> float:
        """Frechet distance of features."""
        return frechet_distance(self(a), self(b))


def batches(data: Sequence[Tensor], size: int, count: int) -> Iterator[tuple[Tensor, ...]]:
    """``count`` batches of rows drawn at random."""
    for _ in range(count):
        index = torch.randint(len(data[0]), (size,))
        yield tuple(part[index] for part in data)


def eager(teaching: MCMCTeaching, args: argparse.Namespace) -> Refiner:
    """The same runs, not compiled: graphs for the shapes of single calls do not pay."""
    return Refiner(teaching.energy, args.steps, args.step_size, noise=args.noise)


def draw(teaching: MCMCTeaching, args: argparse.Namespace, x: Tensor, *context: Tensor) -> Refined:
    """Generator's draws and refined samples, as many as there are rows."""
    return eager(teaching, args)(teaching.sampler.propose(x, *context), *context)


def chain(teaching: MCMCTeaching, args: argparse.Namespace, x: Tensor, *context: Tensor) -> list[Tensor]:
    """Eight states from the generator's draw to the refined sample, evenly spaced along the run."""
    refiner, states = eager(teaching, args), [teaching.sampler.propose(x, *context)]
    for i in range(1, 8):
        steps = args.steps * i // 7 - args.steps * (i - 1) // 7
        states.append(refiner(states[-1], *context, num_steps=steps).end)
    return states


def show(ax: plt.Axes, x: Tensor, columns: int, shape: tuple[int, ...], title: str = "") -> None:
    """Images in a grid, row by row."""
    x = x[: len(x) // columns * columns]
    plot_images(((x + 1) / 2).clamp(0, 1), ax, columns=columns, shape=shape, title=title)


def table(title: str, found: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    """Means over seeds, and standard errors of these means where there are several."""
    columns = list(dict.fromkeys(k for rows in found.values() for row in rows for k in row))
    columns.sort(key=lambda c: c == "seconds")
    width = max(18, *(len(c) + 2 for c in columns))
    lines = [title, f"{'':<30}" + "".join(f"{c:>{width}}" for c in columns)]
    for name, rows in found.items():
        cells = [_cell([row[c] for row in rows if c in row]) for c in columns]
        lines.append(f"{name:<30}" + "".join(f"{c:>{width}}" for c in cells))
    return lines


def _cell(values: list[float]) -> str:
    if not values:
        return "-"
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.3g}"
    error = (sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values)) ** 0.5
    return f"{mean:.3g} +- {error:.1g}"


def finish(args: argparse.Namespace, lines: list[str], name: str) -> None:
    """Print the table, and keep it, before pictures are drawn."""
    print("\n".join(lines))
    (Path(args.output) / name).write_text("\n".join(lines) + "\n")


def options(doc: str | None, output: str) -> argparse.ArgumentParser:
    """What both examples are asked."""
    out = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--data", help="npz file, or a folder with one; default: scikit-learn's digits")
    out.add_argument("--images", type=int, default=0, help="training images, 0 for all")
    out.add_argument("--iterations", type=int, default=1000)
    out.add_argument("--batch", type=int, default=100)
    out.add_argument("--hidden", type=int, default=256)
    out.add_argument("--latents", type=int, default=16)
    out.add_argument("--energy-lr", type=float, default=1e-3)
    out.add_argument("--steps", type=int, default=20, help="Langevin steps from generator to refined sample")
    out.add_argument("--step-size", type=float, default=0.1, help="eta; the papers' s has eta = s ** 2 / 2")
    out.add_argument("--noise", type=float, default=0.02, help="factor of the steps' noise")
    out.add_argument("--no-compile", dest="compile", action="store_false")
    out.add_argument("--seeds", type=int, default=3)
    out.add_argument("--seed", type=int, default=0, help="the first one")
    out.add_argument("--output", default=output)
    out.add_argument("--threads", type=int, default=1)
    out.add_argument("--smoke", action="store_true", help="tiny settings, to see that it runs")
    return out


def seeded(args: argparse.Namespace) -> Iterator[int]:
    """One seed after the other."""
    for seed in range(args.seed, args.seed + args.seeds):
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        yield seed
