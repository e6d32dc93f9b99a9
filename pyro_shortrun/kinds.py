"""Tensors of several devices or dtypes, told by name instead of by torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

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
        kind = next((k for k, saying in _SAYINGS.items() if saying.search(str(reason))), None)
        if kind is None:
            raise
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
