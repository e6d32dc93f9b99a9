"""A Langevin autoencoder: an autoencoder slightly changed, so that its code is a posterior draw.

    python examples/langevin_autoencoder.py                      # scikit-learn's handwritten digits, a minute or two
    python examples/langevin_autoencoder.py --data mnist.npz     # x_train and x_test; or a folder with one
    python examples/langevin_autoencoder.py --smoke              # seconds, to see that it runs

An autoencoder is an encoder z = W g(x) and a decoder, trained together. Here the last linear map W is not trained but
sampled: a few Metropolis-adjusted Langevin steps on the batch's log joint log p(x, z) move it in every iteration, and
the features g and the decoder learn at the codes it gives. Both models of the table have the same nets, batches and
number of updates; the autoencoder is trained by log p(x | z) alone, so its codes know no prior.

Pictures: reconstructions, draws from N(0, I) by both decoders, what chains on test images say about their codes (mean
and standard deviation of the decoded draws), and the loss, acceptance and |W| over training.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import torch
from benchmarks.lae import Decoder, batches, hidden, load, make_model
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from tqdm import tqdm

from pyro_shortrun import LangevinEncoderGuide
from pyro_shortrun.diagnostics import plot_images
from pyro_shortrun.evaluation import importance_log_likelihood

History = dict[str, list[float]]


def autoencoder(x: Tensor, args: argparse.Namespace) -> tuple[nn.Module, nn.Module]:
    """The ordinary one: encoder and decoder."""
    encoder = nn.Sequential(hidden(x.shape[1], args.width, args.width), nn.Linear(args.width, args.latent))
    decoder = Decoder(args.latent, args.width, x.shape[1])
    optimiser = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=args.lr)
    for _ in tqdm(range(args.epochs), desc="autoencoder", unit="epoch"):
        for part in batches(x, args.batch):
            loss = -decoder(encoder(part)).log_prob(part).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return encoder, decoder


def langevin_autoencoder(x: Tensor, args: argparse.Namespace) -> tuple[LangevinEncoderGuide, Decoder, History]:
    """The same encoder without its last layer, and log p(z) in the loss."""
    features = hidden(x.shape[1], args.width, args.width)
    decoder = Decoder(args.latent, args.width, x.shape[1])
    model = make_model(decoder)
    guide = LangevinEncoderGuide(model, features, num_steps=args.transitions)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": args.lr}), Trace_ELBO())
    history: History = {"loss per image": [], "acceptance": [], "|W|": []}
    bar = tqdm(range(args.epochs), desc="Langevin autoencoder", unit="epoch")
    for _ in bar:
        for part in batches(x, args.batch):
            history["loss per image"].append(svi.step(part) / len(part))
            history["acceptance"].append(guide.info.acceptance.mean().item())
            history["|W|"].append(guide.info.phi_norm.item())
        bar.set_postfix_str(f"acceptance {history['acceptance'][-1]:.2f}, |W| {history['|W|'][-1]:.1f}")
    return guide, decoder, history


def picture(ax: plt.Axes, images: Tensor, title: str, columns: int, **options: float | None) -> None:
    plot_images(images, ax, columns=columns, title=title, **{"vmin": -1, "vmax": 1, **options})


def mean(decoder: nn.Module, z: Tensor) -> Tensor:
    """Where the decoder puts its pixels."""
    return decoder.net(z).clamp(-1, 1)


@torch.no_grad()
def pictures(
    encoder: nn.Module,
    plain: nn.Module,
    guide: LangevinEncoderGuide,
    decoder: nn.Module,
    x: Tensor,
    args: argparse.Namespace,
    folder: Path,
) -> None:
    few, columns = x[:16], 16
    figure, axes = plt.subplots(3, 1, figsize=(8, 2.2), layout="constrained")
    picture(axes[0], few, "test images", columns)
    picture(axes[1], mean(plain, encoder(few)), "autoencoder", columns)
    picture(axes[2], mean(decoder, guide.encode(few)["z"]), "Langevin autoencoder", columns)
    figure.savefig(folder / "reconstructions.png", dpi=150)
    z = torch.randn(64, args.latent)
    figure, axes = plt.subplots(1, 2, figsize=(8, 4.2), layout="constrained")
    picture(axes[0], mean(plain, z), "autoencoder's decoder at draws from N(0, I)", 8)
    picture(axes[1], mean(decoder, z), "Langevin autoencoder's", 8)
    figure.savefig(folder / "samples.png", dpi=150)
    draws = guide.sample_posterior(few, num_samples=100, thinning=2)["z"][0]
    decoded = mean(decoder, draws)
    figure, axes = plt.subplots(3, 1, figsize=(8, 2.2), layout="constrained")
    picture(axes[0], few, "test images", columns)
    picture(axes[1], decoded.mean(0), "mean over 100 posterior draws of a chain", columns)
    picture(axes[2], decoded.std(0), "standard deviation", columns, vmin=0, vmax=None)
    figure.savefig(folder / "posterior.png", dpi=150)


def curves(history: History, folder: Path) -> None:
    figure, axes = plt.subplots(1, len(history), figsize=(9, 2.6), layout="constrained")
    for ax, (name, values) in zip(axes, history.items(), strict=True):
        ax.plot(values, lw=0.5)
        ax.set_xlabel("iteration", fontsize=8)
        ax.set_title(name, fontsize=8)
    axes[0].set_yscale("symlog")
    figure.savefig(folder / "training.png", dpi=150)


@torch.no_grad()
def likelihood(decoder: Decoder, codes: Tensor, x: Tensor) -> float:
    """Importance-sampled log p(x) per image, proposals around the codes."""
    draws = codes + 0.1 * torch.randn(40, *codes.shape)
    return importance_log_likelihood(make_model(decoder), {"z": draws}, x, num_samples=200).mean


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    pyro.enable_validation(False)
    if args.smoke:
        args.images, args.epochs, args.width, args.test_images = 200, 2, 100, 30
    train_x, test_x = load(args.data)
    train_x, test_x = train_x[: args.images or None], test_x[: args.test_images]
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    pyro.set_rng_seed(args.seed)
    encoder, plain = autoencoder(train_x, args)
    pyro.set_rng_seed(args.seed)
    pyro.clear_param_store()
    guide, decoder, history = langevin_autoencoder(train_x, args)
    with torch.no_grad():
        found = {
            "autoencoder": (plain, encoder(test_x)),
            "Langevin autoencoder": (decoder, guide.encode(test_x)["z"]),
        }
    lines = [f"{'':<22}{'log p(x), nats':>15}{'test MSE':>10}{'std of codes':>14}"]
    for name, (net, codes) in found.items():
        error = (mean(net, codes) - test_x).square().mean().item() / 4  # for pixels in [0, 1]
        lines.append(f"{name:<22}{likelihood(net, codes, test_x):>15.1f}{error:>10.4f}{codes.std().item():>14.2f}")
    print("\n".join(lines))
    (folder / "langevin_autoencoder.txt").write_text("\n".join(lines) + "\n")
    pictures(encoder, plain, guide, decoder, test_x, args, folder)
    curves(history, folder)
    plt.close("all")
    print(f"table, reconstructions.png, samples.png, posterior.png and training.png are in {folder}/")


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--data", help="npz file, or a folder with one; default: scikit-learn's digits")
    out.add_argument("--images", type=int, default=10_000, help="training images, 0 for all")
    out.add_argument("--test-images", type=int, default=100, help="for the table")
    out.add_argument("--epochs", type=int, default=20)
    out.add_argument("--batch", type=int, default=100)
    out.add_argument("--width", type=int, default=256, help="of hidden layers; at least the batch")
    out.add_argument("--latent", type=int, default=8)
    out.add_argument("--transitions", type=int, default=2)
    out.add_argument("--lr", type=float, default=1e-3)
    out.add_argument("--seed", type=int, default=0)
    out.add_argument("--output", default="lae-example-output")
    out.add_argument("--threads", type=int, default=1)
    out.add_argument("--smoke", action="store_true", help="tiny settings, to see that it runs")
    return out


if __name__ == "__main__":
    main(parser().parse_args())
