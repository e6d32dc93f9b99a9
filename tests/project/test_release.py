"""What a release says of itself in several places agrees."""

from __future__ import annotations

import re
from pathlib import Path

from packaging.version import Version

import pyro_shortrun

ROOT = Path(__file__).parents[2]


def test_versions_agree():
    citation = (ROOT / "CITATION.cff").read_text()
    changes = (ROOT / "CHANGELOG.md").read_text()
    version = re.search(r"^version: (\S+)$", citation, re.M)[1]
    date = re.search(r'^date-released: "(\S+)"$', citation, re.M)[1]
    current, released = Version(pyro_shortrun.__version__), Version(version)
    assert current == released or (current.is_devrelease and current > released)
    assert f"## [{version}] - {date}" in changes
