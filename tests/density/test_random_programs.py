"""Programs nobody thought of: sites, supports, plates, subsampling, hierarchy, enumeration, masks and scales at random.

Each is a list of :class:`Site` that hypothesis draws and shrinks. On every one the log density equals that of Pyro's
own trace, its gradient finite differences, the traced graph the eager one, guide and kernel run, and the kernel takes
what Pyro's HMC can initialise, or refuses it by the name of a site.

    PROGRAMS=5 pytest tests/density/test_random_programs.py     # five times as many programs
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import test_density as laws
import torch
from hypothesis import HealthCheck, Phase, assume, event, given, settings
from hypothesis import strategies as st
from programs import traced
from pyro import poutine
from pyro.infer import ELBO, HMC, SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyro_shortrun import (
    Annealed,
    PathDensity,
    Prior,
    ShortRunELBO,
    ShortRunGuide,
    ShortRunLangevin,
    StepSize,
    VectorizedMCMC,
)
from pyro_shortrun.compile import Compiler, Untouched

Family = Callable[[Tensor], dist.TorchDistribution]

# Of a location that may be any number: supports on the line, half-lines, intervals (one that moves), vectors, matrices.
LATENT: dict[str, Family] = {
    "Normal": lambda x: dist.Normal(x, 1.0),
    "StudentT": lambda x: dist.StudentT(4.0, x, 0.5 + torch.sigmoid(x)),
    "Laplace": lambda x: dist.Laplace(x, 1.5),
    "LogNormal": lambda x: dist.LogNormal(0.3 * torch.tanh(x), 0.5),
    "Gamma": lambda x: dist.Gamma(2.0, torch.exp(0.3 * torch.tanh(x))),
    "Exponential": lambda x: dist.Exponential(1 + torch.sigmoid(x)),
    "HalfCauchy": lambda x: dist.HalfCauchy(0.5 + torch.sigmoid(x)),
    "Beta": lambda x: dist.Beta(1.5 + torch.sigmoid(x), 2.0),
    "Uniform": lambda x: dist.Uniform(-1.0, 1 + torch.tanh(x).square()),
    "vector": lambda x: dist.Normal(x.unsqueeze(-1).expand((*x.shape, 2)), 1.0).to_event(1),
    "MultivariateNormal": lambda x: dist.MultivariateNormal(
        torch.stack([x, -x], -1), scale_tril=torch.tensor([[1.0, 0.0], [0.5, 1.0]])
    ),
    "Dirichlet": lambda x: dist.Dirichlet(1.5 + torch.sigmoid(torch.stack([x, -x, 0 * x], -1))),
    "LKJCholesky": lambda x: dist.LKJCholesky(2, 1.5 + torch.sigmoid(x)),
}
DISCRETE: dict[str, Family] = {
    "Bernoulli": lambda x: dist.Bernoulli(logits=x),
    "Categorical": lambda x: dist.Categorical(logits=torch.stack([x, 0 * x, -x], -1)),
}
DATA: dict[str, tuple[Family, float]] = {
    "Normal": (lambda x: dist.Normal(x, 0.7), 0.3),
    "Bernoulli": (lambda x: dist.Bernoulli(logits=x), 1.0),
    "Poisson": (lambda x: dist.Poisson(torch.exp(torch.tanh(x))), 2.0),
    "Gamma": (lambda x: dist.Gamma(2.0, torch.exp(torch.tanh(x))), 1.5),
}
FAMILIES = {"latent": LATENT, "discrete": DISCRETE, "data": DATA}
PLATES = {"inner": (-1, 3), "outer": (-2, 2)}


@dataclass(frozen=True)
class Site:
    """A statement: its parents are earlier sites by number, its plates contain theirs."""

    kind: str  # "latent", "discrete", "data", "holes" (data, some of them missing) or "factor"
    family: str
    parents: tuple[int, ...]
    plates: frozenset[str]
    is_masked: bool
    scale: float


@dataclass(frozen=True)
class RandomProgram:
    """A Pyro program; with ``batch``, the inner plate shows that many of its elements at a time."""

    sites: tuple[Site, ...]
    batch: int | None
    has_parameter: bool = False

    def __call__(self) -> None:
        plates = {
            name: pyro.plate(name, size, subsample_size=self.batch if name == "inner" else None, dim=dim)
            for name, (dim, size) in PLATES.items()
            if any(name in site.plates for site in self.sites)
        }
        values: list[Tensor] = []
        for i, site in enumerate(self.sites):
            with ExitStack() as stack:
                for name in sorted(site.plates, reverse=True):  # "outer" first
                    stack.enter_context(plates[name])
                if site.is_masked:
                    stack.enter_context(poutine.mask(mask=_mask(site)))
                stack.enter_context(poutine.scale(scale=site.scale))
                values.append(self._sample(f"{site.kind}{i}", site, values))

    @property
    def is_enumerated(self) -> bool:
        return any(site.kind == "discrete" for site in self.sites)

    def names(self, kind: str) -> list[str]:
        return [f"{kind}{i}" for i, site in enumerate(self.sites) if site.kind == kind]

    @property
    def latents(self) -> list[str]:
        """Names of what is to be inferred: what Pyro makes of missing data, too."""
        return sorted([*self.names("latent"), *(f"{name}_unobserved" for name in self.names("holes"))])

    def _sample(self, name: str, site: Site, values: list[Tensor]) -> Tensor:
        location = pyro.param("location", torch.zeros(())) if self.has_parameter else torch.zeros(())
        for j in site.parents:
            location = location + self._scalar(self.sites[j], values[j])
        if site.kind == "factor":
            pyro.factor(name, torch.cos(location))
            return pyro.deterministic(f"{name}_value", torch.sin(location))
        if site.kind == "data":
            family, observed = DATA[site.family]
            return pyro.sample(name, family(location), obs=torch.tensor(observed))
        if site.kind == "holes":
            family, observed = DATA["Normal"]
            return pyro.sample(name, family(location), obs=torch.tensor(observed), obs_mask=_seen(site))
        return pyro.sample(name, (LATENT | DISCRETE)[site.family](location))

    @staticmethod
    def _scalar(site: Site, value: Tensor) -> Tensor:
        """One number per element, whatever the event."""
        if site.family in ("vector", "MultivariateNormal", "Dirichlet"):
            return torch.tanh(value).prod(-1)
        if site.family == "LKJCholesky":
            return value[..., 1, 0]
        return torch.tanh(value.to(torch.get_default_dtype()))


def _seen(site: Site) -> Tensor:
    """Of an observation with holes: its second element of the plate "outer", or all of it."""
    return torch.tensor([[False], [True]]) if "outer" in site.plates else torch.tensor(True)


def _mask(site: Site) -> Tensor:
    """Takes out the first element of the innermost plate that keeps its size."""
    if site.plates != {"outer"}:
        return torch.tensor(True)
    return torch.tensor([[False], [True]])


@st.composite
def programs(draw: st.DrawFn, kinds: str = "latent latent latent data data factor holes") -> RandomProgram:
    batch = draw(st.sampled_from([None, None, 2]))
    sites: list[Site] = []
    for i in range(draw(st.integers(2, 5))):
        kind = "latent" if i == 0 else draw(st.sampled_from(kinds.split()))
        family = draw(st.sampled_from(sorted(FAMILIES.get(kind, {"Normal": None}))))
        parents = draw(st.sets(st.sampled_from(range(i)), max_size=2)) if i else set()
        parents = {j for j in parents if sites[j].kind not in ("data", "holes")}
        needed = frozenset().union(*(sites[j].plates for j in parents))
        plates = needed | draw(st.frozensets(st.sampled_from(sorted(PLATES))))
        masked = kind == "data" and draw(st.integers(0, 4)) == 0
        scale = draw(st.sampled_from([1.0, 1.0, 1.0, 0.5])) if kind == "data" else 1.0
        sites.append(Site(kind, family, tuple(sorted(parents)), plates, masked, scale))
    return RandomProgram(tuple(sites), batch, draw(st.booleans()))


def elbo_of(program: RandomProgram) -> ELBO:
    return TraceEnum_ELBO(max_plate_nesting=2) if program.is_enumerated else Trace_ELBO()


def assume_pyro_takes(program: RandomProgram) -> None:
    """Pyro refuses some plates and scales around enumerated sites."""
    try:
        elbo_of(program).loss(
            config_enumerate(program), AutoNormal(poutine.block(program, hide=program.names("discrete")))
        )
    except ValueError:
        assume(False)


def many(count: int) -> Callable:
    """That many programs, the same in every run, times what the environment says."""
    return settings(
        max_examples=count * int(os.environ.get("PROGRAMS", "1")),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )


@many(200)
@given(program=programs())
def test_density_and_gradient(program: RandomProgram) -> None:
    bound = laws.bind(program)
    laws.test_rows_sum_to_pyros_log_joint(bound)
    if torch.get_default_dtype() == torch.float64:
        laws.test_gradient(None, bound)


@many(100)
@given(program=programs(kinds="latent discrete data data"))
def test_enumerated_programs(program: RandomProgram) -> None:
    assume_pyro_takes(program)
    bound = laws.bind(config_enumerate(program))
    laws.test_rows_sum_to_pyros_log_joint(bound)
    if torch.get_default_dtype() == torch.float64:
        laws.test_gradient(None, bound)


@many(60)
@given(program=programs(kinds="latent latent discrete data"))
def test_graph_is_the_eager_density(program: RandomProgram) -> None:
    assume_pyro_takes(program)
    call = laws.bind(config_enumerate(program)).call
    u = call.prior(2).detach()
    value, grad = traced(call).value_and_grad(u)
    wanted, slope = call.density.value_and_grad(u)
    laws.close(value, wanted)
    laws.close(grad, slope)


@many(200)
@given(program=programs(kinds="latent latent discrete data factor holes"))
def test_guide_trains_and_predicts(program: RandomProgram) -> None:
    assume_pyro_takes(program)
    pyro.clear_param_store()
    model = config_enumerate(program)
    guide = ShortRunGuide(model, num_steps=3, step_size=StepSize(0.01, learnable=False), start=Prior())
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), elbo_of(program))
    try:
        losses = [svi.step() for _ in range(2)]
    except NotImplementedError as refusal:  # of a mini-batch whose log q cannot be scaled, by name
        assert program.batch is not None and any(repr(name) in str(refusal) for name in program.latents)
        return
    assert torch.isfinite(torch.tensor(losses)).all()
    draws = guide.sample_posterior(num_samples=3)
    computed = {*program.names("holes"), *(f"{name}_value" for name in program.names("factor"))}
    assert set(program.latents) <= set(draws) <= {*program.latents, *computed}
    assert all(torch.isfinite(v).all() for v in draws.values())


def training_steps(model: Callable, objective: Any, compile: bool) -> tuple[ShortRunGuide, list[float], list[Tensor]]:
    """The guide, losses of some steps, and gradients of the last one, by graphs as they are traced or eagerly."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = ShortRunGuide(model, num_steps=2, step_size=StepSize(0.01), start=Prior(), objective=objective())
    if compile:
        guide._compiler = Compiler(Untouched())
    losses = []
    for _ in range(4):
        for p in pyro.get_param_store()._params.values():
            p.grad = None
        losses.append(ShortRunELBO().loss_and_grads(model, guide))
    leaves = sorted(pyro.get_param_store()._params.items())
    return guide, losses, [torch.zeros_like(p) if p.grad is None else p.grad for _, p in leaves]


