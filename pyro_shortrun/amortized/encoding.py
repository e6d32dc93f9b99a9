"""The rows of a call as the map gives them: where chains of the map are, and how good that is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..checks import check_count
from ..density.call import Call
from ..dynamics.metropolis import BEST_ACCEPTANCE
from ..starts.finite import require_finite
from .chain import AmortizedInfo, LinearChain, LinearTarget, Point

_DRAWS_AT_ONCE = 64  # the model's own tensors may be large


@dataclass(frozen=True)
class Encoding:
    """The features of a call's rows, ``(rows, d)``, and the chain that maps them to states."""

    call: Call
    features: Tensor
    chain: LinearChain

    @cached_property
    def target(self) -> LinearTarget:
        """The density of the map, for these features as they are; a row counts once, however subsampled."""
        density, weight = self.call.density, self.call.density.layout.row_weight

        def gradient(u: Tensor) -> tuple[Tensor, Tensor]:
            value, grad = density.value_and_grad(u)
            return value.detach() / weight, grad.detach() / weight

        return self.chain.target(gradient, self.features)

    def states(self, phi: Tensor) -> Tensor:
        """``Phi g`` of maps ``(..., size, d)``, ``(..., rows, size)``."""
        return self.features @ phi.mT

    def start(self, chains: int, compiled: bool) -> Point:
        """Where ``chains`` chains are now, on this call's data.

        :raises ValueError: where that is not finite, naming the site.
        """
        phi, density = self.chain.starts(chains), self.call.density
        with torch.no_grad():
            u = self.target.features @ phi.mT
            if compiled:
                density.expect(u, self.call.model(u))
            point = self.target.at(phi)
        require_finite(
            point.value.isfinite().all(-1) & point.pull.isfinite().flatten(1).all(-1),
            self.call.model,
            u,
            "the model's log density, or its gradient, is not finite at the encoding of the data",
            "check the data for NaN and the observation's support, or use a smaller init_scale or step_size",
        )
        return point

    def run(
        self, samples: int, chains: int, warmup: int, thinning: int, compiled: bool
    ) -> tuple[Tensor, Tensor, AmortizedInfo]:
        """Draws of fresh chains, ``(chains, samples, rows, size)``, their log densities, and what happened."""
        for name, count in (("num_samples", samples), ("num_chains", chains), ("thinning", thinning)):
            check_count(name, count)
        check_count("warmup_steps", warmup + 1)
        wanted = BEST_ACCEPTANCE if self.chain.adapts else None
        begun = self.chain.run(self.target, self.start(chains, compiled), warmup, wanted=wanted)
        steps = samples * thinning
        run = self.chain.run(self.target, begun.point, steps, log_step=begun.log_step, keep_every=thinning)
        states = torch.stack([self.states(phi) for phi, _ in run.kept], 1)
        return states, torch.stack([value for _, value in run.kept], 1), run.info


def gaussian_bound(call: Call, loc: Tensor, scale: Tensor, count: int) -> Tensor:
    """``E[log pi(u) - log N(u; loc, scale)]`` over ``count`` draws of that Gaussian, ``(rows,)``."""
    normal, weight = torch.distributions.Normal(loc, scale), call.density.layout.row_weight
    total = loc.new_zeros(len(loc))
    for done in range(0, count, _DRAWS_AT_ONCE):
        u = normal.sample(torch.Size([min(_DRAWS_AT_ONCE, count - done)]))
        with torch.no_grad():
            joint = call.model(u) / weight
        total = total + (joint - normal.log_prob(u).sum(-1)).sum(0)
    return total / count
