"""SemiImplicitGuide: a guide whose law is a mixture without end."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroParam
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from ..checks import check_between, check_count, check_function
from ..density.call import Call
from ..density.structure import Structure
from ..guides.base import DensityGuide
from ..guides.emit import emit, outer_shape
from ..tensors import ordinary_autograd
from .site import MixingNetwork, SemiImplicit, check_mixtures, noise_law

_NUMBERS_AT_ONCE = 2**24
_CODE = 8  # learned features of a row that has none


class SemiImplicitGuide(DensityGuide):
    r"""A guide for any model with continuous latents, by a network fed with noise: an AutoGuide.

    The latents' unconstrained values ``u``, in rows of the model's plates (all in one row where they lie in none), are

    .. math:: u \mid \psi \sim N(\psi, \mathrm{diag}(s^2)), \qquad \psi = f(\epsilon) , \quad \epsilon \sim N(0, I),

    with one sum over the mixing draws for each row (:class:`SemiImplicit`, where the bound is). It bends, skews and
    splits where ``AutoNormal`` cannot. Train it with :class:`SemiImplicit_ELBO`, or with any of Pyro's ELBOs by
    ``num_mixtures`` draws.

    >>> import pyro, pyro.distributions as dist, torch
    >>> from pyro.infer import SVI
    >>> from pyro_shortrun import SemiImplicitGuide, SemiImplicit_ELBO
    >>> def banana():
    ...     a = pyro.sample("a", dist.Normal(0.0, 1.0))
    ...     pyro.sample("b", dist.Normal(a ** 2, 0.3))
    >>> guide = SemiImplicitGuide(banana)
    >>> svi = SVI(banana, guide, pyro.optim.Adam({"lr": 0.01}), SemiImplicit_ELBO(num_mixtures=20))
    >>> loss = svi.step()
    >>> guide.sample_posterior(num_samples=5)["b"].shape
    torch.Size([1, 5])

    *Amortised.* ``mixing(eps, *args)`` is called with noise ``(K + 1, chains, *rows, noise)`` and the model's
    arguments, and returns ``psi`` of shape ``(K + 1, chains, *rows, d)``, or a pair of ``psi`` and ``s``; ``chains``
    counts vectorised particles, ``rows`` are the sizes of the plates that hold all latents, ``d`` is the number of
    unconstrained values in a row, in the order of the model. Without ``mixing`` a network is made, and every row of a
    plate has a learned code as context. Sequences, and other laws of your own, are sites of a guide that you write,
    with :class:`SemiImplicit`.

    *As a start.* ``ShortRunGuide(model, start=SemiImplicitGuide(model))`` is trained along with the step sizes. Its
    density is known at its draws alone, which is all that :class:`PathDensity` needs (``Annealed`` needs it everywhere,
    and refuses). Conversely, the last step of a short run as conditional is :class:`Mixture`.

    Yin, Zhou: Semi-implicit variational inference, ICML 2018.

    :param model: a Pyro model.
    :param mixing: see above; a ``torch.nn.Module``, which is trained with the guide, or a function that registers its
        own parameters by ``pyro.module``.
    :param conditional: from ``psi`` to a reparameterisable distribution over rows, with an event of ``d``; by default
        the Normal above, ``s`` learned.
    :param noise: number of standard Normals, or a distribution without batch shape.
    :param num_mixtures: K, where no :class:`SemiImplicit_ELBO` says otherwise.
    :param init_scale: the default conditional's ``s`` at the beginning.
    :param create_plates: as in :class:`~pyro.infer.autoguide.AutoGuide`, for subsampling.
    :raises ValueError: for arguments out of range, at the first call for models without continuous latents and where
        shapes do not fit, and without ``mixing`` at a call with more or fewer rows than the first.
    :raises NotImplementedError: for masked latents, and for latents inside and outside a subsampled plate together.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        mixing: Callable[..., Any] | None = None,
        *,
        conditional: Callable[[Any], Distribution] | None = None,
        noise: int | Distribution = 8,
        num_mixtures: int = 50,
        init_scale: float = 0.1,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(model, compile=False, create_plates=create_plates)
        check_mixtures(num_mixtures)
        check_function("mixing", mixing, "MixingNetwork(8, 2)")
        check_function("conditional", conditional, "lambda psi: Normal(psi, 0.1).to_event(1)")
        check_between("init_scale", init_scale, 0, math.inf, "0.1")
        self.num_mixtures, self.init_scale = num_mixtures, init_scale
        self.mixing, self.conditional, self.noise = mixing, conditional, noise
        noise_law(noise, torch.zeros(()))
        self._subsampled: dict[str, tuple[int, int, int | None]] = {}

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw every latent site, inside its plates.

        :return: dict from site name to value.
        """
        with ordinary_autograd() as grad_enabled, torch.set_grad_enabled(grad_enabled):
            outer = outer_shape()
            call = self._bind(args, kwargs, outer.numel())
            layout = call.density.layout
            fn = self._law(call)
            u = fn.rsample((outer.numel(),))
            log_q = fn.log_prob(u).reshape(-1, layout.rows)
            u = u.reshape(-1, layout.rows, layout.size)
            values, jacobian = call.constrain(u, isolated=False)
            return emit(call, self.plates, self._pyro_name, outer, values, u, log_q - jacobian)

    @torch.no_grad()
    def sample_posterior(
        self, *args: Any, num_samples: int = 1000, num_chains: int = 1, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Independent draws, vectorised.

        :param num_samples: draws per chain.
        :param num_chains: leading dimension, for ArviZ.
        :return: dict from site to ``(num_chains, num_samples, *site shape)``.
        """
        check_count("num_samples", num_samples)
        check_count("num_chains", num_chains)
        with ordinary_autograd(), poutine.block(), torch.no_grad():
            call = self._bind(args, kwargs)
            fn, layout = self._law(call), call.density.layout
            total, parts = num_samples * num_chains, []
            at_once = max(1, _NUMBERS_AT_ONCE // (64 * layout.rows * layout.size))
            for begin in range(0, total, at_once):
                u = fn.own((min(at_once, total - begin), *fn.batch_shape)).reshape(-1, layout.rows, layout.size)
                parts.append(call.model.constrain(u)[0])
        joined = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
        return {k: v.reshape(num_chains, num_samples, *v.shape[1:]) for k, v in joined.items()}

    # ---------------------------------------------------------------- the law of a call

    def _law(self, call: Call) -> SemiImplicit:
        """The distribution of the rows."""
        layout, network = call.density.layout, self.mixing
        assert network is not None
        given: tuple[tuple[Any, ...], dict[str, Any]] = (call.bind.args, call.bind.kwargs)
        if isinstance(network, _Rows):
            network.check(1 if layout.is_arrow else math.prod(plate.full_size for plate in layout.row_plates))
            given = (_row_index(call),), {}
        return SemiImplicit(
            lambda eps: network(eps, *given[0], **given[1]),
            self.conditional or self._normal,
            noise=noise_law(self.noise, _like(call)),
            num_mixtures=self.num_mixtures,
            batch_shape=() if layout.is_arrow else layout.row_shape,
        )

    def _normal(self, psi: Any) -> Distribution:
        own: Any = self.scale if isinstance(psi, Tensor) else None
        loc, scale = (psi, own) if isinstance(psi, Tensor) else psi
        return dist.Normal(loc, scale, validate_args=False).to_event(1)

    def _given_plates(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, pyro.plate]:
        """As a start, the guide is given its subsamples by handlers around plates, which it has to make for that."""
        plates = super()._given_plates(args, kwargs)
        if self.create_plates is None and self.master is None:
            for name, (full, size, dim) in self._subsampled.items():
                plates[name] = pyro.plate(name, full, subsample_size=size, dim=dim)
        return plates

    def _admit(self, structure: Structure) -> Structure:
        structure = super()._admit(structure)
        layout = structure.layout
        if layout.arrow is not None and layout.arrow.weight != 1:
            raise NotImplementedError(
                f"latents {[s.name for s in layout.sites]} lie inside and outside a subsampled plate: use the full "
                "batch, or write a guide with a SemiImplicit distribution for each site."
            )
        return structure

    def _begin(self, call: Call) -> None:
        layout, like = call.density.layout, _like(call)
        for site in call.reading.latents:
            if site["mask"] is not None and site["mask"] is not True:
                raise NotImplementedError(
                    f"latent site '{site['name']}' lies in poutine.mask: write a guide with a SemiImplicit "
                    "distribution for each site, which takes masks."
                )
        dims = {frame.name: frame.dim for frame in call.reading.frames}
        self._subsampled = {k: (full, n, dims[k]) for k, (full, n) in call.reading.subsampled.items()}
        if self.mixing is None:
            rows = 1 if layout.is_arrow else math.prod(plate.full_size for plate in layout.row_plates)
            size = noise_law(self.noise, like).event_shape.numel()
            self.mixing = _Rows(MixingNetwork(size, layout.size, context=_CODE if rows > 1 else 0), rows).to(like)
        if self.conditional is None:
            self.scale = PyroParam(like.new_full((layout.size,), self.init_scale), constraints.positive)
        fn = self._law(call)
        if fn.event_shape != (layout.size,):
            raise ValueError(
                f"mixing and conditional of SemiImplicitGuide made events of shape {tuple(fn.event_shape)}, and must "
                f"make ({layout.size},): the unconstrained values of {[s.name for s in layout.sites]} in one row."
            )


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
