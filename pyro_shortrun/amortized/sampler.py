"""AmortizedSampler: amortised Langevin dynamics without data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..checks import check_count, check_function
from ..dynamics.metropolis import BEST_ACCEPTANCE
from ..tensors import ordinary_autograd
from .basis import Basis
from .chain import AmortizedInfo, LinearChain, LinearRun
from .features import check_features, check_width


class AmortizedSampler(nn.Module):
    r"""Unconditional amortised Langevin dynamics: draws ``z_j = Psi h(v_j)`` of one density, for fixed inputs ``v``.

    With k inputs (draws of N(0, I), say) and features ``h`` of width ``d >= k``, the map moves on
    :math:`\sum_j \log\pi(\Psi h(v_j))` as in :class:`~pyro_shortrun.LangevinEncoderGuide`, so that the k draws become
    independent ones of ``pi``. New inputs then give approximate draws at no further transition (:meth:`at`).

    The draws that a call returns keep their graph to the features' parameters, at fixed ``Psi``, and none through the
    transitions, so that ``(-log_density(sampler())).sum().backward()`` trains ``h``.

    >>> import torch
    >>> features = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.Tanh())
    >>> log_density = lambda z: -0.5 * z.square().sum(-1)
    >>> sampler = AmortizedSampler(log_density, features, torch.randn(20, 2), size=3)
    >>> sampler(num_steps=5).shape
    torch.Size([20, 3])

    Taniguchi, Iwasawa, Kumagai, Matsuo: Langevin Autoencoders for Learning Deep Latent Variable Models, section on
    sampling from unconditional distributions of its first version (ICLR 2022 submission).

    :param log_density: from ``(n, size)`` to ``(n,)``, in nats, up to a constant: minus an energy.
    :param features: ``h``, a module or function from inputs to ``(n, d)``.
    :param inputs: ``v``, ``(k, ...)``; a buffer.
    :param size: dimension of a draw.
    :raises ValueError: for arguments out of range, and where there are fewer features than inputs.

    The other arguments are those of :class:`~pyro_shortrun.LangevinEncoderGuide`; the step size adapts in training
    mode.
    """

    inputs: Tensor

    def __init__(
        self,
        log_density: Callable[[Tensor], Tensor],
        features: Callable[[Tensor], Tensor],
        inputs: Tensor,
        *,
        size: int,
        step_size: float = 0.1,
        adjust: bool = True,
        target_accept_prob: float | None = BEST_ACCEPTANCE,
        basis: Basis | None = None,
        init_scale: float = 1.0,
    ) -> None:
        super().__init__()
        check_count("size", size)
        check_function("log_density", log_density, "lambda u: -u.square().sum(-1) / 2")
        check_function("features", features, "torch.nn.Linear(2, 16)")
        self.log_density, self.features = log_density, features
        self.register_buffer("inputs", inputs)
        self.chain = LinearChain(step_size, adjust, target_accept_prob, basis, init_scale)
        self.info: AmortizedInfo | None = None
        with torch.no_grad():
            first = self._features(inputs)
        check_width(*first.shape)
        self.chain.setup(size, first)
        target = self.chain.target(self._gradient, first)
        self.chain.halve_until_accepted(target, target.at(self.chain.starts(1)))

    @property
    def psi(self) -> Tensor:
        """The current map, ``(size, d)``."""
        return self.chain.starts(1)[0]

    def forward(self, num_steps: int = 1) -> Tensor:
        """Move the map by ``num_steps`` transitions, and the draws at the inputs, ``(k, size)``.

        :raises ValueError: where the log density is not finite at the draws.
        """
        check_count("num_steps", num_steps)
        with ordinary_autograd():
            features = self._features(self.inputs)
        target = self.chain.target(self._gradient, features)
        with torch.no_grad():
            point = target.at(self.chain.starts(1))
        if not (point.value.isfinite().all() and point.pull.isfinite().all()):
            raise ValueError(
                "log_density, or its gradient, is not finite at the sampler's draws: use a smaller init_scale."
            )
        wanted = self.chain.target_accept_prob if self.training else None
        run: LinearRun = self.chain.run(target, point, num_steps, wanted=wanted)
        self.chain.store(run)
        self.info = run.info
        return features @ self.psi.mT

    def at(self, inputs: Tensor) -> Tensor:
        """``Psi h(inputs)`` at the current map, ``(n, size)``."""
        return self._features(inputs) @ self.psi.mT

    def _features(self, inputs: Tensor) -> Tensor:
        features = self.features(inputs)
        check_features(features, self.inputs, (len(inputs),))
        return features

    def _gradient(self, u: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = u[0].detach().requires_grad_()
            value = self.log_density(leaf)
            if value.shape != leaf.shape[:1]:
                raise ValueError(f"log_density must return shape {tuple(leaf.shape[:1])}, got {tuple(value.shape)}.")
            (grad,) = torch.autograd.grad(value.sum(), leaf, materialize_grads=True)
        return value.detach().unsqueeze(0), grad.unsqueeze(0)
