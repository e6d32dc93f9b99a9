"""What makes a traced graph fast: torch's inductor, or nothing."""

from __future__ import annotations

import copy
import logging
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._higher_order_ops.scan import scan_op
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule

from .graph import Function
from .rewrites import rewrite

_TRIALS = 4


class Backend(ABC):
    """What makes a traced graph fast.

    ``takes_loops`` tells whether a graph may have loops in it, or is that of a single step.
    """

    takes_loops = True

    @abstractmethod
    def build(self, module: GraphModule, inputs: list[Tensor]) -> Function:
        """A function that gives what ``module(*inputs)`` gives, for inputs of these shapes."""


class Untouched(Backend):
    """The graph as traced, one operation after the other."""

    def build(self, module: GraphModule, inputs: list[Tensor]) -> Function:
        return module


class Scripted(Backend):
    """One operation after the other without Python between them: made in no time, and several times faster than the
    model under Pyro's handlers."""

    takes_loops = False

    def build(self, module: GraphModule, inputs: list[Tensor]) -> Function:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of numbers that become constants, and of its age
            script = torch.jit.trace(module, tuple(inputs), check_trace=False)
        return script


class Inductor(Backend):
    """torch's inductor, or the graph as traced where that is faster (large factorisations)."""

    def build(self, module: GraphModule, inputs: list[Tensor]) -> Function:
        with warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")  # inductor's own
            return self._build(module, inputs)

    def _build(self, module: GraphModule, inputs: list[Tensor]) -> Function:
        if inputs[0].is_cuda:
            return _cuda_graphs(module)
        loops = [n for n in module.graph.nodes if n.target is scan_op]
        for one in (module, *(getattr(module, n.args[0].target) for n in loops)):
            rewrite(one)
        # Shapes and strides are the key under which the graph is kept, so dynamo and its guards are not needed.
        if loops:
            return _loops(module, inputs)
        compiled = torch._inductor.compile(module, list(inputs))
        return min((compiled, module), key=lambda run: _seconds(run, inputs))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without a line for each operation that the C++ wrapper calls in a slower way."""
    logger = logging.getLogger("torch._inductor.ir")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _loops(module: GraphModule, inputs: list[Tensor]) -> Function:
    """A graph with loops, in C++ throughout: between steps, Python would take most of the time of small models."""
    from .stack import on_the_stack  # inductor is slow to load

    for buffers in (on_the_stack, nullcontext):
        try:
            with buffers():
                return _compiled(module, inputs, cpp_wrapper=True)
        except Exception:  # what it raises differs, as does what it cannot do
            continue
    return _compiled(module, inputs, cpp_wrapper=False)


def _compiled(module: GraphModule, inputs: list[Tensor], cpp_wrapper: bool) -> Function:
    """Kept on disk (``TORCHINDUCTOR_CACHE_DIR``) for later processes: the operator has no state that inductor's hash of
    the graph would miss."""
    # Slow to load, and sympy brings a warnings filter.
    from torch._inductor import config
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    from .stack import KEY

    # Loops have indices that are numbers at run time.
    fake = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    cacheable = {f"{scan_op.__module__}.{scan_op.__name__}": KEY}
    module = copy.deepcopy(module)
    for node in module.graph.nodes:
        if node.op == "placeholder":  # the C++ wrapper takes its inputs from these notes, where some have one
            node.meta.pop("val", None)
    with config.patch(cpp_wrapper=cpp_wrapper, unsafe_marked_cacheable_functions=cacheable):
        with tracing(TracingContext(fake)):
            return torch._inductor.compile(module, [t.detach() for t in inputs])  # else one given twice counts once


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
