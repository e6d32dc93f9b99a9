"""The pages: every public name is in the reference once and says what it is; the page of benchmarks is its data's."""

from __future__ import annotations

import importlib
import inspect
import json
import math
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import pyro_shortrun

DOCS = Path(__file__).parents[2] / "docs"
PACKAGES = [found.name for found in pkgutil.iter_modules(pyro_shortrun.__path__) if found.ispkg]


def public(package: str) -> dict[str, object]:
    found = importlib.import_module(f"pyro_shortrun.{package}")
    return {name: getattr(found, name) for name in found.__all__}


@pytest.mark.parametrize("package", PACKAGES)
def test_page_of_a_package_has_its_public_names_once(package):
    page = (DOCS / "api" / f"{package}.md").read_text()
    entries = re.findall(r"auto(?:class|function):: pyro_shortrun\.(\S+)", page)
    assert sorted(entries) == sorted(f"{package}.{name}" for name in public(package))


def test_index_has_every_package_and_the_names_at_the_top_once():
    index = (DOCS / "api.md").read_text()
    assert sorted(re.findall(r"^api/(\w+)$", index, re.M)) == sorted(PACKAGES)
    assert sorted(re.findall(r"\(api/(\w+)\.md\)", index)) == sorted(PACKAGES)
    assert sorted(re.findall(r"`~pyro_shortrun\.(\w+)`", index)) == sorted(pyro_shortrun.__all__)


def test_files_that_pages_name_are_there():
    root, missing = DOCS.parent, []
    for page in [*DOCS.rglob("*.md"), root / "README.md", root / "CONTRIBUTING.md"]:
        named = re.findall(r"\b(?:tests|docs|examples|pyro_shortrun)/[\w/]+\.(?:py|md|ipynb|png)\b", page.read_text())
        missing += [f"{page.name}: {name}" for name in named if not (root / name).exists()]
    assert not missing


def members(owner: type) -> dict[str, object]:
    """What a class itself has to call or read."""
    kinds = (property, classmethod, staticmethod)
    own = {k: v for k, v in vars(owner).items() if not k.startswith("_")}
    return {k: getattr(owner, k) for k, v in own.items() if inspect.isfunction(v) or isinstance(v, kinds)}


@pytest.mark.parametrize("package", PACKAGES)
def test_docstrings_begin_with_a_summary(package):
    found = public(package)
    for name, value in list(found.items()):
        found |= {f"{name}.{k}": v for k, v in members(value).items()} if inspect.isclass(value) else {}
    without = []
    for key, value in found.items():
        first = (inspect.getdoc(value) or "").split("\n\n")[0]
        if not re.search(r"[.:,)]$", first.strip()):
            without.append(key)
    assert not without


def test_page_of_benchmarks_is_what_the_script_makes():
    """After a change: ``python docs/benchmarks.py``."""
    script = DOCS / "benchmarks.py"
    made = subprocess.run([sys.executable, str(script), "--print"], capture_output=True, text=True, check=True).stdout
    assert made == (DOCS / "benchmarks.md").read_text()


def test_records_have_rows_as_printed_and_no_paths(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(DOCS.parent / "examples" / "benchmarks")
    import record

    table = record.Table("t", {"name": "6s", "value": "7.2f", "word": ">5s"}, [["a", np.float64(1.234), None]])
    assert table.lines() == ["name     value  word", "a         1.23     -"]
    table.rows.append(["b", math.inf, ""])
    argv = [
        "/home/me/tuning.py",
        "--data",
        "/data",
        "--only",
        "Annealed, AutoNormal",
        f"--output={tmp_path}",
        "--seed=1",
    ]
    monkeypatch.setattr(sys, "argv", argv)
    record.record(tmp_path, [table])
    found = json.loads((tmp_path / "results.json").read_text())
    command = "python examples/benchmarks/tuning.py --data DATA --only 'Annealed, AutoNormal' --seed=1"
    assert found["command"] == command
    assert found["tables"][0]["rows"] == [["a", 1.234, None], ["b", "inf", ""]]
    assert {"python", "torch", "pyro", "pyro_shortrun"} <= set(found["versions"])
