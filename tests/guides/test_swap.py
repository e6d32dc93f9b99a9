"""The swap: ShortRunGuide in place of an automatic guide, on every model of the zoo."""

from __future__ import annotations

import math
import warnings

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from zoo import CASES, EXTRA, Case

from pyro_shortrun import Prior, ShortRunGuide, StepSize

SWAP: dict[str, tuple[int, float, float]] = {  # number of steps, step size, learning rate
    "eight_schools": (8, 0.01, 0.05),
    "baseball": (8, 0.01, 0.05),
    "regression": (8, 0.0001, 0.05),
    "lkj": (5, 0.0001, 0.05),
    "gamma_def": (3, 0.0001, 0.05),
    "vae": (8, 0.1, 0.05),
    "dmm": (3, 0.01, 0.05),
    "gp_regression": (3, 0.0005, 0.02),
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_swap_for_an_automatic_guide(case: Case, dtype: torch.dtype):
    """SVI improves the bound on every model of the zoo; the first and the last draws use the same random numbers."""
    if dtype == torch.float32:  # the far tails of the priors leave its range, which freezes a row and says so
        warnings.filterwarnings("ignore", ".*last finite state")
    model, args = case.make()
    num_steps, eta, lr = SWAP[case.name]
    guide = ShortRunGuide(model, num_steps=num_steps, step_size=eta, start=Prior())
    svi = SVI(model, guide, pyro.optim.Adam({"lr": lr}), Trace_ELBO())
    losses = []
    for i in range(24):
        pyro.set_rng_seed(i % 8)
        losses.append(svi.step(*args))
    assert all(map(math.isfinite, losses))
    assert sum(losses[-8:]) < sum(losses[:8])


@pytest.mark.parametrize("case", EXTRA, ids=lambda case: case.name)
def test_trace_of_the_guide_fits_the_model(case: Case):
    """Every latent has the shape, the support and the plates that the model gives it, and the log weight is finite."""
    model, args = case.make()
    guide = ShortRunGuide(model, num_steps=1, step_size=StepSize(1e-4), create_plates=case.create_plates, start=Prior())
    guide_trace = poutine.trace(guide).get_trace(*args)
    prior = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args)
    latent = {k for k, s in prior.nodes.items() if s["type"] == "sample" and not s["is_observed"]}
    latent -= {k for k in latent if type(prior.nodes[k]["fn"]).__name__ == "_Subsample"} | set(case.discrete)
    assert latent and latent <= set(guide_trace.nodes)
    for name in latent:
        site, mine = prior.nodes[name], guide_trace.nodes[name]
        assert site["value"] is mine["value"], name
        assert mine["fn"].batch_shape == site["fn"].batch_shape, name
        assert mine["fn"].event_shape == site["fn"].event_shape, name
        assert site["fn"].support.check(mine["value"]).all(), name
        frames = [{f.name: (f.dim, f.size) for f in s["cond_indep_stack"]} for s in (site, mine)]
        assert frames[0] == frames[1], name
    assert guide_trace.log_prob_sum().isfinite()
