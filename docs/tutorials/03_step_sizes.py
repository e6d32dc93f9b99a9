# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Tuning step sizes
#
# A short run has one number that matters more than all others: the step size. Too small, and K steps do not
# arrive; too large, and they overshoot. `ShortRunGuide` tunes it by SVI, as it would tune the parameters of
# any guide. This notebook shows on Gaussians, where everything is known in closed form, what that bound is,
# which step it prefers, and when to choose another objective.
#
# With a prior $N(0, 1)$ and a Gaussian likelihood the posterior is $N(m, 1/\lambda)$, and a Langevin step is
# linear:
#
# $$ u_{k+1} = u_k - \eta\lambda (u_k - m) + \sqrt{2\eta}\, \epsilon_k . $$
#
# With $a = 1 - \eta\lambda$, the state after K steps is Gaussian around $m - a^K m$ with variance
#
# $$ v = a^{2K} + s, \qquad s = 2\eta\, \frac{1 - a^{2K}}{1 - a^2} , $$
#
# ($s = 0$ without noise), so that the divergence of the draws to the posterior is
#
# $$ \mathrm{KL} = \tfrac12 \big( \lambda v + \lambda a^{2K} m^2 - 1 - \log \lambda v \big) . $$

# %%
import logging
import os

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI

from pyro_shortrun import Annealed, GaussianReverse, Langevin, PathDensity, ShortRunELBO, ShortRunGuide, StepSize
from pyro_shortrun.guides import tune_on_grid

SMOKE = "SMOKE" in os.environ
UPDATES, PARTICLES, DRAWS, POINTS = (2, 4, 100, 2) if SMOKE else (60, 32, 4000, 6)
torch.set_default_dtype(torch.float64)
pyro.set_rng_seed(0)
plt.rcParams.update({"figure.dpi": 80, "font.size": 9})

# %%
PRECISION, MEAN, K = 25.0, 1.0, 25


def gaussian(precision, mean=MEAN):
    """A model whose posterior is N(mean, 1 / precision), and its log evidence."""
    noise = (precision - 1) ** -0.5
    data = torch.tensor(mean * precision / (precision - 1))

    def model():
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(u, noise), obs=data)

    return model, dist.Normal(0.0, (1 + noise**2) ** 0.5).log_prob(data).item()


def moments(eta, steps=K, precision=PRECISION, noise=True):
    """a^2K and the variance v of the draws."""
    a = 1 - eta * precision
    kept = a ** (2 * steps)
    return kept, kept + (2 * eta * (1 - kept) / (1 - a * a) if noise else 0.0)


def kl(eta, steps=K, precision=PRECISION, noise=True):
    kept, v = moments(eta, steps, precision, noise)
    return 0.5 * (precision * v + precision * kept * MEAN**2 - 1 - np.log(precision * v))


# %% [markdown]
# ## What the bound is
#
# The default objective, `PathDensity`, reports the density of $u_K$ *given the noise*: for fixed noise the
# run is an invertible map of $u_0$, so
#
# $$ \log q(u_K \mid \epsilon) = \log p(u_0) - \sum_k \log \lvert \det (I - \eta \Lambda_k) \rvert, $$
#
# where $\Lambda_k$ is the curvature of $-\log p(x, u)$ at step k (here $\lambda$). `Langevin(noise=False)`
# has no noise, so this is exact. With noise, the draws' own density is the average of $q(u_K \mid \epsilon)$
# over the noise, which is wider, and the gap of the bound to $\log p(x)$ is
#
# $$ \mathrm{KL} + I(u_K; \epsilon), \qquad I = \tfrac12 \log \frac{v}{a^{2K}}, $$
#
# the divergence we want to be small plus the mutual information of the draw and its noise. A good run forgets
# where it began, which means that its noise decides where it ends: $I$ is large just where the run is good.


# %%
def path_gap(eta, steps=K, precision=PRECISION, noise=True):
    """log p(x) minus the path density's bound."""
    _, v = moments(eta, steps, precision, noise)
    return kl(eta, steps, precision, noise) + 0.5 * np.log(v) - steps * np.log(np.abs(1 - eta * precision))


