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
# # Posterior diagnostics with ArviZ
#
# Three posteriors of one small regression: one good, two wrong in known ways. Every diagnostic that the
# package and ArviZ have is let loose on them, and since the exact answer is known, we can see which
# diagnostic catches which fault, and which is fooled. The table at the end collects it. The functions are
# described in [diagnostics](../diagnostics.md) and [was the run long enough?](../diagnostics_runs.md).

# %%
import logging
import math
import os

import arviz as az
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from pyro_shortrun import (
    Annealed,
    Langevin,
    ShortRunELBO,
    ShortRunGuide,
    ShortRunLangevin,
    StepSize,
    VectorizedMCMC,
    psis,
    to_arviz,
)
from pyro_shortrun.diagnostics import compare_with_nuts, nested_rhat, plot_ranks, sbc, step_sweep

SMOKE = "SMOKE" in os.environ
STEPS, DRAWS, NUTS_DRAWS, WARMUP, SIMULATIONS = (3, 200, 50, 50, 5) if SMOKE else (250, 2000, 1500, 200, 60)
pyro.set_rng_seed(0)
plt.rcParams.update({"figure.dpi": 70, "font.size": 9})
for name in ("arviz", "pyro_shortrun"):
    logging.getLogger(name).setLevel(logging.ERROR)  # what they would warn about is what this notebook shows

# %% [markdown]
# ## A posterior that is known
#
# Linear regression with N(0, 1) coefficients and unit noise; the first two columns are nearly the same
# variable. The posterior is Gaussian, with covariance $(I + X^\top X)^{-1}$ and mean $(I + X^\top X)^{-1}
# X^\top y$.

# %%
truth = torch.tensor([1.0, -1.0, 0.5])
x = torch.randn(60, 3)
x[:, 1] = 0.95 * x[:, 0] + math.sqrt(1 - 0.95**2) * x[:, 1]
y = x @ truth + torch.randn(60)


def model(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


covariance = torch.linalg.inv(torch.eye(3) + x.T @ x)
exact_mean, exact_sd = covariance @ x.T @ y, covariance.diag().sqrt()
print("exact mean", exact_mean.numpy().round(2), "sd", exact_sd.numpy().round(2))
print(f"correlation of w[0] and w[1] {covariance[0, 1] / (exact_sd[0] * exact_sd[1]):.2f}")

# %% [markdown]
# Three guides:
#
# - `AutoNormal`: independent coordinates, which this posterior does not have;
# - *too short*: `ShortRunGuide(model)` as it comes, 20 steps from the prior with `PathDensity`;
# - *annealed*: ten steps from a trained `AutoMultivariateNormal`, `objective=Annealed()`.
#
# `to_arviz` takes short-run guides and finished samplers; of `AutoNormal` we make the groups by hand.
# Short-run guides keep their step sizes in Pyro's parameter store under the same names, so everything that
# needs a guide is done before the next one is trained.


# %%
def train(guide, steps, elbo):
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.01 ** (1 / steps)}), elbo)
    for _ in range(steps):
        svi.step(x, y)


def mean_field_to_arviz(guide):
    """What `to_arviz` does for short runs and finished samplers, by hand for another guide."""
    with torch.no_grad():
        w = Predictive(guide, num_samples=DRAWS)(x, y)["w"].reshape(4, -1, 3)
        likelihood = dist.Normal(w @ x.T, 1.0)
        groups = {"posterior": {"w": w}, "log_likelihood": {"y": likelihood.log_prob(y)}}
        groups["posterior_predictive"] = {"y": likelihood.sample()}
        return az.from_dict(
            **{k: {s: v.numpy() for s, v in g.items()} for k, g in groups.items()}, observed_data={"y": y.numpy()}
        )


factors = (0.25, 0.5, 1.0, 2.0, 4.0)
exported, weights, sweeps = {}, {}, {}

pyro.clear_param_store()
guide = AutoNormal(model)
train(guide, 2 * STEPS, Trace_ELBO())
exported["AutoNormal"] = mean_field_to_arviz(guide)
weights["AutoNormal"] = [psis(model, guide, x, y, num_samples=DRAWS) for _ in range(5)]

