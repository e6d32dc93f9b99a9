"""Annealed: the weight against its formula, its gradients against autograd, its mean against the evidence."""

from __future__ import annotations
