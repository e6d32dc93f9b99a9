"""Pictures of runs along their steps, and of step sizes along training.

Every function takes the axes to draw on, or makes some, and returns them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..runs.record import RunInfo
from .axes import ax_of, axes_of, numpy_of


def plot_trajectories(
    source: Any, trajectory: Mapping[str, Tensor] | None = None, axes: Any = None, label: str | None = None
) -> Any:
    """A run along its steps: log density, norm of the gradient, and how far each step goes.

    Log density and gradient norm are means over the rows that still moved. How far a step goes is the mean length of
    its displacement where the states are given, else that of its drift, mean step size times gradient norm.

    :param source: a guide after a call, or a :class:`RunInfo`.
    :param trajectory: what ``guide.trajectory(*args, num_chains=...)`` gave, ``(K + 1, chains, *site shape)`` by site;
        lengths are over all coordinates of a chain.
    :param axes: three axes.
    :param label: of the lines, to compare several runs on the same axes.
    :return: the axes.
    :raises ValueError: where the guide has not run yet.
    """
    info = source if isinstance(source, RunInfo) else getattr(source, "info", None)
    if not isinstance(info, RunInfo):
        raise ValueError("source must be a guide that has run, such as ShortRunGuide after svi.step, or its info.")
    axes = axes_of(axes, 1, 3, (10, 3))
    if trajectory is None:
        moved, name = info.step_size.mean(-1) * info.grad_norm, "drift"
    else:
        moved, name = _displacement(trajectory), "displacement"
    found = (info.log_density, "log density of a row"), (info.grad_norm, "gradient norm"), (moved, f"{name} of a step")
    for ax, (value, what) in zip(axes, found, strict=True):
        ax.plot(numpy_of(value), label=label)
        ax.set(xlabel="step k", ylabel=what)
    if label is not None:
        axes[0].legend(fontsize=8)
    return axes


def _displacement(trajectory: Mapping[str, Tensor]) -> Tensor:
    """Mean length of each step, ``(K,)``."""
    flat = torch.cat([v.reshape(*v.shape[:2], -1) for v in trajectory.values()], -1)
    return flat.diff(dim=0).norm(dim=-1).mean(1)


class StepSizeHistory(Sequence[Any]):
    """A guide's step sizes, recorded update by update; what :func:`plot_step_sizes` takes.

    >>> import pyro, pyro.distributions as dist
    >>> from pyro_shortrun import ShortRunGuide
    >>> def model():
    ...     pyro.sample("z", dist.Normal(0.0, 1.0))
    >>> guide = ShortRunGuide(model)
    >>> history = StepSizeHistory(guide)
    >>> for _ in range(3):
    ...     _ = guide()  # or svi.step(...)
    ...     history.record()
    >>> len(history), history[0].shape
    (3, torch.Size([]))

    :param guide: any object with ``step_sizes()``, such as :class:`~pyro_shortrun.ShortRunGuide`.
    :raises ValueError: where it has none.
    """

    def __init__(self, guide: Any) -> None:
        if not callable(getattr(guide, "step_sizes", None)):
            raise ValueError(f"guide must have step_sizes(), as ShortRunGuide has, got {guide!r}.")
        self._guide = guide
        self._found: list[Any] = []

    def record(self) -> None:
        """Add the step sizes as they are now; after each update.

        :raises RuntimeError: before the guide's first call.
        """
        now = self._guide.step_sizes()
        self._found.append({k: v.cpu() for k, v in now.items()} if isinstance(now, Mapping) else now.cpu())

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, index: Any) -> Any:
        return self._found[index]


def plot_step_sizes(history: Sequence[Any], ax: Any = None, label: str | None = None) -> Any:
    """Step sizes over training: a line for each of them.

    :param history: a :class:`StepSizeHistory`, or a list of ``guide.step_sizes()`` after each update: numbers,
        tensors, or dicts from site to these.
    :param label: of the lines; sites have their names.
    :return: the axes.
    :raises ValueError: where the history is empty.
    """
    if not len(history):
        raise ValueError("the history has no step sizes: append guide.step_sizes() after each update.")
    ax = ax_of(ax)
    lines = {"": history} if not isinstance(history[0], Mapping) else {k: [h[k] for h in history] for k in history[0]}
    for name, values in lines.items():
        steps = np.stack([numpy_of(v).reshape(-1) for v in values])
        names = [name or label] + [None] * (steps.shape[1] - 1)
        color = ax.plot(steps[:, 0], label=names[0])[0].get_color()
        ax.plot(steps[:, 1:], color=color, alpha=0.5)
    ax.set(xlabel="update", ylabel="step size", yscale="log")
    if label is not None or "" not in lines:
        ax.legend(fontsize=8)
    return ax
