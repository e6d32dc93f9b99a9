"""``python -m pyro_shortrun``."""

from __future__ import annotations

import logging

import pyro
import pytest

from pyro_shortrun import __main__ as command
from pyro_shortrun.compile import compiler, inductor


def test_it_prints_versions_and_devices(capsys):
    command.main(["--quick"])
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert {*command.PACKAGES, "python", "cpu", "gpu", "dtype", "compilation"} == said.keys()
    assert said["pyro-ppl"] == pyro.__version__ and said["compilation"] == "not tried"


@pytest.mark.parametrize("works", [True, False])
def test_it_tries_to_compile(works, monkeypatch, capsys):
    def refuse(*args):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(compiler, "Inductor", inductor.Untouched)
    if not works:
        monkeypatch.setattr(inductor.Untouched, "build", refuse)
    handlers = list(logging.getLogger("pyro_shortrun").handlers)
    command.main([])
    last = capsys.readouterr().out.splitlines()[-1]
    assert ("works, " in last) is works and ("no compiler" in last) is not works
    assert not len(pyro.get_param_store()) and logging.getLogger("pyro_shortrun").handlers == handlers
