"""Draws from models whose prior is tilted by energies: where people would use Pyro's Predictive."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.infer import Predictive
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ..checks import check_count, check_flags, check_kind, check_model
from ..density.program import Binding, Program, Reading
from ..density.vectorize import map_chains
from ..dynamics.dynamics import Dynamics
from ..runs.course import astray
from ..starts.start import Start
from ..tensors import ordinary_autograd, plain
from .prior import TiltedPrior
from .runs import PriorRuns

_LOGGER = logging.getLogger("pyro_shortrun")
_NUMBERS_AT_ONCE = 2**20  # coordinates of states


def sample_prior(
    model: Callable[..., Any],
    *args: Any,
    num_samples: int = 64,
    num_steps: int | None = None,
    step_size: float | None = None,
    dynamics: Dynamics | None = None,
    start: Start | Callable[..., Any] | None = None,
    runs: PriorRuns | None = None,
    given: Mapping[str, Tensor] | None = None,
    compile: bool = False,
    **kwargs: Any,
) -> dict[str, Tensor]:
    r"""Latents and observations from a prior tilted by energies, by short runs.

    Latents up to the model's last energy are the ends of short runs in :math:`p(z) \propto \exp(-\sum_j E_j(z)) \prod_i
    p(z_i \mid \text{parents})`; what follows, observed sites included, is drawn given them. Data before the last energy
    are conditions of the runs and keep their values; discrete latents, which runs sum out, are drawn given the others.
    ``Predictive`` would ignore the energies. Without energies in the model, these are its ordinary prior draws.

    A short run is not a converged one: an energy learnt with 40 steps of 0.1 is the one that makes *these* runs right,
    so use the numbers of :class:`~pyro_shortrun.EnergyELBO` (or many more steps, to see what the density itself says).

    >>> import pyro, pyro.distributions as dist, torch
    >>> from pyro_shortrun import energy_prior
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         energy_prior("ebm", lambda z: z.square(), z)
    ...         pyro.sample("x", dist.Normal(z, 0.1), obs=x)
    >>> sample_prior(model, torch.zeros(3), num_samples=5, num_steps=10)["x"].shape
    torch.Size([5, 3])

    :param model: a Pyro model.
    :param args: its arguments; the values of its data do not matter, their shapes do.
    :param num_samples: number of draws, each of all sites; rows of a draw are independent.
    :param num_steps: steps of a run, 40 by default.
    :param step_size: as in :class:`PriorRuns`, as ``dynamics`` and ``start``.
    :param runs: instead of these four: :class:`PriorRuns`.
    :param given: latents held at values of the site's own shape, so that the others are drawn from the tilted prior
        given these: vary one layer and keep the others.
    :param compile: whether runs are compiled; :class:`EnergyPredictive` keeps the graphs for later calls.
    :param kwargs: the model's keyword arguments.
    :return: dict from site, latent or observed, to ``(num_samples, *site shape)``.
    :raises ValueError: where arguments are out of range, ``given`` names no latent or has another shape, or the prior
        is not finite at a start.
    :raises NotImplementedError: where some of the prior lies in a subsampled plate and some does not.
    """
    check_model(model)
    check_kind("given", given, Mapping, "{'z': torch.zeros(3)}")
    check_flags(compile=compile)
    runs = PriorRuns.of(runs, num_steps=num_steps, step_size=step_size, dynamics=dynamics, start=start)
    return draw_sites(TiltedPrior(model, compile), runs, args, kwargs, num_samples, given or {})


@torch.no_grad()
def draw_sites(
    prior: TiltedPrior,
    runs: PriorRuns,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    count: int,
    given: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Every site of ``count`` draws, as :func:`sample_prior` gives them; ``prior`` keeps compiled graphs."""
    check_count("num_samples", count)
    with ordinary_autograd(), torch.no_grad(), poutine.block():
        program = Program(prior.model)
        args, kwargs, given = plain(args), plain(kwargs), plain(given)
        if given:
            _check_given(program.draw(args, kwargs), given)
        call = prior.bind(args, kwargs, given)
        if call is None:
            bind = program.bind(args, kwargs, program.draw(args, kwargs, given=given), given)
            return _simulate(program, bind, {**prior.conditions, **given}, {}, count, {})
        layout = call.density.layout
        parts = max(1, math.ceil(count * layout.rows * layout.size / _NUMBERS_AT_ONCE))
        chains = math.ceil(count / parts)  # of equal size: every other one would be compiled anew
        done = [runs.make(call, chains) for _ in range(parts)]
        if reason := astray(done[0].info):
            _LOGGER.warning("in the prior, %s", reason)
        latents = [call.model.constrain(part.end)[0] for part in done]
        values = {k: torch.cat([part[k] for part in latents])[:count] for k in latents[0]}
        values |= prior.discrete(call, values)
        held = {**prior.conditions, **given}
        return _simulate(program, call.bind, held, values, count, call.density.structure.vectorizes)


def _check_given(reading: Reading, given: Mapping[str, Tensor]) -> None:
    """Refuse names that are no latents of the model, and values of other shapes."""
    nodes = reading.trace.nodes.items()
    latents = {k: s for k, s in nodes if s["type"] == "sample" and not s["is_observed"] and not site_is_subsample(s)}
    for name, value in given.items():
        if name not in latents:
            raise ValueError(
                f"given names '{name}', which is no latent site of the model: there are {sorted(latents)}."
            )
        wanted = tuple(latents[name]["value"].shape)
        if tuple(value.shape) != wanted:
            raise ValueError(f"given['{name}'] has shape {tuple(value.shape)}; it must have the site's, {wanted}.")


def _simulate(
    program: Program,
    bind: Binding,
    held: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    count: int,
    vectorizes: dict[str, bool],
) -> dict[str, Tensor]:
    """Every site, given ``count`` draws of the latents of the runs (``values``) and what the runs held."""

    def one(_: Tensor, *draws: Tensor) -> tuple[Tensor, ...]:
        found = program.simulate(bind, {**held, **dict(zip(values, draws, strict=True))})
        return tuple(found[k] for k in names)

    first = program.simulate(bind, {**held, **{k: v[0] for k, v in values.items()}})
    names = [k for k, v in first.items() if isinstance(v, Tensor) and v.numel()]  # a factor has none
    counter = torch.arange(count, device=first[names[0]].device)
    out = map_chains(one, (counter, *values.values()), vectorizes, "simulate", draws=True)
    return dict(zip(names, out, strict=True))


class EnergyPredictive(Predictive):
    """``pyro.infer.Predictive`` for models with :func:`~pyro_shortrun.energy_prior` statements.

    Without a guide (and posterior samples), draws are those of :func:`sample_prior`. With one, latents come from it, as
    with ``Predictive``; it must then sample every latent that an energy may depend on.

    >>> import pyro, pyro.distributions as dist, torch
    >>> from pyro_shortrun import energy_prior
    >>> from pyro_shortrun.energy import PriorRuns
    >>> def model(x=None):
    ...     with pyro.plate("data", 3):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         energy_prior("ebm", lambda z: z.square(), z)
    ...         pyro.sample("x", dist.Normal(z, 0.1), obs=x)
    >>> EnergyPredictive(model, num_samples=5, runs=PriorRuns(num_steps=10))()["x"].shape
    torch.Size([5, 3])

    :param model: a Pyro model.
    :param posterior_samples: as for ``Predictive``.
    :param guide: as for ``Predictive``.
    :param num_samples: number of draws.
    :param return_sites: names of sites to return; by default all, or as ``Predictive`` does where there are posterior
        samples.
    :param parallel: as for ``Predictive``; draws from the prior are vectorised in any case.
    :param runs: runs in the prior, :class:`PriorRuns`; 40 steps of 0.1 by default.
    :param compile: as for :func:`sample_prior`.
    :raises ValueError: at a call, where guide or posterior samples lack a latent of the tilted prior.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        posterior_samples: Mapping[str, Tensor] | None = None,
        guide: Callable[..., Any] | None = None,
        num_samples: int | None = None,
        return_sites: Sequence[str] = (),
        parallel: bool = False,
        *,
        runs: PriorRuns | None = None,
        compile: bool = False,
    ) -> None:
        self._runs = PriorRuns.of(runs)
        check_flags(parallel=parallel, compile=compile)
        super().__init__(model, posterior_samples, guide, num_samples, return_sites, parallel)
        self._prior = TiltedPrior(model, compile)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws of the sites; the arguments are the model's."""
        if self.guide is None and not self.posterior_samples:
            draws = draw_sites(self._prior, self._runs, args, kwargs, self.num_samples, {})
            return {k: v for k, v in draws.items() if not self.return_sites or k in self.return_sites}
        self._check(args, kwargs)
        return super().forward(*args, **kwargs)

    def get_vectorized_trace(self, *args: Any, **kwargs: Any) -> Any:
        """As Predictive's, for draws of a guide or given ones.

        :raises NotImplementedError: for draws from the prior.
        """
        if self.guide is None and not self.posterior_samples:
            raise NotImplementedError("draws from a tilted prior have no trace: call the object instead.")
        self._check(args, kwargs)
        return super().get_vectorized_trace(*args, **kwargs)

    def _check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with poutine.block(), torch.no_grad():
            call = self._prior.bind(args, kwargs)
            sampled = self._sampled(args, kwargs)
        missing = [] if call is None else [s.name for s in call.density.layout.sites if s.name not in sampled]
        if missing:
            raise ValueError(
                f"neither guide nor posterior_samples give the latent site '{missing[0]}', and Predictive would draw "
                "it without the energies: use sample_prior(model, ..., given=...) for the other latents."
            )

    def _sampled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[str]:
        if self.guide is None:
            return set(self.posterior_samples)
        return set(poutine.trace(self.guide).get_trace(*args, **kwargs).nodes)
