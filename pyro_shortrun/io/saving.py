"""A run in one file that is never half written: parameters, chains, optimisers, plain values, random states."""

from __future__ import annotations

import copy
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro.optim import PyroOptim
from pyro.params.param_store import ParamStoreDict
from torch import Tensor

from ..tensors import random_state, set_random_state
from .description import described, drift_limit, misfit
from .files import remove_leftovers, replacing

FORMAT = 1
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_SCALARS = (np.bool_, np.integer, np.floating)


def save_state(path: str | os.PathLike[str], /, **parts: Any) -> None:
    r"""Write ``parts`` and the states of all random number generators to a file, for :func:`load_state`.

    A part is an object with ``state_dict`` and ``load_state_dict`` (any ``torch.nn.Module``: guides, networks,
    energies, the :class:`~pyro_shortrun.starts.Replay` buffer of an EnergyELBO; torch optimisers and schedulers;
    :class:`~pyro_shortrun.VectorizedMCMC`), a Pyro optimiser, Pyro's parameter store, a ``torch.Generator``, or a plain
    value: numbers, strings, tensors, and lists, tuples and dicts of them.

    The file is written beside ``path`` and renamed when it is on disk: whenever the process ends, ``path`` holds the
    old state or the new one, whole; of several processes that write to it, that of the last. What a killed process
    leaves (``.run.pt.*.part``) goes at the next call on the same machine, and on others when it is an hour old.

    >>> import tempfile, torch
    >>> from pyro_shortrun import load_state, save_state
    >>> net = torch.nn.Linear(2, 1)
    >>> path = tempfile.mkdtemp() + "/run.pt"
    >>> save_state(path, net=net, epoch=3)
    >>> load_state(path, net=net)
    {'epoch': 3}

    :param path: the file; its folder must exist.
    :param parts: what to save, by names that :func:`load_state` is given again.
    :raises TypeError: for a part, or something in it, that cannot be loaded without running foreign code
        (``torch.load(..., weights_only=True)``).
    :raises ValueError: for a Pyro optimiser of parameters that Pyro's store has no names for, and for parameters that
        are NaN: a run that has diverged does not replace one that has not.
    :raises OSError: where the file cannot be written, such as on a full disk; ``path`` holds what it held.
    """
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: make its folder first, which is not there.")
    for name, part in parts.items():
        if bad := _not_a_number(part, None):
            raise ValueError(f"{bad} of {name!r} is NaN: the run has diverged, and {path} holds what it held.")
    content = {
        "format": FORMAT,
        "version": _version(),
        "random": random_state(),
        "parts": {name: {"type": type(part).__name__, **_saved(name, part)} for name, part in parts.items()},
    }
    try:
        with replacing(Path(path)) as scratch:
            torch.save(content, scratch)
    except (OSError, RuntimeError) as reason:  # torch's, where the disk is full
        first = str(reason).splitlines()[0]
        raise OSError(f"{path} could not be written ({first}); what was there before is there still.") from reason
    remove_leftovers(Path(path).parent, re.escape(Path(path).name))


def load_state(path: str | os.PathLike[str], /, **parts: Any) -> dict[str, Any]:
    """Restore objects and random number generators from :func:`save_state`, so that a run goes on bit for bit.

    All or nothing: where one part does not fit, every part is left as it was. Build the objects as for a new run, and
    create lazy parameters first: ``guide.setup(*args)``, or one call of model and guide for Pyro's parameter store.

    :param path: a file of :func:`save_state`; tensors go to the devices of the parts they belong to.
    :param parts: all objects that were saved, by the same names.
    :returns: the plain values that were saved, by name (tensors on the CPU).
    :raises ValueError: where the file is no such file, damaged (by its checksums), or of a newer version; where parts
        are missing, unknown, or of another type; where parameters are NaN; where a part's tensors have other names,
        shapes or dtypes; where a guide has other latents, another number of steps, dynamics, objective or start, or
        step sizes with another ``max``. (The dynamics' ``max_drift``, which backing off may have set, is restored.)
    """
    content = _read(path)
    saved = content["parts"]
    _check_names(path, saved, parts)
    for name, part in parts.items():
        if wrong := misfit(saved[name].get("about", {}), described(part)):
            raise ValueError(
                f"{name!r} in {path}, of pyro_shortrun {content.get('version', '0.1.0')}, {wrong}: build it as it was "
                f"when saved (nothing was changed; this is version {_version()})."
            )
        if bad := _not_a_number(part, saved[name]["state"]):
            raise ValueError(f"{bad} of {name!r} in {path} is NaN (nothing was changed): take an earlier file.")
    with ExitStack() as undo:
        undo.callback(set_random_state, random_state())
        for name, part in parts.items():
            try:
                undo.callback(_way_back(part))
                _restore(part, saved[name]["state"])
                if (limit := saved[name].get("max_drift")) is not None:
                    undo.callback(setattr, part.dynamics, "max_drift", part.dynamics.max_drift)
                    part.dynamics.max_drift = limit
            except Exception as reason:
                why = " ".join(str(reason).split())
                raise ValueError(
                    f"{name!r} in {path} does not fit this {type(part).__name__} (nothing was changed): {why} Build it "
                    "as it was when saved, and create lazy parameters first, as with guide.setup(*args)."
                ) from reason
        try:
            set_random_state(content["random"])
        except Exception as reason:
            raise ValueError(f"{path} has random states that do not fit (nothing was changed): {reason}") from reason
        undo.pop_all()
    return {name: entry["value"] for name, entry in saved.items() if "value" in entry}


