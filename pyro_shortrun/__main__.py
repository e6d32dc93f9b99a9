"""``python -m pyro_shortrun``: versions, devices, and whether compilation works here; for reports of faults."""

from __future__ import annotations

import argparse
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_shortrun import Prior, ShortRunELBO, ShortRunGuide, StepSize

PACKAGES = ("pyro_shortrun", "pyro-ppl", "torch", "numpy", "scipy", "arviz", "matplotlib")


def facts() -> Iterator[tuple[str, str]]:
    """What can be said without work."""
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            yield package, "not installed"
    yield (
        "cpu",
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
    )
    count = torch.cuda.device_count()
    yield "gpu", ", ".join(torch.cuda.get_device_name(i) for i in range(count)) or "none that torch sees"
    yield "dtype", str(torch.get_default_dtype())


def compilation() -> str:
    """Whether a training step can be compiled, and how long that takes."""

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    reasons: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: reasons.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("pyro_shortrun")
    logger.addHandler(handler)
    begin = time.perf_counter()
    try:
        with pyro.get_param_store().scope():
            guide = ShortRunGuide(model, num_steps=2, step_size=StepSize(0.1), start=Prior(), compile=True)
            for _ in range(3):
                ShortRunELBO().loss_and_grads(model, guide, torch.ones(3))
    finally:
        logger.removeHandler(handler)
    return reasons[0] if reasons else f"works, {time.perf_counter() - begin:.1f} s for a small model"


def main(arguments: list[str] | None = None) -> None:
    """Print it."""
    parser = argparse.ArgumentParser(prog="python -m pyro_shortrun", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="do not try to compile")
    quick = parser.parse_args(arguments).quick
    for name, value in facts():
        print(f"{name:14}{value}")
    sys.stdout.flush()
    print(f"{'compilation':14}{'not tried' if quick else compilation()}")


if __name__ == "__main__":
    main()
