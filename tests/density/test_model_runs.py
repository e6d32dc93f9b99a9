"""How often a training step runs the model: nothing is computed that no one reads."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from pyro_shortrun import Annealed, EnergyELBO, Langevin, Persistent, Prior, ShortRunGuide, StepSize, energy_prior
from pyro_shortrun.compile import Compiler, Untouched, density_of
from pyro_shortrun.density import Call
from pyro_shortrun.density.interface import Density

K = 5
REAL, POSITIVE = dist.Normal(0.3, 1.0), dist.LogNormal(0.3, 1.0)


def counted(latent: Any, energy: bool = False) -> tuple[Callable[[Tensor], None], list[int]]:
    """A model of one latent, and a list that is one longer after each of its runs."""
    runs: list[int] = []

    def model(x: Tensor) -> None:
        runs.append(1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", latent)
            if energy:
                energy_prior("ebm", lambda z: 0.1 * z.square(), z)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return model, runs


def encoder(law: Callable) -> Callable[[Tensor], None]:
    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", law(loc, 0.5))

    return guide


def steps(model: Callable, guide: Callable, loss: Any, runs: list[int]) -> int:
    """Runs of the model in one step, after the first."""
    svi, x = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss), torch.tensor([0.5, 1.0])
    svi.step(x)
    runs.clear()
    svi.step(x)
    return len(runs)


@pytest.mark.parametrize(
    "latent,options,count",
    [
        # The start; a gradient at each state but the last; the last; the way back; the ELBO's own trace.
        (REAL, {}, 1 + K + 1 + K + 1),
        # Besides, the way back of the site's value and log-Jacobian.
        (POSITIVE, {}, 1 + K + 1 + K + 1 + 1),
        # One more arrival, there and back, is the end, where it lands.
        (REAL, dict(objective=Annealed()), 1 + (K + 1) + 1 + (K + 1) + 1),
        (REAL, dict(start=encoder(dist.Normal)), 2 + K + 1 + K + 1),
        # Besides, the draw of the start as a state and its log-Jacobian, there and back.
        (POSITIVE, dict(start=encoder(dist.LogNormal)), 2 + K + 1 + K + 1 + 1 + 4),
    ],
    ids=["real", "positive", "annealed", "from a guide", "positive, from a guide"],
)
def test_training_step(latent, options, count):
    model, runs = counted(latent)
    guide = ShortRunGuide(model, num_steps=K, dynamics=Langevin(StepSize(0.05)), **{"start": Prior(), **options})
    assert steps(model, guide, Trace_ELBO(), runs) == count


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize(
    "options,wrap,count",
    [
        # The start; a gradient at each state but the last; the last; the ELBO's own trace: neither determinants nor a
        # way back.
        ({}, partial(poutine.mask, mask=False), 1 + K + 1 + 1),
        ({}, partial(poutine.mask, mask=torch.tensor(False)), 1 + K + 1 + 1),
        (dict(start=encoder(dist.Normal)), partial(poutine.mask, mask=False), 2 + K + 1 + 1),
        # The shapes, a draw from the prior for rows that are new, and the density where the others were left.
        (dict(start=Persistent()), lambda guide: guide, 3 + K + 1 + 1),
    ],
    ids=["masked", "masked by a tensor", "masked, from a guide", "persistent"],
)
def test_no_determinant_that_no_one_reads(monkeypatch, learnable, options, wrap, count):
    products: list[int] = []
    monkeypatch.setattr(Density, "hessian_product", lambda *args, **kwargs: products.append(1))
    model, runs = counted(REAL)
    guide = ShortRunGuide(
        model, num_steps=K, dynamics=Langevin(StepSize(0.05, learnable=learnable)), **{"start": Prior(), **options}
    )
    assert steps(model, wrap(guide), Trace_ELBO(), runs) == count
    assert not products and not guide.info.log_det.numel()


def test_a_fixed_step_has_no_way_back():
    """Its bound is in the loss, and so are the determinants."""
    model, runs = counted(REAL)
    guide = ShortRunGuide(model, num_steps=K, dynamics=Langevin(StepSize(0.05, learnable=False)), start=Prior())
    assert steps(model, guide, Trace_ELBO(), runs) == 1 + K + 1 + 1
    assert guide.info.log_det.shape == (K,)


@pytest.mark.parametrize("l2", [0.0, 0.1])
def test_step_with_negative_runs(l2):
    """The start, a gradient at each state but the last, the last and all that is read there; the ELBO's own trace."""
    model, runs = counted(REAL, energy=True)
    assert steps(model, encoder(dist.Normal), EnergyELBO(Trace_ELBO(), num_steps=K, l2=l2), runs) == 1 + K + 1 + 1


def branching() -> None:
    """A support that is real on one side of another latent and positive on the other."""
    z = pyro.sample("z", dist.Normal(0.3, 1.0))
    pyro.sample("y", dist.Normal(0.0, 1.0) if z.item() > 0 else dist.LogNormal(0.0, 1.0))


@pytest.mark.parametrize("seed", range(6))
def test_supports_are_read_in_every_run(seed: int) -> None:
    """Whatever the run looked like by which the call was bound."""
    pyro.set_rng_seed(seed)
    model, u = Call.of(branching, (), {}).model, torch.tensor([[[-1.0, 0.7]]])
    y = math.exp(0.7)
    wanted = (
        dist.Normal(0.3, 1.0).log_prob(torch.tensor(-1.0)) + dist.LogNormal(0.0, 1.0).log_prob(torch.tensor(y)) + 0.7
    )
    assert model(u).item() == pytest.approx(wanted.item())
    assert model.constrain(u)[0]["y"].item() == pytest.approx(y)
    call = Call.of(branching, (), {})
    call.model(u)
    assert call.constrain(u, isolated=True)[0]["y"].item() == pytest.approx(y)


@pytest.mark.parametrize("seed", range(6))
def test_what_graphs_notice_of_supports_is_known_to_the_model(seed: int) -> None:
    pyro.set_rng_seed(seed)
    model, u = Call.of(branching, (), {}).model, torch.tensor([[[-1.0, 0.7]]])
    density_of(model, Compiler(Untouched())).value_and_grad(u)
    assert not model.structure.is_real


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("start", [None, "guide"])
def test_guides_of_supports_that_branch(start: str | None, compile: bool) -> None:
    """Draws lie in the support that goes with them, and log q is that of all runs."""

    def encoder() -> None:
        z = pyro.sample("z", dist.Normal(0.3, 1.0))
        pyro.sample("y", dist.Normal(0.0, 1.0) if z.item() > 0 else dist.LogNormal(0.0, 1.0))

    guide = ShortRunGuide(
        branching, num_steps=2, step_size=StepSize(1e-8), start=encoder if start else None, compile=compile
    )
    for _ in range(40):
        value = guide()
        assert value["z"] > 0 or value["y"] > 0
        assert abs(Trace_ELBO().loss(branching, guide)) < 1e-3
