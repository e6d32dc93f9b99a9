"""When graphs pay for chains, where nobody has said whether to compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..compile.compiler import Compiler
from ..compile.inductor import Inductor, Scripted
from .target import ModelTarget

_DRAWS = 3  # which take as long as to trace a transition, where that is long


@dataclass(frozen=True)
class Stage:
    """A kind of graphs, taken up where what is left takes more than ``price`` seconds without it."""

    compiler: Compiler
    price: float


def stages() -> list[Stage]:
    """What there is: graphs that Python does not run, ready in some tenths of a second, and compiled loops, which take
    some ten to thirty."""
    return [Stage(Compiler(Scripted(), asked=False), 0.5), Stage(Compiler(Inductor(), asked=False), 30.0)]


class Pace:
    """Goes on to the next kind of graphs when the draws that are left take longer than to make it.

    Where it is not known how many are left, as many as there were: at worst, everything takes twice its time.

    :param expect: told when the graphs are others, so that they are checked.
    """

    def __init__(self, target: ModelTarget, stages: Sequence[Stage], expect: Callable[[], None]) -> None:
        self._target, self._stages, self._expect = target, list(stages), expect
        self._seconds, self._draws, self._skips = 0.0, 0, False

    def __call__(self, seconds: float, draws: int, left: int | None) -> None:
        """Told of some more draws, and how many are left.

        The first after a change, which made graphs, do not count.
        """
        if not self._stages:
            return
        if self._skips:
            self._skips = False
            return
        self._seconds, self._draws = self._seconds + seconds, self._draws + draws
        each = self._seconds / self._draws
        ahead = self._seconds if left is None else each * left
        if ahead > self._stages[0].price + _DRAWS * each:
            self._go_on()

    def _go_on(self) -> None:
        compiler = self._stages.pop(0).compiler
        if self._target.is_untraceable:
            self._stages.clear()
            return
        self._seconds, self._draws, self._skips = 0.0, 0, True
        self._target.use(compiler)
        self._expect()
