"""Models in which no run can move: refused by the name of a site, and not handed out as their prior."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_median
from torch import Tensor

from pyro_shortrun import (
    Annealed,
    Init,
    Persistent,
    Prior,
    ShortRunELBO,
    ShortRunGuide,
    ShortRunLangevin,
    StepSize,
    VectorizedMCMC,
    psis,
    to_arviz,
)


def hidden_nan(y: Tensor) -> None:
    """A finite log density, whose gradient is NaN everywhere: NaN * 0 on the way back through the mask."""
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("n", len(y)), poutine.mask(mask=~torch.isnan(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


HANDED_OUT: dict[str, Callable[[Callable, Tensor], Any]] = {
    "draws": lambda model, y: ShortRunGuide(model, start=Prior()).sample_posterior(y, num_samples=20),
    "trajectory": lambda model, y: ShortRunGuide(model, start=Prior()).trajectory(y),
    "one draw": lambda model, y: ShortRunGuide(model, start=Prior())(y),
    "loss": lambda model, y: Trace_ELBO().loss(model, ShortRunGuide(model, start=Prior()), y),
    "own loss": lambda model, y: ShortRunELBO().loss(model, ShortRunGuide(model, start=Prior()), y),
    "annealed": lambda model, y: Trace_ELBO().loss(
        model, ShortRunGuide(model, step_size=StepSize(0.01), objective=Annealed(), start=Prior()), y
    ),
    "Init": lambda model, y: ShortRunGuide(model, start=Init(init_to_median))(y),
    "Persistent": lambda model, y: ShortRunGuide(model, start=Persistent())(y),
    "AutoNormal": lambda model, y: ShortRunGuide(model, start=AutoNormal(model))(y),
    "compiled": lambda model, y: ShortRunGuide(model, num_steps=2, compile=True, start=Prior())(y),
    "export": lambda model, y: to_arviz(ShortRunGuide(model, start=Prior()), y, num_samples=5),
    "weights": lambda model, y: psis(model, ShortRunGuide(model, start=Prior()), y, num_samples=30),
    "short chains": lambda model, y: chains(model, y, adjust=False, persistent=False),
    "chains": lambda model, y: chains(model, y, persistent=True),
    "adjusted chains": lambda model, y: chains(model, y, adjust=True),
}


def chains(model: Callable, y: Tensor, **options: Any) -> None:
    VectorizedMCMC(ShortRunLangevin(model, 2, **options), 2, 2, num_chains=3, disable_progbar=True).run(y)


@pytest.mark.parametrize("way", HANDED_OUT)
def test_a_model_without_any_gradient_is_refused_by_name(way):
    """It would hand out the prior, with a finite loss."""
    pyro.enable_validation(False)
    try:
        with pytest.raises(ValueError, match=r"gradient of the log density is not finite at .* first at site 'y'"):
            HANDED_OUT[way](hidden_nan, torch.tensor([10.0, math.nan, 12.0]))
    finally:
        pyro.enable_validation(True)


def test_one_start_without_a_gradient_is_no_such_model():
    """Where others have one, it is told as any frozen row is."""

    def kink() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("kink", torch.where(z < 0.5, (0 * torch.where(z < 0.5, z, 1.0)).sqrt(), 0.0))

    start = Init(lambda site: torch.full((), next(values)), scale=1e-9)
    values = iter([0.0] + [1.0] * 8)
    with pytest.warns(UserWarning, match="1 of 1 rows met a non-finite"):
        ShortRunGuide(kink, num_steps=2, step_size=StepSize(0.01), start=start)()


def pointed(fn: Callable[[], Any]) -> Callable[[], None]:
    def model() -> None:
        w = pyro.sample("w", fn())
        pyro.sample("x", dist.Normal(w, 1.0).to_event(w.dim()), obs=torch.zeros(w.shape))

    return model


@pytest.mark.parametrize(
    "fn",
    [
        lambda: dist.Delta(torch.tensor(2.0)),
        lambda: dist.Delta(torch.zeros(3)).to_event(1),
        lambda: dist.Delta(torch.tensor(2.0)).expand([3]).to_event(1),
        lambda: dist.Uniform(1.0, 1.0, validate_args=False),
        lambda: dist.Uniform(torch.zeros(2), torch.tensor([1.0, 0.0]), validate_args=False).to_event(1),
    ],
)
@pytest.mark.parametrize("way", ["draws", "adjusted chains"])
def test_latents_that_take_one_value_only_are_refused_by_name(fn, way):
    with pytest.raises(ValueError, match=r"latent site 'w'.*one value only.*pyro.deterministic"):
        HANDED_OUT[way](lambda y: pointed(fn)(), torch.zeros(1))
