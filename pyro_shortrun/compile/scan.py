"""Loops in graphs: a block of steps as the graph of one step, and torch's ``scan`` of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan_op
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import (
    PythonKeyTracer,
    disable_proxy_modes_tracing,
    get_proxy_mode,
    track_tensor_tree,
)

from ..density.recurrence import Recurrence, Tensors
from .graph import Function, lifted


class Scan:
    """A block of steps, ``block(*inputs)``; its graph has that of a single step once.

    To be called in a trace. Of torch's ``scan`` only the operator is used: its own tracing wants a fake tensor for
    everything that a model reaches, and its derivatives are wrong under inductor in 2.13 (pytorch#153679).
    """

    def __init__(self, block: Function, recurrence: Recurrence) -> None:
        self._block, self._recurrence = block, recurrence

    def __call__(self, *inputs: Tensor) -> Tensors:
        recurrence = self._recurrence
        carry, columns, fixed = recurrence.split(inputs)
        begins = torch.zeros(len(columns[0]), 1, dtype=torch.bool, device=columns[0].device)
        begins[-1 if recurrence.backwards else 0] = True
        with disable_proxy_modes_tracing(), torch.no_grad():
            step = _Step(self._block, recurrence)
            example = self._block(*carry, *(t[:1] for t in columns), *fixed)
            _, firsts, _, sums = recurrence.parts(example)
            slices = [t[0] for t in (begins, *columns)]
            body, reached = lifted(step, (*carry, *firsts, *sums, *slices, *fixed))
        zeros = [torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (*firsts, *sums)]
        before = [_fresh(t) for t in (*carry, *zeros)]
        along = [t.flip(0) if recurrence.backwards else t for t in (begins, *columns)]
        out = _emit(body, before, along, _apart([*fixed, *reached]))
        last, added = out[: len(carry) + len(firsts)], out[len(carry) + len(firsts) : len(before)]
        return *last, *(t.flip(0) if recurrence.backwards else t for t in out[len(before) :]), *added


class _Step:
    """One step: ``(*carry, *firsts, *sums, begins, *entries of columns, *fixed)`` to the same of the next one, and
    entries of what is stacked. What it gives shares no memory with what it was given."""

    def __init__(self, block: Function, recurrence: Recurrence) -> None:
        self._block, self._recurrence = block, recurrence

    def __call__(self, *inputs: Tensor) -> Tensors:
        r = self._recurrence
        carry, inputs = inputs[: r.carry], inputs[r.carry :]
        firsts, inputs = inputs[: r.firsts], inputs[r.firsts :]
        sums, (begins, *rest) = inputs[: r.sums], inputs[r.sums :]
        out = self._block(*carry, *(t.unsqueeze(0) for t in rest[: r.columns]), *rest[r.columns :])
        carry, now, columns, more = r.parts(out)
        firsts = tuple(torch.where(begins, a, b) for a, b in zip(now, firsts, strict=True))
        sums = tuple(a + b for a, b in zip(sums, more, strict=True))
        return tuple(_fresh(t) for t in (*carry, *firsts, *sums, *(t.squeeze(0) for t in columns)))


def _apart(tensors: list[Tensor]) -> list[Tensor]:
    """The same values; no two share memory."""
    seen: set[int] = set()
    found = []
    for t in tensors:
        memory = t.untyped_storage().data_ptr()
        found.append(_fresh(t) if memory in seen else t)
        seen.add(memory)
    return found


def _fresh(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format)


def _emit(body: GraphModule, carry: list[Tensor], columns: list[Tensor], fixed: list[Tensor]) -> Tensors:
    """The steps taken, as one node of the graph that is being traced."""
    with disable_proxy_modes_tracing():
        values = _taken(body, carry, columns, fixed)
    mode = get_proxy_mode()
    assert mode is not None
    tracer = mode.tracer
    assert isinstance(tracer, PythonKeyTracer)
    name = f"step_{sum(1 for _ in tracer.root.children())}"
    tracer.root.add_module(name, body)
    node = tracer.create_proxy("get_attr", name, (), {})
    args = [[tracer.unwrap_proxy(t) for t in part] for part in (carry, columns, fixed)]
    proxies: Any = tracer.create_proxy("call_function", scan_op, (node, args[0], args[1], tuple(args[2])), {})
    return track_tensor_tree(values, proxies, constant=None, tracer=tracer)


def _taken(body: GraphModule, carry: Sequence[Tensor], columns: Sequence[Tensor], fixed: Sequence[Tensor]) -> Tensors:
    found = []
    for k in range(len(columns[0])):
        out = body(*carry, *(t[k] for t in columns), *fixed)
        carry = out[: len(carry)]
        found.append(out[len(carry) :])
    return *carry, *(torch.stack(parts) for parts in zip(*found, strict=True))
