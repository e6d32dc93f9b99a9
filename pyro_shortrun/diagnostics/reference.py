"""Draws against a reference that is known to be good: long NUTS or Metropolis-adjusted chains on a small model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.ops.stats import split_gelman_rubin
from torch import Tensor

from ..checks import check_count, check_model
from ..density.call import Call
from ..mcmc.vectorized import VectorizedMCMC
from ..tensors import plain
from .sources import Draws, check_source, draws_of, independent_draws

_MOST_R_HAT = 1.05
_ERRORS = 4.0  # Monte Carlo errors that a difference must have to count
_TELLING = 0.05  # and the reference standard deviations
_DIRECTIONS = 128
_SHOWN = 20


@dataclass(frozen=True)
class Comparison:
    r"""What :func:`compare_with_nuts` found, ``(coordinates,)`` each, in units of the reference's standard deviation.

    ``error`` is :math:`(m - m_{ref}) / s_{ref}` with its Monte Carlo standard error ``mean_error``; ``sd_ratio`` is
    :math:`s / s_{ref}`, with ``sd_error``; ``wasserstein`` is the 1-Wasserstein distance of the marginals, and
    ``wasserstein_noise`` that of the reference's own halves (finite samples are never at zero). ``sliced`` is the mean
    of the same distance over random directions, ``correlation_error`` the largest difference of two correlations, at
    the coordinates ``correlation_at``. ``r_hat`` (split) and ``ess`` are the reference's, ``source_ess`` the source's.
    """

    names: tuple[str, ...]
    error: Tensor
    mean_error: Tensor
    sd_ratio: Tensor
    sd_error: Tensor
    wasserstein: Tensor
    wasserstein_noise: Tensor
    sliced: float
    correlation_error: float
    correlation_at: tuple[str, str] | None
    r_hat: Tensor
    ess: Tensor
    source_ess: Tensor

    @property
    def conclusive(self) -> bool:
        """Whether the reference's R-hat is at most 1.05 everywhere."""
        return bool((self.r_hat <= _MOST_R_HAT).all())

    @property
    def verdicts(self) -> tuple[str, ...]:
        """What each coordinate's numbers say, in words; a difference counts where it is beyond four Monte Carlo errors
        and 0.05 standard deviations."""
        if not self.conclusive:
            return ("no conclusion",) * len(self.names)
        numbers = zip(self.error, self.mean_error, self.sd_ratio, self.sd_error, strict=True)
        return tuple(_verdict(*(v.item() for v in values)) for values in numbers)

    def summary(self) -> str:
        """A table, the worst coordinates first where there are many, and what follows from it."""
        lines = [f"{'':<20}{'mean off by':>18}{'sd ratio':>16}{'W1':>8}{'noise':>8}{'R-hat':>8}{'ess':>8}"]
        verdicts = self.verdicts
        order = list(range(len(self.names)))
        if len(self.names) > _SHOWN:
            worst = torch.maximum(self.error.abs(), self.sd_ratio.log().abs()).nan_to_num(math.inf)
            order = worst.argsort(descending=True)[:_SHOWN].tolist()
        for i in order:
            mean = f"{self.error[i]:.3f} +- {self.mean_error[i]:.3f}"
            ratio = f"{self.sd_ratio[i]:.3f} +- {self.sd_error[i]:.3f}"
            lines.append(
                f"{self.names[i]:<20}{mean:>18}{ratio:>16}{self.wasserstein[i]:>8.3f}{self.wasserstein_noise[i]:>8.3f}"
                f"{self.r_hat[i]:>8.3f}{self.ess[i]:>8.0f}  {verdicts[i]}"
            )
        if len(self.names) > _SHOWN:
            lines.append(f"({len(self.names) - _SHOWN} more coordinates, with smaller differences)")
        return "\n".join([*lines, self._joint(), self._conclusion(verdicts)])

    def _joint(self) -> str:
        text = f"Sliced Wasserstein distance {self.sliced:.3f} (reference standard deviations)"
        if self.correlation_at is None:
            return text + "."
        return (
            text + f"; largest correlation error {self.correlation_error:.3f}, of {' and '.join(self.correlation_at)}."
        )

    def _conclusion(self, verdicts: tuple[str, ...]) -> str:
        if not self.conclusive:
            return (
                f"No conclusion: the reference has not converged (R-hat {self.r_hat.nan_to_num(math.inf).max():.2f} > "
                f"{_MOST_R_HAT}). Give it more warm-up and draws, or reparametrise the model."
            )
        off = [f"{name} ({v})" for name, v in zip(self.names, verdicts, strict=True) if v != "agrees"]
        if not off:
            return f"All {len(self.names)} coordinates agree with the reference within Monte Carlo error."
        more = f" and {len(off) - 5} more" if len(off) > 5 else ""
        return f"{len(off)} of {len(self.names)} coordinates differ from the reference: {', '.join(off[:5])}{more}."


