"""A short run as one part of a guide: AutoGuideList and poutine.block."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import ALL, EXACT, close, contraction, data, frozen, nested
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoDiscreteParallel, AutoGuideList, AutoNormal, init_to_value
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor

from pyro_shortrun import Langevin, Prior, SemiImplicitGuide, ShortRunGuide, StepSize


def nested_parts(expose: list[str]) -> Callable:
    return poutine.block(nested, expose=expose)


class Recorded(AutoNormal):
    """Remembers what it drew."""

    last: dict[str, Tensor]

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        self.last = super().forward(*args, **kwargs)
        return self.last


def exact_list(x: Tensor) -> AutoGuideList:
    """AutoNormal for ``mu``, set to its posterior, and a run of no length for ``z`` from its conditional posterior."""
    guide = AutoGuideList(nested)

    def start(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal((guide[0].last["mu"] + x) / 2, math.sqrt(0.5)))

    guide.append(Recorded(nested_parts(["mu"])))
    guide.append(ShortRunGuide(nested_parts(["z"]), num_steps=2, dynamics=frozen(), start=start))
    poutine.trace(guide).get_trace(x)
    precision = 1 + len(x) / 2
    store = pyro.get_param_store()
    store["AutoGuideList.0.locs.mu"] = x.sum() / 2 / precision
    store["AutoGuideList.0.scales.mu"] = torch.tensor(precision**-0.5)
    return guide


def test_list_with_an_automatic_guide_before_the_short_run(dtype):
    """The run is given the draw of the part before it, so that every log weight is the evidence."""
    x = data()
    guide = exact_list(x)
    for elbo in (Trace_ELBO(), Trace_ELBO(num_particles=2), TraceGraph_ELBO()):
        assert elbo.loss(nested, guide, x) == pytest.approx(-EXACT["nested"].evidence(x), **close(dtype))


@pytest.mark.parametrize("called_before", [True, False])
def test_list_with_vectorised_particles(called_before, dtype):
    """Every particle's run is given that particle's draw; or the combination is refused."""
    x = data()
    if called_before:
        guide = exact_list(x)
    else:
        guide = AutoGuideList(nested)
        guide.append(AutoNormal(nested_parts(["mu"])))
        guide.append(ShortRunGuide(nested_parts(["z"]), num_steps=2, dynamics=frozen(), start=Prior()))
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    try:
        loss = elbo.loss(nested, guide, x)
        with pyro.plate("particles", 3, dim=-2):
            values = poutine.trace(guide).get_trace(x).nodes
    except NotImplementedError:
        return
    assert values["mu"]["value"].shape == (3, 1) and values["z"]["value"].shape == (3, 5)
    if called_before:
        assert loss == pytest.approx(-EXACT["nested"].evidence(x), **close(dtype))


def test_list_trains_both_parts():
    x = data()
    guide = AutoGuideList(nested)
    guide.append(AutoNormal(nested_parts(["mu"])))
    guide.append(ShortRunGuide(nested_parts(["z"]), num_steps=2, step_size=StepSize(0.05), start=Prior()))
    svi = SVI(nested, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    svi.step(x)
    before = {k: v.detach().clone() for k, v in pyro.get_param_store().items()}
    assert len(before) == 3
    for _ in range(3):
        assert math.isfinite(svi.step(x))
    assert all(not torch.equal(v, before[k]) for k, v in pyro.get_param_store().items())
    draws = Predictive(nested, guide=guide, num_samples=3)(x)
    assert draws["mu"].squeeze().shape == (3,) and draws["z"].shape == (3, 5)


def test_list_of_independent_parts(dtype):
    """Two latents, a short run for each, in either order: the other part's site is given."""
    x = data()

    def model(x: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(a - b, 1.0), obs=x)

    for first, second in ("ab", "ba"):
        pyro.clear_param_store()
        guide = AutoGuideList(model)
        guide.append(AutoNormal(poutine.block(model, expose=[first])))
        guide.append(
            ShortRunGuide(poutine.block(model, expose=[second]), num_steps=2, dynamics=contraction(0.01), start=Prior())
        )
        for _ in range(2):
            trace = poutine.trace(guide).get_trace(x)
        # one noise-free step and another, from the prior, at the other's value
        sign = 1.0 if second == "a" else -1.0
        other = trace.nodes[first]["value"] * sign
        end = trace.nodes[second]["value"]
        precision = 1 + len(x)
        mean = (sign * x.sum() + len(x) * other * sign) / precision
        shrink = (1 - 0.01 * precision) ** 2
        expected = dist.Normal(mean * (1 - shrink), shrink).log_prob(end)
        log_q = trace.nodes["_AutoGuideList.1_latent"]["fn"].log_prob(trace.nodes["_AutoGuideList.1_latent"]["value"])
        torch.testing.assert_close(log_q, expected)


