"""MCMC teaching: a generator starts the runs of an energy-based model of the data, and learns from where they end."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from pyro.infer import SVI
from torch import Tensor, nn
from torch.optim import Optimizer

from ..checks import check_weight, of_arguments, of_module, one_kind
from ..runs.course import astray
from .ancestral import AncestralSampler
from .learning import check_optim, learn
from .refiner import Refined, Refiner, of_rows
from .students import Students, several

_LOGGER = logging.getLogger("pyro_shortrun")


@dataclass(frozen=True)
class TeachingInfo:
    """The last step of :class:`MCMCTeaching`.

    ``observed`` and ``refined`` are mean energies of data and of refined samples, ``displacement`` is the mean distance
    that runs went, ``nonfinite`` the number of runs that were dropped, ``run`` the record of the runs (None without
    steps).
    """

    observed: float
    refined: float
    displacement: float
    nonfinite: int
    run: Any

    @property
    def gap(self) -> float:
        """``f(observed) - f(refined)`` for ``f = -E``: zero in the mean where the energy has converged."""
        return self.refined - self.observed

    def __repr__(self) -> str:
        return (
            f"TeachingInfo(gap {self.gap:.4g}, displacement {self.displacement:.4g}, {self.nonfinite} runs dropped, "
            f"{self.run!r})"
        )


class MCMCTeaching:
    r"""Cooperative learning of an energy-based model and a generator: ``step(x)`` is one iteration.

    .. math::
        \hat x \leftarrow \text{sampler}, \qquad \tilde x \leftarrow \text{refiner}(\hat x), \qquad
        \theta \leftarrow \theta + \gamma \nabla_\theta \Big( \frac1n \sum_i f_\theta(x_i)
              - \frac1n \sum_i f_\theta(\tilde x_i) \Big), \qquad \text{student.step}(\tilde x) ,

    with :math:`f = -E` and :math:`\tilde x` held fixed. The student is any :class:`pyro.infer.SVI` of the generator;
    its guide and loss say how the generator learns from refined samples:

    =====================================================  =====================================================
    guide of the student                                   method
    =====================================================  =====================================================
    the ``AncestralSampler`` itself                        CoopNets as shipped: regression on the latents
    ``ShortRunGuide(model, num_steps=K, start=sampler)``   CoopNets with the generator's own Langevin inference
    an encoder                                             variational MCMC teaching: a VAE trained on refined samples
    =====================================================  =====================================================

    SVIs in ``dual`` take a step on the observed data as well (dual teaching). Contexts, as in ``step(x, c)``, are
    handed to generator, energy and guides and make all of them conditional; only ``x`` is moved.

    >>> import pyro, pyro.distributions as dist, torch
    >>> from pyro.infer import SVI, Trace_ELBO
    >>> class Energy(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.net = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.GELU(), torch.nn.Linear(16, 1))
    ...     def forward(self, x):
    ...         return self.net(x).squeeze(-1)
    >>> decoder = torch.nn.Linear(1, 2)
    >>> def model(x):
    ...     pyro.module("decoder", decoder)
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
    ...         pyro.sample("x", dist.Normal(decoder(z), 0.3).to_event(1), obs=x)
    >>> energy, sampler = Energy(), AncestralSampler(model)
    >>> student = SVI(model, sampler, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    >>> optim = torch.optim.Adam(energy.parameters(), lr=1e-3)
    >>> teaching = MCMCTeaching(sampler, Refiner(energy, num_steps=5, step_size=0.01), student, optim)
    >>> sorted(teaching.step(torch.randn(8, 2)))
    ['energy', 'student']
    >>> teaching.sample(torch.zeros(3, 2)).end.shape
    torch.Size([3, 2])

    *No steps.* With ``num_steps=0`` (at all, or by its schedule) nothing is refined, and the energy is left as it is.

    *What it converges to.* The regression draws the generator to the energy's modes until runs no longer move it: where
    teaching has converged, the energy is flat on the samples, refined samples (not the generator's) have the law of the
    data as far as the energy can tell, and the generator lacks the spread that the noise of the runs adds. For a
    Gaussian energy, a linear generator and data :math:`N(m, \Sigma)`: refined covariance :math:`\Sigma`, generator's
    :math:`\Sigma - 2 K \eta I`.

    Xie, Lu, Gao, Wu: Cooperative Learning of Energy-Based Model and Latent Variable Model via MCMC Teaching, AAAI 2018;
    Xie, Zheng, Li: Learning Energy-Based Model with Variational Auto-Encoder as Amortized Sampler, AAAI 2021; Xie,
    Zheng, Fang, Zhu, Wu: Cooperative Training of Fast Thinking Initializer and Slow Thinking Solver for Conditional
    Learning, TPAMI 2021; Cui, Han: Learning Energy-based Model via Dual-MCMC Teaching, NeurIPS 2023.

    :param sampler: an :class:`AncestralSampler`, or a generator to make one of.
    :param refiner: the energy-based model and its runs.
    :param student: an SVI, or several, that take a step on refined samples.
    :param optim: torch's optimiser of the energy's parameters; None for an energy that is known and stays as it is,
        which the generator learns to draw from.
    :param dual: an SVI, or several, that take a step on the observed data.
    :param l2: weight of the mean of squared energies of data and refined samples, which keeps the energy's level.
    :raises ValueError: for arguments out of range; at a step, where ``x`` is not finite, contexts have other rows or
        require gradients, the energy of the data or its gradient is not finite, or no run stays finite.
    """

    def __init__(
        self,
        sampler: AncestralSampler | Callable[..., Any],
        refiner: Refiner,
        student: SVI | Sequence[SVI],
        optim: Optimizer | None,
        *,
        dual: SVI | Sequence[SVI] = (),
        l2: float = 0.0,
    ) -> None:
        if not isinstance(refiner, Refiner):
            raise ValueError(f"refiner must be a Refiner(energy, ...), got {refiner!r}.")
        if not callable(sampler):
            raise ValueError(f"sampler must be an AncestralSampler(generator), or a generator, got {sampler!r}.")
        check_weight("l2", l2)
        self.sampler = sampler if isinstance(sampler, AncestralSampler) else AncestralSampler(sampler)
        self.refiner, self.optim, self.l2 = refiner, optim, float(l2)
        self.student, self.dual = several("student", student), several("dual", dual)
        self.iteration = 0
        self.info: TeachingInfo | None = None
        self._students = Students()
        self._warned = self._strayed = False
        check_optim(self.energy, optim)
        self._check_latents()

    @property
    def energy(self) -> nn.Module:
        """The energy-based model's energy."""
        return self.refiner.energy

    def step(self, x: Tensor, *context: Any) -> dict[str, float]:
        """One iteration.

        :param x: observed data, ``(n, *event)``; as many samples are drawn.
        :param context: contexts with ``n`` rows; what is no tensor, or has no dimensions, belongs to all rows.
        :return: losses: ``energy`` (mean energy of data minus that of refined samples, and ``l2``'s part), ``student``
            and, if there are, ``dual`` (sums over their SVIs).
        """
        with self._one_kind(x, context):
            _check_rows(x, context)
            refined = self._refine(x, context)
            given = tuple(of_rows(c, refined.rows) for c in context)
            losses = {"energy": self._learn(x, context, refined, given)}
        losses["student"] = self._students.step(self.student, refined.end, given)
        if self.dual:
            self.sampler.keep(None)  # its latents are not those of the observed data
            losses["dual"] = self._students.step(self.dual, x, context)
        self.iteration += 1
        return losses

    def setup(self, x: Tensor, *context: Any) -> None:
        """Create every parameter and buffer now, for :meth:`state_dict` and :meth:`load_state_dict`."""
        _check_rows(x, context)
        refined = self._noted(self.refiner(self.sampler.propose(x, *context), *context, num_steps=1))
        given = tuple(of_rows(c, refined.rows) for c in context)
        self._students.meet(self.student, refined.end, given)
        self._students.meet(self.dual, x, context)

    def sample(self, x: Tensor, *context: Any, num_steps: int | None = None) -> Refined:
        """The generator's draws and what runs from there make of them, as many as ``x`` has rows.

        :param x: data of the wanted shape; values do not matter.
        :param num_steps: instead of those of the current iteration.
        """
        proposed = self.sampler.propose(x, *context)
        return self.refiner(proposed, *context, iteration=self.iteration, num_steps=num_steps)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on but torch's random state, to be saved with ``torch.save``.

        As in torch, tensors are the ones in use: to keep a state in memory, ``copy.deepcopy`` it.
        Parameters of generator and guides are those that steps have met; buffers are in it where model or guide is an
        ``nn.Module``. It loads with ``weights_only=True``.
        """
        return {
            "iteration": self.iteration,
            "energy": self.energy.state_dict(),
            "optim": {} if self.optim is None else self.optim.state_dict(),
            **self._students.state_dict((*self.student, *self.dual)),
            "replay": {} if self.refiner.replay is None else self.refiner.replay.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; call :meth:`setup` first.

        :raises ValueError: where the parameters of generator and guides are not those of the state.
        """
        self._students.check(state)
        self.iteration = int(state["iteration"])
        self.energy.load_state_dict(state["energy"])
        if self.optim is not None:
            self.optim.load_state_dict(state["optim"])
        self._students.load_state_dict((*self.student, *self.dual), state)
        if self.refiner.replay is not None:
            self.refiner.replay.load_state_dict(state["replay"])

    def _one_kind(self, x: Tensor, context: tuple[Any, ...]) -> AbstractContextManager[None]:
        return one_kind(lambda: {"x": x, **of_arguments(context, {}), **of_module("the energy's", self.energy)})

    def _refine(self, x: Tensor, context: tuple[Any, ...]) -> Refined:
        proposed = self.sampler.propose(x, *context)
        return self._noted(self.refiner.go_on(proposed, *context, iteration=self.iteration))

    def _noted(self, refined: Refined) -> Refined:
        """The sampler keeps the latents of these; runs that were dropped are warned about."""
        self.sampler.keep(refined.rows if self.refiner.replay is None else None)
        reason = None if self._strayed or refined.run is None else astray(refined.run)
        if reason is not None:
            self._strayed = True
            _LOGGER.warning("in the energy-based model, %s (MCMCTeaching.info.run.log_density; told once.)", reason)
        if refined.nonfinite and not self._warned:
            self._warned = True
            warnings.warn(
                f"{refined.nonfinite} of {len(refined.rows)} runs of the energy-based model met a non-finite density "
                "or gradient and are dropped (counted in MCMCTeaching.info.nonfinite; this warning is shown once). "
                "Lower the energy's learning rate or the step_size.",
                stacklevel=4,
            )
        return refined

    def _learn(self, x: Tensor, context: tuple[Any, ...], refined: Refined, given: tuple[Any, ...]) -> float:
        """The energy's own step, unless runs made no steps."""
        optim = None if refined.run is None else self.optim
        loss, means = learn(self.energy, optim, self.l2, (x, *context), (refined.end, *given))
        self.info = TeachingInfo(*means, refined.displacement, refined.nonfinite, refined.run)
        return loss

    def _check_latents(self) -> None:
        """The sampler's latents belong to runs that began at its proposals, and to nothing else."""
        if any(self._has_sampler(svi) for svi in self.dual):
            raise ValueError(
                "dual: the sampler's latents are those of refined samples, not of the observed data: let it have an "
                "encoder, or ShortRunGuide(model) from the prior."
            )
        if self.refiner.replay is not None and any(self._has_sampler(svi) for svi in self.student):
            raise ValueError(
                "with replay=Replay(...), runs do not begin at the sampler's proposals, so that its latents are not "
                "those of refined samples: let the student have an encoder, or ShortRunGuide(model) from the prior."
            )

    def _has_sampler(self, svi: SVI) -> bool:
        return svi.guide is self.sampler or getattr(svi.guide, "start", None) is self.sampler


def _check_rows(x: Tensor, context: tuple[Any, ...]) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() == 0 or not len(x):
        raise ValueError(f"x must be a floating-point tensor with one row per datum, got {x!r}.")
    if not x.isfinite().all():
        raise ValueError("x has values that are not finite.")
    for i, c in enumerate(context):
        if isinstance(c, Tensor) and c.requires_grad:
            raise ValueError(
                f"context {i} requires gradients, which the energy's step and the students' would both ask for: detach "
                "it, or let model, guide and energy compute it themselves."
            )
        if isinstance(c, Tensor) and c.dim() and len(c) != len(x):
            raise ValueError(f"context {i} has {len(c)} rows and x has {len(x)}.")
