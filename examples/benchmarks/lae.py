"""The Langevin autoencoder against a VAE, Langevin runs from an encoder, and short runs from the prior: same nets.

    python examples/benchmarks/lae.py --data mnist.npz --quick     # minutes
    python examples/benchmarks/lae.py --data mnist.npz             # the paper's settings, three seeds; many hours
    python examples/benchmarks/lae.py --smoke                      # scikit-learn's digits, to see that it runs

    VAE            a Gaussian encoder, trained by the ELBO
    encoder + LD   its draws moved by a few Langevin steps for the decoder's gradient; the encoder trained by the ELBO
                   (Hoffman, ICML 2017)
    LAE            amortised Langevin dynamics: the encoder's last linear map is a Markov chain (LangevinEncoderGuide)
    LAE, whitened  the same with all rows moving at one pace (basis=Whitened(0.1))
    short runs     no encoder: a Langevin run from the prior for every batch (ShortRunGuide)

Pixels in [-1, 1] have a discretised logistic likelihood with one precision. Every number is in nats per pixel, lower is
better, on test images:

    -ELBO          one draw of the paper's q: the encoder's Gaussian; for LAE N(Phi g(x), 0.05^2); for short runs the
                   guide's own bound, on fewer images
    on few         the same on the --likelihood-images images that the next two columns are for
    chains         -ELBO of LAE with mean and standard deviation of chains on the test batch
    -log p(x)      importance sampling around each method's draws, refitted (evaluation.importance_log_likelihood): the
                   column that treats all alike; ess is its effective sample size for the worst 5 % of the images

    ms/iteration   CPU time of a training iteration, the first epoch's compilation included

Nothing is selected on the test set. Seeds are rows; with several, means and standard deviations follow.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from torch.nn.functional import softplus
from tqdm import tqdm

from pyro_shortrun import Langevin, LangevinEncoderGuide, ShortRunGuide, StepSize
from pyro_shortrun.amortized import Whitened

sys.path.append(str(Path(__file__).parent))  # where an example outside this folder imports this one
from record import Table, record  # noqa: E402

from pyro_shortrun.evaluation import importance_log_likelihood

# Test -ELBO per dimension on MNIST as the paper prints it (three seeds, 50 epochs of SGD).
PUBLISHED = {"VAE": "1.189 +- .002", "encoder + LD": "1.189 +- .002", "LAE": "1.177 +- .001"}


# ---------------------------------------------------------------- the model


class DiscretizedLogistic(dist.TorchDistribution):
    """A logistic of ``precision`` around ``loc``, on 256 values in [-1, 1]; the outer ones have the tails."""

    arg_constraints = {"loc": dist.constraints.real, "precision": dist.constraints.positive}
    support = dist.constraints.interval(-1.0, 1.0)

    def __init__(self, loc: Tensor, precision: Tensor, validate_args: bool | None = None) -> None:
        self.loc, self.precision = loc, precision
        super().__init__(loc.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> DiscretizedLogistic:
        return DiscretizedLogistic(self.loc.expand(batch_shape), self.precision, validate_args=False)

    def log_prob(self, x: Tensor) -> Tensor:
        # log(sigmoid(a) - sigmoid(b)) = log sigmoid(a) + log sigmoid(-b) + log(1 - exp(b - a)), a - b the bin's width
        below, above = x > -0.999, x < 0.999
        middle, half = self.precision * (x - self.loc), self.precision / 255
        inside = (-torch.expm1(-2 * half)).log()
        left, right = softplus(-middle - half), softplus(middle - half)
        return (below & above) * inside - above * left - below * right

    def sample(self, sample_shape: Any = ()) -> Tensor:
        u = torch.rand(self._extended_shape(torch.Size(sample_shape)), device=self.loc.device).clamp(1e-6, 1 - 1e-6)
        x = (self.loc + u.logit() / self.precision).clamp(-1, 1)
        return ((x + 1) * 127.5).round() / 127.5 - 1


def hidden(*sizes: int) -> nn.Sequential:
    """Linear, LayerNorm, ReLU for every pair of sizes; orthogonal weights."""
    layers = nn.Sequential()
    for a, b in zip(sizes[:-1], sizes[1:], strict=True):
        layers.extend([nn.Linear(a, b), nn.LayerNorm(b), nn.ReLU()])
        nn.init.orthogonal_(layers[-3].weight)
    return layers


class Decoder(nn.Module):
    """``p(x | z)``."""

    def __init__(self, latent: int, width: int, pixels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(hidden(latent, width, width, width), nn.Linear(width, pixels))
        self.log_precision = nn.Parameter(torch.tensor(1.5))
        self.latent = latent

    def forward(self, z: Tensor) -> dist.TorchDistribution:
        return DiscretizedLogistic(self.net(z), self.log_precision.exp(), validate_args=False).to_event(1)


def make_model(decoder: Decoder) -> Any:
    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(decoder.latent), 1.0).to_event(1))
            pyro.sample("x", decoder(z), obs=x)

    return model


class Encoder(nn.Module):
    """``q(z | x)``, a Pyro guide: the features of the Langevin autoencoder and one more layer."""

    def __init__(self, latent: int, width: int, pixels: int) -> None:
        super().__init__()
        self.features, self.last = hidden(pixels, width, width, width), nn.Linear(width, 2 * latent)

    def forward(self, x: Tensor) -> None:
        pyro.module("encoder", self)
        loc, log_scale = self.last(self.features(x)).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, softplus(log_scale)).to_event(1))


# ---------------------------------------------------------------- the methods


class Method(ABC):
    """A generator with its inference, and how to train and to judge it."""

    def __init__(self, pixels: int, args: argparse.Namespace) -> None:
        self.args = args
        self.decoder = Decoder(args.latent, args.width, pixels)
        self.model = make_model(self.decoder)
        self.elbo = Trace_ELBO()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return [*self.decoder.parameters(), *self.guide.parameters()]

    guide: Any

    def backward(self, x: Tensor) -> float:
        """The loss of a batch; gradients go to the parameters."""
        loss = self.elbo.differentiable_loss(self.model, self.guide, x) / len(x)
        loss.backward()
        return loss.item()

    @abstractmethod
    def bound(self, x: Tensor) -> Tensor:
        """ELBO per image, one draw, ``(n,)``."""

    def refined_bound(self, x: Tensor) -> Tensor | None:
        """ELBO per image with longer inference, if there is one."""
        return None

    @abstractmethod
    def draws(self, x: Tensor, count: int) -> Tensor:
        """Posterior draws, ``(count, n, latent)``."""

    def notes(self) -> str:
        """What else to say after training."""
        return ""


class VAE(Method):
    def __init__(self, pixels: int, args: argparse.Namespace) -> None:
        super().__init__(pixels, args)
        self.guide = Encoder(args.latent, args.width, pixels)

    def bound(self, x: Tensor) -> Tensor:
        guide = poutine.trace(self.guide).get_trace(x)
        model = poutine.trace(poutine.replay(self.model, guide)).get_trace(x)
        model.compute_log_prob()
        guide.compute_log_prob()
        return sum(model.nodes[k]["log_prob"] for k in ("x", "z")) - guide.nodes["z"]["log_prob"]  # type: ignore

    def draws(self, x: Tensor, count: int) -> Tensor:
        return torch.stack([poutine.trace(self.guide).get_trace(x).nodes["z"]["value"] for _ in range(count)])


class EncoderLangevin(VAE):
    def __init__(self, pixels: int, args: argparse.Namespace) -> None:
        super().__init__(pixels, args)
        encoder, step = self.guide, StepSize(args.step_size, learnable=False)
        self.runs = ShortRunGuide(
            self.model,
            num_steps=args.steps,
            dynamics=Langevin(step),
            start=lambda x: encoder(x),
            tune_every=10**9,
            compile=args.compile,
        )

    def backward(self, x: Tensor) -> float:
        loss = self.elbo.differentiable_loss(self.model, self.guide, x) / len(x)
        theirs = list(self.guide.parameters())
        for p, g in zip(theirs, torch.autograd.grad(loss, theirs), strict=True):
            p.grad = g
        with torch.no_grad(), poutine.mask(mask=False):  # no log q
            z = poutine.trace(self.runs).get_trace(x).nodes["z"]["value"]
        joint = poutine.trace(poutine.condition(self.model, {"z": z})).get_trace(x).log_prob_sum()
        (-joint / len(x)).backward()
        return loss.item()


class LAE(Method):
    basis: Any = None

    def __init__(self, pixels: int, args: argparse.Namespace) -> None:
        super().__init__(pixels, args)
        self.guide = LangevinEncoderGuide(
            self.model,
            hidden(pixels, args.width, args.width, args.width),
            num_steps=args.transitions,
            step_size=args.lae_step,
            target_accept_prob=args.accept or None,
            basis=self.basis,
            compile=args.compile,
        )

    def bound(self, x: Tensor) -> Tensor:
        return self.guide.log_bound(x, scale=0.05)

    def refined_bound(self, x: Tensor) -> Tensor:
        parts = []
        for part in x.split(self.args.batch):
            loc, scale = self.guide.moments(part, num_samples=100, warmup_steps=200, thinning=2)
            parts.append(self.guide.log_bound(part, loc=loc, scale=scale, num_samples=8))
        return torch.cat(parts)

    def draws(self, x: Tensor, count: int) -> Tensor:
        parts = x.split(self.args.batch)
        return torch.cat([self.guide.sample_posterior(p, num_samples=count, thinning=2)["z"][0] for p in parts], 1)

    def notes(self) -> str:
        info = self.guide.info
        return f"eta {self.guide.chain.log_step.exp().item():.2g}, |Phi| {self.guide.phi.norm().item():.1f}, {info}"


class WhitenedLAE(LAE):
    basis = Whitened(0.1)


class ShortRuns(Method):
    def __init__(self, pixels: int, args: argparse.Namespace) -> None:
        super().__init__(pixels, args)
        step = StepSize(args.run_step, learnable=False)
        self.guide = ShortRunGuide(
            self.model, num_steps=args.run_steps, dynamics=Langevin(step), tune_every=10**9, compile=args.compile
        )

    def backward(self, x: Tensor) -> float:
        with torch.no_grad(), poutine.mask(mask=False):  # no log q
            z = poutine.trace(self.guide).get_trace(x).nodes["z"]["value"]
        joint = poutine.trace(poutine.condition(self.model, {"z": z})).get_trace(x).log_prob_sum()
        (-joint / len(x)).backward()
        return -joint.item() / len(x)

    def bound(self, x: Tensor) -> Tensor:
        x = x[: self.args.likelihood_images]
        draws = self.guide.eval().weighted_draws((x,), {}, 1)[1]
        self.guide.train()
        return (draws.log_p - draws.log_q) / len(x)

    def draws(self, x: Tensor, count: int) -> Tensor:
        return self.guide.sample_posterior(x, num_samples=count)["z"][0]


METHODS: dict[str, type[Method]] = {
    "VAE": VAE,
    "encoder + LD": EncoderLangevin,
    "LAE": LAE,
    "LAE, whitened": WhitenedLAE,
    "short runs": ShortRuns,
}


# ---------------------------------------------------------------- training and judging


def batches(x: Tensor, size: int) -> Iterator[Tensor]:
    """Full batches in random order."""
    return (part for part in x[torch.randperm(len(x))].split(size) if len(part) == size)


def make_optimiser(method: Method, args: argparse.Namespace) -> torch.optim.Optimizer:
    kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[args.optimiser]
    return kind(method.parameters, lr=args.lr)


def train(method: Method, x: Tensor, test: Tensor, args: argparse.Namespace, name: str) -> tuple[list[Any], float]:
    """The test -ELBO per pixel after some epochs, and CPU seconds per iteration of training."""
    if isinstance(method.guide, LangevinEncoderGuide):
        method.guide.setup(x[: args.batch])
    optimiser = make_optimiser(method, args)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda e: 1.0 if e < 0.7 * args.epochs else args.decay)
    curve, seconds, iterations = [], 0.0, 0
    bar = tqdm(range(args.epochs), desc=name, unit="epoch")
    for epoch in bar:
        began = time.process_time()
        for part in batches(x, args.batch):
            optimiser.zero_grad(set_to_none=True)
            method.backward(part)
            optimiser.step()
            iterations += 1
        schedule.step()
        seconds += time.process_time() - began
        if (epoch + 1) % args.judge_every == 0 or epoch + 1 == args.epochs:
            curve.append((epoch + 1, per_pixel(method.bound(test))))
            bar.set_postfix_str(f"-ELBO {curve[-1][1]:.3f}")
    return curve, seconds / max(iterations, 1)


def per_pixel(bound: Tensor) -> float:
    return -bound.mean().item() / PIXELS[0]


PIXELS = [784]


@torch.no_grad()
def judge(method: Method, test: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Numbers of the table, in nats per pixel."""
    few = test[: args.likelihood_images]
    refined = method.refined_bound(few)
    draws = method.draws(few, 60)
    values, ess, parts = [], [], []
    for i in range(0, len(few), 20):
        part = few[i : i + 20]
        options = dict(num_samples=args.importance_samples, rounds=6)
        found = importance_log_likelihood(method.model, {"z": draws[:, i : i + 20]}, part, **options)
        values.append(found.value)
        ess.append(found.ess)
        parts.append(found.error)
    error = torch.cat(parts).square().sum().sqrt().item() / len(few) / PIXELS[0]
    return {
        "bound": per_pixel(method.bound(test)),
        "few": per_pixel(torch.cat([method.bound(few) for _ in range(4)])),
        "refined": None if refined is None else per_pixel(refined),
        "likelihood": per_pixel(torch.cat(values)),
        "error": error,
        "ess": torch.cat(ess).quantile(0.05).item(),
    }


