"""The log likelihood of data under a trained model, by importance sampling that treats every method alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from tqdm.auto import tqdm

from ..checks import check_count, check_guide
from ..density.call import Call
from ..density.layout import Layout, require_full_plates
from ..energy.statement import energies
from ..starts.from_guide import FromGuide


@dataclass(frozen=True)
class LogLikelihood:
    """``value`` and its Monte Carlo standard ``error`` per row, in nats, and the effective sample sizes ``ess``."""

    value: Tensor
    error: Tensor
    ess: Tensor

    @classmethod
    def of(cls, log_w: Tensor) -> LogLikelihood:
        """The estimate from log weights, ``(samples, rows)``."""
        count, ess = len(log_w), 1 / log_w.softmax(0).square().sum(0)
        return cls(log_w.logsumexp(0) - math.log(count), (1 / ess - 1 / count).clamp(min=0).sqrt(), ess)

    @property
    def mean(self) -> float:
        """Mean over rows."""
        return self.value.mean().item()

    @property
    def mean_error(self) -> float:
        """Monte Carlo standard error of :attr:`mean` (for these data; not the spread over data)."""
        return self.error.square().sum().sqrt().item() / self.error.numel()


@torch.no_grad()
def importance_log_likelihood(
    model: Callable[..., Any],
    draws: Mapping[str, Tensor],
    *args: Any,
    num_samples: int = 1000,
    rounds: int = 6,
    **kwargs: Any,
) -> LogLikelihood:
    r"""``log p(x)`` per row by adaptive importance sampling around given posterior draws.

    A Gaussian is fitted to each row's draws in unconstrained space, widened, and sampled from; its weights
    ``log w = log pi(u) - log q(u)`` refit it, ``rounds`` times, and the last round gives

    .. math:: \log \hat p(x) = \log \frac{1}{M} \sum_m w_m , \qquad
              \text{error} \approx \mathrm{sd}(w) / (\sqrt M\, \bar w) .

    The estimate is a lower bound in expectation. Because only the proposal depends on where the draws came from, models
    trained by different methods can be compared. In the convention of adaptive (population) importance
    sampling, Cappe, Guillin, Marin, Robert 2004.

    :param model: a Pyro model whose latents share their plates (one row per datum), or have none.
    :param draws: dict from latent site to ``(S, *site shape)`` posterior draws, ``S`` well above a row's dimension.
    :param args: the model's arguments.
    :param num_samples: ``M``, importance samples per row and round.
    :param rounds: rounds, the last one included.
    :raises ValueError: where a site is missing from ``draws`` or there are too few of them, and for models with
        :func:`~pyro_shortrun.energy_prior`, whose log Z :func:`~pyro_shortrun.ais` brackets.
    """
    if not isinstance(draws, Mapping):
        raise ValueError(
            "draws must be a dict from latent site to (draws, *site shape), such as {k: v[0] for k, v in "
            f"guide.sample_posterior(*args).items()}}; got {type(draws).__name__}. For the guide itself use "
            "guide_log_likelihood(model, guide, *args)."
        )
    check_count("num_samples", num_samples, least=2)
    check_count("rounds", rounds)
    density = _on_full_plates(model, args, kwargs).model
    names, count = [s.name for s in density.layout.sites], _count(density.layout, draws)
    states = torch.stack([density.unconstrain({k: draws[k][i] for k in names}) for i in range(count)])
    weights = states.new_full(states.shape[:2], 1.0 / count)
    for _ in range(rounds):
        proposal = _fit(states, weights)
        states = proposal.sample(torch.Size([num_samples]))
        log_w = density(states) - proposal.log_prob(states)
        weights = log_w.softmax(0)
    return LogLikelihood.of(log_w)


@torch.no_grad()
def guide_log_likelihood(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 1000,
    at_once: int = 100,
    progress: bool = False,
    **kwargs: Any,
) -> LogLikelihood:
    r"""``log p(x)`` per row (datum, sequence) by importance sampling with a guide.

    .. math:: \log \hat p(x) = \log \frac{1}{J} \sum_{j=1}^{J} \frac{p(x, z_j)}{q(z_j)} , \qquad z_j \sim q(z \mid x) ,

    a lower bound in expectation that rises with J; with a :class:`~pyro_shortrun.SemiImplicit_ELBO`'s
    :meth:`~pyro_shortrun.SemiImplicit_ELBO.mixing` guide, whose density is an estimate, also with its K.

    :param model: as for :func:`importance_log_likelihood`.
    :param guide: a guide for the model, of any kind whose density is known at its draws.
    :param args: the arguments of both, as ``kwargs``.
    :param num_samples: J, in vectorised parts of ``at_once``.
    :param progress: whether to show a progress bar.
    :raises ValueError: for arguments out of range, where model and guide do not fit, and for models as in
        :func:`importance_log_likelihood`.
    :raises NotImplementedError: for a guide that fixes latents at points (``AutoDelta``), which has no density.
    """
    check_count("num_samples", num_samples)
    check_count("at_once", at_once)
    check_guide(guide)
    call = _on_full_plates(model, args, kwargs)
    with poutine.block():
        guide(*args, **kwargs)  # what it creates, and checks, at its first call cannot be vectorised
    start, parts = FromGuide(guide), []
    for begin in tqdm(range(0, num_samples, at_once), disable=not progress, unit="part"):
        drawn = start.draw(call, min(at_once, num_samples - begin))
        start.require_density("likelihood")
        parts.append(drawn.log_density - drawn.log_q)
    return LogLikelihood.of(torch.cat(parts))


def _count(layout: Layout, draws: Mapping[str, Tensor]) -> int:
    """The number of draws, of which there must be two at least of every site, in its shape."""
    counts = set()
    for site in layout.sites:
        if site.name not in draws:
            raise ValueError(f"draws lack the latent site '{site.name}': give draws of all of them.")
        value = torch.as_tensor(draws[site.name])
        counts.add(len(value) if value.dim() else 0)
        if value.shape[1:] != site.shape or counts != {len(value)} or len(value) < 2:
            raise ValueError(
                f"draws of '{site.name}' have shape {tuple(value.shape)}; it must be (draws, *{tuple(site.shape)}), "
                "two draws at least and as many of every site."
            )
    return counts.pop()


def _on_full_plates(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """The bound model, whose rows are to have a likelihood each."""
    call = Call.of(model, args, kwargs)
    if energies(call.reading):
        raise ValueError("the model's prior has energies and its log Z is not known here: use ais(model, ...) instead.")
    require_full_plates(call.density.layout, "evaluate")
    return call


def _fit(states: Tensor, weights: Tensor) -> torch.distributions.MultivariateNormal:
    """Gaussian per row with the weighted moments of ``(samples, rows, size)``, shrunk to its diagonal and widened."""
    mean = (weights.unsqueeze(-1) * states).sum(0)
    centered = states - mean
    cov = torch.einsum("sr,sri,srj->rij", weights, centered, centered)
    size = states.shape[-1]
    ess = 1 / weights.square().sum(0)
    shrink = (size / (ess + size)).reshape(-1, 1, 1)
    diagonal = torch.diag_embed(cov.diagonal(dim1=-2, dim2=-1).clamp(min=1e-6))
    cov = 1.3 * ((1 - shrink) * cov + shrink * diagonal)
    return torch.distributions.MultivariateNormal(mean, cov)
