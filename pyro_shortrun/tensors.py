"""Tensors: rows chosen and averaged over, gradients kept in, devices, states of random generators."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def keep_rows(rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``a`` in these rows, ``b`` in the others, whatever dimensions follow."""
    return torch.where(rows.reshape(*rows.shape, *((1,) * (a.dim() - rows.dim()))), a, b)


def isolate(
    fn: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    isolated: bool,
    known: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...]:
    """``fn(*inputs)``, differentiable in its inputs alone if ``isolated``.

    ``fn`` may hold the model's parameters, as a support that depends on them does.

    :param known: the result without gradients, if it is known.
    """
    if not isolated:
        return fn(*inputs)
    if any(t.requires_grad for t in inputs):
        return _InputOnly.apply(fn, known, *inputs)
    if known is not None:
        return known
    with torch.no_grad():
        return fn(*inputs)


class _InputOnly(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, fn: Callable[..., Any], known: tuple[Tensor, ...] | None, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.fn, ctx.inputs = fn, [t.detach().requires_grad_(t.requires_grad) for t in inputs]
        if known is None:
            with torch.no_grad():
                known = fn(*ctx.inputs)
        return tuple(t.detach().clone() for t in known)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        wanted = [t for t in ctx.inputs if t.requires_grad]
        with torch.enable_grad():
            pairs = [(t, g) for t, g in zip(ctx.fn(*ctx.inputs), grads, strict=True) if t.requires_grad]
        outs, back = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outs, wanted, back, materialize_grads=True))
        return None, None, *(next(found) if t.requires_grad else None for t in ctx.inputs)


def fresh(t: Tensor) -> Tensor:
    """A contiguous copy."""
    return t.clone(memory_format=torch.contiguous_format)


def apart(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same values; no two share memory."""
    seen: set[int] = set()
    found = []
    for t in tensors:
        memory = t.untyped_storage().data_ptr()
        found.append(fresh(t) if memory in seen else t)
        seen.add(memory)
    return found


def plain(value: Any) -> Any:
    """Inference-mode tensors cannot take part in autograd: copy them, and leave everything else as it is."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if type(value) is dict:
        copied: Any = {k: plain(v) for k, v in value.items()}
        return copied if any(copied[k] is not value[k] for k in value) else value
    if type(value) in (list, tuple):
        copied = type(value)(plain(v) for v in value)
        return copied if any(a is not b for a, b in zip(copied, value, strict=True)) else value
    return value


@contextmanager
def ordinary_autograd() -> Iterator[bool]:
    """Gradients work inside, whatever mode the caller is in; yields whether the caller wants them."""
    wanted = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        yield wanted


def moved(saved: Any, device: torch.device) -> Any:
    """Tensors in dicts and lists on another device: a file is read on the CPU."""
    return pytree.tree_map_only(Tensor, lambda t: t.to(device), saved)


def random_state(device: torch.device | None = None) -> dict[str, Any]:
    """States of the generators that draws on a device come from: torch's for the CPU, and the device's own.

    :param device: None for all generators: Python's and NumPy's too, and those of all devices in use, in types that
        ``torch.load(..., weights_only=True)`` reads.
    """
    state: dict[str, Any] = {"torch": torch.get_rng_state()}
    if device is not None:
        return {**state, "cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state
    kind, keys, *rest = np.random.get_state()
    state["python"], state["numpy"] = random.getstate(), (kind, torch.from_numpy(np.asarray(keys, np.int64)), *rest)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device | None = None) -> None:
    """Let the generators go on from :func:`random_state` of the same device.

    States of all devices are left alone where there now are more or fewer.
    """
    torch.set_rng_state(state["torch"])
    if "python" in state:
        random.setstate(state["python"])
    if "numpy" in state:
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    if "cuda" not in state:
        return
    if device is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    elif len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
