"""ShortRunGuide under Pyro's ELBOs: losses that are known exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from programs import EXACT, close, contraction, data, frozen, linear_log_weight, local, local_posterior, recorded
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.importance import psis_diagnostic, vectorized_importance_weights

from pyro_shortrun import Prior, ShortRunGuide, StepSize

ELBOS: dict[str, Callable[[], Any]] = {
    "Trace": lambda: Trace_ELBO(),
    "Trace-3": lambda: Trace_ELBO(num_particles=3),
    "Trace-3-vectorised": lambda: Trace_ELBO(num_particles=3, vectorize_particles=True),
    "MeanField": lambda: TraceMeanField_ELBO(),
    "MeanField-3-vectorised": lambda: TraceMeanField_ELBO(num_particles=3, vectorize_particles=True),
    "Graph": lambda: TraceGraph_ELBO(),
    "Graph-3-vectorised": lambda: TraceGraph_ELBO(num_particles=3, vectorize_particles=True),
    "Enum": lambda: TraceEnum_ELBO(strict_enumeration_warning=False),
    "Enum-3-vectorised": lambda: TraceEnum_ELBO(
        num_particles=3, vectorize_particles=True, strict_enumeration_warning=False
    ),
    "Renyi-3": lambda: RenyiELBO(alpha=0.0, num_particles=3),
    "Renyi-3-vectorised": lambda: RenyiELBO(alpha=0.5, num_particles=3, vectorize_particles=True),
}


@pytest.mark.parametrize("model", EXACT)
@pytest.mark.parametrize("elbo", ELBOS)
def test_loss_is_the_evidence_where_the_guide_is_the_posterior(elbo, model, dtype):
    exact, x = EXACT[model], data()
    guide = ShortRunGuide(exact.model, num_steps=2, dynamics=frozen(), start=exact.posterior)
    loss = ELBOS[elbo]()
    expected = -exact.evidence(x)
    assert loss.loss(exact.model, guide, x) == pytest.approx(expected, **close(dtype))
    assert loss.loss_and_grads(exact.model, guide, x) == pytest.approx(expected, **close(dtype))


@pytest.mark.parametrize("vectorise", [False, True])
@pytest.mark.parametrize("alpha", [None, 0.0, 0.5])
def test_loss_of_a_linear_run_by_hand(alpha, vectorise, dtype):
    """The mean of the log weights; for Renyi, a bound of its own for every datum of the plate."""
    x, particles = data(), 4
    guide, seen = recorded(ShortRunGuide(local, num_steps=3, dynamics=contraction(0.1), start=Prior()))
    options: dict[str, Any] = {"num_particles": particles, "vectorize_particles": vectorise, "max_plate_nesting": 1}
    elbo = Trace_ELBO(**options) if alpha is None else RenyiELBO(alpha=alpha, **options)
    loss = elbo.loss(local, guide, x)
    z = torch.stack([values["z"] for values in seen]).reshape(particles, len(x))
    assert z.std(0).min() > 1e-3  # particles differ
    log_w = linear_log_weight(z, x, 0.1, 3)
    if alpha is None:
        expected = log_w.mean(0).sum()
    else:
        expected = (((1 - alpha) * log_w).logsumexp(0) - math.log(particles)).sum() / (1 - alpha)
    assert loss == pytest.approx(-expected.item(), **close(dtype))


@pytest.mark.parametrize("model", ["positive", "nested"])
def test_mean_field_elbo_agrees_with_trace_elbo(model, dtype):
    """On constrained supports, with noise: TraceMeanField_ELBO sees all of log q."""
    exact, x = EXACT[model], data()
    guide = ShortRunGuide(exact.model, num_steps=3, step_size=StepSize(0.05), start=Prior()).setup(x)
    losses, grads = [], []
    for elbo in (Trace_ELBO(), TraceMeanField_ELBO(), TraceGraph_ELBO()):
        pyro.set_rng_seed(4)
        losses.append(elbo.loss_and_grads(exact.model, guide, x))
        raw = guide.dynamics.step_size.value_unconstrained
        grads.append(raw.grad.item())
        raw.grad = None
    assert losses[1:] == [pytest.approx(losses[0], **close(dtype))] * 2
    assert grads[0] != 0
    assert grads[1:] == [pytest.approx(grads[0], rel=1e-4)] * 2


def test_importance_weights_and_psis(dtype):
    x = data()
    exact = ShortRunGuide(local, num_steps=2, dynamics=frozen(), start=local_posterior)
    log_w, *_ = vectorized_importance_weights(local, exact, x, num_samples=6, max_plate_nesting=1)
    torch.testing.assert_close(log_w, torch.full_like(log_w, EXACT["local"].evidence(x)))

    wide = ShortRunGuide(
        local, num_steps=1, dynamics=contraction(0.05), start=Prior()
    )  # wider than the posterior: good weights
    assert psis_diagnostic(local, wide, x, num_particles=2000, max_simultaneous_particles=1000) < 0.5
    narrow = ShortRunGuide(
        local, num_steps=12, dynamics=contraction(0.15), start=Prior()
    )  # collapsed on the mode: bad ones
    assert psis_diagnostic(local, narrow, x, num_particles=2000, max_simultaneous_particles=1000) > 0.7