def load(path: str | None) -> tuple[Tensor, Tensor]:
    """Images in [-1, 1], flattened, train and test (shuffled). A folder is looked through for an npz."""
    if path is not None and Path(path).is_dir():
        path = str(sorted(Path(path).glob("*.npz"))[0])
    if path is None:
        from sklearn.datasets import load_digits

        levels = load_digits(return_X_y=True)[0] * (255 / 16)
        x, test = levels[:-397], levels[-397:]
    else:
        with np.load(path) as file:
            x, test = file["x_train"], file["x_test"]
    order = torch.Generator().manual_seed(0)
    found = []
    for images in (x, test):
        flat = torch.tensor(np.round(images), dtype=torch.float32).flatten(1) / 127.5 - 1
        found.append(flat[torch.randperm(len(flat), generator=order)])
    return found[0], found[1]


# What is judged: its column in the table, and the format there.
FIGURES = {
    "bound": ("-ELBO", "9.4f"),
    "few": ("on few", "9.4f"),
    "refined": ("chains", "9.4f"),
    "likelihood": ("-log p(x)", "9.4f"),
    "error": ("+-", "7.4f"),
    "ess": ("ess", "7.0f"),
}


def row(name: str, seed: str, r: dict[str, Any]) -> str:
    refined = f"{r['refined']:.4f}" if r["refined"] is not None else "-"
    likelihood = f"{r['likelihood']:.4f} +- {r['error']:.4f}"
    bounds = f"{r['bound']:>9.4f}{r['few']:>9.4f}{refined:>9}"
    return f"{name:<15}{seed:>5}{bounds}{likelihood:>18}{r['ess']:>7.0f}{1000 * r['seconds']:>14.1f}"


