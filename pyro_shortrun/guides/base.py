"""DensityGuide: what guides share that draw latents by the model's own log density."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from ..checks import warn_if_stored
from ..compile.compiler import Compiler
from ..compile.executor import density_of
from ..density.call import Binder, Call
from ..density.handlers import init_uniform
from ..density.interface import Density
from ..density.program import Invocation, Program, Reading
from ..density.structure import Structure, check_data, check_latents, check_shapes, missing_data
from ..density.trust import warn_if_rows_mix
from ..tensors import ordinary_autograd, plain
from .draws import check_levels
from .emit import values_of_other_parts
from .lists import draws_of_part, keep_values
from .memory import Arguments, Memory
from .pickling import without_model
from .plates import check_plates, create_given, create_missing
from .summary import summary

_QUANTILE_DRAWS = 1000
_DRAWS_OF_LISTS = 200
_Guide = TypeVar("_Guide", bound="DensityGuide")


class DensityGuide(AutoGuide):
    """A guide for ``model`` that binds its log density in every call. Subclasses say how they draw.

    (Its many methods: eleven are a user's, or Pyro's of its AutoGuides, and five are what subclasses say.)

    :param model: a Pyro model, looked at through its ``poutine.block`` wrappers.
    :param compile: whether the density is traced and compiled.
    :param create_plates: as in :class:`~pyro.infer.autoguide.AutoGuide`, for subsampling.
    """

    def __init__(self, model: Callable[..., Any], *, compile: bool, create_plates: Callable[..., Any] | None) -> None:
        check_plates(create_plates)
        super().__init__(model, create_plates=create_plates)
        self._binder: Binder | None = Binder(Program(model))
        self._first: Structure | None = None
        self._conditioned: Arguments | None = None
        self._memory = Memory()
        self._compiler = Compiler() if compile else None

    # ---------------------------------------------------------------- what subclasses say

    def sample_posterior(
        self, *args: Any, num_samples: int = 1000, num_chains: int = 1, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Draws, dict from site to ``(num_chains, num_samples, *site shape)``."""
        raise NotImplementedError

    @property
    def _reads_prior(self) -> bool:
        """Whether :meth:`_read` draws from the model's prior."""
        return False

    def _read(self, draw: Invocation) -> Reading:
        """One run of the model, ``draw(init)``, from which a call's shapes, plates and subsamples are read."""
        return draw(init_uniform)

    def _density(self, call: Call) -> Density:
        """What runs evaluate."""
        return density_of(call.model, self._compiler)

    def _admit(self, structure: Structure) -> Structure:
        """Refuse latents that this guide cannot draw; otherwise the structure with the rows that it wants."""
        check_latents(self._first, structure, needs_log_q=True)
        return structure

    def _begin(self, call: Call) -> None:
        """Told the very first call."""
        return None

    def _prepare(self, call: Call) -> None:
        """Told every call; creates parameters where they are missing."""
        return None

    def _given_plates(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, pyro.plate]:
        """Plates that a call begins with, by name."""
        return create_given(self, args, kwargs)

    @property
    def master(self) -> Any:
        """Weak reference to the ``AutoGuideList`` that this guide is a part of, which is then traced."""
        return self.__dict__.get("_master")

    @master.setter
    def master(self, reference: Any) -> None:
        self.__dict__["_master"] = reference
        if reference is not None:
            keep_values(reference())

    # ---------------------------------------------------------------- what a user calls

    def setup(self: _Guide, *args: Any, **kwargs: Any) -> _Guide:
        """Create every parameter now, so that optimisers, ``state_dict``, DDP and ``ELBOModule`` see them.

        :return: the guide itself.
        """
        self._memory.note(self.call(args, kwargs).bind, training=False)
        return self

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The model bound to arguments, and nothing drawn; for exporters."""
        with ordinary_autograd(), poutine.block(), self._pyro_context:
            return self._bind(args, kwargs)

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Posterior medians, estimated from 1000 draws (there is no closed form)."""
        return {k: v.squeeze(0) for k, v in self.quantiles([0.5], *args, **kwargs).items()}

    def quantiles(self, quantiles: Sequence[float], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Posterior quantiles, estimated from 1000 draws (there is no closed form); of a part of an ``AutoGuideList``
        that needs the values of other parts, from 200 calls of the list.

        :param quantiles: numbers between 0 and 1.
        :return: dict from site to ``(len(quantiles), *site shape)``.
        """
        check_levels(quantiles)
        if self.master is not None and self._binder is not None and self._binder.program.hides:
            draws = draws_of_part(self, _DRAWS_OF_LISTS, args, kwargs)
        else:
            chains = self.sample_posterior(*args, num_samples=_QUANTILE_DRAWS, **kwargs)
            names = {s.name for s in self._first.layout.sites} if self._first else set(chains)
            draws = {k: v[0] for k, v in chains.items() if k in names}
        levels = torch.as_tensor(quantiles)
        return {k: v.quantile(levels.to(v), dim=0) for k, v in draws.items()}

    def summary(self, *args: Any, num_samples: int = 1000, prob: float = 0.9, **kwargs: Any) -> None:
        """Print means, deviations, medians and intervals, and how far to trust them: the acceptance of adjusted steps,
        and the Pareto k of runs, where there are such."""
        print(summary(self, args, kwargs, num_samples, prob))

    def condition_on(self: _Guide, *args: Any, **kwargs: Any) -> _Guide:
        """Keep these model arguments for all later calls, whatever arguments those have.

        The posterior depends on the data, and ``Predictive(model, guide=guide)`` on new inputs passes *its* arguments
        to the guide. Where all training calls had the same arguments, the guide remembers them, and takes them for a
        call in which data are missing; where they differed (mini-batches), this says what to condition on.

        :return: the guide itself. See :meth:`forget`.
        """
        self._conditioned = (args, kwargs)
        return self

    def forget(self: _Guide) -> _Guide:
        """Undo :meth:`condition_on`."""
        self._conditioned = None
        return self

    def attach(self: _Guide, model: Callable[..., Any]) -> _Guide:
        """Give a model to an unpickled guide.

        A start that is an AutoGuide and was pickled before its first call lost its model too; give it a new one.
        """
        self._model, self._binder = (model,), Binder(Program(model))
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As in :class:`torch.nn.Module`, after :meth:`setup`.

        :raises RuntimeError: before :meth:`setup`, when there is nothing to load into.
        """
        if self._first is None:
            raise RuntimeError("call guide.setup(*args) with the model's arguments before load_state_dict.")
        return super().load_state_dict(state_dict, *args, **kwargs)

    # ---------------------------------------------------------------- one call's model

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any], chains: int = 1) -> Call:
        """Read the model once, check it against earlier calls, and bind its log density."""
        if self._binder is None:
            raise RuntimeError(
                "this guide was unpickled, and pickling drops the model (as for every Pyro AutoGuide): call "
                "guide.attach(model) first."
            )
        if torch._C._get_tracing_state() is not None:
            raise NotImplementedError(
                f"torch.jit (as in Pyro's Jit ELBOs) cannot trace a {type(self).__name__}: use the ELBO without Jit, "
                "and ShortRunGuide(model, compile=True) for speed."
            )
        program = self._binder.program
        self.plates = self._given_plates(args, kwargs)
        args, kwargs = plain(args), plain(kwargs)
        if self._conditioned is not None:
            args, kwargs = _instead(self._conditioned, program, args, kwargs)
        indices = {name: plate.indices for name, plate in self.plates.items() if plate.size is not None}
        given = values_of_other_parts() if program.hides else {}
        reading = self._read(Invocation(program, args, kwargs, indices, given))
        if chains > 1 and any(name in reading.trace.nodes for name in given):
            raise NotImplementedError(
                f"{type(self).__name__} as a part of an AutoGuideList needs the other parts' values and takes one set "
                "of them per call: use num_particles without vectorize_particles, and Predictive(parallel=False)."
            )
        if self._first is not None:
            known = self._memory.known if missing_data(self._first, reading) else None
            if known is not None:
                check_shapes(program, known, (args, kwargs))
                return self._bind(*known, chains)
            check_data(self._first, reading)
        call = self._binder(reading, args, kwargs, given, self._admit)
        is_draw = self._reads_prior or reading.origin is not None  # from the start
        call = replace(call, density=self._density(call), spare=call.spare if is_draw else [])
        create_missing(self.plates, reading, latents_only=self.master is not None)
        if self._first is None:
            warn_if_stored(self)
            self._begin(call)
            self._first = call.model.structure
            warn_if_rows_mix(call.model, call.model.layout.pack(reading.unconstrained).unsqueeze(0).detach())
        self._prepare(call)
        return call

    @contextmanager
    def eagerly(self) -> Iterator[None]:
        """Without graphs inside."""
        compiler, self._compiler = self._compiler, None
        try:
            yield
        finally:
            self._compiler = compiler

    # ---------------------------------------------------------------- state

    def _check_prototype(self, part_trace: Any) -> None:
        """Called by an AutoGuide that serves as start."""

    def __getstate__(self) -> dict[str, Any]:
        """Drop the model and what hangs on a call, without touching the live guide (Pyro's own AutoGuide does)."""
        for parameter in self.parameters():  # the weak references of Pyro's store, as PyroModule does with its own
            parameter.__dict__.pop("unconstrained", None)
        state = self.__dict__.copy()
        state.update(_model=None, _binder=None, _master=None, plates={}, _conditioned=None, _memory=Memory())
        state["_modules"] = {k: without_model(m) for k, m in self._modules.items()}
        return state

    def __deepcopy__(self: _Guide, memo: dict[int, Any]) -> _Guide:
        """A guide of the same model, with parameters of its own.

        They keep their names, under which Pyro's store holds one value: give the copy to a torch optimiser, or set
        ``pyro.settings.set(module_local_params=True)``, where both are to be used in one process.
        """
        new = object.__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        for old, own in zip(self.modules(), new.modules(), strict=True):
            if isinstance(old, AutoGuide):
                own.__dict__["_model"] = old._model
        new._binder = None if self._binder is None else Binder(self._binder.program)
        new._conditioned, new._memory = self._conditioned, copy.copy(self._memory)
        return new


def _instead(conditioned: Arguments, program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """The conditioned arguments instead of a call's own."""
    if args or kwargs:  # the model will run on these with latents drawn for the conditioned ones
        check_shapes(program, conditioned, (args, kwargs))
    return plain(conditioned[0]), plain(conditioned[1])
