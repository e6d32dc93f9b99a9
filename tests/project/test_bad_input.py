"""Bad input, as one law over all public names: an error of ours, before any work, that names what is wrong, and a
remedy.

A row is a call and what its error must name: the argument or the site. A new argument gets a row for each way in which
people will get it wrong.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import math
import re
import traceback
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import NUTS, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal, init_to_median
from torch import Tensor, nn

import pyro_shortrun
from pyro_shortrun import ShortRunGuide, ShortRunLangevin, ShortRunSVI, energy_prior
from pyro_shortrun.diagnostics import SBC, Chains
from pyro_shortrun.starts import Prior
from pyro_shortrun.teaching import AncestralSampler

ROOT = Path(pyro_shortrun.__file__).parent
MOST_RUNS = 3  # of the model: to read its sites, and to look at what is wrong
REMEDY = re.compile(
    r"\b(must|use|pass|give|try|call|leave|make|write|take|put|look|build|install|add|update|lower|draw|expand|mark|"
    r"declare|append|name|there are|it has|is for|are for|comes? first|needs?)\b",
    re.IGNORECASE,
)

FOREIGN = (NUTS, Trace_ELBO, AutoDelta, AutoNormal, init_to_median)
PACKAGES = [p.name for p in ROOT.iterdir() if (p / "__init__.py").exists()]
NAMES: dict[str, Any] = {
    **vars(builtins),
    **{"math": math, "np": np, "pyro": pyro, "dist": dist, "torch": torch},
    **{thing.__name__: thing for thing in FOREIGN},
    **{name: importlib.import_module(f"pyro_shortrun.{name}") for name in PACKAGES},
    **{name: getattr(pyro_shortrun, name) for name in pyro_shortrun.__all__},
}

TABLE: dict[str, str] = {
    # ------------------------------------------------------------------------------------------------ guides
    "ShortRunGuide(3)": "model",
    "ShortRunGuide(local(x))": "model",
    "ShortRunGuide(AutoNormal(local))": "model",
    "ShortRunGuide(local, num_steps=0)": "num_steps",
    "ShortRunGuide(local, num_steps=2.5)": "num_steps",
    "ShortRunGuide(local, num_steps='20')": "num_steps",
    "ShortRunGuide(local, num_steps=torch.tensor([3, 4]))": "num_steps",
    "ShortRunGuide(local, tune_every=0)": "tune_every",
    "ShortRunGuide(local, step_size=-0.1)": "step_size",
    "ShortRunGuide(local, step_size='large')": "step_size",
    "ShortRunGuide(local, step_size=[0.1, 0.2])": "step_size",
    "ShortRunGuide(local, step_size=Langevin(0.1))": "step_size",
    "ShortRunGuide(local, dynamics=0.1)": "dynamics",
    "ShortRunGuide(local, dynamics=Langevin)": "dynamics",
    "ShortRunGuide(local, dynamics='langevin')": "dynamics",
    "ShortRunGuide(local, dynamics=StepSize(0.1))": "dynamics",
    "ShortRunGuide(local, step_size=0.1, dynamics=Langevin())": "step_size",
    "ShortRunGuide(local, objective='annealed')": "objective",
    "ShortRunGuide(local, objective=Annealed)": "objective",
    "ShortRunGuide(local, objective=Prior())": "objective",
    "ShortRunGuide(local, start='prior')": "start",
    "ShortRunGuide(local, start=Prior)": "start",
    "ShortRunGuide(local, start=AutoNormal)": "start",
    "ShortRunGuide(local, start=3)": "start",
    "ShortRunGuide(local, start=init_to_median)": "start",
    "ShortRunGuide(local, metric='dense')": "metric",
    "ShortRunGuide(local, full_gradient='yes')": "full_gradient",
    "ShortRunGuide(local, checkpoint=1)": "checkpoint",
    "ShortRunGuide(local, compile='yes')": "compile",
    "ShortRunGuide(local, create_plates=pyro.plate('data', 3))": "create_plates",
    "ShortRunGuide(local, dynamics=Hamiltonian(0.1), objective=PathDensity())": "Hamiltonian",
    "ShortRunGuide(local, objective=GaussianReverse(), dynamics=Langevin(0.1, noise=False))": "GaussianReverse",
    "guide.sample_posterior(x, num_samples=0)": "num_samples",
    "guide.sample_posterior(x, num_samples=2.0)": "num_samples",
    "guide.sample_posterior(x, num_chains=-1)": "num_chains",
    "guide.sample_posterior(x, adjust=-1)": "adjust",
    "guide.sample_posterior(x, adjust=2.5)": "adjust",
    "guide.sample_posterior(x, resample='yes')": "resample",
    "guide.quantiles([1.5], x)": "quantiles",
    "guide.quantiles([], x)": "quantiles",
    "guide.quantiles(x)": "quantiles",
    "guide.quantiles('median', x)": "quantiles",
    "guide.trajectory(x, num_chains=0)": "num_chains",
    "guide.sample_posterior()": "arguments",
    "guide(x, x)": "arguments",
    "guide.pretrain(x)": "start",
    "guide.log_weight(x, num_particles=0)": "num_particles",
    "ShortRunGuide(local).step_sizes()": "setup",
    "ShortRunGuide(local).load_state_dict({})": "setup",
    "guides.tune_on_grid(AutoNormal(local), x)": "guide",
    "guides.tune_on_grid(guide, x, factors=0.5)": "factors",
    "guides.tune_on_grid(guide, x, factors=[])": "factors",
    "guides.tune_on_grid(guide, x, factors=[-1.0])": "factors",
    "guides.tune_on_grid(guide, x, num_particles=0)": "num_particles",
    "guides.tune_on_grid(guide, x, max_invalid=2.0)": "max_invalid",
    # ------------------------------------------------------------------------------------------------ losses
    "ShortRunELBO(0)": "num_particles",
    "ShortRunELBO(2.5)": "num_particles",
    "ShortRunELBO(True)": "num_particles",
    "ShortRunELBO(Trace_ELBO())": "num_particles",
    "ShortRunELBO().loss(local, AutoNormal(local), x)": "ShortRunGuide",
    "ShortRunELBO().loss(globals_, guide, x)": "model",
    "ShortRunELBO().loss(guide, local, x)": "ShortRunGuide",
    "svi.run(0, x)": "num_steps",
    "svi.run(2.5, x)": "num_steps",
    "svi.run(10, x, batches=[x])": "batches",
    "svi.run(10, batches=x)": "batches",
    "svi.run(10, batches=[])": "batches",
    "svi.run(10, batches=3)": "batches",
    "svi.run(100, x, window=3)": "window",
    "svi.run(100, x, window=60)": "window",
    "svi.run(10, x, stop_when_converged=True)": "stop_when_converged",
    "svi.run(10, x, callback=3)": "callback",
    "ShortRunSVI(local, guide, torch.optim.Adam(guide.parameters()), ShortRunELBO())": "optim",
    "ShortRunSVI(local, guide, pyro.optim.Adam({'lr': 0.1}), ShortRunELBO)": "loss",
    "ShortRunSVI(guide, local, pyro.optim.Adam({'lr': 0.1}), ShortRunELBO()).step(x)": "guide",
    # ------------------------------------------------------------------------------------------------ dynamics
    "StepSize(0)": "step_size",
    "StepSize(math.nan)": "step_size",
    "StepSize('0.1')": "step_size",
    "StepSize(x)": "step_size",
    "StepSize(0.1, max=0.05)": "max",
    "StepSize(0.1, max='large')": "max",
    "StepSize(0.1, per='layer')": "per",
    "StepSize(0.1, learnable='no')": "learnable",
    "Langevin(-1.0)": "step_size",
    "Langevin(None)": "step_size",
    "Langevin(0.1, max_drift=0)": "max_drift",
    "Langevin(0.1, max_drift='none')": "max_drift",
    "Langevin(0.1, noise=0.5)": "noise",
    "dynamics.Acceptance(target=1.5)": "target",
    "dynamics.Acceptance(every=0)": "every",
    "Nesterov(-0.1)": "step_size",
    "Nesterov(0.1, beta=1.5)": "beta",
    "Hamiltonian(0.1, damping=2.0)": "damping",
    "Hamiltonian(0.1, damping='some')": "damping",
    "Hamiltonian(0.1, learnable='no')": "learnable",
    # ------------------------------------------------------------------------------------------------ objectives
    "PathDensity('exact')": "logdet",
    "PathDensity(objectives.Exact)": "logdet",
    "Refine(accept=2.0)": "accept",
    "Refine(accept='high')": "accept",
    "objectives.Lanczos(0)": "num_probes",
    "objectives.Lanczos(4, 0)": "num_iterations",
    "objectives.Lanczos(4, 2.5)": "num_iterations",
    "objectives.Automatic(0)": "max_products",
    "Nesterov(0.1, beta=1.0)": "beta",
    "Nesterov('small')": "step_size",
    "Refine(accept=2)": "accept",
    "Refine(accept='often')": "accept",
    "Mixture(0)": "num_runs",
    "Mixture(2.5)": "num_runs",
    "GaussianReverse(pilots=0)": "pilots",
    "GaussianReverse(fresh=0)": "fresh",
    "GaussianReverse(fresh=2.5)": "fresh",
    "GaussianReverse(tempered='yes')": "tempered",
    "GaussianReverse(dense='yes')": "dense",
    "Annealed(learnable='no')": "learnable",
    "Annealed(10)": "learnable",
    # ------------------------------------------------------------------------------------------------ starts
    "Prior(tries=0)": "tries",
    "Prior(2.5)": "tries",
    "Init('median')": "init_loc_fn",
    "Init(0.0)": "init_loc_fn",
    "Init(init_to_median, scale=0)": "scale",
    "Init(init_to_median, scale='wide')": "scale",
    "Init(init_to_median, scale=math.inf)": "scale",
    "Persistent(refresh=1.5)": "refresh",
    "Persistent(refresh='all')": "refresh",
    "Persistent(refresh=True)": "refresh",
    "starts.Replay(0)": "size",
    "starts.Replay(2.5)": "size",
    "starts.Replay(10, refresh=-1)": "refresh",
    "starts.Replay(10, refresh='all')": "refresh",
    "starts.FromGuide(3)": "guide",
    "starts.FromGuide(AutoNormal)": "guide",
    "ShortRunGuide(local, start=AutoNormal(globals_)).setup(x)": "z",
    # ------------------------------------------------------------------------------------------------ kernels
    "ShortRunLangevin()": "model",
    "ShortRunLangevin(3)": "model",
    "ShortRunLangevin(local, potential_fn=abs)": "potential_fn",
    "ShortRunLangevin(local, num_steps=0)": "num_steps",
    "ShortRunLangevin(local, step_size=-1.0)": "step_size",
    "ShortRunLangevin(local, step_size='auto')": "step_size",
    "ShortRunLangevin(local, step_size=0.1, dynamics=Langevin())": "step_size",
    "ShortRunLangevin(local, dynamics='langevin')": "dynamics",
    "ShortRunLangevin(local, start='prior')": "start",
    "ShortRunLangevin(local, persistent='yes')": "persistent",
    "ShortRunLangevin(local, adjust='yes')": "adjust",
    "ShortRunLangevin(local, adjust=True, preconditioner='dense')": "preconditioner",
    "ShortRunLangevin(local, adjust=True, target_accept_prob=2.0)": "target_accept_prob",
    "ShortRunLangevin(local, adjust=True, target_accept_prob='high')": "target_accept_prob",
    "ShortRunLangevin(local, objective='path')": "objective",
    "ShortRunLangevin(local, transforms=3)": "transforms",
    "ShortRunLangevin(local, compile='yes')": "compile",
    "VectorizedMCMC(NUTS(local), 10)": "kernel",
    "VectorizedMCMC(local, 10)": "kernel",
    "VectorizedMCMC(kernel, 0)": "num_samples",
    "VectorizedMCMC(kernel, 2.5)": "num_samples",
    "VectorizedMCMC(kernel, 10, warmup_steps=-1)": "warmup_steps",
    "VectorizedMCMC(kernel, 10, warmup_steps=2.5)": "warmup_steps",
    "VectorizedMCMC(kernel, 10, num_chains=0)": "num_chains",
    "VectorizedMCMC(kernel, 10, chain_batch_size=0)": "chain_batch_size",
    "VectorizedMCMC(kernel, 10, hook_fn=3)": "hook_fn",
    "VectorizedMCMC(kernel, 10, initial_params=x)": "initial_params",
    "VectorizedMCMC(kernel, 2, initial_params={'zz': x}, disable_progbar=True).run(x)": "zz",
    "VectorizedMCMC(kernel, 2, initial_params={'z': x[:1]}, disable_progbar=True).run(x)": "initial_params",
    "VectorizedMCMC(kernel, 10).get_samples()": "run",
    "VectorizedMCMC(kernel, 10).summary()": "run",
    "VectorizedMCMC(kernel, 10).sample_stats": "run",
    "VectorizedMCMC(kernel, 2, 2, disable_progbar=True).run()": "arguments",
    # ------------------------------------------------------------------------------------------------ energies
    "EnergyELBO(Trace_ELBO)": "base_elbo",
    "EnergyELBO(local)": "base_elbo",
    "EnergyELBO(Trace_ELBO(), num_steps=0)": "num_steps",
    "EnergyELBO(Trace_ELBO(), step_size=-1.0)": "step_size",
    "EnergyELBO(Trace_ELBO(), dynamics='langevin')": "dynamics",
    "EnergyELBO(Trace_ELBO(), start='prior')": "start",
    "EnergyELBO(Trace_ELBO(), runs=40)": "runs",
    "EnergyELBO(Trace_ELBO(), 10, runs=energy.PriorRuns(10))": "runs",
    "EnergyELBO(Trace_ELBO(), num_chains=0)": "num_chains",
    "EnergyELBO(Trace_ELBO(), l2=-1.0)": "l2",
    "EnergyELBO(Trace_ELBO(), l2='some')": "l2",
    "EnergyELBO(Trace_ELBO(), compile='yes')": "compile",
    "EnergyELBO(Trace_ELBO()).loss_and_grads(local, guide, x)": "energy_prior",
    "energy.PriorRuns(num_steps=0)": "num_steps",
    "energy.PriorRuns(step_size=-0.1)": "step_size",
    "energy.PriorRuns(step_size=0.1, dynamics=Langevin())": "step_size",
    "energy.PriorRuns(start=Annealed())": "start",
    "ShortRunGuide(local, start=Langevin(0.1))": "start",
    "sample_prior(tilted, x, num_samples=0)": "num_samples",
    "sample_prior(tilted, x, num_steps=0)": "num_steps",
    "sample_prior(tilted, x, given={'zz': x})": "zz",
    "sample_prior(tilted, x, given={'z': x[:1]})": "given",
    "sample_prior(tilted, x, given=x)": "given",
    "sample_prior(3, x)": "model",
    "energy.EnergyPredictive(tilted, runs=40)": "runs",
    "energy.EnergyPredictive(tilted, num_samples=2.5)(x)": "num_samples",
    "pyro.poutine.trace(lambda: energy_prior(3, abs, pyro.sample('z', dist.Normal(0, 1)))).get_trace()": "name",
    "pyro.poutine.trace(lambda: energy_prior('e', 3, pyro.sample('z', dist.Normal(0, 1)))).get_trace()": "energy",
    "pyro.poutine.trace(lambda: energy_prior('e', abs)).get_trace()": "latents",
    # ---------------------------------------------------------------------------------------------- encoders, mixtures
    "LangevinEncoderGuide(local, 3)": "features",
    "LangevinEncoderGuide(local, features, num_steps=0)": "num_steps",
    "LangevinEncoderGuide(local, features, step_size=-1.0)": "step_size",
    "LangevinEncoderGuide(local, features, step_size='auto')": "step_size",
    "LangevinEncoderGuide(local, features, adjust='yes')": "adjust",
    "LangevinEncoderGuide(local, features, target_accept_prob=1.5)": "target_accept_prob",
    "LangevinEncoderGuide(local, features, eval_steps=0)": "eval_steps",
    "LangevinEncoderGuide(local, features, basis='whitened')": "basis",
    "LangevinEncoderGuide(local, features, init_scale=-1.0)": "init_scale",
    "LangevinEncoderGuide(local, features, compile='yes')": "compile",
    "LangevinEncoderGuide(local, lambda x: x).setup(x)": "features",
    "amortized.Whitened(-1.0)": "ridge",
    "amortized.Whitened('some')": "ridge",
    "amortized.AmortizedSampler(abs, features, x, size=0)": "size",
    "amortized.AmortizedSampler(3, features, x, size=1)": "log_density",
    "amortized.AmortizedSampler(abs, 3, x, size=1)": "features",
    "SemiImplicitGuide(local, num_mixtures=0)": "num_mixtures",
    "SemiImplicitGuide(local, noise=0)": "noise",
    "SemiImplicitGuide(local, noise='gaussian')": "noise",
    "SemiImplicitGuide(local, init_scale=-1.0)": "init_scale",
    "SemiImplicitGuide(local, 3)": "mixing",
    "SemiImplicitGuide(local, conditional=3)": "conditional",
    "SemiImplicit_ELBO(0)": "num_mixtures",
    "SemiImplicit_ELBO(2.5)": "num_mixtures",
    "SemiImplicit_ELBO(5, num_particles=0)": "num_particles",
    "semi_implicit.SemiImplicit(abs, abs, noise=0)": "noise",
    "semi_implicit.SemiImplicit(3, abs, noise=2)": "mixing",
    "semi_implicit.SemiImplicit(abs, 3, noise=2)": "conditional",
    "semi_implicit.SemiImplicit(abs, abs, noise=2, num_mixtures=0)": "num_mixtures",
    "semi_implicit.MixingNetwork(0, 2)": "noise",
    "semi_implicit.MixingNetwork(2, 0)": "size",
    "semi_implicit.MixingNetwork(2, 2, hidden=64)": "hidden",
    # ------------------------------------------------------------------------------------------------ teaching
    "Refiner(abs)": "energy",
    "Refiner(net, num_steps=-1)": "num_steps",
    "Refiner(net, num_steps=2.5)": "num_steps",
    "Refiner(net, step_size=-0.1)": "step_size",
    "Refiner(net, step_size='small')": "step_size",
    "Refiner(net, noise=-1.0)": "noise",
    "Refiner(net, noise='none')": "noise",
    "Refiner(net, step_size=0.1, dynamics=Langevin())": "step_size",
    "Refiner(net, dynamics='langevin')": "dynamics",
    "Refiner(net, reference='normal')": "reference",
    "Refiner(net, replay=100)": "replay",
    "Refiner(net, compile='yes')": "compile",
    "Refiner(net)(x, num_steps=2.5)": "num_steps",
    "teaching.AncestralSampler(3)": "model",
    "teaching.AncestralSampler(local, output='mean')": "output",
    "teaching.AncestralSampler(local, site='y').propose(x)": "y",
    "MCMCTeaching(3, Refiner(net), svi, None)": "sampler",
    "MCMCTeaching(sampler, net, svi, None)": "refiner",
    "MCMCTeaching(sampler, Refiner(net), 3, None)": "student",
    "MCMCTeaching(sampler, Refiner(net), svi, pyro.optim.Adam({'lr': 0.1}))": "optim",
    "MCMCTeaching(sampler, Refiner(net), svi, None, l2=-1.0)": "l2",
    "MCMCTeaching(sampler, Refiner(net), svi, None, dual=3)": "dual",
    # ------------------------------------------------------------------------------------------------ evaluation
    "ais(3, x)": "model",
    "ais(local, x, num_chains=0)": "num_chains",
    "ais(local, x, num_temperatures=0)": "num_temperatures",
    "ais(local, x, num_transitions=0)": "num_transitions",
    "ais(local, x, long_run=0)": "long_run",
    "ais(local, x, step_size=-1.0)": "step_size",
    "ais(local, x, step_size='auto')": "step_size",
    "ais(local, x, power=0.0)": "power",
    "ais(local, x, power='cubic')": "power",
    "ais(local, x, compile='yes')": "compile",
    "ais(guide, local, x)": "model",
    "evaluation.importance_log_likelihood(local, guide, x)": "draws",
    "evaluation.importance_log_likelihood(local, {}, x)": "draws",
    "evaluation.importance_log_likelihood(local, {'y': x}, x)": "z",
    "evaluation.importance_log_likelihood(local, {'z': torch.randn(4, 2)}, x)": "z",
    "evaluation.importance_log_likelihood(local, {'z': torch.randn(40, 3)}, x, num_samples=0)": "num_samples",
    "evaluation.importance_log_likelihood(local, {'z': torch.randn(40, 3)}, x, rounds=0)": "rounds",
    "evaluation.guide_log_likelihood(local, guide, x, num_samples=0)": "num_samples",
    "evaluation.guide_log_likelihood(local, guide, x, at_once=0)": "at_once",
    "evaluation.guide_log_likelihood(local, 3, x)": "guide",
    "evaluation.frechet_distance(x, x)": "a",
    "evaluation.frechet_distance(torch.randn(4, 2), torch.randn(4, 3))": "columns",
    "evaluation.frechet_distance(torch.randn(1, 2), torch.randn(4, 2))": "rows",
    "evaluation.frechet_distance([1.0], [2.0])": "a",
    "evaluation.squared_mmd(torch.randn(4, 2), torch.randn(4, 3))": "columns",
    "evaluation.squared_mmd(torch.randn(4, 2), torch.randn(4, 2), width=-1.0)": "width",
    "evaluation.squared_mmd(torch.randn(1, 2), torch.randn(4, 2))": "rows",
    "evaluation.anomaly_score(local, guide, x, score='energy')": "score",
    "evaluation.anomaly_score(local, guide, x, num_draws=0)": "num_draws",
    "evaluation.anomaly_scores(local, guide, x, scores={})": "scores",
    "evaluation.anomaly_scores(local, guide, x, scores=evaluation.Joint())": "scores",
    "evaluation.Above()": "sites",
    "evaluation.Above(3)": "sites",
    "evaluation.Above('z', runs=40)": "runs",
    # ------------------------------------------------------------------------------------------------ diagnostics
    "psis(guide, local, x)": "model",
    "psis(local, 3, x)": "guide",
    "psis(local, guide, x, num_samples=0)": "num_samples",
    "psis(local, guide, x, num_samples=3)": "num_samples",
    "diagnostics.sbc(local, guide, x)": "posterior",
    "diagnostics.sbc(local, 3, x)": "posterior",
    "diagnostics.sbc(local, posterior, x, num_simulations=0)": "num_simulations",
    "diagnostics.sbc(local, posterior, x, num_draws=0)": "num_draws",
    "diagnostics.sbc(local, posterior, x, sites=['y'])": "y",
    "diagnostics.sbc(local, posterior, x, sites='z')": "sites",
    "diagnostics.sbc(local, posterior, x, statistics=abs)": "statistics",
    "diagnostics.sbc(local, posterior, x, seed='one')": "seed",
    "diagnostics.nested_rhat(torch.randn(4, 10), 3)": "superchains",
    "diagnostics.nested_rhat(torch.randn(4, 10), 0)": "superchains",
    "diagnostics.nested_rhat('draws', 2)": "draws",
    "diagnostics.compare_with_nuts(local, 3, x)": "source",
    "diagnostics.compare_with_nuts(local, guide, x, num_samples=0)": "num_samples",
    "diagnostics.compare_with_nuts(local, guide, x, warmup_steps=0)": "warmup_steps",
    "diagnostics.compare_with_nuts(local, guide, x, num_chains=0)": "num_chains",
    "diagnostics.compare_with_nuts(local, guide, x, reference=3)": "reference",
    "diagnostics.energy_gap(tilted, guide, x, num_samples=0)": "num_samples",
    "diagnostics.energy_gap(tilted, guide, x, runs=40)": "runs",
    "diagnostics.energy_gap(local, guide, x)": "energy_prior",
    "diagnostics.run_length(tilted, x, num_steps=40)": "num_steps",
    "diagnostics.run_length(tilted, x, num_steps=[])": "num_steps",
    "diagnostics.run_length(tilted, x, num_steps=[0, 10])": "num_steps",
    "diagnostics.run_length(tilted, x, num_samples=0)": "num_samples",
    "diagnostics.run_length(local, x)": "energy_prior",
    "diagnostics.step_sweep(AutoNormal(local), x)": "guide",
    "diagnostics.step_sweep(guide, x, num_steps=[0])": "num_steps",
    "diagnostics.step_sweep(guide, x, num_steps=5)": "num_steps",
    "diagnostics.step_sweep(guide, x, factors=[])": "factors",
    "diagnostics.step_sweep(guide, x, factors=[-1.0])": "factors",
    "diagnostics.step_sweep(guide, x, num_samples=0)": "num_samples",
    "diagnostics.StepSizeHistory(AutoNormal(local))": "guide",
    "diagnostics.UniformBand(0, 10)": "count",
    "diagnostics.UniformBand(10, 0)": "levels",
    "diagnostics.Trained(guide, pyro.optim.Adam({'lr': 0.1}))": "make_guide",
    "diagnostics.Trained(ShortRunGuide, pyro.optim.Adam({'lr': 0.1}), num_steps=0)": "num_steps",
    "diagnostics.Trained(ShortRunGuide, 0.1)": "optim",
    "diagnostics.Chains(kernel)": "make_kernel",
    "diagnostics.Chains(ShortRunLangevin, warmup_steps=-1)": "warmup_steps",
    "diagnostics.Chains(ShortRunLangevin, num_chains=0)": "num_chains",
    "diagnostics.symmetry_pvalue(np.zeros((0, 3)))": "values",
    "diagnostics.plot_images(torch.zeros(3))": "images",
    "diagnostics.plot_images(torch.zeros(2, 16), columns=0)": "columns",
    "diagnostics.plot_images(torch.zeros(2, 17))": "shape",
    "diagnostics.plot_images(torch.zeros(2, 16), shape=(3, 3))": "shape",
    "diagnostics.plot_reconstructions(torch.zeros(2, 16), torch.zeros(3, 16))": "reconstructed",
    "diagnostics.plot_ranks(guide)": "sbc",
    "diagnostics.plot_ecdf(guide)": "sbc",
    "diagnostics.plot_ranks(calibration, bins=0)": "bins",
    "diagnostics.plot_ranks(calibration, prob=2.0)": "prob",
    "diagnostics.plot_ecdf(calibration, columns=0)": "columns",
    "diagnostics.plot_step_sizes([])": "history",
    "diagnostics.plot_trajectories(3)": "source",
    "diagnostics.plot_aggregate_posterior(3)": "posterior",
    "diagnostics.plot_aggregate_posterior({'z': torch.randn(2, 3, 2)}, sites=['y'])": "y",
    "diagnostics.plot_aggregate_posterior({'z': torch.randn(2, 3, 2)}, coordinates=(0, 5))": "coordinates",
    "diagnostics.plot_hierarchy(tilted, guide, x, layers=[], image='x')": "layers",
    "diagnostics.plot_hierarchy(tilted, guide, x, layers=['y'], image='x')": "y",
    "diagnostics.plot_hierarchy(tilted, guide, x, layers=['z'], image='y')": "y",
    # ------------------------------------------------------------------------------------------------ export and files
    "to_arviz(3, x)": "source",
    "to_arviz(AutoNormal(local), x)": "source",
    "to_arviz(VectorizedMCMC(kernel, 10))": "run",
    "to_arviz(guide, x, num_samples=0)": "num_samples",
    "to_arviz(guide, x, num_chains=0)": "num_chains",
    "to_arviz(guide, x, num_prior=-1)": "num_prior",
    "to_arviz(guide, x, log_likelihood='no')": "log_likelihood",
    "to_arviz(guide, x, posterior_predictive='no')": "posterior_predictive",
    "to_arviz(guide, x, num_samples=2, dims={'zz': ['a']})": "zz",
    "to_arviz(guide, x, num_samples=2, dims={'z': ['a', 'b']})": "dims",
    "to_arviz(guide, x, num_samples=2, dims=['a'])": "dims",
    "to_arviz(guide, x, num_samples=2, coords=['a'])": "coords",
    "to_arviz(guide, x, num_samples=2, coords={'data': [1, 2]})": "coords",
    "to_arviz(guide, x, num_samples=2, coords={'zz': [1, 2]})": "zz",
    "to_arviz(guide)": "arguments",
    "io.stream_posterior(guide, [x], folder, rank=0.5)": "rank",
    "io.stream_posterior(guide, [x], folder, rank=1)": "rank",
    "io.stream_posterior(guide, [x], folder, ranks=0)": "ranks",
    "io.stream_posterior(guide, [x], folder, seed=-1)": "seed",
    "io.stream_posterior(guide, [x], folder, seed=0.5)": "seed",
    "io.stream_posterior(guide, [x], folder, seed='a')": "seed",
    "io.stream_posterior(guide, x, folder)": "batches",
    "io.stream_posterior(guide, 3, folder)": "batches",
    "io.stream_posterior(guide, [3], folder)": "batch 0",
    "io.stream_posterior(AutoNormal(local), [x], folder)": "guide",
    "io.stream_posterior(guide, [x], folder, num_samples=0)": "num_samples",
    "save_state(folder / 'a.pt', net=abs)": "net",
    "save_state(folder / 'absent' / 'a.pt', net=net)": "a.pt",
    "load_state(folder / 'absent.pt', net=net)": "absent.pt",
    "load_state(folder, net=net)": "file",
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).square().sum(-1)


class World(dict):
    """What the calls of the table name: each made when it is asked for; and how often a model was run."""

    def __init__(self, folder: Path) -> None:
        super().__init__(NAMES, folder=folder)
        self.runs = 0

    def __missing__(self, name: str) -> Any:
        if (make := getattr(self, f"_{name}", None)) is None:
            raise NameError(name)
        self[name] = made = make()
        self.runs = 0
        return made

    def _x(self) -> Tensor:
        return torch.tensor([0.5, -1.0, 2.0])

    def _local(self) -> Any:
        def local(x: Tensor) -> None:
            self.runs += 1
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        return local

    def _globals_(self) -> Any:
        def globals_(x: Tensor) -> None:
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

        return globals_

    def _tilted(self) -> Any:
        def tilted(x: Tensor) -> None:
            self.runs += 1
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                energy_prior("e", lambda z: z.square(), z)
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        return tilted

    def _guide(self) -> Any:
        return ShortRunGuide(self["local"], num_steps=2, start=Prior()).setup(self["x"])

    def _svi(self) -> Any:
        return ShortRunSVI(self["local"], self["guide"], pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())

    def _kernel(self) -> Any:
        return ShortRunLangevin(self["local"], 2)

    def _features(self) -> Any:
        return lambda x: torch.stack([x, x**2, x**3, torch.ones_like(x)], -1)

    def _posterior(self) -> Any:
        return Chains(ShortRunLangevin, 2, 4)

    def _net(self) -> Any:
        return Net()

    def _sampler(self) -> Any:
        return AncestralSampler(self["local"])

    def _calibration(self) -> Any:
        return SBC(torch.randint(0, 10, (20, 1)), ("z",), 9)


@cache
def raises_of(path: str) -> list[range]:
    """Lines of a file's ``raise`` statements."""
    nodes = ast.walk(ast.parse(Path(path).read_text()))
    return [range(n.lineno, (n.end_lineno or n.lineno) + 1) for n in nodes if isinstance(n, ast.Raise)]


