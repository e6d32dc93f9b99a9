"""Runs in a prior: how many steps, of what dynamics, from where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from pyro import poutine
from torch import Tensor

from ..checks import check_between, check_count, check_kind
from ..density.call import Call
from ..dynamics.acceptance import Acceptance
from ..dynamics.dynamics import Dynamics
from ..dynamics.langevin import Langevin
from ..dynamics.step_size import StepSize
from ..objectives.path import PathDensity
from ..runs.record import ShortRun
from ..runs.run import run
from ..starts.finite import require_finite
from ..starts.from_guide import as_start
from ..starts.prior import Prior
from ..starts.start import Start, check_start

_STEPS = 40
_STEP_SIZE = 0.1
_OBJECTIVE = PathDensity()  # one, as compiled graphs are known by it; nothing is accounted for


@dataclass(frozen=True)
class PriorRuns:
    r"""How runs in a prior are made, for whatever makes some: training, draws, scores, diagnostics.

    A short run is not a converged one: an energy learnt with 40 steps of 0.1 is the one that makes *these* runs right,
    so that what is done with a trained model wants the runs that it was trained with.

    >>> runs = PriorRuns(num_steps=20, step_size=0.05)
    >>> runs.num_steps
    20

    :param num_steps: steps of a run.
    :param step_size: ``eta`` of ``u + eta * grad + sqrt(2 * eta) * eps``, 0.1 by default; recipes with :math:`s^2/2`
        have ``eta = s ** 2 / 2`` (their s = 0.4 is 0.08).
    :param dynamics: instead of ``step_size``; it is not tuned.
    :param start: where runs start: :class:`~pyro_shortrun.Prior` (default, fresh for every call),
        :class:`~pyro_shortrun.starts.Replay`, :class:`~pyro_shortrun.Persistent` or a guide.
    :param accept: let the step size follow this acceptance of one Langevin step, in the training of an
        :class:`~pyro_shortrun.EnergyELBO` (:class:`~pyro_shortrun.dynamics.Acceptance`); None for a step that stays.
        The same object then makes the runs of the trained model.
    :raises ValueError: for arguments out of range, and for both ``step_size`` and ``dynamics``.
    """

    num_steps: int = _STEPS
    step_size: float | None = None
    dynamics: Dynamics | None = None
    start: Start | Callable[..., Any] | None = None
    accept: float | None = None

    def __post_init__(self) -> None:
        if self.accept is not None:
            check_between("accept", self.accept, 0, 1, "0.75")
        check_count("num_steps", self.num_steps)
        check_start(self.start)
        if self.dynamics is not None and self.step_size is not None:
            raise ValueError("pass step_size or dynamics, not both: Langevin(step_size) is the default dynamics.")
        check_kind("dynamics", self.moves, Dynamics, "Langevin(0.1)")  # which refuses a step size out of range
        if self.moves.has_momentum:
            kind = type(self.moves).__name__
            raise ValueError(f"{kind} is for guides with objective=Annealed(); runs in a prior take Langevin(0.1).")

    @classmethod
    def of(cls, runs: PriorRuns | None, **parts: Any) -> PriorRuns:
        """``runs``, or those of the ``parts`` that are not None.

        :raises ValueError: where both are given.
        """
        check_kind("runs", runs, PriorRuns, "PriorRuns(num_steps=40, step_size=0.1)")
        given = {k: v for k, v in parts.items() if v is not None}
        if runs is None:
            return cls(**given)
        if given:
            raise ValueError(f"pass runs or {next(iter(given))}, not both: runs=PriorRuns(...) has all four of them.")
        return runs

    @cached_property
    def moves(self) -> Dynamics:
        """The dynamics given, or that of the step size."""
        if self.dynamics is not None:
            return self.dynamics
        return Langevin(StepSize(_STEP_SIZE if self.step_size is None else self.step_size, learnable=False))

    @cached_property
    def begins(self) -> Start:
        """The start given, guides as such, or the prior."""
        return as_start(Prior() if self.start is None else self.start)

    @cached_property
    def _acceptance(self) -> Acceptance | None:
        return None if self.accept is None else Acceptance(self.accept)

    def follow(self, call: Call, end: Tensor, count: int) -> None:
        """Told where the ``count``-th runs of a training ended, ``(chains, rows, size)``."""
        if self._acceptance is not None and self._acceptance.is_due(count):
            with poutine.block():
                self._acceptance.adapt(call.density, end, self.moves, self.num_steps)

    def make(self, call: Call, chains: int) -> ShortRun:
        """``chains`` runs of every row, without graphs; nothing that is learnable shows to Pyro.

        :raises ValueError: where a start is not finite, naming the site.
        """
        return self.go_on(call, *self.begin(call, chains))

    @torch.no_grad()
    def begin(self, call: Call, chains: int) -> tuple[Tensor, Tensor]:
        """Where runs begin, ``(chains, rows, size)``, and their step sizes, ``(num_steps, size)``."""
        layout, like = call.density.layout, next(iter(call.reading.unconstrained.values()))
        with poutine.block():
            self.begins.setup(call.density)
            self.moves.step_size.setup(layout, self.num_steps, like)
            self.moves.setup(like)
            eta = cast(Tensor, self.moves.step_size(layout, self.num_steps)).detach()
            drawn = self.begins.draw(call, chains)
            require_finite(
                drawn.log_density.isfinite(),
                call.model,
                drawn.state,
                "the prior's log density is not finite at the start of a run",
                "the energies may have diverged; lower their learning rate, or set EnergyELBO(l2=...)",
            )
            call.density.expect(drawn.state, drawn.log_density)
            return drawn.state, eta.to(like)

    @torch.no_grad()
    def go_on(self, call: Call, state: Tensor, eta: Tensor) -> ShortRun:
        """Runs from a state with these step sizes."""
        with poutine.block():
            return run(call.density, self.moves, _OBJECTIVE, state, eta, account=False)
