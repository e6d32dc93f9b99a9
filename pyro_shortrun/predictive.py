"""Draws from models whose prior is tilted by energies: where people would use Pyro's Predictive."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.infer import Predictive
from torch import Tensor

from .arguments import check_count
from .dynamics import Dynamics
from .energy import NegativeSampler
from .interop import ordinary_autograd
from .program import Binding, Program
from .start import Start
from .tilted import TiltedPrior
from .vectorize import map_chains

_NUMBERS_AT_ONCE = 2**20  # coordinates of states


def sample_prior(
    model: Callable,
    *args: Any,
    num_samples: int = 64,
    num_steps: int = 40,
    step_size: float | None = None,
    dynamics: Dynamics | None = None,
    start: Start | Callable | None = None,
    given: Mapping[str, Tensor] | None = None,
    compile: bool = False,
    **kwargs: Any,
) -> dict[str, Tensor]:
    r"""Latents and observations from a prior tilted by energies, by short runs.

    Latents up to the model's last energy are the ends of short runs in :math:`p(z) \propto \exp(-\sum_j E_j(z)) \prod_i
    p(z_i \mid \text{parents})`; what follows, observed sites included, is drawn given them. ``Predictive`` would ignore
    the energies. Without energies in the model, these are its ordinary prior draws.

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
    :param num_steps: steps of a run.
    :param step_size: ``eta``, 0.1 by default.
    :param dynamics: instead of ``step_size``.
    :param start: where runs start, :class:`~pyro_shortrun.Prior` by default.
    :param given: latents held at values of the site's own shape, so that the others are drawn from the tilted prior
        given these: vary one layer and keep the others.
    :param compile: whether runs are compiled; :class:`EnergyPredictive` keeps the graphs for later calls.
    :param kwargs: the model's keyword arguments.
    :return: dict from site, latent or observed, to ``(num_samples, *site shape)``.
    :raises ValueError: where arguments are out of range, ``given`` names no site, or the prior is not finite at a
        start.
    """
    sampler = NegativeSampler(num_steps, step_size, dynamics, start)
    return _draw(TiltedPrior(model, compile), sampler, args, kwargs, num_samples, given or {})


@torch.no_grad()
def _draw(
    prior: TiltedPrior,
    sampler: NegativeSampler,
    args: tuple,
    kwargs: dict,
    count: int,
    given: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    check_count("num_samples", count)
    with ordinary_autograd(), torch.no_grad(), poutine.block():
        call = prior.bind(args, kwargs, given)
        program = Program(prior.model)
        if call is None:
            bind = Binding(args, kwargs, program.draw(args, kwargs, given=given).indices, given, None)
            return _simulate(program, bind, {}, count, {})
        layout = call.density.layout
        at_once = max(1, _NUMBERS_AT_ONCE // max(layout.rows * layout.size, 1))
        ends = [sampler.run(call, min(at_once, count - i)).end for i in range(0, count, at_once)]
        latents = [call.density.constrain(end)[0] for end in ends]
        values = {k: torch.cat([part[k] for part in latents]) for k in latents[0]}
        return _simulate(program, call.bind, values, count, call.density.structure.vectorizes)


def _simulate(
    program: Program, bind: Binding, values: Mapping[str, Tensor], count: int, vectorizes: dict[str, bool]
) -> dict[str, Tensor]:
    """Every site, given ``count`` draws of the latents of the runs."""

    def one(_: Tensor, *draws: Tensor) -> tuple[Tensor, ...]:
        found = program.simulate(bind, {**bind.given, **dict(zip(values, draws, strict=True))})
        return tuple(found[k] for k in names)

    first = program.simulate(bind, {**bind.given, **{k: v[0] for k, v in values.items()}})
    unknown = sorted(set(bind.given) - set(first))
    if unknown:
        raise ValueError(f"given names '{unknown[0]}', which is not one of the model's sites {sorted(first)}.")
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
    >>> def model(x=None):
    ...     with pyro.plate("data", 3):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         energy_prior("ebm", lambda z: z.square(), z)
    ...         pyro.sample("x", dist.Normal(z, 0.1), obs=x)
    >>> EnergyPredictive(model, num_samples=5, num_steps=10)()["x"].shape
    torch.Size([5, 3])

    :param model: a Pyro model.
    :param posterior_samples: as for ``Predictive``.
    :param guide: as for ``Predictive``.
    :param num_samples: number of draws.
    :param return_sites: names of sites to return; by default all, or as ``Predictive`` does where there are posterior
        samples.
    :param parallel: as for ``Predictive``; draws from the prior are vectorised in any case.
    :param num_steps: steps of a run in the prior, as for :func:`sample_prior`, whose other options follow.
    :raises ValueError: at a call, where guide or posterior samples lack a latent of the tilted prior.
    """

    def __init__(
        self,
        model: Callable,
        posterior_samples: Mapping[str, Tensor] | None = None,
        guide: Callable | None = None,
        num_samples: int | None = None,
        return_sites: Sequence[str] = (),
        parallel: bool = False,
        *,
        num_steps: int = 40,
        step_size: float | None = None,
        dynamics: Dynamics | None = None,
        start: Start | Callable | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__(model, posterior_samples, guide, num_samples, return_sites, parallel)
        self._sampler = NegativeSampler(num_steps, step_size, dynamics, start)
        self._prior = TiltedPrior(model, compile)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws of the sites; the arguments are the model's."""
        if self.guide is None and not self.posterior_samples:
            draws = _draw(self._prior, self._sampler, args, kwargs, self.num_samples, {})
            return {k: v for k, v in draws.items() if not self.return_sites or k in self.return_sites}
        self._check(args, kwargs)
        return super().forward(*args, **kwargs)

    def _check(self, args: tuple, kwargs: dict) -> None:
        with poutine.block(), torch.no_grad():
            call = self._prior.bind(args, kwargs)
            sampled = self._sampled(args, kwargs)
        missing = [] if call is None else [s.name for s in call.density.layout.sites if s.name not in sampled]
        if missing:
            raise ValueError(
                f"neither guide nor posterior_samples give the latent site '{missing[0]}', and Predictive would draw "
                "it without the energies: use sample_prior(model, ..., given=...) for the other latents."
            )

    def _sampled(self, args: tuple, kwargs: dict) -> set[str]:
        if self.guide is None:
            return set(self.posterior_samples)
        return set(poutine.trace(self.guide).get_trace(*args, **kwargs).nodes)
