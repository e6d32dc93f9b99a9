"""Starts at points: no density, hence no bound, no weights, and nothing to tune by."""

from __future__ import annotations

import logging
import math
import pickle
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import data, local
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoGuideList, AutoIAFNormal, AutoNormal
from torch import Tensor

from pyro_shortrun import Persistent, Prior, ShortRunGuide, ShortRunLangevin, StepSize, VectorizedMCMC, psis, to_arviz
from pyro_shortrun.evaluation import guide_log_likelihood


def at_points(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Delta(pyro.param("at", torch.full((5,), 0.3))))


def pushed_forward(x: Tensor) -> None:
    """Fewer numbers drawn than there are latents."""
    eps = pyro.sample("eps", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Delta(eps * torch.ones(len(x)), log_density=torch.zeros(())))


def flow(x: Tensor) -> None:
    """A density by hand."""
    with pyro.plate("data", len(x)):
        eps = pyro.sample("eps", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(1.0 + 2.0 * eps, log_density=-math.log(2.0) * torch.ones(len(x))))


def listed(model: Callable) -> AutoGuideList:
    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, expose=["top"])))
    guide.append(AutoDelta(poutine.block(model, expose=["z"])))
    return guide


def two_levels(x: Tensor) -> None:
    top = pyro.sample("top", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(top, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


POINTS: dict[str, tuple[Callable, Callable]] = {
    "AutoDelta": (local, AutoDelta),
    "by hand": (local, lambda model: at_points),
    "pushed forward": (local, lambda model: pushed_forward),
    "a part of a list": (two_levels, listed),
    "a run from Persistent": (local, lambda model: ShortRunGuide(model, num_steps=1, start=Persistent())),
}
DENSITIES: dict[str, tuple[Callable, Callable]] = {
    "AutoNormal": (local, AutoNormal),
    "AutoDiagonalNormal": (two_levels, AutoDiagonalNormal),
    "AutoIAFNormal": (two_levels, AutoIAFNormal),
    "flow": (local, lambda model: flow),
    "a run": (local, lambda model: ShortRunGuide(model, num_steps=1, start=Prior())),
}


@pytest.mark.parametrize("name", [*POINTS, *DENSITIES])
def test_a_start_at_a_point_has_no_density(name, caplog):
    """It is no bound that such a run gives, whatever Delta.log_prob says."""
    model, make = {**POINTS, **DENSITIES}[name]
    x = data()
    with caplog.at_level(logging.WARNING, "pyro_shortrun"):
        guide = ShortRunGuide(model, num_steps=2, step_size=StepSize(0.01), start=make(model)).setup(x)
    known = name in DENSITIES
    assert guide.has_density == known and ("at a point" in caplog.text) != known
    assert ("log_q" in to_arviz(guide, x, num_samples=5, num_chains=1)["sample_stats"].data_vars) == known
    pyro.set_rng_seed(1)
    loss = Trace_ELBO().loss(model, guide, x)
    if not known:
        pyro.set_rng_seed(1)
        trace = poutine.trace(guide).get_trace(x)
        joint = poutine.trace(poutine.replay(model, trace)).get_trace(x).log_prob_sum()
        assert loss == pytest.approx(-joint.item())
        with pytest.raises(NotImplementedError, match="density"):
            psis(model, guide, x, num_samples=30)


@pytest.mark.parametrize("name", ["AutoDelta", "by hand", "a part of a list"])
def test_a_guide_at_a_point_has_no_weights(name):
    model, make = POINTS[name]
    guide, x = make(model), data()
    guide(x)
    for weighed in (psis, guide_log_likelihood):
        with pytest.raises(NotImplementedError, match="at a point"):
            weighed(model, guide, x, num_samples=30)


def test_a_copy_knows_that_its_start_has_no_density():
    x = data()
    guide = ShortRunGuide(local, num_steps=2, step_size=StepSize(0.01), start=AutoDelta(local)).setup(x)
    again = pickle.loads(pickle.dumps(guide)).attach(local)
    again(x)
    assert not again.has_density


def test_short_chains_from_a_point_tune_by_no_bound():
    x = data()
    mcmc = VectorizedMCMC(
        ShortRunLangevin(local, 2, StepSize(0.01), start=AutoDelta(local)), 2, 5, num_chains=3, disable_progbar=True
    )
    mcmc.run(x)
    assert mcmc.sample_stats["step_size"].flatten().tolist() == pytest.approx([0.01] * 6)
