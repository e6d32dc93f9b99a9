"""Effect handlers that put values into a Pyro program and read transforms off it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from pyro.infer.autoguide.initialization import InitMessenger, init_to_sample
from pyro.infer.autoguide.utils import helpful_support_errors
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _DIM_ALLOCATOR, _ENUM_ALLOCATOR
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution, Transform, biject_to, transform_to

from .holes import traceable
from .sites import Site, is_data, is_discrete, is_latent


def look_through_blocks(model: Callable[..., Any]) -> tuple[Callable[..., Any], list[Callable[[Site], bool]]]:
    """Rebuild ``model`` without its ``poutine.block`` wrappers and return what they hid.

    A guide for ``poutine.block(model, hide=...)`` is a guide for the visible sites, but the hidden ones are still
    part of the log density.
    """
    handler = getattr(model, "func", None)
    if not (isinstance(handler, partial) and len(handler.args) == 2):
        return model, []
    messenger, inner = handler.args
    if not isinstance(messenger, Messenger):
        return model, []
    inner, hidden = look_through_blocks(inner)
    if isinstance(messenger, BlockMessenger):
        return inner, [*hidden, lambda msg: bool(messenger.hide_fn(msg))]
    return messenger(inner), hidden


class Reader(Messenger):
    """Puts values into the latent sites, and keeps transforms and log-Jacobians.

    Exactly one of these at each latent: ``free`` (unconstrained values), ``bound`` (site values), or neither (the
    model draws it). With ``leaves``, bound values are taken to unconstrained space first, of whose values, leaves of
    autograd, the run then is a function.
    """

    def __init__(
        self,
        hidden: list[Callable[[Site], bool]],
        indices: Mapping[str, Tensor],
        given: Mapping[str, Tensor],
        free: Mapping[str, Tensor] | None = None,
        bound: Mapping[str, Tensor] | None = None,
        leaves: bool = False,
    ) -> None:
        super().__init__()
        self.leaves = leaves
        self.hidden, self.indices, self.given = hidden, indices, given
        self.free, self.bound = free, bound
        self.unconstrained: dict[str, Tensor] = {}
        self.transforms: dict[str, Transform] = {}

    def _is_hidden(self, msg: Site) -> bool:
        return any(hide(msg) for hide in self.hidden)

    def _pyro_sample(self, msg: Site) -> None:
        name = msg["name"]
        msg["fn"] = traceable(unvalidated(msg["fn"]))
        if site_is_subsample(msg):
            if msg["value"] is None and name in self.indices:
                msg["value"] = self.indices[name]
        elif msg["is_observed"]:
            return
        elif name in self.given:
            msg["value"], msg["is_observed"] = self.given[name], True
        elif self.free is not None and name in self.free:
            transform = self._transform(msg)
            self.unconstrained[name] = self.free[name]
            msg["value"] = transform(self.free[name])  # not "done": EnumMessenger must still see the site
        elif is_discrete(msg):
            if self._is_hidden(msg):
                msg["infer"] = {**msg["infer"], "enumerate": "parallel"}
        elif self.free is not None:
            raise ValueError(
                f"latent site '{name}' appeared in the middle of a run: the model's latent sites must not "
                "depend on the values of other sites."
            )
        elif self.bound is not None and name in self.bound:
            msg["value"] = self._leaf(msg) if self.leaves else self.bound[name]

    def _leaf(self, msg: Site) -> Tensor:
        name, transform = msg["name"], self._transform(msg)
        assert self.bound is not None
        leaf = transform.inv(self.bound[name].detach()).clone().requires_grad_()
        self.unconstrained[name] = leaf
        return transform(leaf)

    def _pyro_post_sample(self, msg: Site) -> None:
        known = self.free is not None or msg["name"] in self.unconstrained
        if not known and is_latent(msg) and not self._is_hidden(msg):
            value = msg["value"]
            with helpful_support_errors(msg):
                self.unconstrained[msg["name"]] = self._transform(msg).inv(value)

    def _transform(self, msg: Site) -> Transform:
        with helpful_support_errors(msg):
            transform = biject_to(msg["fn"].support)
        self.transforms[msg["name"]] = transform
        return transform


def unvalidated(fn: Any) -> Any:
    """A distribution that was built to check its values (before this run, as a module's priors are) without checks:
    they cost time in every step, and cannot be traced."""
    if not getattr(fn, "_validate_args", False):
        return fn
    fn = copy.copy(fn)
    fn._validate_args = False
    if isinstance(getattr(fn, "base_dist", None), Distribution):
        fn.base_dist = unvalidated(fn.base_dist)
    return fn


@contextmanager
def own_dims() -> Iterator[None]:
    """Pyro's allocators of plate and enumeration dims are global: start afresh, and give them back as they were."""
    plates, enumeration = _DIM_ALLOCATOR._stack, dict(vars(_ENUM_ALLOCATOR))
    _DIM_ALLOCATOR._stack = []
    try:
        yield
    finally:
        _DIM_ALLOCATOR._stack = plates
        vars(_ENUM_ALLOCATOR).clear()
        vars(_ENUM_ALLOCATOR).update(enumeration)


DRAWN = "_pyro_shortrun_drawn"


class Hold(Messenger):
    """Holds sites, of whatever kind, at values."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Site) -> None:
        if msg["name"] in self.values:
            msg["value"], msg["done"] = self.values[msg["name"]], True


class DrawDiscrete(Hold):
    """Besides, has discrete latents enumerated that are not held; the others are observed."""

    def _pyro_sample(self, msg: Site) -> None:
        if msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]  # not "done": EnumMessenger must still see the site
            msg["is_observed"] = not site_is_subsample(msg)
        elif not msg["is_observed"] and is_discrete(msg):
            msg["infer"] = {**msg["infer"], "enumerate": "parallel", DRAWN: True}


class Replicate(Hold):
    """Besides, draws data anew, in the shape that they were observed in."""

    def _pyro_sample(self, msg: Site) -> None:
        super()._pyro_sample(msg)
        if msg["name"] not in self.values and is_data(msg):
            batch = msg["fn"].batch_shape
            seen = torch.as_tensor(msg["value"]).shape
            wanted = torch.broadcast_shapes(batch, seen[: len(seen) - msg["fn"].event_dim])
            if wanted != batch:
                msg["fn"] = msg["fn"].expand(wanted)
            msg["value"], msg["is_observed"], msg["done"] = None, False, False


class Enumerate(EnumMessenger):
    """Pyro's, which reads shapes from ``value.data``; vmap forbids that."""

    def _pyro_post_sample(self, msg: Site) -> None:
        value = msg["value"]
        if isinstance(value, Tensor):
            msg["value"] = torch.empty((), device=value.device).expand(value.shape)
        super()._pyro_post_sample(msg)
        msg["value"] = value


def continuous_init(init: Callable[..., Any]) -> Messenger:
    """Continuous latents from ``init``, discrete ones from their prior."""
    return InitMessenger(lambda site: (init_to_sample if is_discrete(site) else init)(site))


def init_uniform(site: Any) -> Tensor:
    """Uniform on (-2, 2) in unconstrained space, as Pyro's ``init_to_uniform``, for improper priors too."""
    fn = site["fn"]
    try:
        transform = biject_to(fn.support)
    except NotImplementedError:  # a sphere, whose points a reparametrisation replaces
        transform = transform_to(fn.support)
    try:
        like = transform.inv(fn.sample())
    except NotImplementedError:  # an improper prior
        like = torch.empty(transform.inverse_shape(fn.shape()))
    value = transform(4 * torch.rand_like(like) - 2)
    value._pyro_custom_init = False  # so that a reparametrisation may replace it without a warning
    return value
