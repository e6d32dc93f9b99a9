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
# # Swap the guide
#
# You have a Pyro model, an `AutoNormal` guide and a loop over `svi.step`. This notebook changes one line of
# it. On the way it shows what the new guide gives, how its draws compare with NUTS, which other line to
# change when they are not good enough, and what happens when your own model makes one of the five usual
# mistakes.
#
# `AutoNormal` fits a Gaussian with independent coordinates. `ShortRunGuide` has no family of distributions.
# It draws the latents from the prior and moves them by K steps of Langevin dynamics on the model's own log
# joint,
#
# $$ u_{k+1} = u_k + \eta\, \nabla_u \log p(x, u_k) + \sqrt{2\eta}\, \epsilon_k , \qquad u_0 \sim p(u),
#    \quad \epsilon_k \sim N(0, I), $$
#
# in unconstrained space, and reports $\log q(u_K)$, so that SVI can maximise
#
# $$ \mathrm{E}_q \big[ \log p(x, u_K) - \log q(u_K) \big] \le \log p(x) $$
#
# over the step size $\eta$ and over the model's parameters, if it has any.

# %%
import logging
import math
import os
import time

import arviz as az
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.infer.reparam import LocScaleReparam

from pyro_shortrun import Annealed, GaussianReverse, Langevin, Prior, ShortRunELBO, ShortRunGuide, StepSize, to_arviz

SMOKE = "SMOKE" in os.environ
STEPS, DRAWS, NUTS_DRAWS, WARMUP = (2, 50, 10, 10) if SMOKE else (60, 1000, 300, 150)
pyro.set_rng_seed(0)
plt.rcParams.update({"figure.dpi": 80, "font.size": 9})

# %% [markdown]
# ## A model with a correlated posterior
#
# Logistic regression of 100 observations on three covariates. The first two are nearly the same variable, so
# the data know the sum of their coefficients well and the difference badly.

# %%
truth = torch.tensor([1.0, -2.0, 0.5])
x = torch.randn(100, 3)
x[:, 1] = 0.9 * x[:, 0] + math.sqrt(1 - 0.9**2) * x[:, 1]
y = dist.Bernoulli(logits=x @ truth).sample()


