r"""Amortised Langevin dynamics: a linear map of fixed features as the state of a Markov chain.

With features ``g_i`` of rows ``i = 1..n`` the map ``Phi``, ``(size, width)``, gives every row the state
``u_i = Phi g_i``, and moves on the sum of the rows' log densities:

.. math:: L(\Phi) = \sum_{i=1}^n \log\pi_i(\Phi g_i) , \qquad
          \Phi' = \Phi + \eta' \nabla L(\Phi) + \sqrt{2 \eta'}\, \epsilon , \qquad \eta' = \eta / n .

Seen from the rows, ``u' = u + eta' K grad log pi(u) + sqrt(2 eta') K^(1/2) eps``: Langevin dynamics preconditioned by
the Gram matrix ``K_ij = g_i . g_j`` of the features. Where ``K`` has rank n (which needs ``width >= n``), its
stationary law is that of independent rows. Directions of ``Phi`` that no feature sees are flat: there the chain is a
random walk. A :class:`Basis` changes the directions, and how far the chain goes along each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..checks import check_between, check_flags, check_kind
from ..dynamics.adaptation import follow_acceptance
from ..dynamics.metropolis import decide
from ..tensors import keep_rows
from .basis import Basis, Everywhere

_GAIN = 0.1  # of the step size's adaptation
_HALVINGS_AT_MOST = 40
_HARDLY = 0.1


@dataclass(frozen=True)
class AmortizedInfo:
    """What happened in a run of T transitions, averaged over chains.

    ``log_density`` is the mean over rows of ``log pi`` before the first and after each transition, ``(T + 1,)``, in
    nats; ``acceptance`` the acceptance probability of each transition, ``(T,)`` (without Metropolis step, the share of
    proposals that were finite); ``phi_norm`` the Frobenius norm of the map at the end; ``step_size`` is ``eta`` at the
    end; ``frozen`` counts transitions whose proposal had no finite density or gradient and was not made. All are
    tensors: reading one waits for the device.
    """

    log_density: Tensor
    acceptance: Tensor
    phi_norm: Tensor
    step_size: Tensor
    frozen: Tensor

    @property
    def nonfinite(self) -> int:
        """Number of proposals that were not finite."""
        return int(self.frozen)

    def __repr__(self) -> str:
        first, last = self.log_density[0].item(), self.log_density[-1].item()
        return (
            f"AmortizedInfo(log density per row {first:.4g} -> {last:.4g} in {len(self.acceptance)} transitions, "
            f"acceptance {self.acceptance.mean().item():.2f}, |Phi| {self.phi_norm.item():.4g}, "
            f"step size {self.step_size.item():.3g}, {self.nonfinite} not finite)"
        )


class Point(NamedTuple):
    """The map ``(chains, size, width)``, ``log pi`` of the rows there, ``(chains, rows)``, and the gradient of ``L`` in
    ``A``, ``(chains, size, m)``."""

    phi: Tensor
    value: Tensor
    pull: Tensor


class Moved(NamedTuple):
    """The next point; by chain, the acceptance probability and whether the proposal was finite, ``(chains,)``."""

    point: Point
    accept: Tensor
    finite: Tensor


@dataclass(frozen=True)
class LinearTarget:
    """The density of the map, up to a constant: ``L(Phi)``, for features that do not change.

    :param gradient: from states ``(chains, rows, size)`` to ``log pi``, ``(chains, rows)``, and its gradient.
    :param features: ``g``, ``(rows, width)``, outside autograd.
    :param basis: ``B``, ``(width, m)``; None for the identity.
    """

    gradient: Callable[[Tensor], tuple[Tensor, Tensor]]
    features: Tensor
    basis: Tensor | None = None

    @cached_property
    def _seen(self) -> Tensor:
        """The features as ``A`` sees them, ``(rows, m)``."""
        return self.features if self.basis is None else self.features @ self.basis

    def at(self, phi: Tensor) -> Point:
        """Density and gradient at maps ``(chains, size, width)``."""
        value, grad = self.gradient(self.features @ phi.mT)
        return Point(phi, value, grad.mT @ self._seen)

    def noise(self, like: Tensor) -> Tensor:
        """Standard normal noise of one transition of maps ``like``, ``(chains, size, m)``."""
        return like.new_empty((*like.shape[:-1], self._seen.shape[-1])).normal_()

    def move(self, point: Point, eta: Tensor, noise: Tensor, log_uniform: Tensor | None) -> Moved:
        r"""One transition.

        Forth it is centred at ``m(A) = A + eta grad L(A)``, back at ``m(A')``, the *proposal's* own mean. With
        ``s = grad L(A) + grad L(A')`` and the noise ``N`` of the proposal, the difference of the two Gaussians'
        exponents is

        .. math:: \frac{|A' - m(A)|^2 - |A - m(A')|^2}{4 \eta}
                  = -\frac{\eta}{4} |s|^2 - \sqrt{\eta / 2}\, \langle s, N \rangle ,

        without the cancellation of ``|N|^2``, which grows with the width. All rows are accepted or rejected together.

        :param eta: step size on the sum over rows.
        :param noise: standard normal, ``(chains, size, m)``.
        :param log_uniform: logarithms of uniform numbers, ``(chains,)``; None for no Metropolis step.
        """
        step = eta * point.pull + (2 * eta).sqrt() * noise
        new = self.at(point.phi + (step if self.basis is None else step @ self.basis.mT))
        finite = new.value.isfinite().all(-1) & new.pull.isfinite().flatten(1).all(-1)
        if log_uniform is None:
            accept, move = finite.to(noise), finite
        else:
            s = point.pull + new.pull
            exponents = -eta / 4 * s.square().sum((-1, -2)) - (eta / 2).sqrt() * (s * noise).sum((-1, -2))
            log_ratio = (new.value - point.value).sum(-1) + exponents  # squares of gradients may overflow
            move, accept = decide(log_ratio, finite, log_uniform)
        kept = (keep_rows(move, a, b) for a, b in zip(new, point, strict=True))
        return Moved(Point(*kept), accept, finite)


class LinearRun(NamedTuple):
    """The end of a run, the adapted ``log eta``, and what happened; ``kept`` are the maps that were asked for, in
    order, each with ``L``, ``(chains,)``."""

    point: Point
    log_step: Tensor
    info: AmortizedInfo
    kept: list[tuple[Tensor, Tensor]]


class LinearChain(nn.Module):
    """The chain's state, ``phi`` of ``(size, width)`` and ``log_step``, as buffers, and how it moves.

    :param step_size: ``eta``, divided by the number of rows.
    :param adjust: whether there is a Metropolis step.
    :param target_accept_prob: acceptance to which training calls adapt the step size; None for a fixed step.
    :param basis: the directions of a transition.
    :param init_scale: standard deviation of a typical row's state at the start.
    :raises ValueError: for arguments out of range.
    """

    phi: Tensor | None
    log_step: Tensor | None

    def __init__(
        self, step_size: float, adjust: bool, target_accept_prob: float | None, basis: Basis | None, init_scale: float
    ) -> None:
        super().__init__()
        for name, value in (("step_size", step_size), ("init_scale", init_scale)):
            check_between(name, value, 0, math.inf, "0.1")
        if target_accept_prob is not None:
            check_between("target_accept_prob", target_accept_prob, 0, 1, "0.574, or None for a fixed step size")
        check_flags(adjust=adjust)
        check_kind("basis", basis, Basis, "Span()")
        self.step_size, self.adjust, self.init_scale = float(step_size), adjust, init_scale
        self.basis = Everywhere() if basis is None else basis
        self.target_accept_prob = target_accept_prob if adjust else None
        self.register_buffer("phi", None)
        self.register_buffer("log_step", None)

    def setup(self, size: int, features: Tensor) -> None:
        """Draw the map, for features of ``(rows, width)``; a typical row's state is then ``init_scale`` wide."""
        if self.phi is not None:
            return
        length = features.square().sum(-1).mean().sqrt()
        if not (length.isfinite() and length > 0):
            raise ValueError(f"the features' mean length is {length.item()}: check the features' net and the data.")
        self.phi = self.init_scale / length * features.new_empty(size, features.shape[-1]).normal_()
        self.log_step = torch.full_like(length, math.log(self.step_size))

    @torch.no_grad()
    def halve_until_accepted(self, target: LinearTarget, point: Point) -> None:
        """Halve a first step size that adapts while proposals from here are hardly ever accepted."""
        if not self.adapts:
            return
        for _ in range(_HALVINGS_AT_MOST):
            if self.run(target, point, 1).info.acceptance.item() > _HARDLY:
                return
            assert self.log_step is not None
            self.log_step = self.log_step - math.log(2)

    def target(self, gradient: Callable[[Tensor], tuple[Tensor, Tensor]], features: Tensor) -> LinearTarget:
        """The density of the map for features that may be in a graph."""
        features = features.detach()
        return LinearTarget(gradient, features, self.basis.of(features))

    @property
    def adapts(self) -> bool:
        """Whether the step size is found by acceptance."""
        return self.target_accept_prob is not None

    def starts(self, chains: int) -> Tensor:
        """The current map as the start of ``chains`` chains, ``(chains, size, width)``."""
        assert self.phi is not None
        return self.phi.expand(chains, -1, -1)

    def store(self, run: LinearRun) -> None:
        """Go on from here; of several chains, from the first."""
        self.phi, self.log_step = run.point.phi[0].clone(), run.log_step.clone()

    @torch.no_grad()
    def run(
        self,
        target: LinearTarget,
        point: Point,
        num_steps: int,
        *,
        wanted: float | None = None,
        log_step: Tensor | None = None,
        noise: Tensor | None = None,
        log_uniform: Tensor | None = None,
        keep_every: int = 0,
    ) -> LinearRun:
        """``num_steps`` transitions from ``point``.

        :param wanted: acceptance to which each transition adapts the step size of the next.
        :param log_step: ``log eta``, the stored one by default.
        :param noise: ``(T, chains, size, m)``, drawn by default; zeros make gradient ascent.
        :param log_uniform: ``(T, chains)``, drawn by default.
        :param keep_every: every how many transitions the map is kept; 0 for never.
        """
        log_step = self.log_step if log_step is None else log_step
        assert log_step is not None
        rows = len(target.features)
        values, accepts, kept, frozen = [point.value.mean()], [], [], torch.zeros_like(point.value[:, 0])
        for k in range(num_steps):
            eps = target.noise(point.phi) if noise is None else noise[k]
            uniform = torch.rand_like(frozen).log() if log_uniform is None else log_uniform[k]
            point, accept, finite = target.move(point, log_step.exp() / rows, eps, uniform if self.adjust else None)
            values.append(point.value.mean())
            accepts.append(accept.mean())
            frozen = frozen + (~finite)
            if wanted is not None:
                log_step = follow_acceptance(log_step, accepts[-1], wanted, _GAIN)
            if keep_every and (k + 1) % keep_every == 0:
                kept.append((point.phi, point.value.sum(-1)))
        norm = point.phi.flatten(1).norm(dim=-1).mean()
        accepted = torch.stack(accepts) if accepts else frozen[:0]
        info = AmortizedInfo(torch.stack(values), accepted, norm, log_step.exp(), frozen.sum())
        return LinearRun(point, log_step, info, kept)
