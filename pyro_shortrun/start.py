"""Where a run starts: the prior, the last state of the same datum, or any Pyro guide."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import biject_to

from .base import Base, PriorBase
from .density import LogDensity
from .program import Binding, Program, Reading
from .structure import read_structure
from .vectorize import map_chains

_LOGGER = logging.getLogger("pyro_shortrun")


@dataclass(frozen=True)
class Call:
    """One call of the guide: the bound density and the forward run from which its shapes were read."""

    program: Program
    bind: Binding
    reading: Reading
    density: LogDensity
    spare: list[Reading] = field(default_factory=list)  # fresh draws from the prior, to be used once
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
        program.check(reading)
        bind = Binding(args, kwargs, reading.indices, {}, program.enum_dim(reading))
        density = LogDensity(program, read_structure(program, reading, bind), bind)
        return cls(program, bind, reading, density)

    def jointly(self) -> Call:
        """The same call with all latents in one row."""
        return replace(self, density=self.density.jointly(), spare=[])

    def replicate(self, draw: Callable[[], Any], chains: int, key: str) -> Any:
        """``draw()`` repeated independently along a new leading axis."""
        return map_chains(lambda _: draw(), (torch.arange(chains),), self.density.structure.vectorizes, key, draws=True)

    def prior(self, chains: int) -> Tensor:
        """Draws from the prior, ``(chains, rows, size)``."""
        layout = self.density.layout
        ready = [layout.pack(self.spare.pop().unconstrained).unsqueeze(0) for _ in self.spare[:chains]]
        if len(ready) < chains:
            ready.append(self.replicate(self.redraw, chains - len(ready), "prior"))
        return torch.cat(ready)

    def redraw(self) -> Tensor:
        """One more draw from the prior, ``(rows, size)``."""
        bind = self.bind
        again = self.program.draw(bind.args, bind.kwargs, bind.indices, bind.given)
        return self.density.layout.pack(again.unconstrained)


@dataclass(frozen=True)
class Drawn:
    """Start states ``(chains, rows, size)``, their log density and ``log pi`` there, ``(chains, rows)``, and their
    density everywhere, if it is known."""

    state: Tensor
    log_q: Tensor
    log_density: Tensor
    base: Base | None = None

    def every(self, count: int) -> Drawn:
        """Only the first of every ``count`` chains."""
        return replace(
            self, state=self.state[::count], log_q=self.log_q[::count], log_density=self.log_density[::count]
        )


class Start(ABC):
    """A distribution of ``u_0``.

    ``has_density`` tells whether ``log q_0`` is known, so that there is a bound to tune by.
    """

    has_density = True

    def setup(self, density: LogDensity) -> None:
        """Create what the start stores."""
        return None

    @abstractmethod
    def draw(self, call: Call, chains: int) -> Drawn:
        """Draw ``u_0`` for every row of every chain."""

    def finish(self, call: Call, end: Tensor) -> None:
        """Told the end of every training run."""
        return None


class Prior(Start):
    r"""Fresh draws from the model's own prior, for every run: the papers' start.

    ``log q_0(u) = log p(z(u)) + log |dz/du|`` over the latent sites alone; ``pyro.factor`` terms do not belong to it.
    Rows whose log density is not finite are drawn again (a logged warning says so once). The start is then the prior
    cut to where the model's density is finite while ``log q_0`` stays the prior's, so that the bound is too high by
    ``-log P(finite)`` per row.

    :param tries: how often a row is drawn again before the run is refused.
    :raises ValueError: at a call, for an improper prior, and where rows are not finite after all tries.
    """

    def __init__(self, tries: int = 20) -> None:
        self.tries = tries
        self._told = False

    def draw(self, call: Call, chains: int) -> Drawn:
        known = call.density.start_terms(call.spare[-1]) if chains == 1 and call.spare else None
        u = call.prior(chains)
        value, prior = known or call.density.with_start(u)
        first = bad = ~(value.isfinite() & prior.isfinite())
        for _ in range(self.tries):
            if not bad.any():
                break
            with torch.no_grad():
                again = torch.stack([call.redraw() if row.any() else one for row, one in zip(bad, u, strict=True)])
            u = torch.where(bad.unsqueeze(-1), again, u)
            value, prior = call.density.with_start(u)
            bad = ~(value.isfinite() & prior.isfinite())
        if first.any() and not bad.any():  # else the run is refused
            self._tell(int(first.sum()), first.numel())
        return Drawn(u, prior, value, PriorBase())

    def _tell(self, bad: int, rows: int) -> None:
        if not self._told:
            self._told = True
            _LOGGER.warning(
                "%d of %d start rows had no finite log density and were drawn again: the bound is too high by "
                "-log P(finite). Consider start=Init(init_to_median).",
                bad,
                rows,
            )


class Init(Start):
    r"""A Gaussian of fixed width around a Pyro initialisation: ``u_0 = init + scale * eps``.

    The initialisation is computed for every run; if it is random, ``log q_0`` is that given its draw.

    :param init_loc_fn: ``pyro.infer.autoguide.init_to_median`` or a sibling.
    :param scale: standard deviation in unconstrained space.
    :raises ValueError: where ``scale`` is not positive.
    """

    def __init__(self, init_loc_fn: Callable[..., Any], scale: float = 0.1) -> None:
        if not scale > 0:
            raise ValueError(f"scale must be > 0, got {scale!r}.")
        self.init_loc_fn, self.scale = init_loc_fn, scale

    def draw(self, call: Call, chains: int) -> Drawn:
        bind, layout = call.bind, call.density.layout

        def locate() -> Tensor:
            reading = call.program.draw(bind.args, bind.kwargs, bind.indices, bind.given, self.init_loc_fn)
            return layout.pack(reading.unconstrained)

        center = call.replicate(locate, chains, "init").detach()
        u = center + self.scale * torch.randn_like(center)
        log_q = torch.distributions.Normal(center, self.scale).log_prob(u)
        log_q = torch.where(_unmasked(call, u[0]), log_q, torch.zeros_like(log_q))
        if layout.arrow is not None:
            local = torch.arange(layout.size, device=u.device) >= layout.arrow.shared
            log_q = torch.where(local, layout.arrow.weight * log_q, log_q)
        return Drawn(u, log_q.sum(-1), call.density.eager(u))


class Persistent(nn.Module, Start):
    r"""Each datum's run starts where its last run ended; the first one starts at the prior.

    This is alternating back-propagation (Han, Lu, Zhu, Wu, AAAI 2017). The law of such a start is not known, so there
    is no bound: the loss that SVI prints is ``-log p(x, z_K)`` alone, and the step size stays as it is. In ``eval()``
    mode nothing is stored. States are kept by the indices of the plate that holds the latents.

    :param refresh: probability with which a row starts at the prior all the same.
    :raises ValueError: where ``refresh`` is not in ``[0, 1]``.
    """

    has_density = False
    store: Tensor
    visited: Tensor

    def __init__(self, refresh: float = 0.0) -> None:
        super().__init__()
        if not 0 <= refresh <= 1:
            raise ValueError(f"refresh is a probability, got {refresh!r}.")
        self.refresh = refresh

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in ("store", "visited"):  # before the first call, too
            saved = state_dict.get(prefix + name)
            if saved is not None and name not in self._buffers:
                self.register_buffer(name, torch.zeros_like(saved))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def setup(self, density: LogDensity) -> None:
        layout = density.layout
        if "store" in self._buffers:
            return
        if layout.arrow is not None and layout.arrow.weight != 1 or layout.unscalable is not None:
            raise NotImplementedError(
                "Persistent cannot keep the states of a subsampled model that also has latents outside the plate; "
                "use the full batch or Prior()."
            )
        count = 1 if layout.is_arrow else torch.Size(p.full_size for p in layout.row_plates).numel()
        dtype, device = density.structure.dtype, density.structure.device
        self.register_buffer("store", torch.zeros(count, layout.size, dtype=dtype, device=device))
        self.register_buffer("visited", torch.zeros(count, dtype=torch.bool, device=device))

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

    def draw(self, call: Call, chains: int) -> Drawn:
        index = self._index(call)
        fresh = call.prior(chains).detach()
        use = self.visited[index] & (torch.rand(chains, len(index), device=fresh.device) >= self.refresh)
        u = torch.where(use.unsqueeze(-1), self.store[index], fresh)
        value = call.density.eager(u)
        return Drawn(u, torch.zeros_like(value), value)

    def finish(self, call: Call, end: Tensor) -> None:
        if end.shape[0] != 1:
            raise NotImplementedError(
                "Persistent keeps one state per datum and cannot train with vectorised particles; use num_particles=1."
            )
        index = self._index(call)
        self.store[index] = end[0].detach()
        self.visited[index] = True


def init_uniform(site: Any) -> Tensor:
    """Uniform on (-2, 2) in unconstrained space, as Pyro's ``init_to_uniform``, for improper priors too."""
    fn = site["fn"]
    transform = biject_to(fn.support)
    try:
        like = transform.inv(fn.sample())
    except NotImplementedError:  # an improper prior
        like = torch.empty(transform.inverse_shape(fn.shape()))
    return transform(4 * torch.rand_like(like) - 2)


def _unmasked(call: Call, like: Tensor) -> Tensor:
    """Which coordinates of a row belong to latents that no ``poutine.mask`` takes out, ``(rows, size)``."""
    keep = {}
    for site, shape in zip(call.reading.latents, call.density.layout.sites, strict=True):
        mask = True if site["mask"] is None else site["mask"]
        batch = torch.as_tensor(mask, device=like.device).expand(shape.batch_shape)
        keep[shape.name] = batch.reshape((*shape.batch_shape, *((1,) * len(shape.event_shape)))).expand(shape.shape)
    return call.density.layout.pack(keep).bool()