def model(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


def train(guide, steps=STEPS, lr=0.1, elbo=None, data=(x, y), of=model):
    """SVI as always. Returns the losses and the CPU seconds."""
    svi = SVI(of, guide, pyro.optim.Adam({"lr": lr}), elbo or Trace_ELBO())
    began = time.process_time()
    losses = [svi.step(*data) for _ in range(steps)]
    return losses, time.process_time() - began


# %% [markdown]
# NUTS is the reference, and `AutoNormal` is where most people start.

# %%
nuts = MCMC(NUTS(model), num_samples=NUTS_DRAWS, warmup_steps=WARMUP, num_chains=1, disable_progbar=True)
began = time.process_time()
nuts.run(x, y)
seconds = {"NUTS": time.process_time() - began}
draws = {"NUTS": nuts.get_samples()["w"]}

pyro.clear_param_store()
mean_field = AutoNormal(model)
losses, seconds["AutoNormal"] = train(mean_field, 3 * STEPS)
draws["AutoNormal"] = torch.stack([mean_field(x, y)["w"] for _ in range(DRAWS)]).detach()

# %% [markdown]
# ## One line
#
# `AutoNormal(model)` becomes `ShortRunGuide(model, ...)`. `sample_posterior` is the counterpart of calling
# the guide many times: every draw is a run of its own, and all of them are made at once. (Every
# `ShortRunGuide` keeps its step size in Pyro's parameter store under the same name, so the store is cleared
# between experiments.)

# %%
pyro.clear_param_store()
guide = ShortRunGuide(model, num_steps=20, step_size=0.02)  # was: AutoNormal(model)
losses, seconds["short run"] = train(guide)
draws["short run"] = guide.sample_posterior(x, y, num_samples=DRAWS)["w"][0]
print("step size", guide.step_sizes().item())


# %% [markdown]
# The table has posterior means with their Monte Carlo errors, standard deviations, and the correlation of the
# first two coefficients. NUTS draws are dependent, so their error uses ArviZ's effective sample size; the
# others are independent.


# %%
def error(w):
    """Monte Carlo standard errors of means."""
    return torch.tensor([az.mcse(w[:, i].numpy()[None]).item() for i in range(w.shape[1])])


def table(draws):
    print(f"{'':<24}{'means':^36}{'std':^18}{'corr':>7}{'CPU s':>8}")
    for name, w in draws.items():
        means = "".join(f"{m:>6.2f} ±{e:.2f}" for m, e in zip(w.mean(0), error(w), strict=True))
        stds = "".join(f"{s:>6.2f}" for s in w.std(0))
        print(f"{name:<24}{means:<36}{stds:<18}{w.T.corrcoef()[0, 1]:>7.2f}{seconds[name]:>8.1f}")


table(draws)

# %% [markdown]
# One line, and means, spreads and the correlation are those of NUTS to within a few hundredths. For a posterior
# as small as this one the guide fits a Gaussian before its first run, without an optimiser, starts the runs
# there and moves in its coordinates, weighs them by `Annealed`, and ends `sample_posterior` with 20
# Metropolis-adjusted steps. So it would have been as good before the first `svi.step`.
#
# ## Other parts
#
# Each is one argument.
#
# - `objective=GaussianReverse()` weighs runs by a reverse kernel that is learned from other runs. Its bound is
#   exact for Gaussian posteriors with independent coordinates, with `dense=True` for all of them.
# - `start=AutoNormal(model), objective=Annealed()`: the run begins at a guide you already know, which is
#   trained with it, and repairs what the guide's family cannot express.
# - A start that knows correlations, `AutoMultivariateNormal`, leaves less to repair. `StepSize(per="dim")`
#   gives each coordinate its own step.
#
# `ShortRunELBO` is `Trace_ELBO` for this guide with vectorised particles, and cheaper.

# %%
choices = {
    "GaussianReverse": {"num_steps": 20, "step_size": 0.02, "objective": GaussianReverse(dense=True)},
    "AutoNormal + Annealed": {
        "num_steps": 10,
        "dynamics": Langevin(StepSize(0.02, per="dim")),
        "start": AutoNormal(model),
        "objective": Annealed(),
    },
    "AutoMVN + Annealed": {
        "num_steps": 10,
        "dynamics": Langevin(StepSize(0.02, per="dim")),
        "start": AutoMultivariateNormal(model),
        "objective": Annealed(),
    },
}
exported = {}
for name, options in choices.items():
    pyro.clear_param_store()
    guide = ShortRunGuide(model, **options)
    losses, seconds[name] = train(guide, elbo=ShortRunELBO(num_particles=8))
    draws[name] = guide.sample_posterior(x, y, num_samples=DRAWS)["w"][0]
    exported[name] = to_arviz(guide, x, y, num_samples=DRAWS // 2, num_chains=4, posterior_predictive=False)
table(draws)

# %%
figure, axes = plt.subplots(1, 5, figsize=(12, 2.7), layout="constrained", sharex=True, sharey=True)
for ax, name in zip(axes, [k for k in draws if k != "NUTS"], strict=True):
    ax.scatter(*draws["NUTS"][:500, :2].T, s=3, color="0.75", label="NUTS")
    ax.scatter(*draws[name][:500, :2].T, s=3, color="C0")
    ax.set(title=name, xlabel="w[0]")
axes[0].set_ylabel("w[1]")
axes[0].legend(loc="lower left")
plt.show()

# %% [markdown]
# - `AutoNormal` has the means in a second or two, half of the spread and none of the correlation.
# - The plain short run has all of it, and so has `GaussianReverse`, which took the longest of all.
# - `Annealed` from `AutoNormal` keeps the means and adds most of what was missing; from
#   `AutoMultivariateNormal` little is missing.
#
# NUTS is exact in the limit, and for three parameters and 100 observations as good a tool; chains in a batch,
# `VectorizedMCMC`, are another. A guide is for what they do not do: training the parameters of a model along
# with the inference, mini-batches, thousands of local latents, a log density for every draw.

# %% [markdown]
# ## Predictions
#
# `Predictive` takes the guide as it takes any. A short run conditions on the data *when it is called*, and at
# prediction time there are none: the guide then takes those that it was trained on. (Where these differed from
# step to step, as mini-batches do, it asks for them, `guide.condition_on(x, y)`.)

# %%
new_x = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.5, 0.0], [0.0, 0.0, 2.0]])
replicated = Predictive(model, guide=guide, num_samples=DRAWS, return_sites=["w", "y"])(new_x)
found_p = torch.sigmoid(replicated["w"] @ new_x.T).squeeze(1)
exact_p = torch.sigmoid(draws["NUTS"] @ new_x.T)
frequency = replicated["y"].reshape(-1, len(new_x)).mean(0)
for i in range(len(new_x)):
    p, q = found_p[:, i], exact_p[:, i]
    print(
        f"P(y = 1): {p.mean():.3f} sd {p.std():.3f}; replicated y: {frequency[i]:.3f}; "
        f"NUTS: {q.mean():.3f} sd {q.std():.3f}"
    )