etas = np.geomspace(2e-4, 0.0399, 2000)
best, chosen = etas[kl(etas).argmin()], etas[path_gap(etas).argmin()]
free = (1 - ((1 + MEAN**2) * PRECISION) ** (-1 / (2 * K))) / PRECISION
print(f"best step with noise    {best:.5f}   KL {kl(best):.4f}")
print(f"path density's choice   {chosen:.5f}   KL {kl(chosen):.4f}, bound loose by {path_gap(chosen):.4f}")
print(f"best step without noise {free:.5f}   KL {kl(free, noise=False):.4f} = log(1 + m^2) / 2")

# %% [markdown]
# Without noise the best step has a formula, $\eta = \big(1 - ((1 + m^2)\lambda)^{-1/2K}\big) / \lambda$. A
# map without noise must shrink the prior's spread and move its mean by the same factor $a^K$: it can never be
# exact, but the bound says truthfully how good it is.
#
# Does the library compute these curves? `guide.log_weight` gives $\log p(x, u_K) - \log q$ of independent
# runs. Crosses are its means, with the Monte Carlo error of each.

# %%
model, evidence = gaussian(PRECISION)


def measured(eta, noise=True, objective=None):
    """The gap of the guide's bound at one step size, and its error."""
    pyro.clear_param_store()
    dynamics = Langevin(StepSize(eta, learnable=False), noise=noise)
    guide = ShortRunGuide(model, num_steps=K, dynamics=dynamics, objective=objective)
    with torch.no_grad():
        weights = guide.log_weight(num_particles=DRAWS)
    return evidence - weights.mean().item(), weights.std().item() / len(weights) ** 0.5


some = np.geomspace(0.001, 0.02, POINTS)
figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained", sharey=True)
for ax, noise in zip(axes, (False, True), strict=True):
    ax.loglog(etas, kl(etas, noise=noise), label="KL of the draws")
    if noise:
        ax.loglog(etas, path_gap(etas), label="gap of the path density's bound")
    gaps, errors = np.array([measured(eta, noise) for eta in some]).T
    ax.errorbar(some, gaps, errors, fmt="x", color="k", label="the library's bound")
    ax.set(xlabel="step size", title="with noise" if noise else "noise=False", ylim=(2e-3, 50))
    ax.legend()
    closed = path_gap(some) if noise else kl(some, noise=False)
    print("noise" if noise else "no noise", "- deviations in standard errors:", np.round((gaps - closed) / errors, 1))
axes[0].set_ylabel("nats")
plt.show()

# %% [markdown]
# Without noise there is one curve: the bound is the KL divergence. With noise there are two, and their minima
# lie apart: the bound's at less than half of the best step.
#
# More steps do not help the path density, because the noise's share grows with them:

# %%
print(f"{'K':>4}{'best step':>12}{'KL':>9}{'chosen':>12}{'KL':>9}{'gap':>9}{'noise-free':>12}{'KL':>9}")
for steps in (1, 5, 10, 25, 50, 100):
    good = etas[kl(etas, steps).argmin()]
    path = etas[path_gap(etas, steps).argmin()]
    still = (1 - ((1 + MEAN**2) * PRECISION) ** (-1 / (2 * steps))) / PRECISION
    row = f"{steps:>4}{good:>12.5f}{kl(good, steps):>9.4f}{path:>12.5f}{kl(path, steps):>9.4f}"
    row += f"{path_gap(path, steps):>9.4f}"
    print(f"{row}{still:>12.5f}{kl(still, steps, noise=False):>9.4f}")

# %% [markdown]
# ## What SVI finds
#
# The step size is a parameter of the guide, `StepSize(init, per=..., max=...)`, kept inside `(0, max)`. Three
# objectives that account for the noise in other ways compete with the path density:
#
# - `GaussianReverse` weighs every step by a Gaussian reverse kernel that is fitted to pilot runs. For a
#   Gaussian posterior the true reverse is Gaussian, so the bound is the KL divergence.
# - `Annealed` lets the run follow targets that move from the prior to the posterior, and weighs each step by
#   the same step taken backwards: nothing to fit, no determinants. It is exact only for many small steps.


