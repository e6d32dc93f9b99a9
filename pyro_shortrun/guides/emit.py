"""Sample statements of a guide: latents as point masses, log q at an auxiliary site, plates around the guide."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor

from ..density.call import Call


def outer_shape() -> torch.Size:
    """Batch shape of the plates around the guide, as a site in them would get it."""
    infer: Any = {"is_auxiliary": True, "_do_not_trace": True}
    return pyro.sample("_outer", dist.Delta(torch.zeros(())), infer=infer).shape


def emit(
    call: Call,
    plates: Mapping[str, pyro.plate],
    prefix: str,
    outer: torch.Size,
    values: Mapping[str, Tensor],
    u: Tensor,
    log_q: Tensor,
) -> dict[str, Tensor]:
    """Sample statements: one auxiliary site with all of log q, and every latent as a point mass.

    All of log q sits in the auxiliary site because TraceMeanField_ELBO ignores a Delta's log_density.

    :param values: site values with a leading chain axis.
    :param u: final states, ``(chains, rows, size)``.
    :param log_q: ``(chains, rows)``.
    """
    layout = call.density.layout
    # Only the latents' own plates: Predictive(parallel=True) counts the plates that it finds in the guide.
    place = _Placement(outer, max((-p.dim for s in layout.sites for p in s.plates), default=0))
    rows = () if layout.is_arrow else layout.row_plates
    width = -min((p.dim for p in rows), default=0)
    batch = [1] * width
    for plate in rows:
        batch[plate.dim] = plate.size
    with ExitStack() as stack:
        for plate in rows:
            stack.enter_context(plates[plate.name])
        flat = place(u.reshape(u.shape[0], *batch, layout.size), width)
        density = place(log_q.reshape((u.shape[0], *batch)), width)
        pyro.sample(
            f"_{prefix}_latent",
            dist.Delta(flat, log_density=density, event_dim=1),
            infer={"is_auxiliary": True},
        )
    result = {}
    for site in call.reading.latents:
        name, fn = site["name"], site["fn"]
        with ExitStack() as stack:
            for frame in site["cond_indep_stack"]:
                stack.enter_context(plates[frame.name])
            if site["mask"] is not None:  # for TraceMeanField_ELBO, which reads the guide's mask
                stack.enter_context(poutine.mask(mask=site["mask"]))
            value = place(values[name], len(fn.batch_shape))
            result[name] = pyro.sample(name, dist.Delta(value, event_dim=fn.event_dim))
    return result


class _Placement:
    """Moves the chain axis of a value to the dims of the plates outside the guide."""

    def __init__(self, outer: torch.Size, nesting: int) -> None:
        self.nesting = nesting
        self.front = outer[: max(len(outer) - nesting, 0)]
        if self.front.numel() != outer.numel():
            raise ValueError(
                "a plate around the guide takes one of the model's own plate dimensions; give it a dim to the left "
                f"of {-nesting}."
            )

    def __call__(self, value: Tensor, batch: int) -> Tensor:
        rest = value.shape[1:]
        if not self.front:
            return value.reshape(rest)
        return value.reshape((*self.front, *((1,) * (self.nesting - batch)), *rest))


def values_of_other_parts() -> dict[str, Tensor]:
    """Values that the guide being traced has sampled so far (other parts of an AutoGuideList)."""
    values: dict[str, Tensor] = {}
    for frame in _PYRO_STACK:
        if isinstance(frame, TraceMessenger):
            nodes: Any = frame.trace.nodes.items()
            values.update({k: s["value"].detach() for k, s in nodes if s["type"] == "sample"})
    return values