@pytest.mark.filterwarnings("ignore::UserWarning")  # of rows that freeze
@pytest.mark.parametrize("objective", [PathDensity, Annealed])
@many(12)
@given(program=programs(kinds="latent latent discrete data factor holes"))
def test_training_steps_by_graphs_are_the_eager_ones(objective: Any, program: RandomProgram) -> None:
    """In loss and gradients, whether there is one graph, several, or none."""
    assume_pyro_takes(program)
    model = config_enumerate(program)
    try:
        _, losses, grads = training_steps(model, objective, compile=False)
    except NotImplementedError:  # of a mini-batch whose log q cannot be scaled
        assume(False)
    guide, found, others = training_steps(model, objective, compile=True)
    event("one graph" if guide.steps._steps else "several")
    precise = torch.get_default_dtype() == torch.float64
    torch.testing.assert_close(torch.tensor(found), torch.tensor(losses), rtol=1e-9 if precise else 1e-4, atol=1e-5)
    for grad, other in zip(grads, others, strict=True):
        scale = 1 + other.abs().max().item()
        torch.testing.assert_close(
            grad, other, rtol=1e-6 if precise else 1e-2, atol=scale * (1e-8 if precise else 1e-3)
        )


@many(200)
@given(program=programs(kinds="latent latent discrete data factor holes"))
def test_chains_move(program: RandomProgram) -> None:
    """Of programs that show all their data: a mini-batch makes no chain of the whole posterior."""
    program = replace(program, batch=None)
    assume_pyro_takes(program)
    kernel = ShortRunLangevin(config_enumerate(program), 2, adjust=True)
    mcmc = VectorizedMCMC(kernel, 2, 1, num_chains=2, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()
    assert sorted(draws) == program.latents
    assert all(torch.isfinite(v).all() for v in draws.values())


@many(200)
@given(program=programs(kinds="latent latent latent discrete data data factor holes"))
def test_what_pyros_hmc_can_initialise(program: RandomProgram) -> None:
    """Works in the kernel, or is refused by the name of a site or plate."""
    model = config_enumerate(program)
    try:
        HMC(model, max_plate_nesting=2).setup(0)
    except Exception:  # whatever Pyro says of it
        assume(False)
    kernel = ShortRunLangevin(model, 1, adjust=True)
    try:
        kernel.setup(0)
    except (NotImplementedError, ValueError) as refusal:
        names = [*PLATES, *program.latents, *program.names("discrete"), *program.names("data")]
        assert any(f"'{name}'" in str(refusal) for name in names), refusal
        event("refused: " + re.sub(r"'\w+'|\d+", "...", str(refusal))[:60])
        return
    event("works")
    assert all(torch.isfinite(v).all() for v in kernel.sample(kernel.initial_params).values())
