"""Affine coordinates of a density: the same distribution, seen in ``v`` with ``u = center + factor v``."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .interface import Block, Density
from .recurrence import Recurrence


@dataclass(frozen=True)
class Affine:
    """``u = center + factor v`` in one row: ``center`` ``(size,)``, ``factor`` lower triangular ``(size, size)`` with
    a positive diagonal."""

    center: Tensor
    factor: Tensor

    def outward(self, v: Tensor) -> Tensor:
        """``u`` at coordinates ``v``, any leading dimensions."""
        return self.center + v @ self.factor.mT

    def inward(self, u: Tensor) -> Tensor:
        """Coordinates ``v`` of ``u``."""
        gap = (u - self.center).unsqueeze(-1)
        return torch.linalg.solve_triangular(self.factor, gap, upper=False).squeeze(-1)

    def is_equal(self, other: Affine | None) -> bool:
        """Whether these are the same coordinates."""
        return other is not None and self.center.equal(other.center) and self.factor.equal(other.factor)

    @property
    def log_scale(self) -> Tensor:
        """``log |du/dv|``."""
        return self.factor.diagonal().log().sum()


class AffineDensity(Density):
    r"""``log pi`` in affine coordinates of its one row,

    .. math:: \log\pi_v(v) = \log\pi(m + L v) + \log|\det L|,

    so that objectives, dynamics and kernels work in coordinates in which a posterior has unit scales. Blocks of steps
    go to the density inside with the coordinates among their inputs: its compiled graphs hold the change of
    coordinates, and other coordinates of the same size need no new ones.

    :param inner: with one row that is no arrowhead.
    """

    def __init__(self, inner: Density, frame: Affine) -> None:
        self.structure, self.layout, self.repeats = inner.structure, inner.layout, inner.repeats
        self.inner, self.frame, self.is_traced = inner, frame, inner.is_traced

    def __call__(self, v: Tensor) -> Tensor:
        return self.inner(self.frame.outward(v)) + self.frame.log_scale

    def value_and_grad(self, v: Tensor, create_graph: bool = False) -> tuple[Tensor, Tensor]:
        if create_graph:
            return super().value_and_grad(v, create_graph)
        value, grad = self.inner.value_and_grad(self.frame.outward(v.detach()))
        return value + self.frame.log_scale, grad @ self.frame.factor

    def require_vectorization(self, u: Tensor) -> None:
        self.inner.require_vectorization(self.frame.outward(u))

    def with_start(self, u: Tensor) -> tuple[Tensor, Tensor]:
        joint, prior = self.inner.with_start(self.frame.outward(u))
        return joint + self.frame.log_scale, prior + self.frame.log_scale

    def differentiable(self, u: Tensor, parameters: bool) -> Tensor:
        return self.inner.differentiable(self.frame.outward(u), parameters) + self.frame.log_scale

    def land(self, u: Tensor) -> tuple[Tensor, ...]:
        value, *others = self.inner.land(self.frame.outward(u))
        return value + self.frame.log_scale, *others

    def execute(self, fn: Block, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return self.inner.execute(_within(fn), (*inputs, self.frame.center, self.frame.factor))

    def expect(self, u: Tensor, value: Tensor) -> None:
        self.inner.expect(self.frame.outward(u), value - self.frame.log_scale)


@dataclass(frozen=True)
class _Within:
    """A block in coordinates that are its last two inputs, the same for all steps."""

    fn: Block

    @property
    def key(self) -> tuple[Hashable, ...]:
        return "affine", *self.fn.key

    @property
    def graph(self) -> bool:
        """Whether the block stays in the graph of autograd."""
        return getattr(self.fn, "graph", False)

    @property
    def recurrence(self) -> Recurrence | None:
        """How it is one step several times, if it is."""
        return getattr(self.fn, "recurrence", None)

    def __call__(self, density: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.fn(AffineDensity(density, Affine(*inputs[-2:])), *inputs[:-2])


class _WitnessWithin(_Within):
    """One whose outputs tell ``log pi`` of a state among its inputs."""

    def witness(self, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        frame, fn = Affine(*inputs[-2:]), self.fn
        v, value = fn.witness(inputs[:-2], outputs)  # type: ignore[attr-defined]
        return frame.outward(v), value - frame.log_scale


def _within(fn: Block) -> Block:
    return _WitnessWithin(fn) if hasattr(fn, "witness") else _Within(fn)
