"""Draws from a generator, and the latents that made them, as proposal, guide and start."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ..checks import check_function, check_model
from ..density.call import Call
from ..density.handlers import Hold
from ..density.program import Program, Reading
from ..density.sites import is_data
from ..energy.prior import PriorPart
from ..starts.start import Start, StartDraw


class AncestralSampler(Start):
    r"""Draws from a generator, and the latents that made them: a proposal, a guide and a start in one.

    A proposal is the mean of the observed site at latents from the prior, ``z ~ p(z)``, ``g(z) = E[x | z]``. In
    :class:`MCMCTeaching` it becomes a refined sample, and the sampler remembers ``z`` for it:

    * as a guide, it gives back ``z`` at its prior density, so that the loss of ``Trace_ELBO`` is the regression
      :math:`-\log p(\tilde x \mid z)`, that is :math:`\|\tilde x - g(z)\|^2 / 2\sigma^2` and a constant for a Normal
      (parameters of the prior get no gradient, but for latents without ``rsample`` that of the score function);
    * as ``start`` of a :class:`~pyro_shortrun.ShortRunGuide`, runs of the latents given :math:`\tilde x` begin at
      ``z``. Its density given :math:`\tilde x` is not known, so that the loss is no bound and step sizes stay.

    >>> import pyro, pyro.distributions as dist, torch
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
    ...         pyro.sample("x", dist.Normal(2 * z, 0.1).to_event(1), obs=x)
    >>> AncestralSampler(model).propose(torch.zeros(5, 1)).shape
    torch.Size([5, 1])

    :param model: a Pyro model of ``x`` and contexts, whose first plate dimension holds the data.
    :param site: the observed site that is ``x``; needed where others are observed too.
    :param output: from the distribution of that site to a proposal; its mean by default, as in the papers. ``lambda
        fn: fn.sample()`` adds the noise of the observations.
    :raises ValueError: at a call, where ``x`` cannot be told, a proposal has another shape, or latents are asked for
        that were not drawn.
    """

    has_density = False

    def __init__(
        self,
        model: Callable[..., Any],
        site: str | None = None,
        output: Callable[[Any], Tensor] = operator.attrgetter("mean"),
    ) -> None:
        check_model(model)
        check_function("output", output, "lambda fn: fn.sample()")
        self.model, self.site, self.output = model, site, output
        self._part = PriorPart()
        self._latents: dict[str, Tensor] | None = None
        self._count = 0

    @torch.no_grad()
    def propose(self, x: Tensor, *context: Any) -> Tensor:
        """As many draws as there are rows in ``x``, whose values do not matter."""
        reading = Program(self.model).draw((x, *context), {})
        name = self._observed(reading)
        value = self.output(reading.trace.nodes[name]["fn"]).detach()
        if value.shape != x.shape:
            raise ValueError(f"site '{name}' makes values of shape {tuple(value.shape)} and x has {tuple(x.shape)}.")
        self._latents, self._count = _latents(reading), len(x)
        return value

    def keep(self, rows: Tensor | None) -> None:
        """Remember the latents of these proposals; None forgets them all."""
        if rows is None or self._latents is None:
            self._latents = None
            return
        count = self._count
        self._latents = {k: v[rows] if v.dim() and len(v) == count else v for k, v in self._latents.items()}
        self._count = len(rows)

    def __call__(self, x: Tensor, *context: Any) -> None:
        """The model's latents at their remembered values, as a guide."""
        latents = self._remembered(len(x))
        self._part.last = list(latents)[-1]
        with Hold(latents):
            self._part(self.model)(x, *context)

    def draw(self, call: Call, chains: int) -> StartDraw:
        """The remembered values, as a start."""
        names = [s.name for s in call.density.layout.sites]
        latents = self._remembered(len(call.bind.args[0]))
        missing = [k for k in names if k not in latents]
        if missing:
            raise ValueError(
                f"AncestralSampler drew no latent '{missing[0]}': give it the model that the guide has, "
                "reparametrisations included."
            )
        u = call.model.unconstrain({k: latents[k] for k in names})
        u = u.unsqueeze(0).repeat(chains, 1, 1)
        value = call.model(u)
        return StartDraw(u, torch.zeros_like(value), value)

    def _remembered(self, count: int) -> dict[str, Tensor]:
        if self._latents is None or self._count != count:
            raise ValueError(
                f"AncestralSampler has no latents of these {count} rows: it knows those of samples that MCMCTeaching "
                "refined. For other data use a guide of its own, such as ShortRunGuide(model, start=Prior())."
            )
        return self._latents

    def _observed(self, reading: Reading) -> str:
        found = [k for k, s in reading.trace.nodes.items() if is_data(s)]
        if self.site is None and len(found) == 1:
            return found[0]
        if self.site is None or self.site not in found:
            asked = "which one is x?" if self.site is None else f"'{self.site}' is not one of them."
            raise ValueError(f"the model's observed sites are {found}: {asked} Give AncestralSampler(model, site=...).")
        return self.site


def _latents(reading: Reading) -> dict[str, Tensor]:
    nodes = [(k, s) for k, s in reading.trace.nodes.items() if s["type"] == "sample" and not site_is_subsample(s)]
    found = {k: s["value"].detach() for k, s in nodes if not s["is_observed"]}
    if not found:
        raise ValueError("the generator has no latent sites: all its draws would be the same.")
    return found
