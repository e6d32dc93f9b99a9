"""Gaussian: a start with a full covariance over all latents together, fitted at set-up and trained on."""

from __future__ import annotations

import copy
import logging
from abc import ABCMeta
from dataclasses import replace
from typing import Any

import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroParam
from torch import Tensor

from ..density.affine import Affine
from ..density.call import Call
from ..density.interface import Density
from ..density.layout import Layout, require_full_plates
from ..density.structure import Structure
from .base import GaussianBase
from .finite import require_gradient
from .fitting import Fit, fit_normal
from .funnels import funnels
from .normal import Normal
from .start import Framed, Start, StartDraw
from .target import Target

_LOGGER = logging.getLogger("pyro_shortrun")
MAX_SIZE = 300  # latents: its cost grows with the cube
_GAIN = 0.1  # of what is trained: an optimiser moves every parameter by about its learning rate
_BEYOND = 1e12  # nats: no data have such a density
_UNIFORM, _PRIOR, _WIDTH = 2, 2, 3.0  # places where a fit begins, besides zero, and how far out they may be


class _Kind(type(PyroModule), ABCMeta):  # type: ignore[misc]
    """Both bases have a metaclass."""


class Gaussian(PyroModule, Start, metaclass=_Kind):  # type: ignore[metaclass]
    r"""A Gaussian in the unconstrained space of all latents together, ``u_0 ~ N(m, S)``, and coordinates to run in.

    It is fitted before the first run, without an optimiser or a learning rate: Newton's paths from several places to
    the Laplace approximation with the highest bound, then natural-gradient ascent of

    .. math:: E_{N(u; m, S)}[\log\pi(u) - \log N(u; m, S)] \le \log p(x)

    in nats. All steps are the same in all units of the latents, so that wide priors and raw covariates do no harm. The
    run then moves ``v`` with ``u = m + L v``, ``L L^T = S``, in which the posterior has unit scales and one step size
    fits all. SVI trains mean and covariance on, as ``m + .1 L a`` and a factor near the identity within these
    coordinates, which stay as they are until :meth:`~pyro_shortrun.ShortRunGuide.pretrain` fits again.

    For up to 300 latents. The latents of a generator, which lie in a data plate, are too many: there use
    :class:`~pyro_shortrun.Prior` or an encoder.

    Khan, Lin: Conjugate-computation variational inference, AISTATS 2017; Zhang, Carpenter, Gelman, Vehtari: Pathfinder,
    JMLR 2022.

    :ivar fit: the last :class:`~pyro_shortrun.starts.Fit`, or None.
    :raises ValueError: at set-up, for more than 300 latents or subsampled ones, for a log density without an upper
        bound, and where no Gaussian is stationary; ``pretrain`` then goes on from what was found.
    """

    is_learned = True
    center: Tensor
    factor: Tensor
    fitted: Tensor
    fit: Fit | None = None
    shift: Any  # PyroParams
    stretch: Any

    def arrange(self, structure: Structure) -> Structure:
        """All latents in one row."""
        layout = Layout(structure.layout.sites, ())
        require_full_plates(layout, "fit Gaussian()")
        if layout.size > MAX_SIZE:
            raise ValueError(
                f"latents {[s.name for s in layout.sites]} have {layout.size} values together, and Gaussian() takes "
                f"{MAX_SIZE}: use start=Prior(), or start=AutoNormal(model)."
            )
        return replace(structure, layout=layout, vectorizes={})

    def setup(self, density: Density) -> None:
        size, structure = density.layout.size, density.structure
        if "center" in self._buffers:
            return
        zero = torch.zeros(size, dtype=structure.dtype, device=structure.device)
        self.register_buffer("center", zero)
        self.register_buffer("factor", torch.diag_embed(torch.ones_like(zero)))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool, device=structure.device))
        self.shift = PyroParam(torch.zeros_like(zero))
        self.stretch = PyroParam(torch.zeros(size, size, dtype=structure.dtype, device=structure.device))
        if self.shift.shape != zero.shape:  # PyroParam reads the parameter store, by name
            raise ValueError(
                f"the Gaussian start has {size} latent values and Pyro's parameter store {len(self.shift)}, another "
                "guide's: call pyro.clear_param_store() between guides, and go on with the newer one."
            )

    @property
    def is_fitted(self) -> bool:
        """Whether it has been fitted."""
        return "fitted" in self._buffers and bool(self.fitted)

    @property
    def loc(self) -> Tensor:
        """The mean in unconstrained space, ``(size,)``."""
        return self.frame.outward(self._inside[0])

    @property
    def scale_tril(self) -> Tensor:
        """The Cholesky factor of the covariance in unconstrained space, ``(size, size)``."""
        return self.factor @ self._inside[1]

    @property
    def frame(self) -> Affine:
        """The coordinates that runs move in."""
        return Affine(self.center, self.factor)

    def at(self, frame: Affine) -> Gaussian:
        """The Gaussian that has these coordinates, mean zero and unit covariance in them."""
        other = copy.deepcopy(self)
        other.center, other.factor = frame.center, frame.factor
        other.shift, other.stretch = torch.zeros_like(self.shift), torch.zeros_like(self.stretch)
        return other

    @property
    def _inside(self) -> tuple[Tensor, Tensor]:
        """Mean and factor in these coordinates."""
        stretch = _GAIN * self.stretch
        return _GAIN * self.shift, stretch.tril(-1) + torch.diag_embed(stretch.diagonal().exp())

    def draw(self, call: Call, chains: int) -> StartDraw:
        if len(self.center) != call.density.layout.size:
            raise ValueError(
                f"the Gaussian start was fitted to {len(self.center)} latent values, and there are "
                f"{call.density.layout.size} now: make a guide for each data set."
            )
        frame, (loc, scale) = self.frame, self._inside
        base = GaussianBase(loc.unsqueeze(0), scale.unsqueeze(0))
        v, terms = base.draw(chains)
        u, log_q = frame.outward(v), terms.sum(-1) - frame.log_scale
        outside = GaussianBase(self.loc.unsqueeze(0), self.scale_tril.unsqueeze(0))
        return StartDraw(u, log_q, call.model(u.detach()), outside, Framed(frame, v, base))

    @torch.no_grad()
    def pretrain(self, call: Call) -> Fit:
        """Fit to this call's posterior, from the last fit if there is one.

        :param call: with all latents in one row.
        """
        target = Target(call.model)  # of states of many shapes, for each of which there would be a graph
        first = None if self.fit is None and not self.fitted else Normal(self.loc.double(), self.scale_tril.double())
        with poutine.block():
            places = _places(call)
            require_gradient(call.model, places.to(self.center).unsqueeze(1))
            fit = fit_normal(target, places, first)
        _check_bounded(fit, call, target)
        normal = fit.normal
        self.center.copy_(normal.loc)
        self.factor.copy_(normal.factor)
        self.shift, self.stretch = torch.zeros_like(self.shift), torch.zeros_like(self.stretch)
        self.fit = fit
        _report(fit, call)
        self.fitted.fill_(True)
        return fit

    def __repr__(self) -> str:
        return "Gaussian()" if self.fit is None else f"Gaussian(bound {self.fit.bound:.5g} by {self.fit.kind})"


