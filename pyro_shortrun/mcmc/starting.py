"""Where the chains and short runs of a kernel start: as told, or by the rule of the guides."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..density.call import Binder, Call
from ..density.handlers import init_uniform
from ..density.program import Program
from ..density.structure import Structure, check_proper
from ..density.trust import is_random, row_names, rows_mix
from ..starts.fitted import Gaussian
from ..starts.prior import Prior
from ..starts.rule import default_start
from ..starts.start import Start

_LOGGER = logging.getLogger("pyro_shortrun")
_PROBES = 8


@dataclass(frozen=True)
class Starting:
    """How a kernel chooses its start.

    :param given: what the user chose, or None.
    :param otherwise: where nobody has chosen and no Gaussian is fitted.
    :param fits: whether a Gaussian may be fitted where nobody has chosen.
    """

    given: Start | None
    otherwise: Start
    fits: bool

    def __call__(self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, Start]:
        """The call of a model, its discrete sites summed out, and where to start in it."""
        program, start = Program(model, enumerates=True), self._without_rule
        # Improper priors cannot be drawn from; a start that does not draw from the prior need not.
        draws = isinstance(start, Prior) and not self._asks_rule
        reading = program.draw(args, kwargs, init=None if draws else init_uniform)

        def admit(structure: Structure) -> Structure:
            nonlocal start
            by_rule = default_start(structure, bool(reading.subsampled), program.hides) if self._asks_rule else start
            start = by_rule if isinstance(by_rule, Gaussian) else start
            return start.arrange(structure)

        call = replace(Binder(program)(reading, args, kwargs, admit=admit), spare=[])
        if isinstance(start, Prior):
            check_proper(reading)
        return _with_true_rows(call, start), self._fitted(start, call)

    @property
    def _asks_rule(self) -> bool:
        return self.given is None and self.fits

    @property
    def _without_rule(self) -> Start:
        """A start of its own, if it is fitted: another run may be of other data."""
        start = self.otherwise if self.given is None else self.given
        return copy.deepcopy(start) if isinstance(start, Gaussian) and not start.is_fitted else start

    def _fitted(self, start: Start, call: Call) -> Start:
        if not isinstance(start, Gaussian) or start.is_fitted:
            return start
        if call.reading.subsampled:
            name = next(iter(call.reading.subsampled))
            raise ValueError(f"plate '{name}' shows a mini-batch, to which start=Gaussian() would be fitted: use Init.")
        try:
            start.pretrain(call)
        except ValueError as reason:
            if self.given is not None:
                raise
            _LOGGER.warning("no Gaussian to start from (%s): starting as Pyro's kernels do.", reason)
            self.otherwise.setup(call.density)
            return self.otherwise
        return start


def _with_true_rows(call: Call, start: Start) -> Call:
    """The call, with all latents in one row where elements of a plate influence each other in spite of the plate."""
    start.setup(call.density)
    states = start.draw(call, _PROBES).state.detach()
    if is_random(call.model, states) or not rows_mix(call.model, states):
        return call
    _LOGGER.warning(
        "elements of plate %s influence each other's log density although a plate declares them independent: they "
        "are moved, and accepted, together.",
        row_names(call.model.layout),
    )
    return call.jointly()