# %%
def tune(model, dynamics, objective, start=None):
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    guide = ShortRunGuide(model, num_steps=K, dynamics=dynamics, objective=objective, start=start)
    optim = pyro.optim.ClippedAdam({"lr": 0.15, "lrd": 0.03 ** (1 / UPDATES)})
    svi = SVI(model, guide, optim, ShortRunELBO(num_particles=PARTICLES))
    track = []
    for _ in range(UPDATES):
        svi.step()
        sizes = guide.step_sizes()
        track.append([v.item() for v in sizes.values()] if isinstance(sizes, dict) else [sizes.item()])
    guide.eval()
    return guide, np.array(track)


ways = {
    "PathDensity, noise=False": (Langevin(StepSize(0.002), noise=False), PathDensity()),
    "PathDensity": (Langevin(StepSize(0.002)), PathDensity()),
    "GaussianReverse": (Langevin(StepSize(0.002)), GaussianReverse()),
    "GaussianReverse, fresh=1000": (Langevin(StepSize(0.002)), GaussianReverse(fresh=1000)),
    "Annealed": (Langevin(StepSize(0.002)), Annealed()),
}
tracks = {}
print(f"exact posterior: mean {MEAN:.3f}, sd {PRECISION**-0.5:.3f}")
print(f"{'':<28}{'step':>9}{'mean':>16}{'sd':>16}{'gap of the bound':>20}")
for name, (dynamics, objective) in ways.items():
    guide, tracks[name] = tune(model, dynamics, objective)
    u = guide.sample_posterior(num_samples=DRAWS)["u"][0]
    with torch.no_grad():
        gap = evidence - guide.log_weight(num_particles=DRAWS)
    sd, root = u.std().item(), DRAWS**0.5
    print(
        f"{name:<28}{tracks[name][-1, 0]:>9.5f}{u.mean():>9.3f} ±{sd / root:.3f}{sd:>9.3f} ±{sd / root / 2**0.5:.3f}"
        f"{gap.mean():>12.4f} ±{gap.std() / root:.4f}"
    )

# %%
figure, ax = plt.subplots(figsize=(8, 3), layout="constrained")
for i, (name, track) in enumerate(tracks.items()):
    ax.semilogy(track, color=f"C{i}", label=name)
for color, value in (("C0", free), ("C1", chosen), ("C2", best)):
    ax.axhline(value, color=color, ls=":")
ax.set(xlabel="update", ylabel="step size", title="dotted: optimum in closed form")
ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
plt.show()

# %% [markdown]
# - `PathDensity` finds its optimum, with and without noise, to a few per cent. Without noise its bound is the
#   truth. With noise the draws are shrunk less than they should be: a mean that stays towards the prior's,
#   and a standard deviation that is too large.
# - `GaussianReverse` comes near the best step, and its bound is nearly tight. With the default of few pilots
#   it stays somewhat below (noisy coefficients favour small steps); `fresh=1000` costs time and brings the
#   gap from 0.015 to 0.009 nats, where 0.003 is the best.
# - `Annealed` from the prior is the worst bound here, by far, and its step is that of another run (its
#   targets move, so there is no dotted line for it): 25 steps are few for the way from N(0, 1) to a posterior
#   five times as narrow. It is made for a start that is already near, as in [the first
#   notebook](01_swap_the_guide.ipynb).
#
# A bound that is loose may still tune the right step, and a bound that is loose by 0.86 nats, as the path
# density's, tunes a step whose draws are 0.3 nats away. So bounds of different objectives say nothing about
# which draws are better; look at draws, or at importance weights.

# %% [markdown]
# ## A grid instead of gradients
#
# The papers search a grid of step sizes every few epochs. `tune_on_grid` does it with the same noise for all
# candidates, so that differences of the bound have little noise of their own, leaves out candidates whose
# steps are not invertible (where $\eta\lambda \ge 1$, the path density is none), and sets the step to the
# best.

