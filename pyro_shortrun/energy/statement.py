"""The statement ``energy_prior`` and the sites that it leaves in a trace."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, nn

from ..density.program import Reading
from ..density.sites import Site, plates_of

_MARK = "_pyro_shortrun_energy"


@dataclass(frozen=True)
class Energy:
    """What marks the site of an energy: the function and its arguments."""

    function: Callable[..., Tensor]
    latents: tuple[Tensor, ...]

    def at_fixed_latents(self) -> Tensor:
        """The energy again, differentiable in its own parameters alone."""
        return self.function(*(z.detach() for z in self.latents))


def energy_prior(name: str, energy: Callable[..., Tensor], *latents: Tensor) -> None:
    r"""Tilt the prior of latents: a ``pyro.factor`` of ``-energy(*latents)``, marked as a part of the prior.

    .. math:: p(z) = \frac{1}{Z} \exp\Big(-\sum_j E_j(z)\Big) \prod_i p(z_i \mid \text{parents}) , \qquad
              Z = \int \exp\Big(-\sum_j E_j(z)\Big) \prod_i p(z_i \mid \text{parents})\, dz .

    A model may have one for each layer, or one on all layers jointly. Train it with
    :class:`~pyro_shortrun.EnergyELBO`, since plain SVI lacks log Z, and draw from it with
    :func:`~pyro_shortrun.sample_prior`, since ``Predictive`` ignores factors. Place it directly after the latents that
    it needs and before the decoder: what comes after a model's last energy takes no part in runs in the prior, and
    data before it (labels that the energy depends on, say) are held as conditions, ``p(z | data before)``.

    >>> import pyro, pyro.distributions as dist, torch
    >>> energy = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.GELU(), torch.nn.Linear(16, 1))
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    ...         energy_prior("ebm", lambda z: energy(z).squeeze(-1), z)
    ...         pyro.sample("x", dist.Normal(z, 0.1).to_event(1), obs=x)

    :param name: name of the site. Parameters of an ``nn.Module`` are registered as ``pyro.module(name, energy)`` does,
        as ``name$$$...``; a ``PyroModule`` names its parameters itself. A function, as above, does not register what it
        calls: use ``pyro.module`` for that.
    :param energy: from ``latents`` to one value in nats for each element of the enclosing plates; low where the prior
        is to gain mass.
    :param latents: values of earlier sample sites.
    :raises ValueError: where ``energy`` cannot be called, or gives another shape than that of the enclosing plates.
    """
    if not isinstance(name, str) or not latents:
        raise ValueError(
            f"name must be a string and latents values of earlier sites, energy_prior('ebm', energy, z); got "
            f"{name!r} and {len(latents)} latents."
        )
    if not callable(energy):
        raise ValueError(
            f"energy '{name}' must be a function or an nn.Module, got a {type(energy).__name__}: the order is "
            "energy_prior(name, energy, *latents)."
        )
    if isinstance(energy, nn.Module) and not isinstance(energy, PyroModule):
        pyro.module(name, energy)
    value = energy(*latents)
    if not isinstance(value, Tensor):
        raise ValueError(f"energy '{name}' must give a tensor, got {value!r}.")
    if value.requires_grad and _is_trained(name) and Energy(energy, latents).at_fixed_latents().requires_grad:
        warnings.warn(
            f"energy '{name}' is trained without its log Z, so that the loss falls and nothing is learned: put the "
            "loss into EnergyELBO, as in EnergyELBO(Trace_ELBO()), or freeze the energy's parameters.",
            stacklevel=2,
        )
    unit = dist.Unit(-value)
    with _OneValuePerElement(value.shape):
        infer: Any = {"is_auxiliary": True, _MARK: Energy(energy, latents)}
        try:
            pyro.sample(name, unit, obs=unit.sample(), infer=infer)
        except ValueError as reason:
            if "Shape mismatch" not in str(reason):  # the plates' own
                raise
            raise ValueError(
                f"energy '{name}' has shape {tuple(value.shape)}, which does not fit the plates around it ({reason}): "
                "return one value per element, summed over the latents' own dimensions."
            ) from reason


class KnowsLogZ(Messenger):
    """Marks what is run inside as trained with the gradient of log Z."""


def _is_trained(name: str) -> bool:
    """Whether gradients of a loss without log Z reach parameters here, by SVI."""
    if not torch.is_grad_enabled() or any(isinstance(m, KnowsLogZ) for m in _PYRO_STACK):
        return False
    parameter: Any = {"type": "param", "name": name, "is_observed": False, "infer": {}}
    for m in reversed(_PYRO_STACK):
        if isinstance(m, BlockMessenger) and m.hide_fn(parameter):
            return False
        if isinstance(m, TraceMessenger) and m.param_only:  # by which SVI finds out what to train
            return True
    return False


class _OneValuePerElement(Messenger):
    """Refuses shapes that the plates around would silently broadcast."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self._shape = tuple(shape)

    def _pyro_post_sample(self, msg: Site) -> None:
        plates = plates_of(msg)
        width = max((-p.dim for p in plates), default=0)
        wanted = [1] * width
        for plate in plates:
            wanted[plate.dim] = plate.size
        shape = self._shape
        if any(isinstance(m, EnumMessenger) for m in _PYRO_STACK):  # whose dims are to the left of all plates
            shape = shape[max(len(shape) - width, 0) :]
        if (1,) * (width - len(shape)) + shape == tuple(wanted):
            return
        if self._shape[:-1] == tuple(wanted) and self._shape[-1] == 1:
            remedy = "its last dimension is one too many: return energy(z).squeeze(-1)"
        elif len(self._shape) < width:
            remedy = "return one value per element, or move energy_prior out of plates that its latents are not in"
        else:
            remedy = "sum over the latents' own dimensions, and over nothing else"
        raise ValueError(
            f"energy '{msg['name']}' has shape {self._shape}, but the plates around it "
            f"({', '.join(p.name for p in plates) or 'none'}) have shape {tuple(wanted)}: {remedy}."
        )


def energy_of(site: Site) -> Energy | None:
    """The energy of a trace node, or None where it is not one."""
    return site["infer"].get(_MARK) if site["type"] == "sample" else None


def energies(reading: Reading) -> dict[str, Site]:
    """The trace nodes of energies."""
    return {k: s for k, s in reading.trace.nodes.items() if energy_of(s) is not None}
