"""How unlikely data are under a model: scores from the terms of the log joint at the guide's draws."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ..checks import check_count, check_guide, check_kind, check_model
from ..density.call import Call
from ..density.layout import Layout, require_full_plates
from ..density.rows import sum_to_rows
from ..density.sites import Site, is_data, masked, plates_of
from ..energy.predictive import draw_sites
from ..energy.prior import TiltedPrior
from ..energy.runs import PriorRuns
from ..energy.statement import energy_of


class Draw:
    """One draw of the guide and the model there.

    :param model: the model.
    :param call: the model bound to its arguments.
    :param layout: the rows, and the local latents in them.
    :param guide: the guide's trace.
    """

    def __init__(self, model: Callable[..., Any], call: Call, layout: Layout, guide: Any) -> None:
        self.model, self.layout, self.guide, self._bind = model, layout, guide, call.bind
        self.values = {k: s["value"] for k, s in guide.nodes.items() if _is_stochastic(s) and not s["is_observed"]}
        latents = [s.name for s in call.density.layout.sites]
        self._shared = set(latents) - {s.name for s in layout.sites}
        missing = [name for name in latents if name not in self.values]
        if missing:
            raise ValueError(f"the guide does not sample the model's latent '{missing[0]}': use one that does.")

    @cached_property
    def sites(self) -> dict[str, Site]:
        """Sample sites of the model at the guide's values."""
        return self.at(self.values)

    def at(self, values: Mapping[str, Tensor]) -> dict[str, Site]:
        """Sample sites of the model with latents at ``values``."""
        held: Any = poutine.condition(self.model, data=dict(values))
        trace = poutine.trace(held).get_trace(*self._bind.args, **self._bind.kwargs)
        trace.compute_log_prob()
        return {k: s for k, s in trace.nodes.items() if _is_stochastic(s)}

    def again(self, prior: TiltedPrior, runs: PriorRuns, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values of all sites: one draw of the tilted prior, given some of the latents, and of what follows."""
        drawn = draw_sites(prior, runs, self._bind.args, self._bind.kwargs, 1, given)
        return {name: value[0] for name, value in drawn.items()}

    def rows(self, sites: list[Site]) -> Tensor:
        """Sum of the sites' log-probabilities, unscaled, per row; what lies outside the rows adds a constant."""
        terms = [sum_to_rows(self.layout, masked(s["unscaled_log_prob"], s["mask"]), plates_of(s)) for s in sites]
        return torch.stack([t.expand(self.layout.rows) for t in terms]).sum(0)

    def data_of(self, sites: Mapping[str, Site]) -> list[Site]:
        """The observed sites among them.

        :raises ValueError: where there are none.
        """
        found = [s for k, s in sites.items() if is_data(s) and k not in self.values]
        if not found:
            raise ValueError("the model observes nothing: call anomaly_score with the data as the model's arguments.")
        return found

    def prior_of(self, sites: Mapping[str, Site]) -> list[Site]:
        """Latents and energies among them."""
        return [s for k, s in sites.items() if k in self.values or energy_of(s) is not None]

    def log_q(self, names: set[str] | None = None) -> Tensor:
        """Of the guide's sites, all or by name.

        :raises NotImplementedError: where the guide's density of local latents is not one value per row.
        """
        self.guide.compute_log_prob()
        sites = {k: s for k, s in self.guide.nodes.items() if _is_stochastic(s) and (names is None or k in names)}
        rows = {p.name for p in self.layout.row_plates}
        for name, site in sites.items():
            latent = name.removesuffix("_unconstrained")  # as AutoGuides call it
            if latent not in self._shared and not rows <= {p.name for p in plates_of(site)}:
                raise NotImplementedError(
                    f"the guide's site '{name}' lies outside plate {sorted(rows)}, so that log q is not known row by "
                    "row: use a guide that keeps the plate, such as AutoNormal or an encoder."
                )
        return self.rows(list(sites.values()))


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
        return draw.rows(list(draw.sites.values()))


class Reconstruction(Score):
    r"""``log p(x | z)`` at ``z ~ q(z | x)``: what the decoder alone says."""

    def __call__(self, draw: Draw) -> Tensor:
        return draw.rows(draw.data_of(draw.sites))


class Latents(Score):
    r"""``log p_0(z) - sum_j E_j(z)`` at ``z ~ q(z | x)``: what the prior alone says, log Z left out."""

    def __call__(self, draw: Draw) -> Tensor:
        return draw.rows(draw.prior_of(draw.sites))


class Energies(Score):
    r"""``-sum_j E_j(z)`` at ``z ~ q(z | x)``: what the energies alone say.

    :raises ValueError: where the model has none.
    """

    def __call__(self, draw: Draw) -> Tensor:
        found = [s for s in draw.sites.values() if energy_of(s) is not None]
        if not found:
            raise ValueError("the model has no energy_prior(...) statement: use another score.")
        return draw.rows(found)


class Bound(Score):
    r"""``log p(x, z) - log q(z | x)``, whose mean over draws is a bound on ``log p(x) + log Z``."""

    weighs_guide = True

    def __call__(self, draw: Draw) -> Tensor:
        return draw.rows(list(draw.sites.values())) - draw.log_q()


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
    :param runs: runs in the prior, :class:`~pyro_shortrun.energy.PriorRuns`; 40 steps of 0.1 by default.
    :param compile: as for :func:`~pyro_shortrun.sample_prior`.
    """

    weighs_guide = True

    def __init__(
        self,
        *sites: str,
        runs: PriorRuns | None = None,
        compile: bool = False,
    ) -> None:
        if not sites or not all(isinstance(site, str) for site in sites):
            raise ValueError(
                f"sites must be names of latent sites of the guide, such as Above('z2', 'z3'), got {sites}."
            )
        self.sites = set(sites)
        self._runs, self._compile = PriorRuns.of(runs), compile
        self._prior: TiltedPrior | None = None

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
        if self._prior is None or self._prior.model != draw.model:
            self._prior = TiltedPrior(draw.model, self._compile)
        drawn = draw.again(self._prior, self._runs, held)
        sites = draw.at({k: drawn[k] for k in draw.values})
        above = [s["value"] for k, s in sites.items() if k in self.sites]
        prior = [s for k, s in sites.items() if k in self.sites or _only_of(s, above)]
        return draw.rows(draw.data_of(sites) + prior) - draw.log_q(self.sites)


def _only_of(site: Site, values: list[Tensor]) -> bool:
    """Whether a site is an energy of these values and of no others."""
    energy = energy_of(site)
    return energy is not None and all(any(z is v for v in values) for z in energy.latents)


def anomaly_score(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    score: Score | None = None,
    num_draws: int = 1,
    **kwargs: Any,
) -> Tensor:
    """How anomalous each row of the data is: minus a log density, so that higher is more anomalous.

    >>> import pyro, pyro.distributions as dist, torch
    >>> from pyro_shortrun import ShortRunGuide
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 0.5), obs=x)
    >>> scores = anomaly_score(model, ShortRunGuide(model, num_steps=5), torch.tensor([0.0, 9.0]))
    >>> bool(scores[1] > scores[0])
    True

    :param model: a Pyro model whose local latents share a plate: one row per datum.
    :param guide: a guide for the model, of any kind, that samples every continuous latent.
    :param args: the arguments of both.
    :param score: :class:`Joint` (default), :class:`Reconstruction`, :class:`Latents`, :class:`Energies`,
        :class:`Bound` or :class:`Above`.
    :param num_draws: draws of the guide to average over.
    :param kwargs: the keyword arguments of both.
    :return: ``(rows,)`` in nats, up to a constant.
    :raises ValueError: where ``score`` is no :class:`Score`, a latent lies in a subsampled plate, or the guide does not
        sample a latent.
    :raises NotImplementedError: where latents are discrete, and where a score needs log q row by row and the guide has
        it in one piece.
    """
    found = anomaly_scores(model, guide, *args, scores={"score": score or Joint()}, num_draws=num_draws, **kwargs)
    return found["score"]


def _rows_of(call: Call) -> Layout:
    """The layout of the local latents alone: what is shared by all rows does not tell them apart."""
    if call.density.structure.summed:
        raise NotImplementedError("scores of a model with discrete latents: marginalise them by hand in the model.")
    layout = call.density.layout
    require_full_plates(layout, "score")
    rows = {p.name for p in layout.row_plates}
    return replace(layout, sites=tuple(s for s in layout.sites if rows <= {p.name for p in s.plates}))


@torch.no_grad()
def anomaly_scores(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    scores: Mapping[str, Score],
    num_draws: int = 1,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """Several scores of the same draws, by name, as :func:`anomaly_score` gives one."""
    if not (isinstance(scores, Mapping) and scores):
        raise ValueError(f"scores must be a dict from names to scores such as {{'joint': Joint()}}, got {scores!r}.")
    check_model(model)
    check_guide(guide)
    for score in scores.values():
        check_kind("score", score, Score, "Joint()")
    check_count("num_draws", num_draws)
    weighs = any(score.weighs_guide for score in scores.values())
    with poutine.block():
        call = Call.of(model, args, kwargs)
        layout = _rows_of(call)

        def one() -> list[Tensor]:
            with poutine.mask(mask=weighs):
                trace = poutine.trace(guide).get_trace(*args, **kwargs)
            draw = Draw(model, call, layout, trace)
            return [score(draw) for score in scores.values()]

        found = zip(*(one() for _ in range(num_draws)), strict=True)
        return {k: -torch.stack(values).mean(0) for k, values in zip(scores, found, strict=True)}
