"""Buffers of compiled loops on the stack, not allocated one by one in every step.

To be imported where something is compiled only: inductor is slow to load.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from threading import RLock
from typing import Any

from torch._inductor import config
from torch._inductor.codegen.common import device_codegens, init_backend_registration
from torch._inductor.codegen.cpp_wrapper_cpu_array_ref import CppWrapperCpuArrayRef
from torch._inductor.graph import GraphLowering

__all__ = ["KEY", "on_the_stack"]

KEY = sha256(Path(__file__).read_bytes()).hexdigest()  # of the code that it makes inductor write

_ONE_AT_A_TIME = RLock()  # what inductor knows of the CPU is shared by all threads


class _Wrapper(CppWrapperCpuArrayRef):
    """Inductor's wrapper with buffers on the stack: of the steps of loops, and of those what is not passed on to the
    next, which may outlive the call."""

    @staticmethod
    def create(is_subgraph: bool, *args: Any) -> CppWrapperCpuArrayRef:
        return _Wrapper()

    def can_stack_allocate_buffer(self, buffer: Any) -> bool:
        graph: GraphLowering = self.get_codegened_graph()
        is_step = graph.name is not None
        passed_on = graph.get_output_names()
        return is_step and buffer.get_name() not in passed_on and super().can_stack_allocate_buffer(buffer)


@contextmanager
def on_the_stack() -> Iterator[None]:
    """What is compiled within has small buffers of its loops on the stack, where it calls nothing outside.

    Nothing takes over the memory of another one: what is passed on cannot have that of what is not, which the C++
    compiler would refuse.
    """
    init_backend_registration()
    settings = {
        "aot_inductor.allow_stack_allocation": True,
        "allow_buffer_reuse": False,
        "inplace_buffers": False,
        "cpp.vec_isa_ok": True,
    }
    with _ONE_AT_A_TIME:
        known = device_codegens["cpu"]
        device_codegens["cpu"] = replace(known, cpp_wrapper_codegen=_Wrapper)
        try:
            with config.patch(settings):
                yield
        finally:
            device_codegens["cpu"] = known
