"""Students of a teaching: steps of their SVIs, and the state that these steps change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pyro.infer import SVI
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from ..density.sites import Site


class Students:
    """What steps of SVIs change: the parameters that were met, buffers of modules, and optimisers.

    The SVIs come with every call, since a teaching's may be exchanged.
    """

    def __init__(self) -> None:
        self._parameters: dict[str, Tensor] = {}

    def step(self, svis: Sequence[SVI], x: Tensor, context: tuple[Any, ...]) -> float:
        """A step of each, and the sum of their losses."""
        total = 0.0
        for svi in svis:
            with _WatchParameters(self._parameters):
                loss = svi.step(x, *context)
            total += sum(loss) if isinstance(loss, tuple) else loss  # ReweightedWakeSleep has one for each phase
        return total

    def meet(self, svis: Sequence[SVI], x: Tensor, context: tuple[Any, ...]) -> None:
        """Create and note every parameter and buffer."""
        for svi in svis:
            with _WatchParameters(self._parameters):
                svi.evaluate_loss(x, *context)

    def state_dict(self, svis: Sequence[SVI]) -> dict[str, Any]:
        """What :meth:`load_state_dict` takes."""
        return {
            "parameters": {k: v.detach() for k, v in self._parameters.items()},
            "modules": [m.state_dict() for m in _modules(svis)],
            "optims": [o.get_state() for o in _optims(svis)],
        }

    def check(self, state: Mapping[str, Any]) -> None:
        """Refuse a state of other parameters."""
        wrong = set(state["parameters"]) ^ set(self._parameters)
        if wrong:
            raise ValueError(
                f"parameter '{sorted(wrong)[0]}' is in only one of the saved and the present students: call setup(x) "
                "before load_state_dict, with the same modules."
            )

    @torch.no_grad()
    def load_state_dict(self, svis: Sequence[SVI], state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        for module, saved in zip(_modules(svis), state["modules"], strict=True):
            module.load_state_dict(saved)
        for name, value in state["parameters"].items():
            self._parameters[name].copy_(value)
        for optim, saved in zip(_optims(svis), state["optims"], strict=True):
            optim.optim_objs.clear()  # Pyro gives a state to an optimiser when it first meets its parameter
            optim.set_state(dict(saved))


def several(name: str, svis: Any) -> tuple[SVI, ...]:
    """An SVI, or a sequence of some, as a tuple; students must be at least one."""
    found = (svis,) if isinstance(svis, SVI) else tuple(svis) if isinstance(svis, Sequence) else (svis,)
    wrong = [s for s in found if not isinstance(s, SVI)]
    if wrong or (name == "student" and not found):
        raise ValueError(f"{name} must be a pyro.infer.SVI(model, guide, optim, loss) or several, got {svis!r}.")
    return found


def _modules(svis: Sequence[SVI]) -> list[nn.Module]:
    found = [part for svi in svis for part in (svi.model, svi.guide)]
    return [part for part in dict.fromkeys(found) if isinstance(part, nn.Module)]


def _optims(svis: Sequence[SVI]) -> list[Any]:
    return list(dict.fromkeys(svi.optim for svi in svis))


class _WatchParameters(Messenger):
    """Takes note of the parameters that pass by."""

    def __init__(self, found: dict[str, Tensor]) -> None:
        super().__init__()
        self._found = found

    def _pyro_post_param(self, msg: Site) -> None:
        self._found[msg["name"]] = msg["value"].unconstrained()
