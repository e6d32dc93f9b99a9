"""Posterior draws of more data than fit into memory: batch by batch into a folder of ArviZ files."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from ..amortized.guide import LangevinEncoderGuide
from ..checks import check_count
from ..guides.short_run import ShortRunGuide
from .arviz import to_arviz
from .description import described
from .files import Checksums, remove_leftovers, replacing, reserve

_RECORD, _SUMS = "stream.json", "stream.sha256"
_SUM = "checksum"
_OF_GROUP = 2**16  # bytes besides values


def stream_posterior(
    guide: ShortRunGuide,
    batches: Iterable[Any],
    folder: str | os.PathLike[str],
    *,
    seed: int = 0,
    rank: int = 0,
    ranks: int = 1,
    **options: Any,
) -> list[Path]:
    """Draw the latents of every batch and write an ArviZ file for each, ``part-00000.nc`` and so on.

    Files are whole or absent (written beside, then renamed), and a call on a folder that has some goes on with the
    others. Part i is drawn with a generator of its own, of ``seed`` and ``i``: an interrupted job ends with the same
    draws as an undisturbed one, and a job that ``ranks`` processes share, on one folder, with the draws of a single
    process. Rank r draws batches r, r + ranks, r + 2 ranks, ... Memory is that of one batch, however many there are.

    A folder belongs to one job: ``stream.json`` there says which (seed, options that are numbers or strings, number of
    batches if it is known, digests of parameters), and another is refused. That batches are the same is not checked.
    ``stream.sha256`` has the checksums of the parts, as ``sha256sum -c`` reads them; parts that are there are compared
    with them, and drawn where they have none, as after a crash.

    >>> import tempfile, arviz, pyro, pyro.distributions as dist, torch
    >>> from pyro_shortrun import ShortRunGuide
    >>> from pyro_shortrun.io import stream_posterior
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
    :param seed: not negative. Other seeds give independent draws.
    :param rank: of this process, ``0 <= rank < ranks``.
    :param ranks: processes that share the batches; it may be another number when a job is taken up again.
    :param options: of :func:`~pyro_shortrun.to_arviz`, such as ``num_samples``, ``log_likelihood=False``.
    :returns: this rank's files, in order.
    :raises TypeError: where a batch is neither a tensor nor a tuple.
    :raises ValueError: where ``rank`` is not below ``ranks``, ``seed`` is negative, ``batches`` is one tensor, the
        folder has parts of another job, or a file in it is damaged.
    :raises OSError: where a part cannot be written, such as on a full disk; the parts before it are whole.
    """
    check_count("ranks", ranks)
    check_count("rank", rank, least=0)
    check_count("seed", seed, least=0)
    if not isinstance(guide, ShortRunGuide | LangevinEncoderGuide):
        raise ValueError(f"guide must be a ShortRunGuide(model) or LangevinEncoderGuide, got a {type(guide).__name__}.")
    if rank >= ranks:
        raise ValueError(f"rank must be one of 0, ..., ranks - 1 = {ranks - 1}, got {rank!r}.")
    if isinstance(batches, Tensor):
        raise ValueError("batches is one tensor, whose rows would be taken for batches: give x.split(size).")
    if not isinstance(batches, Iterable):
        raise ValueError(f"batches must be a list of tensors or tuples, or another iterable, got {batches!r}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder, rf"part-\d+\.nc|{re.escape(_RECORD)}|{re.escape(_SUMS)}")
    _claim(folder, _job(guide, batches, seed, options))
    sums, paths = Checksums(folder / _SUMS), []
    for i, read in _share(batches, rank, ranks):
        paths.append(folder / f"part-{i:05d}.nc")
        if not sums.has(paths[-1]):
            _write(guide, _arguments(i, read()), paths[-1], (seed, i), options)
            sums.add(paths[-1])
    return paths


def _job(guide: ShortRunGuide, batches: Iterable[Any], seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """What the draws depend on, but for the batches themselves."""
    defaults = {k: p.default for k, p in inspect.signature(to_arviz).parameters.items()}
    plain = {k: v for k, v in {**defaults, **options}.items() if isinstance(v, bool | int | float | str)}
    known = {"number of batches": len(batches)} if isinstance(batches, Sequence) else {}
    store = pyro.get_param_store()
    tensors = {**{k: store._params[k] for k in store.keys()}, **guide.state_dict()}
    digests = {f"parameter '{k}'": _digest(v) for k, v in sorted(tensors.items()) if isinstance(v, Tensor)}
    made = json.loads(json.dumps({f"guide's {k}": v for k, v in described(guide).items()}))
    return {"seed": int(seed), **known, **plain, **made, **digests}


def _digest(value: Tensor) -> str:
    data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()[:16]


def _claim(folder: Path, job: dict[str, Any]) -> None:
    """Let the folder be this job's, unless it is another's."""
    path = folder / _RECORD
    if not path.exists():
        with replacing(path) as scratch:
            scratch.write_text(json.dumps({**job, _SUM: _sum_of(job)}, indent=1))
    try:
        other = json.loads(path.read_text())
    except ValueError:
        other = None
    if not isinstance(other, dict) or (_SUM in other and other.pop(_SUM) != _sum_of(other)):  # 0.1.0 wrote none
        raise ValueError(f"{path} is damaged: delete it, if this is the job that the parts in {folder} are of.")
    differ = [k for k in job if k in other and job[k] != other[k]]
    if differ:
        raise ValueError(f"{folder} has draws of a job with another {differ[0]}: give this one a folder of its own.")


def _sum_of(job: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:16]


def _share(batches: Iterable[Any], rank: int, ranks: int) -> Iterator[tuple[int, Callable[[], Any]]]:
    """A rank's batches: their numbers, and how to read them."""
    if isinstance(batches, Sequence):
        yield from ((i, partial(batches.__getitem__, i)) for i in range(rank, len(batches), ranks))
    else:
        yield from ((i, partial(_same, batch)) for i, batch in islice(enumerate(batches), rank, None, ranks))


def _same(batch: Any) -> Any:
    return batch


def _arguments(i: int, batch: Any) -> tuple[Any, ...]:
    if isinstance(batch, torch.Tensor):
        return (batch,)
    if isinstance(batch, tuple | list):
        return tuple(batch)
    raise TypeError(f"batch {i} is a {type(batch).__name__}: give a tensor, or a tuple of the model's arguments.")


def _write(
    guide: ShortRunGuide, args: tuple[Any, ...], path: Path, seed: tuple[int, int], options: dict[str, Any]
) -> None:
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]))
        found = to_arviz(guide, *args, **options)
    try:
        with replacing(path) as scratch:
            reserve(scratch, _size_of(found))  # HDF5 ends the process where a disk is full
            found.to_netcdf(scratch)
    except (OSError, RuntimeError) as reason:
        first = str(reason).splitlines()[0]
        raise OSError(
            f"{path} could not be written ({first}): make room, and call again, which goes on with this part."
        ) from reason


def _size_of(found: Any) -> int:
    """Bytes of a file of these groups, at most."""
    groups = [found[name] for name in (found.groups() if callable(found.groups) else found.children)]
    return sum(int(1.1 * group.nbytes) + _OF_GROUP for group in groups)
