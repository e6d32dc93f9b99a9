"""Generators of images with energy priors: one layer and three, by maximum likelihood and by an inference network.

    python examples/energy_images.py                      # scikit-learn's handwritten digits, minutes
    python examples/energy_images.py --data mnist.npz     # x_train, y_train, x_test, y_test; or a folder with one
    python examples/energy_images.py --smoke              # seconds, to see that it runs

All generators have one energy on all layers jointly. The table has the squared maximum mean discrepancy of latents
drawn from the prior to those that the guide infers for test images, for N(0, I) and for the prior with its energy, by
the runs that training makes. One picture has images from both; the other has images in which a single layer of the
three-layer generator is drawn again and again from the tilted prior given the others, which stay.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import torch
from benchmarks.anomaly import Kind, batches, make_guide, make_model
from benchmarks.image_files import read_images
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import Tensor
from tqdm import tqdm

from pyro_shortrun import EnergyELBO, sample_prior
from pyro_shortrun.diagnostics import plot_images
from pyro_shortrun.energy import PriorRuns
from pyro_shortrun.evaluation import squared_mmd

KINDS = (
    Kind("1 layer, maximum likelihood", (16,), False, True),
    Kind("1 layer, variational", (16,), True, True),
    Kind("3 layers, maximum likelihood", (6, 6, 6), False, True),
    Kind("3 layers, variational", (6, 6, 6), True, True),
)


def prior_runs(args: argparse.Namespace) -> PriorRuns:
    """The same in training and for samples."""
    return PriorRuns(args.prior_steps, args.prior_step)


def train(model: Callable, guide: Callable, x: Tensor, args: argparse.Namespace, name: str) -> None:
    elbo = EnergyELBO(Trace_ELBO(), runs=prior_runs(args), compile=args.compile)
    optimiser = pyro.optim.Adam(lambda name: {"lr": args.energy_lr if name.startswith("ebm.") else args.lr})
    svi = SVI(model, guide, optimiser, elbo)
    for _ in tqdm(range(args.epochs), desc=name, unit="epoch"):
        for part in batches(x, args.batch):
            svi.step(part)


def flat(sites: dict[str, Tensor], kind: Kind) -> Tensor:
    """All layers' latents of one draw, ``(rows, dims)``."""
    return torch.cat([sites[f"z{i + 1}"] for i in range(len(kind.dims))], -1)


def mmd(a: Tensor, b: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy; Gaussian kernel, width by the median of distances between the two."""
    return squared_mmd(a, b, torch.cdist(a, b).median().item())


@torch.no_grad()
def priors(model: Callable, x: Tensor, args: argparse.Namespace) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One draw of every site for each row of ``x``: without the energy, and with it."""
    plain = {k: v[0] for k, v in Predictive(model, num_samples=1)(x).items()}
    tilted = sample_prior(model, x, num_samples=1, runs=prior_runs(args))
    return plain, {k: v[0] for k, v in tilted.items()}


def vary(model: Callable, kind: Kind, x: Tensor, args: argparse.Namespace) -> list[Tensor]:
    """For every layer, images ``(rows, columns, pixels)``: along the columns that layer is drawn anew."""
    _, base = priors(model, x, args)
    names = [f"z{i + 1}" for i in range(len(kind.dims))]
    options = dict(num_samples=8, runs=prior_runs(args))
    found = [sample_prior(model, x, given={k: base[k] for k in names if k != name}, **options) for name in names]
    return [sites["image"].transpose(0, 1) for sites in found]


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    pyro.enable_validation(False)
    if args.smoke:
        args.epochs, args.images, args.hidden, args.prior_steps, args.posterior_steps = 1, 100, 32, 3, 3
        args.batch, args.compile = 50, False
    data = read_images(args.data)
    train_x, test_x = data.train[: args.images or None], data.test[:1000]
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{'generator':<30}{'MMD^2 of N(0, I)':>18}{'with energy':>13}{'seconds':>9}"]
    drawn = []
    for kind in KINDS:
        pyro.clear_param_store()
        pyro.set_rng_seed(args.seed)
        model = make_model(kind, train_x.shape[1], args.hidden)
        guide = make_guide(kind, model, train_x.shape[1], args.hidden, args)
        began = time.perf_counter()
        train(model, guide, train_x, args, kind.name)
        seconds = time.perf_counter() - began
        with torch.no_grad(), poutine.mask(mask=False):  # log q is not needed
            sites = poutine.trace(guide).get_trace(test_x).nodes
        posterior = flat({k: s["value"] for k, s in sites.items() if "value" in s}, kind)
        plain, tilted = priors(model, test_x, args)
        before, after = (mmd(flat(sites, kind), posterior) for sites in (plain, tilted))
        lines.append(f"{kind.name:<30}{before:>18.4f}{after:>13.4f}{seconds:>9.0f}")
        count = min(64, len(test_x) // 8 * 8)  # rows of eight
        drawn.append((plain["image"][:count], tilted["image"][:count]))
    print("\n".join(lines))
    (folder / "images.txt").write_text("\n".join(lines) + "\n")
    figure, axes = plt.subplots(2, len(KINDS), figsize=(3 * len(KINDS), 6), layout="constrained")
    for kind, images, (above, below) in zip(KINDS, drawn, axes.T, strict=True):
        plot_images(images[0], above, columns=8, shape=data.shape, title=f"{kind.name}: N(0, I)")
        plot_images(images[1], below, columns=8, shape=data.shape, title="with its energy")
    figure.savefig(folder / "samples.png", dpi=150)
    layers = vary(model, kind, test_x[:6], args)
    figure, panels = plt.subplots(1, len(layers), figsize=(4 * len(layers), 3), layout="constrained")
    for i, (ax, images) in enumerate(zip(panels, layers, strict=True)):
        title = f"only z{i + 1} drawn anew along a row"
        plot_images(images, ax, columns=images.shape[1], shape=data.shape, title=title)
    figure.savefig(folder / "layers.png", dpi=150)
    plt.close("all")
    print(f"images.txt, samples.png and layers.png are in {folder}/")


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--data", help="npz file, or a folder with one; default: scikit-learn's digits")
    out.add_argument("--images", type=int, default=0, help="training images, 0 for all")
    out.add_argument("--epochs", type=int, default=40)
    out.add_argument("--batch", type=int, default=100)
    out.add_argument("--hidden", type=int, default=256)
    out.add_argument("--lr", type=float, default=1e-3)
    out.add_argument("--energy-lr", type=float, default=2e-4)
    out.add_argument("--prior-steps", type=int, default=60)
    out.add_argument("--prior-step", type=float, default=0.08, help="eta; the papers' s = 0.4")
    out.add_argument("--posterior-steps", type=int, default=20)
    out.add_argument("--posterior-step", type=float, default=0.005, help="eta; the papers' s = 0.1")
    out.add_argument("--no-compile", dest="compile", action="store_false")
    out.add_argument("--seed", type=int, default=0)
    out.add_argument("--output", default="images-output")
    out.add_argument("--threads", type=int, default=1)
    out.add_argument("--smoke", action="store_true", help="tiny settings, to see that it runs")
    return out


if __name__ == "__main__":
    main(parser().parse_args())
