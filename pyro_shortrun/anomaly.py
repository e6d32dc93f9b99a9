"""How unlikely data are under a model: scores from the terms of the log joint at the guide's draws."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .arguments import check_count, check_kind
from .layout import Layout
from .predictive import sample_prior
from .program import Site, is_data, masked, plates_of
from .start import Call
from .tilted import energy_of


class Draw:
    """One draw of the guide and the model there.

    :param guide: the guide's trace.
    :param replay: the model's trace at values of latents.
    """

    def __init__(
        self, guide: Any, replay: Callable[[Mapping[str, Tensor]], Any], layout: Layout, again: Callable
    ) -> None:
        self.guide, self.layout, self.again, self._replay = guide, layout, again, replay
        self.values = {k: s["value"] for k, s in guide.nodes.items() if _is_stochastic(s) and not s["is_observed"]}

    def at(self, values: Mapping[str, Tensor]) -> dict[str, Site]:
        """Sample sites of the model with latents at ``values``."""
        trace = self._replay(values)
        trace.compute_log_prob()
        return {k: s for k, s in trace.nodes.items() if _is_stochastic(s)}

    def rows(self, sites: list[Site]) -> Tensor:
        """Sum of the sites' log-probabilities, unscaled, per row."""
        terms = [self.layout.sum_to_rows(masked(s["unscaled_log_prob"], s["mask"]), plates_of(s)) for s in sites]
        return (
            torch.stack([t.expand(self.layout.rows) for t in terms]).sum(0) if terms else torch.zeros(self.layout.rows)
        )

    def data_of(self, sites: Mapping[str, Site]) -> list[Site]:
        """The observed sites among them."""
        return [s for k, s in sites.items() if is_data(s) and k not in self.values]

    def log_q(self, names: set[str] | None = None) -> Tensor:
        """Of the guide's sites, all or by name."""
        self.guide.compute_log_prob()
        sites = [s for k, s in self.guide.nodes.items() if _is_stochastic(s) and (names is None or k in names)]
        return self.rows(sites)


def _is_stochastic(site: Site) -> bool:
    return site["type"] == "sample" and not site_is_subsample(site)


class Score(ABC):
    """A log density per row; :func:`anomaly_score` is minus its mean over draws.

    ``weighs_guide`` tells whether log q is needed, which costs much for a ``ShortRunGuide``.
    """

    weighs_guide = False

    @abstractmethod
    def __call__(self, draw: Draw) -> Tensor:
        """``(rows,)`` in nats, up to a constant that is the same for all data."""


class Joint(Score):
    r"""``log p(x, z)`` at ``z ~ q(z | x)``, energies included and log Z left out."""

    def __call__(self, draw: Draw) -> Tensor:
        return draw.rows(list(draw.at(draw.values).values()))


class Reconstruction(Score):
    r"""``log p(x | z)`` at ``z ~ q(z | x)``: what the decoder alone says."""

    def __call__(self, draw: Draw) -> Tensor:
        return draw.rows(draw.data_of(draw.at(draw.values)))


class Bound(Score):
    r"""``log p(x, z) - log q(z | x)``, whose mean over draws is a bound on ``log p(x) + log Z``."""

    weighs_guide = True

    def __call__(self, draw: Draw) -> Tensor:
        return draw.rows(list(draw.at(draw.values).values())) - draw.log_q()


