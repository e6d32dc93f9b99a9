"""The noise of a run: given, or drawn in parts of bounded size."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from ..dynamics.dynamics import Dynamics
from ..tensors import random_state, set_random_state

_NOISE_AT_ONCE = 2**20  # numbers drawn in one call


class Noise(ABC):
    """Standard normal noise of a run, handed out in blocks of steps from first to last, and again for the way back.

    ``is_whole`` tells whether all of it is in memory at once anyway.
    """

    is_whole = True

    @abstractmethod
    def block(self, first: int, count: int) -> Tensor:
        """Noise of ``count`` steps, ``(count, chains, rows, size)``."""


class GivenNoise(Noise):
    """Noise of all steps, ``(K, chains, rows, size)``."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def block(self, first: int, count: int) -> Tensor:
        return self.values[first : first + count]


class DrawnNoise(Noise):
    """Noise drawn by the dynamics for as many steps at once as are not too many numbers, so that memory is bounded.

    To give a block again, it draws it again from the state of torch's generator that it had.

    :param like: a state, ``(chains, rows, size)``.
    """

    def __init__(self, dynamics: Dynamics, num_steps: int, like: Tensor) -> None:
        self._dynamics, self._num_steps, self._like = dynamics, num_steps, like.detach()
        self._at_once = max(1, min(num_steps, _NOISE_AT_ONCE // max(like.numel(), 1)))
        self.is_whole = self._at_once >= num_steps
        self._generators: list[dict[str, Any]] = []
        self._chunk, self._values = -1, self._like

    def block(self, first: int, count: int) -> Tensor:
        parts = []
        while count:
            chunk, offset = divmod(first, self._at_once)
            part = self._of(chunk)[offset : offset + count]
            parts.append(part)
            first, count = first + len(part), count - len(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _of(self, chunk: int) -> Tensor:
        if chunk != self._chunk:
            size = min(self._at_once, self._num_steps - chunk * self._at_once)
            if chunk < len(self._generators):
                self._values = self._again(chunk, size)
            else:
                self._generators.append(random_state(self._like.device))
                self._values = self._dynamics.draw_noise(size, self._like)
            self._chunk = chunk
        return self._values

    def _again(self, chunk: int, size: int) -> Tensor:
        device = self._like.device
        now = random_state(device)
        set_random_state(self._generators[chunk], device)
        try:
            return self._dynamics.draw_noise(size, self._like)
        finally:
            set_random_state(now, device)
