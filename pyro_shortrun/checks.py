"""Checks of arguments, and of tensors that have several devices or dtypes."""

from __future__ import annotations

import inspect
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any

import pyro
from pyro.infer.autoguide import AutoGuide
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_LOGGER = logging.getLogger("pyro_shortrun")


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Refuse anything but a positive integer, or one of ``least`` at least."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}.")


def check_counts(name: str, values: Any) -> None:
    """Refuse anything but a sequence of positive integers."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"{name} must be a sequence of integers >= 1, got {values!r}.")
    for value in values:
        check_count(name, value)


def check_flags(**flags: Any) -> None:
    """Refuse anything but True and False, or None where that is a default."""
    for name, value in flags.items():
        if not isinstance(value, bool | None):
            raise ValueError(f"{name} must be True or False, got {value!r}.")


def check_function(name: str, value: Any, example: str) -> None:
    """Refuse what is given and cannot be called."""
    if value is not None and not callable(value):
        raise ValueError(f"{name} must be a function such as {example}, got {value!r}.")


def check_kind(name: str, value: Any, kind: type, example: str) -> None:
    """Refuse an argument that is given and not a ``kind``."""
    if value is not None and not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise ValueError(f"{name} must be {article} {kind.__name__} object such as {example}, got {value!r}.")


def check_between(name: str, value: Any, low: float, high: float, example: str) -> None:
    """Refuse anything but a number strictly between two others."""
    if isinstance(value, bool) or not isinstance(value, Real) or not low < float(value) < high:
        raise ValueError(f"{name} must be a number in ({low:g}, {high:g}), got {value!r}; try {example}.")


def check_share(name: str, value: Any, example: str) -> None:
    """Refuse anything but a number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise ValueError(f"{name} must be a number from 0 to 1, got {value!r}; try {example}.")


def check_weight(name: str, value: Any) -> None:
    """Refuse anything but a finite number that is not negative."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < math.inf:
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}.")


def check_model(model: Any) -> None:
    """Refuse what is no model: the result of calling one, or a guide where the two are swapped."""
    if not callable(model):
        raise ValueError(
            f"model must be a function with Pyro statements, got a {type(model).__name__}: pass the model itself and "
            "not model(...); its arguments come with every call."
        )
    if isinstance(model, AutoGuide):
        raise ValueError(f"model is a guide, {type(model).__name__}: the model comes first, (model, guide, *args).")


def is_silent(module: Any) -> bool:
    """Whether this is a module that cannot be called, such as a dynamics."""
    return isinstance(module, nn.Module) and type(module).forward is nn.Module.forward


def check_guide(guide: Any) -> None:
    """Refuse what is no guide: the class of one, or its draws."""
    if isinstance(guide, type) or not callable(guide) or is_silent(guide):
        raise ValueError(f"guide must be a guide of the model, such as AutoNormal(model), got {guide!r}.")


def explain(
    reason: Exception, model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], trace: Any
) -> None:
    """Raise what says more than what was raised in a run of the model, if more can be said.

    :param trace: of the run, as far as it went.
    """
    if isinstance(reason, TypeError):
        _explain_arguments(reason, model, args, kwargs)
    elif isinstance(reason, ZeroDivisionError) and "size cannot be zero" in str(reason):
        raise ValueError("a plate of the model has size 0: leave empty batches out.") from reason
    elif isinstance(reason, RuntimeError):
        _explain_kinds(reason, lambda: {**of_arguments(args, kwargs), **of_trace(trace)})


def _explain_arguments(
    reason: TypeError, model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Where the model cannot take its arguments, say whose they are; its own TypeErrors pass as they are."""
    try:
        inspect.signature(model).bind(*args, **kwargs)
    except TypeError:
        raise TypeError(
            f"{reason}. The model's own arguments come with every call: svi.step(*args), guide(*args), "
            "guide.sample_posterior(*args, num_samples=...), to_arviz(guide, *args), mcmc.run(*args)."
        ) from reason
    except ValueError:  # a callable without a signature
        pass


