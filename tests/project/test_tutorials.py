"""Tutorials: each notebook says what its script says, carries the outputs of a full run, and runs in smoke mode."""

from __future__ import annotations

from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

SCRIPTS = sorted((Path(__file__).parents[2] / "docs" / "tutorials").glob("[0-9]*.py"))


def cells(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_pair_agrees_and_has_outputs(script):
    """After a change: ``jupytext --sync --execute`` on the script."""
    notebook = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    assert cells(notebook) == cells(jupytext.read(script))
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    assert not any(out.output_type == "error" for out in outputs)
    assert any("image/png" in out.get("data", {}) for out in outputs)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_runs_in_smoke_mode(script, tmp_path, monkeypatch):
    monkeypatch.setenv("SMOKE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel's own shows pictures inline
    notebook = jupytext.read(script)
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
