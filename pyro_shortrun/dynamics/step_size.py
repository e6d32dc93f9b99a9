"""Step sizes: bounded, learnable, shared or one per step, site or dimension."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, Literal, cast

import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints

from ..checks import check_flags
from ..density.coordinates import dim_count, dim_index, site_index
from ..density.layout import Layout

Per = Literal["shared", "step", "site", "dim"]


class StepSize(PyroModule):
    r"""Step sizes :math:`\eta` of ``u' = u + eta * grad log pi(u) + sqrt(2 * eta) * eps``.

    The convention is that of the drift: papers that write :math:`s^2/2` and :math:`s` have
    :math:`\eta = s^2/2`. Values stay inside ``(0, max)``, whatever an optimiser does to the underlying parameter
    (``eta = max * sigmoid(raw)``).

    :param init: initial value, in ``(0, max)``.
    :param per: ``"shared"`` (one number), ``"step"`` (one per step), ``"site"`` (one per latent site) or ``"dim"``
        (one per unconstrained coordinate of a row; elements of a plate share theirs).
    :param max: upper bound; by default ``1`` or ten times ``init``, whichever is larger.
    :param learnable: whether SVI tunes the values.
    :raises ValueError: where ``init`` is not a finite number in ``(0, max)`` or ``per`` is unknown.

    >>> StepSize(0.1, per="site").max
    1.0
    """

    value: Any  # a PyroParam, or a buffer
    _index: Tensor
    _layout: Layout | None = None  # of the last set-up

    def __init__(
        self,
        init: float = 0.1,
        per: Per = "shared",
        *,
        max: float | None = None,
        learnable: bool = True,
    ) -> None:
        super().__init__()
        init = _number(init)
        if not (isinstance(init, float) and math.isfinite(init) and init > 0):
            raise ValueError(f"step_size must be a finite number > 0, got {init!r}; try 0.1.")
        if per not in ("shared", "step", "site", "dim"):
            raise ValueError(f"per must be 'shared', 'step', 'site' or 'dim', got {per!r}.")
        check_flags(learnable=learnable)
        if not isinstance(max, Real | None):
            raise ValueError(f"max must be a number, got {max!r}; try 1.0.")
        self.max = float(max) if max is not None else builtin_max(1.0, 10.0 * init)
        if not (math.isfinite(self.max) and init < self.max):
            raise ValueError(f"step_size {init} must be below max={max!r}; pass a larger finite max.")
        self.init, self.per, self.learnable = float(init), per, learnable

    @property
    def is_set_up(self) -> bool:
        """Whether the values exist."""
        return "value_unconstrained" in self._parameters or "value" in self._buffers

    def setup(self, layout: Layout, num_steps: int, like: Tensor) -> bool:
        """Create the values (once), in the dtype and on the device of ``like``.

        :return: whether they were created now.
        """
        if self._layout is layout and self._index.device == like.device and self.is_set_up:
            return False
        index = site_index(layout) if self.per == "site" else dim_index(layout)
        self._layout, self._index = layout, index.to(like.device)
        self._length = {"shared": 1, "step": num_steps, "site": len(layout.sites), "dim": dim_count(layout)}[self.per]
        if self.is_set_up:
            return False
        value = like.new_full((self._length,), self.init)
        if self.learnable:
            self.value = PyroParam(value, constraints.interval(0.0, self.max))
        else:
            self.register_buffer("value", value)
        return True

    @property
    def current(self) -> Tensor:
        """The values, one for each of what ``per`` says."""
        return cast(Tensor, self.value)

    @property
    def is_at_init(self) -> bool:
        """Whether the values are those of the constructor."""
        value = self.current.detach()
        return torch.allclose(value, torch.full_like(value, self.init), rtol=1e-4)

    def shrink(self, factor: float | Tensor) -> None:
        """Multiply the current values by ``factor < 1``."""
        self.assign(self.current.detach() * factor)

    @torch.no_grad()
    def assign(self, value: Tensor) -> None:
        """Set the current values, inside ``(0, max)``, in the shape they have."""
        if not bool(((value > 0) & (value < self.max)).all()):
            raise ValueError(f"step sizes must lie inside (0, {self.max:g}), got {value.tolist()}.")
        self.value = value.clone()

    def fill(self, value: float) -> None:
        """Set all current values to one number inside ``(0, max)``."""
        self.assign(torch.full_like(self.current.detach(), value))

    def forward(self, layout: Layout, num_steps: int) -> Tensor:
        """Values at every step and coordinate, ``(num_steps, size)``."""
        value = self.current
        if len(value) != self._length:  # PyroParam reads the parameter store, by name
            raise ValueError(
                f"this guide has {self._length} step sizes and Pyro's parameter store {len(value)}, another guide's: "
                "call pyro.clear_param_store() between guides, and go on with the newer one."
            )
        if self.per == "shared":
            return value.expand(num_steps, layout.size)
        if self.per == "step":
            return value.unsqueeze(-1).expand(num_steps, layout.size)
        return value[self._index].expand(num_steps, layout.size)

    def by_site(self, layout: Layout) -> Tensor | dict[str, Tensor]:
        """Current values: a tensor if shared or per step, else a dict from site to values."""
        value = self.current.detach().clone()
        if self.per in ("shared", "step"):
            return value.squeeze(-1) if self.per == "shared" else value
        if self.per == "site":
            return {s.name: value[i] for i, s in enumerate(layout.sites)}
        rows = value[self._index].expand(layout.rows, layout.size)
        return layout.unpack(rows)


def builtin_max(a: float, b: float) -> float:
    """``max`` is an argument above, as the design names it."""
    return a if a > b else b


def _number(value: Any) -> Any:
    """A float from anything that is one number (0-dim tensors, numpy scalars); anything else as it is."""
    try:
        return value if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError, RuntimeError):
        return value