def _verdict(error: float, mean_error: float, ratio: float, ratio_error: float) -> str:
    found = []
    if not all(map(math.isfinite, (error, ratio))):
        return "not finite"
    if abs(error) > max(_ERRORS * mean_error, _TELLING):
        found.append(f"mean {abs(error):.2f} sd too {'high' if error > 0 else 'low'}")
    if abs(ratio - 1) > max(_ERRORS * ratio_error, _TELLING):
        found.append("too narrow" if ratio < 1 else "too wide")
    return ", ".join(found) or "agrees"


def compare_with_nuts(
    model: Callable[..., Any],
    source: Any,
    *args: Any,
    num_samples: int = 1000,
    warmup_steps: int = 500,
    num_chains: int = 4,
    reference: MCMC | VectorizedMCMC | Mapping[str, Tensor] | None = None,
    **kwargs: Any,
) -> Comparison:
    r"""How far draws are from those of NUTS on the same model: bias, spread, shape and correlations, coordinate by
    coordinate, with the Monte Carlo errors of both.

    For models small enough for NUTS: what it says of a guide there is what to expect of the guide on the large one.
    The reference is judged first: where its split R-hat is above 1.05 there is no conclusion. A mode that all of its
    chains miss does not show in it.

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    ...     pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
    >>> exact = {"loc": 0.5 + 0.5**0.5 * torch.randn(2, 500)}
    >>> found = compare_with_nuts(model, exact, torch.tensor(1.0), num_samples=50, warmup_steps=50, num_chains=2)
    >>> found.names
    ('loc',)

    :param model: a Pyro model.
    :param source: what is judged: a guide (any of this package's, an AutoGuide, a function), a finished
        :class:`pyro.infer.MCMC` or :class:`VectorizedMCMC`, or a dict from site to draws, ``(draws, *site shape)`` or
        ``(chains, draws, *site shape)``. A guide makes as many draws as the reference has.
    :param args: the model's arguments, as ``kwargs``.
    :param num_samples: draws of each NUTS chain.
    :param warmup_steps: steps before them.
    :param num_chains: chains, one after the other in this process.
    :param reference: a finished MCMC or VectorizedMCMC (long chains of ``ShortRunLangevin(model, adjust=True)``, say),
        or exact draws as a dict (with leading ``chains``, where no ``args`` are given), instead of NUTS; the three
        arguments before it are not used then.
    :raises ValueError: where an argument is out of range, a sampler has not run, or the source lacks a site of the
        reference or gives it another shape.
    """
    for name, value in (("num_samples", num_samples), ("warmup_steps", warmup_steps), ("num_chains", num_chains)):
        check_count(name, value)
    check_model(model)
    check_source(source)
    if reference is not None:
        check_source(reference, "reference")
    if reference is None:
        found = _nuts(model, args, kwargs, num_samples, warmup_steps, num_chains)
    else:
        found = draws_of(reference, args, kwargs, 1, 1, _shapes(model, reference, args, kwargs))
    if not found:
        raise ValueError("the reference has no draws of any site.")
    chains, draws = next(iter(found.values())).shape[:2]
    if draws < 4:
        raise ValueError(f"R-hat needs >= 4 draws per chain of the reference, there are {draws}.")
    sites = {k: v.shape[2:] for k, v in found.items()}
    return _compare(draws_of(source, args, kwargs, draws, chains, sites), found)


