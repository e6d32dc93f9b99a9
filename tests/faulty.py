"""One model and the six kinds of run that faults are put into: what ``test_faults`` and ``test_interrupts`` share."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, SVI, Trace_ELBO
from torch import Tensor, nn

from pyro_shortrun import (
    EnergyELBO,
    LangevinEncoderGuide,
    MCMCTeaching,
    Prior,
    Refiner,
    ShortRunGuide,
    ShortRunLangevin,
    VectorizedMCMC,
    energy_prior,
)
from pyro_shortrun.starts import Replay
from pyro_shortrun.teaching import AncestralSampler

Fault = Callable[[Tensor], Tensor]


def nothing(z: Tensor) -> Tensor:
    return 0.0 * z.sum(-1)


class Energy(nn.Module):
    """An energy of data or latents, and a fault that is added to it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, 1)
        self.fault: Fault = nothing

    def forward(self, v: Tensor) -> Tensor:
        return torch.tanh(self.linear(v)).squeeze(-1) + self.fault(v)


class Net(nn.Module):
    """A decoder and an energy of its latents, and the model of both.

    ``fault`` is added to the log joint; ``trouble`` is called whenever the decoder runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.decoder, self.energy = nn.Linear(2, 3), Energy(2)
        self.fault: Fault = nothing
        self.trouble: Callable[[], None] = lambda: None

    def model(self, x: Tensor, tilted: bool = False) -> None:
        pyro.module("net", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            if tilted:
                energy_prior("ebm", self.energy, z)
            pyro.factor("fault", self.fault(z))
            self.trouble()
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def tilted(self, x: Tensor) -> None:
        self.model(x, tilted=True)


class Encoded(LangevinEncoderGuide):
    """With features for three-dimensional data."""

    def __init__(self, model: Callable) -> None:
        super().__init__(model, nn.Sequential(nn.Linear(3, 16), nn.Tanh()), init_scale=0.1)


class Run(ABC):
    """Something that learns or draws, step by step."""

    def __init__(self) -> None:
        self.net = Net()

    @abstractmethod
    def step(self, x: Tensor) -> Any:
        """Numbers or draws."""

    def put(self, fault: Fault) -> None:
        """Into the density of the runs."""
        self.net.fault = fault

    @property
    @abstractmethod
    def excluded(self) -> int:
        """Rows or draws of the last step that met something that is not finite."""

    def state(self) -> dict[str, Any]:
        """All that a step changes, copied and flat."""
        return copy.deepcopy(flat(self.parts()))

    def parts(self) -> dict[str, Any]:
        return {"net": self.net.state_dict()}


class Training(Run):
    """By SVI."""

    def __init__(self) -> None:
        super().__init__()
        self.guide, self.loss = self.build()
        self.svi = SVI(self.model, self.guide, pyro.optim.Adam({"lr": 0.01}), self.loss)

    @property
    def model(self) -> Callable:
        return self.net.model

    def build(self) -> tuple[Any, Any]:
        return ShortRunGuide(self.model, num_steps=2, start=Prior()), Trace_ELBO()

    def step(self, x: Tensor) -> Tensor:
        return torch.tensor(self.svi.step(x))

    @property
    def excluded(self) -> int:
        return self.guide.info.nonfinite

    def parts(self) -> dict[str, Any]:
        return {**super().parts(), "guide": self.guide.state_dict()}


class EnergyTraining(Training):
    @property
    def model(self) -> Callable:
        return self.net.tilted

    def build(self) -> tuple[Any, Any]:
        loss = EnergyELBO(Trace_ELBO(), num_steps=2, step_size=0.1, start=Replay(16))
        return ShortRunGuide(self.model, num_steps=2, start=Prior()), loss

    def put(self, fault: Fault) -> None:
        self.net.energy.fault = lambda z: -fault(z)

    @property
    def excluded(self) -> int:
        return self.loss.info.excluded

    def parts(self) -> dict[str, Any]:
        return {**super().parts(), "replay": self.loss.runs.begins.state_dict()}


class EncoderTraining(Training):
    def build(self) -> tuple[Any, Any]:
        return Encoded(self.model), Trace_ELBO()


class Chains(Run):
    """Adjusted chains, anew in every step."""

    adjust = True

    def step(self, x: Tensor) -> Tensor:
        kernel = ShortRunLangevin(self.net.model, 2, adjust=self.adjust, persistent=True)
        self.mcmc = VectorizedMCMC(kernel, 3, 3, num_chains=4, disable_progbar=True)
        self.mcmc.run(x)
        return self.mcmc.get_samples()["z"]

    @property
    def excluded(self) -> int:
        return int(self.mcmc.sample_stats["nonfinite"].sum())


class Unadjusted(Chains):
    adjust = False


class PyrosChains(Run):
    """The same in Pyro's MCMC."""

    def step(self, x: Tensor) -> Tensor:
        kernel = ShortRunLangevin(self.net.model, 2, adjust=True)
        self.mcmc = MCMC(kernel, num_samples=5, warmup_steps=3, disable_progbar=True)
        self.mcmc.run(x)
        return self.mcmc.get_samples()["z"]

    @property
    def excluded(self) -> int:
        return len(self.mcmc.diagnostics()["divergences"]["chain 0"])


class Teaching(Run):
    """With a replay buffer, and a student of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.energy, self.replay = Energy(3), Replay(16)
        guide = ShortRunGuide(self.net.model, num_steps=2, start=Prior())
        student = SVI(self.net.model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        refiner = Refiner(self.energy, 2, 0.1, replay=self.replay)
        optim = torch.optim.Adam(self.energy.parameters(), lr=0.01)
        self.teaching = MCMCTeaching(AncestralSampler(self.net.model, "x"), refiner, student, optim)

    def step(self, x: Tensor) -> Tensor:
        return torch.tensor(list(self.teaching.step(x).values()))

    def put(self, fault: Fault) -> None:
        self.energy.fault = lambda x: -fault(x)

    @property
    def excluded(self) -> int:
        return self.teaching.info.nonfinite

    def parts(self) -> dict[str, Any]:
        return {**super().parts(), "teaching": self.teaching.state_dict()}


RUNS = {
    "guide": Training,
    "encoder": EncoderTraining,
    "energy": EnergyTraining,
    "teaching": Teaching,
    "chains": Chains,
    "unadjusted chains": Unadjusted,
    "Pyro's MCMC": PyrosChains,
}


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Leaves of nested dicts and lists by path."""
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in flat(part, f"{name}/{key}").items()}
    if isinstance(value, (list, tuple)):
        return flat(dict(enumerate(value)), name)
    return {name: value}


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b
