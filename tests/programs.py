"""Programs that several test files use, and what is known about them exactly.

Two devices make laws out of most tests of guides:

* A run of tiny noise-free steps (``frozen``) leaves its start where it is. From a start that *is* the posterior, the
  log weight of every particle then is the constant ``log p(x)``, whatever objective collects it.
* On a Gaussian target, noise-free steps are a linear map (``contraction``), so that the value and the density of every
  draw are known.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import constraints
from zoo import CASES, EXTRA

from pyro_shortrun import Langevin, ShortRunGuide, StepSize
from pyro_shortrun.compile import CompiledDensity, Compiler, Untouched
from pyro_shortrun.compile.executor import density_of
from pyro_shortrun.density import Call

ALL = {case.name: case for case in CASES + EXTRA}


def frozen() -> Langevin:
    """Steps so small that the run ends where it starts."""
    return Langevin(StepSize(1e-12, learnable=False), noise=False)


def contraction(eta: float = 0.1) -> Langevin:
    return Langevin(StepSize(eta, learnable=False), noise=False)


def close(dtype: torch.dtype) -> dict[str, float]:
    return {"rel": 1e-7, "abs": 1e-7} if dtype == torch.float64 else {"rel": 2e-5, "abs": 2e-5}


#
# Each has a known evidence and a guide `*_posterior` that is its exact posterior.
def local(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def local_posterior(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, math.sqrt(0.5)))


def positive(x: Tensor) -> None:
    """``local`` with ``z = exp(u)``: a constrained support."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.log(), 1.0), obs=x)


def positive_posterior(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.LogNormal(x / 2, math.sqrt(0.5)))


def nested(x: Tensor) -> None:
    """A shared latent above the local ones (an arrowhead), the locals positive."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.LogNormal(mu, 1.0))
        pyro.sample("x", dist.Normal(z.log(), 1.0), obs=x)


def nested_posterior(x: Tensor) -> None:
    precision = 1 + len(x) / 2
    mu = pyro.sample("mu", dist.Normal(x.sum() / 2 / precision, precision**-0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.LogNormal((mu + x) / 2, math.sqrt(0.5)))


def shared(x: Tensor) -> None:
    """No latent in any plate."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def shared_posterior(x: Tensor) -> None:
    precision = 1 + len(x)
    pyro.sample("mu", dist.Normal(x.sum() / precision, precision**-0.5))


@dataclass(frozen=True)
class Exact:
    model: Callable[[Tensor], None]
    posterior: Callable[[Tensor], None]
    own: float  # variance of the noise that no datum shares
    common: float  # variance of what all data share

    def evidence(self, x: Tensor) -> float:
        n = len(x)
        cov = self.own * torch.eye(n) + self.common * torch.ones(n, n)
        return dist.MultivariateNormal(torch.zeros(n), cov).log_prob(x).item()


EXACT = {
    "local": Exact(local, local_posterior, 2.0, 0.0),
    "positive": Exact(positive, positive_posterior, 2.0, 0.0),
    "nested": Exact(nested, nested_posterior, 2.0, 1.0),
    "shared": Exact(shared, shared_posterior, 1.0, 1.0),
}


def data(n: int = 5) -> Tensor:
    return torch.linspace(-1.0, 2.0, n)


def seeded(guide: Callable, seed: int = 7) -> Callable:
    """``guide`` from a seed of its own, so that what was drawn before it does not matter."""

    def start(*args: Any, **kwargs: Any) -> Any:
        torch.manual_seed(seed)
        return guide(*args, **kwargs)

    return start


def linear_log_weight(z: Tensor, x: Tensor, eta: float, steps: int) -> Tensor:
    """Per datum of ``local``, for a noise-free run from the prior: the law of its end is Gaussian."""
    shrink = (1 - 2 * eta) ** steps
    log_q = dist.Normal(x / 2 * (1 - shrink), shrink).log_prob(z)
    return dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(x) - log_q


