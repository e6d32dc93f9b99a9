"""One call of a model: its arguments bound, its shapes read from one run, its log density ready."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..tensors import isolate
from .interface import Density
from .layout import Layout
from .model import LogDensity
from .program import Binding, Program, Reading
from .recall import Recall
from .structure import Structure, read_structure
from .vectorize import map_chains


@dataclass(frozen=True)
class Call:
    """One call of a guide or kernel.

    ``model`` is the bound model, which is run wherever sites are read; ``density`` is what runs evaluate: the same, or
    what gives the same values in another way (compiled graphs).
    """

    model: LogDensity
    density: Density
    reading: Reading  # the forward run from which shapes were read
    spare: list[Reading] = field(default_factory=list)  # fresh draws from the start, to be used once
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
        return replace(Binder(program)(reading, args, kwargs), spare=[])

    @property
    def program(self) -> Program:
        """The model as a program."""
        return self.model.program

    @property
    def bind(self) -> Binding:
        """What the call fixes."""
        return self.model.bind

    def value(self, u: Tensor) -> Tensor:
        """``log pi(u)``, ``(chains, rows)``, by a run of the model where it is not known from one."""
        return self.density(u) if isinstance(self.density, Recall) else self.model(u)

    def jointly(self) -> Call:
        """The same call with all latents in one row."""
        layout = Layout(self.model.layout.sites, ())
        model = replace(self.model, structure=replace(self.model.structure, layout=layout, vectorizes={}))
        return replace(self, model=model, density=model, spare=[])

    def constrain(
        self, u: Tensor, isolated: bool, known: tuple[Tensor, ...] | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Site values at ``u`` and ``log |dz/du|``, with gradients to ``u`` only if ``isolated``.

        :param u: states at which a run has evaluated the model, so that it is known whether supports are real there.
        :param known: log-Jacobian and values without gradients, if they are known.
        """
        if self.model.structure.is_real:
            return self.model.layout.unpack(u), u.new_zeros(u.shape[:2])

        def flat(state: Tensor) -> tuple[Tensor, ...]:
            values, jacobian = self.model.constrain(state)
            return jacobian, *values.values()

        jacobian, *values = isolate(flat, [u], isolated, known)
        return dict(zip(self.model.structure.latents, values, strict=True)), jacobian

    def replicate(self, draw: Callable[[], Any], chains: int, key: str) -> Any:
        """``draw()`` repeated independently along a new leading axis."""
        return map_chains(lambda _: draw(), (torch.arange(chains),), self.model.structure.vectorizes, key, draws=True)

    def prior(self, chains: int) -> Tensor:
        """Draws from the prior, ``(chains, rows, size)``."""
        layout = self.model.layout
        ready = [layout.pack(self.spare.pop().unconstrained).unsqueeze(0) for _ in self.spare[:chains]]
        if len(ready) < chains:
            ready.append(self.replicate(self.redraw, chains - len(ready), "prior"))
        return torch.cat(ready)

    def redraw(self) -> Tensor:
        """One more draw from the prior, ``(rows, size)``."""
        bind = self.bind
        again = self.program.draw(bind.args, bind.kwargs, bind.indices, bind.given)
        return self.model.layout.pack(again.unconstrained)


class Binder:
    """Binds calls of one model; what the same sites, shapes and plates have in common is found out once."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._structures: dict[tuple[Any, ...], Structure] = {}

    def __call__(
        self,
        reading: Reading,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: Mapping[str, Tensor] | None = None,
        admit: Callable[[Structure], Structure] = lambda structure: structure,
    ) -> Call:
        """The call whose first run is ``reading``.

        :param given: values that sites are held at.
        :param admit: arranges rows as the caller takes them, or refuses.
        """
        self.program.check(reading)
        bind, signature = self.program.bind(args, kwargs, reading, given or {}), reading.signature
        if signature not in self._structures:
            self._structures[signature] = admit(read_structure(self.program, reading, bind))
        model = LogDensity(self.program, self._structures[signature], bind)
        return Call(model, model, reading, spare=[reading])
