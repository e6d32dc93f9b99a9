"""The course of a run's log density, where it cannot be right."""

from __future__ import annotations

from .record import RunInfo

_NATS, _NATS_EACH = 100.0, 10.0  # of a row, and for each of its coordinates: no stationary run moves so far
_PARTS, _MOST = 4, 0.5  # more than half of a rise in the last quarter of the steps


def reasonable(size: int) -> float:
    """Nats by which the log density of a row with so many coordinates may change in a run."""
    return _NATS + _NATS_EACH * size


def astray(info: RunInfo, weight: float = 1.0) -> str | None:
    r"""What is wrong with a run in which no row froze, in sentences, by its log density; None if nothing is seen.

    With ``l_k`` the mean log density at step k and ``c = 100 + 10 d`` nats, of rows with ``d`` coordinates:

    * ``l_0 - l_K > c``: steps are too large. From wherever a stable run starts, even from the mode, it falls by about
      ``d / 2``.
    * ``l_K - l_0 > c``, more than half of it in the last quarter of the steps (three quarters in the last of two):
      ascent that speeds up to its end. Towards a maximum it slows down.

    :param weight: how many rows each row stands for, under subsampling.
    """
    if info.frozen.any():  # told already, and means are over fewer and fewer rows
        return None
    levels = (info.log_density / weight).tolist()
    limit = reasonable(info.step_size.shape[-1])
    change, last = levels[-1] - levels[0], max(1, (len(levels) - 1) // _PARTS)
    if -change > limit:
        return (
            f"the log density falls along the runs, by {-change:.3g} nats a row: the step size, "
            f"{info.step_size.max().item():.2g}, is too large, and neither draws nor loss are of use. Lower it."
        )
    gain, share = levels[-1] - levels[-1 - last], last / (len(levels) - 1)
    if change > limit and gain > max(_MOST, 1.5 * share) * change:
        return (
            f"the log density rises along the runs, by {change:.3g} nats a row, and ever faster, by {gain:.3g} in the "
            f"last {share:.0%} of the steps: it has no upper bound (a pyro.factor of the wrong sign?), and then "
            "neither draws nor loss are of use; or the runs end far from where they go: take more steps, or "
            "start=Gaussian()."
        )
    return None
