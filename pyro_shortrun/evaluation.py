"""Evaluating a trained model in ways that treat every inference method alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .start import Call
from .tilted import energies


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
        :func:`~pyro_shortrun.energy_prior`, whose log Z :func:`~pyro_shortrun.ais` brackets.
    """
    call = Call.of(model, args, kwargs)
    if energies(call.reading):
        raise ValueError("the model's prior has energies and its log Z is not known here: use ais(model, ...) instead.")
    density = call.density
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


@torch.no_grad()
def frechet_distance(a: Tensor, b: Tensor) -> float:
    r"""Squared Frechet distance of the Gaussians with the moments of two samples.

    .. math:: \|m_a - m_b\|^2 + \operatorname{tr}\big(C_a + C_b - 2 (C_a^{1/2} C_b\, C_a^{1/2})^{1/2}\big)

    With features of a network it depends on that network, and for small samples it is too large (two samples of one
    law are not at zero): compare only numbers that share features, sizes and the second sample. In float64.

    Dowson, Landau: The Frechet distance between multivariate normal distributions, 1982.

    >>> grid = torch.tensor([[-1.0], [1.0]])
    >>> round(frechet_distance(grid, 2 * grid + 3), 6)  # 3 ** 2 + 2 * (2 - 1) ** 2
    11.0

    :param a: ``(n, d)``, ``n >= 2``.
    :param b: ``(m, d)``.
    :raises ValueError: for other shapes, and where values are not finite.
    """
    _check_samples(a, b)
    a, b = a.double(), b.double()
    cov_a, cov_b = (torch.atleast_2d(t.T.cov()) for t in (a, b))
    root = _root(cov_a)
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


@torch.no_grad()
def squared_mmd(a: Tensor, b: Tensor, width: float | None = None) -> float:
    r"""Unbiased squared maximum mean discrepancy of two samples, with a Gaussian kernel.

    .. math:: E\,k(a, a') + E\,k(b, b') - 2 E\,k(a, b) , \qquad k(x, y) = \exp(-\|x - y\|^2 / 2 w^2)

    over pairs of different elements. It may be slightly negative. Gretton et al.: A kernel two-sample test, JMLR 2012.

    :param a: ``(n, d)``, ``n >= 2``.
    :param b: ``(m, d)``; as the width depends on it alone, numbers that share it can be compared.
    :param width: ``w``; by default the median distance within ``b``. In float64.
    :raises ValueError: for other shapes, where values are not finite, and for a width that is not positive, as it is
        by default where most rows of ``b`` are equal.
    """
    _check_samples(a, b)
    a, b = a.double(), b.double()
    scale = torch.pdist(b).median().item() if width is None else float(width)
    if not 0 < scale < math.inf:
        raise ValueError(f"width must be a number > 0, got {scale}; where most rows of b are equal, it must be given.")

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        distance = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")  # by products, differences get lost
        return (-distance.square() / (2 * scale**2)).exp()

    n, m = len(a), len(b)
    same = (kernel(a, a).sum() - n) / (n * (n - 1)) + (kernel(b, b).sum() - m) / (m * (m - 1))
    return (same - 2 * kernel(a, b).mean()).item()


def _check_samples(a: Tensor, b: Tensor) -> None:
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"needs samples (n, d) and (m, d), n, m >= 2; got {tuple(a.shape)} and {tuple(b.shape)}.")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("the samples have values that are not finite.")
