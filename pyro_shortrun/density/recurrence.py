"""How a block of several steps is one step several times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Recurrence:
    """What the inputs and outputs of a block of ``n`` steps are to its single steps.

    Inputs are ``carry`` tensors that go from step to step, ``columns`` with an entry for each step, ``(n, ...)``, and
    those that are the same for all. Outputs are the carry, ``firsts`` of the first step alone, columns, and ``sums``
    over the steps.

    :param backwards: whether the last entry comes first.
    """

    carry: int
    columns: int
    firsts: int = 0
    sums: int = 0
    backwards: bool = False

    def split(self, inputs: Sequence[Tensor]) -> tuple[Tensors, Tensors, Tensors]:
        """Carry, columns, and what all steps share."""
        end = self.carry + self.columns
        return tuple(inputs[: self.carry]), tuple(inputs[self.carry : end]), tuple(inputs[end:])

    def parts(self, outputs: Sequence[Tensor]) -> tuple[Tensors, Tensors, Tensors, Tensors]:
        """Carry, firsts, columns and sums."""
        firsts, end = self.carry + self.firsts, len(outputs) - self.sums
        return (
            tuple(outputs[: self.carry]),
            tuple(outputs[self.carry : firsts]),
            tuple(outputs[firsts:end]),
            (tuple(outputs[end:])),
        )

    def steps(self, columns: Sequence[Tensor]) -> list[int]:
        """Indices of the steps, in the order in which they are taken."""
        count = range(len(columns[0]))
        return list(reversed(count) if self.backwards else count)

    def repeat(self, step: Callable[..., Tensors], inputs: Sequence[Tensor]) -> Tensors:
        """What the block gives, by calling it for one step after another."""
        carry, columns, fixed = self.split(inputs)
        found = []
        for k in self.steps(columns):
            out = self.parts(step(*carry, *(t[k : k + 1] for t in columns), *fixed))
            carry = out[0]
            found.append(out[1:])
        _, stacked, sums = zip(*found, strict=True)
        ordered = stacked[::-1] if self.backwards else stacked
        joined = (torch.cat(parts) for parts in zip(*ordered, strict=True))
        return *carry, *found[0][0], *joined, *(torch.stack(parts).sum(0) for parts in zip(*sums, strict=True))