# %% [markdown]
# ## ArviZ
#
# Draws are independent runs, so `r_hat` and `ess` are no diagnosis of a short run: they are perfect by
# construction. What tells is the importance weight `log_p - log_q` of each draw, which `to_arviz` puts into
# `sample_stats`. Its Pareto k should be below 0.7.

# %%
for name, idata in exported.items():
    stats, w = idata.sample_stats, torch.tensor(idata.posterior["w"].values).flatten(0, 1)
    log_weights = (stats["log_p"] - stats["log_q"]).values.ravel()
    weights = torch.tensor(log_weights).softmax(0)
    means = "".join(f"{m:>7.2f}" for m in weights @ w.to(weights))
    k = az.psislw(log_weights)[1].item()
    print(f"{name:<24} Pareto k {k:>5.2f}, effective draws {1 / weights.square().sum():>5.0f}, weighted means {means}")
az.summary(idata, round_to=2)

# %% [markdown]
# All three are below 0.7, so draws can be weighted. The price is draws: of 2000 there are hundreds of effective
# ones where the start knew no correlation, and most of them with the other two.

# %% [markdown]
# ## A hierarchy: run the non-centred variables
#
# Eight schools in the centred form you would write first. The curvature of `theta` given `tau` is `1 /
# tau**2`, which no one step size can serve. Pyro's `LocScaleReparam(0.0)` lets the run move `(theta - mu) /
# tau` instead. It is a handler around the model, and the guide takes the model with it.

