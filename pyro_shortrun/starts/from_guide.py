"""Any Pyro guide as the start of a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.infer.autoguide import AutoDiagonalNormal, AutoGuide, AutoGuideList, AutoMultivariateNormal, AutoNormal
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from ..checks import check_guide
from ..density.call import Call
from ..density.handlers import Hold
from ..density.program import Invocation, Reading
from ..density.rows import sum_to_rows
from ..density.sites import is_discrete, masked, plates_of
from ..tensors import isolate, random_state, set_random_state
from .base import GaussianBase
from .start import Start, StartDraw

_LOGGER = logging.getLogger("pyro_shortrun")


class FromGuide(Start):
    """Adapter that lets any Pyro guide over the same sites be a start (an ``AutoGuide``, an encoder).

    Like any guide, it should mask what the model masks (``poutine.mask``). One that fixes latents (``AutoDelta``, a
    ``Delta`` without a density) has none, which is known from the first draw on.

    :param guide: a callable with the model's arguments.
    :param everywhere: whether the density is wanted everywhere, and not at draws only, of guides that are no AutoGuide:
        it is known where the sites are the latents, are real, and are Normal independently of each other.
    """

    is_learned = True

    def __init__(self, guide: Callable[..., Any], everywhere: bool = False) -> None:
        check_guide(guide)
        self._guide, self._everywhere = guide, everywhere
        self._independent: bool | None = None  # whether no site depends on another, once that is known
        self._orders: dict[str, Any] = {}  # of the last layout
        self._fixes: str | None = None
        self._scored: str | None = None  # a site without a pathwise derivative
        self.is_known = False  # whether the guide has been looked at

    @property
    def has_density(self) -> bool:  # type: ignore[override]
        """Whether the guide fixes no latent at a point, as far as is known."""
        return self._fixes is None

    def look(self, call: Call) -> None:
        """Find out whether the guide has a density, if that is not known; leaves random numbers as they are."""
        if not self.is_known:
            state = random_state()
            with pyro.validation_enabled(False):
                self._trace(call)
            set_random_state(state)

    def require_density(self, what: str) -> None:
        """Refuse a point mass, after a draw.

        :raises NotImplementedError: naming a latent that is fixed.
        """
        if self._fixes is not None:
            raise NotImplementedError(
                f"the guide fixes latent site '{self._fixes}' at a point (a Delta, as AutoDelta makes them), which has "
                f"no density, and so there is no {what}: pass AutoNormal(model), say."
            )

    def require_pathwise(self, what: str) -> None:
        """Refuse a guide whose draws are no differentiable function of its parameters, after a draw.

        :raises NotImplementedError: naming a site.
        """
        if self._scored is not None:
            raise NotImplementedError(
                f"the start guide's site '{self._scored}' is not reparametrised (its distribution has no rsample), and "
                f"{what} trains a start by the pathwise derivative: use Normal or another distribution with rsample."
            )

    def ahead(self, call: Invocation) -> Reading | None:
        """The call's first run of the model, at a draw from the guide, which :meth:`draw` then takes; None for guides
        whose density is known everywhere, and before the guide is known."""
        if not self.is_known or self._is_gaussian:
            return None
        trace = self._traced(call.args, call.kwargs, call.indices)
        sites = {k: s["value"] for k, s in trace.nodes.items() if s["type"] == "sample"}
        indices = {k: v for k, v in sites.items() if site_is_subsample(trace.nodes[k])}
        reading = call.program.at(call.args, call.kwargs, {**indices, **call.indices}, call.given, sites)
        return replace(reading, origin=trace)

    def draw(self, call: Call, chains: int) -> StartDraw:
        if chains > 1:  # vmap cannot ask for values
            self.look(call)
        base = self._gaussian(call)
        if base is None:
            was_real = call.model.structure.is_real
            drawn = self._draw(call, chains)
            return self._draw(call, chains) if was_real and not call.model.structure.is_real else drawn
        self.is_known = True
        u, terms = base.draw(chains)
        layout = call.density.layout
        log_q = (terms / layout.drift_scale(u) if layout.is_arrow else terms).sum(-1)
        return StartDraw(u, log_q, call.model(u.detach()), base)

    @property
    def _is_gaussian(self) -> bool:
        return isinstance(self._guide, (AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal))

    def _gaussian(self, call: Call) -> GaussianBase | None:
        """The guide's density in unconstrained space, where it is one of Pyro's Gaussian AutoGuides, or independent
        normals and wanted."""
        guide: Any = self._guide
        if any(s["mask"] is not None for s in call.reading.latents):
            return None
        if not self._is_gaussian:
            return self._normals(call) if self._everywhere else None
        layout = call.density.layout
        if isinstance(guide, AutoNormal):
            trace = self._trace(call)
            fns = {s.name: _innermost(trace.nodes[f"{s.name}_unconstrained"]["fn"]) for s in layout.sites}
            shapes = {s.name: s.shape for s in layout.sites}
            loc = layout.pack({k: fn.loc.expand(shapes[k]) for k, fn in fns.items()})
            return GaussianBase(loc, layout.pack({k: fn.scale.expand(shapes[k]) for k, fn in fns.items()}))
        order, is_in_order = self._order(call)
        fn = guide.get_posterior()
        if isinstance(guide, AutoDiagonalNormal):
            return GaussianBase(fn.base_dist.loc[order], fn.base_dist.scale[order])
        if not is_in_order:  # its factor would not be triangular
            return None
        return GaussianBase(fn.loc.unsqueeze(0), fn.scale_tril.unsqueeze(0))

    def _normals(self, call: Call) -> GaussianBase | None:
        """The density of an encoder with Normal sites, if it is one."""
        trace, layout = self._trace(call), call.density.layout
        nodes = {k: s for k, s in trace.nodes.items() if s["type"] == "sample" and not site_is_subsample(s)}
        fns = {k: _innermost(s["fn"]) for k, s in nodes.items()}
        normal = all(isinstance(fn, torch.distributions.Normal) for fn in fns.values())
        plain = call.model.structure.is_real and all(s["mask"] is None for s in nodes.values())
        if not (normal and plain and set(nodes) == {s.name for s in layout.sites}):
            return None
        if self._independent is None:
            self._independent = len(nodes) == 1 or not self._depends(call, nodes)
        if not self._independent:
            return None
        shapes = {s.name: s.shape for s in layout.sites}
        moments = ({k: getattr(fn, name).expand(shapes[k]) for k, fn in fns.items()} for name in ("loc", "scale"))
        return GaussianBase(*map(layout.pack, moments))

    def _depends(self, call: Call, nodes: Mapping[str, Any]) -> bool:
        """Whether the moments of some site are functions of another's value."""
        bind = call.bind
        with torch.enable_grad():
            held = {k: s["value"].detach().clone().requires_grad_() for k, s in nodes.items()}
            trace = self._traced(bind.args, bind.kwargs, {**bind.indices, **held})
            fns = [_innermost(trace.nodes[k]["fn"]) for k in nodes]
            total = torch.stack([fn.loc.sum() + fn.scale.sum() for fn in fns]).sum()
            if not total.requires_grad:
                return False
            found = torch.autograd.grad(total, list(held.values()), allow_unused=True)
        return any(g is not None for g in found)

    def _order(self, call: Call) -> tuple[Tensor, bool]:
        """Where each coordinate of the rows is in the flat latent of an AutoContinuous, ``(rows, size)``, and whether
        that is one row in the same order."""
        guide, layout = cast(Any, self._guide), call.density.layout
        if guide.prototype_trace is None:
            self._trace(call)  # creates its parameters
        if self._orders.get("layout") is not layout:
            flat = torch.arange(guide.latent_dim, dtype=torch.float64, device=guide.loc.device)
            values = {site["name"]: value for site, value in guide._unpack_latent(flat)}
            rows = layout.pack({s.name: values[s.name].reshape(s.shape) for s in layout.sites})
            is_in_order = len(rows) == 1 and bool((rows.diff() == 1).all())
            self._orders.update(layout=layout, order=(rows.long(), is_in_order))
        return self._orders["order"]

    def _hide_discrete(self, call: Call) -> None:
        """Let an AutoGuide that was not called yet leave out discrete sites, which are summed out."""
        guide: Any = self._guide
        nodes = call.reading.trace.nodes.items()
        free = {k: s for k, s in nodes if s["type"] == "sample" and not s["is_observed"] and not site_is_subsample(s)}
        names = [k for k, s in free.items() if is_discrete(s)]
        fresh = isinstance(guide, AutoGuide) and not isinstance(guide, AutoGuideList) and guide.prototype_trace is None
        if names and fresh:
            guide._model = (_hiding(guide.model, names),)

    def _traced(self, args: tuple[Any, ...], kwargs: dict[str, Any], indices: Mapping[str, Tensor]) -> Any:
        tracer = poutine.trace()
        with poutine.block(hide_fn=lambda msg: msg["type"] == "sample"), tracer:
            with Hold(indices), _told_divergence(self._guide):
                self._guide(*args, **kwargs)
        return tracer.get_trace()

    def _trace(self, call: Call) -> Any:
        self._hide_discrete(call)
        trace = self._traced(call.bind.args, call.bind.kwargs, call.bind.indices)
        _check_sites(call, trace)
        if not self.is_known:
            self.is_known, self._fixes, self._scored = True, _fixed(call, trace), _scored(trace)
            if self._fixes is not None:
                _LOGGER.warning(
                    "the start fixes latent site '%s' at a point: there is no density, hence no bound, and nothing "
                    "moves its parameters.",
                    self._fixes,
                )
        return trace

    def _draw(self, call: Call, chains: int) -> StartDraw:
        if chains == 1 and call.spare:
            trace = call.spare.pop().origin
            _check_sites(call, trace)
            u, log_q = (t.unsqueeze(0) for t in self._weighed(call, trace))
        else:
            u, log_q = call.replicate(lambda: self._weighed(call, self._trace(call)), chains, "start")
        return StartDraw(u, log_q, call.value(u.detach()))  # which notices a support that is not real after all

    def _weighed(self, call: Call, trace: Any) -> tuple[Tensor, Tensor]:
        """The draw of a trace in unconstrained space, ``(rows, size)``, and its log density, ``(rows,)``."""
        layout = call.density.layout
        names = [s.name for s in layout.sites]
        trace.compute_log_prob()
        values = [trace.nodes[name]["value"] for name in names]

        def to_state(*given: Tensor) -> tuple[Tensor, ...]:
            if call.model.structure.is_real:  # no need to run the model
                return layout.pack(dict(zip(names, given, strict=True))), given[0].new_zeros(layout.rows)
            u = call.model.unconstrain(dict(zip(names, given, strict=True)))
            return u, call.model.constrain(u.unsqueeze(0))[1][0]

        u, log_q = isolate(to_state, values, call.isolated)
        for name, site in trace.nodes.items():
            if site["type"] == "sample" and not site_is_subsample(site):
                log_q = log_q + self._rows(call, name, site)
        return u, log_q

    def splits(self, call: Call) -> bool:
        """Whether the guide's density is a product over rows, each of them drawn inside the rows' plates."""
        if self._gaussian(call) is not None:
            return True
        rows = {p.name for p in call.density.layout.row_plates}
        sites = [s for s in self._trace(call).nodes.values() if s["type"] == "sample" and not site_is_subsample(s)]
        return all(rows <= {p.name for p in plates_of(s)} for s in sites)

    @staticmethod
    def _rows(call: Call, name: str, site: Mapping[str, Any]) -> Tensor:
        layout = call.density.layout
        term, plates = masked(site["unscaled_log_prob"], site["mask"]), plates_of(site)
        inside = {p.name for p in layout.row_plates} <= {p.name for p in plates}
        if not inside and layout.row_weight != 1:
            raise NotImplementedError(
                f"the start guide samples '{name}' outside the subsampled plates of the model's latents; use a "
                "start that keeps the plates, such as AutoNormal(model, create_plates=...)."
            )
        if inside and layout.is_arrow:
            term = layout.plate_scale * term
        return sum_to_rows(layout, term, plates)