class Above(Score):
    r"""Layers above k from the guide, the rest from the prior:

    .. math:: \log p(x \mid z) + \log p(z_{>k}) - \sum_{j} E_j(z_{>k}) - \log q(z_{>k} \mid x) , \qquad
              z_{>k} \sim q(z_{>k} \mid x), \quad z_{\le k} \sim p(z_{\le k} \mid z_{>k}) ,

    with the last draw from the tilted prior, by short runs. An energy counts if all its arguments are values of the
    named sites; the share of the others in the density of :math:`z_{>k}` is an unknown integral, and is left out. Low
    layers say how pixels look and reconstruct anything; high ones what is in the picture.

    Havtorn, Frellsen, Hauberg, Maaloe: Hierarchical VAEs know what they don't know, ICML 2021; with energies Cui, Wu,
    Han, CVPR 2023, eq. 20.

    :param sites: names of the latents above k, as the guide samples them.
    :param options: those of :func:`~pyro_shortrun.sample_prior` (``num_steps``, ``step_size``, ...).
    """

    weighs_guide = True

    def __init__(self, *sites: str, **options: Any) -> None:
        if not sites:
            raise ValueError("Above needs the names of the latent sites that come from the guide: Above('z2', 'z3').")
        self.sites, self.options = set(sites), options

    def __call__(self, draw: Draw) -> Tensor:
        if any(s["infer"].get("is_auxiliary") for s in draw.guide.nodes.values() if _is_stochastic(s)):
            raise NotImplementedError(
                "Above needs log q layer by layer, and this guide has it in auxiliary sites: use a guide that samples "
                "every layer from a distribution of its own, such as an encoder."
            )
        missing = sorted(self.sites - set(draw.values))
        if missing:
            raise ValueError(f"the guide does not sample '{missing[0]}'; it samples {sorted(draw.values)}.")
        held = {k: draw.values[k] for k in sorted(self.sites)}
        drawn = draw.again(given=held, num_samples=1, **self.options)
        sites = draw.at({k: drawn[k][0] for k in draw.values})
        above = [s["value"] for k, s in sites.items() if k in self.sites]
        prior = [s for k, s in sites.items() if k in self.sites or _only_of(s, above)]
        return draw.rows(draw.data_of(sites) + prior) - draw.log_q(self.sites)


def _only_of(site: Site, values: list[Tensor]) -> bool:
    """Whether a site is an energy of these values and of no others."""
    energy = energy_of(site)
    return energy is not None and all(any(z is v for v in values) for z in energy.latents)


@torch.no_grad()
def anomaly_score(
    guide: Callable, model: Callable, *args: Any, score: Score | None = None, num_draws: int = 1, **kwargs: Any
) -> Tensor:
    """How anomalous each row of the data is: minus a log density, so that higher is more anomalous.

    >>> import pyro, pyro.distributions as dist, torch
    >>> from pyro_shortrun import ShortRunGuide
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 0.5), obs=x)
    >>> scores = anomaly_score(ShortRunGuide(model, num_steps=5), model, torch.tensor([0.0, 9.0]))
    >>> bool(scores[1] > scores[0])
    True

    :param guide: a guide for the model, of any kind.
    :param model: a Pyro model whose latents share a plate: one row per datum.
    :param args: the arguments of both.
    :param score: :class:`Joint` (default), :class:`Reconstruction`, :class:`Bound` or :class:`Above`.
    :param num_draws: draws of the guide to average over.
    :param kwargs: the keyword arguments of both.
    :return: ``(rows,)`` in nats, up to a constant.
    :raises ValueError: where ``score`` is no :class:`Score`, or names a site that the guide does not sample.
    """
    check_kind("score", score, Score, "Joint()")
    check_count("num_draws", num_draws)
    measure = Joint() if score is None else score
    with poutine.block():
        layout = Call.of(model, args, kwargs).density.layout

        def replay(values: Mapping[str, Tensor]) -> Any:
            return poutine.trace(poutine.condition(model, data=dict(values))).get_trace(*args, **kwargs)

        def again(**options: Any) -> dict[str, Tensor]:
            return sample_prior(model, *args, **options, **kwargs)

        def one() -> Tensor:
            with poutine.mask(mask=measure.weighs_guide):
                trace = poutine.trace(guide).get_trace(*args, **kwargs)
            return measure(Draw(trace, replay, layout, again))

        return -torch.stack([one() for _ in range(num_draws)]).mean(0)
