"""What makes a traced graph fast: torch's inductor, or nothing."""

from __future__ import annotations

import copy
import time
import warnings
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._higher_order_ops.scan import scan_op
from torch._subclasses.fake_tensor import FakeTensorMode
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # inductor's own
            return self._build(module, inputs)

    def _build(self, module: GraphModule, inputs: list[Tensor]) -> Function:
        if inputs[0].is_cuda:
            return _cuda_graphs(module)
        loops = [n for n in module.graph.nodes if n.target is scan_op]
        for one in (module, *(getattr(module, n.args[0].target) for n in loops)):
            _split_transposed_products(one)
        # Shapes and strides are the key under which the graph is kept, so dynamo and its guards are not needed.
        if loops:
            return _loops(module, inputs)
        compiled = torch._inductor.compile(module, list(inputs))
        return min((compiled, module), key=lambda run: _seconds(run, inputs))


def _loops(module: GraphModule, inputs: list[Tensor]) -> Function:
    """A graph with loops, in C++ throughout: between steps, Python would take most of the time of small models."""
    try:
        return _compiled(module, inputs, cpp_wrapper=True)
    except Exception:  # what it raises differs, as does what it cannot do
        return _compiled(module, inputs, cpp_wrapper=False)


def _compiled(module: GraphModule, inputs: list[Tensor], cpp_wrapper: bool) -> Function:
    """Kept on disk (``TORCHINDUCTOR_CACHE_DIR``) for later processes: the operator has no state that inductor's hash of
    the graph would miss."""
    # Slow to load, and sympy brings a warnings filter.
    from torch._inductor import config
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    # Loops have indices that are numbers at run time.
    fake = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    cacheable = {f"{scan_op.__module__}.{scan_op.__name__}": "1"}
    module = copy.deepcopy(module)
    for node in module.graph.nodes:
        if node.op == "placeholder":  # the C++ wrapper takes its inputs from these notes, where some have one
            node.meta.pop("val", None)
    with config.patch(cpp_wrapper=cpp_wrapper, unsafe_marked_cacheable_functions=cacheable):
        with tracing(TracingContext(fake)):
            return torch._inductor.compile(module, list(inputs))


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
