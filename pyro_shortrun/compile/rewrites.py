"""Operations of a graph in a form that inductor makes fast."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

_LARGE_MATRIX = 2**14  # numbers
_BLOCKS = 4
_SHORT = 64


def rewrite(module: GraphModule) -> None:
    """In place."""
    _mark_failures(module)
    _split_transposed_products(module)
    _sum_short_scans(module)
    module.graph.eliminate_dead_code()
    module.recompile()


def _split_transposed_products(module: GraphModule) -> None:
    """Products of a large transposed matrix with a vector, as the sum of a few products of its blocks of rows.

    Inductor would make a loop of such a product that goes through memory column by column.
    """
    aten = torch.ops.aten
    for node in [n for n in module.graph.nodes if n.target is aten.mv.default]:
        transposed, vector = node.args
        rows, columns = (n.meta["tensor_meta"].shape.numel() if "tensor_meta" in n.meta else 0 for n in (vector, node))
        if not _is_transposed(transposed):
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


def _is_transposed(matrix: Any) -> bool:
    """Whether it is another matrix with rows and columns exchanged."""
    aten, target, args = torch.ops.aten, matrix.target, matrix.args
    if target is aten.permute.default:
        return bool(args[1][0] % 2 == 1)
    return target is aten.t.default or (target is aten.transpose.int and bool(args[1] % 2 != args[2] % 2))


def _sum_short_scans(module: GraphModule) -> None:
    """Cumulative sums of few numbers, each as the sum of those up to it: on their own they are calls to outside, which
    keep all buffers from the stack."""
    aten = torch.ops.aten
    for node in [n for n in module.graph.nodes if n.target is aten.cumsum.default and _is_short(n)]:
        x, like = node.args[0], node.meta["tensor_meta"]
        count = like.shape[-1]
        with module.graph.inserting_before(node):
            indices = module.graph.call_function(aten.arange.default, (count,))
            columns = module.graph.call_function(aten.unsqueeze.default, (indices, 1))
            later = module.graph.call_function(aten.gt.Tensor, (indices, columns))
            rows = module.graph.call_function(aten.unsqueeze.default, (x, -2))
            kept = module.graph.call_function(aten.masked_fill.Scalar, (rows, later, 0))
            total = module.graph.call_function(aten.sum.dim_IntList, (kept, [-1]))
        node.replace_all_uses_with(total)
        module.graph.erase_node(node)


def _is_short(node: Node) -> bool:
    """Whether a scan is along the last dimension, and that is short; of numbers that stay of their kind."""
    meta = node.meta.get("tensor_meta")
    if meta is None or not meta.shape or node.kwargs or not meta.dtype.is_floating_point:
        return False
    return node.args[1] in (-1, len(meta.shape) - 1) and meta.shape[-1] <= _SHORT


def _mark_failures(module: GraphModule) -> None:
    """Factorisations that fail give NaN, in place of an error that a compiled loop cannot raise."""
    aten = torch.ops.aten
    for check in [n for n in module.graph.nodes if n.target is aten._linalg_check_errors.default]:
        info: Any = check.args[0]
        factorisation = info.args[0]
        for result in [n for n in factorisation.users if n is not info]:
            above = len(result.meta["tensor_meta"].shape) - len(info.meta["tensor_meta"].shape)
            with module.graph.inserting_after(max(info, result)):
                failed = module.graph.call_function(aten.ne.Scalar, (info, 0))
            for _ in range(above):
                with module.graph.inserting_after(failed):
                    failed = module.graph.call_function(aten.unsqueeze.default, (failed, -1))
            with module.graph.inserting_after(failed):
                marked = module.graph.call_function(aten.masked_fill.Scalar, (result, failed, float("nan")))
            result.replace_all_uses_with(marked, delete_user_cb=lambda user, marked=marked: user is not marked)
        module.graph.erase_node(check)
