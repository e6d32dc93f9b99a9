"""Small tensors side by side in one: each that a loop carries, reads or writes costs time in every step."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

_SMALL = 2**13  # numbers


class Packing:
    """Tensors of one shape as one tensor, booleans as numbers where there are numbers of that shape.

    :param like: the tensors, without the dimension of the steps.
    """

    def __init__(self, like: Sequence[Tensor]) -> None:
        self._dtypes = [t.dtype for t in like]
        self._groups: list[list[int]] = []
        known: dict[tuple[object, ...], list[int]] = {}
        for i in sorted(range(len(like)), key=lambda i: like[i].dtype is torch.bool):  # after the numbers
            key = _group(like[i], known) or (i,)
            if key not in known:
                self._groups.append(known.setdefault(key, []))
            known[key].append(i)

    def pack(self, tensors: Sequence[Tensor], dim: int) -> list[Tensor]:
        """One tensor for each group, its members along ``dim``."""
        return [self._joined([tensors[i] for i in group], dim) for group in self._groups]

    def unpack(self, packed: Sequence[Tensor]) -> list[Tensor]:
        """The members again, from their first dimension."""
        found: dict[int, Tensor] = {}
        for group, whole in zip(self._groups, packed, strict=True):
            parts = whole.unbind(0)
            for i, part in zip(group, parts, strict=True):
                is_number = self._dtypes[i] is torch.bool and part.dtype is not torch.bool
                found[i] = part != 0 if is_number else part
        return [found[i] for i in range(len(found))]

    @staticmethod
    def _joined(tensors: list[Tensor], dim: int) -> Tensor:
        if len(tensors) == 1:
            return tensors[0].unsqueeze(dim)
        number = next((t.dtype for t in tensors if t.dtype is not torch.bool), torch.bool)
        return torch.stack([t.to(number) for t in tensors], dim)


def _group(t: Tensor, known: Collection[tuple[object, ...]]) -> tuple[object, ...] | None:
    """The key of those that ``t`` may be joined with: numbers of its kind; a boolean with any numbers. Strides stay: a
    graph may depend on them."""
    if t.numel() > _SMALL or not t.is_contiguous() or not (t.is_floating_point() or t.dtype is torch.bool):
        return None
    place = t.shape, t.device
    if t.dtype is torch.bool:
        return next((key for key in known if key[:2] == place), (*place, t.dtype))
    return *place, t.dtype