# What torch says of two devices (and of tensors without data, as modules built for loading have them), and of dtypes.
_SAYINGS = {
    "device": re.compile("same device|expected device|meta tensor"),
    "dtype": re.compile("same dtype|expected scalar type|can't be cast to the desired output type"),
}


@contextmanager
def one_kind(named: Callable[[], Mapping[str, Tensor]]) -> Iterator[None]:
    """Tell which tensors are of which device or dtype, where torch refuses to compute with those of two.

    Nothing is checked beforehand: a model may move what it is given, numbers may be anywhere, and sums are promoted.

    :param named: the tensors that are seen inside, by what a user calls them.
    :raises ValueError: in place of torch's RuntimeError.
    """
    try:
        yield
    except RuntimeError as reason:
        _explain_kinds(reason, named)
        raise


def _explain_kinds(reason: RuntimeError, named: Callable[[], Mapping[str, Tensor]]) -> None:
    kind = next((k for k, saying in _SAYINGS.items() if saying.search(str(reason))), None)
    if kind is None:
        return
    casts = "can't be cast" in str(reason)  # whole numbers where the density wants others
    real = [(k, t) for k, t in named().items() if kind == "device" or t.is_floating_point() or casts]
    places = {str(getattr(t, kind)): name for name, t in reversed(real)}
    found = ", ".join(f"{name} is {place}" for place, name in sorted(places.items()))
    cause = str(reason).splitlines()[0].rstrip(".!")
    raise ValueError(
        f"tensors of several {kind}s: {found} ({cause}). Let all data, modules and constants have one: "
        f"x.to({kind}), module.to({kind})."
    ) from reason


def of_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors in a call's arguments."""
    named = {**{f"argument {i}": v for i, v in enumerate(args)}, **{f"argument '{k}'": v for k, v in kwargs.items()}}
    leaves = {k: pytree.tree_leaves(v) for k, v in named.items()}
    return {k: leaf for k, found in leaves.items() for leaf in found if isinstance(leaf, Tensor)}


def of_trace(trace: Any) -> dict[str, Tensor]:
    """The values of a trace's parameters and sites."""
    words = {"param": "parameter", "sample": "site"}
    nodes = [(f"{words[n['type']]} '{k}'", n["value"]) for k, n in trace.nodes.items() if n["type"] in words]
    return {name: value for name, value in nodes if isinstance(value, Tensor)}


def of_module(owner: str, module: Any) -> dict[str, Tensor]:
    """A module's parameters; of any other function nothing is known."""
    if not isinstance(module, nn.Module):
        return {}
    return {f"{owner} parameter '{k}'": p for k, p in module.named_parameters()}


def check_unused(**modules: Any) -> None:
    """Refuse modules, by argument, whose parameters are another guide's, by their names in Pyro's store.

    :raises ValueError: naming the argument.
    """
    for name, module in modules.items():
        parts = module.modules() if isinstance(module, nn.Module) else ()
        if any(isinstance(m, PyroModule) and m._pyro_context.used for m in parts):
            kind = type(module).__name__
            raise ValueError(
                f"{name} is a {kind} that another guide has been called with, whose parameters it holds: make a {kind} "
                "for each guide."
            )


def warn_if_stored(guide: PyroModule) -> None:
    """Tell that a guide which is called for the first time has parameters in Pyro's store already."""
    prefix = f"{guide._pyro_name or type(guide).__name__}."
    if pyro.settings.get("module_local_params"):
        return
    if stored := [name for name in pyro.get_param_store().keys() if name.startswith(prefix)]:
        _LOGGER.warning(
            "this guide takes its parameters (%s) from Pyro's store, where another guide, or a state that was loaded, "
            "has left them. If that is not meant, call pyro.clear_param_store() before a new guide.",
            ", ".join(sorted(stored)[:3]) + (", ..." if len(stored) > 3 else ""),
        )
