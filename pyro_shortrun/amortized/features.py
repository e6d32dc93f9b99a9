"""Features of an encoder: what they must be, and those of a call's rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..checks import of_arguments, of_module, one_kind
from ..density.call import Call


def check_features(features: Any, like: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse features that are no ``(*shape, width)`` tensor of the states' kind.

    :param like: a tensor of the states' dtype and device.
    """
    if not isinstance(features, Tensor):
        raise ValueError(f"features must return a tensor, got {type(features).__name__}.")
    if features.dim() != len(shape) + 1:
        raise ValueError(
            f"features must return a tensor of shape {(*shape, 'width')}, a vector for each independent row, got "
            f"{tuple(features.shape)}: flatten them, or take the mean over what is no row."
        )
    if (features.dtype, features.device) != (like.dtype, like.device):
        raise ValueError(
            f"features are {features.dtype} on {features.device} but the latents are {like.dtype} on {like.device}: "
            "cast the features' net, or the data, or the latents' distributions."
        )


def check_width(rows: int, width: int) -> None:
    """Refuse fewer features than rows."""
    if width < rows:
        raise ValueError(
            f"features have width {width} for {rows} rows: a linear map of fewer features than rows cannot move the "
            "rows independently, so that posteriors of some would collapse. Use wider features (width >= rows), or "
            "smaller batches."
        )


def features_of(call: Call, encoder: Callable[..., Tensor], trains: bool) -> Tensor:
    """``g`` of the call's rows, ``(rows, d)``; those of the batch where the encoder gives the full plate's.

    :param trains: whether their graph is wanted.
    """
    args, kwargs = call.bind.args, call.bind.kwargs
    told = one_kind(lambda: {**of_arguments(args, kwargs), **of_module("the features'", encoder)})
    with torch.set_grad_enabled(trains), told:
        features = encoder(*args, **kwargs)
    structure, plates = call.density.structure, call.density.layout.row_plates
    like = torch.empty((), dtype=structure.dtype, device=structure.device)
    check_features(features, like, tuple(p.size for p in plates))
    for axis, plate in enumerate(plates):
        if features.shape[axis] == plate.full_size != plate.size:
            features = features.index_select(axis, call.bind.indices[plate.name].to(features.device))
        if features.shape[axis] != plate.size:
            raise ValueError(
                f"features must return a tensor with {plate.size} rows along plate '{plate.name}' (or "
                f"{plate.full_size}, for the full plate), got shape {tuple(features.shape)}."
            )
    return features.flatten(0, len(plates) - 1)
