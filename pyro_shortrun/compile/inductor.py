"""What makes a traced graph fast: torch's inductor, or nothing."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.fx import GraphModule

from .graph import Function

_TRIALS = 4
_LARGE_MATRIX = 2**14  # numbers
_BLOCKS = 4


class Backend(ABC):
    """What makes a traced graph fast."""

    @abstractmethod
    def build(self, module: GraphModule, inputs: list[Tensor]) -> Function:
        """A function that gives what ``module(*inputs)`` gives, for inputs of these shapes."""


class Untouched(Backend):
    """The graph as traced, one operation after the other."""

    def build(self, module: GraphModule, inputs: list[Tensor]) -> Function:
        return module


class Inductor(Backend):
    """torch's inductor, or the graph as traced where that is faster (large factorisations)."""

    def build(self, module: GraphModule, inputs: list[Tensor]) -> Function:
        if inputs[0].is_cuda:
            return _cuda_graphs(module)
        # Shapes and strides are the key under which the graph is kept, so dynamo and its guards are not needed.
        compiled = torch._inductor.compile(_split_transposed_products(module), list(inputs))
        return min((compiled, module), key=lambda run: _seconds(run, inputs))


def _split_transposed_products(module: GraphModule) -> GraphModule:
    """Products of a large transposed matrix with a vector, as the sum of a few products of its blocks of rows.

    Inductor would make a loop of such a product that goes through memory column by column.
    """
    aten = torch.ops.aten
    for node in [n for n in module.graph.nodes if n.target is aten.mv.default]:
        transposed, vector = node.args
        rows, columns = (n.meta["tensor_meta"].shape.numel() if "tensor_meta" in n.meta else 0 for n in (vector, node))
        if transposed.target not in (aten.t.default, aten.permute.default, aten.transpose.int):
            continue
        if rows * columns < _LARGE_MATRIX or rows % _BLOCKS:
            continue
        with module.graph.inserting_before(node):
            shape = [_BLOCKS, rows // _BLOCKS, columns]
            matrices = module.graph.call_function(aten.reshape.default, (transposed.args[0], shape))
            vectors = module.graph.call_function(aten.reshape.default, (vector, [_BLOCKS, 1, rows // _BLOCKS]))
            product = module.graph.call_function(aten.bmm.default, (vectors, matrices))
            total = module.graph.call_function(aten.sum.dim_IntList, (product, [0, 1]))
        node.replace_all_uses_with(total)
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _cuda_graphs(module: GraphModule) -> Function:
    """CUDA graphs reuse the memory of their outputs, which here must outlive the next call."""
    run = torch.compile(module, fullgraph=True, dynamic=False, mode="reduce-overhead")

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        torch.compiler.cudagraph_mark_step_begin()
        return tuple(t.clone() for t in run(*inputs))

    return call


def _seconds(run: Function, inputs: list[Tensor]) -> float:
    """The best of a few calls."""
    taken = []
    for _ in range(_TRIALS):
        begin = time.perf_counter()
        run(*inputs)
        taken.append(time.perf_counter() - begin)
    return min(taken[1:])
