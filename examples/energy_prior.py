"""An energy prior closes the gap between prior and aggregate posterior that a Gaussian prior leaves.

    python examples/energy_prior.py                    # about ten minutes
    python examples/energy_prior.py --truth pinwheel
    python examples/energy_prior.py --smoke            # seconds, to see that it runs

Latents with a known law (25 Gaussians, or a pinwheel, in the plane) are observed through a known linear map with noise,
so the aggregate posterior is known, and a prior N(0, I) does not match it. Models with one layer and with two
(z2 -> z1 -> x, conditional prior learned too, one energy on both) learn an energy by the maximum likelihood scheme
(ShortRunGuide: MCMC for posterior and prior) and by the variational scheme (an encoder; MCMC for the prior alone). The
table has the squared maximum mean discrepancy (MMD) of prior draws to the truth, before and after, and of the truth to
itself; the picture shows the draws.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.reparam import LocScaleReparam
from torch import Tensor, nn
from tqdm import tqdm

from pyro_shortrun import EnergyELBO, Langevin, ShortRunGuide, StepSize, energy_prior, sample_prior
from pyro_shortrun.energy import PriorRuns
from pyro_shortrun.evaluation import squared_mmd

NOISE, PIXELS = 0.1, 6
SCHEMES = ("maximum likelihood", "variational")


def twenty_five(n: int) -> Tensor:
    """A grid of 25 Gaussians."""
    centers = torch.cartesian_prod(*2 * [torch.linspace(-1.8, 1.8, 5)])
    return centers[torch.randint(25, (n,))] + 0.15 * torch.randn(n, 2)


def pinwheel(n: int) -> Tensor:
    """Five bent arms."""
    arm = torch.randint(5, (n,))
    along, across = 1.3 + 0.4 * torch.randn(n), 0.1 * torch.randn(n)
    angle = 2 * math.pi * arm / 5 + 0.8 * along
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).reshape(n, 2, 2)
    return (turn @ torch.stack([along, across], -1).unsqueeze(-1)).squeeze(-1)


TRUTHS = {"gaussians": twenty_five, "pinwheel": pinwheel}


def mlp(*sizes: int) -> nn.Sequential:
    layers = [nn.Sequential(nn.Linear(a, b), nn.GELU()) for a, b in zip(sizes[:-2], sizes[1:-1], strict=True)]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


class Energy(nn.Module):
    """One value for all layers jointly."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.net = mlp(2 * layers, 128, 128, 1)

    def forward(self, *latents: Tensor) -> Tensor:
        return self.net(torch.cat(latents, -1)).squeeze(-1)


def gaussian(out: Tensor) -> dist.TorchDistribution:
    loc, log_scale = out.chunk(2, -1)
    return dist.Normal(loc, log_scale.clamp(-4, 2).exp()).to_event(1)


def make_model(layers: int, decoder: Tensor) -> Callable:
    energy, conditional = Energy(layers), mlp(2, 32, 4)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            latents = []
            prior = dist.Normal(x.new_zeros(2), 1.0).to_event(1)
            if layers == 2:
                pyro.module("conditional", conditional)
                latents.append(pyro.sample("z2", prior))
                prior = gaussian(conditional(latents[0]))
            z1 = pyro.sample("z1", prior)
            energy_prior("ebm", energy, z1, *latents)
            pyro.sample("x", dist.Normal(z1 @ decoder.T, NOISE).to_event(1), obs=x)

    # The runs move z1 in its non-centred form: a small learned scale would ask for a small step.
    return poutine.reparam(model, config={"z1": LocScaleReparam(0.0)}) if layers == 2 else model


class Encoder(nn.Module):
    """q(z1 | x), or q(z2 | x) and q(z1 | z2, x)."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.top = mlp(PIXELS, 64, 4) if layers == 2 else None
        self.bottom = mlp(PIXELS + 2 * (layers == 2), 64, 4)

    def forward(self, x: Tensor) -> None:
        pyro.module("encoder", self)
        with pyro.plate("data", len(x)):
            if self.top is None:
                pyro.sample("z1", gaussian(self.bottom(x)))
            else:
                z2 = pyro.sample("z2", gaussian(self.top(x)))
                pyro.sample("z1_decentered", gaussian(self.bottom(torch.cat([x, z2], -1))))


def make_guide(scheme: str, layers: int, model: Callable, args: argparse.Namespace) -> Callable:
    if scheme == "variational":
        return Encoder(layers)
    step = StepSize(0.004, learnable=False)
    return ShortRunGuide(model, num_steps=args.posterior_steps, dynamics=Langevin(step), tune_every=10**9)


def mmd(a: Tensor, b: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy, Gaussian kernels of five widths."""
    return sum(squared_mmd(a, b, width) for width in (0.1, 0.2, 0.5, 1.0, 2.0))


