"""The first run of the model in a call, from which the call is read, and what is known from it."""

from __future__ import annotations

from ..density.call import Call
from ..density.handlers import init_uniform
from ..density.program import Invocation, Reading
from ..density.recall import Recall
from ..density.structure import check_proper
from ..starts.from_guide import FromGuide
from ..starts.start import Start


def reading_ahead(start: Start, draw: Invocation) -> Reading | None:
    """A run of the model at a draw from the start, which is then the run's own; None where the start has no such."""
    return start.ahead(draw) if isinstance(start, FromGuide) else None


def recalled(call: Call) -> Recall:
    """The log density of a call that is not asked where its first run has told it, and its last one will."""
    return Recall(call.model, call.reading if call.reading.origin is not None else None)


def read_from_prior(draw: Invocation, required: bool) -> Reading:
    """One run of the model, its latents drawn from the prior.

    :param required: whether a model with a prior that cannot be drawn from is refused, and not read elsewhere.
    """
    try:
        return draw()
    except NotImplementedError:
        reading = draw(init_uniform)
        if not required:
            return reading
        check_proper(reading)
        raise
