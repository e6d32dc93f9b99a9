"""Features, and targets whose laws are known."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from pyro_shortrun.amortized import Basis, Everywhere, Span, Whitened
from pyro_shortrun.amortized.chain import LinearChain, LinearTarget


def eta(value: float = 0.03) -> Tensor:
    return torch.tensor(value)


def net(width: int = 12, inputs: int = 2) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, width), nn.Tanh())


def skewed(u: Tensor) -> tuple[Tensor, Tensor]:
    """An asymmetric density of two correlated coordinates, by rows; with its gradient."""
    a, b = u.unbind(-1)
    e = (a + 0.5 * b).exp()
    return -e + 2 * a + b - b.square(), torch.stack([-e + 2, -0.5 * e + 1 - 2 * b], -1)


def target(rows: int = 3, width: int = 5, basis: Basis | None = None) -> LinearTarget:
    features = torch.randn(rows, width)
    return LinearTarget(skewed, features, None if basis is None else basis.of(features))


BASES = [Everywhere(), Span(), Whitened(0.1)]


def chain(basis: Basis | None = None) -> LinearChain:
    return LinearChain(0.1, True, 0.574, basis, 1.0)


def waves(x: Tensor) -> Tensor:
    """Random features, nearly orthogonal ones for rows that are not too close."""
    options = dict(generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float64, device="cpu")
    weights, phase = (torch.randn(n, 60, **options) for n in (x.shape[-1], 1))
    return torch.cos(x @ weights.to(x) + 6 * phase.to(x))


def conjugate(full: int | None = None) -> Callable:
    """The papers' toy: z ~ N(0, I) in the plane, x ~ N(z, S)."""
    cov = torch.tensor([[0.7, 0.6], [0.6, 0.8]])

    def model(x: Tensor) -> None:
        with pyro.plate("data", full or len(x), subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.MultivariateNormal(z, cov), obs=x)

    return model


def posterior(x: Tensor) -> MultivariateNormal:
    cov = torch.tensor([[0.7, 0.6], [0.6, 0.8]])
    inverse = cov.inverse()
    precision = torch.eye(2) + inverse
    return MultivariateNormal(torch.linalg.solve(precision, (inverse @ x.T)).T, precision_matrix=precision)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.log_sigma = nn.Linear(2, 4), nn.Parameter(torch.tensor(-0.5))

    def forward(self, z: Tensor) -> dist.Distribution:
        return dist.Normal(torch.tanh(self.linear(z)), self.log_sigma.exp()).to_event(1)


def generator(decoder: nn.Module) -> Callable:
    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", decoder(z), obs=x)

    return model