def is_ours(reason: BaseException) -> bool:
    """Whether a ``raise`` of the package is where it comes from, and not torch, Pyro or Python in the middle of
    something."""
    frame = traceback.extract_tb(reason.__traceback__)[-1]
    return ROOT in Path(frame.filename).parents and any(frame.lineno in lines for lines in raises_of(frame.filename))


@pytest.mark.parametrize("call", TABLE)
def test_bad_input_is_named_before_any_work(call, tmp_path):
    world = World(tmp_path)
    for name in re.findall(r"\w+", call):
        if hasattr(world, f"_{name}"):
            world[name]
    world.runs = 0
    with pytest.raises((ValueError, TypeError, NotImplementedError, RuntimeError, OSError)) as caught:
        eval(call, dict(world))
    reason = caught.value
    said = str(reason)
    assert is_ours(reason), f"{type(reason).__name__}: {said}"
    assert re.search(rf"\b{re.escape(TABLE[call])}\b", said), said
    assert REMEDY.search(said), said
    assert world.runs <= MOST_RUNS, world.runs


# What takes nothing that could be wrong: interfaces, records of results, and what others make.
INTERFACES = "Basis Dynamics MomentumDynamics Preconditioner Score DensityGuide LogDet Objective Start Base Transition"
RECORDS = (
    "Comparison EnergyGap PSIS RunLength SBC StepSweep EnergyInfo Evidence LogLikelihood FitResult Grid DrawStats Fit"
)
PARTS = "Arrived Jacobian Leap Column Departure GaussianBase PriorBase StartDraw Refined TeachingInfo TiltedPrior"
PLAIN = (
    "Everywhere Span Dense Diagonal Identity Bound Energies Latents Reconstruction Linearized Gaussian default_start"
)
INNER = {"checks", "tensors", "compile", "density", "runs"}  # packages that take what others have checked


def test_the_table_has_a_row_for_every_public_name_that_takes_something():
    named = set(re.findall(r"\w+", " ".join([*TABLE, INTERFACES, RECORDS, PARTS, PLAIN])))
    public = {name for package in PACKAGES if package not in INNER for name in NAMES[package].__all__}
    assert len(TABLE) >= 150 and not sorted(public - named)
