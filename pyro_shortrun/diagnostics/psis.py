"""Whether a guide's importance weights can be used: Pareto-smoothed importance sampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide, AutoLaplaceApproximation
from torch import Tensor

from ..amortized.guide import LangevinEncoderGuide
from ..checks import check_count, check_guide, check_model
from ..density.call import Call
from ..guides.short_run import ShortRunGuide
from ..guides.smoothing import smoothed as smoothed_weights
from ..starts.from_guide import FromGuide
from ..starts.start import Start
from ..tensors import ordinary_autograd, plain

_AT_ONCE = 1000  # draws
_FEWEST = 25  # with fewer, no tail to fit


@dataclass(frozen=True)
class PSIS:
    r"""Pareto-smoothed importance weights and their diagnostic; ``print`` it for the verdict in words.

    ``k`` is the shape of the generalised Pareto distribution fitted to the largest weights: they have ``1 / k``
    moments. ``ess`` is :math:`1 / \sum_s w_s^2`, and ``log_weights`` are smoothed and normalised,
    :math:`\sum_s w_s = 1`.

    For the joint of all latents ``k`` and ``ess`` are scalars and ``log_weights`` is ``(draws,)``. Where latents form
    independent rows (all of them local to a plate) in the model and in the guide, ``rows`` has the same of each:
    ``(rows,)`` and ``(draws, rows)``.
    """

    k: Tensor
    ess: Tensor
    log_weights: Tensor
    rows: PSIS | None = None

    @property
    def threshold(self) -> float:
        """k above which that many draws are too few, ``min(1 - 1 / log10(draws), 0.7)`` (Vehtari et al. 2024)."""
        return min(1 - 1 / math.log10(len(self.log_weights)), 0.7)

    def __str__(self) -> str:
        draws = len(self.log_weights)
        lines = [f"k = {self.k.item():.2f}, ess {self.ess.item():.0f} of {draws} draws: {self._verdict()}"]
        if self.rows is not None:
            k = self.rows.k
            bad = int((~(k <= self.threshold)).sum())
            lines.append(
                f"rows: {bad} of {len(k)} with k > {self.threshold:.2f}, the largest {k.max().item():.2f} "
                f"(row {int(k.argmax())}); smallest ess {self.rows.ess.min().item():.0f}"
            )
        return "\n".join(lines)

    def _verdict(self) -> str:
        k, limit = self.k.item(), self.threshold
        if not k <= limit:  # NaN, too
            return f"do not use these weights (k > {limit:.2f}); the guide's own draws may be biased as well."
        return "the weights are fine (k < 0.5)." if k < 0.5 else f"the weights are usable (k < {limit:.2f})."


def psis(
    model: Callable[..., Any], guide: Callable[..., Any], *args: Any, num_samples: int = 1000, **kwargs: Any
) -> PSIS:
    r"""Pareto-smoothed importance sampling of the posterior, with draws of a guide as proposals.

    .. math:: \log w_s = \log p(x, z_s) - \log q(z_s) , \qquad z_s \sim q ,

    smoothed, and the Pareto ``k`` of their tail. ``k < 0.5``: the weights have finite variance, and the guide is near
    the posterior. ``k > 0.7``: no number of draws that one can pay for makes the weighted averages right. The joint
    weight of many rows is nearly always hopeless; the rows' own weights say how well each is done. A small ``k`` does
    not say that no mode was missed.

    A :class:`ShortRunGuide`'s density is the one that its objective accounts for: with noise, that of its end *given
    the noise path* (for :class:`PathDensity`), so that ``k`` is about the joint of end and path, an extended space. It
    is an upper estimate of what the end alone has, as a loose bound is a lower one.

    Yao, Vehtari, Simpson, Gelman: Yes, but did it work? Evaluating variational inference, ICML 2018.
    Vehtari, Simpson, Gelman, Yao, Gabry: Pareto smoothed importance sampling, JMLR 2024.

    >>> import pyro, pyro.distributions as dist, torch
    >>> from pyro.infer.autoguide import AutoNormal
    >>> def model(x):
    ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
    >>> psis(model, AutoNormal(model), torch.ones(3)).log_weights.shape
    torch.Size([1000])

    :param model: a Pyro model; its continuous latents are weighed, enumerated ones summed out.
    :param guide: a :class:`ShortRunGuide` or any Pyro guide over the same sites.
    :param args: the arguments of both.
    :param num_samples: draws, ``>= 25``.
    :raises ValueError: for subsampled plates, where a weight is not a number, and where model and guide have not the
        same latents.
    :raises NotImplementedError: for guides without a density: a :class:`Persistent` start, :class:`Linearized`, a
        :class:`LangevinEncoderGuide`, or an ``AutoDelta``.
    """
    check_count("num_samples", num_samples)
    check_model(model)
    check_guide(guide)
    if num_samples < _FEWEST:
        raise ValueError(f"num_samples must be >= {_FEWEST}, so that there is a tail to fit; got {num_samples}.")
    with ordinary_autograd(), torch.no_grad(), poutine.block():
        args, kwargs = plain(args), plain(kwargs)
        call = Call.of(model, args, kwargs)
        thinned = [s.name for s in call.density.layout.sites if s.scale != 1]
        if thinned or call.reading.subsampled:
            raise ValueError(f"{thinned or sorted(call.reading.subsampled)}: weigh on the full plate, not subsampled.")
        parts = [min(_AT_ONCE, num_samples - i) for i in range(0, num_samples, _AT_ONCE)]
        weighed = [_weigh(call, guide, args, kwargs, count) for count in parts]
        log_p, log_q = (torch.cat(p) for p in zip(*weighed, strict=True))
        rows = _smooth(log_p, log_q) if log_p.shape[1] > 1 and _by_rows(call, guide) else None
    joint = _smooth(log_p.sum(1, keepdim=True), log_q.sum(1, keepdim=True))
    return PSIS(joint.k[0], joint.ess[0], joint.log_weights[:, 0], rows)


def _by_rows(call: Call, guide: Callable[..., Any]) -> bool:
    start: Any = guide.start if isinstance(guide, ShortRunGuide) else guide
    return isinstance(start, Start) or FromGuide(start).splits(call)


def _check_guide(guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuses point estimates, and sets up guides that create their parameters at their first call."""
    if isinstance(guide, AutoLaplaceApproximation):
        raise NotImplementedError(
            "an AutoLaplaceApproximation is a point without a density: pass what guide.laplace_approximation(*args) "
            "returns."
        )
    if isinstance(guide, AutoGuide) and guide.prototype_trace is None:
        guide(*args, **kwargs)


