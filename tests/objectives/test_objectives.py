"""What a guide does with every objective and dynamics (``table.ROWS``), and what they refuse."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import gaussian, posterior
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, AutoNormal, init_to_value
from table import ROWS, curved, langevin

from pyro_shortrun import (
    Annealed,
    GaussianReverse,
    Hamiltonian,
    Init,
    Langevin,
    Linearized,
    Mixture,
    PathDensity,
    Prior,
    ShortRunELBO,
    ShortRunGuide,
    ShortRunLangevin,
    StepSize,
    to_arviz,
)
from pyro_shortrun.density import Call
from pyro_shortrun.objectives.annealed import LangevinTransition
from pyro_shortrun.objectives.reverse_kernels import Mirror
from pyro_shortrun.starts import GaussianBase

KINDS = [k for k, row in ROWS.items() if row.start == "prior"]
every_kind = pytest.mark.parametrize("name", KINDS)


@every_kind
def test_runs_rows_and_trajectories(name: str):
    """Rows in a plate, SVI with both losses, draws, trajectories, evaluation, and a run without gradients."""
    guide = ShortRunGuide(curved, num_steps=3, **ROWS[name].guide(), start=Prior())
    for elbo in (Trace_ELBO(), ShortRunELBO(2)):
        svi = SVI(curved, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
        assert all(math.isfinite(svi.step()) for _ in range(2))
    assert math.isfinite(svi.evaluate_loss())
    assert guide.sample_posterior(num_samples=5)["z"].shape == (1, 5, 3, 2)
    assert guide.trajectory(num_chains=4)["z"].shape == (4, 4, 3, 2)
    assert guide().keys() == {"z"} and guide.info.log_det.shape == (3,)


@every_kind
def test_a_row_that_meets_no_finite_density_is_frozen(name: str):
    def model() -> None:
        with pyro.plate("data", 40):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(torch.where(z > 1.2, torch.inf, z), 1.0), obs=torch.full((40,), 3.0))

    guide = ShortRunGuide(model, num_steps=4, **ROWS[name].guide(StepSize(0.3)), start=Prior())
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    with pytest.warns(UserWarning, match="non-finite"):
        assert math.isfinite(svi.step())
    assert 0 < guide.info.nonfinite and guide.step_sizes().isfinite().all()
    assert guide()["z"].isfinite().all()


@pytest.mark.parametrize("name", [k for k in KINDS if ROWS[k].dynamics is langevin])
def test_a_first_guess_of_the_step_is_backed_off(name: str):
    """Whatever the objective, on a stiff model with a wide heavy-tailed prior, and nothing is NaN."""

    def model() -> None:
        b = pyro.sample("b", dist.StudentT(2.0, torch.zeros(3), 10.0).to_event(1))
        scale = pyro.sample("scale", dist.HalfCauchy(5.0))
        with pyro.plate("data", 100):
            pyro.sample("y", dist.Normal(b.sum(), 0.01 + scale), obs=torch.full((100,), 2.0))

    guide = ShortRunGuide(model, num_steps=10, objective=ROWS[name].objective(), step_size=0.1, start=Prior())
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert all(math.isfinite(svi.step()) for _ in range(5))
    assert guide.step_sizes() < 0.1
    assert all(v.isfinite().all() for v in guide().values())


@pytest.mark.parametrize("options", [{}, {"objective": Annealed(), "dynamics": Hamiltonian(0.1)}])
def test_a_step_that_was_backed_off_is_still_the_guides_own(options: dict):
    """It has one name in Pyro's store, in which SVI tunes it."""
    model, _ = posterior([25.0])
    guide = ShortRunGuide(model, num_steps=3, **(options or {"step_size": 0.1}), start=Prior())
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step()
    names = set(pyro.get_param_store().keys())
    before = guide.step_sizes().clone()
    svi.step()
    assert set(pyro.get_param_store().keys()) == names and guide.step_sizes() != before
    assert {n for n in names if "step_size" in n} == {"ShortRunGuide.dynamics.step_size.value"}