def recorded(guide: Callable) -> tuple[Callable, list[dict[str, Tensor]]]:
    seen: list[dict[str, Tensor]] = []

    def record(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        seen.append({k: v.detach() for k, v in guide(*args, **kwargs).items()})
        return seen[-1]

    return record, seen


MODES = {"plain": contextlib.nullcontext, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


def shifted(theta: Tensor, x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(theta + z, 1.0), obs=x)


def bent(theta: Tensor, x: Tensor) -> None:
    """Every part of the log density depends on theta, and no Hessian is constant."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        pyro.sample("x", dist.Normal((theta * z).tanh(), 0.7), obs=x)


KINDS = ["pyro.param", "PyroModule", "pyro.module", "nn.Module"]


def parametrised(
    kind: str, program: Callable[[Tensor, Tensor], None], value: float, constraint: Any = constraints.real
) -> tuple[Callable[[Tensor], None], Callable[[], Tensor]]:
    """``program(theta, x)`` as a model of ``x`` with a parameter of one kind, and what gives the leaf that is trained.

    A plain module's parameter is not constrained, and that of ``nn.Module`` not registered.
    """
    if kind == "pyro.param":

        def with_param(x: Tensor) -> None:
            program(pyro.param("theta", torch.tensor(value), constraint), x)

        return with_param, lambda: pyro.param("theta").unconstrained()
    if kind == "PyroModule":

        class Model(PyroModule):
            def __init__(self) -> None:
                super().__init__()
                self.theta = PyroParam(torch.tensor(value), constraint)

            def forward(self, x: Tensor) -> None:
                program(self.theta, x)

        model = Model()
        return model, lambda: model.theta_unconstrained
    module = nn.Module()
    module.theta = nn.Parameter(torch.tensor(value))

    def with_module(x: Tensor) -> None:
        if kind == "pyro.module":
            pyro.module("module", module)
        program(module.theta, x)

    return with_module, lambda: module.theta


def decoder() -> PyroModule:
    return parametrised("PyroModule", shifted, 0.3)[0]


SEEN: list[Tensor] = []  # the subsample of every run of the models below


def subsampled(x: Tensor, size: int = 3) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=size) as index:
        SEEN.append(index.clone())
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


def subsampled_rows(x: Tensor, size: int = 3) -> None:
    with pyro.plate("data", len(x), subsample_size=size) as index:
        SEEN.append(index.clone())
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


def subsampled_data(x: Tensor, size: int = 3) -> None:
    """The subsampled plate holds no latents."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=size) as index:
        SEEN.append(index.clone())
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x[index])


SUBSAMPLED = {"nested": subsampled, "rows": subsampled_rows, "data": subsampled_data}


def data_plate(x: Tensor, size: int = 3) -> pyro.plate:
    return pyro.plate("data", len(x), subsample_size=size)


def data_plates(x: Tensor, size: int = 3) -> list[pyro.plate]:
    return [data_plate(x, size)]


def hierarchy(x: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 0.3))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, tau))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def regression(x: Tensor, y: Tensor | None = None) -> None:
    """Globals only, and an observed site that is not observed at prediction time."""
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)


def latent_regression(x: Tensor, y: Tensor | None = None) -> None:
    """As ``regression``, with a latent of every datum besides."""
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(w * x, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def refuses(guide: ShortRunGuide, args: tuple, error: type[Exception], *words: str) -> None:
    """The first call raises ``error`` with each of ``words`` (regular expressions), and no step was taken."""
    with pytest.raises(error) as caught:
        guide(*args)
    for word in words:
        assert re.search(word, str(caught.value)), f"{word!r} is not in: {caught.value}"
    assert getattr(guide, "info", None) is None


def gaussian(lam: float, m: float) -> tuple[Callable[[int], None], float]:
    """Model with prior N(0, 1) and posterior N(m, 1/lam) in every row, and its log evidence per row."""
    y, var = m * lam / (lam - 1), 1 / (lam - 1)

    def model(rows: int) -> None:
        with pyro.plate("data", rows):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, math.sqrt(var)), obs=torch.full((rows,), y))

    evidence = dist.Normal(0.0, math.sqrt(1 + var)).log_prob(torch.tensor(y))
    return model, evidence.item()


def traced(call: Call, compiler: Compiler | None = None) -> CompiledDensity:
    """The density of ``call`` through a traced graph, which is run without inductor: quick to make."""
    compiler = Compiler(Untouched()) if compiler is None else compiler
    density = density_of(call.model, compiler)
    assert isinstance(density, CompiledDensity)
    return density


def posterior(precisions: list[float], mean: float = 1.0) -> tuple[Callable[[], None], float]:
    """A model with a N(0, 1) prior and a posterior N(mean, 1 / precision) per coordinate; log evidence."""
    lam = torch.tensor(precisions)
    data, noise = lam * mean / (lam - 1), (lam - 1).rsqrt()

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(len(lam)), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z, noise).to_event(1), obs=data)

    return model, dist.Normal(0.0, (1 + noise**2).sqrt()).log_prob(data).sum().item()


def langevin_kl(eta: float, steps: int, precisions: list[float], mean: float = 1.0) -> float:
    """Exact KL of the law of a Langevin run, from N(0, 1), to that posterior."""
    total = 0.0
    for lam in precisions:
        a = 1 - eta * lam
        if abs(a) >= 1:
            return math.inf
        variance = a ** (2 * steps) + 2 * eta * (1 - a ** (2 * steps)) / (1 - a * a)
        total += 0.5 * (lam * variance + lam * (mean * a**steps) ** 2 - 1 - math.log(lam * variance))
    return total


NOISE = 0.8


def located(x: Tensor) -> None:
    """One latent, with a Gaussian posterior."""
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, NOISE), obs=x)


def located_at(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of ``loc`` given ``x``."""
    precision = 1 + len(x) / NOISE**2
    return x.sum() / NOISE**2 / precision, torch.as_tensor(precision**-0.5)


def gamma_poisson(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(2.0, 0.5))
        pyro.sample("x", dist.Poisson(rate), obs=x)
