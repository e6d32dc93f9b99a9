"""Distances between two samples: Frechet and maximum mean discrepancy."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        raise ValueError(f"a and b must be tensors, got {type(a).__name__} and {type(b).__name__}.")
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            "a and b must be samples (n, d) and (m, d) of as many columns and two rows at least, got "
            f"{tuple(a.shape)} and {tuple(b.shape)}."
        )
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("a or b has values that are not finite: leave those rows out.")
