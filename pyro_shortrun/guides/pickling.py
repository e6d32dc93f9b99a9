"""Modules as they are pickled: AutoGuides without their models."""

from __future__ import annotations

from pyro.infer.autoguide import AutoGuide
from torch import nn


def without_model(module: nn.Module | None) -> nn.Module | None:
    """A shallow copy in which AutoGuides may lose their models when pickled (see AutoGuide.__getstate__)."""
    if module is None or not any(isinstance(m, AutoGuide) for m in module.modules()):
        return module
    copy = object.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    copy.__dict__["_modules"] = {k: without_model(m) for k, m in module._modules.items()}
    return copy
