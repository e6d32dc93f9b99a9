"""What goes wrong in real use: empty batches, other dtypes, interrupts, explosions. State stays whole."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from pyro_shortrun import (
    AncestralSampler,
    EnergyELBO,
    LangevinEncoderGuide,
    MCMCTeaching,
    Refiner,
    ShortRunGuide,
    ShortRunLangevin,
    VectorizedMCMC,
    energy_prior,
)


class Net(nn.Module):
    """A decoder and an energy, and the model of both; ``trouble`` is called whenever the decoder runs."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder, self.energy = nn.Linear(2, 3), nn.Linear(2, 1)
        self.trouble: Callable[[], None] = lambda: None

    def model(self, x: Tensor, tilted: bool = False) -> None:
        pyro.module("net", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            if tilted:
                energy_prior("ebm", lambda z: torch.tanh(self.energy(z)).squeeze(-1), z)
            self.trouble()
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def tilted(self, x: Tensor) -> None:
        self.model(x, tilted=True)


class Encoded(LangevinEncoderGuide):
    """With features for three-dimensional data."""

    def __init__(self, model: Callable) -> None:
        super().__init__(model, nn.Sequential(nn.Linear(3, 16), nn.Tanh()))


def svi(net: Net, kind: str) -> SVI:
    model = net.tilted if kind == "energy" else net.model
    guide = Encoded(model) if kind == "encoder" else ShortRunGuide(model, num_steps=2)
    loss = EnergyELBO(Trace_ELBO(), num_steps=2, step_size=0.1) if kind == "energy" else Trace_ELBO()
    return SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss)


def chains(net: Net, x: Tensor) -> VectorizedMCMC:
    mcmc = VectorizedMCMC(ShortRunLangevin(net.model, 2, adjust=True), 3, 3, num_chains=2, disable_progbar=True)
    mcmc.run(x)
    return mcmc


KINDS = ["guide", "energy", "encoder"]


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batches_are_named(kind):
    run = svi(Net(), kind)
    run.step(torch.randn(4, 3))
    with pytest.raises(ValueError, match="size 0"):
        run.step(torch.zeros(0, 3))
    assert run.step(torch.randn(4, 3)) > 0


def test_chains_refuse_an_empty_batch():
    with pytest.raises(ValueError, match="size 0"):
        chains(Net(), torch.zeros(0, 3))


@pytest.mark.parametrize("kind", ["guide", "energy"])
def test_data_of_another_dtype(kind):
    """As for Pyro: numbers are promoted, and the latents keep the dtype of their prior."""
    dtype = torch.float32 if torch.get_default_dtype() == torch.float64 else torch.float64
    run = svi(Net(), kind)
    assert run.step(torch.randn(4, 3, dtype=dtype)) > 0
    draws = run.guide.sample_posterior(torch.randn(4, 3, dtype=dtype), num_samples=2)
    assert draws["z"].dtype == torch.get_default_dtype()


def test_chains_on_data_of_another_dtype():
    dtype = torch.float32 if torch.get_default_dtype() == torch.float64 else torch.float64
    draws = chains(Net(), torch.randn(4, 3, dtype=dtype)).get_samples()
    assert draws["z"].dtype == torch.get_default_dtype() and draws["z"].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", [KeyboardInterrupt, SystemExit, MemoryError])
def test_an_interrupt_leaves_no_trace(kind, fault):
    """Wherever it comes: what was interrupted is as before, but for random numbers, and goes on."""
    net, x = Net(), torch.randn(4, 3)
    run = svi(net, kind)
    run.step(x)
    left = [0]

    def trouble() -> None:
        left[0] -= 1
        if left[0] == 0:
            raise fault

    for runs in (1, 2, 3):
        before = {k: copy.deepcopy(v) for k, v in run.guide.state_dict().items()}, copy.deepcopy(net.state_dict())
        left[0], net.trouble = runs, trouble
        with pytest.raises(fault):
            run.step(x)
        net.trouble = lambda: None
        after = run.guide.state_dict(), net.state_dict()
        assert all(torch.equal(a[k], b[k]) for a, b in zip(before, after, strict=True) for k in a)
        assert torch.is_grad_enabled() and not pyro.poutine.runtime._PYRO_STACK
        assert torch.isfinite(torch.tensor(run.step(x)))


class Exploding(nn.Module):
    """An energy without a lower bound, whose gradient overflows."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return -self.rate * torch.exp(x.square().sum(-1) ** 4)


def test_exploding_energies_are_counted_and_reach_no_parameter():
    energy = Exploding()

    def model(x: Tensor) -> None:
        pyro.module("energy", energy)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            energy_prior("ebm", energy, z)
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    loss = EnergyELBO(Trace_ELBO(), num_steps=2, step_size=0.1)
    guide = ShortRunGuide(model, num_steps=2, step_size=1e-3)
    with pytest.warns(UserWarning, match="non-finite"):
        SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss).step(torch.zeros(64, 2))
    assert loss.info is not None and 0 < loss.info.excluded < 64
    assert energy.rate.isfinite()


def test_teaching_drops_exploding_runs():
    def generator(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    energy = Exploding()
    sampler = AncestralSampler(generator)
    student = SVI(generator, sampler, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    teaching = MCMCTeaching(sampler, Refiner(energy, 5, 0.5), student, torch.optim.Adam(energy.parameters()))
    with pytest.warns(UserWarning):
        teaching.step(torch.zeros(64, 2))
    assert 0 < teaching.info.nonfinite < 64
    assert energy.rate.isfinite()
