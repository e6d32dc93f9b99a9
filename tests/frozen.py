"""Runs whose numbers are kept in ``frozen.json``: those of version 0.1.0, when the run was still written twice.

``python tests/frozen.py`` prints the numbers of the code as it is. Kept are those of eager runs that are not zero.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import zoo
from pyro import poutine
from pyro.infer import MCMC, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import pyro_shortrun as short
import pyro_shortrun.objectives
from pyro_shortrun.compile import Compiler
from pyro_shortrun.density.handlers import init_uniform

NUMBERS = Path(__file__).with_name("frozen.json")
CASES = {case.name: case for case in [*zoo.CASES, *zoo.EXTRA]}


def name(what: str) -> Any:
    return getattr(short.objectives, what)


def _langevin(**options: Any) -> dict[str, Any]:
    return dict(dynamics=short.Langevin(short.StepSize(1e-3, per="dim"), **options))


def _of(model: Any, kind: type, case: zoo.Case) -> Any:
    hidden = poutine.block(model, hide=list(case.discrete)) if case.discrete else model
    options = {} if case.create_plates is None else dict(create_plates=case.create_plates)
    return kind(hidden, init_scale=0.2, **options)


GUIDES: dict[str, Callable[[Any, zoo.Case], dict[str, Any]]] = {
    "path": lambda m, c: _langevin(),
    "path, steps": lambda m, c: dict(dynamics=short.Langevin(short.StepSize(1e-3, per="step"))),
    "path, noise-free": lambda m, c: _langevin(noise=False),
    "path, exact": lambda m, c: dict(**_langevin(), objective=short.PathDensity(name("Exact")())),
    "path, Lanczos": lambda m, c: dict(**_langevin(), objective=short.PathDensity(name("Lanczos")())),
    "path, checkpoint": lambda m, c: dict(**_langevin(), checkpoint=True),
    "path, folded": lambda m, c: dict(dynamics=short.Langevin(short.StepSize(0.5))),
    "path, tight": lambda m, c: dict(dynamics=short.Langevin(short.StepSize(0.02), max_drift=0.05)),
    "path, full gradient": lambda m, c: dict(**_langevin(), full_gradient=True),
    "path, tuned seldom": lambda m, c: dict(**_langevin(), tune_every=3),
    "path from AutoNormal": lambda m, c: dict(**_langevin(), start=_of(m, AutoNormal, c)),
    "annealed": lambda m, c: dict(**_langevin(), objective=short.Annealed()),
    "annealed from AutoNormal": lambda m, c: dict(
        **_langevin(), objective=short.Annealed(), start=_of(m, AutoNormal, c)
    ),
    "annealed from AutoMultivariateNormal": lambda m, c: dict(
        **_langevin(), objective=short.Annealed(), start=_of(m, AutoMultivariateNormal, c)
    ),
    "annealed, full gradient": lambda m, c: dict(**_langevin(), objective=short.Annealed(), full_gradient=True),
    "Hamiltonian": lambda m, c: dict(
        dynamics=short.Hamiltonian(short.StepSize(1e-3), damping=0.3), objective=short.Annealed()
    ),
    "reverse": lambda m, c: dict(**_langevin(), objective=short.GaussianReverse(pilots=64, fresh=4)),
    "reverse, tempered": lambda m, c: dict(**_langevin(), objective=short.GaussianReverse(True, pilots=64, fresh=4)),
    "mixture": lambda m, c: dict(**_langevin(), objective=short.Mixture(3)),
    "linearized": lambda m, c: dict(**_langevin(), objective=short.Linearized()),
}
PROGRAMS = ("eight_schools", "regression", "lkj", "two_layer", "subsampled_mixture", "reparam", "dependent_support")
COMPILED = ("path", "annealed", "Hamiltonian", "linearized")


@dataclass(frozen=True)
class Frozen:
    """One run: ``key`` names it, ``numbers()`` makes it."""

    key: str
    numbers: Callable[[], dict[str, Any]]


def _summary(t: torch.Tensor) -> list[float]:
    """A tensor by three numbers that no two differing tensors are likely to share."""
    flat = t.detach().double().flatten()
    weights = torch.linspace(0.5, 1.5, max(len(flat), 1), dtype=torch.float64)[: len(flat)]
    return [float(flat.sum()), float((weights * flat).sum()), float(flat.abs().sum())]


def of_guide(program: str, kind: str, compile: bool = False, backend: Any = None) -> dict[str, Any]:
    """Three losses, gradients, the last run's record and draws; compiled by ``backend`` if one is given."""
    case = CASES[program]
    model, args = case.make()
    options = GUIDES[kind](model, case)
    hidden = poutine.block(model, hide=list(case.discrete)) if case.discrete else model
    guide = short.ShortRunGuide(
        hidden, num_steps=4, compile=compile, create_plates=case.create_plates, **{"start": short.Prior(), **options}
    )
    if backend is not None:
        guide._compiler = Compiler(backend)
    found: dict[str, Any] = {"losses": []}
    elbo = short.ShortRunELBO() if not case.discrete and kind != "path, full gradient" else None
    for loss in [elbo or _trace_elbo(case)] * 2 + [_trace_elbo(case)]:
        with poutine.trace(param_only=True) as tracer:
            found["losses"].append(loss.loss_and_grads(model, guide, *args))
    params = {k: s["value"].unconstrained() for k, s in tracer.trace.nodes.items()}
    found["gradients"] = {k: _summary(p.grad) for k, p in sorted(params.items()) if p.grad is not None}
    info = guide.info
    for field in ("log_density", "grad_norm", "log_det", "frozen", "singular"):
        found[field] = _summary(getattr(info, field))
    draws = guide.sample_posterior(*args, num_samples=3)
    latents = sorted(site.name for site in guide._first.layout.sites)
    found["draws"] = {k: _summary(draws[k]) for k in latents}
    return found


