"""log |det(I + D H)| of one step: ``H`` symmetric and known by its products, ``D`` a non-negative diagonal.

Estimators take a *block* of vectors to the block of products, so that a batch of Hessian products is one call, and
return the value per row with its gradient (with respect to whatever ``D`` and the products depend on), together with
a flag: whether ``I + D^(1/2) H D^(1/2)`` fails to be positive definite, that is, whether the step
``u + D grad log pi(u)`` is not locally invertible in the sense of the papers (``eta * lambda_max(-H) >= 1``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_count
from ..density.layout import Arrow, Layout

Product = Callable[[Tensor], Tensor]


class LogDetResult(NamedTuple):
    """``value`` and ``singular`` are ``(chains, rows)``."""

    value: Tensor
    singular: Tensor


class LogDet(ABC):
    """Estimates ``log |det(I + D H)|`` per row."""

    def probes(self, like: Tensor, layout: Layout) -> Tensor | None:
        """Random vectors for one run, drawn once so that all steps share them; None if none are needed.

        :param like: a state, ``(chains, rows, size)``.
        """
        return None

    @abstractmethod
    def __call__(
        self,
        product: Product,
        diagonal: Tensor,
        layout: Layout,
        probes: Tensor | None = None,
        judged: Tensor | None = None,
    ) -> LogDetResult:
        """
        :param product: ``H`` times vectors, ``(m, chains, rows, size)`` to the same shape.
        :param diagonal: ``D >= 0``, ``(chains, rows, size)``.
        :param probes: what :meth:`probes` returned.
        :param judged: another diagonal, nowhere smaller, to take instead of ``D`` for ``singular``.
        """


class Exact(LogDet):
    r"""The exact log-determinant ``log |det(I + D H)|`` from the columns of ``H``, one value per row.

    Cost: ``size`` Hessian products and an LU factorisation per row and step. An arrowhead row (shared and local
    latents) needs only ``shared + local`` products: with :math:`J = I + DH` in blocks,

    .. math:: \log|J| = \sum_i \log|J_{ii}| + \log\Big|J_{gg} - \sum_i J_{gi} J_{ii}^{-1} J_{ig}\Big| ,

    where under subsampling the sum of local terms counts ``full_size / size`` times (``Arrow.weight``).
    """

    def __call__(
        self,
        product: Product,
        diagonal: Tensor,
        layout: Layout,
        probes: Tensor | None = None,
        judged: Tensor | None = None,
    ) -> LogDetResult:
        judged = (diagonal if judged is None else judged).detach()
        if layout.arrow is not None:
            return self._arrowhead(product, diagonal, layout.arrow, judged)
        size = diagonal.shape[-1]
        basis = torch.eye(size, dtype=diagonal.dtype, device=diagonal.device)
        columns = product(basis[:, None, None, :].expand(size, *diagonal.shape).contiguous())
        return _dense(diagonal, columns.movedim(0, -1), judged)

    @staticmethod
    def _arrowhead(product: Product, diagonal: Tensor, arrow: Arrow, judged: Tensor) -> LogDetResult:
        g, n, m = arrow.shared, arrow.count, arrow.local
        chains = diagonal.shape[0]
        vectors = diagonal.new_zeros(g + m, chains, 1, g + n * m)
        for i in range(g):
            vectors[i, ..., i] = 1
        for j in range(m):  # the same local coordinate of every block at once: the blocks do not mix
            vectors[g + j, ..., g + j :: m] = 1
        columns = product(vectors).squeeze(2)
        top = columns[:g]  # H applied to shared unit vectors: (g, chains, g + n m)
        a = top[..., :g].movedim(0, -1)  # (chains, g, g)
        b = top[..., g:].reshape(g, chains, n, m).permute(1, 2, 3, 0)  # local by shared
        c = columns[g:, :, g:].reshape(m, chains, n, m).permute(1, 2, 3, 0)

        def schur(d_local: Tensor) -> Tensor:
            """The shared block less what the local ones explain, symmetric, ``(chains, g, g)``."""
            local = torch.eye(m, dtype=c.dtype, device=c.device) + d_local.unsqueeze(-1) * c
            solved = torch.linalg.solve_ex(local, d_local.unsqueeze(-1) * b)[0]
            return a - (b.transpose(-1, -2) @ solved).sum(1)

        def local(d: Tensor) -> Tensor:
            return d[:, 0, g:].reshape(chains, n, m)

        with torch.no_grad():
            seen = schur(local(judged))
        blocks = _dense(local(diagonal), c, local(judged))
        shared = _dense(diagonal[:, 0, :g], schur(local(diagonal)), judged[:, 0, :g], seen)
        total = shared.value + arrow.weight * blocks.value.sum(-1)
        singular = blocks.singular.any(-1) | shared.singular
        return LogDetResult(total.unsqueeze(-1), singular.unsqueeze(-1))


def _dense(diagonal: Tensor, hessian: Tensor, judged: Tensor, seen: Tensor | None = None) -> LogDetResult:
    """``log |det(I + D H)|``, and whether ``I + E H`` is not positive definite.

    The gradient of ``log |det J|`` is ``tr(J^-1 dJ)``, with the inverse taken outside the graph, which keeps what is
    differentiated again (and compiled) free of factorisations.

    :param diagonal: ``D``, ``(..., size)``.
    :param hessian: ``H``, ``(..., size, size)``.
    :param judged: ``E``.
    :param seen: another ``H`` to go with ``E``.
    """
    eye = torch.eye(diagonal.shape[-1], dtype=diagonal.dtype, device=diagonal.device)
    jacobian = eye + diagonal.unsqueeze(-1) * hessian
    with torch.no_grad():
        value = torch.linalg.slogdet(jacobian)[1]
        root = judged.sqrt()
        symmetric = eye + root.unsqueeze(-1) * (hessian if seen is None else seen) * root.unsqueeze(-2)
        singular = torch.linalg.cholesky_ex(symmetric)[1] != 0
    if jacobian.requires_grad:
        with torch.no_grad():
            inverse = torch.linalg.inv_ex(jacobian)[0].mT.nan_to_num(0.0, 0.0, 0.0)
        change = (inverse * jacobian).sum((-1, -2))
        value = value + (change - change.detach())
    return LogDetResult(value, singular)


class Lanczos(LogDet):
    r"""Stochastic Lanczos quadrature (Ubaru, Chen, Saad 2017).

    With ``A = D^(1/2) H D^(1/2)`` and Rademacher probes :math:`v`, ``E[v' log|I + A| v] = log|det(I + A)|``; each
    quadratic form comes from ``num_iterations`` Lanczos steps with full reorthogonalisation. The gradient is the
    matching estimator :math:`E[((I + A)^{-1} v)' (dA) v]`, so it is unbiased up to the Krylov solve. The condition
    ``I + A > 0`` is checked by the smallest Ritz value.

    Cost per step: ``num_probes * num_iterations`` Hessian products.

    :param num_probes: number of probe vectors.
    :param num_iterations: Lanczos steps per probe (at most the number of coordinates).
    :raises ValueError: where one of them is less than 1.
    :raises NotImplementedError: at a call, for a subsampled plate that does not hold all latents.
    """

    def __init__(self, num_probes: int = 4, num_iterations: int = 15) -> None:
        check_count("num_probes", num_probes)
        check_count("num_iterations", num_iterations)
        self.num_probes, self.num_iterations = num_probes, num_iterations

    def probes(self, like: Tensor, layout: Layout) -> Tensor:
        return torch.randint(0, 2, (self.num_probes, *like.shape), device=like.device).to(like) * 2 - 1

    def __call__(
        self,
        product: Product,
        diagonal: Tensor,
        layout: Layout,
        probes: Tensor | None = None,
        judged: Tensor | None = None,
    ) -> LogDetResult:
        if layout.arrow is not None and layout.arrow.weight != 1:
            raise NotImplementedError(
                "the stochastic log-determinant cannot scale the local part of a subsampled model with shared "
                "latents; use PathDensity(logdet=Exact())."
            )
        assert probes is not None

        def scaled(d: Tensor) -> Product:
            root = _safe_sqrt(d)
            return lambda v: root * product(root * v)

        apply = scaled(diagonal)
        with torch.no_grad():
            quadratic, solved, smallest = self._quadrature(lambda v: apply(v).detach(), probes)
            if judged is not None:
                whole = scaled(judged.detach())
                smallest = self._quadrature(lambda v: whole(v).detach(), probes[:1])[2]
        change = (solved * apply(probes)).sum(-1).mean(0)
        value = quadratic.mean(0) + (change - change.detach())
        return LogDetResult(value, smallest.amin(0) <= 0)

    def _quadrature(self, apply: Product, probes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``v' log|I+A| v``, ``(I+A)^{-1} v`` and the smallest Ritz value of ``I + A``, per probe."""
        norm = probes.norm(dim=-1, keepdim=True)
        q = probes / norm
        basis, alphas, betas = [q], [], []
        steps = min(self.num_iterations, probes.shape[-1])
        for step in range(steps):
            w = apply(q)
            alphas.append((w * q).sum(-1))
            if step == steps - 1:
                break
            for _ in range(2):  # twice is enough (Parlett)
                stacked = torch.stack(basis, -1)
                w = w - (stacked @ (w.unsqueeze(-2) @ stacked).transpose(-1, -2)).squeeze(-1)
            beta = w.norm(dim=-1)
            # Breakdown: the Krylov space is exhausted; a zero vector decouples the rest of T.
            done = beta < 1e-6 * (1 + torch.stack(alphas).abs().amax(0))
            beta = torch.where(done, torch.zeros_like(beta), beta)
            q = torch.where(done.unsqueeze(-1), torch.zeros_like(w), w / beta.unsqueeze(-1))
            basis.append(q)
            betas.append(beta)
        matrix = torch.diag_embed(torch.stack(alphas, -1))
        if betas:
            off = torch.diag_embed(torch.stack(betas, -1), offset=1)
            matrix = matrix + off + off.transpose(-1, -2)
        finite = matrix.isfinite().all(-1).all(-1)
        ritz, vectors = torch.linalg.eigh(matrix.nan_to_num(0.0, 0.0, 0.0))
        first = vectors[..., 0, :]
        weight = first.square()
        seen = torch.where(weight > 1e-12, 1 + ritz, torch.ones_like(ritz))
        quadratic = norm.squeeze(-1).square() * (weight * seen.abs().log()).sum(-1)
        coefficients = (vectors @ (first / seen).unsqueeze(-1)).squeeze(-1)
        solved = norm * (torch.stack(basis, -1) @ coefficients.unsqueeze(-1)).squeeze(-1)
        return torch.where(finite, quadratic, torch.nan), solved, seen.amin(-1)


def _safe_sqrt(x: Tensor) -> Tensor:
    """Square root with gradient 0 at 0 (a clipped coordinate does not respond to anything)."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, torch.ones_like(x)).sqrt(), torch.zeros_like(x))


class Automatic(LogDet):
    """:class:`Exact` where it takes at most ``max_products`` Hessian products, else :class:`Lanczos`.

    :param max_products: largest number of products per step for the exact value.
    """

    def __init__(self, max_products: int = 64) -> None:
        check_count("max_products", max_products)
        self.max_products = max_products
        self._exact, self._stochastic = Exact(), Lanczos()

    def choose(self, layout: Layout) -> LogDet:
        """The estimator for this layout."""
        arrow = layout.arrow
        products = layout.size if arrow is None else arrow.shared + arrow.local
        return self._exact if products <= self.max_products else self._stochastic

    def probes(self, like: Tensor, layout: Layout) -> Tensor | None:
        return self.choose(layout).probes(like, layout)

    def __call__(
        self,
        product: Product,
        diagonal: Tensor,
        layout: Layout,
        probes: Tensor | None = None,
        judged: Tensor | None = None,
    ) -> LogDetResult:
        return self.choose(layout)(product, diagonal, layout, probes, judged)
