"""SemiImplicit: a mixture without end as a distribution, whose density is known at its own draws alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from ..checks import check_count, check_counts, check_function


@dataclass
class Scope:
    """What a :class:`SemiImplicit_ELBO` asks of the sites drawn inside it, and how many there were."""

    num_mixtures: int
    checks: bool = False
    draws: int = 0


_SCOPE: ContextVar[Scope | None] = ContextVar("pyro_shortrun_semi_implicit", default=None)


@contextmanager
def scoped(scope: Scope) -> Iterator[Scope]:
    token = _SCOPE.set(scope)
    try:
        yield scope
    finally:
        _SCOPE.reset(token)


class SemiImplicit(TorchDistribution):
    r"""``q(z) = E_psi[q(z | psi)]`` with ``psi`` from a network that is fed with noise: one site of a guide.

    A draw is ``z ~ q(z | psi_0)``, ``psi_k = mixing(eps_k)``. Its log density has no closed form; ``log_prob`` gives
    the surrogate over ``K`` further mixing draws,

    .. math:: \log \hat q_K(z) = \log \frac{1}{K + 1} \sum_{k=0}^{K} q(z \mid \psi_k) , \qquad z \sim q(z \mid \psi_0) ,

    in nats, its own component included. ``w = p(x, z) / q_K(z)`` satisfies ``E[w] = p(x)`` for every K, since the
    draw's own index is exchangeable with the others (the balance heuristic of importance sampling). So ``E[log w]`` is
    a lower bound on ``log p(x)``; it rises with K, to the ELBO of q, and so ``RenyiELBO``, ``num_particles`` and
    importance weights are valid. With ``K = 0`` nothing would keep ``psi`` from collapsing to a point.

    *Plates.* One term and fresh noise ``eps`` for each element of the batch shape, to which plates expand the
    distribution; also for vectorised particles. In ``pyro.markov``: one site, and so one sum over k, for each time
    step. That is tighter than one sum over whole data sets or trajectories, since the negative entropy is convex, and
    it is valid where

    - ``psi`` of one element depends on the noise of no other (a graph convolution *over* noise is refused by
      :class:`SemiImplicit_ELBO` in its first call; put it before the noise): otherwise the product of sums may exceed
      the ELBO, and even ``log p(x)``;
    - what ``mixing`` knows of the past are data and drawn *latents*. A recurrent state with old *noise* in it still
      gives a bound, but one that rises only to that of ``q(z_t | past latents, past noise)``.

    Where elements must share noise, make them one element, ``batch_shape = ()``, with an event of more dims.

    >>> import pyro, pyro.distributions as dist, torch
    >>> from pyro.infer import SVI
    >>> from pyro_shortrun import SemiImplicit_ELBO
    >>> from pyro_shortrun.semi_implicit import SemiImplicit
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    ...         pyro.sample("x", dist.Normal(z.prod(-1), 0.1), obs=x)
    >>> def guide(x):
    ...     pyro.module("net", net)
    ...     scale = pyro.param("scale", torch.tensor(0.1), constraint=dist.constraints.positive)
    ...     def mixing(eps):  # (K + 1, len(x), 3) -> (K + 1, len(x), 2)
    ...         return net(torch.cat([eps, x.unsqueeze(-1).expand(*eps.shape[:-1], 1)], -1))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", SemiImplicit(mixing, lambda psi: dist.Normal(psi, scale).to_event(1), noise=3))
    >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), SemiImplicit_ELBO(num_mixtures=20))
    >>> loss = svi.step(torch.randn(5))

    Yin, Zhou: Semi-implicit variational inference, ICML 2018.

    :param mixing: from noise ``(K + 1, *batch_shape, *noise shape)`` to ``psi``, a tensor or a tuple of them
        that begins with ``(K + 1, *batch_shape)``.
    :param conditional: from ``psi`` to a reparameterisable distribution with batch shape ``(K + 1, *batch_shape)``; it
        is also called with the first component alone, ``(*batch_shape,)``.
    :param noise: law of ``eps``, without batch shape; a number stands for as many standard Normals, on the device and
        in the dtype of ``mixing`` if it is a Module, and of torch's defaults if it is a function.
    :param num_mixtures: K, where no :class:`SemiImplicit_ELBO` says otherwise.
    :param batch_shape: as in any Pyro distribution; left out inside plates, which expand it.
    :raises ValueError: for ``K < 1``; at the first draw for shapes that do not fit and a conditional without
        ``rsample``; in ``log_prob`` for any value but the last draw.
    """

    arg_constraints = {}
    has_rsample = True

    def __init__(
        self,
        mixing: Callable[[Tensor], Any],
        conditional: Callable[[Any], Distribution],
        *,
        noise: int | Distribution,
        num_mixtures: int = 50,
        batch_shape: Sequence[int] = (),
    ) -> None:
        check_mixtures(num_mixtures)
        for name, value in (("mixing", mixing), ("conditional", conditional)):
            check_function(name, value, "MixingNetwork(8, 2)" if name == "mixing" else "lambda psi: Normal(psi, 0.1)")
        self.mixing, self.conditional, self.num_mixtures = mixing, conditional, num_mixtures
        self.noise = noise_law(noise, _network_tensor(mixing))
        self.components: Distribution | None = None  # q(. | psi_k) of the last draw
        self._value: Tensor | None = None
        self._event: torch.Size | None = None
        super().__init__(torch.Size(batch_shape), validate_args=False)

    @property
    def event_shape(self) -> torch.Size:
        """That of the conditional."""
        if self._event is None:
            self._event = torch.Size(self.conditional(self.mixing(self._eps(1, self.batch_shape))).event_shape)
        return self._event

    @property
    def support(self) -> Any:
        """That of the conditional, once something was drawn."""
        return constraints.dependent if self.components is None else self.components.support

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> SemiImplicit:
        """The same law for every element of a batch, with noise of its own for each."""
        return SemiImplicit(
            self.mixing,
            self.conditional,
            noise=self.noise,
            num_mixtures=self.num_mixtures,
            batch_shape=batch_shape,
        )

    def own(self, shape: Sequence[int]) -> Tensor:
        """A draw ``(*shape, *event_shape)`` without its density, from one mixing draw."""
        return self.conditional(_first(self.mixing(self._eps(1, torch.Size(shape))))).rsample()

    def rsample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """A draw ``(*sample_shape, *batch_shape, *event_shape)``, at which the density is known."""
        scope = _SCOPE.get()
        count = self.num_mixtures if scope is None else scope.num_mixtures
        shape = torch.Size(sample_shape) + self.batch_shape
        eps = self._eps(1 + count, shape)
        psi = self.mixing(eps)
        if scope is not None:
            scope.draws += 1
        self.components = self.conditional(psi)
        own = self.conditional(_first(psi))
        self._check(own, count, shape)
        self._event = torch.Size(own.event_shape)
        self._value = own.rsample()
        if scope is not None and scope.checks:
            check_apart(self._all_that_sees_noise, eps, 1 + len(shape))
        return self._value

    def log_prob(self, value: Tensor) -> Tensor:
        """The surrogate ``log q_K`` at the last draw, ``(*sample_shape, *batch_shape)``."""
        if value is not self._value or self.components is None:
            raise ValueError(
                "the density of a SemiImplicit distribution is known at its own last draw alone: do not replay or "
                "condition the guide, and put transforms around it that keep their input, such as ExpTransform("
                "cache_size=1)."
            )
        each = self.components.log_prob(value)
        return each.logsumexp(0) - math.log(len(each))

    def _all_that_sees_noise(self, eps: Tensor) -> tuple[Any, ...]:
        """``psi``, and densities of the last draw, which show what the conditional joins."""
        assert self._value is not None
        psi = self.mixing(eps)
        parts = (psi,) if isinstance(psi, Tensor) else tuple(psi)
        return (*parts, self.conditional(psi).log_prob(self._value.detach()))

    def _eps(self, count: int, shape: torch.Size) -> Tensor:
        return self.noise.sample(torch.Size([count]) + shape)

    def _check(self, own: Distribution, count: int, shape: torch.Size) -> None:
        assert self.components is not None
        if not own.has_rsample:
            raise ValueError(
                f"SemiImplicit needs a reparameterisable conditional, and {type(own).__name__} has no rsample: use a "
                "Normal or another continuous distribution."
            )
        wanted, found = torch.Size([1 + count]) + shape, self.components.batch_shape
        if found != wanted or own.batch_shape != shape:
            raise ValueError(
                f"SemiImplicit expected a conditional of batch shape {tuple(wanted)} (num_mixtures + 1, then plates) "
                f"and found {tuple(found)}: let mixing keep the leading {len(wanted)} dims of its noise, and turn dims "
                "of one element into an event, as Normal(psi, scale).to_event(1) does."
            )


def check_mixtures(value: Any) -> None:
    if value == 0 and not isinstance(value, bool):
        raise ValueError(
            "num_mixtures must be >= 1: with K = 0 the bound is that of q(z | psi) given psi, so that psi collapses to "
            "a point and nothing is semi-implicit."
        )
    check_count("num_mixtures", value)


def noise_law(noise: Any, like: Tensor) -> Distribution:
    """The law of the noise; standard Normals on the device and in the dtype of ``like``, if it is their number."""
    if isinstance(noise, Distribution):
        if noise.batch_shape:
            raise ValueError(
                "the noise of a semi-implicit distribution is drawn for every element of its batch, and this one has a "
                f"batch shape {tuple(noise.batch_shape)} of its own: use .to_event({len(noise.batch_shape)})."
            )
        return noise
    check_count("noise", noise)
    return dist.Normal(like.new_zeros(noise), 1.0, validate_args=False).to_event(1)


def _network_tensor(network: Any) -> Tensor:
    """A tensor on the device and in the dtype of a network's parameters, or of torch's defaults."""
    default = torch.zeros(())
    return next(network.parameters(), default).detach() if isinstance(network, nn.Module) else default


def _first(psi: Any) -> Any:
    return psi[0] if isinstance(psi, Tensor) else tuple(part[0] for part in psi)


def check_apart(mixing: Callable[[Tensor], Any], eps: Tensor, dims: int) -> None:
    """Refuse a function of noise in which elements or components share it: the surrogate would be no bound.

    Differentiates a random half of all ``psi`` in the noise of the other half, which must have no part in it.

    :param dims: number of leading dims that tell elements apart.
    """
    if not eps.is_floating_point():
        return
    draw = torch.Generator("cpu").manual_seed(0)  # no draw of the user's
    ours = (torch.rand(eps.shape[:dims], generator=draw, device="cpu") < 0.5).to(eps.device)
    with torch.enable_grad():
        leaf = eps.detach().clone().requires_grad_()
        psi = mixing(leaf)
        parts = [psi] if isinstance(psi, Tensor) else [p for p in psi if isinstance(p, Tensor)]
        chosen = [p[ours] for p in parts if p.requires_grad and p.shape[:dims] == ours.shape]
        # random weights: a normalisation over the batch has no gradient in a plain sum
        total = sum((torch.rand(c.shape, generator=draw, device="cpu").to(c) * c).sum() for c in chosen)
        if not isinstance(total, Tensor):
            return
        (grad,) = torch.autograd.grad(total, leaf, allow_unused=True)
    others = None if grad is None else grad[~ours]
    if others is not None and bool(((others != 0) & others.isfinite()).any()):  # NaN has another cause
        raise ValueError(
            "the mixing network or the conditional of a SemiImplicit site lets elements of its batch (plates, or "
            "mixing draws) share noise: the sum over mixing draws, taken for each element by itself, would be no bound "
            "on log p(x). Put what joins elements (graph convolution, batch normalisation, attention) before the "
            "noise, or make the whole batch one element by an event of more dims."
        )


class MixingNetwork(nn.Module):
    r"""A multi-layer perceptron of noise and context that reads the context once for all mixing draws.

    ``f(eps, c) = W_L s(... s(W_e eps + W_c c + b))``, ``s`` the SiLU; ``eps`` is ``(..., noise)``, ``c`` any shape
    whose leading dims broadcast with those of ``eps``, and the result ``(..., size)``.

    >>> MixingNetwork(3, 2, context=5)(torch.randn(20, 7, 3), torch.randn(7, 5)).shape
    torch.Size([20, 7, 2])

    :param noise: number of noise dims.
    :param size: number of outputs.
    :param hidden: widths of the hidden layers.
    :param context: number of context dims, 0 for none.
    :raises ValueError: for numbers and widths that are not positive.
    """

    def __init__(self, noise: int, size: int, hidden: Sequence[int] = (64, 64), context: int = 0) -> None:
        super().__init__()
        check_count("noise", noise)
        check_count("size", size)
        check_counts("hidden", hidden)
        check_count("context", context, least=0)
        self.size = size
        self.noise = nn.Linear(noise, hidden[0])
        self.context = nn.Linear(context, hidden[0], bias=False) if context else None
        widths = [*hidden, size]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True))

    def forward(self, eps: Tensor, context: Tensor | None = None) -> Tensor:
        """The outputs."""
        h = self.noise(eps)
        if self.context is not None:
            assert context is not None
            h = h + self.context(context)
        for layer in self.layers:
            h = layer(nn.functional.silu(h))
        return h