def prior_draws(model: Callable, args: argparse.Namespace) -> Tensor:
    """2,000 draws of z1, by the runs that training makes."""
    x = torch.zeros(2000, PIXELS)
    runs = PriorRuns(args.prior_steps, args.prior_step)
    return sample_prior(model, x, num_samples=1, runs=runs)["z1"][0]


def train(model: Callable, guide: Callable, x: Tensor, args: argparse.Namespace, name: str) -> list[float]:
    """Energy gaps along the way."""
    runs = PriorRuns(args.prior_steps, args.prior_step)
    elbo = EnergyELBO(Trace_ELBO(), runs=runs, l2=args.l2, compile=not args.smoke)
    gamma = 0.1 ** (1 / args.iterations)
    schedule = pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": args.lr, "betas": (0.5, 0.999)}, "gamma": gamma}
    )
    svi, gaps = SVI(model, guide, schedule, elbo), []
    for _ in tqdm(range(args.iterations), desc=name):
        svi.step(x[torch.randint(len(x), (args.batch,))])
        schedule.step()
        gaps.append(elbo.info.gap["ebm"] if elbo.info else 0.0)
    return gaps


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    if args.smoke:
        args.iterations, args.prior_steps, args.posterior_steps, args.batch = 3, 4, 4, 32
    pyro.set_rng_seed(args.seed)
    pyro.enable_validation(False)
    truth = TRUTHS[args.truth]
    decoder = torch.linalg.qr(torch.randn(PIXELS, 2))[0]
    x = truth(20_000) @ decoder.T + NOISE * torch.randn(20_000, PIXELS)
    held_out, folder = truth(2000), Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{'layers':<8}{'scheme':<20}{'MMD^2 before':>14}{'after':>9}{'gap':>8}{'seconds':>9}"]
    panels = [("truth", held_out), ("N(0, I)", torch.randn(2000, 2))]
    for layers in args.layers:
        for scheme in args.schemes:
            pyro.clear_param_store()
            pyro.set_rng_seed(args.seed)
            model = make_model(layers, decoder)
            guide = make_guide(scheme, layers, model, args)
            before, began = mmd(prior_draws(model, args), held_out), time.perf_counter()
            gaps = train(model, guide, x, args, f"{layers}, {scheme}")
            seconds, draws = time.perf_counter() - began, prior_draws(model, args)
            gap = sum(gaps[-100:]) / len(gaps[-100:])
            lines.append(
                f"{layers:<8}{scheme:<20}{before:>14.4f}{mmd(draws, held_out):>9.4f}{gap:>8.3f}{seconds:>9.0f}"
            )
            panels.append((f"{layers} layer{'s' * (layers > 1)}, {scheme}", draws))
    lines.append(f"{'truth, other draws':<28}{'':>14}{mmd(truth(2000), held_out):>9.4f}")
    print("\n".join(lines))
    (folder / "mmd.txt").write_text("\n".join(lines) + "\n")
    figure, axes = plt.subplots(2, 3, figsize=(9, 6.2), layout="constrained", sharex=True, sharey=True)
    for ax, (name, z) in zip(axes.flat, panels, strict=False):
        ax.scatter(*z.T, s=1, alpha=0.5, color="C0")
        ax.set(title=name, xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    figure.savefig(folder / "prior.png", dpi=150)
    plt.close(figure)
    print(f"mmd.txt and prior.png are in {folder}/")


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--truth", choices=sorted(TRUTHS), default="gaussians")
    out.add_argument("--layers", type=int, nargs="+", choices=(1, 2), default=[1, 2])
    out.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    out.add_argument("--l2", type=float, default=0.0, help="weight of squared energies")
    out.add_argument("--iterations", type=int, default=2000)
    out.add_argument("--batch", type=int, default=256)
    out.add_argument("--lr", type=float, default=1e-3)
    out.add_argument("--prior-steps", type=int, default=60)
    out.add_argument("--prior-step", type=float, default=0.04, help="eta; small ones are sharper, but runs must travel")
    out.add_argument("--posterior-steps", type=int, default=30)
    out.add_argument("--seed", type=int, default=0)
    out.add_argument("--output", default="energy-output")
    out.add_argument("--threads", type=int, default=1)
    out.add_argument("--smoke", action="store_true", help="tiny settings, to see that it runs")
    return out


if __name__ == "__main__":
    main(parser().parse_args())
