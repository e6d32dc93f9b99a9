"""Functions that are differentiable in their inputs alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


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
