"""A second guide under the first one's names: whose parameters it has is told, and parts are not shared."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pyro
import pytest
from programs import data, local
from pyro.infer.autoguide import AutoNormal

from pyro_shortrun import Annealed, Langevin, Prior, SemiImplicitGuide, ShortRunGuide, StepSize

SECONDS: dict[str, Callable[[], Any]] = {
    "step size": lambda: ShortRunGuide(local, num_steps=2, step_size=StepSize(0.01), start=Prior()),
    "temperatures": lambda: ShortRunGuide(
        local, num_steps=2, step_size=StepSize(0.01, learnable=False), objective=Annealed(), start=Prior()
    ),
    "start": lambda: ShortRunGuide(
        local, num_steps=2, step_size=StepSize(0.01, learnable=False), start=AutoNormal(local)
    ),
    "semi-implicit": lambda: SemiImplicitGuide(local, num_mixtures=2),
}


@pytest.mark.parametrize("make", SECONDS, ids=SECONDS.keys())
def test_a_second_guide_tells_whose_parameters_it_has(make, caplog):
    x, new = data(), SECONDS[make]
    new().setup(x)
    assert not caplog.records
    new().setup(x)
    assert "pyro.clear_param_store()" in caplog.text and "from Pyro's store" in caplog.text
    caplog.clear()
    pyro.clear_param_store()
    new().setup(x)
    with pyro.settings.context(module_local_params=True):
        new().setup(x)
    assert not caplog.records


def test_a_copy_or_a_loaded_state_is_no_second_guide(caplog):
    x = data()
    guide = ShortRunGuide(local, num_steps=2, step_size=StepSize(0.01), start=Prior()).setup(x)
    pickle.loads(pickle.dumps(guide)).attach(local)(x)
    guide.load_state_dict(guide.state_dict())
    guide(x)
    assert not caplog.records


PARTS: dict[str, Callable[[], Any]] = {
    "step_size": lambda: StepSize(0.01),
    "dynamics": lambda: Langevin(0.01),
    "objective": Annealed,
}


@pytest.mark.parametrize("name", PARTS)
def test_a_part_of_a_guide_belongs_to_it(name):
    x, part = data(), PARTS[name]()
    ShortRunGuide(local, num_steps=2, **{name: part}, start=Prior())(x)
    with pytest.raises(ValueError, match=f"{name} is an? ?{type(part).__name__}.* for each guide"):
        ShortRunGuide(local, num_steps=2, **{name: part}, start=Prior())
