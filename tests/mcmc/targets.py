"""Targets of chains whose posteriors are known."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_shortrun import ShortRunLangevin, VectorizedMCMC
from pyro_shortrun.mcmc.langevin_chain import LangevinChain


def gaussian() -> None:
    """N(mean, covariance), asymmetric and correlated."""
    pyro.sample("z", dist.MultivariateNormal(MEAN(), COVARIANCE()))


def MEAN() -> Tensor:
    return torch.tensor([1.0, -2.0, 0.5])


def COVARIANCE() -> Tensor:
    return torch.tensor([[1.0, 0.8, 0.0], [0.8, 1.0, 0.3], [0.0, 0.3, 2.0]])


def curved() -> None:
    """Four rows of two coordinates, not Gaussian."""
    with pyro.plate("data", 4):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.LogNormal(0.0, 0.5))
        pyro.sample("x", dist.Normal(torch.sin(a) * b, 0.7), obs=torch.tensor([0.3, -0.4, 2.0, 0.0]))


def regression(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, noise), obs=y)


def regression_data() -> tuple[Tensor, Tensor]:
    x = torch.randn(30, 2)
    return x, x.sum(-1) + 0.5 * torch.randn(30)


def scalar(precision: float, mean: float = 0.0):
    """A potential for N(mean, 1 / precision)."""
    return lambda params: 0.5 * precision * (params["u"] - mean).square().sum()


def walk(kernel: ShortRunLangevin, chains: int = 1, warmup: int = 0, **options) -> LangevinChain:
    sampler = kernel.open(chains, warmup, (), {}, **options).sampler
    assert isinstance(sampler, LangevinChain)
    return sampler


def quiet(kernel: ShortRunLangevin, samples: int, warmup: int, chains: int = 1, **options) -> VectorizedMCMC:
    return VectorizedMCMC(kernel, samples, warmup, num_chains=chains, disable_progbar=True, **options)


def subsampled(x: Tensor, size: int) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x), subsample_size=size) as index:
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x[index])
