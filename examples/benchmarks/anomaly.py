"""Which digit was never seen? Anomaly detection with and without energy priors.

    python examples/benchmarks/anomaly.py --data mnist.npz            # x_train, y_train, x_test, y_test; hours
    python examples/benchmarks/anomaly.py --data mnist.npz --quick    # minutes
    python examples/benchmarks/anomaly.py --smoke                     # scikit-learn's digits, to see that it runs

For each held-out digit, models are trained on the other nine digits of the training set and score the plain test set,
in which the held-out digit is the anomaly (about one image in ten: the base rate, the AUPRC of a score that knows
nothing). AUPRC of three scores of one guide draw per image: log p(x, z) with the energy in it, log p(x | z) alone
("data"), and log p(x, z) - log q(z | x). Numbers are means over the last epochs; nothing is selected on the test set.

What the energy contributes, from the same draws: the AUPRC of log p_0(z) - E(z) ("latents"), of -E(z) alone, and of
log p(x | z) and -E(z) summed after each is divided by its standard deviation over 1,000 training images ("scaled"; no
label is used); the mean energy of the anomalies less that of the others (out-in), the standard deviations over the test
set of E and of log p(x | z), all in nats (a term with a hundredth of another's spread cannot change the order of the
joint score), and the gap of the last training step, E in prior runs less E under the guide.

    VAE                     one layer, amortised guide
    VAE + energy            the same with an energy on the layer (variational scheme)
    short run               one layer, ShortRunGuide (maximum likelihood by MCMC)
    short run + energy      the same with an energy on the layer
    ladder                  three layers, amortised guide
    ladder + energy         the same with one energy on all layers jointly
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from tqdm import tqdm

from pyro_shortrun import EnergyELBO, Langevin, ShortRunGuide, StepSize, energy_prior
from pyro_shortrun.evaluation import Bound, Energies, Joint, Latents, Reconstruction, Score, anomaly_scores

sys.path.append(str(Path(__file__).parent))  # where an example outside this folder imports this one
from image_files import read_images  # noqa: E402
from record import Table, record  # noqa: E402

SCORES: dict[str, Score] = {"joint": Joint(), "data": Reconstruction(), "latents": Latents()}
# Width and decimals.
COLUMNS = {name: (8, 3) for name in ("joint", "data", "bound", "latents", "-E", "scaled")}
COLUMNS |= {"out-in": (8, 2), "sd E": (7, 2), "sd data": (9, 1), "gap": (7, 2), "s/epoch": (9, 1)}
HEAD = f"{'digit':<6}{'model':<31}" + "".join(f"{name:>{width}}" for name, (width, _) in COLUMNS.items())
# Mean AUPRC over seeds as the papers print them (convolutional networks, long training).
PUBLISHED = {
    "published: VAE": {1: 0.063, 4: 0.337, 5: 0.325, 7: 0.148, 9: 0.104},
    "published: one layer, short run": {1: 0.353, 4: 0.770, 5: 0.726, 7: 0.550, 9: 0.555},
    "published: one layer + energy": {1: 0.336, 4: 0.630, 5: 0.619, 7: 0.463, 9: 0.413},
    "published: 2 layers, 2 energies": {1: 0.470, 4: 0.941, 5: 0.964, 7: 0.815, 9: 0.796},
    "published: hierarchy": {1: 0.494, 4: 0.920, 5: 0.913, 7: 0.680, 9: 0.791},
    "published: hierarchy + energy": {1: 0.722, 4: 0.949, 5: 0.980, 7: 0.941, 9: 0.935},
}


@dataclass(frozen=True)
class Kind:
    """A model of the table: latent dimensions from the bottom layer up, guide, energy."""

    name: str
    dims: tuple[int, ...]
    amortised: bool
    tilted: bool


KINDS = (
    Kind("VAE", (16,), True, False),
    Kind("VAE + energy", (16,), True, True),
    Kind("short run", (16,), False, False),
    Kind("short run + energy", (16,), False, True),
    Kind("ladder", (10, 10, 10), True, False),
    Kind("ladder + energy", (10, 10, 10), True, True),
)


def mlp(*sizes: int) -> nn.Sequential:
    layers = [nn.Sequential(nn.Linear(a, b), nn.GELU()) for a, b in zip(sizes[:-2], sizes[1:-1], strict=True)]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


class Generator(nn.Module):
    """Top down: h_L = g_L(z_L), h_i = g_i(z_i, h_{i+1}), and the image from h_1."""

    def __init__(self, dims: tuple[int, ...], pixels: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            mlp(d + (hidden if i + 1 < len(dims) else 0), hidden, hidden) for i, d in enumerate(dims)
        )
        self.image = nn.Sequential(nn.GELU(), nn.Linear(hidden, pixels), nn.Sigmoid())

    def forward(self, latents: list[Tensor]) -> Tensor:
        h = self.layers[-1](latents[-1])
        for z, layer in zip(latents[-2::-1], list(self.layers)[-2::-1], strict=True):
            h = layer(torch.cat([z, h], -1))
        return self.image(h)


class Encoder(nn.Module):
    """Bottom up: features of growing abstraction, one Gaussian for each layer."""

    def __init__(self, dims: tuple[int, ...], pixels: int, hidden: int) -> None:
        super().__init__()
        self.features = nn.ModuleList(mlp(pixels if i == 0 else hidden, hidden, hidden) for i in range(len(dims)))
        self.heads = nn.ModuleList(nn.Linear(hidden, 2 * d) for d in dims)

    def forward(self, x: Tensor) -> None:
        pyro.module("encoder", self)
        with pyro.plate("data", len(x)):
            h = x
            for i, (features, head) in enumerate(zip(self.features, self.heads, strict=True)):
                h = nn.functional.gelu(features(h))
                loc, log_scale = head(h).chunk(2, -1)
                pyro.sample(f"z{i + 1}", dist.Normal(loc, log_scale.clamp(-6, 2).exp()).to_event(1))


class Energy(nn.Module):
    """One value for all layers jointly."""

    def __init__(self, dims: tuple[int, ...], hidden: int) -> None:
        super().__init__()
        self.net = mlp(sum(dims), hidden, hidden, 1)

    def forward(self, *latents: Tensor) -> Tensor:
        return self.net(torch.cat(latents, -1)).squeeze(-1)


def make_model(kind: Kind, pixels: int, hidden: int, sigma: float = 0.2) -> Callable:
    """``sigma``: noise of a pixel, on images in [0, 1]."""
    generator, energy = Generator(kind.dims, pixels, hidden), Energy(kind.dims, 100)

    def model(x: Tensor) -> None:
        pyro.module("generator", generator)
        with pyro.plate("data", len(x)):
            priors = [dist.Normal(x.new_zeros(d), 1.0).to_event(1) for d in kind.dims]
            latents = [pyro.sample(f"z{i + 1}", prior) for i, prior in enumerate(priors)]
            if kind.tilted:
                energy_prior("ebm", energy, *latents)
            image = pyro.deterministic("image", generator(latents), event_dim=1)
            pyro.sample("x", dist.Normal(image, sigma).to_event(1), obs=x)

    return model


def make_guide(kind: Kind, model: Callable, pixels: int, hidden: int, args: argparse.Namespace) -> Callable:
    if kind.amortised:
        return Encoder(kind.dims, pixels, hidden)
    step = StepSize(args.posterior_step, learnable=False)
    return ShortRunGuide(
        model, num_steps=args.posterior_steps, dynamics=Langevin(step), tune_every=10**9, compile=args.compile
    )


def batches(x: Tensor, size: int) -> Iterator[Tensor]:
    """Full batches in random order: one shape, so that graphs are compiled once."""
    return (part for part in x[torch.randperm(len(x))].split(size) if len(part) == size)


def score(model: Callable, guide: Callable, x: Tensor, scores: dict[str, Score]) -> dict[str, Tensor]:
    parts = [anomaly_scores(model, guide, part, scores=scores) for part in x.split(1000)]
    return {name: torch.cat([part[name] for part in parts]) for name in scores}


def auprc(values: Tensor, anomalous: Tensor) -> float:
    return float(average_precision_score(anomalous[: len(values)], values))


def evaluate(
    kind: Kind, model: Callable, guide: Callable, train: Tensor, test: Tensor, anomalous: Tensor, bound_images: int
) -> dict[str, float]:
    """The table's columns, but for what training tells; the bound of ``bound_images`` (none if 0)."""
    found = score(model, guide, test, {**SCORES, "-E": Energies()} if kind.tilted else SCORES)
    out = {name: auprc(values, anomalous) for name, values in found.items()}
    out["sd data"] = found["data"].std().item()
    if kind.tilted:
        energy = found["-E"]
        out["out-in"] = (energy[anomalous].mean() - energy[~anomalous].mean()).item()
        out["sd E"] = energy.std().item()
        normal = score(model, guide, train[:1000], {"data": Reconstruction(), "-E": Energies()})
        scaled = sum(found[name] / values.std() for name, values in normal.items())
        out["scaled"] = auprc(scaled, anomalous)
    if bound_images:
        out["bound"] = auprc(score(model, guide, test[:bound_images], {"bound": Bound()})["bound"], anomalous)
    return out


