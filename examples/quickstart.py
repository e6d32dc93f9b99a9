"""Train one generator by a VAE and by short-run inference, which needs no encoder.

    python examples/quickstart.py                      # scikit-learn's handwritten digits, about two minutes
    python examples/quickstart.py --data mnist.npz     # x_train and x_test, images of any size
    python examples/quickstart.py --smoke              # seconds, to see that it runs

The model is a two-layer generator z2 -> z1 -> x written as a Pyro program. All methods see the same decoder, the same
initial weights, the same batches and the same number of updates. The short runs are gradient ascent from random starts
with a step size that is kept, as in the papers' code for images, and Langevin dynamics whose step size and temperatures
the bound of `Annealed` tunes. The table compares what needs no bound; column "folded" is the share of training images
for which a gradient step was not invertible, so that the loss of those runs bounds nothing. The results are one table,
four pictures and an ArviZ file with posterior draws for test images.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.reparam import LocScaleReparam
from torch import Tensor, nn
from tqdm import tqdm

from pyro_shortrun import Annealed, Langevin, PathDensity, ShortRunGuide, StepSize
from pyro_shortrun.diagnostics import plot_images, plot_reconstructions
from pyro_shortrun.evaluation import importance_log_likelihood

TOP, BOTTOM = 4, 8  # latent dimensions of z2 and z1
SIGMA = 0.15  # noise of a pixel, on images in [0, 1]


class Generator(nn.Module):
    """z2 -> (loc, scale) of z1, and z1 -> image."""

    def __init__(self, pixels: int, hidden: int = 128) -> None:
        super().__init__()
        self.prior = nn.Sequential(nn.Linear(TOP, 64), nn.GELU(), nn.Linear(64, 2 * BOTTOM))
        self.image = nn.Sequential(
            nn.Linear(BOTTOM, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, pixels)
        )

    def layer(self, z2: Tensor) -> tuple[Tensor, Tensor]:
        loc, log_scale = self.prior(z2).chunk(2, -1)
        return loc, log_scale.clamp(-4, 2).exp()


def make_model(generator: Generator) -> Callable:
    """z1 is moved in its non-centred form, so that every latent has an N(0, 1) prior and one step size fits all."""

    def model(x: Tensor) -> Tensor:
        pyro.module("generator", generator)
        zeros = x.new_zeros(TOP)
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(zeros, 1.0).to_event(1))
            loc, scale = generator.layer(z2)
            z1 = pyro.sample("z1", dist.Normal(loc, scale).to_event(1))
            image = generator.image(z1).sigmoid()
            pyro.sample("x", dist.Normal(image, SIGMA).to_event(1), obs=x)
        return image

    return poutine.reparam(model, config={"z1": LocScaleReparam(0.0)})


class Encoder(nn.Module):
    """Amortised Gaussian guide q(z2 | x) q(z1 | z2, x): the VAE's inference network."""

    def __init__(self, pixels: int, hidden: int = 128) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(pixels, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU())
        self.top = nn.Linear(hidden, 2 * TOP)
        self.bottom = nn.Linear(hidden + TOP, 2 * BOTTOM)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self)
        with pyro.plate("data", len(x)):
            h = self.features(x)
            z2 = pyro.sample("z2", _normal(self.top(h)))
            pyro.sample("z1_decentered", _normal(self.bottom(torch.cat([h, z2], -1))))


def _normal(out: Tensor) -> dist.TorchDistribution:
    loc, log_scale = out.chunk(2, -1)
    return dist.Normal(loc, log_scale.clamp(-6, 2).exp()).to_event(1)


@dataclass
class Result:
    """A trained model and what training it looked like."""

    name: str
    model: Callable
    draw: Callable[[Tensor, int], dict[str, Tensor]]
    guide: Callable
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    folded: str = "-"


