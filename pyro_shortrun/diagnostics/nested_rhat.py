"""Convergence of many short chains: nested R-hat."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_count
from ..mcmc.convergence import nested_rhat_of
from ..mcmc.vectorized import VectorizedMCMC


def nested_rhat(draws: Any, superchains: int) -> Any:
    r"""Nested R-hat of chains in groups (superchains) that began at the same point each.

    With :math:`z_{nmk}` draw n of chain m of group k, dots for means, K groups of M chains of N draws,

    .. math::
        \hat R = \sqrt{1 + \hat B / \hat W} , \qquad
        \hat B = \frac{1}{K - 1} \sum_k (\bar z_{\cdot\cdot k} - \bar z_{\cdot\cdot\cdot})^2 , \qquad
        \hat W = \frac{1}{K} \sum_k (\tilde B_k + \tilde W_k) ,

        \tilde B_k = \frac{1}{M - 1} \sum_m (\bar z_{\cdot mk} - \bar z_{\cdot\cdot k})^2 , \qquad
        \tilde W_k = \frac{1}{M (N - 1)} \sum_{m, n} (z_{nmk} - \bar z_{\cdot mk})^2 ,

    ``B_k = 0`` where ``M = 1`` and ``W_k = 0`` where ``N = 1``. Ordinary R-hat wants each chain long enough to forget
    its start *and* to have small Monte Carlo error; here many chains share the error, so that one draw of each is
    enough. Groups that have forgotten their starts differ by ``1 / M`` of the chains' variance:
    :math:`\hat R \approx \sqrt{1 + 1 / M}` with one draw each, and 1 is approached as M or N grows. With ``M = 1`` it
    is R-hat but for a factor ``(N - 1) / N``. Draws are taken as they are: no ranks, no split chains.

    Margossian, Hoffman, Sountsov, Riou-Durand, Vehtari, Gelman: Nested R-hat: assessing the convergence of Markov chain
    Monte Carlo when running many short chains, Bayesian Analysis 2024.

    >>> import torch
    >>> chains = torch.tensor([[1.0], [3.0], [2.0], [4.0]])  # two groups of two chains of one draw
    >>> round(nested_rhat(chains, superchains=2).item(), 6)  # B = 0.5, W = 2
    1.118034

    :param draws: ``(chains, draws, ...)``, a dict of such, a finished :class:`VectorizedMCMC`, or what
        :func:`to_arviz` gives. Chains of a group are next to each other.
    :param superchains: ``K >= 2``, the number of groups.
    :return: ``(...)``, or a dict of such; NaN for what does not vary.
    :raises ValueError: where chains do not divide into groups, or there is one draw of one chain in each.
    """
    check_count("superchains", superchains)
    if isinstance(draws, Tensor):
        return nested_rhat_of("draws", draws, superchains)
    if isinstance(draws, VectorizedMCMC):
        draws = draws.get_samples(group_by_chain=True)
    elif not isinstance(draws, dict):
        if not hasattr(draws, "groups"):  # of ArviZ
            raise ValueError(
                "draws must be a tensor (chains, draws, ...), a dict of such, a VectorizedMCMC that has run, or what "
                f"to_arviz gives; got {draws!r}."
            )
        variables = draws["posterior"].data_vars.items()
        draws = {str(k): torch.tensor(v.transpose("chain", "draw", ...).values) for k, v in variables}
    return {k: nested_rhat_of(k, v, superchains) for k, v in draws.items()}