def run(kind: Kind, train: Tensor, test: Tensor, anomalous: Tensor, args: argparse.Namespace) -> dict[str, float]:
    """The columns of the table, means over the last epochs."""
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    pixels = train.shape[1]
    model = make_model(kind, pixels, args.hidden, args.sigma)
    guide = make_guide(kind, model, pixels, args.hidden, args)
    loss = Trace_ELBO()
    if kind.tilted:
        loss = EnergyELBO(loss, args.prior_steps, args.prior_step, l2=args.l2, compile=args.compile)
    optimiser = pyro.optim.Adam(lambda name: {"lr": args.energy_lr if name.startswith("ebm.") else args.lr})
    svi = SVI(model, guide, optimiser, loss)
    found: dict[str, list[float]] = {}
    seconds = 0.0
    for epoch in tqdm(range(args.epochs), desc=kind.name, unit="epoch"):
        began = time.perf_counter()
        for part in batches(train, args.batch):
            svi.step(part)
        seconds += time.perf_counter() - began
        if args.epochs - epoch > args.last:
            continue
        # The log q of a short run takes log-determinants of every step: once, and for some of the images.
        dear = args.bound_images if epoch == args.epochs - 1 else 0
        columns = evaluate(kind, model, guide, train, test, anomalous, len(test) if kind.amortised else dear)
        for name, value in columns.items():
            found.setdefault(name, []).append(value)
    out = {name: sum(values) / len(values) for name, values in found.items()}
    if isinstance(loss, EnergyELBO) and loss.info:
        out["gap"] = loss.info.gap["ebm"]
    return {**out, "s/epoch": seconds / args.epochs}


