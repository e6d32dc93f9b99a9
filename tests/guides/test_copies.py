"""``copy.deepcopy`` of guides: the same model, parameters of its own; averaged models and snapshots."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pytest
import torch
from programs import data, local
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_shortrun import Annealed, LangevinEncoderGuide, Persistent, Prior, SemiImplicitGuide, ShortRunGuide, StepSize

GUIDES: dict[str, Callable[[], Any]] = {
    "path": lambda: ShortRunGuide(local, num_steps=2, step_size=StepSize(0.05), start=Prior()),
    "annealed": lambda: ShortRunGuide(
        local, num_steps=2, step_size=StepSize(0.05), objective=Annealed(), start=AutoNormal(local)
    ),
    "persistent": lambda: ShortRunGuide(local, num_steps=2, step_size=StepSize(0.05), start=Persistent()),
    "semi-implicit": lambda: SemiImplicitGuide(local, num_mixtures=2),
    "encoder": lambda: LangevinEncoderGuide(local, lambda x: torch.eye(len(x))),
}


@pytest.fixture(autouse=True)
def local_parameters() -> Iterator[None]:
    """Otherwise the copy's names find the original's values in Pyro's store."""
    with pyro.settings.context(module_local_params=True):
        yield


@pytest.mark.parametrize("when", ["new", "set up"])
@pytest.mark.parametrize("kind", GUIDES)
def test_a_copy_is_the_same_guide(kind, when):
    x, guide = data(), GUIDES[kind]()
    if when == "set up":
        guide(x)
    twin = copy.deepcopy(guide)
    draws = []
    for one in (guide, twin):
        pyro.set_rng_seed(3)
        draws.append(one(x)["z"])
    torch.testing.assert_close(*draws)
    assert twin.model is guide.model and twin.median(x)["z"].shape == x.shape


@pytest.mark.parametrize("kind", ["path", "annealed", "semi-implicit"])
def test_a_copy_has_parameters_of_its_own(kind):
    """A snapshot stays as it is while the guide is trained; the copy can be trained as well."""
    x, guide = data(), GUIDES[kind]().setup(data())
    snapshot = copy.deepcopy(guide)
    before = {k: v.clone() for k, v in guide.state_dict().items()}
    train(guide, x)
    assert any(not torch.equal(v, before[k]) for k, v in guide.state_dict().items())
    for k, v in snapshot.state_dict().items():
        torch.testing.assert_close(v, before[k])
    train(snapshot, x)
    assert any(not torch.equal(v, before[k]) for k, v in snapshot.state_dict().items())


def train(guide: Any, x: torch.Tensor) -> None:
    optimiser = torch.optim.Adam(guide.parameters(), lr=0.1)
    Trace_ELBO().differentiable_loss(local, guide, x).backward()
    optimiser.step()


def test_averaged_models():
    x, guide = data(), GUIDES["path"]().setup(data())
    averaged = torch.optim.swa_utils.AveragedModel(guide)
    averaged.update_parameters(guide)
    assert averaged(x)["z"].shape == x.shape


def test_a_copy_keeps_its_data():
    x = data()
    guide = GUIDES["path"]().condition_on(x)
    assert copy.deepcopy(guide).sample_posterior(num_samples=2)["z"].shape == (1, 2, len(x))
