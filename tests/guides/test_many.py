"""Many guides one after the other, as a study or a service makes them: nothing of an earlier one is kept.

(``python examples/benchmarks/many_guides.py`` makes a hundred.)
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import weakref
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

from pyro_shortrun import Gaussian, Prior, ShortRunELBO, ShortRunGuide, ShortRunLangevin, ShortRunSVI, VectorizedMCMC
from pyro_shortrun.compile import Compiler, Untouched


def model(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def compiled(i: int) -> ShortRunGuide:
    """Traced for real, and not compiled, which takes seconds for each."""
    guide = ShortRunGuide(model, num_steps=2, start=Prior(), step_size=0.01, compile=True)
    guide._compiler = Compiler(Untouched())
    svi = ShortRunSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), ShortRunELBO())
    for _ in range(2):
        svi.step(torch.ones(3))
    assert len(guide.steps._steps) == 1
    return guide


def eager(i: int) -> ShortRunGuide:
    guide = ShortRunGuide(model, num_steps=2, start=Gaussian() if i % 10 == 0 else Prior(), step_size=0.01)
    svi = ShortRunSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(torch.ones(3))
    guide.sample_posterior(torch.ones(3), num_samples=5)
    return guide


def chains(i: int) -> VectorizedMCMC:
    kernel = ShortRunLangevin(model, 2, adjust=True, compile=True)
    kernel._compiler = Compiler(Untouched())
    mcmc = VectorizedMCMC(kernel, 2, 2, num_chains=3, disable_progbar=True)
    mcmc.run(torch.ones(3))
    mcmc.get_samples()
    return mcmc


def ours() -> int:
    """Tensors, modules, graphs, and objects of the package. (torch keeps the source text of graphs for good.)"""
    gc.collect()
    homes = ("pyro_shortrun", "torch.nn", "torch.fx")
    alive = gc.get_objects()
    kinds = [type(o) for o in alive]  # isinstance would wake lazy modules
    return sum(issubclass(k, Tensor) or str(getattr(k, "__module__", "")).startswith(homes) for k in kinds)


@pytest.mark.parametrize(("make", "count"), [(compiled, 2), (eager, 50), (chains, 5)])
def test_nothing_of_earlier_ones_is_kept(make: Callable[[int], Any], count: int):
    """A guide goes with its graphs and parameters."""

    def one(i: int) -> weakref.ref:
        pyro.clear_param_store()
        found = weakref.ref(make(i))
        pyro.clear_param_store()
        return found

    one(0)  # what is made once
    before = ours()
    found = [one(i) for i in range(count)]
    assert ours() == before and all(ref() is None for ref in found)


def losses(seed: int) -> list[float]:
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    svi = ShortRunSVI(model, ShortRunGuide(model, num_steps=2), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    return [svi.step(torch.ones(3)) for _ in range(3)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_train_as_one_does():
    """Each has a parameter store and a stack of handlers of its own; two threads share them, and must not."""
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(losses, [1, 2]) == [losses(1), losses(2)]
