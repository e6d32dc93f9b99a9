"""Posterior methods for simulation-based calibration: guides trained anew, and chains."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuide
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from pyro.optim import PyroOptim
from torch import Tensor

from ..checks import check_count, check_kind
from ..density.call import Call
from ..guides.base import DensityGuide
from ..mcmc.kernel import ShortRunLangevin
from ..mcmc.vectorized import VectorizedMCMC
from ..starts.from_guide import FromGuide
from ..tensors import ordinary_autograd


@dataclass(frozen=True)
class Trained:
    """A posterior for :func:`sbc`: a new guide for each data set, trained by SVI in an empty parameter store.

    :param make_guide: from the conditioned model to a guide, ``AutoNormal`` for instance. Networks that the guide uses
        must be made there too: those from outside would go on training from one data set to the next.
    :param optim: one of ``pyro.optim``; copied for each data set.
    :param num_steps: SVI steps.
    :param num_draws: draws from the trained guide.
    :param loss: by default ``Trace_ELBO()``.

    Called with the conditioned model and its arguments it returns a dict from site to ``(num_draws, *site shape)``.

    Yao, Vehtari, Simpson, Gelman: Yes, but Did It Work? Evaluating Variational Inference, ICML 2018 (VSBC).
    """

    make_guide: Callable[[Callable[..., Any]], Callable[..., Any]]
    optim: Any
    num_steps: int = 1000
    num_draws: int = 99
    loss: Any = None

    def __post_init__(self) -> None:
        if isinstance(self.make_guide, AutoGuide) or not callable(self.make_guide):
            raise ValueError(
                f"make_guide must be a function from a model to a guide, such as AutoNormal, got {self.make_guide!r}."
            )
        check_kind("optim", self.optim, PyroOptim, "pyro.optim.Adam({'lr': 0.01})")
        check_count("num_steps", self.num_steps)
        check_count("num_draws", self.num_draws)

    def __call__(self, model: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        with pyro.get_param_store().scope():
            guide = self.make_guide(model)
            svi = SVI(model, guide, copy.deepcopy(self.optim), copy.deepcopy(self.loss) or Trace_ELBO())
            for _ in range(self.num_steps):
                svi.step(*args, **kwargs)
            return _draw(model, guide, args, kwargs, self.num_draws)


def _draw(
    model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], count: int
) -> dict[str, Tensor]:
    if isinstance(guide, DensityGuide):
        return guide.sample_posterior(*args, num_samples=count, **kwargs)
    with ordinary_autograd(), torch.no_grad(), poutine.block():
        call = Call.of(model, args, kwargs)
        return call.model.constrain(FromGuide(guide).draw(call, count).state)[0]


@dataclass(frozen=True)
class Chains:
    """A posterior for :func:`sbc`: the last draw of each of many chains, which needs no thinning.

    :param make_kernel: from the conditioned model to a kernel, ``lambda m: ShortRunLangevin(m, adjust=True)``.
    :param warmup_steps: draws before the one that is kept; a chain that needs more shows up as miscalibrated.
    :param num_chains: chains, as many as draws.

    Called with the conditioned model and its arguments it returns a dict from site to ``(num_chains, *site shape)``.

    Talts, Betancourt, Simpson, Vehtari, Gelman: Validating Bayesian Inference Algorithms with Simulation-Based
    Calibration, 2018.
    """

    make_kernel: Callable[[Callable[..., Any]], ShortRunLangevin]
    warmup_steps: int = 200
    num_chains: int = 99

    def __post_init__(self) -> None:
        if not callable(self.make_kernel) or isinstance(self.make_kernel, MCMCKernel):
            raise ValueError(
                "make_kernel must be a function from a model to a kernel, such as lambda m: ShortRunLangevin(m, "
                f"adjust=True), got {self.make_kernel!r}."
            )
        check_count("warmup_steps", self.warmup_steps, least=0)
        check_count("num_chains", self.num_chains)

    def __call__(self, model: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        mcmc = VectorizedMCMC(
            self.make_kernel(model), 1, self.warmup_steps, num_chains=self.num_chains, disable_progbar=True
        )
        mcmc.run(*args, **kwargs)
        return mcmc.get_samples()
