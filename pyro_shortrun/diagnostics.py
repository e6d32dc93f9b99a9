"""Diagnostics, under one name: the way to ArviZ."""

from .export import to_arviz

__all__ = ["to_arviz"]