# %%
effects = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def centred(sigma, effects=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(5.0))
    with pyro.plate("schools", len(sigma)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("effect", dist.Normal(theta, sigma), obs=effects)


schools = poutine.reparam(centred, config={"theta": LocScaleReparam(0.0)})
data = (sigma, effects)
found = {}

nuts = MCMC(NUTS(schools), num_samples=NUTS_DRAWS, warmup_steps=WARMUP, disable_progbar=True)
nuts.run(*data)
found["NUTS"] = nuts.get_samples()

pyro.clear_param_store()
mean_field = AutoNormal(schools)
train(mean_field, 3 * STEPS, data=data, of=schools)
found["AutoNormal"] = Predictive(mean_field, num_samples=DRAWS)(*data)

for name, which in (("short run, centred", centred), ("short run, non-centred", schools)):
    pyro.clear_param_store()
    guide = ShortRunGuide(which)
    found[name] = {k: v[0] for k, v in guide.sample_posterior(*data, num_samples=DRAWS).items()}

print(f"{'':<24}{'mu':^20}{'tau':^20}{'5 % of tau':>12}")
for name, sites in found.items():
    cells = ""
    for site in ("mu", "tau"):
        value = sites[site].detach().reshape(-1, 1)
        cells += f"{value.mean():>6.2f} ±{error(value).item():.2f}, {value.std():>5.2f} "
    print(f"{name:<24}{cells}{sites['tau'].quantile(0.05):>12.2f}")

# %% [markdown]
# The centred run is wrong in `tau`, whatever its errors say: they are errors of draws and know nothing of bias.
# On the non-centred model the short run, without any training, agrees with NUTS (whose few draws know the
# quantile only roughly). What it adds to `AutoNormal` is in the tail: small values of `tau` are where a Gaussian
# in `log tau` is wrong.

# %% [markdown]
# ## Your own model: five usual mistakes
#
# Each of these stops with a message that says what to do, before the run makes a step. (Pyro's own checks of
# shapes come first where they apply. We silence the package's log for these cells: a model that is wrong may
# also be warned about.)

# %%
logging.getLogger("pyro_shortrun").setLevel(logging.ERROR)


def attempt(what, *args, **kwargs):
    """Print the error instead of raising it."""
    try:
        what(*args, **kwargs)
    except Exception as e:
        first = str(e).split("Trace Shapes:")[0].strip()
        print(f"{type(e).__name__}: {first}")
    else:
        print("no error")


def first_step(model, *data, **options):
    pyro.clear_param_store()
    guide = ShortRunGuide(model, num_steps=5, **options)
    return SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(*data)


# %% [markdown]
# **1. A discrete latent that is not enumerated.** There is no gradient with respect to a coin.


# %%
def two_clusters(x):
    gap = pyro.sample("gap", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(gap * k, 1.0), obs=x)


points = torch.tensor([-0.5, 2.8, 3.5, 0.3])
attempt(first_step, two_clusters, points)

# %% [markdown]
# Enumerated, it works: the run's log joint sums `k` out exactly, and so does `TraceEnum_ELBO`.

# %%
enumerated = config_enumerate(two_clusters)
pyro.clear_param_store()
guide = ShortRunGuide(enumerated, num_steps=20, step_size=0.05)
svi = SVI(enumerated, guide, pyro.optim.Adam({"lr": 0.01}), TraceEnum_ELBO(max_plate_nesting=1))
print(f"loss {svi.step(points):.2f}, gap {guide.sample_posterior(points, num_samples=DRAWS)['gap'].mean():.2f}")

# %% [markdown]
# **2. A latent whose shape changes** from call to call. A step size per coordinate and a compiled run need
# rows of one size. Only a plate's size may change, so give a varying number of latents a plate.


# %%
def random_walk(x):
    z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z.cumsum(0), 1.0), obs=x)


pyro.clear_param_store()
guide = ShortRunGuide(random_walk, num_steps=5, step_size=0.01)
guide(torch.zeros(4))
attempt(guide, torch.zeros(6))


# %% [markdown]
# **3. Dimensions that no plate and no `to_event` declares.** Pyro finds these itself, in the model as in the
# guide, as long as its validation is on (it is, by default; leave it on until the model is known to be
# right).


# %%
def undeclared(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0))  # .to_event(1) is missing
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


attempt(first_step, undeclared, x, y)

# %% [markdown]
# **4. Data that are not finite, or outside the likelihood's support.** The message names the site and shows
# its value.

# %%
holes = y.clone()
holes[1] = math.nan


def linear(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


attempt(first_step, linear, x, holes)


# %% [markdown]
# **5. An improper prior as the start.** Nothing can be drawn from it, so there must be another start. From the
# Gaussian that is the default here, an improper prior is fine.


# %%
def improper(y):
    loc = pyro.sample("loc", dist.ImproperUniform(dist.constraints.real, (), ()))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


attempt(first_step, improper, effects, start=Prior())
attempt(first_step, improper, effects)

# %% [markdown]
# ## Where to go from here
#
# - [Step sizes](03_step_sizes.ipynb): what the bounds are, and how far from the truth the step is that they
#   tune.
# - [Choosing objective and start](../objectives.md): measurements on sixteen posteriors. The short form: a
#   learned start with `Annealed()` for ordinary Bayesian models, `PathDensity()` for generators with N(0, 1)
#   latents.
# - [Chains](../chains.md): `VectorizedMCMC`, when you want exact draws and many chains after all.
# - [Langevin autoencoders](05_langevin_autoencoder.ipynb) and [MCMC teaching](06_mcmc_teaching.ipynb): models
#   with networks.
