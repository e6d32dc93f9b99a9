"""Options ``--device`` and ``--dtype``, and a clean, seeded state for every test."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

os.environ["MPLBACKEND"] = "Agg"  # before anything imports matplotlib

import pyro
import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pyro_shortrun")
    group.addoption("--device", default="cpu", help="device the tests run on (default: cpu)")
    group.addoption(
        "--dtype",
        default="float64",
        choices=["float32", "float64"],
        help="default dtype of the tests (default: float64)",
    )


def pytest_configure() -> None:
    torch.set_num_threads(1)  # small tensors: a second thread costs more than it does


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return getattr(torch, request.config.getoption("--dtype"))


@pytest.fixture(autouse=True)
def clean_state(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Fixtures of a wider scope than a function are set up before this one and do not see it."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    if device.type != "cpu":
        torch.set_default_device(device)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)

    yield

    pyro.clear_param_store()
    torch.set_default_dtype(previous)
    if device.type != "cpu":
        torch.set_default_device(None)
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
