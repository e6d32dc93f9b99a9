"""Data of a model's own, and the model on them, with its parameters held fixed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from ..density.call import Call
from ..density.handlers import init_uniform
from ..density.program import Program
from ..density.sites import is_data
from ..density.structure import check_proper
from ..density.vectorize import map_chains

Values = Mapping[str, Tensor]


class Simulator:
    """Latents and data of a model, and the model conditioned on them."""

    def __init__(self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        reading = Program(model).draw(args, kwargs, init=init_uniform)  # improper priors, too
        check_proper(reading)
        nodes = reading.trace.nodes.items()
        sites = {k: s for k, s in nodes if s["type"] == "sample" and not site_is_subsample(s)}
        _check_simulable(sites)
        self.call = Call.of(model, args, kwargs)
        self.latents = {k: s for k, s in sites.items() if not s["is_observed"]}
        self.observed = {k: s["value"] for k, s in sites.items() if is_data(s)}
        if not self.observed:
            raise ValueError("the model observes nothing with these arguments: call sbc(model, posterior, *data).")

    @torch.no_grad()
    def draw(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Values of latents, and of data."""
        values = self.call.program.simulate(self.call.bind, {})
        return {k: values[k] for k in self.latents}, {k: values[k] for k in self.observed}

    def conditioned(self, data: Values) -> Callable[..., Any]:
        """The model with these data, whatever its ``obs=`` are."""
        return poutine.condition(self.model, data=dict(data))

    def arguments(self, data: Values) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The model's arguments, with these data for those tensors that a site observes as they are."""
        new = {id(old): data[k] for k, old in self.observed.items() if data[k].shape == torch.as_tensor(old).shape}
        return _replaced(self.args, new), _replaced(self.kwargs, new)

    @torch.no_grad()
    def check_arguments(self, truth: Values, data: Values) -> None:
        """Refuse a model that is another one where its arguments are the simulated data.

        :raises ValueError: where the density changes with them.
        """
        args, kwargs = self.arguments(data)
        values = {k: truth[k] for k in (s.name for s in self.call.density.layout.sites)}
        u = self.call.model.unconstrain(values).unsqueeze(0)
        density = replace(self.call.model, program=Program(self.conditioned(data)))
        moved = replace(density, bind=replace(density.bind, args=args, kwargs=kwargs))
        before, after = density(u).sum(), moved(u).sum()
        if (before - after).abs() > 1e-3 * (1 + before.abs()) or after.isfinite() != before.isfinite():
            raise ValueError(
                "the model uses its data for more than obs=: its density changes where simulated data replace an "
                "argument. Go on with what pyro.sample returns, and pass what the prior is made of as another argument."
            )

    @torch.no_grad()
    def log_likelihood(self, data: Values, values: Values) -> Tensor:
        """``log p(data | values)``, ``(draws,)``."""
        names = [s.name for s in self.call.density.layout.sites]
        density = replace(self.call.model, program=Program(self.conditioned(data)))

        def unconstrain(*one: Tensor) -> Tensor:
            return density.unconstrain(dict(zip(names, one, strict=True)))

        u = map_chains(unconstrain, tuple(values[k] for k in names), density.structure.vectorizes, "unconstrain")
        joint, prior = density.with_start(u)
        return (joint - prior).sum(-1)


def _replaced(value: Any, new: Mapping[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return new[id(value)].to(value) if id(value) in new else value
    if type(value) is dict:
        return {k: _replaced(v, new) for k, v in value.items()}
    return type(value)(_replaced(v, new) for v in value) if type(value) in (list, tuple) else value


def _check_simulable(sites: Mapping[str, Any]) -> None:
    for name, site in sites.items():
        if isinstance(site["fn"], Unit):
            raise ValueError(
                f"'{name}' is a pyro.factor (or an energy): running the model does not simulate from what it says. "
                "Write it as a distribution, or take it out of the model that is calibrated."
            )
        if (torch.as_tensor(site["scale"]) != 1).any():
            raise ValueError(
                f"site '{name}' lies in poutine.scale or a subsampled plate: what the model draws is not what its "
                "density says. Calibrate without the scale, on a full plate."
            )


class _Fixed(Messenger):
    """Keeps the model's parameters at the values they have when first seen, out of every optimiser's sight."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, Tensor] = {}
        self.gradients: dict[int, tuple[nn.Parameter, Tensor | None]] = {}

    def _pyro_param(self, msg: Any) -> None:
        msg["stop"] = True
        if msg["name"] in self.values:
            msg["value"], msg["done"] = self.values[msg["name"]], True
        leaf = msg["args"][1] if len(msg["args"]) > 1 else None
        if (
            isinstance(leaf, nn.Parameter) and id(leaf) not in self.gradients
        ):  # a module uses its own, and gets gradients
            self.gradients[id(leaf)] = leaf, leaf.grad
            leaf.grad = None

    def _pyro_post_param(self, msg: Any) -> None:
        self.values.setdefault(msg["name"], msg["value"].detach().clone())
        msg["value"] = self.values[msg["name"]]


@contextmanager
def fixed_parameters(model: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """The model with fixed parameters."""
    handler = _Fixed()
    with as_it_is(pyro.get_param_store()):
        try:
            yield handler(model)
        finally:
            for leaf, gradient in handler.gradients.values():
                leaf.grad = gradient


@contextmanager
def as_it_is(store: Any) -> Iterator[None]:
    """Pyro's parameter store at the end as at the beginning: the same tensors, with the same values."""
    values = {k: v.detach().clone() for k, v in store.get_state()["params"].items()}
    try:
        with store.scope(store.get_state()):
            yield
    finally:
        with torch.no_grad():
            for name, value in store.get_state()["params"].items():
                if not torch.equal(value, values[name]):
                    value.copy_(values[name])