def _shapes(
    model: Callable[..., Any], reference: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, torch.Size] | None:
    """Of the sites that a dict of exact draws has; None, for all, of a sampler, or where the model has no arguments."""
    if not isinstance(reference, Mapping) or not (args or kwargs):
        return None
    sites = {s.name: s.shape for s in Call.of(model, plain(args), plain(kwargs)).density.layout.sites}
    return {k: v for k, v in sites.items() if k in reference}


def _nuts(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    num_samples: int,
    warmup_steps: int,
    num_chains: int,
) -> Draws:
    """Chains one after the other: a model need not be picklable, and Pyro's own start one process for each."""
    chains = []
    for _ in range(num_chains):
        mcmc = MCMC(NUTS(model), num_samples, warmup_steps, disable_progbar=True)
        with poutine.block():
            mcmc.run(*args, **kwargs)
        chains.append(mcmc.get_samples())
    return {k: torch.stack([c[k] for c in chains]) for k in chains[0]}


@torch.no_grad()
def _compare(source: Draws, reference: Draws) -> Comparison:
    a, b = (_coordinates(draws).double() for draws in (source, reference))
    names = tuple(name for site, value in reference.items() for name in _names(site, value.shape[2:]))
    ess, source_ess, r_hat = independent_draws(b), independent_draws(a), split_gelman_rubin(b)
    loc, scale = b.mean((0, 1)), b.std((0, 1))
    halves = (((h - loc) / scale).flatten(0, 1) for h in b.tensor_split(2, 1))
    x, y = (((t - loc) / scale).flatten(0, 1) for t in (a, b))
    ratio = x.std(0)
    error, at = _correlations(x, y)
    return Comparison(
        names,
        x.mean(0),
        (ratio.square() / source_ess + 1 / ess).sqrt(),
        ratio,
        ratio * (_log_sd_variance(x, source_ess) + _log_sd_variance(y, ess)).sqrt(),
        wasserstein(x, y),
        wasserstein(*halves),
        _sliced(x, y),
        error,
        None if at is None else (names[at[0]], names[at[1]]),
        r_hat,
        ess,
        source_ess,
    )


def _coordinates(draws: Draws) -> Tensor:
    """``(chains, draws, coordinates)``."""
    return torch.cat([v.flatten(2) if v.dim() > 2 else v.unsqueeze(-1) for v in draws.values()], -1)


def _names(site: str, shape: torch.Size) -> list[str]:
    indices = product(*map(range, shape))
    return [f"{site}[{', '.join(map(str, index))}]" for index in indices] if shape else [site]


def _log_sd_variance(x: Tensor, ess: Tensor) -> Tensor:
    """Variance of the estimated ``log sd``, by the delta method."""
    centred = x - x.mean(0)
    kurtosis = centred.pow(4).mean(0) / centred.square().mean(0).square()
    return (kurtosis.nan_to_num(1.0) - 1) / (4 * ess)


def wasserstein(a: Tensor, b: Tensor) -> Tensor:
    """1-Wasserstein distance of the columns of ``(n, d)`` and ``(m, d)``, ``(d,)``, by their quantiles."""
    count = max(len(a), len(b))
    levels = (torch.arange(count, device=a.device, dtype=torch.float64) + 0.5) / count
    x, y = (t.sort(0).values[(levels * len(t)).long()] for t in (a, b))
    return (x - y).abs().mean(0)


def _sliced(x: Tensor, y: Tensor) -> float:
    generator = torch.Generator(device="cpu").manual_seed(0)  # the same directions in every comparison
    directions = torch.randn(x.shape[1], _DIRECTIONS, generator=generator, dtype=x.dtype, device="cpu").to(x.device)
    directions = directions / directions.norm(dim=0)
    return wasserstein(x @ directions, y @ directions).mean().item()


def _correlations(x: Tensor, y: Tensor) -> tuple[float, tuple[int, int] | None]:
    """The largest difference of two correlations, and where."""
    size = x.shape[1]
    if size < 2:
        return 0.0, None
    difference = (x.T.corrcoef() - y.T.corrcoef()).abs().nan_to_num(0.0).triu(1)
    row, column = divmod(int(difference.argmax()), size)
    return difference[row, column].item(), (row, column) if row < column else None
