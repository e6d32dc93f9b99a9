"""Methods of ``generators.py``: ways to train one decoder, all of them with the same data and networks."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from generators_data import Images
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from torch.nn import functional

from pyro_shortrun import (
    Annealed,
    Langevin,
    Nesterov,
    PathDensity,
    Persistent,
    Prior,
    Refine,
    ShortRunELBO,
    ShortRunGuide,
    ShortRunSVI,
    StepSize,
)

SIGMA = 0.1  # noise of a pixel, where pixels are not binary
RATES = (1e-3, 2e-3, 4e-3)
RATE = 2e-3  # of methods that have one
LATENT, HIDDEN, BATCH = 16, 128, 100


def network(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b), nn.GELU()]
    return nn.Sequential(*layers[:-1])


def gaussian(out: Tensor) -> tuple[Tensor, Tensor]:
    loc, log_scale = out.chunk(2, -1)
    return loc, log_scale.clamp(-6, 2).exp()


class Generator:
    """The decoder as a Pyro program, ``z ~ N(0, I)``, one layer."""

    latent = LATENT

    def __init__(self, data: Images) -> None:
        self.binary, self.size = data.binary, len(data.train)
        self.decoder = network(LATENT, HIDDEN, HIDDEN, data.pixels)

    def observed(self, z: Tensor) -> Any:
        out = self.decoder(z)
        return dist.Bernoulli(logits=out) if self.binary else dist.Normal(out, SIGMA)

    def model(self, x: Tensor, index: Tensor | None = None) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x) if index is None else self.size, subsample=index):
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1))
            pyro.sample("x", self.observed(z).to_event(1), obs=x)

    @torch.no_grad()
    def decoded(self, z: Tensor) -> Tensor:
        """Mean images."""
        return self.observed(z).mean

    @torch.no_grad()
    def samples(self, count: int) -> Tensor:
        """Images of the prior: binary ones drawn, others without the noise of pixels."""
        found = self.observed(torch.randn(count, LATENT, generator=torch.Generator().manual_seed(1)))
        return found.sample() if self.binary else found.mean


def cpu_seconds() -> float:
    """Of this process and those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


class Method:
    """A way to train a generator, in a parameter store of its own.

    :ivar seconds: CPU seconds of all steps so far, set-up and compilation included.
    """

    def __init__(self, name: str, data: Images, seed: int, rate: float) -> None:
        torch.manual_seed(seed)
        self.name, self.data, self.rate, self.generator = name, data, rate, Generator(data)
        self.seconds, self.updates = 0.0, 0
        self._state: Any = {"params": {}, "constraints": {}}
        self._batches = self._order(seed)

    def _order(self, seed: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield from torch.randperm(len(self.data.train), generator=generator).split(BATCH)[
                : len(self.data.train) // BATCH
            ]

    @contextmanager
    def store(self) -> Iterator[None]:
        """Its own parameter store inside."""
        with pyro.get_param_store().scope(self._state) as state:
            yield
        self._state = state

    def train(self, updates: int) -> None:
        with self.store():
            began = cpu_seconds()
            for _ in range(updates):
                index = next(self._batches)
                self.step(self.data.train[index], index)
            self.seconds += cpu_seconds() - began
        self.updates += updates

    @property
    def step_size(self) -> float | None:
        """Of its runs, where it makes some."""
        return None

    def step(self, x: Tensor, index: Tensor) -> None:
        raise NotImplementedError

    def draw(self, x: Tensor) -> Tensor:
        """A draw of z for each image, by the method's own inference."""
        return self.draws(x, 1)[0]

    def draws(self, x: Tensor, count: int) -> Tensor:
        """Draws, ``(count, len(x), latents)``."""
        raise NotImplementedError


class Encoded(Method):
    """With an encoder, of which a :class:`Method` makes what it likes."""

    def __init__(self, name: str, data: Images, seed: int, rate: float) -> None:
        super().__init__(name, data, seed, rate)
        self.encoder = network(data.pixels, HIDDEN, HIDDEN, 2 * LATENT)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(*gaussian(self.encoder(x))).to_event(1))

    def draws(self, x: Tensor, count: int) -> Tensor:
        with torch.no_grad():
            return torch.stack([torch.normal(*gaussian(self.encoder(x))) for _ in range(count)])


