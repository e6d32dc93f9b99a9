"""A replay buffer as a start of runs in tilted priors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .arguments import check_count
from .density import LogDensity
from .start import Call, Drawn, Start


class Replay(nn.Module, Start):
    """Negative runs that go on where earlier ones ended, from a buffer of states; some begin at the prior.

    For priors that are the same for every row (no inputs of the row in it): states are drawn from the buffer whatever
    row they came from, and the oldest are replaced. For others use :class:`~pyro_shortrun.Persistent`. States are
    unconstrained, ``(size, coordinates of a row)``.

    Tieleman: Training restricted Boltzmann machines using approximations to the likelihood gradient, ICML 2008; Du,
    Mordatch: Implicit generation and modeling with energy-based models, NeurIPS 2019.

    :param size: number of states kept.
    :param refresh: probability with which a row starts at the prior all the same.
    :raises ValueError: where ``size`` is not a positive integer or ``refresh`` not in ``[0, 1]``, or where a row's
        number of coordinates changes between calls.
    """

    has_density = False
    store: Tensor
    written: Tensor

    def __init__(self, size: int = 10_000, refresh: float = 0.05) -> None:
        super().__init__()
        check_count("size", size)
        if not 0 <= refresh <= 1:
            raise ValueError(f"refresh is a probability, got {refresh!r}.")
        self.size, self.refresh = size, refresh
        self.register_buffer("written", torch.zeros((), dtype=torch.long))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        saved = state_dict.get(prefix + "store")  # before the first call, too
        if saved is not None and "store" not in self._buffers:
            self.register_buffer("store", saved.new_zeros(self.size, saved.shape[1]))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def setup(self, density: LogDensity) -> None:
        structure = density.structure
        if "store" not in self._buffers:
            self.register_buffer("store", torch.zeros(self.size, density.layout.size))
        self.store = self.store.to(dtype=structure.dtype, device=structure.device)
        if self.store.shape[1] != density.layout.size:
            raise ValueError(
                f"the replay buffer keeps rows of {self.store.shape[1]} coordinates and the model now has "
                f"{density.layout.size}: use one Replay() per model, and Prior() where latents outside the plate tie "
                "its elements into one row."
            )

    def draw(self, call: Call, chains: int) -> Drawn:
        u = fresh = call.prior(chains).detach()
        filled = min(int(self.written), self.size)
        if filled:
            index = torch.randint(filled, u.shape[:2], device=u.device)
            use = torch.rand(u.shape[:2], device=u.device) >= self.refresh
            u = torch.where(use.unsqueeze(-1), self.store[index], u)
        value = call.density.eager(u)
        lost = ~value.isfinite()
        if filled and lost.any():  # states that were fine for the energy as it was
            u = torch.where(lost.unsqueeze(-1), fresh, u)
            value = call.density.eager(u)
        return Drawn(u, torch.zeros_like(value), value)

    def finish(self, call: Call, end: Tensor) -> None:
        states = end.detach().flatten(0, 1)[-self.size :]
        index = (int(self.written) + torch.arange(len(states), device=states.device)) % self.size
        self.store[index] = states
        self.written += len(states)
