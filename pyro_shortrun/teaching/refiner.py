"""Short runs of data in an energy-based model: from a generator's draws to what the energy makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import pyro
import torch
from pyro.distributions import TorchDistribution, constraints
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from ..checks import check_count, check_flags, check_kind, of_module, one_kind
from ..density.call import Call
from ..density.interface import Density
from ..dynamics.dynamics import Dynamics
from ..dynamics.langevin import Langevin
from ..dynamics.step_size import StepSize
from ..energy.prior import TiltedPrior
from ..energy.runs import PriorRuns
from ..energy.statement import energy_prior
from ..runs.record import RunInfo
from ..starts.kept import Replay
from ..starts.prior import Prior
from ..starts.start import Start
from ..tensors import ordinary_autograd

_NO_LIMIT = 1e12  # of a scheduled step size


class _Scheduler(Protocol):
    """What ``torch.optim.lr_scheduler`` objects offer."""

    def get_last_lr(self) -> list[Any]: ...


Schedule = float | Callable[[int], float] | _Scheduler


def scheduled(schedule: Any, iteration: int) -> Any:
    """The value of a schedule: a number, a function of the iteration, or the rate of a torch scheduler."""
    if hasattr(schedule, "get_last_lr"):
        return float(schedule.get_last_lr()[0])
    return schedule(iteration) if callable(schedule) else schedule


@dataclass(frozen=True)
class Refined:
    """Ends of runs, ``(n, *event)``, where they began, and what happened.

    ``rows`` is the index of the proposal that each end belongs to: ``0 .. n-1``, but for runs that met a non-finite
    density or gradient, ``nonfinite`` in number, which are dropped and stood in for by copies of others. ``run`` is
    None where no step was made.
    """

    start: Tensor
    end: Tensor
    rows: Tensor
    nonfinite: int
    run: RunInfo | None

    @property
    def displacement(self) -> float:
        """Mean Euclidean distance from start to end of a run."""
        return (self.end - self.start).flatten(1).norm(dim=1).mean().item()


class Refiner:
    r"""An energy-based model of data and short runs in it.

    .. math:: \log p(x \mid c) = -E(x, c) + \log p_0(x) + \text{const} , \qquad
              x' = x + \eta\, \nabla_x \log p(x \mid c) + \tau \sqrt{2 \eta}\, \epsilon .

    Every row's drift is the gradient of its own log density: it does not change with the number of rows. Papers that
    write :math:`s^2/2` and :math:`s` have :math:`\eta = s^2/2`. The energy is in ``eval()`` mode during runs and
    otherwise left in the mode that it has.

    >>> import pyro.distributions as dist, torch
    >>> class Energy(torch.nn.Module):
    ...     def forward(self, x):
    ...         return (x - 3).square().sum(-1) / 2
    >>> refiner = Refiner(Energy(), num_steps=200, step_size=0.1, noise=0.0, reference=dist.Normal(0.0, 1.0))
    >>> refiner(torch.zeros(2, 1)).end
    tensor([[1.5000],
            [1.5000]])

    :param energy: an ``nn.Module`` from ``x``, ``(n, *event)``, and contexts (labels, a part of an image), each with
        ``n`` rows, to ``E``, ``(n,)``, in nats and low where the data are.
    :param num_steps: steps of a run: a number or a function of the iteration. Zero makes no steps.
    :param step_size: ``eta``: a number, a function of the iteration, or a torch scheduler, whose learning rate is read
        (and which its owner steps). 0.1 by default.
    :param noise: ``tau``, factor of the noise, or a schedule of it: 1 is Langevin dynamics, 0 gradient ascent.
    :param dynamics: instead of ``step_size`` and ``noise``.
    :param reference: ``p_0`` of one value of the data, such as ``Normal(0, s)``, on the device of the data, which is
        expanded to the data's shape. Flat by default. Its support is that of the runs, so that ``Uniform(0, 1)`` keeps
        them inside.
    :param replay: runs of training (:meth:`go_on`) begin where earlier ones ended, some of them at the proposals;
        without contexts.
    :param compile: whether runs are compiled, as for :class:`~pyro_shortrun.ShortRunGuide`.
    :raises ValueError: for arguments out of range; at a call, where the energy is not one value per row, and where no
        run stays finite.
    """

    def __init__(
        self,
        energy: nn.Module,
        num_steps: int | Callable[[int], int] = 15,
        step_size: Schedule | None = None,
        *,
        noise: Schedule = 1.0,
        dynamics: Dynamics | None = None,
        reference: TorchDistributionMixin | None = None,
        replay: Replay | None = None,
        compile: bool = False,
    ) -> None:
        if not isinstance(energy, nn.Module):
            raise ValueError(f"energy must be an nn.Module from data to one value per row, got {energy!r}.")
        check_kind("reference", reference, TorchDistributionMixin, "pyro.distributions.Normal(0.0, 1.0)")
        check_kind("replay", replay, Replay, "Replay(10_000)")
        check_kind("dynamics", dynamics, Dynamics, "Langevin(0.1)")
        if dynamics is not None and (step_size is not None or noise != 1.0):
            raise ValueError("pass step_size and noise, or dynamics: Langevin(step_size) is the default dynamics.")
        check_flags(compile=compile)
        self.energy, self.reference, self.replay = energy, reference, replay
        self._schedules = num_steps, 0.1 if step_size is None else step_size, noise
        self._scheduled = dynamics is None
        self.num_steps(0)
        _factor(scheduled(noise, 0))
        self._dynamics = _NoiseScaled(scheduled(self._schedules[1], 0)) if dynamics is None else dynamics
        self._compile, self._prior = compile, TiltedPrior(self._model, compile)

    def num_steps(self, iteration: int) -> int:
        """Steps of a run in this iteration."""
        return _steps(scheduled(self._schedules[0], iteration))

    def __call__(self, x: Tensor, *context: Any, iteration: int = 0, num_steps: int | None = None) -> Refined:
        """Runs from ``x``, ``(n, *event)``, whether there is a replay buffer or not.

        :param iteration: where the schedules are.
        :param num_steps: instead of the scheduled number.
        """
        return self._run(Prior(), x, context, iteration, num_steps)

    def go_on(self, x: Tensor, *context: Any, iteration: int = 0) -> Refined:
        """The same in training: where there is a replay buffer, runs begin at its states or ``x`` and end in it.

        :raises ValueError: for contexts and a replay buffer.
        """
        if self.replay is not None and context:
            raise ValueError("replay mixes the rows of its buffer, which belong to contexts: use replay=None.")
        return self._run(Prior() if self.replay is None else self.replay, x, context, iteration, None)

    def _run(self, begin: Start, x: Tensor, context: tuple[Any, ...], iteration: int, num_steps: int | None) -> Refined:
        count = self.num_steps(iteration) if num_steps is None else _steps(num_steps)
        x, rows = x.detach(), torch.arange(len(x), device=x.device)
        if count == 0:
            return Refined(x, x, rows, 0, None)
        with ordinary_autograd(), torch.no_grad(), evaluating(self.energy):
            call = self._bind(x, context)
            bad = ~_finite(call)
            if bad.any():  # proposals that no run can start from
                rows = _stand_ins(bad)
                call = self._bind(x[rows], tuple(of_rows(c, rows) for c in context))
            self._set(iteration, count, call)
            if self.replay is not None:
                self.replay.setup(call.density)  # so that there is something to load a state into
            done = PriorRuns(count, dynamics=self._dynamics, start=begin).make(call, 1)
            frozen = done.info.frozen[0]
            keep = _stand_ins(frozen)
            begin.finish(call, done.end[:, keep])
            layout, transform = call.density.layout, call.reading.transforms["x"]
            start, end = (transform(layout.unpack(u[0])["x"]) for u in (done.start, done.end))
        nonfinite = int((bad | frozen).sum())
        return Refined(start[keep], end[keep], rows[keep], nonfinite, done.info)

    def log_density(self, x: Tensor, *context: Any) -> Tensor:
        """``-E(x, c) + log p_0(x)``, ``(n,)``: a score, without ``log Z``."""
        value = -self.energy(x, *context)
        return value if self.reference is None else value + _spread(self.reference, x).log_prob(x)

    def _bind(self, x: Tensor, context: tuple[Any, ...]) -> Call:
        call = self._prior.bind((x, *context), {})
        assert call is not None
        return call if self._compile else replace(call, density=_Direct(self, call, context))

    def _set(self, iteration: int, count: int, call: Call) -> None:
        """Step size and noise of this iteration."""
        if not self._scheduled:
            return
        eta, noise = (scheduled(s, iteration) for s in self._schedules[1:])
        like = next(iter(call.reading.unconstrained.values()))
        self._dynamics.step_size.setup(call.density.layout, count, like)
        self._dynamics.step_size.assign(like.new_full((1,), float(eta)))
        assert isinstance(self._dynamics, _NoiseScaled)
        self._dynamics.factor = _factor(noise)

    def _model(self, x: Tensor, *context: Any) -> None:
        """The energy-based model as a Pyro program, of which ``x`` is a draw: where its runs start."""
        with pyro.plate("rows", len(x), dim=-1):
            value = pyro.sample("x", _Proposed(x, self.reference))
            # A function, so that the parameters are no business of Pyro's store: another energy may be there.
            with one_kind(lambda: {"x": x, **of_module("the energy's", self.energy)}):
                energy_prior("energy", lambda v: self.energy(v, *context), value)


class _Direct(Density):
    """The density of one call, without Pyro, whose handlers take longer in a step than a small network does."""

    def __init__(self, refiner: Refiner, call: Call, context: tuple[Any, ...]) -> None:
        self.structure, self.layout = call.model.structure, call.model.layout
        self._refiner, self._context, self._transform = refiner, context, call.reading.transforms["x"]

    def __call__(self, u: Tensor) -> Tensor:
        (one,) = u  # a single chain
        state = self.layout.unpack(one)["x"]
        x = self._transform(state)
        value = self._refiner.log_density(x, *self._context) + self._transform.log_abs_det_jacobian(state, x)
        return value.unsqueeze(0)


class _Proposed(TorchDistribution):
    """The reference (or nothing, a flat density), of which given values are the draw."""

    arg_constraints: dict[str, Any] = {}

    def __init__(self, value: Tensor, reference: TorchDistributionMixin | None) -> None:
        self._value = value
        self._base = None if reference is None else _spread(reference, value)
        super().__init__(value.shape[:1], value.shape[1:], validate_args=False)

    @property
    def support(self) -> Any:
        if self._base is None:
            return constraints.independent(constraints.real, len(self.event_shape))
        return self._base.support

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self._value

    def log_prob(self, value: Tensor) -> Tensor:
        return value.new_zeros(value.shape[:1]) if self._base is None else self._base.log_prob(value)


class _NoiseScaled(Langevin):
    """Langevin steps with a factor of their noise, which is drawn outside of compiled graphs."""

    def __init__(self, step_size: float) -> None:
        super().__init__(StepSize(step_size, max=_NO_LIMIT, learnable=False))
        self.factor = torch.ones((), device="cpu")  # a number would be one of the settings that graphs are known by

    def draw_noise(self, num_steps: int, like: Tensor) -> Tensor:
        return self.factor.item() * super().draw_noise(num_steps, like)


def _spread(reference: TorchDistributionMixin, x: Tensor) -> Any:
    """The reference for every element of the data, ``x.dim() - 1`` of whose dimensions are one event."""
    inner = len(reference.event_shape)
    return reference.expand(x.shape[: x.dim() - inner]).to_event(x.dim() - 1 - inner)


def _steps(count: Any) -> int:
    if not (isinstance(count, int) and count == 0):
        check_count("num_steps", count)
    return int(count)


def _factor(noise: Any) -> Tensor:
    if isinstance(noise, str) or not 0 <= float(noise) < float("inf"):
        raise ValueError(f"noise, the factor of a standard deviation, must be a finite number >= 0, got {noise!r}.")
    return torch.tensor(float(noise), device="cpu")


def _finite(call: Call) -> Tensor:
    """Which rows a run can start from, ``(n,)``."""
    nodes, state = call.reading.trace.nodes, call.reading.unconstrained["x"]
    return nodes["energy"]["fn"].log_factor.isfinite() & state.flatten(1).isfinite().all(1)


def _stand_ins(bad: Tensor) -> Tensor:
    """Every row's own index, or that of a good row, each in turn."""
    index = torch.arange(len(bad), device=bad.device)
    good = index[~bad]
    if not len(good):
        raise ValueError(
            "every run of the energy-based model met a non-finite density or gradient: the energy, or the generator "
            "whose draws the runs start from, may have diverged. Lower their learning rates or the step_size, or set "
            "MCMCTeaching(l2=...)."
        )
    index[bad] = good[torch.arange(len(bad) - len(good), device=bad.device) % len(good)]
    return index


def of_rows(value: Any, rows: Tensor) -> Any:
    """These rows of a context; what is no tensor, or has no dimensions, belongs to all."""
    return value[rows] if isinstance(value, Tensor) and value.dim() else value


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout and batch normalisation as in evaluation: a run is in one density, and rows do not mix."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
