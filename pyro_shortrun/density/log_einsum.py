"""Sum-product contraction in log space as an opt_einsum backend, like ``pyro.ops.einsum.torch_log``.

Pyro's ends in a custom autograd function, which ``torch.func.vmap`` cannot take; this one is made of plain operations,
so that models with enumerated sites are vectorised over chains too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pyro.ops.einsum.util import Tensordot
from pyro.ops.rings import LogRing
from torch import Tensor


class VectorizableLogRing(LogRing):
    """Pyro's ring with this module as backend."""

    _backend = __name__


def transpose(a: Tensor, axes: Sequence[int]) -> Tensor:
    """Permute axes."""
    return a.permute(*axes)


def einsum(equation: str, *operands: Tensor) -> Tensor:
    """``log sum exp`` over the indices that the output lacks, of the sum of the operands."""
    inputs, output = equation.split("->")
    if inputs == output:
        return operands[0].clone()
    total = torch.zeros((), dtype=operands[0].dtype, device=operands[0].device)
    weights = []
    for dims, operand in zip(inputs.split(","), operands, strict=True):
        summed = [i for i, dim in enumerate(dims) if dim not in output]
        shift = operand.detach().amax(summed, keepdim=True) if summed else operand.detach()
        shift = shift.clamp(min=torch.finfo(shift.dtype).min)  # -inf - -inf is nan
        weights.append((operand - shift).exp())
        total = total + _align("".join(d for d in dims if d in output), output, shift.squeeze(summed))
    return total + _log(torch.einsum(equation, weights))


tensordot = Tensordot(einsum)


def _align(dims: str, output: str, value: Tensor) -> Tensor:
    """Axes in the order of ``output``, those it lacks with size one."""
    value = value.permute(*(dims.index(d) for d in output if d in dims)) if dims else value
    for i, dim in enumerate(output):
        if dim not in dims:
            value = value.unsqueeze(i)
    return value


def _log(x: Tensor) -> Tensor:
    """``log`` with gradient zero, not infinity, at zero."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, torch.ones_like(x)).log(), x.new_tensor(-torch.inf))