def _weigh(
    call: Call, guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], count: int
) -> tuple[Tensor, Tensor]:
    """``log p`` and ``log q`` in unconstrained space, ``(draws, rows)``."""
    if isinstance(guide, LangevinEncoderGuide):
        raise NotImplementedError("a LangevinEncoderGuide draws by chains whose density is not known: use sbc(...).")
    if not isinstance(guide, ShortRunGuide):
        _check_guide(guide, args, kwargs)
        start = FromGuide(guide)
        drawn = start.draw(call, count)
        start.require_density("weight")
        return drawn.log_density, drawn.log_q
    own, runs = guide.weighted_draws(args, kwargs, count)
    if runs.row_log_q is None:
        raise NotImplementedError(
            f"start={type(guide.start).__name__} with objective={type(guide.objective).__name__} has no density to "
            "weigh draws by: use start=Prior() or a guide, and PathDensity(), Annealed() or GaussianReverse()."
        )
    ours, theirs = call.density.layout, own.density.layout
    if [s.name for s in ours.sites] != [s.name for s in theirs.sites] or (ours.rows, ours.size) != runs.end.shape[1:]:
        raise ValueError(
            f"the model's latents are {[s.name for s in ours.sites]} and the guide's {[s.name for s in theirs.sites]}, "
            "or their plates differ: pass the model that the guide was made for."
        )
    return call.model(runs.end), runs.row_log_q


def _smooth(log_p: Tensor, log_q: Tensor) -> PSIS:
    """Every column, ``(draws, columns)``."""
    log_w = (log_p - log_q).double()
    faults = log_w.isnan() | (log_w == math.inf)
    if faults.any() or (log_w == -math.inf).all(0).any():
        draw = int(faults.any(1).nonzero()[0]) if faults.any() else 0
        raise ValueError(f"log p(x, z) - log q(z) is {log_w[draw].tolist()[:5]} at draw {draw}: no weights to smooth.")
    finite = torch.where(log_w.isfinite(), log_w, log_w.amax(0))
    # Weights that differ by rounding alone have no tail; fitted to it, k would be arbitrary.
    size = torch.maximum(log_p.nan_to_num(neginf=0).abs().amax(0), log_q.abs().amax(0)).clamp(min=1.0)
    rounding = 1e3 * torch.finfo(log_p.dtype).eps * size
    equal = log_w.isfinite().all(0) & (finite.amax(0) - finite.amin(0) <= rounding)
    k = torch.full(equal.shape, -math.inf, dtype=torch.float64, device=log_w.device)
    smoothed = torch.where(equal, 0.0, log_w)
    if not equal.all():
        lines, tails = smoothed_weights(log_w[:, ~equal].T.cpu().numpy())
        k[~equal] = torch.as_tensor(tails).to(k)
        smoothed[:, ~equal] = torch.as_tensor(lines).T.to(smoothed)
    normalised = smoothed.log_softmax(0)
    ess = 1 / normalised.exp().square().sum(0)
    return PSIS(k.to(log_p.dtype), ess.to(log_p.dtype), normalised.to(log_p.dtype))
