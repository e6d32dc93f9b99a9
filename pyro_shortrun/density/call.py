"""One call of a model: its arguments bound, its shapes read from one run, its log density ready."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .model import LogDensity
from .program import Binding, Program, Reading
from .structure import read_structure
from .vectorize import map_chains


@dataclass(frozen=True)
class Call:
    """One call of the guide: the bound density and the forward run from which its shapes were read."""

    program: Program
    bind: Binding
    reading: Reading
    density: LogDensity
    spare: list[Reading] = field(default_factory=list)  # fresh draws from the prior, to be used once
    isolated: bool = False  # whether the model's parameters must not be reached by gradients

    @classmethod
    def of(
        cls,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        init: Callable[..., Any] | None = None,
    ) -> Call:
        """Bind ``model(*args, **kwargs)``, its structure read from one draw of the prior (or of ``init``)."""
        program = Program(model)
        reading = program.draw(args, kwargs, init=init)
        program.check(reading)
        bind = Binding(args, kwargs, reading.indices, {}, program.enum_dim(reading))
        density = LogDensity(program, read_structure(program, reading, bind), bind)
        return cls(program, bind, reading, density)

    def jointly(self) -> Call:
        """The same call with all latents in one row."""
        return replace(self, density=self.density.jointly(), spare=[])

    def replicate(self, draw: Callable[[], Any], chains: int, key: str) -> Any:
        """``draw()`` repeated independently along a new leading axis."""
        return map_chains(lambda _: draw(), (torch.arange(chains),), self.density.structure.vectorizes, key, draws=True)

    def prior(self, chains: int) -> Tensor:
        """Draws from the prior, ``(chains, rows, size)``."""
        layout = self.density.layout
        ready = [layout.pack(self.spare.pop().unconstrained).unsqueeze(0) for _ in self.spare[:chains]]
        if len(ready) < chains:
            ready.append(self.replicate(self.redraw, chains - len(ready), "prior"))
        return torch.cat(ready)

    def redraw(self) -> Tensor:
        """One more draw from the prior, ``(rows, size)``."""
        bind = self.bind
        again = self.program.draw(bind.args, bind.kwargs, bind.indices, bind.given)
        return self.density.layout.pack(again.unconstrained)
