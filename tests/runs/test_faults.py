"""What goes wrong in real use, as a table: each fault in each kind of run. State stays whole, errors say what to do.

Interrupts are in ``test_interrupts.py``, data and models that are wrong from the start in ``test_errors.py``.
"""

from __future__ import annotations

import gc
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from faulty import RUNS, Energy, EnergyTraining, Run, Training
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import init_to_value
from torch import Tensor

from pyro_shortrun import (
    GaussianReverse,
    Init,
    Langevin,
    Linearized,
    Prior,
    ShortRunGuide,
    ShortRunLangevin,
    StepSize,
    VectorizedMCMC,
    energy_prior,
)

every_run = pytest.mark.parametrize("kind", RUNS)


def make(kind: str) -> Run:
    return RUNS[kind]()


def other_dtype() -> torch.dtype:
    return torch.float32 if torch.get_default_dtype() == torch.float64 else torch.float64


# ------------------------------------------------------------------------------------------------ not finite


def no_gradient(z: Tensor) -> Tensor:
    """Zero everywhere; its gradient is zero below 1 and NaN above."""
    first = z[..., 0]
    return torch.where(first > 1, (0 * torch.where(first > 1, first, 1.0)).sqrt(), 0.0)


def explosion(z: Tensor) -> Tensor:
    """An energy without a lower bound, whose gradient overflows."""
    return torch.exp(z.square().sum(-1) ** 4 / 100)


# Metropolis tests reject what is not finite: nothing to warn about.
WARNINGS = {"guide": 1, "energy": 2, "teaching": 1, "unadjusted chains": 1}  # EnergyELBO and its guide have one each


@every_run
@pytest.mark.parametrize("fault", [no_gradient, explosion])
def test_what_is_not_finite_is_counted_told_once_and_reaches_no_state(kind, fault):
    run, x = make(kind), torch.randn(16, 3).clamp(-1, 1)  # no fault of the data
    run.put(fault)
    excluded = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(1 if "chains" in kind or "Pyro" in kind else 4):
            assert run.step(x).isfinite().all()
            excluded += run.excluded
    assert excluded > 0 or kind == "encoder"  # which may have accepted none
    told = [str(w.message) for w in caught if "non-finite" in str(w.message)]
    assert len(told) == len(caught) and len(told) == WARNINGS.get(kind, 0)
    assert all(v.isfinite().all() for v in run.state().values() if isinstance(v, Tensor))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "objective", [lambda: None, GaussianReverse, Linearized], ids=["default", "reverse", "linearized"]
)
def test_a_run_that_ends_where_there_is_no_gradient(objective, seed):
    """No step has seen that gradient; it must not reach the step size either."""
    pyro.set_rng_seed(seed)
    run = Training()
    run.put(no_gradient)
    guide = ShortRunGuide(run.net.model, num_steps=2, step_size=StepSize(0.3), objective=objective(), start=Prior())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trace_ELBO().loss_and_grads(run.net.model, guide, torch.randn(16, 3))
    assert all(p.grad is None or p.grad.isfinite().all() for p in guide.parameters())


def test_chains_start_where_there_is_a_gradient():
    """As Pyro's kernels do: 84 % of uniform starts in (-2, 2)^2 have none in one of 16 rows."""
    net = Training().net
    net.fault = no_gradient
    kernel = ShortRunLangevin(net.model, 1, StepSize(1e-9, learnable=False), adjust=True)
    mcmc = VectorizedMCMC(kernel, 1, 0, num_chains=4, disable_progbar=True)
    mcmc.run(torch.zeros(16, 3))
    assert (mcmc.get_samples()["z"][..., 0] < 1.01).all()


def test_chains_without_any_gradient_are_refused():
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("corner", (0 * z).abs().sqrt())

    kernel = ShortRunLangevin(model, 2, adjust=True, start=Init(init_to_value(values={"z": torch.ones(())})))
    with pytest.raises(ValueError, match="gradient of the log density is not finite at the start of a chain"):
        kernel.setup(0)
    kernel = ShortRunLangevin(model, 2, adjust=True)
    with pytest.raises(ValueError, match="gradient, is not finite at the initial_params"):
        VectorizedMCMC(kernel, 2, 2, {"z": torch.ones(3)}, 3, disable_progbar=True).run()


