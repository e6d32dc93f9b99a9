"""The log likelihood of data under a trained model, by importance sampling."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..density.call import Call
from ..energy.statement import energies


@dataclass(frozen=True)
class LogLikelihood:
    """``value`` and its Monte Carlo standard ``error`` per row, in nats, and the effective sample sizes ``ess``."""

    value: Tensor
    error: Tensor
    ess: Tensor

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
        :func:`~pyro_shortrun.energy_prior`, whose log Z :func:`~pyro_shortrun.evaluation.evidence` brackets.
    """
    call = Call.of(model, args, kwargs)
    if energies(call.reading):
        raise ValueError("the model's prior has energies and its log Z is not known here: use ais(model, ...) instead.")
    density = call.model
    thinned = [s.name for s in density.layout.sites if s.scale != 1]
    if thinned:
        raise ValueError(f"latent sites {thinned} lie in a subsampled plate: evaluate on the full plate.")
    missing = [s.name for s in density.layout.sites if s.name not in draws]
    if missing:
        raise ValueError(f"draws lack the latent sites {missing}.")
    names = [s.name for s in density.layout.sites]
    count = len(draws[names[0]])
    if count < 2 or rounds < 1 or num_samples < 2:
        raise ValueError(f"needs >= 2 draws, >= 2 samples and >= 1 round; got {count}, {num_samples}, {rounds}.")
    states = torch.stack([density.unconstrain({k: draws[k][i] for k in names}) for i in range(count)])
    weights = states.new_full(states.shape[:2], 1.0 / count)
    for _ in range(rounds):
        proposal = _fit(states, weights)
        states = proposal.sample(torch.Size([num_samples]))
        log_w = density(states) - proposal.log_prob(states)
        weights = log_w.softmax(0)
    value = log_w.logsumexp(0) - math.log(num_samples)
    ess = 1 / weights.square().sum(0)
    error = (1 / ess - 1 / num_samples).clamp(min=0).sqrt()
    return LogLikelihood(value, error, ess)


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
