"""What a guide was trained on: the arguments of its calls, as long as they are always the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..density.program import Binding

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Memory:
    """The data of a guide, for calls that have none.

    Those of its training calls, or where there were none of all calls. The posterior given one mini-batch of many is
    none that anybody wants: where they differ from call to call, nothing is known.
    """

    def __init__(self) -> None:
        self._known: Arguments | None = None
        self._is_trained = self._differs = False

    def note(self, bind: Binding, training: bool) -> None:
        """Told of a call with data."""
        self.note_arguments((bind.args, bind.kwargs), training)

    def note_arguments(self, arguments: Arguments, training: bool = True) -> None:
        """The same of its arguments."""
        if training and not self._is_trained:
            self._known, self._is_trained, self._differs = arguments, True, False
        elif training == self._is_trained and not self._differs:
            if self._known is not None and not _are_equal(self._known, arguments):
                self._known, self._differs = None, True
            else:
                self._known = arguments

    @property
    def known(self) -> Arguments | None:
        """The arguments of all such calls, or None."""
        return self._known


def _are_equal(one: Any, other: Any) -> bool:
    leaves, structure = pytree.tree_flatten(one)
    others, its_structure = pytree.tree_flatten(other)
    return structure == its_structure and all(map(_is_equal, leaves, others))


def _is_equal(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.device == other.device and one.dtype == other.dtype and torch.equal(one, other)
    numbers = (bool, int, float, str, type(None))
    return isinstance(one, numbers) and isinstance(other, numbers) and one == other
