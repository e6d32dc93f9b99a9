"""Directions in which an encoder's last linear map moves."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..checks import check_between


class Basis(ABC):
    """In which directions the map moves: ``Phi' = Phi + A B^T`` with ``B`` of ``(width, m)``, the chain moving
    ``A``."""

    @abstractmethod
    def of(self, features: Tensor) -> Tensor | None:
        """``B`` for features ``(rows, width)``; None for the identity."""


class Everywhere(Basis):
    """All directions alike: the papers' chain."""

    def of(self, features: Tensor) -> Tensor | None:
        return None


class Span(Basis):
    r"""The directions that the batch's features see: ``B = Q`` of ``G^T = Q R``, an orthonormal basis of their span.

    What no feature of the batch sees stays, instead of walking at random, so that ``|Phi|`` does not grow by it (but
    for as many directions as the features' rank lacks). The law of the rows is that of :class:`Everywhere`, step by
    step.
    """

    def of(self, features: Tensor) -> Tensor | None:
        return torch.linalg.qr(features.mT).Q


class Whitened(Basis):
    r"""The same directions, stretched so that all rows move at one pace: ``B = G^T (K + r I)^{-1}``, K = G G^T.

    The rows then see the preconditioner ``(K (K + r I)^{-1})^2`` instead of K. Features of data that are alike are
    nearly parallel, so that K has a few large eigenvalues and many small ones, and a step that is small enough for the
    first hardly moves along the others. Differences of eigenvalues well above r vanish; what is below it stays slow,
    and the map stays small.

    :param ridge: ``r`` as a multiple of the mean eigenvalue of K.
    :raises ValueError: where it is not positive; in a call, where all features are zero.
    """

    def __init__(self, ridge: float = 0.01) -> None:
        check_between("ridge", ridge, 0, math.inf, "0.01")
        self.ridge = ridge

    def of(self, features: Tensor) -> Tensor | None:
        gram = features @ features.mT
        if not gram.any():
            raise ValueError("the features of all rows are zero: check the features' net, which may have died.")
        ridge = self.ridge * gram.diagonal().mean() * torch.ones_like(gram[0])
        return torch.linalg.solve(gram + ridge.diag(), features).mT
