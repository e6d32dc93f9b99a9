"""ShortRunELBO: the loss of SVI without tracing guide and model."""

from __future__ import annotations

from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor

from ..checks import check_count, check_model
from .short_run import ShortRunGuide
from .training import Request


class ShortRunELBO(ELBO):
    r"""What ``Trace_ELBO`` gives for a :class:`ShortRunGuide`, in value and gradient, at less cost.

    .. math:: -\frac{1}{P} \sum_{p=1}^{P} \log w_p , \qquad \log w = \log p(x, z_K) - \log q(z_K)

    in nats, ``P = num_particles`` independent runs, vectorised. ``Trace_ELBO`` runs the guide's sample statements and
    then the model once more under handlers, which is most of the time of small models. This loss takes the run's own
    log density: with ``compile=True``, and where nothing that the model reaches is to be trained, from a graph.

    >>> import pyro, pyro.distributions as dist, torch
    >>> from pyro.infer import SVI
    >>> from pyro_shortrun import ShortRunELBO, ShortRunGuide
    >>> def model(x):
    ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
    >>> guide = ShortRunGuide(model, num_steps=5)
    >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), ShortRunELBO())
    >>> loss = svi.step(torch.ones(3))

    From a start without a density (``Persistent``) it is ``-log p(x, z_K)``, as ``Trace_ELBO``'s: no bound.

    :param num_particles: ``P``.
    :raises ValueError: where guide and model do not belong together.
    :raises NotImplementedError: where a latent's support depends on parameters; use ``Trace_ELBO``.
    """

    def __init__(self, num_particles: int = 1) -> None:
        check_count("num_particles", num_particles)
        super().__init__(num_particles=num_particles)

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The loss as a tensor to differentiate."""
        self.check(model, guide)
        return -guide.run_weight(args, kwargs, self.num_particles).mean()

    @staticmethod
    def check(model: Any, guide: Any) -> None:
        """Refuse what does not belong together."""
        check_model(model)
        if not isinstance(guide, ShortRunGuide):
            raise ValueError(f"ShortRunELBO is for a ShortRunGuide, not for {type(guide).__name__}: use Trace_ELBO.")
        if guide.model != model:  # bound methods are equal, not identical
            raise ValueError("the guide was made for another model: pass the one that ShortRunGuide(model) was given.")

    def _get_trace(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("ShortRunELBO makes no traces.")

    @torch.no_grad()
    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss as a number."""
        return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss as a number; gradients go to the parameters' ``grad``."""
        self.check(model, guide)
        known = guide.steps(Request(guide, args, kwargs, self.num_particles))
        if known is not None:
            guide._memory.note_arguments((args, kwargs))
            return known
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return loss.item()