def _trace_elbo(case: zoo.Case) -> Any:
    from pyro.infer import TraceEnum_ELBO

    return TraceEnum_ELBO(max_plate_nesting=1) if case.discrete else Trace_ELBO()


def _kernel(model: Any, options: dict[str, Any]) -> short.ShortRunLangevin:
    """As it was by default before it began at a fitted Gaussian."""
    runs = not (options.get("persistent") or options.get("adjust"))
    start = short.Prior() if runs or options.get("persistent") is False else short.Init(init_uniform)
    return short.ShortRunLangevin(model, **{"start": start, **options})


def _chain(program: str, options: dict[str, Any]) -> dict[str, Any]:
    model, args = CASES[program].make()
    kernel = _kernel(model, options)
    mcmc = MCMC(kernel, num_samples=4, warmup_steps=6, disable_progbar=True)
    mcmc.run(*args)
    return {k: _summary(v) for k, v in sorted(mcmc.get_samples().items())}


def _vectorized(program: str, options: dict[str, Any]) -> dict[str, Any]:
    model, args = CASES[program].make()
    kernel = _kernel(model, options)
    mcmc = short.VectorizedMCMC(kernel, num_samples=4, warmup_steps=6, num_chains=3, disable_progbar=True)
    mcmc.run(*args)
    return {k: _summary(v) for k, v in sorted(mcmc.get_samples().items())}


def _energy(program: str, options: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))

    def model(x: torch.Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            short.energy_prior("ebm", lambda z: net(z).squeeze(-1), z)
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    x = torch.linspace(-1, 1, 12).reshape(6, 2)
    guide = short.ShortRunGuide(model, num_steps=4, step_size=0.05, start=short.Prior())
    loss = short.EnergyELBO(Trace_ELBO(), num_steps=5, step_size=0.1, **options)
    losses = [loss.loss_and_grads(model, guide, x) for _ in range(2)]
    return {"losses": losses, "gradients": {k: _summary(p.grad) for k, p in net.named_parameters()}}


def _evidence(program: str, options: dict[str, Any]) -> dict[str, Any]:
    model, args = CASES[program].make()
    joint = short.ais(model, *args, **options).joint
    return {k: _summary(getattr(joint, k)) for k in ("lower", "upper", "ess")}


CHAINS: dict[str, tuple[Callable[[str, dict[str, Any]], dict[str, Any]], dict[str, Any]]] = {
    "short runs": (_chain, dict(num_steps=4, step_size=1e-3)),
    "persistent": (_chain, dict(num_steps=4, step_size=1e-3, persistent=True)),
    "adjusted": (_chain, dict(num_steps=4, step_size=1e-3, persistent=True, adjust=True)),
    "vectorized": (_vectorized, dict(num_steps=4, step_size=1e-3, persistent=True, adjust=True)),
    "energy": (_energy, {}),
    "evidence": (_evidence, dict(num_chains=4, num_temperatures=10)),
}


def frozen() -> Iterator[Frozen]:
    """All runs of the table."""
    for program in PROGRAMS:
        for kind in GUIDES:
            for compile in (
                (False, True) if kind in COMPILED and program in ("eight_schools", "two_layer") else (False,)
            ):
                key = f"{program}: {kind}" + (", compiled" if compile else "")
                yield Frozen(key, lambda p=program, k=kind, c=compile: of_guide(p, k, c))
    for kind, (make, options) in CHAINS.items():
        yield Frozen(f"regression: {kind}", lambda m=make, o=options: m("regression", dict(o)))


def run(one: Frozen) -> dict[str, Any]:
    """Its numbers, or what refuses it."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    try:
        return one.numbers()
    except (ValueError, NotImplementedError, RuntimeError, TypeError) as reason:
        return {"refused": f"{type(reason).__name__}"}


def flat(numbers: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every number (or refusal) with its place."""
    if isinstance(numbers, (dict, list)):
        for k, v in numbers.items() if isinstance(numbers, dict) else enumerate(numbers):
            yield from flat(v, f"{path}/{k}")
    else:
        yield path, numbers


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    print(json.dumps({one.key: run(one) for one in frozen()}, indent=0))