def test_list_with_a_guide_of_the_discrete_sites():
    """The run sums the assignments out; the part after it samples them."""
    model, (x,) = ALL["mixture"].make()
    x = x[::5]
    guide = AutoGuideList(model)
    guide.append(
        ShortRunGuide(poutine.block(model, hide=["assignment"]), num_steps=2, step_size=StepSize(1e-3), start=Prior())
    )
    guide.append(AutoDiscreteParallel(poutine.block(model, expose=["assignment"])))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), TraceEnum_ELBO(max_plate_nesting=1))
    assert all(math.isfinite(svi.step(x)) for _ in range(2))
    assert set(guide(x)) == {"weights", "scale", "locs", "assignment"}
    assert guide[0].step_sizes().item() != pytest.approx(1e-3, rel=1e-3)


def test_blocked_model_is_a_guide_for_the_visible_sites():
    """``hide`` and ``expose`` of observed and of all latent sites change nothing."""
    x, draws = data(), []
    for model in [nested, poutine.block(nested, hide=["x"]), poutine.block(nested, expose=["mu", "z"])]:
        guide = ShortRunGuide(model, num_steps=2, dynamics=Langevin(StepSize(0.01)), start=Prior()).setup(x)
        pyro.set_rng_seed(1)
        draws.append(guide(x)["z"])
        pyro.clear_param_store()
    torch.testing.assert_close(draws[1], draws[0])
    torch.testing.assert_close(draws[2], draws[0])


# ------------------------------------------------------------------------------------------ nobody traces the list


def levels(x: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


LOCALS = {
    "run": lambda m: ShortRunGuide(m, num_steps=40, step_size=StepSize(0.2, learnable=False), start=Prior()),
    "semi-implicit": lambda m: SemiImplicitGuide(m, num_mixtures=2),
}


def listed(kind: str) -> AutoGuideList:
    """mu near 5, z by ours."""
    parts = AutoGuideList(levels)
    fixed = init_to_value(values={"mu": torch.tensor(5.0)})
    parts.append(AutoNormal(poutine.block(levels, expose=["mu"]), init_loc_fn=fixed, init_scale=0.01))
    parts.append(LOCALS[kind](poutine.block(levels, expose=["z"])))
    return parts


@pytest.mark.parametrize("kind", LOCALS)
def test_list_that_is_called_plainly(kind):
    """The later part finds the values of the call under way, and no others."""
    x, parts = torch.zeros(3), listed(kind)
    values = parts(x)
    assert values["z"].shape == (3,) and abs(values["mu"] - 5) < 0.1
    with pytest.raises(ValueError, match="call the list, not the part"):
        parts[1](x)
    with pytest.raises(TypeError):
        parts(x, 3)
    assert not _PYRO_STACK  # nothing is left there
    pickle.loads(pickle.dumps(parts))


def test_medians_and_quantiles_of_a_list():
    """z | mu = 5, x = 0 is N(2.5, 1 / 2)."""
    x, parts = torch.zeros(3), listed("run")
    parts(x)  # as Pyro's own parts want it
    median, quantiles = parts.median(x), parts.quantiles([0.16, 0.84], x)
    torch.testing.assert_close(median["z"], torch.full((3,), 2.5), rtol=0, atol=0.3)
    spread = (quantiles["z"][1] - quantiles["z"][0]) / 2
    torch.testing.assert_close(spread, torch.full((3,), math.sqrt(0.5)), rtol=0.4, atol=0)
    assert quantiles["z"].shape == (2, 3) and abs(median["mu"] - 5) < 0.1
