"""SemiImplicit_ELBO: a bound for guides with mixtures without end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pyro.infer import Trace_ELBO

from ..checks import check_count
from .site import Scope, check_mixtures, scoped


class SemiImplicit_ELBO(Trace_ELBO):
    r"""The surrogate bound for guides with :class:`SemiImplicit` sites, or a :class:`SemiImplicitGuide`; for SVI.

    .. math:: L_K = E_{\psi_0, \dots, \psi_K}\, E_{z \sim q(z | \psi_0)} \Big[\log p(x, z) -
              \log \frac{1}{K + 1} \sum_{k=0}^{K} q(z \mid \psi_k)\Big] \;\le\; L_{K + 1} \;\le\; \text{ELBO} \;\le\;
              \log p(x)

    in nats; the loss is ``-L_K``, with one sum over k for each semi-implicit site and element of its plates (see
    :class:`SemiImplicit` for when that is valid). Sites of other kinds count as in ``Trace_ELBO``. The gap to the ELBO
    is of order ``1 / K``, with a constant that grows with the divergence of ``q(z | psi)`` from q, and so with the
    number of dims of an element. Cheap training has a small K first (``elbo.num_mixtures = 50`` may be set at any
    time); evaluate with a larger one, and with importance samples (:meth:`mixing`).

    The first call also checks that no element's ``psi`` depends on another's noise.

    Yin, Zhou: Semi-implicit variational inference, ICML 2018.

    :param num_mixtures: ``K >= 1``, mixing draws besides a draw's own.
    :param options: those of :class:`~pyro.infer.Trace_ELBO`: ``num_particles``, ``vectorize_particles``, ...
    :raises ValueError: for ``K < 1``; at a call, where the guide has no semi-implicit site, and where elements share
        noise.
    """

    def __init__(self, num_mixtures: int = 50, **options: Any) -> None:
        check_mixtures(num_mixtures)
        check_count("num_particles", options.get("num_particles", 1))
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

    def mixing(self, guide: Callable[..., Any]) -> Callable[..., Any]:
        """The guide with this bound's number of mixing draws, refused where the loss would refuse it; for
        :func:`~pyro_shortrun.evaluation.guide_log_likelihood`, whose estimate rises with K."""

        def mixed(*args: Any, **kwargs: Any) -> Any:
            with self._mixing() as scope:
                found = guide(*args, **kwargs)
            self._require(scope)
            return found

        return mixed