def batches(x: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    yield from x[torch.randperm(len(x), generator=generator).to(x.device)].split(size)


def train(result: Result, x: Tensor, epochs: int, batch: int, lr: float) -> Result:
    """SVI with plain Trace_ELBO, the same for both methods."""
    # Step sizes are few and well determined: they may move faster than a network's weights.
    optimiser = pyro.optim.Adam(lambda name: {"lr": 50 * lr if "step_size" in name else lr})
    svi = SVI(result.model, result.guide, optimiser, Trace_ELBO())
    order = torch.Generator().manual_seed(0)
    began = time.perf_counter()
    for _ in tqdm(range(epochs), desc=result.name, unit="epoch"):
        total = 0.0
        for part in batches(x, batch, order):
            total += svi.step(part)
            if isinstance(result.guide, ShortRunGuide):
                result.steps.append(float(result.guide.step_sizes()))
        result.losses.append(-total / len(x))
    result.seconds = time.perf_counter() - began
    if isinstance(result.guide, ShortRunGuide) and isinstance(result.guide.objective, PathDensity):
        result.folded = folded(result.guide, x[:200])
    return result


@torch.no_grad()
def folded(guide: ShortRunGuide, x: Tensor) -> str:
    """Share of images whose run takes a step that is not invertible, so that log q is no density there."""
    guide(x)
    assert guide.info is not None
    return f"{guide.info.noninvertible / len(x):.0%}"


def vae(pixels: int, device: torch.device) -> Result:
    torch.manual_seed(1)
    generator, encoder = Generator(pixels).to(device), Encoder(pixels).to(device)
    model = make_model(generator)

    def draw(x: Tensor, count: int) -> dict[str, Tensor]:
        sites = Predictive(encoder.guide, num_samples=count)(x)
        return {name: sites[name] for name in ("z2", "z1_decentered")}

    return Result("VAE", model, draw, encoder.guide)


def gradient() -> dict[str, Any]:
    # Log-determinants only tell the loss here: every tenth run is enough.
    return {"dynamics": Langevin(StepSize(0.03, learnable=False), noise=False), "tune_every": 10}


def annealed() -> dict[str, Any]:
    return {"dynamics": Langevin(StepSize(0.02, max=0.1)), "objective": Annealed()}


def short_run(name: str, options: dict[str, Any], pixels: int, device: torch.device, num_steps: int) -> Result:
    torch.manual_seed(1)
    model = make_model(Generator(pixels).to(device))
    guide = ShortRunGuide(model, num_steps=num_steps, **options)

    def draw(x: Tensor, count: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in guide.sample_posterior(x, num_samples=count).items()}

    return Result(name, model, draw, guide)


def reconstruct(model: Callable, draws: dict[str, Tensor], x: Tensor) -> Tensor:
    """Decoded images of the first posterior draw."""
    with torch.no_grad():
        return poutine.condition(model, {k: v[0] for k, v in draws.items()})(x)


def evaluate(results: list[Result], x: Tensor, num_draws: int) -> str:
    """The table: for 95 % of the images, at least ``ess`` of the 1000 importance samples of log p(x) are effective."""
    rows = [
        f"{'method':<22}{'test MSE':>9}{'log p(x), nats':>17}{'ess':>6}{'step size':>11}{'folded':>8}{'seconds':>9}"
    ]
    for result in results:
        draws = result.draw(x, num_draws)
        mse = (reconstruct(result.model, draws, x) - x).square().mean().item()
        likelihood = importance_log_likelihood(result.model, draws, x)
        step = f"{result.steps[-1]:.4f}" if result.steps else "-"
        value = f"{likelihood.mean:.2f} +- {likelihood.mean_error:.2f}"
        ess = likelihood.ess.quantile(0.05).item()
        rows.append(
            f"{result.name:<22}{mse:>9.5f}{value:>17}{ess:>6.0f}{step:>11}{result.folded:>8}{result.seconds:>9.1f}"
        )
    return "\n".join(rows)


def draw_pictures(results: list[Result], x: Tensor, folder: Path) -> None:
    some = x[:16]
    found = {f"reconstructed by {r.name}": reconstruct(r.model, r.draw(some, 1), some) for r in results}
    axes = plot_reconstructions(some, found)
    axes[0].figure.savefig(folder / "reconstructions.png", dpi=150)

    figure, axes = plt.subplots(1, len(results), figsize=(12, 4.4), layout="constrained")
    for ax, result in zip(np.atleast_1d(axes), results, strict=True):
        with torch.no_grad():
            images = result.model(x.new_zeros(64, x.shape[1]))
        plot_images(images, ax, columns=8, title=f"samples, model trained by {result.name}")
    figure.savefig(folder / "samples.png", dpi=150)

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for color, result in zip(("C0", "C1", "C2"), results, strict=True):
        axes[0].plot(result.losses, color, label=result.name)
        if result.steps:
            axes[1].plot(result.steps, color, label=result.name)
    axes[0].set(xlabel="epoch", ylabel="minus the loss, nats per image", ylim=_upper(results))
    axes[1].set(xlabel="update", ylabel="step size")
    axes[0].legend()
    figure.savefig(folder / "training.png", dpi=150)

    guide = next(r.guide for r in results if isinstance(r.guide, ShortRunGuide))
    path = guide.trajectory(some[:1], num_chains=24)["z2"][:, :, 0].cpu()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    axes[0].plot(path[..., 0], color="C0", alpha=0.4, lw=0.8)
    axes[0].set(xlabel="step k", ylabel="first coordinate of z2")
    axes[1].plot(path[..., 0], path[..., 1], color="C0", alpha=0.3, lw=0.8)
    axes[1].scatter(*path[0, :, :2].T, s=12, color="C2", label="start: the prior", zorder=3)
    axes[1].scatter(*path[-1, :, :2].T, s=12, color="C3", label="end of the run", zorder=3)
    axes[1].set(xlabel="first coordinate of z2", ylabel="second")
    axes[1].legend(fontsize=8)
    figure.savefig(folder / "trajectories.png", dpi=150)
    plt.close("all")


def _upper(results: list[Result]) -> tuple[float, float]:
    """Axis limits that leave out the first epochs' collapse."""
    values = np.concatenate([r.losses[len(r.losses) // 10 :] for r in results])
    margin = 0.05 * (values.max() - values.min()) + 1e-3
    return float(values.min() - margin), float(values.max() + margin)


def save_posterior(guide: ShortRunGuide, x: Tensor, draws: int, path: Path) -> None:
    """Posterior draws of test images as an ArviZ file; a chain is an independent set of runs."""
    sites = guide.sample_posterior(x, num_samples=draws, num_chains=4)
    posterior = {name: value.cpu().numpy() for name, value in sites.items()}
    observed = {"x": x.cpu().numpy()}
    if int(az.__version__.split(".")[0]) >= 1:
        data = az.from_dict({"posterior": posterior, "observed_data": observed})
    else:
        data = az.from_dict(posterior=posterior, observed_data=observed)
    data.to_netcdf(str(path))


def load(path: str | None) -> tuple[Tensor, Tensor]:
    """Images in [0, 1], flattened: (train, test)."""
    if path is None:
        from sklearn.datasets import load_digits

        x = torch.tensor(load_digits().data, dtype=torch.get_default_dtype()) / 16
        x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
        return x[:-297], x[-297:]
    with np.load(path) as file:
        train, test = (torch.tensor(file[k]).flatten(1) for k in ("x_train", "x_test"))
    scale = 255.0 if train.dtype == torch.uint8 else 1.0
    dtype = torch.get_default_dtype()
    return train.to(dtype) / scale, test.to(dtype) / scale


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    train_x, test_x = (x.to(device) for x in load(args.data))
    test_x = test_x[:300]
    if args.smoke:
        train_x, test_x, args.epochs, args.num_steps = train_x[:128], test_x[:32], 2, 4
    pixels = train_x.shape[1]
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    makers = [
        lambda: vae(pixels, device),
        lambda: short_run("short run, gradient", gradient(), pixels, device, args.num_steps),
        lambda: short_run("short run, Langevin", annealed(), pixels, device, args.num_steps),
    ]
    results = []
    for make in makers:
        pyro.clear_param_store()
        results.append(train(make(), train_x, args.epochs, args.batch, args.lr))
    table = evaluate(results, test_x, num_draws=20 if args.smoke else 100)
    print(table)
    (folder / "table.txt").write_text(table + "\n")
    draw_pictures(results, test_x, folder)
    guide = results[-1].guide
    assert isinstance(guide, ShortRunGuide)
    save_posterior(guide, test_x[:50], 10 if args.smoke else 250, folder / "posterior.nc")
    print(f"pictures, table and posterior.nc are in {folder}/")


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--data", help="npz file with x_train and x_test; default: scikit-learn's digits")
    out.add_argument("--epochs", type=int, default=25)
    out.add_argument("--batch", type=int, default=125)
    out.add_argument("--lr", type=float, default=1e-3)
    out.add_argument("--num-steps", type=int, default=20, help="K, steps of a short run")
    out.add_argument("--output", default="demo-output")
    out.add_argument("--device", default="cpu")
    out.add_argument("--threads", type=int, default=1, help="CPU threads; small images gain nothing from more")
    out.add_argument("--smoke", action="store_true", help="tiny settings, to see that it runs")
    return out


if __name__ == "__main__":
    main(parser().parse_args())
