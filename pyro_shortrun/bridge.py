"""Runs whose log weight is more than a sum of log-determinants of their steps.

A :class:`Bridge` says what a run carries from one *arrival* to the next (see :mod:`pyro_shortrun.steps`) and what each
adds to the log weight; :class:`Advance` and :class:`Retreat` are blocks of arrivals and the way back through them, for
all bridges alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .potential import Density
from .rows import keep_rows, mean_over

State = tuple[Tensor, ...]


class Column(NamedTuple):
    """What one arrival is given: ``values`` are differentiated in, ``constants`` are not; ``noise`` is that of the step
    which begins here, ``(chains, rows, size)``."""

    values: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]
    noise: Tensor


class Bridge(ABC):
    """Arithmetic of arrivals.

    A state is ``(u, proposal, *others)``, each ``(chains, rows, ...)``: the last position that was reached, the one to
    be judged at the next arrival, and what else the run carries.

    ``offset`` is how many steps' noise :meth:`begin` takes; ``ends_at_arrival`` tells whether the end of the last
    step is an arrival too, so that there are ``K + 1``, and not ``K``.
    """

    offset = 0
    ends_at_arrival = False

    @property
    @abstractmethod
    def key(self) -> tuple[Any, ...]:
        """Everything that decides the arithmetic."""

    @property
    def learns(self) -> bool:
        """Whether :meth:`learn` is to be called."""
        return False

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Further tensors to be differentiated in, the same for all arrivals."""
        return ()

    def begin(self, density: Density, start: Tensor, step_size: Tensor, noise: Tensor) -> State:
        """The state before the first arrival, ``noise`` being that of the first step."""
        return start, start

    @abstractmethod
    def values(self, step_size: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
        """What every arrival is given and differentiated in, ``(arrivals, width)`` each, from ``(K, size)`` and
        ``(K,)``."""

    def constants(self, step_size: Tensor) -> tuple[Tensor, ...]:
        """What every arrival is given besides, ``(arrivals, ...)`` each."""
        return ()

    @abstractmethod
    def evaluate(
        self, density: Density, u: Tensor, tensors: tuple[Tensor, ...], create_graph: bool
    ) -> tuple[Tensor, ...]:
        """``log pi(u)``, its gradient, and what else :meth:`move` needs.

        :param u: requires gradients.
        """

    @abstractmethod
    def move(
        self, density: Density, state: State, found: Sequence[Tensor], column: Column
    ) -> tuple[State, Tensor | None]:
        """The next state, beginning with ``state[1]``, and what this arrival adds to the log weight, ``(chains,
        rows)``, if anything. ``found`` is from :meth:`evaluate`."""

    def departure(self, density: Density, noise: Tensor) -> Tensor | None:
        """What the step that begins with ``noise`` adds when it arrives, ``(chains, rows)``, if anything."""
        return None

    def finish(self, first: State, last: State, step_size: Tensor, log_q: Tensor | None) -> Tensor | None:
        """What first and last state add to the log weight, ``(chains, rows)``, if anything.

        :param last: its first element is the end of the run.
        :param log_q: log density of the start, ``(chains, rows)``.
        """
        return None

    def learn(self, states: State, last: State, valid: Tensor) -> None:
        """Told the states before all arrivals, ``(arrivals, chains, rows, ...)`` each, and the last one."""
        return None


@dataclass(frozen=True)
class Advance:
    """A block of ``n`` arrivals: ``(*state, alive, pending, total, noise, *values, *constants, *tensors)`` to
    ``(*state, alive, pending, total, *report[, *states before])``, where ``pending`` is what the step on its way adds,
    and the report that of :class:`~pyro_shortrun.steps.Report`.

    :param sizes: numbers of tensors in state, values and constants.
    :param taped: whether the way back will be asked for.
    :param graph: whether all of it stays in the graph of autograd.
    """

    bridge: Bridge
    sizes: tuple[int, int, int]
    taped: bool = False
    graph: bool = False

    @cached_property
    def key(self) -> tuple[Any, ...]:
        return "forward", self.bridge.key, self.taped

    def __call__(self, density: Density, *inputs: Tensor) -> tuple[Tensor, ...]:
        state, (alive, pending, total, noise), values, constants, tensors = _split(inputs, self.sizes, 4)
        reports, tapes = [], []
        for k in range(len(noise)):
            column = Column(tuple(t[k] for t in values), tuple(t[k] for t in constants), noise[k])
            tapes.append(state)
            with torch.enable_grad():
                u, x, *others = state
                if not (self.graph and x.requires_grad):
                    x = x.detach().requires_grad_()
                found = self.bridge.evaluate(density, x, tensors, create_graph=self.graph)
            with torch.set_grad_enabled(self.graph):
                if not self.graph:
                    x, found = x.detach(), tuple(t.detach() for t in found)
                moved, extra = self.bridge.move(density, (u, x, *others), found[1:], column)
                extra = pending if extra is None else pending + extra
                finite = found[0].isfinite() & extra.isfinite() & found[1].isfinite().all(-1)
                arrived = alive & finite.detach()
                state = tuple(keep_rows(arrived, a, b) for a, b in zip(moved, (u, u, *others), strict=True))
                total = total + torch.where(arrived, extra, torch.zeros_like(extra))
                leaving = self.bridge.departure(density, column.noise)
                pending = torch.zeros_like(total) if leaving is None else leaving
            alive, value, norm = arrived, found[0].detach(), found[1].detach().norm(dim=-1)
            reports.append((value, *(mean_over(t, arrived) for t in (value, norm, extra.detach()))))
        first, *columns = zip(*reports, strict=True)
        out = (*state, alive, pending, total, first[0], *map(torch.stack, columns))
        return (*out, *(torch.stack(t).detach() for t in zip(*tapes, strict=True))) if self.taped else out


@dataclass(frozen=True)
class Retreat:
    """The way back through a block of arrivals.

    ``(*cotangents of the state after it, that of the total, valid, *states before, noise, *values, *constants,
    *tensors)`` to cotangents of the state before it, of values, ``(n, width)`` each, and tensors, over ``valid`` rows.
    """

    bridge: Bridge
    sizes: tuple[int, int, int]

    @cached_property
    def key(self) -> tuple[Any, ...]:
        return "backward", self.bridge.key

    def __call__(self, density: Density, *inputs: Tensor) -> tuple[Tensor, ...]:
        width = self.sizes[0]
        back, (back_total, valid), inputs = inputs[:width], inputs[width : width + 2], inputs[width + 2 :]
        states, (noise,), values, constants, tensors = _split(inputs, self.sizes, 1)
        steps: list[tuple[Tensor, ...]] = []
        sums = tuple(torch.zeros_like(t) for t in tensors)
        for k in reversed(range(len(noise))):
            rows = states[0].shape[1:3]
            # Every row has its own copy of what rows share, so that a row that is not finite cannot spoil the others.
            shared = [t[k].expand(*rows, t.shape[-1]) for t in values]
            shared += [t.expand(rows[0], *t.shape) for t in tensors]
            leaves = [t.detach().clone().requires_grad_() for t in (*(s[k] for s in states), *shared)]
            state, rest = tuple(leaves[:width]), leaves[width:]
            column = Column(tuple(rest[: len(values)]), tuple(t[k] for t in constants), noise[k])
            with torch.enable_grad():
                _, *found = self.bridge.evaluate(density, state[1], tuple(rest[len(values) :]), create_graph=True)
                moved, extra = self.bridge.move(density, state, found, column)
                terms = [(b * m).sum() for b, m in zip(back, moved, strict=True)]
                if extra is not None:
                    terms.append((back_total * extra).sum())
                goal = torch.stack(terms).sum()
                grads = torch.autograd.grad(goal, leaves, materialize_grads=True)
            back, grads = grads[:width], grads[width:]
            steps.append(tuple(_kept(t, valid).sum((0, 1)) for t in grads[: len(values)]))
            sums = tuple(a + _kept(b, valid).sum(0) for a, b in zip(sums, grads[len(values) :], strict=True))
        return (*back, *(torch.stack(t[::-1]) for t in zip(*steps, strict=True)), *sums)


def _split(inputs: Sequence[Tensor], sizes: tuple[int, int, int], between: int) -> tuple[tuple[Tensor, ...], ...]:
    """State, ``between`` tensors, values, constants, and the rest."""
    parts, first = [], 0
    for size in (sizes[0], between, *sizes[1:]):
        parts.append(tuple(inputs[first : first + size]))
        first += size
    return *parts, tuple(inputs[first:])


def _kept(grad: Tensor, valid: Tensor) -> Tensor:
    """``grad`` of ``(chains, rows, ...)`` without what belongs to other rows or is not finite."""
    mask = valid.reshape(*valid.shape, *((1,) * (grad.dim() - 2)))
    return torch.where(mask & grad.isfinite(), grad, torch.zeros_like(grad))
