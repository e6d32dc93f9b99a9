"""What a run leaves: its end, its weight, and what happened on the way."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ..density.affine import Affine


@dataclass(frozen=True)
class RunInfo:
    """What happened in a run; per step and averaged over the rows that were still moving.

    ``log_density`` is ``log pi(u_k)`` per row (times ``full_size / size`` under subsampling) for k = 0..K;
    ``grad_norm`` and ``log_det`` are for k = 0..K-1 (``log_det`` is empty where log q was not asked for);
    ``step_size`` is ``(K, size)``. ``frozen`` marks rows ``(chains, rows)`` that met a non-finite state, gradient or
    determinant and stayed at their last finite state; ``singular`` marks rows in which some step was not invertible,
    so that their log q is not reliable. ``carried`` tells whether log q had the log-determinants of an earlier run
    (``tune_every``). ``acceptance`` is that of the last of the adjusted steps after the run, ``k_hat`` the Pareto shape
    of the weights by which draws were resampled; None where there were none.
    """

    log_density: Tensor
    grad_norm: Tensor
    log_det: Tensor
    step_size: Tensor
    frozen: Tensor
    singular: Tensor
    carried: bool = False
    acceptance: float | None = None
    k_hat: float | None = None

    @property
    def nonfinite(self) -> int:
        """Number of frozen rows."""
        return int(self.frozen.sum())

    @property
    def noninvertible(self) -> int:
        """Number of rows with a step that was not invertible."""
        return int(self.singular.sum())

    def __repr__(self) -> str:
        first, last = self.log_density[0].item(), self.log_density[-1].item()
        return (
            f"RunInfo(log density {first:.4g} -> {last:.4g} in {len(self.grad_norm)} steps, "
            f"{self.nonfinite} of {self.frozen.numel()} rows frozen, {self.noninvertible} with a singular step)"
        )


@dataclass(frozen=True)
class ShortRun:
    """A finished run: ``end`` is ``u_K``, ``increment`` the sum of log-weight increments, ``(chains, rows)``.

    ``landed`` is what :meth:`~pyro_shortrun.density.interface.Density.land` gives at the end, without gradients; None
    where it was not asked, or where some row did not get to its last proposal. ``states`` holds ``u_0 .. u_K`` as
    ``(K + 1, chains, rows, size)`` if it was asked for.
    """

    start: Tensor
    end: Tensor
    increment: Tensor
    info: RunInfo
    states: Tensor | None = None
    landed: tuple[Tensor, ...] | None = None

    def outside(self, frame: Affine) -> ShortRun:
        """A run in the coordinates of ``frame`` as one of ``u``."""
        scale, landed = frame.log_scale.detach(), self.landed
        return replace(
            self,
            start=frame.outward(self.start),
            end=frame.outward(self.end),
            info=replace(self.info, log_density=self.info.log_density - scale),
            states=None if self.states is None else frame.outward(self.states),
            landed=None if landed is None else (landed[0] - scale, *landed[1:]),
        )

    def every(self, count: int) -> ShortRun:
        """Only the first of every ``count`` chains; a draw is frozen where one of them is."""

        def some(rows: Tensor) -> Tensor:
            return rows.unflatten(0, (-1, count)).any(1)

        return replace(
            self,
            info=replace(self.info, frozen=some(self.info.frozen), singular=some(self.info.singular)),
            start=self.start[::count],
            end=self.end[::count],
            increment=self.increment[::count],
            states=None if self.states is None else self.states[:, ::count],
            landed=None if self.landed is None else tuple(t[::count] for t in self.landed),
        )
