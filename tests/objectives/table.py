"""Every objective with every dynamics that goes with it, and by hand what it adds to the log weight of a run.

A new objective, or a dynamics with a step of its own, is one row of ``ROWS``: the laws of ``test_weight`` and
``test_objectives`` then hold of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from programs import traced
from torch import Tensor

from pyro_shortrun import Annealed, GaussianReverse, Hamiltonian, Langevin, Linearized, Mixture, PathDensity, StepSize
from pyro_shortrun.density import Call
from pyro_shortrun.dynamics import Dynamics
from pyro_shortrun.objectives import Exact, Lanczos, Objective
from pyro_shortrun.objectives.reverse import weighed_by
from pyro_shortrun.objectives.reverse_kernels import Affine, Fit
from pyro_shortrun.starts import Base, GaussianBase, PriorBase

STEPS = 3


DATA = (1.0, -0.5, 0.2)


def curved() -> None:
    """Two dimensions, not Gaussian, three rows, and a parameter."""
    width = pyro.param("width", torch.tensor(0.5))
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), torch.tensor([1.0, 2.0])).to_event(1))
        pyro.sample("y", dist.Normal(z.tanh().sum(-1), width), obs=torch.tensor(DATA))


def log_prior(z: Tensor) -> Tensor:
    return dist.Normal(0.0, torch.tensor([1.0, 2.0])).log_prob(z).sum(-1)


def log_joint(z: Tensor) -> Tensor:
    return log_prior(z) + dist.Normal(z.tanh().sum(-1), pyro.param("width")).log_prob(torch.tensor(DATA))


def bound(model: Callable, *args: Any, compile: bool = False) -> Any:
    call = Call.of(model, args, {})
    return traced(call) if compile else call.density


def clamped(full: Tensor, most: float) -> Tensor:
    return full.clamp(-most, most)


@dataclass
class Trial:
    """The tensors of a run on ``curved``, leaves where they are differentiated in, and its steps written out."""

    dynamics: Dynamics
    u: Tensor
    eta: Tensor
    noise: Tensor
    beta: Tensor | None = None
    base: Base = field(default_factory=PriorBase)
    limit: Callable[[Tensor, float], Tensor] = clamped

    @property
    def leaves(self) -> list[Tensor]:
        beta = [] if self.beta is None else [self.beta]
        own = [p for n, p in self.dynamics.named_parameters() if "step_size" not in n]
        return [self.u, self.eta, *beta, *self.base.tensors, *own]

    def log_base(self, x: Tensor) -> Tensor:
        """Log density of the start."""
        if not isinstance(self.base, GaussianBase):
            return log_prior(x)
        if self.base.is_diagonal:
            return dist.Normal(self.base.loc, self.base.scale).log_prob(x).sum(-1)
        return dist.MultivariateNormal(self.base.loc, scale_tril=self.base.scale).log_prob(x)

    def drift(self, x: Tensor, k: int) -> Tensor:
        beta = 1.0 if self.beta is None else self.beta[k]
        tempered = (1 - beta) * self.log_base(x) + beta * log_joint(x)
        (grad,) = torch.autograd.grad(tempered.sum(), x, create_graph=True)
        return self.limit(self.eta[k] * grad, self.dynamics.max_drift)

    def scale(self, k: int) -> Tensor:
        """Standard deviation of a step's noise."""
        return (2 * self.eta[k]).sqrt()

    def step(self, x: Tensor, k: int) -> Tensor:
        noise = self.scale(k) * self.noise[k] if self.dynamics.has_noise else 0.0
        return x + self.drift(x, k) + noise

    def jacobian(self, x: Tensor, k: int) -> Tensor:
        """Of a step in ``x``, row by row."""
        columns = [torch.autograd.grad(m.sum(), x, create_graph=True)[0] for m in self.step(x, k).unbind(-1)]
        return torch.stack(columns, -2)

    def states(self) -> list[Tensor]:
        states = [self.u]
        for k in range(len(self.eta)):
            states.append(self.step(states[-1], k))
        return states


Weighed = tuple[list[Tensor], Tensor]  # states, and what is added to the log weight


def path(t: Trial, objective: Objective) -> Weighed:
    states = t.states()
    return states, sum(torch.linalg.slogdet(t.jacobian(x, k))[1] for k, x in enumerate(states[:-1]))


def annealed(t: Trial, objective: Objective) -> Weighed:
    states, total = t.states(), torch.zeros(())
    for k, (u, new) in enumerate(zip(states, states[1:], strict=False)):
        forth, back = (dist.Normal(x + t.drift(x, k), t.scale(k)) for x in (u, new))
        total = total + (back.log_prob(u) - forth.log_prob(new)).sum(-1)
    return states, total


def hamiltonian(t: Trial, objective: Objective) -> Weighed:
    kept, momentum = t.dynamics.kept, dist.Normal(0.0, 1.0)
    u, v, middles, total = t.u, t.noise[0], [], torch.zeros(())
    for k in range(len(t.eta)):
        middle = u + 0.5 * t.scale(k) * v
        pushed = v + 2 * t.drift(middle, k) / t.scale(k)
        u = middle + 0.5 * t.scale(k) * pushed
        total = total + (momentum.log_prob(pushed) - momentum.log_prob(v)).sum(-1)
        v = kept * pushed + (1 - kept**2).sqrt() * t.noise[(k + 1) % len(t.eta)]
        middles.append(middle)
    return [*middles, u], total


