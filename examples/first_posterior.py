"""README's first example: the plain swap beside NUTS, many chains, AutoNormal and AutoMultivariateNormal.

    python examples/first_posterior.py             # about a minute; table, posterior.png
    python examples/first_posterior.py --smoke     # seconds, to see that it runs

The posterior of a logistic regression on correlated columns. AutoNormal misses the correlation and with it most of the
width; AutoMultivariateNormal has both, after thousands of steps; the plain swap, a guide with no argument and no
training, fits a Gaussian by itself and moves its draws to the posterior.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoGuide, AutoMultivariateNormal, AutoNormal
from torch import Tensor

from pyro_shortrun import ShortRunGuide, ShortRunLangevin, VectorizedMCMC
from pyro_shortrun.dynamics import Dense


def data() -> tuple[Tensor, Tensor]:
    mixing = torch.tensor([[1.0, 0.9, 0.9], [0.0, 0.4, 0.0], [0.0, 0.0, 0.4]])
    x = torch.randn(100, 3) @ mixing
    return x, dist.Bernoulli(logits=x @ torch.tensor([1.0, -2.0, 0.5])).sample()


def model(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 3.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


def by_nuts(x: Tensor, y: Tensor, draws: int) -> Tensor:
    mcmc = MCMC(NUTS(model), draws, warmup_steps=draws, disable_progbar=True)
    mcmc.run(x, y)
    return mcmc.get_samples()["w"]


def by_chains(x: Tensor, y: Tensor, draws: int) -> Tensor:
    """Adjusted Langevin chains, 64 at once, as many draws in all."""
    kernel = ShortRunLangevin(model, num_steps=1, persistent=True, adjust=True, preconditioner=Dense())
    each = -(-draws // 64)
    mcmc = VectorizedMCMC(kernel, each, 300, num_chains=64, disable_progbar=True)
    mcmc.run(x, y)
    return mcmc.get_samples()["w"][:draws]


def by_auto_guide(kind: type[AutoGuide], x: Tensor, y: Tensor, draws: int, steps: int) -> Tensor:
    guide = kind(model)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.05 ** (1 / steps)}), Trace_ELBO())
    for _ in range(steps):
        svi.step(x, y)
    drawn = Predictive(model, guide=guide, num_samples=draws, return_sites=["w"])(x, y)
    return drawn["w"]


def by_plain_swap(x: Tensor, y: Tensor, draws: int) -> Tensor:
    return ShortRunGuide(model).sample_posterior(x, y, num_samples=draws)["w"]


def row(name: str, w: Tensor, seconds: float) -> str:
    cells = [f"{m:6.2f} +- {s:4.2f}" for m, s in zip(w.mean(0).tolist(), w.std(0).tolist(), strict=True)]
    return f"{name:22s} {'  '.join(cells)}  {torch.corrcoef(w.T)[0, 1]:11.2f} {seconds:11.1f}"


def picture(draws: dict[str, Tensor], path: Path) -> None:
    """The first two coefficients by each method, NUTS's behind the others."""
    shown = ("AutoNormal", "AutoMultivariateNormal", "plain swap")
    figure, axes = plt.subplots(1, len(shown), figsize=(10, 3.6), sharex=True, sharey=True, layout="constrained")
    reference = draws["NUTS"]
    for axis, name in zip(axes, shown, strict=True):
        axis.scatter(*reference[:, :2].T, s=6, color="0.8", label="NUTS")
        axis.scatter(*draws[name][:, :2].T, s=6, alpha=0.5, label=name)
        axis.set(title=name, xlabel="$w_1$")
        axis.legend(loc="lower left")
    axes[0].set_ylabel("$w_2$")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000, help="from each posterior (default: 1000)")
    parser.add_argument("--steps", type=int, default=2000, help="of SVI for the AutoGuides (default: 2000)")
    parser.add_argument("--smoke", action="store_true", help="seconds only")
    parser.add_argument("--output", type=Path, default=Path("first-posterior-output"), help="folder for the picture")
    options = parser.parse_args()
    if options.smoke:
        options.draws, options.steps = 20, 3
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    x, y = data()
    draws, steps = options.draws, options.steps
    methods: dict[str, Callable[[], Tensor]] = {
        "NUTS": lambda: by_nuts(x, y, draws),
        "VectorizedMCMC": lambda: by_chains(x, y, draws),
        "AutoNormal": lambda: by_auto_guide(AutoNormal, x, y, draws, steps),
        "AutoMultivariateNormal": lambda: by_auto_guide(AutoMultivariateNormal, x, y, draws, steps),
        "plain swap": lambda: by_plain_swap(x, y, draws),
    }
    print(f"{'method':22s} {'w1':>14s}  {'w2':>14s}  {'w3':>14s}  {'corr(w1,w2)':>11s} {'CPU seconds':>11s}")
    found = {}
    for name, draw in methods.items():
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        begin = time.process_time()
        found[name] = draw().reshape(-1, 3)
        print(row(name, found[name], time.process_time() - begin))
    options.output.mkdir(parents=True, exist_ok=True)
    picture(found, options.output / "posterior.png")


if __name__ == "__main__":
    main()
