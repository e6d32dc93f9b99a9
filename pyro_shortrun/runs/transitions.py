"""Transitions of chains, adjusted or not, as a block of steps that may be one graph with a loop in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..density.recurrence import Recurrence
from ..dynamics.adaptation import Adaptation, Following
from ..dynamics.dynamics import Dynamics
from ..dynamics.metric import Preconditioner, Scales
from ..dynamics.metropolis import Position, decide, hastings_log_ratio
from ..objectives.transition import settings
from ..tensors import keep_rows


class Place(NamedTuple):
    """Where chains are: ``u``, the same in the coordinates of a metric, ``white``, and the gradient in ``u``, all
    ``(chains, rows, size)``; ``log_density`` is ``(chains, rows)``."""

    u: Tensor
    white: Tensor
    log_density: Tensor
    grad: Tensor

    def where(self, rows: Tensor, other: Place) -> Place:
        """This one in these rows, ``(chains, rows)``, another one in the rest."""
        return Place(
            keep_rows(rows, self.u, other.u),
            keep_rows(rows, self.white, other.white),
            torch.where(rows, self.log_density, other.log_density),
            keep_rows(rows, self.grad, other.grad),
        )


class Given(NamedTuple):
    """What a block of ``n`` transitions is given: standard normal ``noise`` ``(n, chains, rows, size)``, logarithms of
    uniform numbers ``(n, chains, rows)``, step sizes ``eta`` ``(n, size)`` before their factor, and the ``gains`` by
    which that follows the acceptance, ``(n, 4)``."""

    noise: Tensor
    log_uniform: Tensor
    eta: Tensor
    gains: Tensor

    def part(self, first: int, last: int) -> Given:
        """Of transitions ``first .. last - 1``."""
        return Given(*(t[first:last] for t in self))

    def padded(self, count: int) -> Given:
        """With transitions that go nowhere and follow nothing at the end, ``count`` in all."""
        missing = count - len(self.eta)
        if not missing:
            return self
        stays = self.gains[-1:] * self.gains.new_tensor([0.0, 0.0, 1.0, 0.0]) + self.gains.new_tensor([1.0, 0, 0, 0])
        never = torch.full_like(self.log_uniform[:1], torch.inf)
        ends = torch.zeros_like(self.noise[:1]), never, torch.zeros_like(self.eta[:1]), stays
        return Given(*(torch.cat([t, e.expand(missing, *e.shape[1:])]) for t, e in zip(self, ends, strict=True)))


class Passed(NamedTuple):
    """Of every transition: where it led, ``u``, ``grad`` and ``log_density``, the probability with which it was
    accepted, the logarithm of its step size's factor, and whether its proposal was finite."""

    u: Tensor
    grad: Tensor
    log_density: Tensor
    acceptance: Tensor
    log_factor: Tensor
    finite: Tensor

    def part(self, first: int, last: int) -> Passed:
        """Of transitions ``first .. last - 1``."""
        return Passed(*(t[first:last] for t in self))


