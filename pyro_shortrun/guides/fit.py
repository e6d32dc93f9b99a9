"""The fit of a guide: SVI in one call, its losses, and a verdict on whether they still fall."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.util import torch_item, zero_grads
from pyro.optim import PyroOptim
from torch import Tensor
from tqdm.auto import tqdm

from ..checks import check_count, check_flags, check_function, check_kind
from .elbo import ShortRunELBO
from .short_run import ShortRunGuide
from .together import Together
from .training import Request
from .verdict import BATCHES, FitResult, finite_of, verdict

MAX_NONFINITE = 10  # steps in a row whose loss is not finite, after which a run ends
MIN_WINDOW = 50
_TRIAL_STEPS = 10  # after which it is known what a step takes
_WORTH_COMPILING = 30.0  # seconds
_SMOOTHED = 50  # losses, about, in the number that the progress bar shows


class ShortRunSVI(SVI):
    r"""Pyro's ``SVI`` with a :meth:`run` of many steps: progress, losses, mini-batches, and a verdict at the end.

    Everything that Pyro's class takes goes here too: any guide, any Pyro optimiser or scheduler, any ELBO. ``step`` is
    Pyro's, but that a step whose loss is not finite moves no parameter, and one that fails leaves no gradient behind.

    **Verdict.** With ``m`` and ``m'`` the means of the losses in the last window of ``W`` steps and in that before it,

    .. math:: \Delta = m - m' , \qquad s^2 = \frac{v + v'}{10} , \qquad
        \text{converged} \iff |\Delta| \le \max\left(2.1 s,\ 10^{-6} \max(1, |m|)\right)

    where ``v`` is the variance of the means of 10 batches of neighbouring losses, of which a window consists, so that
    ``s`` allows for losses that are alike from step to step. ``W`` is a quarter of ``num_steps``, and at least 50; a
    quarter of the steps done, where they are fewer than two such windows. Losses that are not finite are left out.

    How often it is wrong: losses around a constant mean are called not converged in 5 % of runs, and in 11 % where
    neighbours correlate by .9 and W = 250; a drift of 2, 3, 4 standard errors in a window is missed in a half, a
    quarter, a twentieth of them. So "converged" says that the loss falls by less than the noise of a window can show,
    and longer windows show more. It does not say that the optimum is reached: at a constant learning rate losses settle
    above it.

    >>> import pyro, pyro.distributions as dist, torch
    >>> from pyro_shortrun import ShortRunELBO, ShortRunGuide, ShortRunSVI
    >>> def model(x):
    ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
    >>> guide = ShortRunGuide(model, num_steps=5)
    >>> svi = ShortRunSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), ShortRunELBO())
    >>> result = svi.run(200, torch.ones(3), progress=False)
    >>> result
    200 steps in ... s: loss ... +- ..., ...
    >>> result.losses.shape
    torch.Size([200])

    :param model: the model.
    :param guide: the guide.
    :param optim: an optimiser of ``pyro.optim``.
    :param loss: an ELBO; of one with several losses, as ``ReweightedWakeSleep``, the sum is recorded.
    :ivar result: the :class:`FitResult` of the last :meth:`run`, also of one that an exception has ended.
    """

    result: FitResult | None = None

    def __init__(self, model: Any, guide: Any, optim: Any, loss: Any, **kwargs: Any) -> None:
        check_kind("optim", optim, PyroOptim, "pyro.optim.Adam({'lr': 0.01})")
        if isinstance(loss, type):
            raise ValueError(f"loss must be an ELBO object such as {loss.__name__}(), got the class.")
        super().__init__(model, guide, optim, loss, **kwargs)
        self._elbo = loss if type(loss) is ShortRunELBO else None
        self._together = Together(optim)

    def run(
        self,
        num_steps: int,
        *args: Any,
        batches: Iterable[Any] | None = None,
        progress: bool = True,
        callback: Callable[[int, float], Any] | None = None,
        stop_when_converged: bool = False,
        window: int | None = None,
        **kwargs: Any,
    ) -> FitResult:
        """Take ``num_steps`` steps, as ``step`` in a loop does, bit for bit.

        A later run goes on where this one ended, in this process or, by :func:`~pyro_shortrun.save_state` and
        :func:`~pyro_shortrun.load_state` of guide and optimiser, in another. The names below are taken: a model's
        arguments of the same names go by position.

        An interrupt from the keyboard ends the run, not the program: what was done until then is returned. After any
        other exception it is in ``result``.

        Schedulers are stepped by no one else: ``callback=lambda step, loss: scheduler.step() if step % 100 == 0 else
        None``.

        :param num_steps: how many steps, at most.
        :param args: arguments of model and guide, the same at every step; leave out with ``batches``. Models that
            subsample by plates of their own need no batches.
        :param batches: one batch for each step, over and over: a ``DataLoader``, or a list. A batch that is a tuple or
            list is the arguments of model and guide, anything else the only one. A run begins a new pass: for the same
            numbers as in one run, let runs be of whole passes, by a loader without a ``generator`` of its own.
        :param progress: show a bar with the smoothed loss.
        :param callback: called after each step with the number of steps so far in this run and the loss; the run ends
            when it returns True.
        :param stop_when_converged: end as soon as the verdict says so; asked after every window from the second on.
        :param window: ``W``; a quarter of ``num_steps`` and at least 50 by default.
        :param kwargs: keyword arguments of model and guide, the same at every step.
        :returns: the losses, and whether they still fall.
        :raises ValueError: for arguments that do not go together, and where ``batches`` has none, or no more.
        :raises RuntimeError: after 10 steps in a row whose loss is not finite.
        """
        _check_steps(num_steps, window, stop_when_converged)
        _check_batches(batches, args)
        check_function("callback", callback, "lambda step, loss: print(step, loss)")
        check_flags(progress=progress, stop_when_converged=stop_when_converged)
        record = _Record(window or _default_window(num_steps))
        calls = iter(_calls(args, batches))
        try:
            with tqdm(total=num_steps, disable=not progress, mininterval=0.5, unit="step") as bar:
                while len(record.losses) < num_steps:
                    self._consider(record, num_steps)
                    loss = _number(self.step(*next(calls), **kwargs))
                    record.add(loss)
                    if progress:
                        bar.set_postfix_str(f"loss {record.smoothed:.5g}", refresh=False)
                    bar.update()
                    stopped = callback is not None and callback(len(record.losses), loss) is True
                    if stopped or (stop_when_converged and record.converged()):
                        break
        except KeyboardInterrupt:
            record.interrupted = True
        finally:
            self.result = record.result()
        return self.result

    def _consider(self, record: _Record, num_steps: int) -> None:
        """With ``compile=None``, compile the step where the steps that are left take longer than that."""
        done = len(record.losses)
        if done == _TRIAL_STEPS and self._elbo is not None and isinstance(self.guide, ShortRunGuide):
            if record.seconds / done * (num_steps - done) > _WORTH_COMPILING:
                self.guide.steps.turn_on()

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """One step as of Pyro's SVI; where the loss is not finite, no parameter moves.

        :returns: the loss.
        """
        params: set[Tensor] = set()
        try:
            loss = self._from_graph(params, args, kwargs)
            if loss is None:
                loss = self._traced(params, args, kwargs)
            # One NaN in the averages of Adam would stay there for good.
            if math.isfinite(_number(loss)):
                self._together(params)
        finally:
            zero_grads(params)
        return loss

    def _from_graph(self, params: set[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
        """The loss from one graph of the whole step, if there is one; its parameters are added to ``params``."""
        if self._elbo is None or not isinstance(self.guide, ShortRunGuide):
            return None
        self._elbo.check(self.model, self.guide)
        return self.guide.steps(Request(self.guide, args, kwargs, self._elbo.num_particles), params)

    def _traced(self, params: set[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        capture = poutine.trace(param_only=True)
        try:
            with capture:
                loss = self.loss_and_grads(self.model, self.guide, *args, **kwargs)
        finally:
            sites: Any = capture.trace.nodes.values()
            params |= {site["value"].unconstrained() for site in sites}
        return type(loss)(map(torch_item, loss)) if isinstance(loss, tuple) else torch_item(loss)


class _Record:
    """Losses of a run that goes on."""

    def __init__(self, window: int) -> None:
        self.losses: list[float] = []
        self.window = window
        self.smoothed = math.nan
        self.interrupted = False
        self._num_finite = 0
        self._streak = 0
        self._began = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    def add(self, loss: float) -> None:
        self.losses.append(loss)
        if math.isfinite(loss):
            self._streak = 0
            self._num_finite += 1
            before = loss if self._num_finite == 1 else self.smoothed
            self.smoothed = before + (loss - before) / min(self._num_finite, _SMOOTHED)
        else:
            self._streak += 1
            self._check_streak()

    def _check_streak(self) -> None:
        if self._streak >= MAX_NONFINITE:
            done = len(self.losses)
            raise RuntimeError(
                f"the loss was {self.losses[-1]} at step {done} of this run, and not finite at {self._streak} steps in "
                "a row: lower the learning rate or the step size of the runs, or look for data outside the support of "
                f"their distribution. No parameter moved since step {done - self._streak}; `result` has the losses."
            )

    def converged(self) -> bool:
        """The verdict, at the end of a window."""
        if len(self.losses) % self.window:
            return False
        return verdict(torch.tensor(self.losses[-2 * self.window :], dtype=torch.float64, device="cpu"), self.window)[2]

    def result(self) -> FitResult:
        losses = torch.tensor(self.losses, dtype=torch.float64, device="cpu")
        num_finite = len(finite_of(losses))
        # A run that was ended early is judged by what there is.
        window = self.window if 2 * self.window <= num_finite else min(self.window, _default_window(num_finite))
        num_nonfinite = len(losses) - num_finite
        return FitResult(losses, window, *verdict(losses, window), self.seconds, num_nonfinite, self.interrupted)


def _default_window(num_steps: int) -> int:
    return max(MIN_WINDOW, num_steps // 4)


def _number(loss: Any) -> float:
    return float(sum(loss)) if isinstance(loss, tuple) else float(loss)


# ---------------------------------------------------------------- arguments of steps


def _calls(args: tuple[Any, ...], batches: Iterable[Any] | None) -> Iterator[tuple[Any, ...]]:
    """Arguments for one step after another, without end."""
    while batches is None:
        yield args
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield tuple(batch) if isinstance(batch, tuple | list) else (batch,)
        if empty:
            raise ValueError(
                "batches has no batch, or no more: give what can be passed over again and again, such as a DataLoader "
                "or a list, or as many batches as steps."
            )


def _check_batches(batches: Any, args: tuple[Any, ...]) -> None:
    if batches is None:
        return
    if args:
        raise ValueError(
            f"batches are the arguments of the model: leave the other {len(args)} out, or put them into every batch, "
            "batches=[(x, n) for x in loader]; keyword arguments go with every batch."
        )
    if isinstance(batches, Tensor | Mapping) or not hasattr(batches, "__iter__"):
        raise ValueError(
            f"batches must be a DataLoader or a list of batches, got a {type(batches).__name__}: for a tensor, "
            "DataLoader(x, batch_size=100, shuffle=True) or x.split(100)."
        )


def _check_steps(num_steps: Any, window: Any, stop_when_converged: bool) -> None:
    check_count("num_steps", num_steps)
    if window is not None:
        check_count("window", window)
        if window < BATCHES or 2 * window > num_steps:
            raise ValueError(
                f"window must be {BATCHES} steps at least, and two windows no more than num_steps={num_steps}, got "
                f"{window}; by default it is a quarter of the steps, and {MIN_WINDOW} at least."
            )
    elif stop_when_converged and num_steps < 2 * MIN_WINDOW:
        raise ValueError(
            f"stop_when_converged compares two windows of {MIN_WINDOW} steps or more: num_steps must be "
            f"{2 * MIN_WINDOW} at least, got {num_steps}."
        )