def _places(call: Call) -> Tensor:
    """Where the fit begins: zero, at random around it, and draws from the prior that are not far out."""
    size, like = call.density.layout.size, call.density.structure
    zero = torch.zeros(1, size, dtype=torch.float64, device=like.device)
    places = [zero, 4 * torch.rand_like(zero.expand(_UNIFORM, -1)) - 2]
    try:
        drawn = call.prior(_PRIOR).reshape(_PRIOR, size).double()
        places.append(drawn.nan_to_num().clamp(-_WIDTH, _WIDTH))
    except NotImplementedError:  # an improper prior
        pass
    return torch.cat(places)


def _report(fit: Fit, call: Call) -> None:
    line = "Gaussian start: bound %.5g +- %.2g nats by %s, %d evaluations, %.2g s"
    _LOGGER.info(line, fit.bound, fit.error, fit.kind, fit.evaluations, fit.seconds)
    if not fit.converged:
        moving = _moving(fit, call)
        raise ValueError(
            f"the Gaussian start has not converged{f' at {moving}' if moving else ''} (bound {fit.bound:.5g} +- "
            f"{fit.error:.2g}): the posterior is far from a Gaussian there, a funnel or a heavy tail, or has no upper "
            "bound. Write scale parameters non-centred (poutine.reparam with LocScaleReparam), call "
            "guide.pretrain(*args) again to go on, or pass start=Prior() or start=AutoNormal(model)."
        )
    for name, source in funnels(call.model, fit.normal).items():
        _LOGGER.warning(
            "'%s' and '%s' make a funnel: the scale of the one is the other, and data say little about it. Draws will "
            "not reach the neck; write it non-centred: poutine.reparam(model, {'%s': LocScaleReparam(0.0)}).",
            name,
            source,
            name,
        )
    for other in fit.others:
        gap = other.loc - fit.normal.loc
        size = torch.minimum(other.factor.norm(dim=1), fit.normal.factor.norm(dim=1))
        _LOGGER.warning(
            "the posterior has another mode, of about the same height, at other values of %s: the Gaussian start "
            "covers one, and draws stay there. Where names can be exchanged, order them; else compare with chains.",
            _sites(gap.abs() > 3 * size, call),
        )


def _check_bounded(fit: Fit, call: Call, target: Target) -> None:
    """Refuse a density that was still rising where no data can have taken it, or where a nat is lost to rounding."""
    if not fit.converged and fit.bound > min(_BEYOND, 1 / target.rounding):
        where = _moving(fit, call) or ", ".join(f"'{s.name}'" for s in call.density.layout.sites)
        raise ValueError(
            f"the log density has no upper bound: fitting a Gaussian, it rose to {fit.bound:.2g} nats along "
            f"{where}. Look for a pyro.factor of the wrong sign, or a latent that "
            "neither prior nor data hold."
        )


def _moving(fit: Fit, call: Call) -> str:
    """The sites whose means are far from stationary."""
    return "" if fit.residual is None else _sites(fit.residual > 0.1, call)


def _sites(marked: Tensor, call: Call) -> str:
    """Those with a coordinate that is marked, ``(size,)``."""
    rows = call.density.layout.unpack(marked.reshape(1, 1, -1))
    return ", ".join(f"'{name}'" for name, some in rows.items() if some.any())
