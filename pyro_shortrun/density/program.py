"""Running a Pyro program under handlers: latents put in or drawn, transforms and log-Jacobians read off.

:class:`Program` is the model, looked at through its ``poutine.block`` wrappers. One forward run
(:meth:`Program.draw`) gives a :class:`Reading` from which a call's shapes, plates and subsample indices are known;
:meth:`Program.run` evaluates the model at given latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.discrete import infer_discrete
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Transform

from ..checks import check_model, explain
from .handlers import (
    DRAWN,
    DrawDiscrete,
    Enumerate,
    Reader,
    Replicate,
    continuous_init,
    look_through_blocks,
    own_dims,
)
from .sites import Site, is_discrete, plates_of
from .transforms import is_identity, log_jacobians


@dataclass(frozen=True)
class Frame:
    """A plate of the model as the guide has to make it."""

    name: str
    dim: int | None
    full_size: int
    is_subsampled: bool
    around_latents: bool


@dataclass(frozen=True)
class Reading:
    """One run of the model: its trace, and unconstrained values and transforms of the latents."""

    trace: Any  # poutine.Trace, whose nodes Pyro types as TypedDicts of optional entries
    unconstrained: dict[str, Tensor]
    transforms: dict[str, Transform]
    origin: Any = None  # the trace of the guide whose draw it is at, if it is at one's

    @property
    def latents(self) -> list[Site]:
        """Trace nodes of the continuous latents, in the order of the model."""
        return [self.trace.nodes[name] for name in self.unconstrained]

    @cached_property
    def is_real(self) -> bool:
        """Whether the support of every latent is all of space."""
        return all(is_identity(self.transforms[name]) for name in self.unconstrained)

    @property
    def indices(self) -> dict[str, Tensor]:
        """Subsample indices of every plate."""
        nodes = self.trace.nodes.items()
        return {k: s["value"] for k, s in nodes if s["type"] == "sample" and site_is_subsample(s)}

    @property
    def subsampled(self) -> dict[str, tuple[int, int]]:
        """Full size and batch size of the plates that draw their subsample at random."""
        plates = {k: (self.trace.nodes[k]["fn"], len(v)) for k, v in self.indices.items()}
        return {k: (int(fn.size), n) for k, (fn, n) in plates.items() if n < fn.size and fn.subsample_size is not None}

    @property
    def nesting(self) -> int:
        """Number of dims that the model's plates take."""
        sites = [s for s in self.trace.nodes.values() if s["type"] == "sample"]
        return max((-p.dim for s in sites for p in plates_of(s)), default=0)

    @property
    def frames(self) -> list[Frame]:
        """Every plate of the model, those without a dim (sequential) included."""
        around = {p.name: p.dim for s in self.latents for p in plates_of(s)}
        sites = [s for s in self.trace.nodes.values() if s["type"] == "sample"]
        dims = {p.name: p.dim for s in sites for p in plates_of(s)}
        out = []
        for name, index in self.indices.items():
            full = int(self.trace.nodes[name]["fn"].size)
            out.append(Frame(name, dims.get(name), full, len(index) < full, name in around))
        return out

    @property
    def signature(self) -> tuple[Any, ...]:
        """Everything that decides the structure of the density: names, shapes, plates, roles, devices, supports."""
        free = {k: (tuple(v.shape), v.dtype) for k, v in self.unconstrained.items()}
        return self.is_real, *(
            (name, bool(s["is_observed"]), tuple(s["fn"].batch_shape), plates_of(s), free.get(name))
            + (getattr(s["value"], "device", None), getattr(s["value"], "shape", None))
            for name, s in self.trace.nodes.items()
            if s["type"] == "sample" and not site_is_subsample(s)
        )

    @cached_property
    def log_jacobians(self) -> dict[str, Tensor]:
        """``log |dz/du|`` over the batch shape of each latent site whose transform is not the identity."""
        return log_jacobians(self.trace.nodes, self.transforms, self.unconstrained)