@dataclass(frozen=True)
class Transitions:
    r"""A block of ``n`` transitions ``u -> u'`` of a dynamics, per row.

    With ``adjust``, accepted with probability ``min(1, pi(u') f(u | u') / (pi(u) f(u' | u)))``, where ``f`` is the
    density of a step (Metropolis, Hastings). ``(*place, *following, *given, center, pooled, factor)`` to ``(*place,
    *following, *passed)``.

    :param metric: what makes scales of ``factor``.
    :param wanted: acceptance that step sizes follow.
    :param limit: of step sizes.
    :param at_once: chains that are evaluated together, all if None.
    :param known_by: what stands for the dynamics in the key of graphs.
    """

    dynamics: Dynamics
    metric: Preconditioner
    adjust: bool
    wanted: float
    limit: float = float("inf")
    at_once: int | None = None
    known_by: Any = None

    recurrence = Recurrence(len(Place._fields) + len(Following._fields), len(Given._fields))

    @cached_property
    def key(self) -> tuple[Any, ...]:
        rule = self.adjust, self.wanted, self.limit, self.at_once, type(self.metric)
        return "transitions", self.known_by, settings(self.dynamics), *rule

    def witness(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The states at the end, and the log density that was found there."""
        end = Place(*outputs[:4])
        return end.u, end.log_density

    def run(
        self,
        density: Any,
        here: Place,
        following: Following,
        given: Given,
        center: Tensor,
        pooled: bool,
        factor: Tensor,
    ) -> tuple[Place, Following, Passed]:
        """The block, by the density's graphs where it has some.

        :param center: what step sizes are drawn to, ``(chains, rows)``.
        :param pooled: whether all chains follow their mean acceptance.
        """
        pools = torch.tensor(pooled, device=center.device)
        out = density.execute(self, (*here, *following, *given, center, pools, factor))
        return Place(*out[:4]), Following(*out[4:7]), Passed(*out[7:])

    def follow(
        self, density: Any, adaptation: Adaptation, here: Place, given: Given, length: int = 0
    ) -> tuple[Place, Following, Passed]:
        """As far as nothing is to be fitted, with the gains that an adaptation has now in place of those ``given``.

        :param length: of the block, if that is longer.
        """
        chains, count = len(here.u), len(given.eta)
        given = given._replace(gains=given.eta.new_tensor(adaptation.gains(count))).padded(max(length, count))
        center, following = adaptation.center.expand(chains, -1).contiguous(), adaptation.following(chains)
        out = self.run(density, here, following, given, center, adaptation.is_pooled, adaptation.factor)
        return out[0], out[1], out[2].part(0, count)

    @torch.no_grad()
    def __call__(self, density: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        carry, columns, (center, pools, factor) = self.recurrence.split(inputs)
        here, following, given = Place(*carry[:4]), Following(*carry[4:]), Given(*columns)
        scales, passed = self.metric.scales(factor), []
        for k in range(len(given.eta)):
            eta = (following.log_factor.exp().unsqueeze(-1) * given.eta[k]).clamp(max=self.limit)
            noise, log_uniform = given.noise[k], given.log_uniform[k]
            here, acceptance, finite = self.step(density, scales, here, eta, noise, log_uniform)
            own = self.wanted - acceptance
            shortfall = torch.where(pools, own.mean(0, keepdim=True), own)
            passed.append((here.u, here.grad, here.log_density, acceptance, following.log_factor, finite))
            following = following.after(shortfall, given.gains[k], center)
        return *here, *following, *(torch.stack(t) for t in zip(*passed, strict=True))

    def step(
        self, density: Any, scales: Scales, here: Place, eta: Tensor, noise: Tensor, log_uniform: Tensor
    ) -> tuple[Place, Tensor, Tensor]:
        """One transition: where it leads, the acceptance probability, and whether the proposal was finite."""
        scale, pull = density.layout.drift_scale(noise), scales.pull(here.grad)
        white = self.dynamics.step(here.white, pull, eta, noise, scale)
        u = scales.color(white)
        there = Place(u, white, *self._evaluate(density, u))
        finite = there.log_density.isfinite() & there.grad.isfinite().all(-1) & u.isfinite().all(-1)
        if not self.adjust:
            return there.where(finite, here), finite.to(u.dtype), finite
        ends = Position(here.white, here.log_density, pull), Position(white, there.log_density, scales.pull(there.grad))
        move, acceptance = decide(hastings_log_ratio(self.dynamics, *ends, eta, scale), finite, log_uniform)
        return there.where(move, here), acceptance, finite

    def _evaluate(self, density: Any, u: Tensor) -> tuple[Tensor, Tensor]:
        parts = [density.value_and_grad(part) for part in u.split(self.at_once or max(len(u), 1))]
        value, grad = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
        return value.detach().to(u.dtype), grad.detach()  # data may be of another dtype than the latents
