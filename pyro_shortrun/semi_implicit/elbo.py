"""SemiImplicit_ELBO: a bound for guides with mixtures without end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from tqdm import tqdm

from ..checks import check_count
from ..density.call import Call
from ..evaluation.likelihood import LogLikelihood
from ..starts.from_guide import FromGuide
from .site import MixingNetwork, Scope, check_mixtures, scoped

_NUMBERS_AT_ONCE = 2**24
_CODE = 8  # learned features of a row that has none


class SemiImplicit_ELBO(Trace_ELBO):
    r"""The surrogate bound for guides with :class:`SemiImplicit` sites, or a :class:`SemiImplicitGuide`; for SVI.

    .. math:: L_K = E_{\psi_0, \dots, \psi_K}\, E_{z \sim q(z | \psi_0)} \Big[\log p(x, z) -
              \log \frac{1}{K + 1} \sum_{k=0}^{K} q(z \mid \psi_k)\Big] \;\le\; L_{K + 1} \;\le\; \text{ELBO} \;\le\;
              \log p(x)

    in nats; the loss is ``-L_K``, with one sum over k for each semi-implicit site and element of its plates (see
    :class:`SemiImplicit` for when that is valid). Sites of other kinds count as in ``Trace_ELBO``. The gap to the ELBO
    is of order ``1 / K``, with a constant that grows with the divergence of ``q(z | psi)`` from q, and so with the
    number of dims of an element. Cheap training has a small K first (``elbo.num_mixtures = 50`` may be set at any
    time); evaluate with a larger one, and with importance samples (:meth:`log_likelihood`).

    The first call also checks that no element's ``psi`` depends on another's noise.

    Yin, Zhou: Semi-implicit variational inference, ICML 2018.

    :param num_mixtures: ``K >= 1``, mixing draws besides a draw's own.
    :param options: those of :class:`~pyro.infer.Trace_ELBO`: ``num_particles``, ``vectorize_particles``, ...
    :raises ValueError: for ``K < 1``; at a call, where the guide has no semi-implicit site, and where elements share
        noise.
    """

    def __init__(self, num_mixtures: int = 50, **options: Any) -> None:
        check_mixtures(num_mixtures)
        self.num_mixtures = num_mixtures
        self._checked = False
        super().__init__(**options)

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        with self._mixing() as scope:
            traces = super()._get_trace(model, guide, args, kwargs)
        self._require(scope)
        return traces

    @contextmanager
    def _mixing(self) -> Iterator[Scope]:
        check_mixtures(self.num_mixtures)
        with scoped(Scope(self.num_mixtures, checks=not self._checked)) as scope:
            yield scope

    def _require(self, scope: Scope) -> None:
        if not scope.draws:
            raise ValueError(
                "the guide has no semi-implicit site, so num_mixtures means nothing: use Trace_ELBO, or give the guide "
                "a SemiImplicit distribution (or use SemiImplicitGuide)."
            )
        self._checked = self._checked or scope.checks

    @torch.no_grad()
    def log_likelihood(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        *args: Any,
        num_samples: int = 1000,
        at_once: int = 100,
        progress: bool = False,
        **kwargs: Any,
    ) -> LogLikelihood:
        r"""``log p(x)`` of each row (datum, sequence) by importance sampling with the guide.

        .. math:: \log \hat p(x) = \log \frac{1}{J} \sum_{j=1}^{J} \frac{p(x, z_j)}{\hat q_K(z_j)} ,

        a lower bound in expectation that rises with J and K.

        :param num_samples: J, in vectorised parts of ``at_once``, each with K mixing draws of its own.
        :param progress: whether to show a progress bar.
        :raises ValueError: where model and guide do not fit, and as the loss.
        """
        check_count("num_samples", num_samples)
        check_count("at_once", at_once)
        if not self._checked:  # vmap below cannot look
            with poutine.block(), self._mixing() as scope:
                guide(*args, **kwargs)
            self._require(scope)
        call, start, parts = Call.of(model, args, kwargs), FromGuide(guide), []
        for begin in tqdm(range(0, num_samples, at_once), disable=not progress, unit="part"):
            with self._mixing():
                drawn = start.draw(call, min(at_once, num_samples - begin))
            parts.append(drawn.log_density - drawn.log_q)
        log_w = torch.cat(parts)
        ess = 1 / log_w.softmax(0).square().sum(0)
        error = (1 / ess - 1 / num_samples).clamp(min=0).sqrt()
        return LogLikelihood(log_w.logsumexp(0) - math.log(num_samples), error, ess)


class _Rows(nn.Module):
    """``psi`` of rows without features: a location and a code for each, learned."""

    def __init__(self, network: MixingNetwork, rows: int) -> None:
        super().__init__()
        self.network = network
        self.loc = nn.Parameter(torch.zeros(rows, network.size))
        self.code = None if network.context is None else nn.Parameter(torch.randn(rows, network.context.in_features))

    def check(self, rows: int) -> None:
        """Codes are of certain rows, so other data need other codes."""
        if rows != len(self.loc):
            raise ValueError(
                f"SemiImplicitGuide has learned codes for {len(self.loc)} rows of the model's plates, and this call "
                f"has {rows}: use pyro.plate(..., subsample_size=) for minibatches, or pass mixing=, a network of the "
                "data."
            )

    def forward(self, eps: Tensor, index: Tensor) -> Tensor:
        return self.loc[index] + self.network(eps, None if self.code is None else self.code[index])


def _row_index(call: Call) -> Tensor:
    """Where each row of a (sub)sample is in the full plates, in the shape of the rows."""
    layout, like = call.density.layout, _like(call)
    index = torch.zeros((), dtype=torch.long, device=like.device)
    if not layout.is_arrow:
        for plate in layout.row_plates:
            index = index.unsqueeze(-1) * plate.full_size + call.bind.indices[plate.name].to(like.device)
    return index


def _like(call: Call) -> Tensor:
    """A tensor on the device and in the dtype of the latents."""
    return next(iter(call.reading.unconstrained.values())).detach()
