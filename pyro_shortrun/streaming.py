"""Posterior draws of more data than fit into memory: batch by batch into a folder of ArviZ files."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from .export import to_arviz
from .guide import ShortRunGuide
from .saving import replacing


def stream_posterior(
    guide: ShortRunGuide,
    batches: Iterable[Any],
    folder: str | os.PathLike,
    *,
    seed: int = 0,
    **options: Any,
) -> list[Path]:
    """Draw the latents of every batch and write an ArviZ file for each, ``part-00000.nc`` and so on.

    Files are whole or absent (written beside, then renamed), and a call on a folder that has some goes on with the
    others. Part i is drawn with ``seed + i``: an interrupted job ends with the same draws as an undisturbed one. Ranks
    may share the work, each with its own ``batches``, ``folder`` and ``seed``. Memory is that of one batch.

    >>> import tempfile, arviz, pyro, pyro.distributions as dist, torch
    >>> from pyro_shortrun import ShortRunGuide, stream_posterior
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> guide = ShortRunGuide(model, num_steps=2).setup(torch.zeros(3))
    >>> paths = stream_posterior(guide, torch.randn(6).split(3), tempfile.mkdtemp(), num_samples=5, num_chains=2)
    >>> [p.name for p in paths]
    ['part-00000.nc', 'part-00001.nc']
    >>> arviz.from_netcdf(paths[1])["posterior"]["z"].shape
    (2, 5, 3)

    :param guide: a trained guide; the latents of a batch should be local to its rows, since every batch is a posterior
        of its own.
    :param batches: the model's arguments batch by batch: tensors, or tuples of arguments. Batches whose file is there
        are read and not used.
    :param folder: made if it is not there.
    :param seed: of part 0.
    :param options: of :func:`~pyro_shortrun.to_arviz`, such as ``num_samples``, ``log_likelihood=False``.
    :returns: the files, in order.
    :raises TypeError: where a batch is neither a tensor nor a tuple.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, batch in enumerate(batches):
        paths.append(folder / f"part-{i:05d}.nc")
        if not paths[-1].exists():
            _write(guide, _arguments(i, batch), paths[-1], seed + i, options)
    return paths


def _arguments(i: int, batch: Any) -> tuple:
    if isinstance(batch, torch.Tensor):
        return (batch,)
    if isinstance(batch, tuple | list):
        return tuple(batch)
    raise TypeError(f"batch {i} is a {type(batch).__name__}: give a tensor, or a tuple of the model's arguments.")


def _write(guide: ShortRunGuide, args: tuple, path: Path, seed: int, options: dict[str, Any]) -> None:
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        found = to_arviz(guide, *args, **options)
    with replacing(path) as scratch:
        found.to_netcdf(scratch)
