"""Chains under way: what :class:`~pyro_shortrun.kernel.ShortRunLangevin` and VectorizedMCMC advance draw by draw."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer.autoguide.initialization import init_to_uniform
from torch import Tensor

from .interop import ordinary_autograd
from .sampler import PotentialTarget, Sampler, State, Stats, Target, Walk
from .start import Call
from .transforms import same_transform


@dataclass(frozen=True)
class DrawStats:
    """Statistics of every kept draw, ``{name: (num_samples,)}``: ``lp`` (log density in unconstrained space, up to a
    constant), ``acceptance_rate``, ``grad_norm``, ``step_size``, ``nonfinite`` (proposals, or rows of a short run, that
    were not finite)."""

    values: Mapping[str, Tensor]

    def __repr__(self) -> str:
        length = len(next(iter(self.values.values()))) if self.values else 0
        return f"DrawStats({', '.join(self.values)}: {length} draws)"


class Names:
    """Between states and what Pyro calls params: unconstrained, except where no fixed transform exists."""

    def __init__(self, target: Target, given: Mapping[str, Any] | None) -> None:
        self.target = target
        self.transforms = dict(given or {}) if isinstance(target, PotentialTarget) else self._fixed(target.call)  # type: ignore[attr-defined]
        names = [s.name for s in target.density.layout.sites]
        self._moving = [] if isinstance(target, PotentialTarget) else [k for k in names if k not in self.transforms]

    @staticmethod
    def _fixed(call: Call) -> dict[str, Any]:
        """Transforms to unconstrained space of the sites whose support is the same in two draws."""
        bind = call.bind
        other = call.program.draw(bind.args, bind.kwargs, bind.indices, bind.given, init_to_uniform).transforms
        return {k: t.inv for k, t in call.reading.transforms.items() if same_transform(t, other[k])}

    def params(self, u: Tensor) -> dict[str, Tensor]:
        """``(chains, *shape)`` by site."""
        values = self.target.density.layout.unpack(u)
        if self._moving:
            constrained = self.target.constrain(u)
            values = {k: constrained[k] if k in self._moving else v for k, v in values.items()}
        return values

    def state(self, params: Mapping[str, Tensor]) -> Tensor:
        """The reverse of :meth:`params`."""
        self._check(params)
        if not self._moving:
            return self.target.density.layout.pack(params)
        values = {k: self.transforms[k].inv(v) if k in self.transforms else v for k, v in params.items()}
        count = len(next(iter(values.values())))
        density = self.target.density
        states = [density.unconstrain({k: v[i] for k, v in values.items()}) for i in range(count)]  # type: ignore[attr-defined]
        return torch.stack(states)

    def _check(self, params: Mapping[str, Tensor]) -> None:
        layout = self.target.density.layout
        wanted = {k: tuple(v.shape) for k, v in layout.unpack(torch.zeros(layout.rows, layout.size)).items()}
        for name, shape in wanted.items():
            if name not in params:
                raise ValueError(f"initial_params lack the site '{name}'.")
            if name not in self._moving and tuple(params[name].shape[1:]) != shape:
                raise ValueError(
                    f"initial_params['{name}'] has shape {tuple(params[name].shape)} but must be "
                    f"(num_chains, *{shape}), in unconstrained space."
                )


class Session:
    """Chains under way: a sampler, its state, and the statistics of every kept draw."""

    def __init__(self, sampler: Sampler, warmup_steps: int, names: Names) -> None:
        self.sampler, self.warmup_steps, self._names = sampler, warmup_steps, names
        self.done = 0  # draws, warm-up included
        self._stats: list[Stats] = []
        self._accept = 0.0
        self._warned = False
        self.state: State

    @property
    def transforms(self) -> dict[str, Any]:
        """From constrained to unconstrained space, for sites whose support is fixed."""
        return self._names.transforms

    @property
    def target(self) -> Target:
        """What is sampled."""
        return self.sampler.target

    def check_vectorizes(self, u: Tensor | None, params: Mapping[str, Tensor] | None) -> None:
        """Refuse a model that cannot be vectorised over chains, naming the operation."""
        if u is None:
            u = self._names.state(params or {})[:2]
        self.target.current(len(u)).require_vectorization(u)

    def begin(self, num_chains: int, params: Mapping[str, Tensor] | None) -> None:
        """Put the chains where they start."""
        if params is None:
            self.state = self.sampler.fresh(num_chains)
        else:
            self.move_to(params)

    def move_to(self, params: Mapping[str, Tensor]) -> None:
        """Go on from other values.

        :raises ValueError: where the log density is not finite there.
        """
        state = self.sampler.evaluate(self._names.state(params).detach())
        if not state.log_density.isfinite().all():
            raise ValueError("the log density is not finite at the initial_params given.")
        self.state = state

    def params(self) -> dict[str, Tensor]:
        """Values of the only chain."""
        return {k: v[0] for k, v in self._names.params(self.state.u).items()}

    def all_params(self) -> dict[str, Tensor]:
        """Values of all chains."""
        return self._names.params(self.state.u)

    def draw(self) -> None:
        """One draw of every chain."""
        warming = self.done < self.warmup_steps
        with ordinary_autograd():
            self.state, stats = self.sampler.draw(self.state, warming)
        self.done += 1
        self._accept = stats["acceptance_rate"].mean().item()
        self._warn_once(stats)
        if not warming:
            self._stats.append(stats)
        self._last = stats

    def _warn_once(self, stats: Stats) -> None:
        adjusted = isinstance(self.sampler, Walk) and self.sampler.adjust
        if not self._warned and not adjusted and (stats["nonfinite"] > 0).any():
            self._warned = True
            bad = stats["nonfinite"] > 0
            warnings.warn(
                f"{int(bad.sum())} of {len(bad)} chains met a non-finite density or gradient and stay at their last "
                "finite state (counted in the statistic 'nonfinite'; this warning is shown once). Use a smaller "
                "step_size, or adjust=True.",
                stacklevel=4,
            )

    def logging(self) -> OrderedDict:
        """For progress bars."""
        size = self._last["step_size"][0].item() if self.done else float("nan")
        return OrderedDict([("step size", f"{size:.2e}"), ("acc. prob", f"{self._accept:.3f}")])

    def stats(self) -> Stats:
        """Statistics of the kept draws, ``(chains, draws)``."""
        if not self._stats:
            return {k: torch.zeros(len(self.state.u), 0) for k in ("lp", "acceptance_rate", "nonfinite")}
        return {k: torch.stack([s[k] for s in self._stats], 1) for k in self._stats[0]}

    def state_dict(self) -> dict:
        """Everything a continued run needs: tensors, numbers, lists and dicts."""
        state = {k: getattr(self.state, k).clone() for k in ("u", "log_density", "grad")}
        return {"done": self.done, "state": state, "stats": self.stats(), "sampler": self.sampler.state_dict()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.done, self.state = saved["done"], State(**saved["state"])
        self.sampler.load_state_dict(saved["sampler"])
        kept = max(self.done - self.warmup_steps, 0)
        self._stats = [{k: v[:, i] for k, v in saved["stats"].items()} for i in range(kept)]
        if self._stats:
            self._last = self._stats[-1]