class Program:
    """A Pyro model, looked at through its ``poutine.block`` wrappers.

    :param model: any callable with Pyro primitives.
    :param enumerates: whether discrete latents are summed out without having been told to.
    """

    def __init__(self, model: Callable[..., Any], enumerates: bool = False) -> None:
        check_model(model)
        self._model, self._hidden = look_through_blocks(model)
        if enumerates:
            self._model = config_enumerate(self._model)
        self._shows = False

    @contextmanager
    def showing_parameters(self) -> Iterator[None]:
        """Let the model's ``pyro.param`` statements reach the handlers outside."""
        self._shows = True
        try:
            yield
        finally:
            self._shows = False

    @property
    def hides(self) -> bool:
        """Whether a ``poutine.block`` hides some of the sites."""
        return bool(self._hidden)

    def enum_dim(self, reading: Reading) -> int | None:
        """First dim for enumerated sites, or None where all latents are continuous."""
        sites = reading.trace.nodes.values()
        discrete = any(
            s["type"] == "sample" and not s["is_observed"] and not site_is_subsample(s) and is_discrete(s)
            for s in sites
        )
        return -1 - reading.nesting if discrete else None

    def draw(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        indices: Mapping[str, Tensor] | None = None,
        given: Mapping[str, Tensor] | None = None,
        init: Callable[..., Any] | None = None,
    ) -> Reading:
        """Run the model forwards: latents from the prior (or from a Pyro ``init_to_*`` function)."""
        bind = Binding(args, kwargs, indices or {}, given or {}, None)
        with pyro.validation_enabled(False):  # what is not finite is refused by name at the start of the run
            return self._read(bind, init)

    def at(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        indices: Mapping[str, Tensor],
        given: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
    ) -> Reading:
        """Run the model forwards with latents at site ``values``, as a function of their unconstrained values, which
        are leaves of autograd."""
        with pyro.validation_enabled(False), torch.enable_grad():
            return self._read(Binding(args, kwargs, indices, given, None), bound=values, leaves=True)

    def check(self, reading: Reading) -> None:
        """Refuse what short runs cannot infer.

        :raises ValueError: where a latent site is discrete and neither enumerated nor hidden, where another part of
            an ``AutoGuideList`` should have given a value, or where there is nothing to infer.
        :raises NotImplementedError: where a latent lies in a sequential plate.
        """
        for site in reading.trace.nodes.values():
            if site["type"] == "sample" and not site["is_observed"]:
                self._check(site)
        if not reading.unconstrained:
            raise ValueError(
                "the model has no continuous latent sites to infer; use an empty guide instead, "
                "or remove the handler that hides or observes them."
            )

    def _check(self, site: Site) -> None:
        name = site["name"]
        hidden = any(hide(site) for hide in self._hidden)
        if site_is_subsample(site):
            return
        for frame in site["cond_indep_stack"]:
            if frame.vectorized and frame.size < 0:
                raise ValueError(
                    f"plate '{frame.name}' around latent site '{name}' has no size, which short runs need to make rows "
                    f"of its elements: write pyro.plate('{frame.name}', size)."
                )
        if any(not f.vectorized for f in site["cond_indep_stack"]):
            raise NotImplementedError(
                f"latent site '{name}' lies in a sequential pyro.plate; write `with pyro.plate(...):` instead of "
                "`for i in pyro.plate(...)`."
            )
        if is_discrete(site):
            if not hidden and site["infer"].get("enumerate") != "parallel":
                raise ValueError(
                    f"latent site '{name}' is discrete: sum it out exactly with pyro.infer.config_enumerate(model) "
                    f"and TraceEnum_ELBO, or hide it with poutine.block(model, hide=['{name}'])."
                )
            if not site["fn"].has_enumerate_support:
                raise ValueError(
                    f"latent site '{name}' ({type(site['fn']).__name__}) has infinite support and cannot be "
                    "enumerated; marginalise it by hand or truncate it."
                )
        elif hidden:
            raise ValueError(
                f"latent site '{name}' is hidden by poutine.block but the log density needs its value: in an "
                "AutoGuideList append the part that samples it first, and call the list, not the part."
            )

    def bind(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], reading: Reading, given: Mapping[str, Tensor]
    ) -> Binding:
        """What a call fixes, whose first run is ``reading``."""
        return Binding(args, kwargs, reading.indices, given, self.enum_dim(reading))

    def run(self, bind: Binding, values: Mapping[str, Tensor], free: bool = True) -> Reading:
        """Run the model with latents at unconstrained values (``free``) or at site values."""
        return self._read(bind, free=values) if free else self._read(bind, bound=values)

    def simulate(self, bind: Binding, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the model forwards with its observations drawn anew, latents at ``values`` where given.

        :return: the value of every sample site but subsamples.
        """
        given = {**values, **bind.indices}
        tracer = poutine.trace()
        with own_dims(), poutine.block(), pyro.validation_enabled(False), tracer:
            with Replicate(given):
                self._model(*bind.args, **bind.kwargs)
        nodes = tracer.get_trace().nodes.items()
        return {k: s["value"] for k, s in nodes if s["type"] == "sample" and not site_is_subsample(s)}  # type: ignore

    def discrete(self, bind: Binding, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Draw the enumerated sites from their joint distribution given the other latents and the data."""

        def held(*args: Any, **kwargs: Any) -> None:
            with DrawDiscrete({**values, **bind.given, **bind.indices}):
                self._model(*args, **kwargs)

        tracer = poutine.trace()
        assert bind.enum_dim is not None
        with own_dims(), poutine.block(), pyro.validation_enabled(False), tracer:
            infer_discrete(held, first_available_dim=bind.enum_dim)(*bind.args, **bind.kwargs)
        sites: dict[str, Site] = tracer.get_trace().nodes
        return {k: s["value"] for k, s in sites.items() if s["type"] == "sample" and s["infer"].get(DRAWN)}

    def _read(
        self,
        bind: Binding,
        init: Callable[..., Any] | None = None,
        free: Mapping[str, Tensor] | None = None,
        bound: Mapping[str, Tensor] | None = None,
        leaves: bool = False,
    ) -> Reading:
        tracer = poutine.trace()
        shown = poutine.block(hide_types=["sample", "observe"]) if self._shows else poutine.block()
        enumerate_ = nullcontext() if bind.enum_dim is None else Enumerate(first_available_dim=bind.enum_dim)
        model = self._model if init is None else continuous_init(init)(self._model)
        reader = Reader(self._hidden, bind.indices, bind.given, free, bound, leaves)
        try:
            with own_dims(), shown, tracer, enumerate_, reader:
                model(*bind.args, **bind.kwargs)
        except (TypeError, ZeroDivisionError, RuntimeError) as reason:
            explain(reason, self._model, bind.args, bind.kwargs, tracer.trace)
            raise
        if free is not None and len(reader.unconstrained) < len(free):
            gone = next(name for name in free if name not in reader.unconstrained)
            raise ValueError(
                f"latent site '{gone}' disappeared in the middle of a run: the model's latent sites must not depend on "
                "the values of other sites."
            )
        return Reading(tracer.get_trace(), reader.unconstrained, reader.transforms)


@dataclass(frozen=True)
class Invocation:
    """The arguments of one call, from which its first run of the model is made: by :meth:`__call__`, latents drawn from
    the prior (or from a Pyro ``init_to_*`` function)."""

    program: Program
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    indices: Mapping[str, Tensor]
    given: Mapping[str, Tensor]

    def __call__(self, init: Callable[..., Any] | None = None) -> Reading:
        return self.program.draw(self.args, self.kwargs, self.indices, self.given, init)


@dataclass(frozen=True)
class Binding:
    """What one call fixes: model arguments, subsample indices, other parts' values, enumeration dims."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    indices: Mapping[str, Tensor]
    given: Mapping[str, Tensor]
    enum_dim: int | None