def masked() -> None:
    """log p(x) = -1.4305; the other latent is out of the density."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with poutine.mask(mask=False):
        pyro.sample("m", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 0.5), obs=torch.tensor(1.0))


@every_kind
def test_masked_latents(name: str):
    """Do not count, or are refused by name."""
    options = ROWS[name].guide()
    guide = ShortRunGuide(masked, num_steps=20, **{"start": Prior(), **options})
    if not options["objective"].takes_masks:
        with pytest.raises(NotImplementedError, match="'m' lies in poutine.mask"):
            guide.log_weight()
        return
    log_w = guide.log_weight(num_particles=4000).detach() + 1.4305
    error = log_w.exp().std().item() / 4000**0.5
    assert log_w.mean() < 0 and error < 0.15 and log_w.exp().mean().item() == pytest.approx(1.0, abs=4 * error)


@every_kind
def test_only_importance_weights_are_exported(name: str):
    model, _ = posterior([4.0])
    options = ROWS[name].guide()
    stats = to_arviz(ShortRunGuide(model, num_steps=3, **{"start": Prior(), **options}), num_samples=10, num_chains=2)[
        "sample_stats"
    ]
    assert ("log_q" in stats) == options["objective"].weighs


def test_every_call_has_its_own_increments():
    """They cost nothing extra, so that calls between tunings need not carry those of another run."""
    model, _ = gaussian(4.0, 1.0)
    guide = ShortRunGuide(model, num_steps=3, step_size=0.05, objective=Annealed(), tune_every=3, start=Prior())
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(3):
        svi.step(4)
        assert not guide.info.carried and guide.info.log_det.abs().sum() > 0


def thinned() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 6, subsample_size=2):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(2))


REFUSED = {
    "mixture": "Mixture",
    "linearized": "Linearized",
    "dense": "dense",
    "Lanczos": "the stochastic log-determinant",
}


def test_a_subsampled_model_with_global_latents():
    """Weights of local parts; those that cannot be are refused by name."""

    for name in KINDS:
        guide = ShortRunGuide(thinned, num_steps=3, **ROWS[name].guide(), start=Prior())
        svi = SVI(thinned, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        refused = next((word for part, word in REFUSED.items() if part in name), None)
        if refused is None:
            assert all(math.isfinite(svi.step()) for _ in range(2))
        else:
            with pytest.raises(NotImplementedError, match=refused):
                svi.step()
        pyro.clear_param_store()


def test_a_gaussian_start_has_its_own_gradient_in_an_arrowhead():
    """Also where a subsampled plate makes the local part of log q count several times."""

    density = Call.of(thinned, (), {}).density
    u, loc, scale = torch.randn(1, 1, 3), torch.randn(1, 3), torch.rand(1, 3) + 0.5
    step = LangevinTransition(Langevin(0.1), GaussianBase(loc, scale), Mirror())
    _, _, slope = step.evaluate(density, u.requires_grad_(), (loc, scale), create_graph=False)
    torch.testing.assert_close(slope * density.layout.drift_scale(u), (loc - u) / scale.square())


def test_improper_priors_are_no_start():
    def model() -> None:
        b = pyro.sample("b", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("y", dist.Normal(b, 1.0), obs=torch.tensor(3.0))

    with pytest.raises(ValueError, match="'b' has an improper prior"):
        ShortRunGuide(model, start=Prior())()
    start = AutoNormal(model, init_loc_fn=init_to_value(values={"b": torch.tensor(1.0)}))
    guide = ShortRunGuide(model, num_steps=3, start=start, objective=GaussianReverse(pilots=64))
    assert math.isfinite(guide.log_weight().item())


def test_arguments_and_dynamics_that_do_not_go_together():
    model, _ = posterior([4.0])
    with pytest.raises(ValueError, match="Annealed"):
        ShortRunGuide(model, dynamics=Hamiltonian(0.1), start=Prior())
    with pytest.raises(ValueError, match="Langevin"):
        ShortRunGuide(model, dynamics=Hamiltonian(0.1), objective=GaussianReverse(), start=Prior())
    with pytest.raises(ValueError, match="damping"):
        Hamiltonian(0.1, damping=1.5)
    with pytest.raises(ValueError, match="at least 2"):
        Mixture(1)
    for wrong in (0, 10.5, "a", True):
        with pytest.raises(ValueError, match="pilots"):
            GaussianReverse(pilots=wrong)
        with pytest.raises(ValueError, match="num_runs"):
            Mixture(wrong if wrong else 0.5)
    with pytest.raises(ValueError, match="tempered"):
        GaussianReverse(PathDensity())
    for objective in (Mixture(4), GaussianReverse()):
        with pytest.raises(ValueError, match="noise"):
            ShortRunGuide(model, dynamics=Langevin(0.1, noise=False), objective=objective, start=Prior())
    for objective in (Mixture(4), GaussianReverse(), Linearized()):
        with pytest.raises(NotImplementedError, match=type(objective).__name__):
            ShortRunLangevin(model, objective=objective)
    model, _ = posterior([4.0, 9.0])
    with pytest.raises(NotImplementedError, match="covariance of the start"):
        ShortRunGuide(model, objective=Linearized(), start=AutoIAFNormal(model))()
    with pytest.raises(NotImplementedError, match="Langevin"):
        ShortRunLangevin(model, dynamics=Hamiltonian(0.1))


def test_what_annealed_refuses():
    model, _ = gaussian(4.0, 1.0)
    for start in (Init(pyro.infer.autoguide.init_to_median), AutoIAFNormal(model), AutoMultivariateNormal(model)):
        guide = ShortRunGuide(model, num_steps=2, objective=Annealed(), start=start)
        with pytest.raises(NotImplementedError, match=r"start=Prior\(\), AutoNormal"):
            guide(3)
    pyro.clear_param_store()
    ShortRunGuide(model, num_steps=2, objective=Annealed(), start=Prior()).setup(3)
    with pytest.raises(ValueError, match="2 temperatures for 4 steps.*clear_param_store"):
        ShortRunGuide(model, num_steps=4, objective=Annealed(), start=Prior())(3)
    with pytest.raises(ValueError, match="noise"):
        ShortRunGuide(model, dynamics=Langevin(0.1, noise=False), objective=Annealed(), start=Prior())