def reversed_by(t: Trial, objective: GaussianReverse) -> Weighed:
    states, total, reverse = t.states(), torch.zeros(()), objective._reverse
    for k, (u, new) in enumerate(zip(states, states[1:], strict=False)):
        a, scale, width = t.drift(new, k), t.scale(k), 2 * t.eta[k]
        b, slopes, whiten = (p[k] for p in reverse.parameters)
        if reverse.dense:
            mean = new - a + width * (b + torch.cat([new, a / width], -1) @ slopes)
            factor = torch.diag(scale) @ torch.linalg.inv(whiten)
        else:
            mean = new - a + width * (b + slopes[0] * new) + slopes[1] * a
            factor = torch.diag(scale / whiten)
        forth = dist.Normal(u + t.drift(u, k), scale)
        total = total + dist.MultivariateNormal(mean, scale_tril=factor).log_prob(u) - forth.log_prob(new).sum(-1)
    return states, total


def mixture(t: Trial, objective: Mixture) -> Weighed:
    states = t.states()
    means = (states[-2] + t.drift(states[-2], STEPS - 1)).unflatten(0, (-1, objective.copies))
    terms = dist.Normal(means, t.scale(STEPS - 1)).log_prob(states[-1][:: objective.copies].unsqueeze(1)).sum(-1)
    log_mixture = terms.logsumexp(1) - math.log(objective.copies)
    first = [x[:: objective.copies] for x in states]
    return first, t.log_base(first[0]) - log_mixture


def linearized(t: Trial, objective: Objective) -> Weighed:
    states = t.states()
    if isinstance(t.base, GaussianBase):
        factor = torch.diag_embed(t.base.scale) if t.base.is_diagonal else t.base.scale
        first = factor @ factor.mT
    else:
        first = torch.diag(torch.tensor([1.0, 4.0]))
    spread = first
    for k, x in enumerate(states[:-1]):
        a = t.jacobian(x, k)
        spread = a @ spread @ a.mT + 2 * torch.diag(t.eta[k]) * t.dynamics.has_noise
    return states, 0.5 * (torch.logdet(spread) - torch.logdet(first))


def langevin(step: StepSize | float | None = None, **options: Any) -> Langevin:
    return Langevin(StepSize(0.01) if step is None else step, **options)


def quiet(step: StepSize | float | None = None, **options: Any) -> Langevin:
    return langevin(step, noise=False, **options)


def leapfrog(step: StepSize | float | None = None, **options: Any) -> Hamiltonian:
    return Hamiltonian(StepSize(0.01) if step is None else step, **options)


@dataclass(frozen=True)
class Row:
    """An objective with a dynamics.

    :param by_hand: states and what is added to the log weight; None where it is random.
    :param start: what the density of the start is, for objectives that ask.
    :param limit: the drift of a step from ``eta * grad`` and ``max_drift``.
    :param judges: whether steps that are not invertible are found.
    :param by_step: whether what a run reports of its steps sums to what it adds.
    """

    objective: Callable[[], Objective]
    by_hand: Callable[..., Weighed] | None
    dynamics: Callable[..., Dynamics] = langevin
    start: str = "prior"
    limit: Callable[[Tensor, float], Tensor] = clamped
    judges: bool = False
    by_step: bool = True

    def learned(self, layout: Any, eta: Tensor) -> Objective:
        """The objective; a reverse kernel has the coefficients of made-up runs."""
        objective = self.objective()
        if not isinstance(objective, GaussianReverse):
            return objective
        fit = Fit(layout, eta.detach(), objective.dense)
        u = torch.randn(len(eta), 50, layout.rows, layout.size)
        slope, before = eta.detach()[:, None, None] * (torch.randn_like(u) - u), 1.03 * u + 0.2 * torch.randn_like(u)
        fit.update(before, u, slope, torch.ones(50, layout.rows, dtype=torch.bool))
        return weighed_by(objective, Affine(objective.dense, fit.solve()))

    def base(self, rows: int, size: int) -> Base:
        """Of the start, with leaves."""
        loc = torch.randn(rows, size).requires_grad_()
        if self.start == "diagonal":
            return GaussianBase(loc, (torch.rand(rows, size) + 0.5).requires_grad_())
        if self.start == "dense":
            return GaussianBase(loc, (torch.randn(rows, size, size).tril() + 2 * torch.eye(size)).requires_grad_())
        return PriorBase()

    def guide(self, step: StepSize | float | None = None) -> dict[str, Any]:
        """Arguments of a guide."""
        return dict(objective=self.objective(), dynamics=self.dynamics(step))


def reverse(tempered: bool = False, dense: bool = False) -> Callable[[], Objective]:
    return lambda: GaussianReverse(tempered, dense=dense, pilots=64)


ROWS = {
    "path": Row(lambda: PathDensity(Exact()), path, judges=True),
    "path, noise-free": Row(PathDensity, path, quiet, judges=True),
    "path, Lanczos": Row(lambda: PathDensity(Lanczos(2, 2)), None, judges=True),
    "annealed": Row(Annealed, annealed),
    "annealed, Gaussian": Row(Annealed, annealed, start="diagonal"),
    "annealed, dense Gaussian": Row(Annealed, annealed, start="dense"),
    "Hamiltonian": Row(Annealed, hamiltonian, leapfrog),
    "Hamiltonian, Gaussian": Row(Annealed, hamiltonian, leapfrog, start="diagonal"),
    "reverse": Row(reverse(), reversed_by),
    "reverse, dense": Row(reverse(dense=True), reversed_by),
    "reverse, tempered": Row(reverse(True), reversed_by),
    "reverse, tempered, dense": Row(reverse(True, True), reversed_by),
    "mixture": Row(lambda: Mixture(2), mixture, by_step=False),
    "linearized": Row(Linearized, linearized, by_step=False),
    "linearized, noise-free": Row(Linearized, linearized, quiet, by_step=False),
    "linearized, Gaussian": Row(Linearized, linearized, start="diagonal", by_step=False),
}