# ------------------------------------------------------------------------------------------------ singular Hessians


def flatten(z: Tensor) -> Tensor:
    """Takes the curvature of an N(0, 1) prior away."""
    return z.square().sum(-1) / 2


@every_run
def test_flat_densities(kind):
    """A Hessian that is zero in some directions (everywhere, without data) is nothing special."""
    run = make(kind)
    run.put(flatten)
    for _ in range(2):
        assert run.step(torch.randn(6, 3)).isfinite().all()
        assert run.excluded == 0


def test_log_q_of_a_random_walk():
    """Without curvature and gradient: u_K = u_0 + noise, whose determinants are one."""

    def model() -> None:
        with pyro.plate("rows", 5):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("flat", z.square() / 2)

    guide = ShortRunGuide(model, num_steps=3, step_size=StepSize(0.2, learnable=False), start=Prior())
    guide()
    assert guide.info.log_det.abs().max() == 0 and guide.info.noninvertible == guide.info.nonfinite == 0


@pytest.mark.parametrize("noise", [True, False])
def test_step_whose_jacobian_is_singular(noise, caplog):
    """N(0, 1) at eta = 1 exactly: I + eta H = 0, and log q would be infinite. Told, counted, and nothing is spoilt."""

    def model() -> None:
        with pyro.plate("rows", 5):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    guide = ShortRunGuide(model, num_steps=2, dynamics=Langevin(StepSize(1.0), noise=noise), start=Prior())
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses = [svi.step(), svi.step()]
    assert torch.tensor(losses).isfinite().all() and guide.step_sizes().isfinite()
    assert guide.step_sizes() < 1  # rows without a valid log q shrink it
    assert len(caught) + len([r for r in caplog.records if "log q" in r.getMessage()]) == 1


def test_chains_at_a_singular_step():
    """A kernel has no use for the Jacobian."""
    kernel = ShortRunLangevin(lambda: pyro.sample("z", dist.Normal(0.0, 1.0)), 1, StepSize(1.0, learnable=False), True)
    mcmc = VectorizedMCMC(kernel, 400, 10, num_chains=20, disable_progbar=True)
    mcmc.run()
    # u' = sqrt(2) eps: independent draws of the biased law N(0, 2)
    assert mcmc.get_samples()["z"].var().item() == pytest.approx(2.0, rel=0.1)


# ------------------------------------------------------------------------------------------------ batches and shapes


@every_run
def test_empty_batches_are_named(kind):
    run = make(kind)
    run.step(torch.randn(4, 3))
    before = run.state()
    with pytest.raises(ValueError, match="size 0|size=\\(0, 3\\)"):
        run.step(torch.zeros(0, 3))
    assert unchanged(before, run.state())
    assert run.step(torch.randn(4, 3)).isfinite().all()


@every_run
def test_batches_of_any_size(kind):
    run = make(kind)
    for rows in (4, 1, 7):
        assert run.step(torch.randn(rows, 3)).isfinite().all()


@every_run
def test_data_of_another_width_are_named(kind):
    run = make(kind)
    run.step(torch.randn(4, 3))
    before = run.state()
    with pytest.raises(ValueError, match=r"site 'x'.*shape \(4, 3\)|site 'x'.*shape \(4, 5\).*event shape \(3,\)"):
        run.step(torch.randn(4, 5))
    assert unchanged(before, run.state())
    assert run.step(torch.randn(4, 3)).isfinite().all()


@pytest.mark.parametrize("kind", ["guide", "encoder"])
def test_latents_of_another_shape_are_named(kind):
    run, size = make(kind), [2]

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(size[0]), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0).expand([len(x), 3]).to_event(1), obs=x)

    guide = type(run.guide)(model)
    guide(torch.randn(4, 3))
    size[0] = 3
    with pytest.raises(ValueError, match="latent site 'z' has 3 values in a row, 2 when the guide was set up"):
        guide(torch.randn(4, 3))
    size[0] = 2
    guide(torch.randn(4, 3))


