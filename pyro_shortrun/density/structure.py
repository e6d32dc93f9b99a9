"""What stays the same between calls of one model: the layout of its latents and which plates make the rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ..checks import of_arguments, of_trace, one_kind
from .layout import Layout
from .program import Binding, Program, Reading
from .shapes import LatentSite, Plate
from .sites import is_data, plates_of


@dataclass(frozen=True)
class Structure:
    """What stays the same between calls whose sites, shapes and plates are the same."""

    layout: Layout
    data: frozenset[str]
    summed: bool  # some discrete site is enumerated
    began_real: bool  # in the run that it was read from every latent's support was all of space
    dtype: torch.dtype
    device: torch.device
    vectorizes: dict[str, bool] = field(default_factory=dict)  # found out on first use, see `map_chains`
    noticed: dict[str, bool] = field(default_factory=dict)  # of supports, in all runs of the model so far

    @property
    def is_real(self) -> bool:
        """Whether the support of every latent was all of space in all runs of the model so far, so that site values are
        the unconstrained ones. A model may branch on its values; :class:`~pyro_shortrun.density.rows.Rows` notices."""
        return self.began_real and not self.noticed.get("supports vary", False)

    @cached_property
    def latents(self) -> dict[str, LatentSite]:
        """The latent sites by name, in the order of the model."""
        return {site.name: site for site in self.layout.sites}


def unscalable(layout: Layout) -> str | None:
    """Name of a latent whose subsampling scale no row or arrowhead can carry, or None."""
    rows = math.prod(plate.scale for plate in layout.row_plates)
    shared, local = layout.split
    wrong = [s.name for s in local if not math.isclose(s.scale, rows)]
    wrong += [s.name for s in shared if not math.isclose(s.scale, 1.0)]
    return wrong[0] if wrong else None


def read_structure(program: Program, reading: Reading, bind: Binding) -> Structure:
    """Decide the rows from a draw and one evaluation in which the latents require gradients."""
    sites = [
        LatentSite(
            s["name"],
            torch.Size(s["fn"].batch_shape),
            reading.unconstrained[s["name"]].shape[len(s["fn"].batch_shape) :],
            plates_of(s),
        )
        for s in reading.latents
    ]
    _check_room(reading)
    leaves = {k: v.detach().clone().requires_grad_() for k, v in reading.unconstrained.items()}
    _check_dtypes(leaves)
    with torch.enable_grad(), pyro.validation_enabled(False):
        probe = program.run(bind, leaves)
        _compute_log_prob(probe.trace, bind)
        rows = _row_plates(sites, probe, leaves)
    first = next(iter(leaves.values()))
    return Structure(
        layout=Layout(tuple(sites), rows),
        data=frozenset(k for k, s in reading.trace.nodes.items() if is_data(s) and k not in bind.given),
        summed=bind.enum_dim is not None,
        began_real=reading.is_real,
        dtype=first.dtype,
        device=first.device,
    )


def _compute_log_prob(trace: Any, bind: Binding) -> None:
    """Pyro's, naming what does not fit together."""
    try:
        with one_kind(lambda: {**of_arguments(bind.args, bind.kwargs), **of_trace(trace)}):
            trace.compute_log_prob()
    except RuntimeError as reason:
        if "size of tensor" not in str(reason):
            raise
        name, site = next((k, s) for k, s in trace.nodes.items() if s["type"] == "sample" and "log_prob" not in s)
        value, fn = torch.as_tensor(site["value"]), site["fn"]
        raise ValueError(
            f"site '{name}': a value of shape {tuple(value.shape)} does not fit a distribution with batch shape "
            f"{tuple(fn.batch_shape)} and event shape {tuple(fn.event_shape)}."
        ) from reason


def _check_room(reading: Reading) -> None:
    """Refuse latents that can take one value only: nothing could move."""
    for site in reading.latents:
        fn = site["fn"]
        while isinstance(fn, (dist.Independent, dist.MaskedDistribution, dist.ExpandedDistribution)):
            fn = fn.base_dist
        support = getattr(fn, "support", None)
        low, high = getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)
        empty = low is not None and high is not None and bool((torch.as_tensor(low) >= torch.as_tensor(high)).any())
        if empty or isinstance(fn, dist.Delta):
            name = site["name"]
            raise ValueError(
                f"latent site '{name}' ({type(fn).__name__}) can take one value only: write "
                f"pyro.deterministic('{name}', value), or give it a prior that has some width."
            )


def _check_dtypes(values: Mapping[str, Tensor]) -> None:
    kinds = {(v.dtype, v.device): k for k, v in values.items()}
    if len(kinds) > 1:
        found = ", ".join(f"'{k}' is {d} on {dev}" for (d, dev), k in kinds.items())
        raise ValueError(
            f"latent sites must share one dtype and device, but {found}: cast the distributions' parameters."
        )


