"""One optimiser for all parameters: moves them as Pyro's, one for each, does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from torch.nn import Parameter

from pyro_shortrun.guides.together import Together

OPTIMISERS: dict[str, Callable[[], Any]] = {
    "Adam": lambda: pyro.optim.Adam({"lr": 0.1, "betas": (0.8, 0.9)}),
    "amsgrad": lambda: pyro.optim.Adam({"lr": 0.1, "amsgrad": True}),
    "AdamW": lambda: pyro.optim.AdamW({"lr": 0.1, "weight_decay": 0.1}),
    "momentum": lambda: pyro.optim.SGD({"lr": 0.1, "momentum": 0.9}),
    "ClippedAdam": lambda: pyro.optim.ClippedAdam({"lr": 0.1, "clip_norm": 0.5}),
    "clipped": lambda: pyro.optim.Adam({"lr": 0.1}, {"clip_norm": 0.5}),
    "RMSprop": lambda: pyro.optim.RMSprop({"lr": 0.1}),
    "by name": lambda: pyro.optim.Adam(lambda name: {"lr": 0.1 if name == "a" else 0.01}),
    "momentum in cycles": lambda: pyro.optim.OneCycleLR(
        {"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.1, "momentum": 0.9}, "max_lr": 0.3, "total_steps": 20}
    ),
    "schedule": lambda: pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.5}
    ),
}


def moved(make: Callable[[], Any], together: bool, renewed: bool = False) -> tuple[list[torch.Tensor], set[str]]:
    """Parameters after some steps towards 0, the third of which appears on the way, and the names in the state."""
    pyro.clear_param_store()
    for name, value in {"a": [1.0, -2.0], "b": [3.0], "c": [0.5, 0.5, 0.5]}.items():
        pyro.param(name, torch.tensor(value))
    params: list[Parameter] = [pyro.get_param_store()._params[name] for name in "abc"]
    optim = make()
    step = Together(optim) if together else optim
    for i in range(9):
        shown = params if i >= 3 else params[:2]
        for p in shown:
            p.grad = (p.detach() + 0.1 * i).sin()
        step(set(shown))
        if i >= 5 and hasattr(optim, "step"):
            optim.step()
        if i == 6 and renewed:
            state, optim = optim.get_state(), make()
            optim.set_state(state)
            step = Together(optim) if together else optim
    return [p.detach().clone() for p in params], set(optim.get_state())


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("renewed", [False, True], ids=["one", "renewed"])
def test_parameters_and_state_are_those_of_pyro(name, renewed):
    if renewed and name in ("schedule", "momentum in cycles"):
        pytest.skip("a schedule's state is not that of its optimiser alone")
    (found, ours), (known, theirs) = (moved(OPTIMISERS[name], t, renewed) for t in (True, False))
    for a, b in zip(found, known, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert ours == theirs == {"a", "b", "c"}


def test_torch_is_called_once():
    optim = pyro.optim.Adam({"lr": 0.1})
    step, params = Together(optim), [pyro.param(name, torch.ones(2)) for name in "ab"]
    for _ in range(2):
        for p in params:
            p.grad = torch.ones(2)
        step(set(params))
    assert step._joint is not None and step._joint.param_groups[0]["fused"]
    assert all(optim.optim_objs[p].state[p] is step._joint.state[p] for p in params)
