"""What a benchmark measured, as JSON: tables, and the command, date, machine and versions that they come from.

Every script here writes ``results.json`` into its ``--output`` folder by :func:`record`. Copies of such files in
``docs/benchmarks/`` are what ``docs/benchmarks.py`` makes the page of benchmarks from.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import arviz
import numpy as np
import pyro
import torch

import pyro_shortrun

Value = float | int | str | None

BEGAN = time.perf_counter()
# Options whose values are paths of one machine, and what to print for them; none for an option that changes no figure.
PLACES = {"--output": None, "--data": "DATA", "--jax-python": "PYTHON", "--against": "CHECKOUT"}


@dataclass
class Table:
    """Named columns of numbers and words.

    :param columns: from a column's name to the format of its values, width included (``"7.3f"``, ``"26s"``).
    :param rows: a value for each column; None where there is no figure.
    """

    title: str
    columns: dict[str, str]
    rows: list[list[Value]] = field(default_factory=list)

    def head(self) -> str:
        return " ".join(_place(name, form) for name, form in self.columns.items())

    def line(self, row: Sequence[Value]) -> str:
        cells = zip(row, self.columns.values(), strict=True)
        return " ".join(_place(_text(value, form), form) for value, form in cells).rstrip()

    def lines(self) -> list[str]:
        return [self.head(), *map(self.line, self.rows)]


def _text(value: Value, form: str) -> str:
    return "-" if value is None else value if isinstance(value, str) else format(value, form).strip()


def _place(text: str, form: str) -> str:
    width = re.match(r"[<>]?(\d*)", form)[1]
    left = form.endswith("s") and not form.startswith(">")
    return format(text, ("<" if left else ">") + width)


def record(folder: Path | None, tables: Sequence[Table], others: Mapping[str, str] | None = None) -> None:
    """Writes ``folder/results.json``; nothing without a folder.

    :param others: versions of further packages that took part.
    """
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    found = {
        "command": command(sys.argv),
        "date": datetime.date.today().isoformat(),
        "minutes": round((time.perf_counter() - BEGAN) / 60, 1),
        "machine": machine(),
        "versions": {**versions(), **(others or {})},
        "tables": [{"title": t.title, "columns": t.columns, "rows": [_plain(r) for r in t.rows]} for t in tables],
    }
    (folder / "results.json").write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")


def _plain(row: Sequence[Value]) -> list[Value]:
    """Without numpy's numbers, and without those that JSON lacks."""
    values = [v.item() if isinstance(v, np.generic) else v for v in row]
    return [str(v) if isinstance(v, float) and not math.isfinite(v) else v for v in values]


def command(argv: Sequence[str]) -> str:
    """The command line without the paths of this machine."""
    words, given = ["python", f"examples/benchmarks/{Path(argv[0]).name}"], list(argv[1:])
    while given:
        word = given.pop(0)
        option, _, value = word.partition("=")
        if option not in PLACES:
            words.append(word)
            continue
        if not value:
            given.pop(0)
        if PLACES[option] is not None:
            words += [option, PLACES[option]]
    return shlex.join(words)


def machine() -> dict[str, Value]:
    """The kind of machine, not its name; ``load`` is the mean number of busy processes in the last minute."""
    return {
        "cpus": os.cpu_count(),
        "processor": processor(),
        "system": f"{platform.system()} {platform.machine()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }


def processor() -> str:
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:  # not Linux
        names = []
    return names[0] if names else platform.processor()


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyro": pyro.__version__,
        "arviz": arviz.__version__,
        "pyro_shortrun": pyro_shortrun.__version__,
    }