def line(digit: int, name: str, r: dict[str, float]) -> str:
    def cell(value: float, width: int, digits: int) -> str:
        return f"{value:>{width}.{digits}f}" if abs(value) < 1e3 else f"{value:>{width}.0e}"  # diverged

    cells = (cell(r[k], *form) if k in r else " " * form[0] for k, form in COLUMNS.items())
    return f"{digit:<6}{name:<31}{''.join(cells)}".rstrip()


def load(path: str | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images in [0, 1], flattened, and labels: (train, labels, test, labels)."""
    found = read_images(path, labels=True)
    assert found.train_labels is not None and found.test_labels is not None
    return found.train, found.train_labels, found.test, found.test_labels


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    pyro.enable_validation(False)
    budget = {"images": 10_000, "epochs": 12, "last": 3} if args.quick else {"images": 0, "epochs": 40, "last": 10}
    for name, value in budget.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.smoke:
        args.digits, args.images, args.epochs, args.last = [4], 200, 2, 1
        args.prior_steps, args.posterior_steps, args.hidden, args.compile, args.bound_images = 3, 3, 32, False, 50
    train_x, train_y, test_x, test_y = load(args.data)
    kinds = [k for k in KINDS if args.models is None or k.name in args.models]
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        f"{args.images or 'all'} training images, {args.epochs} epochs, last {args.last} averaged, seed {args.seed}",
        f"prior runs {args.prior_steps} x {args.prior_step}, lr {args.lr}, energy lr {args.energy_lr}, l2 {args.l2}, "
        f"sigma {args.sigma}, threads {args.threads}",
        HEAD,
    ]
    print("\n".join(lines))
    forms = {name: f"{width}.{digits}f" for name, (width, digits) in COLUMNS.items()}
    table = Table(f"AUPRC: {lines[0]}; {lines[1]}", {"digit": "6d", "model": "31s", **forms})
    for digit in args.digits:
        anomalous = test_y == digit
        train = train_x[train_y != digit]
        train = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[: args.images or None]]
        rate = anomalous.float().mean().item()
        found = {"base rate": {"joint": rate}}
        found |= {kind.name: run(kind, train, test_x, anomalous, args) for kind in kinds}
        found |= {name: {"joint": values[digit]} for name, values in PUBLISHED.items() if digit in values}
        rows = [line(digit, name, values) for name, values in found.items()]
        print("\n".join(rows), flush=True)
        lines += rows
        (folder / "anomaly.txt").write_text("\n".join(lines) + "\n")
        table.rows += [[digit, name, *(values.get(k, "") for k in COLUMNS)] for name, values in found.items()]
        record(folder, [table])


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--data", help="npz file with x_train, y_train, x_test, y_test; default: scikit-learn's digits")
    out.add_argument("--digits", type=int, nargs="+", default=[1, 4, 5, 7, 9], help="held out, one after the other")
    out.add_argument("--models", nargs="+", choices=[k.name for k in KINDS], help="some of them only")
    out.add_argument("--images", type=int, help="training images, 0 (the default) for all")
    out.add_argument("--epochs", type=int, help="default 40")
    out.add_argument("--last", type=int, help="epochs to average over, default 10")
    out.add_argument("--batch", type=int, default=200)
    out.add_argument("--hidden", type=int, default=256)
    out.add_argument("--lr", type=float, default=1e-3)
    out.add_argument("--energy-lr", type=float, default=1e-4)
    out.add_argument("--l2", type=float, default=0.0, help="weight of squared energies")
    out.add_argument("--sigma", type=float, default=0.2, help="noise of a pixel, on images in [0, 1]")
    out.add_argument("--prior-steps", type=int, default=60)
    out.add_argument("--prior-step", type=float, default=0.08, help="eta; the papers' s = 0.4")
    out.add_argument("--posterior-steps", type=int, default=20)
    out.add_argument("--posterior-step", type=float, default=0.005, help="eta; the papers' s = 0.1")
    out.add_argument("--bound-images", type=int, default=1000, help="test images for the bound of short runs")
    out.add_argument("--no-compile", dest="compile", action="store_false")
    out.add_argument("--seed", type=int, default=0)
    out.add_argument("--output", default="anomaly-output")
    out.add_argument("--threads", type=int, default=1)
    out.add_argument("--quick", action="store_true", help="defaults 10,000 images, 12 epochs, the last 3 averaged")
    out.add_argument("--smoke", action="store_true", help="tiny settings, to see that it runs")
    return out


if __name__ == "__main__":
    main(parser().parse_args())
