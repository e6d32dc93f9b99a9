"""Chains as a batch dimension: one function over the leading axis of its inputs, by ``torch.func.vmap``."""

from __future__ import annotations

import logging
import math
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_LOGGER = logging.getLogger(__name__)
_FAILURES = (RuntimeError, NotImplementedError, ValueError, AttributeError, TypeError)
_LIBRARIES = tuple(str(Path(str(f)).parent) for f in (torch.__file__, pyro.__file__, __file__))


def map_chains(
    fn: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    vectorizes: dict[str, bool],
    key: str = "density",
    draws: bool = False,
) -> Any:
    """``fn`` (to a tensor or a tuple of tensors) over the leading axis of ``inputs``.

    By ``vmap``, or one after the other where an operation cannot be vectorised; which of the two is remembered in
    ``vectorizes[key]``.

    :param draws: whether ``fn`` draws random numbers, differently in each call.
    """
    if len(inputs[0]) > 1 and vectorizes.get(key, True):
        try:
            with _RandomOutOfPlace() if draws else nullcontext():
                return _vmap(fn, inputs)
        except _FAILURES as reason:
            vectorizes[key] = False
            _LOGGER.info("chains run one after the other, since vmap failed: %s", reason)
    each = [fn(*one) for one in zip(*inputs, strict=True)]
    return tuple(map(torch.stack, zip(*each, strict=True))) if isinstance(each[0], tuple) else torch.stack(each)


def require_vmap(fn: Callable[..., Any], inputs: tuple[Tensor, ...]) -> None:
    """Refuse a model that ``vmap`` cannot take.

    :raises NotImplementedError: naming the operation, and the model's line if there is one.
    """
    try:
        _vmap(fn, inputs)
    except _FAILURES as reason:
        raise NotImplementedError(
            f"the model cannot be vectorised over chains{_place(reason)}: {_operation(reason)} "
            "Replace the operation by one on whole tensors (torch.where for a branch, no .item()), or run one chain "
            "after the other with pyro.infer.MCMC(kernel, num_chains=...)."
        ) from reason


def _vmap(fn: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Any:
    with pyro.validation_enabled(False), warnings.catch_warnings():
        # torch itself loops over an operation without a batching rule, and says so.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        # torch.binomial resizes its output under vmap.
        warnings.filterwarnings("ignore", message="An output with one or more elements was resized")
        return torch.func.vmap(fn, randomness="different")(*inputs)


class _RandomOutOfPlace(TorchFunctionMode):
    """Draws of ``tensor.normal_()`` and its like, for which vmap has no rule, as new tensors.

    torch.distributions uses what these methods return. A caller that went on with the old tensor would find NaN there,
    which every start and every log density is checked for.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        draw = _DRAWS.get(func)
        if draw is None or not args[0].is_floating_point():
            return func(*args, **(kwargs or {}))
        old, *params = args
        new = draw(old, *params, **(kwargs or {}))
        old.detach().fill_(torch.nan)
        return new


def _normal(like: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    return mean + std * torch.randn_like(like)


def _uniform(like: Tensor, a: float = 0.0, b: float = 1.0) -> Tensor:
    return a + (b - a) * torch.rand_like(like)


def _cauchy(like: Tensor, median: float = 0.0, sigma: float = 1.0) -> Tensor:
    return median + sigma * (math.pi * (torch.rand_like(like) - 0.5)).tan()


def _exponential(like: Tensor, lambd: float = 1.0) -> Tensor:
    return -(-torch.rand_like(like)).log1p() / lambd


_DRAWS: dict[Any, Callable[..., Tensor]] = {
    torch.Tensor.normal_: _normal,
    torch.Tensor.uniform_: _uniform,
    torch.Tensor.cauchy_: _cauchy,
    torch.Tensor.exponential_: _exponential,
}


def _place(reason: BaseException) -> str:
    """The innermost line of the traceback that is the user's."""
    frames = [f for f in traceback.extract_tb(reason.__traceback__) if not f.filename.startswith(_LIBRARIES)]
    if not frames:
        return ""
    last = frames[-1]
    where = f"({Path(last.filename).name}:{last.lineno})"
    return f" at `{last.line}` {where}" if last.line else f" in `{last.name}` {where}"  # code of exec has no lines


def _operation(reason: BaseException) -> str:
    text = str(reason).strip().split("\n")[0]
    return text if text.endswith(".") else f"{text}."
