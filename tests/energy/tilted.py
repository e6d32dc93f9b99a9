"""Energies and models whose tilted priors are known."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_shortrun import energy_prior
from pyro_shortrun.energy import TiltedPrior
from pyro_shortrun.energy.negative import Negative
from pyro_shortrun.runs import RunInfo


class Quadratic(nn.Module):
    """``a z + c z^2 / 2``: the prior N(0, 1) becomes ``N(-a / (1 + c), 1 / (1 + c))``."""

    def __init__(self, c: float = 0.5, a: float = 0.0) -> None:
        super().__init__()
        self.c, self.a = nn.Parameter(torch.tensor(c)), nn.Parameter(torch.tensor(a))

    def forward(self, z: Tensor) -> Tensor:
        return self.a * z + self.c * z.square() / 2


def one_layer(energy: Callable, noise: float = 0.5) -> Callable:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            energy_prior("ebm", energy, z)
            pyro.sample("x", dist.Normal(z, noise), obs=x)

    return model


def silent(end: Tensor) -> RunInfo:
    """The record of a run in which nothing went wrong."""
    none = torch.zeros(end.shape[:2], dtype=torch.bool)
    return RunInfo(end.new_zeros(2), end.new_zeros(1), end.new_zeros(0), end.new_zeros(1, 1), none, none)


def log_z_grad(model: Callable, args: tuple, end: Tensor, params: list[Tensor]) -> list[Tensor]:
    """The gradient that negative samples ``end`` give, ``(chains, rows, size)``."""
    call = TiltedPrior(model).bind(args, {})
    assert call is not None
    return list(torch.autograd.grad(Negative.at(call, end, silent(end)).surrogate, params))


def sigma_points(mean: Tensor, cov: Tensor) -> Tensor:
    """Points whose equal-weight average is the exact expectation of any quadratic, ``(2 n, n)``."""
    root = math.sqrt(len(mean)) * torch.linalg.cholesky(cov).T
    return mean + torch.cat([root, -root])


class Layered(nn.Module):
    """Parameters of z2 -> z1 and of a joint energy with two wells."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.s = nn.Parameter(torch.tensor(0.8)), nn.Parameter(torch.tensor(-0.3))
        self.height = nn.Parameter(torch.tensor(1.5))

    def energy(self, z1: Tensor, z2: Tensor) -> Tensor:
        return self.height * torch.exp(-(z1.square())) * torch.sigmoid(2 * z2)


def two_layers(net: Layered) -> Callable:
    def model(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(()), 1.0))
            z1 = pyro.sample("z1", dist.Normal(net.w * z2, net.s.exp()))
            energy_prior("ebm", net.energy, z1, z2)
            pyro.sample("x", dist.Normal(z1, 0.5), obs=x)

    return model


def encoder(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x, 0.5))
