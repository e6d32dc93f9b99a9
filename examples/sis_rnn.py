"""A recurrent latent-variable model of sequences, by three guides: Gaussian, semi-implicit (SIS-RNN), short runs.

    python examples/sis_rnn.py             # about five minutes
    python examples/sis_rnn.py --smoke     # seconds, to see that it runs

The sequences come from a known system, a particle in a double well of which only the squared position is seen, with
noise:

    s_t = d(s_{t-1}) + 0.35 eps,   d(s) = s + 0.2 (s - s^3),   x_t = s_t^2 + 0.1 eps'

The sign of s_t is not in the data, and where the particle is near zero it may change, so the posterior has two modes
that time ties together. Two models, both Pyro programs with one latent site for each time step, in a plate over
sequences:

    known          the system itself, nothing to learn but the guide
    VRNN           z_t ~ N(mu(h_{t-1}), sigma(h_{t-1})^2), x_t ~ N(f(z_t, h_{t-1}), s^2), h_t = GRU([x_t, z_t], h_{t-1})

and three guides, by SVI:

    Gaussian       N(loc, scale^2) of a network of (x_t, h_{t-1}): the VRNN's own
    semi-implicit  the same network is fed with noise as well, and its output is the mean of a Gaussian: SIS-RNN; one
                   sum over mixing draws for each sequence and time step
    short run      no network: Langevin steps on all latents of a sequence, from the prior

The judge is the same for all: log p(x) of held-out sequences by a bootstrap particle filter in the model. The bound of
a guide on the same sequences says how far it is from the posterior. Writes table.txt and a picture of sequences that
each VRNN generates.

Hajiramezanali, Hasanzadeh, Duffield, Narayanan, Zhou, Qian: Semi-Implicit Stochastic Recurrent Neural Networks,
ICASSP 2020; Chung et al.: A Recurrent Latent Variable Model for Sequential Data, NeurIPS 2015 (VRNN).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.reparam import LocScaleReparam
from torch import Tensor, nn
from torch.nn.functional import softplus
from tqdm import tqdm

from pyro_shortrun import Langevin, SemiImplicit_ELBO, ShortRunGuide, StepSize
from pyro_shortrun.semi_implicit import MixingNetwork, SemiImplicit

NOISE = 8


def drift(s: Tensor) -> Tensor:
    s = s.clamp(-2, 2)
    return s + 0.2 * (s - s**3)


def double_well(sequences: int, steps: int, seed: int) -> Tensor:
    """``(sequences, steps)``."""
    rng = torch.Generator().manual_seed(seed)
    s, out = torch.randn(sequences, generator=rng), []
    for _ in range(steps):
        out.append(s**2 + 0.1 * torch.randn(sequences, generator=rng))
        s = drift(s) + 0.35 * torch.randn(sequences, generator=rng)
    return torch.stack(out, 1)


class DoubleWell(nn.Module):
    """The system itself; its state is ``(s, whether anything was drawn)``."""

    latent, hidden = 1, 2

    def first(self, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(*shape, 2)

    def prior(self, h: Tensor) -> dist.TorchDistribution:
        s, begun = h[..., :1], h[..., 1:]
        return dist.Normal(begun * drift(s), 1 - 0.65 * begun).to_event(1)

    def emission(self, z: Tensor, h: Tensor) -> dist.TorchDistribution:
        return dist.Normal(z.squeeze(-1) ** 2, 0.1)

    def step(self, x: Tensor, z: Tensor, h: Tensor) -> Tensor:
        return torch.cat([z, torch.ones_like(z)], -1)


class VRNN(nn.Module):
    """The networks of the VRNN."""

    def __init__(self, hidden: int, latent: int = 2) -> None:
        super().__init__()
        self.hidden, self.latent = hidden, latent
        self.prior_net = nn.Sequential(nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 2 * latent))
        self.emit_net = nn.Sequential(nn.Linear(latent + hidden, 2 * hidden), nn.Tanh(), nn.Linear(2 * hidden, 1))
        self.cell = nn.GRUCell(1 + latent, hidden)
        self.log_scale = nn.Parameter(torch.tensor(-1.0))

    def first(self, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(*shape, self.hidden)

    def prior(self, h: Tensor) -> dist.TorchDistribution:
        loc, scale = self.prior_net(h).chunk(2, -1)
        return dist.Normal(loc, softplus(scale) + 0.05).to_event(1)

    def emission(self, z: Tensor, h: Tensor) -> dist.TorchDistribution:
        loc = self.emit_net(torch.cat([z, h.expand(*z.shape[:-1], self.hidden)], -1)).squeeze(-1)
        return dist.Normal(loc, self.log_scale.exp())

    def step(self, x: Tensor, z: Tensor, h: Tensor) -> Tensor:
        x = x.unsqueeze(-1).expand(*z.shape[:-1], 1)
        shape = h.shape
        out = self.cell(
            torch.cat([x, z], -1).reshape(-1, 1 + self.latent), h.expand(*z.shape[:-1], -1).reshape(-1, shape[-1])
        )
        return out.reshape(*z.shape[:-1], shape[-1])


def model_of(net: Any) -> Callable:
    def model(x: Tensor) -> None:
        pyro.module("system", net)
        h = net.first((len(x),))
        with pyro.plate("sequences", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                z = pyro.sample(f"z_{t}", net.prior(h))
                pyro.sample(f"x_{t}", net.emission(z, h), obs=x[:, t])
                h = net.step(x[:, t], z, h)

    return model


class Inference(nn.Module):
    """A guide for every time step from ``(x_t, h_{t-1})``; with noise a semi-implicit one."""

    def __init__(self, net: Any, noisy: bool) -> None:
        super().__init__()
        self.model, self.noisy = (net,), noisy
        context = 1 + net.hidden
        self.scale = nn.Sequential(nn.Linear(context, 16), nn.Tanh(), nn.Linear(16, net.latent))
        self.loc = MixingNetwork(NOISE, net.latent, (32, 32), context=context)  # the same with and without noise
        with torch.no_grad():
            self.loc.noise.weight.mul_(0.1)  # begins near a Gaussian

    def law(self, c: Tensor) -> dist.TorchDistribution:
        scale = softplus(self.scale(c) - 2) + 0.01  # small at first: a wide one fits Gaussians, and stays
        if not self.noisy:
            return dist.Normal(self.loc(c.new_zeros(NOISE), c), scale).to_event(1)
        return SemiImplicit(lambda eps: self.loc(eps, c), lambda psi: dist.Normal(psi, scale).to_event(1), noise=NOISE)

    def forward(self, x: Tensor) -> None:
        pyro.module("inference", self)
        net = self.model[0]
        h = net.first((len(x),))
        with pyro.plate("sequences", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                now = x[:, t].unsqueeze(-1)
                z = pyro.sample(f"z_{t}", self.law(torch.cat([now.expand(*h.shape[:-1], 1), h], -1)))
                h = net.step(x[:, t], z, h)


@torch.no_grad()
def particle_filter(net: Any, x: Tensor, particles: int) -> Tensor:
    """``log p(x)`` of each sequence, in nats: unbiased in p, by a bootstrap filter that resamples every step."""
    h, total = net.first((particles, len(x))), torch.zeros(len(x))
    for t in range(x.shape[1]):
        z = net.prior(h).sample()
        log_w = net.emission(z, h).log_prob(x[:, t])
        total += log_w.logsumexp(0) - torch.tensor(float(particles)).log()
        chosen = torch.multinomial(log_w.softmax(0).T, particles, replacement=True).T
        h = net.step(x[:, t], z, h)
        h = h.gather(0, chosen.unsqueeze(-1).expand_as(h))
    return total


@torch.no_grad()
def generate(net: Any, sequences: int, steps: int) -> Tensor:
    h, out = net.first((sequences,)), []
    for _ in range(steps):
        z = net.prior(h).sample()
        out.append(net.emission(z, h).sample())
        h = net.step(out[-1], z, h)
    return torch.stack(out, 1)


def make(name: str, net: Any, args: argparse.Namespace) -> tuple[Callable, Callable, Trace_ELBO]:
    """Model, guide and loss."""
    model = model_of(net)
    if name == "short run":
        sites = {f"z_{t}": LocScaleReparam(0.0) for t in range(args.steps)}  # one step size for all time steps
        model = poutine.reparam(model, config=sites)
        step = StepSize(args.step_size, learnable=False)
        guide = ShortRunGuide(model, num_steps=args.run, dynamics=Langevin(step), tune_every=10**9)
        return model, guide, Trace_ELBO()
    guide = Inference(net, noisy=name == "semi-implicit")
    return model, guide, SemiImplicit_ELBO(args.num_mixtures) if guide.noisy else Trace_ELBO()


def bound(name: str, model: Callable, guide: Callable, loss: Trace_ELBO, x: Tensor, args: argparse.Namespace) -> float:
    """Nats per time step of the guide's bound, a semi-implicit one with many mixing draws."""
    if name == "short run":
        return float("nan")  # log-determinants of every step: dear, and loose with noise
    if isinstance(loss, SemiImplicit_ELBO):
        loss.num_mixtures = args.judge_mixtures
    with torch.no_grad():
        return -sum(loss.loss(model, guide, x) for _ in range(5)) / 5 / x.numel()