# ---------------------------------------------------------------- parts


def _is_stateful(part: Any) -> bool:
    return isinstance(part, PyroOptim | ParamStoreDict | torch.Generator) or (
        hasattr(part, "state_dict") and hasattr(part, "load_state_dict")
    )


def _saved(name: str, part: Any) -> dict[str, Any]:
    if not _is_stateful(part):
        return {"value": _plain(name, part)}
    state = _plain(name, _state(part))  # first, since it tells what cannot be saved
    return {"state": state, "about": described(part), "max_drift": drift_limit(part)}


def _state(part: Any) -> Any:
    if isinstance(part, PyroOptim):
        state = {**part._state_waiting_to_be_consumed, **part.get_state()}
        if None in state:
            raise ValueError(
                "Pyro's optimisers know parameters by their names in the parameter store, which some of this one's do "
                "not have (module_local_params, or a store that was cleared): use torch.optim."
            )
        return state
    if isinstance(part, ParamStoreDict):
        return {name: part._params[name].detach() for name in part.keys()}
    return part.get_state() if isinstance(part, torch.Generator) else part.state_dict()


def _not_a_number(part: Any, state: Any | None) -> str | None:
    """The first parameter of a module or of Pyro's store that is NaN, in a saved state or now. (Buffers may be.)"""
    if isinstance(part, ParamStoreDict):
        names = set(part.keys())
    elif isinstance(part, torch.nn.Module):
        names = {name for name, _ in part.named_parameters()}
    else:
        return None
    values = _state(part) if state is None else state if isinstance(state, Mapping) else {}
    bad = (k for k in names & set(values) if isinstance(values[k], Tensor) and values[k].isnan().any())
    return next((f"parameter {k!r}" for k in sorted(bad)), None)


def _way_back(part: Any) -> Callable[[], None]:
    """Restores the present state; a sampler that has not run yet, or a guide without its parameters, has none."""
    try:
        state = copy.deepcopy(_state(part))
    except RuntimeError:
        return lambda: None

    def restore() -> None:
        with suppress(RuntimeError):
            _restore(part, state)

    return restore


def _restore(part: Any, state: Any) -> None:
    if isinstance(part, PyroOptim):
        _restore_pyro_optimiser(part, state)
    elif isinstance(part, ParamStoreDict):
        _restore_store(part, state)
    elif isinstance(part, torch.Generator):
        part.set_state(state)
    else:
        if isinstance(part, torch.nn.Module):
            _check_dtypes(part.state_dict(), state)
        part.load_state_dict(state)


def _restore_pyro_optimiser(part: PyroOptim, state: dict[str, Any]) -> None:
    """Optimisers of parameters that were stepped already take their state now, the others at their first step."""
    store, waiting = pyro.get_param_store(), dict(state)
    for parameter, optimiser in part.optim_objs.items():
        name = store.param_name(parameter)
        if name not in waiting:
            raise ValueError(f"no state was saved for parameter {name!r}.")
        own = waiting.pop(name)
        if "scheduler" in own:
            optimiser.load_state_dict(own["scheduler"])
            optimiser.optimizer.load_state_dict(own["optimizer"])
        else:
            optimiser.load_state_dict(own)
    part._state_waiting_to_be_consumed = waiting


