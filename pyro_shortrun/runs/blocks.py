"""Blocks of arrivals of any transition, and the way back through them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..density.interface import Density
from ..objectives.transition import Column, Transition
from ..tensors import keep_rows, mean_over


@dataclass(frozen=True)
class Advance:
    """A block of ``n`` arrivals: ``(*state, alive, pending, total, noise, *values, *constants, *tensors)`` to
    ``(*state, alive, pending, total, *report[, *states before])``, where ``pending`` is what the step on its way adds,
    and the report that of :class:`~pyro_shortrun.runs.steps.Report`.

    :param sizes: numbers of tensors in state, values and constants.
    :param taped: whether the way back will be asked for.
    :param graph: whether all of it stays in the graph of autograd.
    """

    bridge: Transition
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

    bridge: Transition
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
