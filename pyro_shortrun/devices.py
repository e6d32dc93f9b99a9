"""Tensors on several devices, told by name instead of by torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

# What torch says of two devices; and of tensors without data, as modules built for loading have them.
_SEVERAL = re.compile("same device|expected device|meta tensor")


@contextmanager
def one_device(named: Callable[[], Mapping[str, Tensor]]) -> Iterator[None]:
    """Tell which tensors are on which device, where torch refuses to compute with those of two.

    Nothing is checked beforehand: a model may move what it is given, and numbers may be anywhere.

    :param named: the tensors that are seen inside, by what a user calls them.
    :raises ValueError: in place of torch's RuntimeError.
    """
    try:
        yield
    except (RuntimeError, NotImplementedError) as reason:
        if not _SEVERAL.search(str(reason)):
            raise
        places = {str(t.device): name for name, t in reversed(list(named().items()))}
        found = ", ".join(f"{name} is on {device}" for device, name in sorted(places.items()))
        cause = str(reason).splitlines()[0].rstrip(".!")
        raise ValueError(
            f"tensors on several devices: {found or 'nothing is known of them'} ({cause}). Move all data, modules and "
            "constants to one device: x.to(device), module.to(device)."
        ) from reason


def of_arguments(args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
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