def summary(name: str, rows: list[dict[str, Any]]) -> str:
    def moments(key: str) -> str:
        values = np.array([r[key] for r in rows if r[key] is not None])
        return f"{values.mean():.4f} +- {values.std(ddof=1):.4f}" if len(values) > 1 else "-"

    return f"{name:<15} -ELBO {moments('bound')}  chains {moments('refined')}  -log p(x) {moments('likelihood')}"


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    pyro.enable_validation(False)
    if args.quick:
        args.images, args.epochs, args.width, args.seeds = 5000, 20, 128, args.seeds[:1]
        args.optimiser, args.lr, args.test_images, args.run_steps = "adam", 1e-3, 2000, 10
    if args.smoke:
        args.images, args.epochs, args.width, args.seeds, args.batch, args.latent = 200, 1, 64, [0], 50, 3
        args.likelihood_images, args.importance_samples, args.test_images, args.compile = 20, 20, 40, False
        args.run_steps, args.optimiser, args.lr = 3, "adam", 1e-3
    train_x, test_x = load(args.data)
    train_x, test_x = train_x[: args.images or None], test_x[: args.test_images or None]
    PIXELS[0] = train_x.shape[1]
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        f"{len(train_x)} training images, {len(test_x)} test images, {args.epochs} epochs of {args.optimiser}, lr "
        f"{args.lr} (x {args.decay} for the last 30 %), batch {args.batch}, width {args.width}, latent {args.latent}",
        f"LAE: T = {args.transitions}, acceptance {args.accept}; encoder + LD: {args.steps} steps of {args.step_size}; "
        f"short runs: {args.run_steps} steps of {args.run_step}",
        f"published -ELBO on MNIST (width 1024, SGD, 50 epochs): {PUBLISHED}",
        f"{'method':<15}{'seed':>5}{'-ELBO':>9}{'on few':>9}{'chains':>9}{'-log p(x)':>18}{'ess':>7}"
        f"{'ms/iteration':>14}",
    ]
    print("\n".join(lines), flush=True)
    records: dict[str, list[dict[str, Any]]] = {}
    forms = {"method": "15s", "seed": "5d", **dict(FIGURES.values()), "ms/iteration": "14.1f"}
    table = Table(f"Nats per pixel: {lines[0]}; {lines[1]}", forms)
    for name in args.methods:
        for seed in args.seeds:
            pyro.clear_param_store()
            pyro.set_rng_seed(seed)
            method = METHODS[name](train_x.shape[1], args)
            curve, seconds = train(method, train_x, test_x, args, name)
            notes = method.notes()
            judged = {**judge(method, test_x, args), "seconds": seconds, "curve": curve, "notes": notes}
            records.setdefault(name, []).append(judged)
            lines.append(row(name, str(seed), judged))
            table.rows.append([name, seed, *(judged[key] for key in FIGURES), 1000 * seconds])
            print(lines[-1], f"  {notes}", flush=True)
            (folder / "lae.txt").write_text("\n".join(lines) + "\n")
            (folder / "lae.json").write_text(json.dumps(records, indent=1))
            record(folder, [table])
    if len(args.seeds) > 1:
        lines += [summary(name, rows) for name, rows in records.items()]
        print("\n".join(lines[-len(records) :]))
        (folder / "lae.txt").write_text("\n".join(lines) + "\n")


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--data", help="npz file with x_train and x_test, or a folder with one; default: digits")
    out.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    out.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    out.add_argument("--images", type=int, default=0, help="training images, 0 for all")
    out.add_argument("--test-images", type=int, default=0, help="for the -ELBO, 0 for all")
    out.add_argument("--likelihood-images", type=int, default=100, help="for importance sampling and chains")
    out.add_argument("--importance-samples", type=int, default=500)
    out.add_argument("--epochs", type=int, default=50)
    out.add_argument("--judge-every", type=int, default=5, help="epochs from one test -ELBO to the next (lae.json)")
    out.add_argument("--batch", type=int, default=100)
    out.add_argument("--width", type=int, default=1024, help="of hidden layers, and of LAE's features")
    out.add_argument("--latent", type=int, default=8)
    out.add_argument("--optimiser", choices=["sgd", "adam"], default="sgd", help="on the mean loss of a batch")
    out.add_argument("--lr", type=float, default=1e-4)
    out.add_argument("--decay", type=float, default=1.0, help="factor of lr in the last 30 %% of the epochs")
    out.add_argument("--transitions", type=int, default=2, help="T of LAE")
    out.add_argument("--lae-step", type=float, default=1e-4, help="first eta of LAE")
    out.add_argument("--accept", type=float, default=0.98, help="acceptance that eta adapts to; 0 for a fixed eta")
    out.add_argument("--steps", type=int, default=2, help="Langevin steps from the encoder")
    out.add_argument("--step-size", type=float, default=1e-3, help="their eta")
    out.add_argument("--run-steps", type=int, default=20, help="steps of short runs")
    out.add_argument("--run-step", type=float, default=2e-3, help="their eta")
    out.add_argument("--compile", action="store_true", help="compiled steps (some minutes per method; pays on a GPU)")
    out.add_argument("--output", default="lae-output")
    out.add_argument("--threads", type=int, default=1)
    out.add_argument("--quick", action="store_true", help="5000 images, 20 epochs of Adam, width 128, one seed")
    out.add_argument("--smoke", action="store_true", help="tiny settings, to see that it runs")
    return out


if __name__ == "__main__":
    main(parser().parse_args())
