"""Chains from graphs give the numbers that they give without, and graphs are made where they pay."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC
from targets import curved, gaussian, quiet, regression, regression_data, subsampled
from torch import Tensor

from pyro_shortrun import Langevin, ShortRunLangevin, VectorizedMCMC
from pyro_shortrun.compile import Compiler, Inductor, Scripted, Untouched
from pyro_shortrun.dynamics import Dense, Diagonal, Identity
from pyro_shortrun.dynamics.adaptation import Following
from pyro_shortrun.mcmc.pace import Pace, Stage
from pyro_shortrun.runs.transitions import Given, Place, Transitions


def mixture(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.25)).long()
        pyro.sample("x", dist.Normal(loc[k], 1.0), obs=x)


CASES = {
    "adjusted": (regression, regression_data, dict(adjust=True)),
    "dense": (regression, regression_data, dict(adjust=True, preconditioner=Dense())),
    "rows": (curved, tuple, dict(adjust=True)),
    "unadjusted": (regression, regression_data, dict(persistent=True, step_size=1e-3)),
    "restarted": (regression, regression_data, dict(adjust=True, persistent=False)),
    "summed out": (mixture, lambda: (torch.tensor([-2.0, -1.5, 2.0, 2.5]),), dict(adjust=True)),
    "short runs": (regression, regression_data, dict()),
    "mini-batches": (subsampled, lambda: (torch.randn(12), 4), dict(persistent=True, step_size=0.01)),
}


def drawn(case: str, backend: object, batch: int | None = None) -> tuple[VectorizedMCMC, ShortRunLangevin]:
    pyro.set_rng_seed(1)
    model, data, options = CASES[case]
    args = data()
    kernel = ShortRunLangevin(model, 4, compile=False, **options)
    kernel._compiler = None if backend is None else Compiler(backend)
    mcmc = quiet(kernel, 5, 12, 6, chain_batch_size=batch)
    mcmc.run(*args)
    return mcmc, kernel


@pytest.mark.parametrize(
    "case, backend",
    [*((case, Scripted()) for case in CASES), ("dense", Untouched())],
    ids=[*(f"{case}, scripted" for case in CASES), "dense, a loop"],
)
def test_draws_from_graphs_are_the_eager_ones(case, backend, dtype, caplog):
    """Warm-up and all: windows, pooling, blocks that are not full."""
    (found, kernel), (known, _) = drawn(case, backend), drawn(case, None)
    assert "no effect" not in caplog.text and not kernel._compiler.is_eager
    rtol = 1e-8 if dtype is torch.float64 else 5e-3  # rounding grows along a chain
    torch.testing.assert_close(found.unconstrained(), known.unconstrained(), rtol=rtol, atol=rtol)
    for name, values in known.sample_stats.items():
        torch.testing.assert_close(found.sample_stats[name], values, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("backend, batch", [(Inductor(), None), (Untouched(), 4)], ids=["compiled", "in batches"])
def test_transitions_are_one_loop(backend, batch, dtype):
    known, _ = drawn("adjusted", None)
    rtol = 1e-8 if dtype is torch.float64 else 5e-3
    found, kernel = drawn("adjusted", backend, batch)
    assert [key[0][:2] for key in kernel._compiler._graphs] == [("affine", "transitions")]
    torch.testing.assert_close(found.unconstrained(), known.unconstrained(), rtol=rtol, atol=rtol)


def test_another_run_of_a_kernel_needs_no_new_graph():
    args = regression_data()
    kernel = ShortRunLangevin(regression, 3, adjust=True, compile=True)
    kernel._compiler = Compiler(Untouched())
    for _ in range(2):
        quiet(kernel, 3, 4, 5).run(*args)
    assert len(kernel._compiler._graphs) == 1


@pytest.mark.parametrize("adjust", [True, False])
@pytest.mark.parametrize("metric", [Identity(), Diagonal(), Dense()], ids=lambda m: type(m).__name__)
def test_transitions_that_fill_a_block_go_nowhere(adjust, metric):
    session = ShortRunLangevin(regression, 3, adjust=True).open(4, 0, regression_data(), {})
    density, u = session.target.density, session.state.u
    block = Transitions(Langevin(), metric, adjust, 0.6)
    zero = torch.zeros(4, 1)
    factor = metric.initial(torch.zeros(1, 3)) * 1.5
    given = Given(torch.randn(3, *u.shape), torch.rand(3, 4, 1).log(), torch.full((3, 3), 0.1), torch.rand(3, 4))
    here = Place(u, metric.scales(factor).whiten(u), session.state.log_density, session.state.grad)
    runs = [
        block.run(density, here, Following(zero, zero, zero), g, zero, True, factor) for g in (given, given.padded(7))
    ]
    for known, found in zip(*((*place, *following) for place, following, _ in runs), strict=True):
        torch.testing.assert_close(found, known)
    assert not torch.equal(runs[0][0].u, u)


def test_what_cannot_be_traced_is_eager_without_a_word(caplog):
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.item() + z, 1.0), obs=torch.tensor(0.5))

    draws = []
    for compile in (False, None):
        pyro.set_rng_seed(0)
        kernel = ShortRunLangevin(model, 5, adjust=True, compile=compile)
        kernel._stages = [Stage(s.compiler, 0.0) for s in kernel._stages]
        mcmc = quiet(kernel, 10, 20, 1)
        mcmc.run()
        draws.append(mcmc.unconstrained())
    assert torch.equal(*draws) and not [r for r in caplog.records if r.levelname == "WARNING"]


class Told:
    """A target that notes what it is told to use."""

    def __init__(self) -> None:
        self.used: list[Compiler] = []
        self.is_untraceable = False

    @property
    def has_graphs(self) -> bool:
        return bool(self.used)

    def use(self, compiler: Compiler) -> None:
        self.used.append(compiler)


@pytest.mark.parametrize(
    "seconds, lefts, wanted",
    [
        ([0.01, 0.01], [5, 4], 0),  # 0.05 s are left: nothing pays
        ([0.01, 5.0, 0.001], [100, 99, 98], 1),  # 1 s is; tracing itself is not counted
        ([0.1, 0.3, 0.1, 0.1], [1000, 999, 998, 997], 2),  # 100 s are
        ([0.1] * 4, [None] * 4, 0),  # not known: 0.4 s were
        ([0.1] * 10, [None] * 10, 1),
    ],
)
def test_graphs_are_made_where_they_pay(seconds, lefts, wanted):
    target, expected = Told(), []
    stages = [Stage(Compiler(Untouched()), 0.5), Stage(Compiler(Untouched()), 30.0)]
    pace = Pace(target, stages, lambda: expected.append(None))  # type: ignore[arg-type]
    for took, left in zip(seconds, lefts, strict=True):
        pace(took, 1, left)
    assert target.used == [s.compiler for s in stages[:wanted]] and len(expected) == wanted


def test_pyros_own_mcmc_comes_to_graphs_too():
    kernel = ShortRunLangevin(gaussian, 2, adjust=True)
    kernel._stages = [Stage(kernel._stages[0].compiler, 0.0)]
    MCMC(kernel, 5, 5, disable_progbar=True).run()
    assert kernel._session.target.has_graphs