def _hiding(model: Any, names: list[str]) -> Any:
    """A model some of whose sites do not show, not even to the handler by which an AutoGuide finds where to begin."""
    handler = getattr(model, "func", None)
    messenger, inner = handler.args if isinstance(handler, partial) and len(handler.args) == 2 else (None, model)
    if isinstance(messenger, InitMessenger):
        return messenger(_hiding(inner, names))
    return poutine.block(model, hide=names)


def as_start(start: Start | Callable[..., Any]) -> Start:
    """A start as it is; any guide behind its adapter."""
    return start if isinstance(start, Start) else FromGuide(start)


@contextmanager
def _told_divergence(guide: Any) -> Iterator[None]:
    """Torch says no more than that some parameter of a distribution is not finite."""
    try:
        yield
    except ValueError as reason:
        named = guide.named_parameters() if isinstance(guide, nn.Module) else ()
        if bad := [name for name, p in named if not p.isfinite().all()]:
            raise ValueError(
                f"training has diverged: the start guide's parameters {bad[:3]} are not finite. Begin anew with a "
                "smaller step_size (as a number: it is then tried before the first step, and lowered) or learning rate."
            ) from reason
        raise


def _check_sites(call: Call, trace: Any) -> None:
    """Refuse a start that is another model's."""
    latents = {s["name"]: s["value"].shape for s in call.reading.latents}
    if missing := [name for name in latents if name not in trace.nodes]:
        raise ValueError(
            f"the start guide does not sample {missing}; it must sample every latent site of the model that "
            "ShortRunGuide infers: build it for the same model, start=AutoNormal(model)."
        )
    for name, shape in latents.items():
        found = trace.nodes[name]["value"].shape
        if len(found) < len(shape) or any(n not in (1, m) for n, m in zip(found[::-1], shape[::-1], strict=False)):
            raise ValueError(
                f"the start guide samples '{name}' in shape {tuple(found)}, the model in shape {tuple(shape)}: build "
                "it for the same model and data, start=AutoNormal(model)."
            )