class PyroVAE(Encoded):
    """Pyro's SVI with Trace_ELBO."""

    def __init__(self, name: str, data: Images, seed: int, rate: float) -> None:
        super().__init__(name, data, seed, rate)
        self._svi = SVI(self.generator.model, self.guide, pyro.optim.Adam({"lr": rate}), Trace_ELBO())

    def step(self, x: Tensor, index: Tensor) -> None:
        self._svi.step(x)


class TorchVAE(Encoded):
    """The same by hand in PyTorch."""

    def __init__(self, name: str, data: Images, seed: int, rate: float) -> None:
        super().__init__(name, data, seed, rate)
        parameters = [*self.generator.decoder.parameters(), *self.encoder.parameters()]
        self._optimiser = torch.optim.Adam(parameters, lr=rate)

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        out = self.generator.decoder(z)
        if self.data.binary:
            likelihood = -functional.binary_cross_entropy_with_logits(out, x, reduction="sum")
        else:
            likelihood = -0.5 * ((out - x) / SIGMA).square().sum()
        return likelihood - 0.5 * z.square().sum()

    def encoded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Draws, and the sum of their log densities up to a constant."""
        loc, scale = gaussian(self.encoder(x))
        noise = torch.randn_like(loc)
        return loc + scale * noise, -(scale.log() + 0.5 * noise.square()).sum()

    def step(self, x: Tensor, index: Tensor) -> None:
        self._optimiser.zero_grad()
        z, log_q = self.encoded(x)
        (log_q - self.log_joint(x, z)).backward()
        self._optimiser.step()


class ShortRun(Encoded):
    """A ShortRunGuide.

    :param options: of the guide, given this method.
    :param rate: learning rate of the networks; step sizes have fifty times as much.
    :param indexed: whether the guide is to know which images it has.
    """

    def __init__(
        self,
        name: str,
        data: Images,
        seed: int,
        options: Options,
        *,
        rate: float = RATE,
        indexed: bool = False,
    ) -> None:
        super().__init__(name, data, seed, rate)
        self._indexed = indexed
        self.guide_of_runs = ShortRunGuide(self.generator.model, **options(self))
        optimiser = pyro.optim.Adam(lambda n: {"lr": 50 * rate if "step_size" in n else rate})
        elbo = Trace_ELBO() if indexed else ShortRunELBO()
        self._svi = ShortRunSVI(self.generator.model, self.guide_of_runs, optimiser, elbo)

    def step(self, x: Tensor, index: Tensor) -> None:
        self._svi.step(*((x, index) if self._indexed else (x,)))

    def draws(self, x: Tensor, count: int) -> Tensor:
        """From the prior by 40 steps where the method's chains belong to training images."""
        with self.store():
            longer = 40 if self._indexed else None
            return self.guide_of_runs.sample_posterior(x, num_samples=count, num_steps=longer)["z"][0]

    @property
    def step_size(self) -> float | None:
        return float(self.guide_of_runs.step_sizes())


Options = Callable[[ShortRun], dict[str, Any]]


def refined(steps: int, compile: bool = True) -> Options:
    return lambda m: dict(num_steps=steps, start=m.guide, objective=Refine(), compile=compile)


def persistent(steps: int) -> Options:
    return lambda m: dict(num_steps=steps, start=Persistent())


def gradient(steps: int) -> Options:
    def options(m: ShortRun) -> dict[str, Any]:
        dynamics = Langevin(StepSize(0.02, max=0.1), noise=False)
        return dict(num_steps=steps, start=Prior(), dynamics=dynamics, objective=PathDensity())

    return options


def annealed(steps: int) -> Options:
    def options(m: ShortRun) -> dict[str, Any]:
        dynamics = Langevin(StepSize(0.02, max=0.1))
        return dict(num_steps=steps, start=Prior(), dynamics=dynamics, objective=Annealed())

    return options


def nesterov(steps: int) -> Options:
    """Its step by the acceptance of a Langevin step."""
    return lambda m: dict(num_steps=steps, start=Prior(), dynamics=Nesterov(0.02), objective=Refine())
