"""What chains sample: a density with its start, and the names of its coordinates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..compile.compiler import Compiler
from ..compile.executor import density_of
from ..density.affine import Affine, AffineDensity
from ..density.call import Call
from ..density.handlers import init_uniform
from ..density.interface import Density
from ..density.potential import PotentialDensity
from ..density.transforms import same_transform
from ..starts.finite import CHECK_GRADIENT, redrawn, require_finite
from ..starts.fitted import Gaussian
from ..starts.start import Start, StartDraw

_TRIES = 100
_CONSTRAIN_AT_ONCE = 4096  # draws


class Target(ABC):
    """What is sampled, and from where."""

    density: Density
    frame: Affine | None = None  # coordinates that the states are in, if they are not those of unconstrained space

    @property
    def log_scale(self) -> float:
        """``log |du/dv|`` of these coordinates."""
        return 0.0 if self.frame is None else self.frame.log_scale.item()

    def outward(self, states: Tensor) -> Tensor:
        """States in unconstrained space."""
        return states if self.frame is None else self.frame.outward(states)

    def inward(self, u: Tensor) -> Tensor:
        """States of unconstrained space in the coordinates of the chains."""
        return u if self.frame is None else self.frame.inward(u)

    def move_in(self, frame: Affine | None) -> None:
        """Let states be in other coordinates from now on.

        :raises ValueError: where there can be none.
        """
        if frame is not None:
            raise ValueError("the saved chains began at a fitted Gaussian, and these cannot: use the same kernel.")

    @property
    def has_density(self) -> bool:
        """Whether the density of the start is known, so that there is a bound to tune by."""
        return True

    @property
    def is_subsampled(self) -> bool:
        """Whether the density is that of a random mini-batch."""
        return False

    @property
    def has_loops(self) -> bool:
        """Whether many steps are one graph, whose shapes are best always the same."""
        return False

    def plain(self) -> Density:
        """The density without graphs."""
        return self.density

    def current(self, chains: int) -> Density:
        """The density for the next evaluation; on a fresh mini-batch per chain where the model subsamples."""
        return self.density

    @abstractmethod
    def start(self, chains: int) -> StartDraw:
        """Finite start states."""

    def require_finite(self, finite: Tensor, u: Tensor, what: str) -> None:
        """Refuse states at which something is not ``finite``, ``(chains, rows)``, naming a site if there are any."""
        if not finite.all():
            raise ValueError(f"{what}: {CHECK_GRADIENT}.")

    @abstractmethod
    def constrain(self, u: Tensor, at_once: int | None = None) -> dict[str, Tensor]:
        """Site values ``(chains, *shape)`` of states, computed ``at_once`` states at a time."""

    @property
    @abstractmethod
    def transforms(self) -> dict[str, Any]:
        """From constrained to unconstrained space, by site, where the map is the same in all draws."""

    def params(self, u: Tensor) -> dict[str, Tensor]:
        """States as what Pyro calls params: ``(chains, *shape)`` by site, in unconstrained space."""
        return self.density.layout.unpack(self.outward(u))

    def states(self, params: Mapping[str, Tensor]) -> Tensor:
        """The reverse of :meth:`params`.

        :raises ValueError: where a site is missing or has another shape.
        """
        layout = self.density.layout
        check_params(params, {s.name: tuple(s.shape) for s in layout.sites}, self.density.structure.device)
        return self.inward(layout.pack(params))


class ModelTarget(Target):
    """A Pyro model's log joint.

    :raises NotImplementedError: where a latent lies in a subsampled plate.
    """

    def __init__(self, call: Call, start: Start, compiler: Compiler | None = None) -> None:
        self._start, self._subsampled, self.call = start, call.reading.subsampled, call
        self.frame = start.frame
        self.use(compiler)
        local = [s.name for s in self.density.layout.sites if s.scale != 1]
        if local:
            raise NotImplementedError(
                f"latent site '{local[0]}' lies in a subsampled plate, and a chain keeps one state per element: use "
                "the full plate, or ShortRunGuide for local latents in mini-batches."
            )
        self._transforms = _fixed_transforms(call)

    def use(self, compiler: Compiler | None) -> None:
        """Let these graphs be used from now on."""
        self._compiler = compiler
        self.call = replace(self.call, density=density_of(self.call.model, compiler))
        self.move_in(self.frame)

    @property
    def has_loops(self) -> bool:
        compiler = self._compiler
        return compiler is not None and compiler.backend.takes_loops and not (self._subsampled or compiler.is_eager)

    @property
    def has_graphs(self) -> bool:
        """Whether there is a compiler."""
        return self._compiler is not None

    @property
    def is_untraceable(self) -> bool:
        """Whether a compiler has given up."""
        return self._compiler is not None and self._compiler.is_eager

    def move_in(self, frame: Affine | None) -> None:
        known = frame is self.frame or (frame is not None and frame.is_equal(self.frame))
        if not known and frame is not None and isinstance(self._start, Gaussian):
            self._start = self._start.at(frame)
        self.frame, self.density = frame, self._inside(frame, self.call.density)

    @staticmethod
    def _inside(frame: Affine | None, density: Density) -> Density:
        return density if frame is None else AffineDensity(density, frame)

    def plain(self) -> Density:
        return self._inside(self.frame, self.call.model)

    @property
    def transforms(self) -> dict[str, Any]:
        return self._transforms

    @property
    def _moving(self) -> set[str]:
        """Sites whose support depends on other sites: their params are site values."""
        return {s.name for s in self.density.layout.sites} - set(self._transforms)

    def params(self, u: Tensor) -> dict[str, Tensor]:
        values = super().params(u)
        return (
            {**values, **{k: v for k, v in self.constrain(u).items() if k in self._moving}} if self._moving else values
        )

    def states(self, params: Mapping[str, Tensor]) -> Tensor:
        if not self._moving:
            return super().states(params)
        shapes = {s["name"]: tuple(s["value"].shape) for s in self.call.reading.latents if s["name"] in self._moving}
        free = {k: tuple(v.shape) for k, v in self.call.reading.unconstrained.items()}
        check_params(params, {**free, **shapes}, self.density.structure.device)
        values = {k: self._transforms[k].inv(v) if k in self._transforms else v for k, v in params.items()}
        chains = [dict(zip(values, one, strict=True)) for one in zip(*values.values(), strict=True)]
        return self.inward(torch.stack([self.call.model.unconstrain(one) for one in chains]))

    @property
    def has_density(self) -> bool:
        return self._start.has_density

    @property
    def is_subsampled(self) -> bool:
        return bool(self._subsampled)

    def current(self, chains: int) -> Density:
        if not self._subsampled:
            return self.density
        device = self.density.structure.device
        draws = {k: _batches(chains, full, size, device) for k, (full, size) in self._subsampled.items()}
        return density_of(replace(self.call.model, batches=draws), self._compiler)

    def start(self, chains: int) -> StartDraw:
        first = self._start.draw(self.call, chains)
        drawn = redrawn(first, lambda one: ~one.finite, self._again, _TRIES)
        what = "the model's log density is not finite at the start of a chain"
        require_finite(drawn.finite, self.call.model, drawn.state, what)
        self.call.density.expect(drawn.state, drawn.log_density)
        return self._framed(drawn, first).detached()

    def _framed(self, drawn: StartDraw, first: StartDraw) -> StartDraw:
        """The draw in the coordinates that the chains move in."""
        if self.frame is None:
            return drawn
        base, scale = None if first.framed is None else first.framed.base, self.frame.log_scale
        return StartDraw(self.inward(drawn.state), drawn.log_q + scale, drawn.log_density + scale, base)

    def require_finite(self, finite: Tensor, u: Tensor, what: str) -> None:
        require_finite(finite, self.call.model, self.outward(u), what, CHECK_GRADIENT)

    def _again(self, drawn: StartDraw, bad: Tensor) -> StartDraw:
        return self._start.draw(self.call, len(bad)).where(bad, drawn)

    def constrain(self, u: Tensor, at_once: int | None = None) -> dict[str, Tensor]:
        with torch.no_grad():
            parts = [
                self.call.model.constrain(part)[0] for part in self.outward(u).split(at_once or _CONSTRAIN_AT_ONCE)
            ]
        return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}


def _fixed_transforms(call: Call) -> dict[str, Any]:
    bind = call.bind
    other = call.program.draw(bind.args, bind.kwargs, bind.indices, bind.given, init_uniform).transforms
    return {k: t.inv for k, t in call.reading.transforms.items() if same_transform(t, other[k])}


def check_params(params: Mapping[str, Tensor], shapes: Mapping[str, tuple[Any, ...]], device: torch.device) -> None:
    """Refuse initial params that are not ``(chains, *shape)`` floating-point tensors of just these sites there."""
    unknown = sorted(set(params) - set(shapes))
    if unknown:
        raise ValueError(f"initial_params name '{unknown[0]}', which is not one of the sites {sorted(shapes)}.")
    for name, shape in shapes.items():
        if name not in params:
            raise ValueError(f"initial_params lack the site '{name}'.")
        if not (isinstance(params[name], Tensor) and params[name].is_floating_point()):
            raise ValueError(f"initial_params['{name}'] must be a floating-point tensor, got {params[name]!r}.")
        if tuple(params[name].shape[1:]) != shape:
            raise ValueError(
                f"initial_params['{name}'] has shape {tuple(params[name].shape)} but must be "
                f"(num_chains, *{shape}), in unconstrained space."
            )
        if params[name].device != device:
            raise ValueError(
                f"initial_params['{name}'] is on {params[name].device} and the model's latents are on {device}: "
                "move it there."
            )


def _batches(chains: int, full: int, size: int, device: torch.device) -> Tensor:
    """Independent subsamples without replacement, ``(chains, size)``."""
    return torch.rand(chains, full, device=device).topk(size).indices


class PotentialTarget(Target):
    """A ``potential_fn``; runs start at ``N(initial, 1)`` in unconstrained space.

    :param transforms: from constrained to unconstrained space, by name.
    """

    def __init__(
        self, potential_fn: Callable[..., Any], initial: Mapping[str, Tensor], transforms: Mapping[str, Any] | None
    ) -> None:
        self._transforms = dict(transforms or {})
        one = {k: v[0] for k, v in initial.items()}
        self.density = PotentialDensity(potential_fn, one)
        self._center = self.density.layout.pack(initial)

    @property
    def transforms(self) -> dict[str, Any]:
        return self._transforms

    def start(self, chains: int) -> StartDraw:
        base = torch.distributions.Normal(self._center, 1.0)
        u = base.sample()
        value = self.density(u)
        if not value.isfinite().all():
            raise ValueError("potential_fn is not finite at a start drawn from N(initial_params, 1).")
        return StartDraw(u, base.log_prob(u).sum(-1), value.detach())

    def constrain(self, u: Tensor, at_once: int | None = None) -> dict[str, Tensor]:
        values = self.density.layout.unpack(u)
        return {k: self._transforms[k].inv(v) if k in self._transforms else v for k, v in values.items()}
