"""VectorizedMCMC: Pyro's MCMC interface with chains as a batch dimension in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.mcmc.util import diagnostics as site_diagnostics
from pyro.infer.mcmc.util import print_summary, select_samples
from torch import Tensor
from tqdm.auto import tqdm

from ..checks import check_count, check_function, check_kind
from ..tensors import random_state, set_random_state
from .chains import Session
from .convergence import groups_of, worst_nested_rhat
from .kernel import ShortRunLangevin
from .target import Target


class VectorizedMCMC:
    r"""Many chains of a :class:`ShortRunLangevin` at once, with the interface of :class:`pyro.infer.MCMC`.

    Chains are a batch dimension that ``torch.func.vmap`` adds to the model's log density, whether or not the model is
    written for batches. They share what warm-up adapts (step size, preconditioner), so that many chains learn it from
    few draws each.

    >>> import pyro, pyro.distributions as dist, torch
    >>> def model(x):
    ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
    >>> kernel = ShortRunLangevin(model, num_steps=5, adjust=True)
    >>> mcmc = VectorizedMCMC(kernel, num_samples=20, warmup_steps=20, num_chains=64, disable_progbar=True)
    >>> mcmc.run(torch.ones(3))
    >>> mcmc.get_samples(group_by_chain=True)["loc"].shape
    torch.Size([64, 20])

    *Resume.* A run that was saved goes on bit for bit as if it had not stopped::

        torch.save(mcmc.state_dict(), path)
        longer = VectorizedMCMC(kernel, num_samples=2000, warmup_steps=20, num_chains=64)
        longer.load_state_dict(torch.load(path, weights_only=True))
        longer.run(x)             # the saved draws and as many more as are missing to 2000

    The state holds torch's random state too, which ``run`` then sets. A run that was interrupted keeps its draws and
    can be saved like any other.

    (Its methods are many because they are those of Pyro's ``MCMC``, and what exporters and saving read.)

    :param kernel: a :class:`ShortRunLangevin`.
    :param num_samples: kept draws per chain.
    :param warmup_steps: draws before them, in which the kernel tunes; default ``num_samples``, as in Pyro, but no more
        than make 500 transitions from a fitted Gaussian, where there is little left to learn.
    :param num_chains: number of chains.
    :param initial_params: ``{site: (num_chains, *shape)}`` in unconstrained space, instead of the kernel's start.
    :param hook_fn: called as ``hook_fn(kernel, params, stage, i)`` after each draw, ``params`` being the states of all
        chains, ``(num_chains, *shape)``.
    :param disable_progbar: whether to hide the progress bar.
    :param chain_batch_size: chains evaluated at once (all, if None): bounds memory, and changes no draw (but for the
        random probes of a stochastic log-determinant in the warm-up of short runs).
    :raises ValueError: for arguments out of range.
    :raises NotImplementedError: in :meth:`run`, where an operation of the model cannot be vectorised; the message
        names it.
    """

    def __init__(
        self,
        kernel: ShortRunLangevin,
        num_samples: int,
        warmup_steps: int | None = None,
        initial_params: Mapping[str, Tensor] | None = None,
        num_chains: int = 1,
        *,
        hook_fn: Callable[..., Any] | None = None,
        disable_progbar: bool = False,
        chain_batch_size: int | None = None,
    ) -> None:
        check_kind("kernel", kernel, ShortRunLangevin, "ShortRunLangevin(model)")
        check_count("num_samples", num_samples)
        check_count("num_chains", num_chains)
        self._chooses_warmup = warmup_steps is None
        self.warmup_steps = num_samples if warmup_steps is None else warmup_steps
        check_count("warmup_steps", self.warmup_steps, least=0)
        if chain_batch_size is not None:
            check_count("chain_batch_size", chain_batch_size)
        check_kind("initial_params", initial_params, Mapping, "{'z': torch.zeros(num_chains, 2)}")
        check_function("hook_fn", hook_fn, "lambda kernel, params, stage, i: print(i)")
        for name, value in (initial_params or {}).items():
            if value.shape[:1] != (num_chains,):
                raise ValueError(
                    f"initial_params['{name}'] has shape {tuple(value.shape)}; its leading dimension must be "
                    f"num_chains={num_chains}."
                )
        self.kernel, self.num_samples, self.num_chains = kernel, num_samples, num_chains
        self.initial_params, self.hook_fn = initial_params, hook_fn
        self.disable_progbar, self.chain_batch_size = disable_progbar, chain_batch_size
        self._args: tuple[Any, ...] = ()
        self._kwargs: dict[str, Any] = {}
        self._session: Session | None = None
        self._states: list[Tensor] = []
        self._samples: dict[str, Tensor] | None = None
        self._saved: Mapping[str, Any] | None = None
        self._rng: dict[str, Any] = {}

    @poutine.block
    def run(self, *args: Any, **kwargs: Any) -> None:
        """Warm up and draw.

        :param args: the model's arguments.
        """
        self._args, self._kwargs = args, kwargs
        self._samples = None
        with pyro.validation_enabled(False):
            shortens = self._chooses_warmup and self._saved is None
            session = self.kernel.open(
                self.num_chains, self.warmup_steps, args, kwargs, self.initial_params, self.chain_batch_size, shortens
            )
            self._session, self._states, self.warmup_steps = session, [], session.warmup_steps
            if self._saved is not None:
                self._restore(session, self._saved)
            session.sampler.one_by_one = self.hook_fn is not None
            total = session.total = self.warmup_steps + self.num_samples
            with tqdm(total=total, initial=session.done, disable=self.disable_progbar, mininterval=0.5) as bar:
                try:
                    while session.done < total:
                        self._advance(session, bar)
                finally:  # as it was after the last draw, whatever else draws before the state is saved
                    session.forget_after(len(self._states))
                    self._rng = random_state(session.state.u.device)

    def _advance(self, session: Session, bar: Any) -> None:
        """One draw where somebody looks at each, or as many as the sampler makes in one go."""
        warming = session.done < self.warmup_steps
        bar.set_description("Warmup" if warming else "Sample", refresh=False)
        index = session.done - (0 if warming else self.warmup_steps)
        left = (self.warmup_steps if warming else self.num_samples) - index
        states = session.draw(left if self.hook_fn is None else 1)
        if not warming:
            self._states += states
        if self.hook_fn is not None:
            self.hook_fn(self.kernel, session.all_params(), "Warmup" if warming else "Sample", index)
        if not self.disable_progbar:
            bar.set_postfix(session.record.short(), refresh=False)
        bar.update(len(states))

    def get_samples(self, num_samples: int | None = None, group_by_chain: bool = False) -> dict[str, Tensor]:
        """Draws by site, as in :meth:`pyro.infer.MCMC.get_samples`.

        :param num_samples: if given, as many drawn at random with replacement.
        :param group_by_chain: ``(num_chains, num_samples, *shape)`` instead of ``(num_chains * num_samples, *shape)``.
        """
        return select_samples(self._grouped(), num_samples, group_by_chain)

    def _grouped(self) -> dict[str, Tensor]:
        if self._samples is None:
            states = self._kept()
            values = self._opened().target.constrain(states.flatten(0, 1), self.chain_batch_size)
            self._samples = {k: v.unflatten(0, states.shape[:2]) for k, v in values.items()}
        return self._samples

    def unconstrained(self) -> Tensor:
        """The kept states in unconstrained space, ``(num_chains, draws, rows, size)``."""
        return self.target.outward(self._kept())

    def _kept(self) -> Tensor:
        """The same in the coordinates of the chains."""
        self._opened()
        if not self._states:
            raise RuntimeError("no draws have been kept yet; call run(*args) to its end, or past its warm-up.")
        return torch.stack(self._states, 1)

    @property
    def sample_stats(self) -> dict[str, Tensor]:
        """Statistics of the kept draws, ``{name: (num_chains, draws)}``; see
        :class:`DrawStats`."""
        return self._opened().stats()

    @property
    def has_draws(self) -> bool:
        """Whether any draw has been kept."""
        return bool(self._states)

    @property
    def target(self) -> Target:
        """What was sampled: the bound model, or the ``potential_fn``."""
        return self._opened().target

    def summary(self, prob: float = 0.9) -> None:
        """Print means, deviations, credible intervals, effective sample sizes and split R-hat; the worst nested R-hat
        of chains in groups that began at one point each (where ``initial_params`` repeats points; else every chain is
        its own group); and the acceptance, over all draws and from the worst chain to the best."""
        draws, stats = self._enough(), self.sample_stats
        print_summary(draws, prob=prob)
        groups = groups_of(self.initial_params, self.num_chains)
        worst = worst_nested_rhat(draws, groups)
        if worst is not None:
            members = self.num_chains // groups
            print(f"Nested R-hat of {groups} groups of {members}: at most {worst[0]:.3f} (site '{worst[1]}')")
        rates = stats["acceptance_rate"].mean(1)
        print(f"Acceptance: {rates.mean():.3f} (chains {rates.min():.3f} to {rates.max():.3f})")
        print(f"Draws with a non-finite proposal: {int((stats['nonfinite'] > 0).sum())}")

    def diagnostics(self) -> dict[str, Any]:
        """Per site ``n_eff`` and ``r_hat``; per chain ``divergences`` (draws with a non-finite proposal) and
        ``acceptance rate``."""
        result: dict[str, Any] = site_diagnostics(self._enough())
        stats = self.sample_stats
        chains = [f"chain {i}" for i in range(self.num_chains)]
        diverging = [row.nonzero().flatten().tolist() for row in stats["nonfinite"] > 0]
        rates = stats["acceptance_rate"].mean(1).tolist()
        result["divergences"] = dict(zip(chains, diverging, strict=True))
        result["acceptance rate"] = dict(zip(chains, rates, strict=True))
        return result

    def _enough(self) -> dict[str, Tensor]:
        self._opened()
        if len(self._states) < 4:
            raise ValueError(
                f"effective sample size and R-hat need >= 4 draws per chain, there are {len(self._states)}."
            )
        return self._grouped()

    def state_dict(self) -> dict[str, Any]:
        """Everything :meth:`load_state_dict` needs, as tensors, numbers, lists and dicts (loads with
        ``weights_only=True``)."""
        if self._saved is not None:  # :meth:`run` has not gone on from it yet
            return dict(self._saved)
        session = self._opened()
        empty = session.state.u.new_zeros(self.num_chains, 0, *session.state.u.shape[1:])
        states = torch.stack(self._states, 1) if self._states else empty
        return {
            "states": states,
            "session": session.state_dict(),
            "rng": self._rng,
            "num_chains": self.num_chains,
            "warmup_steps": self.warmup_steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next :meth:`run` go on from a saved run of the same kernel, model and data.

        :raises ValueError: where the number of chains or warm-up steps differs, or more draws are saved than wanted.
        """
        if self._chooses_warmup:
            self.warmup_steps = state["warmup_steps"]
        for name in ("num_chains", "warmup_steps"):
            if state[name] != getattr(self, name):
                raise ValueError(f"the saved run has {name}={state[name]}, this one {getattr(self, name)}.")
        if state["states"].shape[1] > self.num_samples:
            raise ValueError(f"{state['states'].shape[1]} draws are saved, more than num_samples={self.num_samples}.")
        self._saved = state

    def _restore(self, session: Session, saved: Mapping[str, Any]) -> None:
        session.load_state_dict(saved["session"])
        self._states = list(saved["states"].to(session.state.u.device).unbind(1))
        rng = {"torch": saved["rng"].get("cpu"), **saved["rng"]}  # "cpu" in states of version 0.1.0
        set_random_state(rng, session.state.u.device)
        self._saved = None

    def _opened(self) -> Session:
        if self._session is None:
            raise RuntimeError("call run(*args) first.")
        return self._session
