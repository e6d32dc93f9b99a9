"""README's first example beside AutoNormal and NUTS: moments, and the picture of what a short run does.

    python examples/first_posterior.py             # about a minute; table, posterior.png
    python examples/first_posterior.py --smoke     # seconds, to see that it runs

The posterior of a logistic regression on correlated columns. AutoNormal finds its centre only roughly and none of its
width; the short runs start from an AutoNormal and move its draws towards the posterior.
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
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyro_shortrun import Annealed, ShortRunELBO, ShortRunGuide


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


def fit(guide: Callable, loss: Trace_ELBO, x: Tensor, y: Tensor, steps: int) -> None:
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), loss)
    for _ in range(steps):
        svi.step(x, y)


def by_auto_normal(x: Tensor, y: Tensor, draws: int, steps: int) -> Tensor:
    guide = AutoNormal(model)
    fit(guide, Trace_ELBO(), x, y, steps)
    drawn = Predictive(model, guide=guide, num_samples=draws, return_sites=["w"])(x, y)
    return drawn["w"]


def by_short_runs(x: Tensor, y: Tensor, draws: int, steps: int) -> Tensor:
    guide = ShortRunGuide(model, num_steps=20, step_size=0.01, start=AutoNormal(model), objective=Annealed())
    fit(guide, ShortRunELBO(), x, y, steps)
    return guide.sample_posterior(x, y, num_samples=draws)["w"]


def row(name: str, w: Tensor, seconds: float) -> str:
    cells = [f"{m:6.2f} +- {s:4.2f}" for m, s in zip(w.mean(0).tolist(), w.std(0).tolist(), strict=True)]
    return f"{name:11s} {'  '.join(cells)}  {torch.corrcoef(w.T)[0, 1]:11.2f} {seconds:8.1f}"


def picture(draws: dict[str, Tensor], path: Path) -> None:
    """The first two coefficients by each method, NUTS's behind the others."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 4), sharex=True, sharey=True, layout="constrained")
    reference = draws["NUTS"]
    for axis, name in zip(axes, ("AutoNormal", "short run"), strict=True):
        axis.scatter(*reference[:, :2].T, s=6, color="0.8", label="NUTS")
        axis.scatter(*draws[name][:, :2].T, s=6, alpha=0.5, label=name)
        axis.set(title=name, xlabel="$w_1$")
        axis.legend(loc="lower left")
    axes[0].set_ylabel("$w_2$")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000, help="from each posterior (default: 1000)")
    parser.add_argument("--steps", type=int, default=500, help="of SVI (default: 500)")
    parser.add_argument("--smoke", action="store_true", help="seconds only")
    parser.add_argument("--output", type=Path, default=Path("first-posterior-output"), help="folder for the picture")
    options = parser.parse_args()
    if options.smoke:
        options.draws, options.steps = 20, 3
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    x, y = data()
    methods: dict[str, Callable[[], Tensor]] = {
        "NUTS": lambda: by_nuts(x, y, options.draws),
        "AutoNormal": lambda: by_auto_normal(x, y, options.draws, options.steps),
        "short run": lambda: by_short_runs(x, y, options.draws, options.steps),
    }
    print(f"{'method':11s} {'w1':>14s}  {'w2':>14s}  {'w3':>14s}  {'corr(w1,w2)':>11s} {'seconds':>8s}")
    draws = {}
    for name, draw in methods.items():
        pyro.clear_param_store()
        begin = time.perf_counter()
        draws[name] = draw().reshape(-1, 3)
        print(row(name, draws[name], time.perf_counter() - begin))
    options.output.mkdir(parents=True, exist_ok=True)
    picture(draws, options.output / "posterior.png")


if __name__ == "__main__":
    main()
