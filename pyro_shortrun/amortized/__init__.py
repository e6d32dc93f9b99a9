"""Amortised Langevin dynamics: encoders whose last linear map is a chain."""

from .basis import Basis, Everywhere, Span, Whitened
from .guide import LangevinEncoderGuide
from .sampler import AmortizedSampler

__all__ = [
    "AmortizedSampler",
    "Basis",
    "Everywhere",
    "LangevinEncoderGuide",
    "Span",
    "Whitened",
]
