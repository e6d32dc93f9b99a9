"""Which way to train a generator is best in the same time? VAEs and short runs with one decoder.

    python examples/benchmarks/generators.py                              # scikit-learn's digits
    python examples/benchmarks/generators.py --data FOLDER                # also Frey faces and binarised MNIST; hours
    python examples/benchmarks/generators.py --data FOLDER --only frey    # one of digits, frey, binarised
    python examples/benchmarks/generators.py --data FOLDER --quick        # the main contenders, a third of the time
    python examples/benchmarks/generators.py --smoke                      # seconds, to see that it runs

FOLDER has ``faces/frey_faces.npz`` (``x``, images of bytes) and ``binarized_mnist/binarized_mnist_packed.npz``
(``train`` and ``test``, packed bits). All methods have the same decoder (16-128-128-pixels, GELU), batches of 100,
Adam, and those with an encoder the same encoder. They are trained in turns of some updates in one process, whoever has
had the least CPU time next, until each has had its seconds: CPU seconds of this process and of the compilers that it
starts, set-up included. Graphs that inductor keeps on disk from earlier runs are used, unless with ``--cold``.

Columns: "own MSE" is the error of images decoded from one draw of the method's own inference, "MAP MSE" that from 200
steps of Adam on log p(x, z) from z = 0, the same for all; "log p(x)" is the mean over test images in nats, from below,
by 500 importance samples of a Gaussian that is fitted to draws of the method and then to its own weights, "ess" their
median effective number; "to VAE" is the difference to the best VAE that Pyro trains, "+-" its paired standard error;
"AIS" is log p(x) by annealed importance sampling from the prior, 8 chains, with its effective number; "Frechet" is
between samples and training images, in the features of a small network trained on that set (no FID).

    VAE, Pyro           SVI with Trace_ELBO, at three learning rates
    VAE, PyTorch        the same written by hand
    Refine K            ShortRunGuide(model, num_steps=K, start=encoder, objective=Refine()), compiled and not
    Persistent K        chains that go on for each image (alternating back-propagation), step by acceptance
    gradient K, tuned   the papers' noise-free short run from the prior, its step tuned by the bound
    Langevin K, tuned   the same with noise, by Annealed
    Nesterov K          noise-free steps with momentum from the prior
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.append(str(Path(__file__).parent))  # where an example outside this folder imports this one
from generators_data import Features, Images, binarised, digits, frey  # noqa: E402
from generators_methods import (  # noqa: E402
    RATES,
    Method,
    PyroVAE,
    ShortRun,
    TorchVAE,
    annealed,
    gradient,
    nesterov,
    persistent,
    refined,
)
from record import Table, record  # noqa: E402

from pyro_shortrun import ais  # noqa: E402
from pyro_shortrun.evaluation import frechet_distance, importance_log_likelihood  # noqa: E402

TURN = 25  # updates
COLUMNS = {
    "method": "26s",
    "rate": "7.4f",
    "CPU s": "6.1f",
    "updates": "8d",
    "own MSE": "9.5f",
    "MAP MSE": "9.5f",
    "log p(x)": "9.2f",
    "to VAE": "7.2f",
    "+-": "5.2f",
    "ess": "5.0f",
    "AIS": "8.2f",
    "of 8": "5.1f",
    "Frechet": "8.3f",
    "step": "8.5f",
}
Maker = Callable[[Images, int], Method]


def contenders(quick: bool, smoke: bool) -> list[Maker]:
    """Makers of methods; the main ones alone where it is to be quick."""
    vaes: list[Maker] = [lambda d, s, r=r: PyroVAE("VAE, Pyro", d, s, r) for r in RATES]
    by_hand: list[Maker] = [
        lambda d, s, r=r: TorchVAE("VAE, PyTorch", d, s, r) for r in (RATES[1:2] if quick else RATES)
    ]
    main: list[Maker] = [
        lambda d, s, k=k: ShortRun(f"Refine K = {k}, compiled", d, s, refined(k)) for k in (() if smoke else (2, 5))
    ]
    main.append(lambda d, s: ShortRun("Refine K = 2, not compiled", d, s, refined(2, compile=False)))
    others: list[Maker] = [
        lambda d, s: ShortRun("Persistent K = 1", d, s, persistent(1), indexed=True),
        lambda d, s: ShortRun("Persistent K = 3", d, s, persistent(3), indexed=True),
        lambda d, s: ShortRun("gradient K = 20, tuned", d, s, gradient(20)),
        lambda d, s: ShortRun("Langevin K = 20, tuned", d, s, annealed(20)),
        lambda d, s: ShortRun("Nesterov K = 8", d, s, nesterov(8)),
    ]
    return [*vaes, *by_hand, *main, *([] if quick else others)]


@dataclass(frozen=True)
class Marks:
    """What a trained method is worth; ``log_p`` by test image."""

    method: str
    rate: float
    seconds: float
    updates: int
    own: float
    best: float
    log_p: Tensor
    ess: float
    annealed: float
    annealed_ess: float
    frechet: float
    step: float | None

    def row(self, reference: Marks | None) -> list[float | int | str | None]:
        gap = None if reference is None else self.log_p - reference.log_p
        to, error = (None, None) if gap is None else (gap.mean().item(), gap.std().item() / len(gap) ** 0.5)
        found = [self.log_p.mean().item(), to, error, self.ess, self.annealed, self.annealed_ess]
        found += [self.frechet, self.step]
        return [self.method, self.rate, self.seconds, self.updates, self.own, self.best, *found]


@dataclass(frozen=True)
class Judge:
    """Measures methods on some test images."""

    data: Images
    features: Features
    images: int
    chains: int
    temperatures: int

    def __call__(self, method: Method) -> Marks:
        x = self.data.test[: self.images]
        torch.manual_seed(0)
        with method.store():
            draws = {"z": method.draws(x, 5 if self.chains < 8 else 50)}
            weighted = importance_log_likelihood(method.generator.model, draws, x, num_samples=500)
            evidence = ais(
                method.generator.model, x, num_chains=self.chains, num_temperatures=self.temperatures, long_run=1
            )
        own = method.generator.decoded(method.draw(x))
        best = method.generator.decoded(mode(method, x))
        samples, real = method.generator.samples(5000), self.data.train[:5000]
        return Marks(
            method.name,
            method.rate,
            method.seconds,
            method.updates,
            (own - x).square().mean().item(),
            (best - x).square().mean().item(),
            weighted.value,
            weighted.ess.median().item(),
            evidence.lower.mean().item(),
            evidence.ess.median().item(),
            frechet_distance(self.features(samples), self.features(real)),
            method.step_size,
        )


def mode(method: Method, x: Tensor, steps: int = 200) -> Tensor:
    """Where log p(x, z) is highest, by Adam from z = 0."""
    z = torch.zeros(len(x), method.generator.latent, requires_grad=True)
    optimiser = torch.optim.Adam([z], lr=0.05)
    for _ in range(steps):
        loss = -method.generator.observed(z).log_prob(x).sum() + 0.5 * z.square().sum()
        (z.grad,) = torch.autograd.grad(loss, z)
        optimiser.step()
    return z.detach()


def compete(methods: Sequence[Method], judge: Judge, seconds: Sequence[float], updates: int) -> list[list[Marks]]:
    """Marks of all methods at these CPU seconds of each, and last those at as many updates.

    A method that does not come to as many updates is not among the last.
    """
    found: list[list[Marks]] = []
    level: list[Marks] = []
    with tqdm(total=round(seconds[-1] * len(methods)), unit="CPU s", disable=None) as bar:
        for end in seconds:
            while (method := min(methods, key=lambda m: m.seconds)).seconds < end:
                before = method.seconds
                method.train(TURN)
                bar.update(round(method.seconds - before, 2))
                if method.updates == updates:
                    level.append(judge(method))
            found.append([judge(m) for m in methods])
    order = [m.name + str(m.rate) for m in methods]
    return [*found, sorted(level, key=lambda m: order.index(m.method + str(m.rate)))]


def tables(data: Images, found: list[list[Marks]], seconds: Sequence[float], updates: int) -> list[Table]:
    """Equal time first, the longest first of all."""
    titles = [f"{data.name}, {s:g} CPU seconds each" for s in seconds] + [f"{data.name}, {updates} updates each"]
    out = []
    for title, marks in [*zip(titles[-2::-1], found[-2::-1], strict=True), (titles[-1], found[-1])]:
        if not marks:
            continue
        vaes = [m for m in marks if m.method == "VAE, Pyro"]
        reference = max(vaes, key=lambda m: m.log_p.mean().item(), default=None)
        out.append(Table(title, COLUMNS, [m.row(reference) for m in marks]))
    return out


def sets(args: argparse.Namespace) -> list[Images]:
    loaders = {"digits": digits, "frey": frey, "binarised": binarised}
    names = [args.only] if args.only else list(loaders) if args.data else ["digits"]
    if args.data is None and names != ["digits"]:
        raise SystemExit(f"--only {args.only} needs --data FOLDER.")
    return [loaders[name](args.data) for name in names]


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    if args.cold:
        torch._inductor.config.force_disable_caches = True
    found: list[Table] = []
    for data in sets(args):
        share = args.share or (1 / 3 if args.quick else 1.0)
        seconds = [round(data.seconds * share * part, 2) for part in ((1.0,) if args.quick else (1 / 3, 1.0))]
        updates, judge = 500, Judge(data, Features(data), 128, 8, 300)
        if args.quick:
            updates = 0
        if args.smoke:
            seconds, updates, judge = [0.2], TURN, Judge(data, Features(data, epochs=1), 8, 2, 5)
        for seed in range(args.seeds):
            methods = [make(data, seed) for make in contenders(args.quick, args.smoke)]
            marks = compete(methods, judge, seconds, updates)
            for table in tables(data, marks, seconds, updates):
                table.title += f", seed {seed}" if args.seeds > 1 else ""
                print(f"\n{table.title}\n" + "\n".join(table.lines()), flush=True)
                found.append(table)
            if args.output is not None:  # whatever comes after
                record(args.output, found)
                lines = [line for t in found for line in (t.title, *t.lines(), "")]
                (args.output / "generators.txt").write_text("\n".join(lines))


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--data", type=Path, help="folder with the data sets; digits alone without it")
    out.add_argument("--only", choices=["digits", "frey", "binarised"], help="one data set")
    out.add_argument("--seeds", type=int, default=1)
    out.add_argument("--share", type=float, help="of the seconds of a full run")
    out.add_argument("--cold", action="store_true", help="compile anew, whatever is kept on disk")
    out.add_argument("--quick", action="store_true", help="the main contenders, a third of the time")
    out.add_argument("--smoke", action="store_true", help="seconds, to see that it runs")
    out.add_argument("--output", type=Path, default=Path(tempfile.gettempdir()) / "generators")
    return out


if __name__ == "__main__":
    main(parser().parse_args())