for name, options in {
    "too short": {"num_steps": 20},
    "annealed": {
        "num_steps": 10,
        "dynamics": Langevin(StepSize(0.002, per="dim")),
        "start": AutoMultivariateNormal(model),
        "objective": Annealed(),
    },
}.items():
    pyro.clear_param_store()
    guide = ShortRunGuide(model, **options)
    train(guide, STEPS, ShortRunELBO(num_particles=8))
    exported[name] = to_arviz(guide, x, y, num_samples=DRAWS // 4)
    weights[name] = [psis(model, guide, x, y, num_samples=DRAWS) for _ in range(5)]
    sweeps[name] = step_sweep(guide, x, y, factors=factors)

print(exported["too short"])

# %% [markdown]
# ## What looks fine and says nothing: R-hat, effective sample size, traces
#
# A guide's draws are independent. Whatever their distribution, R-hat is 1 and nearly every draw is
# effective. `mcse_mean`, too, is the error of the *guide's* mean. The trace of the worst of the three is a
# perfect caterpillar.

# %%
for name, idata in exported.items():
    print(name)
    print(az.summary(idata, var_names=["w"], round_to=2).to_string(), "\n")

# %%
axes = az.plot_trace(exported["too short"], var_names=["w"], compact=True, figsize=(9, 2.3))
plt.show()

# %% [markdown]
# With the exact means (orange) the faults can be seen: `AutoNormal` has the means and a third of the width
# of `w[0]` and `w[1]`, *too short* is centred near zero, the prior's mean, and is too wide. Without the
# orange lines, nothing in these pictures would tell which row is right.

# %%
figure, axes = plt.subplots(3, 3, figsize=(9, 5), layout="constrained", sharex="col")
for row, (name, idata) in zip(axes, exported.items(), strict=True):
    az.plot_posterior(idata, var_names=["w"], ax=row, textsize=7, round_to=2)
    for ax, mean, i in zip(row, exact_mean, range(3), strict=True):
        ax.axvline(mean, color="C1")
        ax.set_title(f"{name}: w[{i}]", fontsize=9)
plt.show()

# %% [markdown]
# ## Predictions: plot_ppc and loo
#
# Predictive checks ask whether the *data* could come from this posterior, which is another question.

# %%
figure, axes = plt.subplots(1, 3, figsize=(9, 2.4), layout="constrained", sharex=True)
for ax, (name, idata) in zip(axes, exported.items(), strict=True):
    az.plot_ppc(idata, num_pp_samples=50, ax=ax, random_seed=0, legend=name == "AutoNormal", textsize=8)
    ax.set_title(name)
plt.show()

for name, idata in exported.items():
    loo = az.loo(idata)
    print(
        f"{name:<12} elpd_loo {loo.elpd_loo:>7.2f} ± {loo.se:.2f}, p_loo {loo.p_loo:>5.2f}, "
        f"largest pointwise k {loo.pareto_k.max().item():.2f}"
    )

# %% [markdown]
# The predictive checks look alike for all three, and good. What they look at is the marginal distribution
# of `y`, and the noise is most of that.
#
# `loo` sees that *too short* predicts worse, by 5 nats, and gives it an effective number of parameters
# (`p_loo`) above five where the model has three. It takes a better posterior to compare with to know that
# -84 is bad, but `p_loo` alone is a hint. It does not see the fault of `AutoNormal` at all: the sum of
# `w[0]` and `w[1]` is known well, nearly all of the data ask for the sum only, and the narrow posterior
# predicts as well as the right one. The pointwise k are below 0.7 for all: they say that leave-one-out
# weights *relative to these draws* are stable, not that the draws are right.
#
# ## Importance weights: psis
#
# Now the model's density is compared with the guide's, at the guide's draws.

# %%
for name, found in weights.items():
    print(f"{name:<12} {found[0]}\n{'':<12} k of five repeats: {' '.join(f'{f.k.item():.2f}' for f in found)}")

for name in ("too short", "annealed"):
    idata = exported[name]
    log_weights = (idata.sample_stats["log_p"] - idata.sample_stats["log_q"]).values.ravel()
    w, p = torch.tensor(idata.posterior["w"].values).flatten(0, 1), torch.tensor(az.psislw(log_weights)[0]).exp()
    mean = p.to(w) @ w
    sd = (p.to(w) @ (w - mean) ** 2).sqrt()
    print(f"{name:<12} reweighted mean {mean.numpy().round(2)}, sd {sd.numpy().round(2)}")
print(f"{'exact':<12}            mean {exact_mean.numpy().round(2)}, sd {exact_sd.numpy().round(2)}")

# %% [markdown]
# PSIS passes *annealed* with a small k in every repeat, and ranks the two others behind it. How bad they
# are is less clear: k is itself an estimate, from the tail of 2000 draws. `AutoNormal` is refused (k above
# 0.7) in four of five repeats, *too short* in two, and one of its repeats even says that the weights are
# fine.
#
# - For `AutoNormal` k is about the tail: draws are too narrow, so the few at their edge have large weights.
# - For the short run k belongs to the joint of end *and noise path*: `PathDensity` gives `log q` given the
#   path. It is an upper estimate, and part of it is the path's doing. For `Annealed` the weights are those
#   of annealed importance sampling.
# - A usable k is no praise of the draws. Reweighted, even those of *too short* have the right mean and
#   width, to within a tenth; unweighted they are more than a standard deviation off. k tells whether the
#   weights can repair the draws, and the price is in `ess`.
#
# ## Against NUTS
#
# On a model as small as this, the plain way is to compare with long chains. `reference=` takes them once
# for all. A source may be draws, as here, or the guide itself.

# %%
nuts = MCMC(NUTS(model), num_samples=NUTS_DRAWS, warmup_steps=WARMUP, disable_progbar=True)
nuts.run(x, y)
for name, idata in exported.items():
    draws = {"w": torch.tensor(idata.posterior["w"].values)}
    print(f"{name}\n{compare_with_nuts(model, draws, x, y, reference=nuts).summary()}\n")

# %% [markdown]
# This catches both faults and says what they are. It needs a reference, and it says "agrees" for anything
# within four Monte Carlo errors, which with these draws is about 0.2 standard deviations of a mean.
#
# ## Many short chains: nested R-hat
#
# With chains instead of a guide, the question is whether they have forgotten their starts. 1024 chains in
# 16 groups, each group from one point, five draws per chain; and the same with hardly any warm-up, from
# dispersed points and from one point for all.

# %%
CHAINS, GROUPS = (64, 8) if SMOKE else (1024, 16)
spread = torch.randn(GROUPS, 3).repeat_interleave(CHAINS // GROUPS, dim=0)
cases = {
    "100 of warm-up": (100, spread),
    "5 of warm-up": (5, spread),
    "5, all from zero": (5, torch.zeros(CHAINS, 3)),
}
for name, (warmup, starts) in cases.items():
    pyro.set_rng_seed(1)
    kernel = ShortRunLangevin(model, num_steps=1, step_size=0.005, adjust=True)
    mcmc = VectorizedMCMC(
        kernel, 5, warmup_steps=warmup, num_chains=CHAINS, initial_params={"w": starts}, disable_progbar=True
    )
    mcmc.run(x, y)
    w = mcmc.get_samples(group_by_chain=True)["w"]
    error = (w.mean((0, 1)) - exact_mean) / exact_sd
    nested, classic = nested_rhat(w, superchains=GROUPS), az.rhat({"w": w.numpy()})["w"].values
    print(
        f"{name:<18} nested R-hat {nested.max():.3f}, R-hat {classic.max():.2f}, "
        f"largest error of a mean {error.abs().max():.2f} sd, of an sd {(w.std((0, 1)) / exact_sd - 1).abs().max():.2f}"
    )

# %% [markdown]
# - Plain R-hat is far above 1 in every row: chains of five dependent draws differ, converged or not.
# - Nested R-hat accepts the long warm-up and refuses the short one.
# - In the last row all groups begin at the same point, so that they agree with each other wherever they
#   are. Nested R-hat is fooled completely: means are more than a standard deviation off. Starts must be
#   dispersed, as wide as the prior.
#
# ## Is the method right: simulation-based calibration
#
# SBC draws a truth from the prior, data from the model, and ranks the truth among posterior draws. On a
# conjugate model the right posterior is known, so we can see what SBC does with the right one, one of half
# the width, and with the prior itself, which has never looked at the data.


# %%
def conjugate(x):
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(theta, 1.0), obs=x)


def gaussian(width):
    """The posterior N(sum(x) / 6, 1 / 6) of five data, with its standard deviation multiplied by `width`."""
    return lambda conditioned, x: {"theta": x.sum() / 6 + width * math.sqrt(1 / 6) * torch.randn(99)}


candidates = {
    "exact": gaussian(1.0),
    "too narrow": gaussian(0.5),
    "the prior": lambda conditioned, x: {"theta": torch.randn(99)},
}
calibration = {}
for name, posterior in candidates.items():
    calibration[name] = sbc(conjugate, posterior, torch.zeros(5), num_simulations=SIMULATIONS, seed=0, progress=False)
    print(f"{name}\n{calibration[name].summary()}\n")

# %%
for name, result in calibration.items():
    panels = result.plot()
    panels[0].figure.set_size_inches(6, 1.9)
    panels[0].figure.suptitle(name)
plt.show()

# %%
panels = plot_ranks(calibration["too narrow"])
panels[0].figure.set_size_inches(6, 1.9)
plt.show()

# %% [markdown]
# - The exact posterior stays within the bands.
# - *Too narrow* is caught by both quantities: above and then below zero, ranks piled up at both ends. The
#   tests of symmetry pass `theta`, as they should: only its width is wrong.
# - *The prior* passes `theta`. Ranks of a coordinate are uniform for any method that ignores the data and
#   returns the prior. The log-likelihood is what catches it, and `sbc` always ranks it.
#
# SBC is about the *method*, on data that the model would make, not about these data; and 60 simulations
# find a factor of two, not one of 1.1.
#
# ## Longer runs, larger steps: step_sweep

# %%
for name, sweep in sweeps.items():
    panels = sweep.plot()
    panels[0].figure.set_size_inches(9, 2.8)
    panels[0].figure.suptitle(name)
    for ax in panels:
        ax.minorticks_off()
    best = sweep.best
    print(
        f"{name}: largest bound at K = {best[0]}, factor {best[1]:g}, of {sweep.bound.max():.2f}"
        if best
        else f"{name}: no valid cell"
    )
plt.show()
evidence = dist.MultivariateNormal(torch.zeros(len(x)), torch.eye(len(x)) + x @ x.T).log_prob(y)
entropy = dist.MultivariateNormal(exact_mean, covariance).entropy()
print(f"exact: log p(y) {evidence:.2f}, mean log joint of the posterior {evidence - entropy:.2f}")
print(sweeps["too short"].summary())

# %% [markdown]
# For *annealed* the trained step is where the bound is largest, and ten steps is the only length its
# schedule has; the bound is next to the exact $\log p(y)$.
#
# For *too short* the two columns say different things. The log joint rises with larger steps and longer
# runs, towards its mean under the exact posterior, and the trained cell (K = 20, factor 1) is almost 3 nats
# below that: the run has not arrived. The bound is largest at the trained cell, and falls by tens of nats
# where the draws are better, since `PathDensity` counts noise as known. Read by the bound alone, the fault
# would go unseen; the training that maximises it has the same opinion. Nor is the log joint alone an
# answer: it is largest at the mode, so a value above that of the exact posterior is no better.
#
# ## Which diagnostic caught which fault
#
# | diagnostic | `AutoNormal`: too narrow, no correlation | *too short*: not arrived, too wide | fooled by |
# |---|---|---|---|
# | `az.summary`: R-hat, ess; `az.plot_trace` | missed | missed | any independent draws |
# | `az.plot_ppc` | missed | missed | noise that hides the latents |
# | `az.loo`, elpd | missed | caught, next to a better one | faults that do not matter for prediction |
# | `az.loo`, pointwise k | missed | missed | it is relative to the draws |
# | `psis` | caught, 4 of 5 times | caught, 2 of 5 times | k is noisy; weights may repair wrong draws |
# | `compare_with_nuts` | caught | caught | needs a reference; small biases pass |
# | `step_sweep`, bound | not applicable | missed | `PathDensity` with noise |
# | `step_sweep`, log joint | not applicable | caught | is largest at the mode |
#
# | diagnostic | caught | fooled by |
# |---|---|---|
# | `nested_rhat` | too little warm-up, from dispersed starts | the same, from one point |
# | `az.rhat` of many short chains | refuses everything, the good chains too | |
# | `sbc`, coordinate | a posterior of half the width | the prior in place of the posterior |
# | `sbc`, log-likelihood | both | |
# | `sbc`, symmetry of a coordinate | neither | a wrong width, by design |
#
# No row is enough by itself. A cheap order: `psis` first, since it needs nothing but the guide;
# `step_sweep`, for a short run, both columns; on a small model, or a small version of it,
# `compare_with_nuts`; and `sbc` for a method that is to be used again and again.