def test_a_replay_buffer_and_latents_of_another_shape():
    run = EnergyTraining()
    run.step(torch.randn(4, 3))
    before = run.state()
    run.net.decoder, run.net.energy = torch.nn.Linear(4, 3), Energy(4)

    def tilted(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            energy_prior("ebm", run.net.energy, z)
            pyro.sample("x", dist.Normal(run.net.decoder(z), 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match="replay buffer keeps rows of 2 coordinates and the model now has 4"):
        run.loss.loss_and_grads(tilted, ShortRunGuide(tilted, num_steps=1, start=Prior()), torch.randn(4, 3))
    assert torch.equal(before["/replay/store"], run.state()["/replay/store"])


# ------------------------------------------------------------------------------------------------ dtypes and devices


@every_run
def test_data_of_another_dtype(kind):
    """As for Pyro: numbers are promoted, and the latents keep the dtype of their prior. Nets refuse, by name."""
    run, x = make(kind), torch.randn(4, 3, dtype=other_dtype())
    if kind in ("encoder", "teaching"):
        with pytest.raises(
            ValueError, match=r"several dtypes: (?=.*(argument 0|x) is )(?=.*parameter '.*weight' is ).*x\.to"
        ):
            run.step(x)
        assert run.step(x.to(torch.get_default_dtype())).isfinite().all()
        return
    assert run.step(x).isfinite().all()
    if isinstance(run, Training):
        assert run.guide.sample_posterior(x, num_samples=2)["z"].dtype == torch.get_default_dtype()
    else:
        assert run.step(x).dtype == torch.get_default_dtype()


@every_run
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "new"])
def test_data_on_another_device_are_named(kind, trained):
    """The meta device is one that every machine has."""
    run = make(kind)
    if trained:
        run.step(torch.randn(4, 3))
    before = run.state()
    with pytest.raises(ValueError, match=r"several devices: .*(argument 0|x) is meta.*module\.to\(device\)"):
        run.step(torch.randn(4, 3, device="meta"))
    assert unchanged(before, run.state())
    assert run.step(torch.randn(4, 3)).isfinite().all()


@every_run
def test_a_net_on_another_device_is_named(kind):
    run = make(kind)
    run.net.decoder.to("meta")
    with pytest.raises(ValueError, match=r"several devices: .*parameter 'net\$\$\$decoder\.weight' is meta"):
        run.step(torch.randn(4, 3))


@pytest.mark.parametrize("kind, part", [("teaching", "the energy's"), ("encoder", "the features'")])
def test_an_energy_or_features_on_another_device(kind, part):
    run = make(kind)
    (run.energy if kind == "teaching" else run.guide.features).to("meta")
    with pytest.raises(ValueError, match=rf"several devices: .*{part} parameter '.*weight' is meta"):
        run.step(torch.randn(4, 3))


def test_initial_params_on_another_device():
    kernel = ShortRunLangevin(Training().net.model, 2, adjust=True)
    start = {"z": torch.zeros(2, 4, 2, device="meta")}
    with pytest.raises(ValueError, match=r"initial_params\['z'\] is on meta"):
        VectorizedMCMC(kernel, 2, 2, start, 2, disable_progbar=True).run(torch.randn(4, 3))


# ------------------------------------------------------------------------------------------------ long runs


@pytest.mark.parametrize("kind", ["guide", "encoder", "energy", "teaching"])
def test_training_holds_no_objects(kind):
    """Batches of several sizes: what a size needs is kept once."""
    run, batches = make(kind), [torch.randn(rows, 3) for rows in (4, 5, 6)]

    def objects(rounds: int) -> int:
        for _ in range(rounds):
            for x in batches:
                run.step(x)
        gc.collect()
        return len(gc.get_objects())

    objects(1)
    before = objects(1)
    assert abs(objects(2) - before) < 6  # fewer than one in a step


def unchanged(before: dict, after: dict) -> bool:
    """What was there is as it was; a first step may have made more."""
    return all(torch.equal(v, after[k]) if isinstance(v, Tensor) else v == after[k] for k, v in before.items())