# %%
pyro.clear_param_store()
dynamics = Langevin(StepSize(0.004, learnable=False), noise=False)
guide = ShortRunGuide(model, num_steps=K, dynamics=dynamics)
logging.getLogger("pyro_shortrun").setLevel(logging.ERROR)  # it warns of the last candidate, which is here on purpose
grid = tune_on_grid(guide, factors=(0.25, 0.5, 0.7, 1.0, 1.4, 2.0, 4.0, 12.0), num_particles=64)
for factor, bound, invalid in zip(grid.factors, grid.bound, grid.invalid, strict=True):
    print(f"step {0.004 * factor:.4f}   gap {evidence - bound:8.3f}   invalid {invalid:.0%}")
print(f"best: {guide.step_sizes():.4f}; closed form {free:.4f}")

# %% [markdown]
# ## Several scales
#
# One step size serves one curvature. Two sites with precisions 4 and 100:


# %%
def two_scales():
    for name, precision in (("wide", 4.0), ("narrow", 100.0)):
        u = pyro.sample(name, dist.Normal(0.0, 1.0))
        data = torch.tensor(MEAN * precision / (precision - 1))
        pyro.sample(f"y_{name}", dist.Normal(u, (precision - 1) ** -0.5), obs=data)


def two_kl(etas):
    return sum(kl(np.asarray(eta), precision=p) for eta, p in zip(etas, (4.0, 100.0), strict=True))


shared = np.geomspace(1e-4, 0.0195, 2000)
one = shared[two_kl([shared, shared]).argmin()]
each = [np.geomspace(1e-4, 0.99 / p, 4000) for p in (4.0, 100.0)]
each = [grid[kl(grid, precision=p).argmin()] for grid, p in zip(each, (4.0, 100.0), strict=True)]
print(f"closed form, shared: step {one:.4f}, KL {two_kl([one, one]):.3f}")
print(f"closed form, each:   steps {each[0]:.4f} and {each[1]:.4f}, KL {two_kl(each):.4f}")
for per in ("shared", "site"):
    guide, track = tune(two_scales, Langevin(StepSize(0.008, per=per)), GaussianReverse())
    found = track[-1] if per == "site" else track[-1].repeat(2)
    print(f"SVI, per={per!r:<9}      steps {found[0]:.4f} and {found[1]:.4f}, KL {two_kl(found):.4f}")
print(guide.step_sizes())

# %% [markdown]
# One step for both has to be small enough for the narrow site and does not let the wide one arrive: 0.44 nats
# at best. With a step per site SVI finds most of the difference: the divergence falls by a factor of ten and
# more, and what is left would take more updates and pilots. `per="dim"` does the same for every coordinate of
# a vector, `per="step"` gives every one of the K steps its own. None of these helps where a posterior is
# *correlated*: its narrow direction is no coordinate. Begin such runs at a guide that knows correlations.
#
# ## In short
#
# | you have | use |
# |---|---|
# | a generator to train, and an encoder | `Refine()`: no bound of the run, its step by acceptance |
# | a generator to train and no encoder | `PathDensity()`, `Langevin(noise=False)`: an exact bound |
# | the papers' runs with noise | `PathDensity()`, or a step you choose: `StepSize(eta, learnable=False)` |
# | noise, and a step that is right with it | `GaussianReverse()`, with more `fresh` pilots if they are cheap |
# | a good start | `Annealed()` with `start=AutoNormal(model)` |
# | several scales | `StepSize(0.01, per="site")` or `per="dim"` |
#
# *Without a bound.* A run whose log q nobody asks for needs no objective to tune its step by. `Refine`, whose
# decoder learns from where runs end that begin at an encoder's draws, and runs from `Persistent()` let it follow
# the acceptance of one Langevin step from there (`pyro_shortrun.dynamics.Acceptance`, .75 by default): two
# gradients at every fiftieth update, and no determinant. That is how generators win at equal time in [the second
# notebook](02_hierarchical_generator.ipynb). In few dimensions .75 is a long step, whose draws are too wide; ask
# for more there, `Refine(accept=0.95)`.
#
# All of this is for Gaussians, where a step can be judged by a formula. On other posteriors the same terms
# are there, but nobody computes the mutual information for you, and `GaussianReverse` is a bound that is no
# longer tight. [Choosing objective and start](../objectives.md) has measurements on models that are not
# Gaussian.
