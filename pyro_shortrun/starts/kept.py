"""Starts from where earlier runs ended: by datum (Persistent), or from a buffer (Replay)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_count, check_share
from ..density.call import Call
from ..density.interface import Density
from ..density.rows import sum_to_rows
from ..density.sites import is_data, plates_of
from ..density.structure import unscalable
from .start import Start, StartDraw


class Persistent(nn.Module, Start):
    r"""Each datum's run starts where its last run ended; the first one starts at the prior.

    This is alternating back-propagation (Han, Lu, Zhu, Wu, AAAI 2017). The law of such a start is not known, so there
    is no bound: the loss that SVI prints is ``-log p(x, z_K)`` alone. A step size that nobody gave follows the
    acceptance of one Langevin step (:class:`~pyro_shortrun.dynamics.Acceptance`); a ``StepSize`` stays as it is. In
    ``eval()`` mode nothing is stored.

    States are kept by the indices of the plate that holds the latents, ``pyro.plate(name, size, subsample=index)``.
    Where it has none (it is not subsampled), rows are told apart by their position, and data that are others than
    before are refused in training; in ``eval()`` mode they start at the prior. For data never seen,
    ``guide.sample_posterior(new_x, num_steps=40)`` makes longer runs from the prior.

    :param refresh: probability with which a row starts at the prior all the same.
    :raises ValueError: where ``refresh`` is not in ``[0, 1]``; in training, where rows without indices have other data
        than before.
    """

    has_density = False
    store: Tensor
    visited: Tensor
    marks: Tensor  # of each row's data; NaN where they are not known

    def __init__(self, refresh: float = 0.0) -> None:
        super().__init__()
        check_share("refresh", refresh, "0.05")
        self.refresh = refresh

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if prefix + "visited" in state_dict and prefix + "marks" not in state_dict:  # states of version 0.1.0
            visited = state_dict[prefix + "visited"]
            state_dict = {**state_dict, prefix + "marks": torch.full(visited.shape, math.nan, dtype=torch.float64)}
        for name in ("store", "visited", "marks"):  # before the first call, too
            saved = state_dict.get(prefix + name)
            if saved is not None and name not in self._buffers:
                self.register_buffer(name, torch.zeros_like(saved))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def setup(self, density: Density) -> None:
        layout = density.layout
        if "store" in self._buffers:
            return
        if layout.arrow is not None and layout.arrow.weight != 1 or unscalable(layout) is not None:
            raise NotImplementedError(
                "Persistent cannot keep the states of a subsampled model that also has latents outside the plate; "
                "use the full batch or Prior()."
            )
        count = 1 if layout.is_arrow else torch.Size(p.full_size for p in layout.row_plates).numel()
        dtype, device = density.structure.dtype, density.structure.device
        self.register_buffer("store", torch.zeros(count, layout.size, dtype=dtype, device=device))
        self.register_buffer("visited", torch.zeros(count, dtype=torch.bool, device=device))
        self.register_buffer("marks", torch.full((count,), math.nan, dtype=torch.float64, device=device))

    def _index(self, call: Call) -> Tensor:
        layout = call.density.layout
        if layout.is_arrow or not layout.row_plates:
            return torch.zeros(1, dtype=torch.long, device=self.store.device)
        index = torch.zeros((), dtype=torch.long, device=self.store.device)
        for plate in layout.row_plates:
            index = index.unsqueeze(-1) * plate.full_size + call.bind.indices[plate.name].to(index.device)
        index = index.reshape(-1)
        full = torch.Size(p.full_size for p in layout.row_plates).numel()
        if full != len(self.store):
            raise ValueError(
                f"Persistent keeps {len(self.store)} states but the plate now has {full} elements; build the "
                "plate over the whole data set with subsample_size, or use Prior() for new data."
            )
        return index

    def draw(self, call: Call, chains: int) -> StartDraw:
        index = self._index(call)
        fresh = call.prior(chains).detach()
        use = self.visited[index] & (torch.rand(chains, len(index), device=fresh.device) >= self.refresh)
        use = use & ~self._of_others(call, index)
        u = torch.where(use.unsqueeze(-1), self.store[index], fresh)
        value = call.model(u)
        return StartDraw(u, torch.zeros_like(value), value)

    def _of_others(self, call: Call, index: Tensor) -> Tensor:
        """Which rows are not to go on from their state, since that is the state of other data."""
        before, now = self.marks[index], _marks(call)
        changed = self.visited[index] & ~before.isnan() & ~now.isnan() & (before != now)
        if not (self.training and changed.any()):
            return changed
        names = ", ".join(f"'{p.name}'" for p in call.density.layout.row_plates)
        raise ValueError(
            f"the data of plate {names} are others than before, and Persistent tells its elements apart by position "
            "alone: they would go on from the chains of other data. Make the plate over the whole data set and pass it "
            "the indices of the batch, pyro.plate(name, size, subsample=index), or use Prior()."
        )

    def finish(self, call: Call, end: Tensor) -> None:
        if end.shape[0] != 1:
            raise NotImplementedError(
                "Persistent keeps one state per datum and cannot train with vectorised particles; use num_particles=1."
            )
        index = self._index(call)
        self.store[index] = end[0].detach()
        self.visited[index] = True
        self.marks[index] = _marks(call)


def _marks(call: Call) -> Tensor:
    """A number for the data of each row, ``(rows,)``; NaN where there are none, or where indices tell rows apart."""
    layout, nodes = call.density.layout, call.reading.trace.nodes
    total = torch.full((layout.rows,), math.nan, dtype=torch.float64, device=call.density.structure.device)
    data = [s for s in nodes.values() if is_data(s)]
    if not (data and layout.row_plates) or any(_has_indices(call, p.name) for p in layout.row_plates):
        return total
    total = torch.zeros_like(total)
    for site in data:
        value = torch.as_tensor(site["value"]).detach().to(total)
        width = site["fn"].event_dim
        weights = torch.arange(1, value.numel() + 1, device=total.device).to(total).cos().reshape(value.shape)
        term = (value * weights).flatten(value.dim() - width).sum(-1) if width else value * weights
        term = term.expand(torch.broadcast_shapes(term.shape, site["fn"].batch_shape))
        total = total + sum_to_rows(layout, term, plates_of(site))
    return total


def _has_indices(call: Call, plate: str) -> bool:
    index = call.bind.indices[plate]
    size = int(call.reading.trace.nodes[plate]["fn"].size)
    return len(index) < size or not index.equal(torch.arange(size, device=index.device))


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
        check_share("refresh", refresh, "0.05")
        self.size, self.refresh = size, refresh
        self.register_buffer("written", torch.zeros((), dtype=torch.long))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        saved = state_dict.get(prefix + "store")  # before the first call, too
        if saved is not None and "store" not in self._buffers:
            self.register_buffer("store", saved.new_zeros(self.size, saved.shape[1]))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def setup(self, density: Density) -> None:
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

    def draw(self, call: Call, chains: int) -> StartDraw:
        u = fresh = call.prior(chains).detach()
        filled = min(int(self.written), self.size)
        if filled:
            index = torch.randint(filled, u.shape[:2], device=u.device)
            use = torch.rand(u.shape[:2], device=u.device) >= self.refresh
            u = torch.where(use.unsqueeze(-1), self.store[index], u)
        value = call.model(u)
        lost = ~value.isfinite()
        if filled and lost.any():  # states that were fine for the energy as it was
            u = torch.where(lost.unsqueeze(-1), fresh, u)
            value = call.model(u)
        return StartDraw(u, torch.zeros_like(value), value)

    def finish(self, call: Call, end: Tensor) -> None:
        states = end.detach().flatten(0, 1)[-self.size :]
        index = (int(self.written) + torch.arange(len(states), device=states.device)) % self.size
        self.store[index] = states
        self.written += len(states)
