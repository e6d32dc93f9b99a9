"""Posterior draws of more data than fit into memory: batch by batch into a folder of ArviZ files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from .arguments import check_count
from .export import to_arviz
from .guide import ShortRunGuide
from .saving import replacing


def stream_posterior(
    guide: ShortRunGuide,
    batches: Iterable[Any],
    folder: str | os.PathLike,
    *,
    seed: int = 0,
    rank: int = 0,
    ranks: int = 1,
    **options: Any,
) -> list[Path]:
    """Draw the latents of every batch and write an ArviZ file for each, ``part-00000.nc`` and so on.

    Files are whole or absent (written beside, then renamed), and a call on a folder that has some goes on with the
    others. Part i is drawn with ``seed + i``: an interrupted job ends with the same draws as an undisturbed one, and a
    job that ``ranks`` processes share, on one folder, with the draws of a single process. Rank r draws batches r,
    r + ranks, r + 2 ranks, ... Memory is that of one batch, however many there are.

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
    :param batches: the model's arguments batch by batch: tensors, or tuples of arguments. From a sequence (anything
        with ``len`` and items by index that is a ``collections.abc.Sequence``) only the batches that are to be drawn
        are read; other iterables are read through.
    :param folder: made if it is not there.
    :param seed: of part 0.
    :param rank: of this process, ``0 <= rank < ranks``.
    :param ranks: processes that share the batches; it may be another number when a job is taken up again.
    :param options: of :func:`~pyro_shortrun.to_arviz`, such as ``num_samples``, ``log_likelihood=False``.
    :returns: this rank's files, in order.
    :raises TypeError: where a batch is neither a tensor nor a tuple.
    :raises ValueError: where ``rank`` is not below ``ranks``.
    """
    check_count("ranks", ranks)
    if not 0 <= rank < ranks:
        raise ValueError(f"rank must be one of 0, ..., ranks - 1 = {ranks - 1}, got {rank!r}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, read in _share(batches, rank, ranks):
        paths.append(folder / f"part-{i:05d}.nc")
        if not paths[-1].exists():
            _write(guide, _arguments(i, read()), paths[-1], seed + i, options)
    return paths


def _share(batches: Iterable[Any], rank: int, ranks: int) -> Iterator[tuple[int, Callable[[], Any]]]:
    """A rank's batches: their numbers, and how to read them."""
    if isinstance(batches, Sequence):
        yield from ((i, partial(batches.__getitem__, i)) for i in range(rank, len(batches), ranks))
    else:
        yield from ((i, partial(_same, batch)) for i, batch in islice(enumerate(batches), rank, None, ranks))


def _same(batch: Any) -> Any:
    return batch


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
