"""Loops in graphs: what a block of steps gives, from the graph of one step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyro_shortrun.compile.graph import Live, trace
from pyro_shortrun.compile.inductor import Inductor
from pyro_shortrun.compile.packing import Packing
from pyro_shortrun.compile.scan import Scan
from pyro_shortrun.density.recurrence import Recurrence

STEPS = 5
OUTSIDE = torch.tensor([1.0, 2.0, 3.0])


def forwards(u: Tensor, alive: Tensor, eta: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
    """``(u, alive, eta, shift)`` to ``(u, alive, first u, mean of each u, u before each, sum of squares)``."""
    first, means, before, total = u, [], [], torch.zeros_like(u)
    for step in eta:
        before.append(u)
        u = torch.where(alive.unsqueeze(-1), u + step * (OUTSIDE - u) + shift, u)
        alive = alive & (u.sum(-1) < 9.0)
        means.append(u.mean())
        total = total + u.square()
    return u, alive, first, torch.stack(means), torch.stack(before), total


def backwards(back: Tensor, eta: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
    found = []
    for step in eta.flip(0):
        found.append((back * step).sum())
        back = back * (1 - step) + shift
    return back, torch.stack(found[::-1])


FORWARDS, BACKWARDS = Recurrence(2, 1, firsts=1, sums=1), Recurrence(1, 1, backwards=True)


def inputs(kind: Recurrence) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    eta, shift = torch.rand(STEPS, 1) * 0.3, torch.randn(3)
    if kind is BACKWARDS:
        return torch.randn(2, 3), eta, shift
    return torch.randn(2, 3), torch.tensor([True, False]), eta, shift


@pytest.mark.parametrize("kind", [FORWARDS, BACKWARDS], ids=["forwards", "backwards"])
def test_a_block_is_its_steps_one_by_one(kind):
    block, given = (forwards, inputs(kind)) if kind is FORWARDS else (backwards, inputs(kind))
    for found, known in zip(kind.repeat(block, given), block(*given), strict=True):
        torch.testing.assert_close(found, known)


@pytest.mark.parametrize("build", ["as traced", "inductor"])
@pytest.mark.parametrize("kind", [FORWARDS, BACKWARDS], ids=["forwards", "backwards"])
def test_its_graph_gives_the_same(kind, build):
    block, given = (forwards, inputs(kind)) if kind is FORWARDS else (backwards, inputs(kind))
    module, constants = trace(Scan(block, kind), given, Live({}, ()))
    assert sum(n.op == "call_function" and "scan" in str(n.target) for n in module.graph.nodes) == 1
    assert not isinstance(constants, dict) and all(isinstance(c, Tensor) for c in constants)
    values = [*given, *constants]
    with torch.no_grad():
        run = module if build == "as traced" else Inductor().build(module, values)
        for found, known in zip(run(*values), block(*given), strict=True):
            torch.testing.assert_close(found, known)
            assert found.dtype == known.dtype


def test_random_numbers_in_a_step_are_refused():
    def block(u: Tensor, eta: Tensor) -> tuple[Tensor, ...]:
        for step in eta:
            u = u + step * torch.randn_like(u)
        return (u,)

    with pytest.raises(NotImplementedError, match="draws random numbers"):
        trace(Scan(block, Recurrence(1, 1)), (torch.zeros(3), torch.ones(2, 1)), Live({}, ()))


def test_packing_keeps_every_tensor():
    tensors = [torch.randn(2, 3), torch.tensor([True, False]), torch.randn(2), torch.randn(2, 3), torch.arange(4)]
    packing = Packing(tensors)
    packed = packing.pack(tensors, 0)
    assert len(packed) == 3  # two of (2, 3), numbers and booleans of (2,), integers
    for found, known in zip(packing.unpack(packed), tensors, strict=True):
        assert torch.equal(found, known) and found.dtype == known.dtype


def test_packing_does_not_round():
    tensors = [
        torch.tensor([True]),
        torch.rand(1, dtype=torch.float32),
        torch.rand(1, dtype=torch.float64),
        torch.tensor([1 / 3]).double(),
    ]
    packing = Packing(tensors)
    packed = packing.pack(tensors, 0)
    assert [t.dtype for t in packed] == [torch.float32, torch.float64]
    for found, known in zip(packing.unpack(packed), tensors, strict=True):
        assert torch.equal(found, known) and found.dtype == known.dtype
