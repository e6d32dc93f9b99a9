"""Energies, generators and encoders that teaching is known for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from pyro_shortrun import MCMCTeaching, Refiner
from pyro_shortrun.teaching import AncestralSampler

MEAN = [1.0, -2.0]


ROOT = [[1.5, 0.0], [0.6, 0.7]]


NOISE = 0.5


class Gaussian(nn.Module):
    """``a x + x P x / 2``."""

    def __init__(self, a: Any = (0.0, 0.0), p: Any = ((0.0, 0.0), (0.0, 0.0))) -> None:
        super().__init__()
        self.a, self.p = nn.Parameter(torch.tensor(a)), nn.Parameter(torch.tensor(p))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.a + (x @ self.p * x).sum(-1) / 2


class Linear(nn.Module):
    """``x = W z + b + noise``, with contexts added."""

    def __init__(self, noise: float = NOISE, prior: Callable = dist.Normal) -> None:
        super().__init__()
        self.w, self.b, self.loc = (nn.Parameter(t) for t in (torch.eye(2), torch.zeros(2), torch.zeros(2)))
        self.noise, self.prior = noise, prior

    def forward(self, x: Tensor, *context: Tensor) -> None:
        pyro.module("linear", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior(self.loc.expand(len(x), 2), 1.0).to_event(1))
            mean = z @ self.w.T + self.b + sum(context)
            pyro.sample("x", dist.Normal(mean, self.noise).to_event(1), obs=x)


class Encoder(nn.Module):
    """A linear Gaussian encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2)

    def forward(self, x: Tensor, *context: Tensor) -> None:
        pyro.module("encoder", self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.net(x - sum(context)), 0.5).to_event(1))


class SigmaPoints(dist.Normal):
    """Points whose mean and covariance are exactly those of N(0, I), as its draws."""

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        root = math.sqrt(2) * torch.eye(2)
        return torch.cat([root, -root])


def sigma_points(root: Tensor) -> Tensor:
    return torch.tensor(MEAN) + math.sqrt(2) * torch.cat([root.T, -root.T])


def sgd(lr: float) -> pyro.optim.PyroOptim:
    return pyro.optim.SGD({"lr": lr})


def teach(energy: nn.Module, model: nn.Module, guide: Any = None, lr: float = 0.1, **refiner: Any) -> MCMCTeaching:
    """Regression, unless there is a guide."""
    sampler = AncestralSampler(model)
    student = SVI(model, guide(sampler) if guide else sampler, sgd(0.01), Trace_ELBO())
    options = dict(num_steps=3, step_size=0.1, noise=0.0) | refiner
    return MCMCTeaching(sampler, Refiner(energy, **options), student, torch.optim.SGD(energy.parameters(), lr=lr))


class Around(nn.Module):
    """A Gaussian around the context."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.scale * (x - c).square().sum(-1) / 2


class Broken(nn.Module):
    """Flat, but not a number beyond a wall, and with a drift towards it."""

    def __init__(self, wall: float) -> None:
        super().__init__()
        self.wall, self.scale = wall, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        value = -self.scale * x.sum(-1)
        return torch.where(x[:, 0] > self.wall, torch.full_like(value, torch.nan), value)
