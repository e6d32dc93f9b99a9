"""Our kernels as peers of NUTS in Pyro's MCMC, which is a row of every law."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, Predictive, config_enumerate
from pyro.infer.autoguide import init_to_value
from pyro.infer.mcmc.api import StreamingMCMC
from pyro.infer.reparam import LocScaleReparam
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_shortrun import Init, ShortRunLangevin, VectorizedMCMC

WARMUP, DRAWS = 4, 6
KERNELS: dict[str, Callable[..., Any]] = {
    "NUTS": lambda model=None, **o: NUTS(model, max_tree_depth=3, **o),
    "short runs": lambda model=None, **o: ShortRunLangevin(model, 2, **o),
    "chain": lambda model=None, **o: ShortRunLangevin(model, 2, step_size=0.05, persistent=True, **o),
    "adjusted": lambda model=None, **o: ShortRunLangevin(model, 2, adjust=True, **o),
}
every = pytest.mark.parametrize("kind", KERNELS)
ours = pytest.mark.parametrize("kind", [k for k in KERNELS if k != "NUTS"])


def regression(x: Tensor, y: Tensor | None = None) -> Tensor:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 0.3))
    mean = pyro.deterministic("mean", x @ w)
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(mean, sigma), obs=y)


def data() -> tuple[Tensor, Tensor]:
    x = torch.stack([torch.linspace(-1.0, 1.0, 5), torch.ones(5)], -1)
    return x, x @ torch.tensor([1.0, -0.5])


def run(kernel: Any, *args: Any, **options: Any) -> MCMC:
    mcmc = MCMC(kernel, DRAWS, WARMUP, disable_progbar=True, **options)
    mcmc.run(*args)
    return mcmc


@every
def test_draws_have_the_shapes_of_the_sites(kind):
    mcmc = run(KERNELS[kind](regression), *data())
    found = mcmc.get_samples()
    assert {k: tuple(v.shape) for k, v in found.items()} == {"w": (DRAWS, 2), "sigma": (DRAWS,)}
    assert (found["sigma"] > 0).all() and all(v.isfinite().all() for v in found.values())
    assert mcmc.get_samples(group_by_chain=True)["w"].shape == (1, DRAWS, 2)
    assert mcmc.get_samples(num_samples=9)["w"].shape == (9, 2)


@every
def test_diagnostics_and_summary(kind, capsys):
    mcmc = run(KERNELS[kind](regression), *data())
    found = mcmc.diagnostics()
    assert {"w", "sigma"} <= set(found) and {"n_eff", "r_hat"} <= set(found["w"])
    mcmc.summary()
    assert "sigma" in capsys.readouterr().out


@every
def test_hooks_see_every_draw_and_its_stage(kind):
    seen: list[tuple[str, int, bool]] = []
    kernel = KERNELS[kind](regression)

    def hook(of: Any, params: dict[str, Tensor], stage: str, i: int) -> None:
        seen.append((stage, i, of is kernel and {"w", "sigma"} <= set(params)))

    run(kernel, *data(), hook_fn=hook)
    stages = [("Warmup", i) for i in range(WARMUP)] + [("Sample", i) for i in range(DRAWS)]
    assert [(stage.split(" ")[0], i) for stage, i, _ in seen] == stages and all(fits for *_, fits in seen)


@every
def test_save_params_keeps_these_alone(kind):
    mcmc = run(KERNELS[kind](regression), *data(), save_params=["w"])
    assert set(mcmc.get_samples()) == {"w"}


@every
def test_streaming_statistics(kind):
    mcmc = StreamingMCMC(KERNELS[kind](regression), DRAWS, WARMUP, disable_progbar=True)
    mcmc.run(*data())
    found = mcmc.get_statistics(group_by_chain=False)
    assert found["w"]["count"] == DRAWS and found["w"]["mean"].shape == (2,) and found["w"]["variance"].shape == (2,)


@every
def test_discrete_latents_are_summed_out(kind):
    @config_enumerate
    def mixture(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            which = pyro.sample("which", dist.Categorical(torch.tensor([0.4, 0.6])))
            pyro.sample("x", dist.Normal(loc[which], 1.0), obs=x)

    assert set(run(KERNELS[kind](mixture), torch.tensor([-1.0, 0.5, 2.0])).get_samples()) == {"loc"}


@pytest.mark.parametrize("kind", ["NUTS", "chain", "adjusted"])
def test_initial_params_are_where_it_starts(kind):
    """Unconstrained, as Pyro has them."""
    first: dict[str, Tensor] = {}
    initial = {"w": torch.tensor([3.0, -3.0]), "sigma": torch.tensor(0.2)}

    def hook(kernel: Any, params: dict[str, Tensor], stage: str, i: int) -> None:
        first.setdefault("w", params["w"].clone())

    kernel = KERNELS[kind](regression)
    run(kernel, *data(), initial_params=initial, hook_fn=hook)
    assert first["w"].shape == (2,) and (kind == "NUTS" or (first["w"] - initial["w"]).norm() < 3.0)


@pytest.mark.parametrize("kind", ["NUTS", "chain", "adjusted"])
def test_a_strategy_for_initial_values(kind):
    """NUTS takes ``init_strategy``, ours ``start=Init(...)``: both begin near the value."""
    value = {"w": torch.tensor([0.2, -0.4]), "sigma": torch.tensor(1.3)}
    begins = init_to_value(values=value)
    options = {"init_strategy": begins} if kind == "NUTS" else {"start": Init(begins, scale=1e-6)}
    kernel = KERNELS[kind](regression, **options)
    kernel.setup(WARMUP, *data())
    torch.testing.assert_close(kernel.initial_params["w"], value["w"], rtol=0, atol=1e-3)
    torch.testing.assert_close(kernel.initial_params["sigma"], value["sigma"].log(), rtol=0, atol=1e-3)


@every
def test_a_potential_with_transforms(kind):
    """``potential_fn`` of unconstrained values, and ``transforms`` to these, as NUTS has them."""

    def potential(params: dict[str, Tensor]) -> Tensor:
        return 0.5 * params["s"].square().sum()

    options = {"potential_fn": potential, "transforms": {"s": biject_to(constraints.positive).inv}}
    kernel = KERNELS[kind](**options)
    found = run(kernel, initial_params={"s": torch.zeros(3)}).get_samples()["s"]
    assert found.shape == (DRAWS, 3) and (found > 0).all()


@every
def test_predictions_from_draws(kind):
    x, y = data()
    draws = run(KERNELS[kind](regression), x, y).get_samples()
    found = Predictive(regression, draws, return_sites=("mean", "y", "_RETURN"))(x)
    assert found["y"].shape == found["_RETURN"].shape == (DRAWS, 5)
    torch.testing.assert_close(found["mean"].reshape(DRAWS, 5), draws["w"] @ x.T)


@every
def test_handlers_around_the_model(kind):
    held = poutine.condition(regression, data={"sigma": torch.tensor(1.0)})
    assert set(run(KERNELS[kind](held), *data()).get_samples()) == {"w"}

    def hierarchy(y: Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, scale)), 1.0), obs=y)

    moved = poutine.reparam(hierarchy, config={"z": LocScaleReparam(0.0)})
    assert set(run(KERNELS[kind](moved), data()[1]).get_samples()) == {"scale", "z_decentered"}


@ours  # NUTS goes on where it is
def test_a_run_can_be_repeated_and_does_not_change_the_kernels_options(kind):
    kernel = KERNELS[kind](regression)
    found = []
    for _ in range(2):
        pyro.set_rng_seed(0)
        found.append(run(kernel, *data()).get_samples()["w"])
    torch.testing.assert_close(*found)


@every
def test_a_kernel_pickles(kind):
    again = pickle.loads(pickle.dumps(KERNELS[kind](regression)))
    assert run(again, *data()).get_samples()["w"].shape == (DRAWS, 2)


# ---------------------------------------------------------------- what differs on purpose


@ours
def test_many_chains_are_a_batch(kind):
    """VectorizedMCMC, with MCMC's interface; Pyro's starts a process for each chain."""
    mcmc = VectorizedMCMC(KERNELS[kind](regression), DRAWS, WARMUP, num_chains=3, disable_progbar=True)
    mcmc.run(*data())
    assert mcmc.get_samples(group_by_chain=True)["w"].shape == (3, DRAWS, 2)
    assert set(mcmc.diagnostics()["w"]) >= {"n_eff", "r_hat"}


@every
def test_a_model_without_latents(kind):
    """NUTS has no draws of it; ours name what has hidden the latents."""

    def nothing(x: Tensor) -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    if kind == "NUTS":
        assert run(KERNELS[kind](nothing), torch.tensor(0.5)).get_samples() == {}
        return
    with pytest.raises(ValueError, match="no continuous latent sites"):
        run(KERNELS[kind](nothing), torch.tensor(0.5))


def test_initial_params_of_runs_that_begin_anew():
    with pytest.raises(ValueError, match="initial_params have no use where every draw restarts; pass start="):
        run(KERNELS["short runs"](regression), *data(), initial_params={"w": torch.zeros(2), "sigma": torch.zeros(())})


@ours
def test_options_of_hmc_are_refused_by_name(kind):
    with pytest.raises(TypeError, match="max_tree_depth"):
        KERNELS[kind](regression, max_tree_depth=5)
