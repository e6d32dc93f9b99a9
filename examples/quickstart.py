"""Train one generator by a VAE and by short runs, for the same time.

    python examples/quickstart.py                      # scikit-learn's handwritten digits, less than three minutes
    python examples/quickstart.py --data mnist.npz     # x_train and x_test (or x), grey or colour images of any size
    python examples/quickstart.py --smoke              # seconds, to see that it runs

The model is a two-layer generator z2 -> z1 -> x written as a Pyro program. All methods see the same decoder, the same
initial weights, the same batches and the same CPU seconds:

    VAE                   an encoder, trained with the decoder by the evidence lower bound
    encoder + short run   the same encoder, by the same bound; the decoder learns from where K = 5 Langevin steps from
                          the encoder's draws end (`Refine`)
    short run, gradient   no encoder: gradient ascent from draws of the prior, as in the papers' code for images
    short run, Langevin   the same with noise, weighed by `Annealed`, whose bound tunes step size and temperatures

The table has rows for equal time first, then for equal updates, which are many for a VAE and few for runs of K = 20.
The results are the table, four pictures and an ArviZ file with posterior draws for test images.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
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

sys.path.append(str(Path(__file__).parent / "benchmarks"))
from image_files import Images, read_images  # noqa: E402

from pyro_shortrun import Annealed, Langevin, Refine, ShortRunGuide, StepSize  # noqa: E402
from pyro_shortrun.diagnostics import plot_images, plot_reconstructions  # noqa: E402
from pyro_shortrun.evaluation import importance_log_likelihood  # noqa: E402

TOP, BOTTOM = 4, 8  # latent dimensions of z2 and z1
SIGMA = 0.15  # noise of a pixel, on images in [0, 1]
FEWEST = 10  # effective importance samples that an estimate is reliable with


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
    """A method, its trained model, and what training looked like."""

    name: str
    model: Callable
    draw: Callable[[Tensor, int], dict[str, Tensor]]
    guide: Callable
    seconds: float = 0.0  # of CPU time
    updates: int = 0
    losses: list[float] = field(default_factory=list)  # of updates, per image
    steps: list[float] = field(default_factory=list)
    early: str = ""  # row of the table after few updates


def batches(x: Tensor, size: int) -> Iterator[Tensor]:
    """The same for all methods."""
    order = torch.Generator().manual_seed(0)
    while True:
        yield from x[torch.randperm(len(x), generator=order).to(x.device)].split(size)


def train(result: Result, x: Tensor, test_x: Tensor, args: argparse.Namespace) -> Result:
    """SVI with plain Trace_ELBO, the same for all methods, until the time is used up."""
    # Step sizes are few and well determined: they may move faster than a network's weights.
    optimiser = pyro.optim.Adam(lambda name: {"lr": 20 * args.lr if "step_size" in name else args.lr})
    svi = SVI(result.model, result.guide, optimiser, Trace_ELBO())
    parts = batches(x, args.batch)
    with tqdm(total=100, desc=result.name, bar_format="{desc:<20} {percentage:3.0f}%|{bar}|") as bar:
        while result.seconds < args.seconds or result.updates < args.updates:
            part = next(parts)
            began = time.process_time()
            result.losses.append(-svi.step(part) / len(part))
            result.seconds += time.process_time() - began
            result.updates += 1
            if isinstance(result.guide, ShortRunGuide):
                result.steps.append(float(result.guide.step_sizes()))
            if result.updates == args.updates:
                result.early = row(result, test_x, args.draws)
            bar.update(min(100 * result.seconds / args.seconds, 100) - bar.n)
    return result


def vae(pixels: int, device: torch.device, args: argparse.Namespace) -> Result:
    torch.manual_seed(1)
    generator, encoder = Generator(pixels).to(device), Encoder(pixels).to(device)
    model = make_model(generator)

    def draw(x: Tensor, count: int) -> dict[str, Tensor]:
        sites = Predictive(encoder.guide, num_samples=count)(x)
        return {name: sites[name] for name in ("z2", "z1_decentered")}

    return Result("VAE", model, draw, encoder.guide)


def refined(pixels: int, device: torch.device, args: argparse.Namespace) -> Result:
    torch.manual_seed(1)
    generator, encoder = Generator(pixels).to(device), Encoder(pixels).to(device)
    options = {"num_steps": 5, "start": encoder.guide, "objective": Refine()}
    return short_run("encoder + short run", make_model(generator), options)


def gradient(pixels: int, device: torch.device, args: argparse.Namespace) -> Result:
    # Nothing tunes the step, so that no log-determinant is asked for but in every tenth call, for the loss.
    dynamics = Langevin(StepSize(0.03, learnable=False), noise=False)
    return from_prior("short run, gradient", pixels, device, args, dynamics=dynamics, tune_every=10)


def annealed(pixels: int, device: torch.device, args: argparse.Namespace) -> Result:
    dynamics = Langevin(StepSize(0.02, max=0.1))
    return from_prior("short run, Langevin", pixels, device, args, dynamics=dynamics, objective=Annealed())


def from_prior(name: str, pixels: int, device: torch.device, args: argparse.Namespace, **options: Any) -> Result:
    torch.manual_seed(1)
    return short_run(name, make_model(Generator(pixels).to(device)), {"num_steps": args.num_steps, **options})


def short_run(name: str, model: Callable, options: dict[str, Any]) -> Result:
    guide = ShortRunGuide(model, **options)

    def draw(x: Tensor, count: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in guide.sample_posterior(x, num_samples=count).items()}

    return Result(name, model, draw, guide)


def reconstruct(model: Callable, draws: dict[str, Tensor], x: Tensor) -> Tensor:
    """Decoded images of the first posterior draw."""
    with torch.no_grad():
        return poutine.condition(model, {k: v[0] for k, v in draws.items()})(x)


def row(result: Result, x: Tensor, num_draws: int) -> str:
    """A line of the table. For 95 % of the images, at least ``ess`` of the 1000 importance samples of log p(x) are
    effective; where these are few, log p(x) is too low by an unknown amount."""
    draws = result.draw(x, num_draws)
    mse = (reconstruct(result.model, draws, x) - x).square().mean().item()
    likelihood = importance_log_likelihood(result.model, draws, x)
    ess = likelihood.ess.quantile(0.05).item()
    error = f"+- {likelihood.mean_error:.2f}" if ess >= FEWEST else "unreliable"
    step = f"{result.steps[-1]:.4f}" if result.steps else "-"
    line = f"{result.name:<20}{mse:>9.5f}{likelihood.mean:>12.2f} {error:<10}{ess:>6.0f}{step:>10}"
    return f"{line}{result.updates:>9}{result.seconds:>9.1f}"


def table(results: list[Result], x: Tensor, args: argparse.Namespace) -> str:
    """Equal time first."""
    head = f"{'method':<20}{'test MSE':>9}{'log p(x)':>12} {'nats':<10}{'ess':>6}{'step size':>10}"
    head += f"{'updates':>9}{'CPU s':>9}"
    late, early = f"After {args.seconds:g} CPU seconds of each:", f"After {args.updates} updates of each:"
    rows = [late, head, *(row(r, x, args.draws) for r in results)]
    return "\n".join([*rows, "", early, head, *(r.early for r in results)])


def draw_pictures(results: list[Result], data: Images, folder: Path) -> None:
    some = data.test[:16]
    found = {f"reconstructed by {r.name}": reconstruct(r.model, r.draw(some, 1), some) for r in results}
    axes = plot_reconstructions(some, found, shape=data.shape)
    axes[0].figure.savefig(folder / "reconstructions.png", dpi=150)

    figure, axes = plt.subplots(1, len(results), figsize=(4 * len(results), 4.4), layout="constrained")
    for ax, result in zip(np.atleast_1d(axes), results, strict=True):
        with torch.no_grad():
            images = result.model(some.new_zeros(64, some.shape[1]))
        plot_images(images, ax, columns=8, shape=data.shape, title=f"samples, model trained by {result.name}")
    figure.savefig(folder / "samples.png", dpi=150)

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for i, result in enumerate(results):
        seconds = np.linspace(0, result.seconds, len(result.losses) + 1)[1:]
        axes[0].plot(seconds, smooth(result.losses), f"C{i}", label=result.name)
        if result.steps:
            axes[1].plot(seconds, result.steps, f"C{i}", label=result.name)
    axes[0].set(xlabel="CPU seconds", ylabel="minus the loss, nats per image", ylim=_range(results))
    axes[1].set(xlabel="CPU seconds", ylabel="step size", yscale="log")
    axes[0].legend(fontsize=8)
    figure.savefig(folder / "training.png", dpi=150)

    guide = next(r.guide for r in results if isinstance(r.guide, ShortRunGuide))
    path = guide.trajectory(some[:1], num_chains=24)["z2"][:, :, 0].cpu()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    axes[0].plot(path[..., 0], color="C0", alpha=0.4, lw=0.8)
    axes[0].set(xlabel="step k", ylabel="first coordinate of z2")
    axes[1].plot(path[..., 0], path[..., 1], color="C0", alpha=0.3, lw=0.8)
    axes[1].scatter(*path[0, :, :2].T, s=12, color="C2", label="start: the encoder's draw", zorder=3)
    axes[1].scatter(*path[-1, :, :2].T, s=12, color="C3", label="end of the run", zorder=3)
    axes[1].set(xlabel="first coordinate of z2", ylabel="second")
    axes[1].legend(fontsize=8)
    figure.savefig(folder / "trajectories.png", dpi=150)
    plt.close("all")


def smooth(losses: list[float], width: int = 20) -> np.ndarray:
    """Means of neighbours."""
    kernel = np.ones(min(width, len(losses)))
    return np.convolve(losses, kernel, "same") / np.convolve(np.ones(len(losses)), kernel, "same")


def _range(results: list[Result]) -> tuple[float, float]:
    """Axis limits that leave out the collapse of the first updates."""
    values = np.concatenate([smooth(r.losses)[len(r.losses) // 5 :] for r in results])
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


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    data = read_images(args.data)
    data = replace(data, train=data.train.to(device), test=data.test[:300].to(device))
    if args.smoke:
        data = replace(data, train=data.train[:128], test=data.test[:32])
        args.seconds, args.updates, args.num_steps, args.draws = 0.1, 2, 4, 20
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for make in (vae, refined, gradient, annealed):
        pyro.clear_param_store()
        results.append(train(make(data.train.shape[1], device, args), data.train, data.test, args))
    found = table(results, data.test, args)
    print(found)
    (folder / "table.txt").write_text(found + "\n")
    guide = results[1].guide
    assert isinstance(guide, ShortRunGuide)
    save_posterior(guide, data.test[:50], 10 if args.smoke else 250, folder / "posterior.nc")
    draw_pictures(results, data, folder)
    print(f"pictures, table and posterior.nc are in {folder}/")


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--data", help="npz file with x_train and x_test, or x; default: scikit-learn's digits")
    out.add_argument("--seconds", type=float, default=25.0, help="CPU seconds of each method")
    out.add_argument("--updates", type=int, default=150, help="after which methods are compared, too")
    out.add_argument("--batch", type=int, default=125)
    out.add_argument("--lr", type=float, default=2e-3)
    out.add_argument("--num-steps", type=int, default=20, help="K of the short runs without an encoder")
    out.add_argument("--draws", type=int, default=100, help="posterior draws by which log p(x) is found")
    out.add_argument("--output", default="demo-output")
    out.add_argument("--device", default="cpu")
    out.add_argument("--threads", type=int, default=1, help="CPU threads; small images gain nothing from more")
    out.add_argument("--smoke", action="store_true", help="tiny settings, to see that it runs")
    return out


if __name__ == "__main__":
    main(parser().parse_args())