def _restore_store(part: ParamStoreDict, state: dict[str, Tensor]) -> None:
    """Unconstrained values, in place, so that optimisers and modules keep their parameters."""
    if missing := set(state) ^ set(part.keys()):
        raise ValueError(f"parameters {sorted(missing)} are in one of the two only.")
    _check_dtypes(part._params, state)
    for name, value in state.items():
        if part._params[name].shape != value.shape:
            raise ValueError(f"{name!r} has shape {tuple(part._params[name].shape)}, saved {tuple(value.shape)}.")
    with torch.no_grad():
        for name, value in state.items():
            part._params[name].copy_(value)


def _check_dtypes(own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """torch would convert, and the run go on with other numbers."""
    for name, value in saved.items():
        kind = getattr(own.get(name), "dtype", None)
        if isinstance(value, Tensor) and kind not in (None, value.dtype):
            raise ValueError(f"{name!r} is {kind}, saved {value.dtype}.")


# ---------------------------------------------------------------- the file


def _plain(where: str, value: Any) -> Any:
    """The same in types that load without running foreign code."""
    if type(value) in (Tensor, torch.nn.Parameter):
        return _compact(value.detach())
    if type(value) in _PLAIN or isinstance(value, torch.dtype | torch.device):
        return value
    if isinstance(value, _SCALARS):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.from_numpy(value.copy())
    if isinstance(value, Mapping):
        return {_plain(f"{where} (keys)", k): _plain(f"{where}[{k!r}]", v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        items = [_plain(f"{where}[{i}]", v) for i, v in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    raise TypeError(
        f"{where} is a {type(value).__name__}, which a file without code cannot hold: give an object with state_dict "
        "and load_state_dict, or numbers, strings, tensors and lists, tuples and dicts of them."
    )


def _compact(value: Tensor) -> Tensor:
    """Alone in its memory: a row of a table is saved as a row, not as the table."""
    whole = value.layout is not torch.strided or value.untyped_storage().nbytes() == value.nbytes
    return value if whole else value.clone(memory_format=torch.contiguous_format)


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as parts:
            damaged = parts.testzip()  # torch does not look at checksums
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as reason:
        raise FileNotFoundError(
            f"there is no file {path}: give the path of one that save_state has written."
        ) from reason
    except Exception as reason:
        raise ValueError(f"{path} is no file of save_state, or is damaged ({reason}): give another one.") from reason
    if damaged is not None:
        raise ValueError(f"{path} is damaged: the checksum of {damaged} in it is wrong. Take an earlier file.")
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise ValueError(f"{path} is no file of save_state.")
    if content["format"] > FORMAT:
        raise ValueError(f"{path} has format {content['format']}, this version reads {FORMAT}: update pyro_shortrun.")
    if content["format"] < 1:
        raise ValueError(f"{path} has format {content['format']}; the first one is 1.")
    if missing := {"parts", "random"} - set(content):
        raise ValueError(f"{path} is no file of save_state: it has no {sorted(missing)}.")
    parts = content["parts"]
    entries = list(parts.values()) if isinstance(parts, dict) else [None]
    if not (all(map(_is_entry, entries)) and isinstance(content["random"], dict)):
        raise ValueError(f"{path} is no file of save_state: its parts are not what save_state writes.")
    return content


def _is_entry(entry: Any) -> bool:
    """Whether this is what :func:`_saved` makes of a part."""
    if not (
        isinstance(entry, dict) and isinstance(entry.get("type"), str) and ("state" in entry) != ("value" in entry)
    ):
        return False
    about, limit = entry.get("about", {}), entry.get("max_drift")
    plain = isinstance(about, dict) and all(isinstance(v, bool | int | float | str | list) for v in about.values())
    return plain and (limit is None or (isinstance(limit, int | float) and limit > 0))


def _version() -> str:
    return metadata.version("pyro-shortrun")


def _check_names(path: str | os.PathLike[str], saved: dict[str, dict[str, Any]], parts: dict[str, Any]) -> None:
    stateful = {name for name, entry in saved.items() if "state" in entry}
    if missing := stateful - set(parts):
        raise ValueError(f"{path} has {sorted(missing)} too: give the objects, load_state(path, {min(missing)}=...).")
    if unknown := set(parts) - stateful:
        raise ValueError(f"{path} has no state of {sorted(unknown)}; it has that of {sorted(stateful)}.")
    for name, part in parts.items():
        if type(part).__name__ != saved[name]["type"]:
            raise ValueError(f"{name!r} in {path} is a {saved[name]['type']}, got a {type(part).__name__}.")
