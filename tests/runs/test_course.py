"""Runs whose log density leaves all reason: told, and told from runs that are right."""

from __future__ import annotations

import logging

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from zoo import CASES, EXTRA

from pyro_shortrun import (
    Annealed,
    EnergyELBO,
    Gaussian,
    GaussianReverse,
    Hamiltonian,
    Init,
    Langevin,
    Linearized,
    MCMCTeaching,
    Mixture,
    PathDensity,
    Persistent,
    Prior,
    Refiner,
    ShortRunGuide,
    ShortRunLangevin,
    StepSize,
    VectorizedMCMC,
    energy_prior,
    sample_prior,
)
from pyro_shortrun.runs import RunInfo
from pyro_shortrun.runs.course import astray
from pyro_shortrun.teaching import AncestralSampler

X = (1.0, 2.0, 3.0)


def model(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("n", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def upside_down(x: Tensor) -> None:
    """A factor of the wrong sign: ``+10 z**4`` in the log density."""
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", 10 * z**4)
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def info(levels: list[float], size: int, frozen: bool = False) -> RunInfo:
    steps = len(levels) - 1
    rows = torch.full((1, 1), frozen)
    zeros = torch.zeros(steps)
    return RunInfo(torch.tensor(levels), zeros, zeros, torch.ones(steps, size), rows, rows)


@pytest.mark.parametrize(
    ("levels", "size", "word"),
    [
        ([0.0, -60.0, -121.0], 2, "falls"),
        ([0.0, -60.0, -119.0], 2, None),
        ([0.0, -60.0, -121.0], 3, None),  # more may be lost in more dimensions
        ([0.0, 30.0, 121.0], 2, "rises"),
        ([0.0, 30.0, 119.0], 2, None),
        ([0.0, 32.0, 121.0], 2, None),  # less than three quarters in the last of two steps
        ([0.0, 10.0, 20.0, 30.0, 130.0], 2, "rises"),
        ([0.0, 70.0, 71.0, 72.0, 130.0], 2, None),  # less than half in the last quarter
        ([-1e9, 0.0], 2, None),  # one step cannot speed up
    ],
)
def test_what_is_beyond_reason(levels, size, word):
    """100 nats, and 10 for each coordinate of a row."""
    found = astray(info(levels, size))
    assert found is None if word is None else word in found
    assert astray(info([100 * v for v in levels], size), weight=100.0) == found  # rows of a mini-batch
    assert astray(info(levels, size, frozen=True)) is None  # is told as such


@pytest.fixture
def told(caplog):
    caplog.set_level(logging.WARNING, logger="pyro_shortrun")
    return lambda word: [r for r in caplog.messages if word in r]


FALLING = {
    "PathDensity": lambda: {"objective": PathDensity(), "start": Prior()},
    "Annealed": lambda: {"objective": Annealed(), "start": Prior()},
    "GaussianReverse": lambda: {"objective": GaussianReverse(), "start": Prior()},
    "Mixture": lambda: {"objective": Mixture(2), "start": Prior()},
    "Linearized": lambda: {"objective": Linearized(), "start": Prior()},
    "Gaussian": lambda: {"start": Gaussian()},
    "Init": lambda: {"start": Init(lambda site: torch.zeros(site["fn"].shape()))},
    "Persistent": lambda: {"start": Persistent()},
}


@pytest.mark.parametrize("options", FALLING)
def test_a_step_size_beyond_reason_is_told_once(told, options):
    guide = ShortRunGuide(model, num_steps=3, step_size=StepSize(1e30), **FALLING[options]())
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert max(abs(svi.step(torch.tensor(X))) for _ in range(3)) > 1e20 or not guide.has_density
    assert len(told("log density falls along the runs")) == 1 and told("Lower it")


@pytest.mark.parametrize(
    "options",
    [lambda: {"dynamics": Langevin(0.05)}, lambda: {"dynamics": Hamiltonian(0.05), "objective": Annealed()}],
    ids=["Langevin", "Hamiltonian"],
)
@pytest.mark.parametrize("num_steps", [2, 20])
def test_a_density_without_a_bound_is_told_once(told, options, num_steps):
    guide = ShortRunGuide(upside_down, num_steps=num_steps, start=Prior(), **options())
    svi = SVI(upside_down, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert min(svi.step(torch.tensor(X)) for _ in range(3)) < -1e3
    assert guide.info.nonfinite == 0 and len(told("wrong sign")) == 1


@pytest.mark.parametrize(
    "factor",
    [lambda z: 10 * z**4, lambda z: z**3, lambda z: z.exp(), lambda z: z.sum(-1, keepdim=True).square()],
    ids=["quartic", "cubic", "exponential", "square of the sum"],
)
def test_a_gaussian_is_not_fitted_to_a_density_without_a_bound(factor):
    def unbounded() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.factor("f", factor(z).sum(-1))

    with pytest.raises(ValueError, match=r"no upper bound: .* nats along 'z'.*pyro\.factor of the wrong sign"):
        ShortRunGuide(unbounded).setup()


def test_short_runs_of_a_kernel():
    kernel = ShortRunLangevin(model, 3, step_size=StepSize(1e30))
    with pytest.warns(UserWarning, match="log density falls along the runs.*shown once"):
        VectorizedMCMC(kernel, 3, 2, num_chains=3, disable_progbar=True).run(torch.tensor(X))
    kernel = ShortRunLangevin(upside_down, 10)
    with pytest.warns(UserWarning, match="wrong sign"):
        VectorizedMCMC(kernel, 3, 2, num_chains=3, disable_progbar=True).run(torch.tensor(X))


def test_chains_that_climb_for_ever(told):
    """Adjusted ones; of others the clipped drifts are told."""
    for target, warned in ((model, 0), (upside_down, 1)):
        kernel = ShortRunLangevin(target, 5, adjust=True)
        VectorizedMCMC(kernel, 30, 5, num_chains=3, disable_progbar=True).run(torch.tensor(X))
        assert len(told("still rises after the warm-up")) == warned


def tilted(x: Tensor) -> None:
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        energy_prior("e", lambda z: -10 * z**4, z)
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_runs_in_a_prior(told):
    x, elbo = torch.tensor(X), EnergyELBO(Trace_ELBO(), num_steps=10)
    svi = SVI(tilted, AutoNormal(tilted), pyro.optim.SGD({"lr": 0.0}), elbo)
    for _ in range(2):
        svi.step(x)
    assert len(told("in the prior, the log density rises")) == 1
    sample_prior(tilted, x, num_samples=4, num_steps=10)
    assert len(told("in the prior, the log density rises")) == 2


class Upward(nn.Module):
    """The energy ``-a x**4``."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(10.0))

    def forward(self, x: Tensor) -> Tensor:
        return -self.a * x.pow(4).sum(-1)


def test_runs_of_an_energy_based_model(told):
    decoder = nn.Linear(1, 2)

    def generator(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    energy, sampler = Upward(), AncestralSampler(generator)
    student = SVI(generator, sampler, pyro.optim.SGD({"lr": 0.0}), Trace_ELBO())
    optim = torch.optim.SGD(energy.parameters(), lr=0.0)
    teaching = MCMCTeaching(sampler, Refiner(energy, num_steps=10, step_size=0.1), student, optim)
    for _ in range(2):
        teaching.step(torch.randn(4, 2))
    assert len(told("in the energy-based model, the log density rises")) == 1


SLOW = {"dmm", "gamma_def", "gp_regression", "hmm", "lkj", "mixture"}  # their Hessians are


@pytest.mark.parametrize("case", [c for c in CASES + EXTRA if c.name not in SLOW], ids=lambda c: c.name)
def test_runs_of_the_zoo_are_not_suspected(told, case):
    made, args = case.make()
    guide = ShortRunGuide(made, num_steps=10, start=Prior(), create_plates=case.create_plates)
    guide.sample_posterior(*args, num_samples=8)
    assert not told("along the runs")