def _fixed(call: Call, trace: Any) -> str | None:
    """A latent that the guide fixes at a point, if it does.

    Guides that draw elsewhere and leave a ``Delta`` at the latent (Pyro's AutoGuides, flows by hand) draw at least as
    many numbers there as the latents have coordinates.
    """
    free = call.reading.unconstrained
    nodes = {k: s for k, s in trace.nodes.items() if s["type"] == "sample" and not site_is_subsample(s)}
    points = [k for k in free if isinstance(_innermost(nodes[k]["fn"]), Delta)]
    elsewhere = [s for k, s in nodes.items() if k not in free and not s["is_observed"]]
    drawn = sum(s["value"].numel() for s in elsewhere if not _is_point(s["fn"]))
    wanted = sum(free[k].numel() for k in points if _is_point(nodes[k]["fn"]))
    return points[0] if drawn < wanted else None


def _scored(trace: Any) -> str | None:
    """A site that is drawn without a pathwise derivative, if there is one."""
    nodes = [(k, s) for k, s in trace.nodes.items() if s["type"] == "sample" and not site_is_subsample(s)]
    return next((k for k, s in nodes if not (s["is_observed"] or getattr(s["fn"], "has_rsample", True))), None)


def _is_point(fn: Any) -> bool:
    """Whether a distribution is a ``Delta`` that nobody gave a density."""
    fn = _innermost(fn)
    return isinstance(fn, Delta) and not bool(torch.as_tensor(fn.log_density).any())


def _innermost(fn: Any) -> Any:
    """A distribution without its ``Independent`` wrappers."""
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    return fn
