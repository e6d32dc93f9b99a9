"""A session: the chains of one run of MCMC under way, what they have told so far, and how that is saved."""

from __future__ import annotations

import time
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..density.affine import Affine
from ..tensors import moved, ordinary_autograd
from .pace import Pace, Stage
from .sampler import ChainState, Sampler, Stats
from .target import ModelTarget, Target


@dataclass(frozen=True)
class DrawStats:
    """Statistics of every kept draw, ``{name: (num_samples,)}``: ``lp`` (log density in unconstrained space, up to a
    constant), ``acceptance_rate``, ``grad_norm``, ``step_size``, ``nonfinite`` (proposals, or rows of a short run, that
    were not finite)."""

    values: Mapping[str, Tensor]

    def __repr__(self) -> str:
        length = len(next(iter(self.values.values()))) if self.values else 0
        return f"DrawStats({', '.join(self.values)}: {length} draws)"


class StatsRecord:
    """The statistics of a session's kept draws, and of the last draw of all."""

    def __init__(self) -> None:
        self._kept: list[Stats] = []
        self._last: Stats | None = None

    def add(self, stats: Stats, kept: bool) -> None:
        """Statistics of one more draw."""
        if kept:
            self._kept.append(stats)
        self._last = stats

    def forget_after(self, kept: int) -> None:
        """Drop all but those of so many kept draws."""
        del self._kept[kept:]

    def table(self, chains: int) -> Stats:
        """Those of kept draws, ``(chains, draws)``."""
        if not self._kept:
            return {k: torch.zeros(chains, 0) for k in ("lp", "acceptance_rate", "nonfinite")}
        return {k: torch.stack([s[k] for s in self._kept], 1) for k in self._kept[0]}

    def load(self, table: Stats, kept: int) -> None:
        """Go on from :meth:`table`."""
        self._kept = [{k: v[:, i] for k, v in table.items()} for i in range(kept)]
        if self._kept:
            self._last = self._kept[-1]

    def short(self) -> OrderedDict[str, Any]:
        """The last draw's, for progress bars."""
        if self._last is None:
            return OrderedDict()
        size, accept = self._last["step_size"][0].item(), self._last["acceptance_rate"].mean().item()
        return OrderedDict([("step size", f"{size:.2e}"), ("acc. prob", f"{accept:.3f}")])


class Session:
    """Chains under way: a sampler, its state, and the statistics of every kept draw.

    :param stages: graphs that may be taken up on the way.
    """

    def __init__(self, sampler: Sampler, warmup_steps: int, stages: Sequence[Stage] = ()) -> None:
        self.sampler, self.warmup_steps = sampler, warmup_steps
        self.total: int | None = None  # draws that are wanted, warm-up included, where that is known
        target = sampler.target
        self._pace = Pace(target, stages, self._expect) if isinstance(target, ModelTarget) and stages else None
        self.done = 0  # draws, warm-up included
        self.record = StatsRecord()
        self._warned = False
        self.state: ChainState

    @property
    def target(self) -> Target:
        """What is sampled."""
        return self.sampler.target

    def check_vectorizes(self, u: Tensor | None, params: Mapping[str, Tensor] | None) -> None:
        """Refuse a model that cannot be vectorised over chains, naming the operation."""
        if u is None:
            u = self.target.states(params or {})[:2]
        self.target.current(len(u)).require_vectorization(u)

    def begin(self, num_chains: int, params: Mapping[str, Tensor] | None) -> None:
        """Put the chains where they start."""
        if params is None:
            self.state = self.sampler.fresh(num_chains)
        else:
            self.move_to(params)

    def move_to(self, params: Mapping[str, Tensor]) -> None:
        """Go on from other values.

        :raises ValueError: where the log density, or its gradient, is not finite there.
        """
        state = self.sampler.evaluate(self.target.states(params).detach())
        if not (state.log_density.isfinite().all() and state.grad.isfinite().all()):
            raise ValueError("the log density, or its gradient, is not finite at the initial_params given.")
        self.state = state

    def params(self) -> dict[str, Tensor]:
        """Values of the only chain."""
        return {k: v[0].clone() for k, v in self.target.params(self.state.u).items()}  # hooks may write into them

    def all_params(self) -> dict[str, Tensor]:
        """Values of all chains."""
        return {k: v.clone() for k, v in self.target.params(self.state.u).items()}

    def draw(self, most: int = 1) -> list[Tensor]:
        """At least one and at most so many draws of every chain, all of the warm-up or none: their states."""
        warming, began = self.done < self.warmup_steps, time.perf_counter()
        with ordinary_autograd():
            drawn = self.sampler.draws(self.state, most, warming)
        for state, stats in drawn:
            self._warn_once(state, stats, warming)
            self.record.add(stats, kept=not warming)
        self.state = drawn[-1][0]
        self.done += len(drawn)
        if self._pace is not None:
            left = None if self.total is None else self.total - self.done
            self._pace(time.perf_counter() - began, len(drawn), left)
        return [state.u for state, _ in drawn]

    def _expect(self) -> None:
        self.target.density.expect(self.state.u, self.state.log_density)

    def forget_after(self, kept: int) -> None:
        """Drop what was noted of draws beyond so many kept ones: an interrupt may come before a draw is kept."""
        self.record.forget_after(kept)
        self.done = min(self.done, self.warmup_steps + kept)

    def _warn_once(self, state: ChainState, stats: Stats, warming: bool) -> None:
        fault = None if self._warned else self.sampler.fault(state, stats, warming)
        if fault is not None:
            self._warned = True
            warnings.warn(f"{fault} (This warning is shown once.)", stacklevel=4)

    def stats(self) -> Stats:
        """Statistics of the kept draws, ``(chains, draws)``."""
        return self.record.table(len(self.state.u))

    def state_dict(self) -> dict[str, Any]:
        """Everything a continued run needs: tensors, numbers, lists and dicts."""
        state = {k: v.clone() for k, v in self.state.tensors().items()}
        return {
            "kind": self.sampler.kind,
            "done": self.done,
            "state": state,
            "frame": None if self.target.frame is None else vars(self.target.frame),
            "stats": self.stats(),
            "sampler": self.sampler.state_dict(),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        :raises ValueError: where the sampler or the dtype is another one, or the density at the saved state is not the
            saved one.
        """
        if saved["kind"] != self.sampler.kind:
            raise ValueError(
                f"the saved run is of {saved['kind']}, this one of {self.sampler.kind}: use the same kernel."
            )
        if saved["state"]["u"].shape != self.state.u.shape:
            raise ValueError("the saved chains have another shape than this model's; resume with the same model.")
        if saved["state"]["u"].dtype != self.state.u.dtype:
            raise ValueError(
                f"the saved chains are {saved['state']['u'].dtype}, this model's latents {self.state.u.dtype}: resume "
                "with the same dtype."
            )
        device, frame = self.state.u.device, saved.get("frame")
        if frame is None and self.target.frame is not None:
            raise ValueError("the saved chains did not begin at a fitted Gaussian: use the same kernel, and start=.")
        self.target.move_in(None if frame is None else Affine(**moved(frame, device)))
        state = ChainState(**moved(saved["state"], device))
        here = self.sampler.evaluate(state.u).log_density
        if not (self.target.is_subsampled or torch.allclose(here, state.log_density, rtol=1e-3, atol=1e-3)):
            raise ValueError("the saved chains have another log density here: resume with the same model and data.")
        self.done, self.state = saved["done"], state
        self.sampler.load_state_dict(saved["sampler"])
        self.record.load(moved(saved["stats"], device), max(self.done - self.warmup_steps, 0))
