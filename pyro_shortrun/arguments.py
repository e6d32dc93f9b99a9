"""Checks of single arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any

from pyro.infer.autoguide import AutoGuide


def check_count(name: str, value: Any) -> None:
    """Refuse anything but a positive integer."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}.")


def check_kind(name: str, value: Any, kind: type, example: str) -> None:
    """Refuse an argument that is given and not a ``kind``."""
    if value is not None and not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise ValueError(f"{name} must be {article} {kind.__name__} object such as {example}, got {value!r}.")


def check_between(name: str, value: Any, low: float, high: float, example: str) -> None:
    """Refuse anything but a number strictly between two others."""
    if isinstance(value, bool) or not isinstance(value, Real) or not low < float(value) < high:
        raise ValueError(f"{name} must be a number in ({low:g}, {high:g}), got {value!r}; try {example}.")


def check_model(model: Any) -> None:
    """Refuse what is no model: the result of calling one, or a guide where the two are swapped."""
    if not callable(model):
        raise ValueError(
            f"model must be a function with Pyro statements, got a {type(model).__name__}: pass the model itself and "
            "not model(...); its arguments come with every call."
        )
    if isinstance(model, AutoGuide):
        raise ValueError(f"model is a guide, {type(model).__name__}: the model comes first, (model, guide, *args).")


@contextmanager
def arguments_of(model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Where the model cannot take its arguments, say whose they are; its own TypeErrors pass as they are."""
    try:
        yield
    except TypeError as reason:
        try:
            inspect.signature(model).bind(*args, **kwargs)
        except TypeError:
            raise TypeError(
                f"{reason}. The model's own arguments come with every call: svi.step(*args), guide(*args), "
                "guide.sample_posterior(*args, num_samples=...), to_arviz(guide, *args), mcmc.run(*args)."
            ) from reason
        except ValueError:  # a callable without a signature
            pass
        raise
