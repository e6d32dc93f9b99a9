"""Runs give the numbers that they gave in version 0.1.0, to round-off."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from frozen import COMPILED, NUMBERS, flat, frozen, of_guide, run

from pyro_shortrun.compile import Untouched

EXPECTED = json.loads(NUMBERS.read_text())
EAGER = {one.key: one for one in frozen() if not one.key.endswith(", compiled")}


@pytest.fixture(autouse=True)
def numbers_mean_something(device: torch.device, dtype: torch.dtype) -> None:
    if device.type != "cpu" or dtype != torch.float64 or not torch.__version__.startswith("2.13."):
        pytest.skip("random numbers and rounding are those of torch 2.13 in float64 on a CPU")


def assert_same(found: dict[str, Any], key: str) -> None:
    found, expected = dict(flat(found)), dict(flat(EXPECTED[key]))
    assert expected.keys() <= found.keys()
    for place, value in found.items():
        wanted = expected.get(place, 0.0)  # zeros are not kept
        assert value == (
            wanted if isinstance(wanted, str) else pytest.approx(wanted, rel=1e-10, abs=1e-10, nan_ok=True)
        ), place


def test_every_case_has_its_numbers():
    assert EXPECTED.keys() == EAGER.keys()


@pytest.mark.filterwarnings("ignore")  # of rows that froze then too
@pytest.mark.parametrize("key", EAGER)
def test_eager_runs(key):
    assert_same(run(EAGER[key]), key)


@pytest.mark.parametrize("kind", COMPILED)
def test_compiled_runs(kind):
    """Their graphs are run as they are traced, which is quick to make."""
    assert_same(of_guide("eight_schools", kind, True, Untouched()), f"eight_schools: {kind}")
