"""The default rule: where runs and chains start, if nobody says."""

from __future__ import annotations

from ..density.structure import Structure
from .fitted import MAX_SIZE, Gaussian
from .prior import Prior
from .start import Start


def default_start(structure: Structure, subsamples: bool, partial: bool) -> Start:
    """Where runs start.

    * ``Gaussian()``, fitted at set-up: where all latents together are one row of at most 300 values, that is, where
      some latent lies in no plate, or something couples the plates' elements; with all data at every call.
    * ``Prior()``, as in the papers: where every latent lies in a plate whose elements are independent (a generator:
      rows of data), where a plate is subsampled or the guide is a part of an ``AutoGuideList`` (what a Gaussian is
      fitted to would change from call to call), and for more latents.

    :param subsamples: whether the model draws a subsample in some plate.
    :param partial: whether other sites of the model are inferred by other guides.
    """
    layout = structure.layout
    small = layout.rows == 1 and layout.size <= MAX_SIZE and (layout.is_arrow or not layout.row_plates)
    return Gaussian() if small and not (subsamples or partial) else Prior()