def run(system: str, name: str, train: Tensor, test: Tensor, args: argparse.Namespace) -> tuple[str, Tensor]:
    """A row of the table, and generated sequences."""
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    net = VRNN(args.hidden) if system == "VRNN" else DoubleWell()
    model, guide, loss = make(name, net, args)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 3e-3, "lrd": 0.1 ** (1 / args.updates)}), loss)
    began = time.perf_counter()
    with tqdm(range(args.updates), desc=f"{system}, {name}", mininterval=2) as bar:
        for _ in bar:
            batch = train[torch.randperm(len(train))[: args.batch]]
            value = svi.step(batch) / batch.numel()
            bar.set_postfix(loss=f"{value:.3f}", refresh=False)
    seconds = time.perf_counter() - began
    judged = particle_filter(net, test, args.particles) / test.shape[1]
    error = judged.std().item() / len(judged) ** 0.5
    own = bound(name, model, guide, loss, test, args)
    row = f"{system:<8}{name:<15}{judged.mean().item():>10.3f} +- {error:.3f}{own:>10.3f}{seconds:>10.1f}"
    return row, generate(net, 6, args.steps)


def main(args: argparse.Namespace) -> None:
    import matplotlib.pyplot as plt

    torch.set_num_threads(1)
    pyro.enable_validation(False)
    if args.smoke:
        args.updates, args.steps, args.sequences, args.particles, args.run = 2, 4, 20, 20, 2
        args.batch = 8
    train, test = (double_well(args.sequences, args.steps, args.seed + i) for i in (0, 1))
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{'model':<8}{'guide':<15}{'log p(x) / step, test':>19}{'bound':>10}{'seconds':>10}"]
    print(lines[0])
    names = ["Gaussian", "semi-implicit", "short run"]
    figure, axes = plt.subplots(1, 1 + len(names), figsize=(12, 3), sharey=True)
    axes[0].plot(test[:6].T, lw=1)
    axes[0].set_title("data")
    for name in names[:2]:
        row, _ = run("known", name, train, test, args)
        print(row, flush=True)
        lines.append(row)
    for axis, name in zip(axes[1:], names, strict=True):
        row, drawn = run("VRNN", name, train, test, args)
        print(row, flush=True)
        lines.append(row)
        axis.plot(drawn.T, lw=1)
        axis.set_title(name)
    (folder / "table.txt").write_text("\n".join(lines) + "\n")
    figure.tight_layout()
    figure.savefig(folder / "sequences.png", dpi=120)


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--sequences", type=int, default=400)
    out.add_argument("--steps", type=int, default=12, help="length of a sequence")
    out.add_argument("--updates", type=int, default=600)
    out.add_argument("--batch", type=int, default=64)
    out.add_argument("--hidden", type=int, default=16)
    out.add_argument("--num-mixtures", type=int, default=20, help="K in training")
    out.add_argument("--judge-mixtures", type=int, default=500, help="K of the printed bound")
    out.add_argument("--run", type=int, default=10, help="steps of a short run")
    out.add_argument(
        "--step-size", type=float, default=0.1, help="eta of a short run, in units of the prior's variance"
    )
    out.add_argument("--particles", type=int, default=1000, help="of the particle filter")
    out.add_argument("--seed", type=int, default=0)
    out.add_argument("--output", default="sis-rnn-output")
    out.add_argument("--smoke", action="store_true", help="tiny settings, to see that it runs")
    return out


if __name__ == "__main__":
    main(parser().parse_args())