def _row_plates(sites: list[LatentSite], probe: Reading, leaves: Mapping[str, Tensor]) -> tuple[Plate, ...]:
    """Plates common to all latents that lie in any plate, less those across which something couples them."""
    plated = [set(s.plates) for s in sites if s.plates]
    common = set.intersection(*plated) if plated else set()

    def couples(plate: Plate) -> bool:
        local = [leaves[s.name] for s in sites if plate in s.plates]
        for site in probe.trace.nodes.values():
            if site["type"] != "sample" or site_is_subsample(site) or plate in plates_of(site):
                continue
            if "_enumerate_dim" in site["infer"] or _reaches(site["log_prob"], local):
                return True
        return False

    return tuple(sorted((p for p in common if not couples(p)), key=lambda p: p.dim))


def _reaches(term: Any, leaves: list[Tensor]) -> bool:
    if not (isinstance(term, Tensor) and term.requires_grad):
        return False
    grads = torch.autograd.grad(term.sum(), leaves, retain_graph=True, allow_unused=True)
    return any(g is not None for g in grads)


def missing_data(first: Structure, reading: Reading) -> list[str]:
    """Sites of the set-up's data that a call does not observe."""
    nodes = reading.trace.nodes.items()
    return sorted(first.data - {k for k, s in nodes if s["type"] == "sample" and s["is_observed"]})


def check_data(first: Structure, reading: Reading) -> None:
    """Refuse a call in which a site of the set-up's data is not observed."""
    missing = missing_data(first, reading)
    if missing:
        raise ValueError(
            f"site '{missing[0]}' was observed when the guide was set up and is not now. The posterior depends "
            "on the data: call guide.condition_on(*training_args) before Predictive(model, guide=guide), or "
            "pass the observation."
        )


def check_latents(first: Structure | None, now: Structure, needs_log_q: bool) -> None:
    """Refuse latents that differ from those of the first call, other than in the number of rows."""
    wrong = unscalable(now.layout) if needs_log_q else None
    if wrong is not None:
        raise NotImplementedError(
            f"latent site '{wrong}' lies in a subsampled plate that the other latents do not "
            "share, so its part of log q cannot be scaled: use the full batch, or put all local latents into "
            "one plate."
        )
    if not now.layout.size:
        names = ", ".join(f"'{s.name}'" for s in now.layout.sites)
        raise ValueError(
            f"latent site {names} has no values: its shape has a dimension of size 0. Leave it out of the model, or "
            "use NUTS or ShortRunLangevin, which do not mind."
        )
    if first is None:
        return
    new, old = now.layout.row_sizes, first.layout.row_sizes
    if set(new) != set(old):
        raise ValueError(
            f"the model's latent sites changed between calls, from {sorted(old)} to {sorted(new)}; use one "
            "guide per model."
        )
    for name in old:
        if old[name] != new[name]:
            raise ValueError(
                f"latent site '{name}' has {new[name]} values in a row, {old[name]} when the guide was set up: only "
                "the size of the plate that makes the rows may change between calls."
            )


def check_shapes(
    program: Program, conditioned: tuple[tuple[Any, ...], dict[str, Any]], now: tuple[tuple[Any, ...], dict[str, Any]]
) -> None:
    """Refuse latents drawn for conditioned arguments where this call's arguments want other shapes."""
    try:
        wanted = program.draw(*now).unconstrained
    except Exception:  # a model that forecasts does not run without the handlers of a Forecaster
        return
    for name, value in program.draw(*conditioned).unconstrained.items():
        if name in wanted and wanted[name].shape != value.shape:
            raise ValueError(
                f"latent site '{name}' has unconstrained shape {tuple(value.shape)} for the arguments given "
                f"to condition_on (or to training calls) but {tuple(wanted[name].shape)} for this call's arguments: "
                "local latents of the training data do not fit other data. Call guide.forget() to infer the new data's "
                "latents, or guide.condition_on(*args) with data that fit."
            )


def check_proper(reading: Reading) -> None:
    """Refuse to start from a prior that is no density: log q would be that of nothing."""
    for site in reading.latents:
        fn = site["fn"]
        while isinstance(fn, (dist.Independent, dist.MaskedDistribution)):
            fn = fn.base_dist
        if isinstance(fn, dist.ImproperUniform):
            raise ValueError(
                f"latent site '{site['name']}' has an improper prior, which no run can start from: use "
                "start=AutoNormal(model, init_loc_fn=init_to_value(values={...})) or another guide."
            )


def check_masks(objective: Any, reading: Reading) -> None:
    """Refuse latents that are taken out of the density, where the objective would count their spread all the same."""
    for site in reading.latents:
        if site["mask"] is not None and site["mask"] is not True:
            raise NotImplementedError(
                f"latent site '{site['name']}' lies in poutine.mask (or obs_mask makes it), which "
                f"{type(objective).__name__} cannot weigh: use PathDensity(), or Annealed() with start=Prior()."
            )
