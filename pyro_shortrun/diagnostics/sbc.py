"""Simulation-based calibration: does a posterior method find what it should, on data of the model's own?"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor
from tqdm.auto import tqdm

from ..checks import check_count, check_kind
from ..tensors import ordinary_autograd, plain
from .simulator import Simulator, Values, as_it_is, fixed_parameters
from .uniformity import UniformBand, holm, plot_ecdf, symmetry_pvalue

LIKELIHOOD = "log_likelihood"


@dataclass(frozen=True)
class SBC:
    """Ranks of what data were simulated from among posterior draws, and what they say.

    ``ranks`` is ``(simulations, quantities)``, integers from 0 to ``num_draws``: how many draws lie below the truth.
    ``names`` are the quantities: a coordinate of a site (``w[0,2]``), a statistic, or ``log_likelihood``.
    """

    ranks: Tensor
    names: tuple[str, ...]
    num_draws: int

    @property
    def pvalues(self) -> dict[str, float]:
        """Of uniform ranks, exact, for each quantity by itself; see :class:`.UniformBand`."""
        band = UniformBand(len(self.ranks), self.num_draws + 1)
        return dict(zip(self.names, map(band.pvalue, self.ranks.T.cpu().numpy()), strict=True))

    @property
    def adjusted(self) -> dict[str, float]:
        """:attr:`pvalues` times the number of quantities, by Holm's method: below 0.05 where something is wrong with
        that quantity, with a chance of at most 5 % that *any* is named if all is right."""
        values = self.pvalues
        return dict(zip(values, holm(list(values.values())), strict=True))

    @property
    def asymmetry(self) -> dict[str, tuple[float, float, float]]:
        """The VSBC diagnostic: bias, distance and p-value of each quantity.

        With ``p = (rank + 1/2) / (num_draws + 1)``, the bias is ``1/2 - mean p``, positive where draws are too large;
        distance and p-value are those of :func:`.symmetry_pvalue`. A posterior that is right but for its width, as
        variational ones may be at best, is symmetric.
        """
        values = ((self.ranks + 0.5) / (self.num_draws + 1)).double().cpu().numpy().T
        return {k: (float(0.5 - p.mean()), *symmetry_pvalue(p)) for k, p in zip(self.names, values, strict=True)}

    def summary(self) -> str:
        """A table of all quantities, worst first, and a line in words."""
        plain_values, adjusted, asymmetry = self.pvalues, self.adjusted, self.asymmetry
        symmetric = holm([asymmetry[k][2] for k in self.names])
        width = max(map(len, self.names))
        lines = [f"{'':{width}s}  uniform    (Holm)     bias  symmetric    (Holm)"]
        for name in sorted(self.names, key=plain_values.__getitem__):
            bias, _, p = asymmetry[name]
            lines.append(
                f"{name:{width}s} {plain_values[name]:8.4f}  {adjusted[name]:8.4f}  {bias:+7.3f}   {p:8.4f}  "
                f"{symmetric[self.names.index(name)]:8.4f}"
            )
        bad = [k for k in self.names if adjusted[k] < 0.05]
        verdict = f"not calibrated: {', '.join(bad[:5])}" if bad else "no sign of miscalibration"
        lines.append(f"{len(self.ranks)} simulations, {self.num_draws} draws, {len(self.names)} quantities: {verdict}")
        return "\n".join(lines)

    def plot(self, **options: Any) -> Any:
        """:func:`~pyro_shortrun.diagnostics.uniformity.plot_ecdf` of these ranks."""
        return plot_ecdf(self, **options)


def sbc(
    model: Callable[..., Any],
    posterior: Callable[..., Values],
    *args: Any,
    num_simulations: int = 100,
    num_draws: int = 99,
    sites: Sequence[str] | None = None,
    statistics: Mapping[str, Callable[[dict[str, Tensor]], Tensor]] | None = None,
    seed: int | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> SBC:
    r"""Simulation-based calibration of any posterior method.

    .. math:: z^* \sim p(z) , \quad x \sim p(x \mid z^*) , \quad z_1, \dots, z_L \sim \hat p(z \mid x) , \qquad
              \text{rank} = \#\{l : f(z_l) < f(z^*)\}

    is uniform on ``0, ..., L`` for every ``f`` if the method is exact. Besides every coordinate, ``f`` is the
    log-likelihood ``log p(x | z)``, which notices a method that does not look at the data at all. Ties are broken at
    random.

    ``posterior(conditioned, *args, **kwargs)`` gets the model with its observed sites at simulated values, whatever
    ``obs=`` says, and returns draws, ``{site: (draws, *shape)}`` or ``(chains, draws, *shape)``: any guide, kernel or
    method of your own, for instance :class:`Trained` (a guide for each data set; this is VSBC, see
    :attr:`SBC.asymmetry`) and :class:`Chains`::

        sbc(model, lambda m, *a: ShortRunGuide(m, num_steps=20).sample_posterior(*a, num_samples=99), x)

    Draws must be independent: successive ones of a chain are not, and their ranks are too often extreme. Give
    ``num_draws`` no more than the effective sample size; more draws are thinned to it, evenly.

    Arguments that are the very tensors of an ``obs=`` are replaced by the simulated data (for encoders); what is
    computed from them is not. Where the model uses them for more than ``obs=`` (a prior that is made of the data),
    simulated data would be of another model, which is refused: it must use what ``pyro.sample`` returns where it goes
    on with data. Parameters (``pyro.param``, modules) keep their values; each call of ``posterior`` finds Pyro's
    parameter store as it was, and the store is as before at the end. Coordinates that ``poutine.mask`` takes out are
    left out.

    Elements of a plate are quantities of their own; leave them out with ``sites`` where they are many and alike.

    Talts, Betancourt, Simpson, Vehtari, Gelman: Validating Bayesian inference algorithms with simulation-based
    calibration, 2018. Modrák, Moon, Kim, Bürkner, Huurre, Faltejsková, Gelman, Vehtari: Simulation-based calibration
    checking for Bayesian computation: the choice of test quantities shapes sensitivity, Bayesian Analysis 2023.

    :param model: a Pyro model that can be simulated from.
    :param posterior: see above.
    :param args: the model's arguments; the values of its data do not matter, their shapes do.
    :param num_simulations: simulated data sets. 100 show a posterior that is half as wide as it should be.
    :param num_draws: ``L``.
    :param sites: latent sites whose coordinates are ranked; all that ``posterior`` gives, by default.
    :param statistics: more quantities, ``{name: f}``; ``f`` gets ``{site: (draws, *shape)}`` and returns
        ``(draws, ...)``.
    :param seed: if given, simulation i is seeded with ``seed + i``, and torch's random state is as before at the end.
    :param progress: whether to show a progress bar.
    :raises ValueError: where the model is not one to be simulated from by running it (energies, ``pyro.factor``,
        ``poutine.scale``, subsampled plates, improper priors), the message naming the site; where ``posterior`` is a
        guide, or gives other sites or shapes, too few draws, or some that are not finite.
    """
    check_count("num_simulations", num_simulations)
    check_count("num_draws", num_draws)
    if isinstance(posterior, (AutoGuide, type)) or not callable(posterior):
        raise ValueError(
            "posterior must be a function of (conditioned, *args) that returns draws, such as lambda m, *a: "
            f"ShortRunGuide(m).sample_posterior(*a, num_samples=99), or Trained(...) or Chains(...); got {posterior!r}."
        )
    check_kind("statistics", statistics, Mapping, "{'mean': lambda draws: draws['z'].mean(-1)}")
    if seed is not None:
        check_count("seed", seed, least=0)
    args, kwargs = plain(args), plain(kwargs)
    forked = nullcontext() if seed is None else torch.random.fork_rng()
    with forked, fixed_parameters(model) as fixed, ordinary_autograd():
        simulator = Simulator(fixed, args, kwargs)
        quantities = _Quantities(simulator, num_draws, sites, dict(statistics or {}))
        ranks = []
        for i in tqdm(range(num_simulations), disable=not progress, unit="simulation"):
            if seed is not None:
                torch.manual_seed(seed + i)
            truth, data = simulator.draw()
            inputs, options = simulator.arguments(data)
            if i == 0:
                simulator.check_arguments(truth, data)
            with as_it_is(pyro.get_param_store()):
                draws = posterior(simulator.conditioned(data), *inputs, **options)
            ranks.append(quantities.ranks(truth, data, draws))
    return SBC(torch.stack(ranks), tuple(quantities.names), num_draws)


# -------------------------------------------------------------------------------------------- ranks


class _Quantities:
    """What is ranked: scalar coordinates of latents, statistics, and the log-likelihood."""

    def __init__(
        self,
        simulator: Simulator,
        num_draws: int,
        sites: Sequence[str] | None,
        statistics: dict[str, Callable[..., Any]],
    ) -> None:
        unknown = [sites] if isinstance(sites, str) else sorted(set(sites or ()) - set(simulator.latents))
        if unknown:
            raise ValueError(
                f"sites must be a list of latent sites, of which there are {sorted(simulator.latents)}; got {unknown}."
            )
        clash = sorted(set(statistics) & {LIKELIHOOD, *simulator.latents})
        if clash:
            raise ValueError(f"statistics {clash} have the name of a site or of '{LIKELIHOOD}': rename them.")
        self.simulator, self.num_draws, self.sites, self.statistics = simulator, num_draws, sites, statistics
        self.needed = [s.name for s in simulator.call.density.layout.sites]
        self.names: list[str] = []

    def ranks(self, truth: Values, data: Values, draws: Values) -> Tensor:
        """Of every quantity, ``(quantities,)``."""
        if not isinstance(draws, Mapping):
            raise ValueError(f"posterior must return draws by site, {{site: (draws, *shape)}}, got {type(draws)!r}.")
        draws = self._checked(truth, {k: torch.as_tensor(v) for k, v in draws.items()})
        both = {k: torch.cat([truth[k].unsqueeze(0), v.to(truth[k])]) for k, v in draws.items()}
        columns = [self._coordinates(k, both[k]) for k in self.sites or both]
        for name, statistic in self.statistics.items():
            values = torch.as_tensor(statistic(both))
            if values.shape[:1] != (1 + self.num_draws,):
                raise ValueError(
                    f"statistic '{name}' has shape {tuple(values.shape)}: it must keep the leading dimension of draws, "
                    f"({1 + self.num_draws}, ...)."
                )
            columns.append((_names(name, values), values.reshape(len(values), -1)))
        if set(self.needed) <= set(both):
            columns.append(([LIKELIHOOD], self.simulator.log_likelihood(data, both).unsqueeze(1)))
        names = [name for part, _ in columns for name in part]
        table = torch.cat([values.double() for _, values in columns], 1)
        undefined = table.isnan().any(0).nonzero().flatten().tolist()
        if undefined:
            raise ValueError(f"{[names[i] for i in undefined]} are NaN at the truth or at a draw, and have no rank.")
        if self.names and names != self.names:
            raise ValueError(f"posterior gave other quantities than before: {sorted(set(names) ^ set(self.names))}.")
        self.names = names
        return _rank(table)

    def _checked(self, truth: Values, draws: Values) -> dict[str, Tensor]:
        """Draws of the model's latents, thinned to ``(num_draws, *shape)``."""
        found, known = {}, {k: v for k, v in draws.items() if k in truth}
        missing = sorted(set(self.sites or ()) - set(known))
        if missing or not known:
            raise ValueError(f"posterior gave draws of {sorted(draws)} and not of {missing or sorted(truth)}.")
        for name, value in known.items():
            shape, lead = truth[name].shape, value.dim() - truth[name].dim()
            if lead < 1 or value.shape[lead:] != shape:
                raise ValueError(
                    f"posterior's '{name}' has shape {tuple(value.shape)}; wanted (draws, *{tuple(shape)})."
                )
            value = value.detach().reshape(-1, *shape)
            if len(value) < self.num_draws:
                raise ValueError(
                    f"posterior gave {len(value)} draws of '{name}', fewer than num_draws={self.num_draws}."
                )
            if not value.isfinite().all():
                raise ValueError(f"posterior's draws of '{name}' are not all finite.")
            found[name] = value[torch.arange(self.num_draws, device=value.device) * len(value) // self.num_draws]
        return found

    def _coordinates(self, name: str, values: Tensor) -> tuple[list[str], Tensor]:
        site = self.simulator.latents[name]
        names, flat = _names(name, values), values.reshape(len(values), -1)
        if site["mask"] is None:
            return names, flat
        mask = torch.as_tensor(site["mask"]).expand(site["fn"].batch_shape)
        mask = mask.reshape(*mask.shape, *[1] * len(site["fn"].event_shape)).expand(values.shape[1:]).flatten()
        return [n for n, keep in zip(names, mask.tolist(), strict=True) if keep], flat[:, mask.to(flat.device)]


def _names(name: str, values: Tensor) -> list[str]:
    """``name[i,j]`` of every coordinate of ``(draws, ...)``."""
    index = itertools.product(*(range(n) for n in values.shape[1:]))
    return [f"{name}[{','.join(map(str, i))}]" if i else name for i in index]


def _rank(values: Tensor) -> Tensor:
    """Of the first among the others, ``(columns,)``; ties are broken at random."""
    below, equal = (values[1:] < values[0]).sum(0), (values[1:] == values[0]).sum(0)
    return below + (torch.rand(equal.shape, device=equal.device) * (equal + 1)).long().clamp(max=equal)
