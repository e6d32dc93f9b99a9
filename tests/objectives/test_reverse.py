"""GaussianReverse: its least squares, its pilots, and when they are made."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import gaussian, posterior
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoNormal
from table import bound, curved
from torch import Tensor

from pyro_shortrun import GaussianReverse, Init, Langevin, Persistent, Prior, ShortRunELBO, ShortRunGuide, StepSize
from pyro_shortrun.guides import tune_on_grid
from pyro_shortrun.objectives.reverse_kernels import Fit


@pytest.mark.parametrize("dense", [False, True])
def test_least_squares(dense: bool):
    """The coefficients that made-up steps were made with, rows that are not valid left out."""
    layout, eta = bound(curved).layout, torch.full((2, 2), 0.1)
    u, slope = torch.randn(2, 4000, 3, 2), torch.randn(2, 4000, 3, 2)
    target = 2.0 + 0.5 * u - 0.3 * slope + torch.randn_like(u) / (2 * eta[0]).sqrt()
    valid = torch.rand(4000, 3) < 0.9
    before = u + 0.2 * (target - slope)
    before[:, ~valid] = 100.0
    fit = Fit(layout, eta, dense)
    for part in (slice(1000), slice(1000, 4000)):
        fit.update(before[:, part], u[:, part], 0.2 * slope[:, part], valid[part])
    intercept, slopes, whiten = fit.solve()
    eye = torch.eye(2)
    wanted = torch.cat([0.5 * eye, -0.3 * eye]) if dense else torch.tensor([[0.5, 0.5], [-0.3, -0.3]])
    torch.testing.assert_close(intercept, torch.full_like(intercept, 2.0), atol=0.1, rtol=0)
    torch.testing.assert_close(slopes, wanted.expand_as(slopes), atol=0.1, rtol=0)
    torch.testing.assert_close(whiten, (eye if dense else torch.ones(2)).expand_as(whiten), atol=0.05, rtol=0)


def test_what_a_run_is_weighed_by_is_that_of_its_own_call():
    """Bounds do not depend on earlier calls: other data, other steps, training."""

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.3), obs=x)

    def make() -> ShortRunGuide:
        pyro.clear_param_store()
        objective = GaussianReverse(pilots=2000)
        return ShortRunGuide(model, num_steps=10, dynamics=Langevin(StepSize(0.02)), objective=objective, start=Prior())

    def bound(guide: ShortRunGuide, x: float) -> float:
        pyro.set_rng_seed(0)
        return -ShortRunELBO(2000).loss(model, guide, torch.tensor(x))

    fresh = bound(make(), 4.0)
    guide = make()
    bound(guide, 0.0)
    SVI(model, guide, pyro.optim.SGD({"lr": 0.0}), Trace_ELBO()).step(torch.tensor(0.0))
    guide.dynamics.step_size.assign(torch.tensor([0.001]))
    bound(guide, 0.0)
    guide.dynamics.step_size.assign(torch.tensor([0.02]))
    assert bound(guide, 4.0) == pytest.approx(fresh, rel=1e-4)
    assert bound(guide.eval(), 4.0) == pytest.approx(fresh, rel=1e-4)


@pytest.mark.parametrize("start", [AutoNormal, AutoIAFNormal, lambda model: Init(pyro.infer.autoguide.init_to_median)])
def test_reverse_takes_any_start_with_a_density(start):
    model, evidence = posterior([4.0, 9.0])
    guide = ShortRunGuide(model, num_steps=4, step_size=0.02, objective=GaussianReverse(pilots=512), start=start(model))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert all(math.isfinite(svi.step()) for _ in range(3))
    with pytest.raises(NotImplementedError, match="everywhere"):
        ShortRunGuide(model, objective=GaussianReverse(True), start=AutoIAFNormal(model))()


def test_persistent_starts_have_no_reverse():
    model, _ = gaussian(4.0, 1.0)
    with pytest.raises(NotImplementedError, match="no density"):
        ShortRunGuide(model, objective=GaussianReverse(), start=Persistent()).log_weight(3)


def test_an_objective_is_of_one_guide():
    """It holds the temperatures of that one."""
    objective, guides = GaussianReverse(pilots=64), []
    for precisions in ([4.0], [4.0, 9.0]):
        model, _ = posterior(precisions)
        guides.append(lambda model=model: ShortRunGuide(model, num_steps=3, objective=objective, start=Prior()))
    assert math.isfinite(guides[0]().log_weight().item())
    with pytest.raises(ValueError, match="make a GaussianReverse for each guide"):
        guides[1]()


def test_calls_between_tunings_make_no_pilots():
    """They carry the increments of the last tuned run."""
    model, _ = posterior([4.0])
    guide = ShortRunGuide(
        model, num_steps=3, step_size=0.05, objective=GaussianReverse(pilots=64), tune_every=3, start=Prior()
    )
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    carried = []
    for _ in range(6):
        assert math.isfinite(svi.step())
        carried.append(guide.info.carried)
    assert carried == [False, True, True] * 2


def test_grid_with_pilots():
    """Every candidate is weighed by its own pilots."""
    model, _ = posterior([25.0])
    options = dict(dynamics=Langevin(StepSize(0.00185)), objective=GaussianReverse(pilots=512, fresh=256))
    guide = ShortRunGuide(model, num_steps=25, **{"start": Prior(), **options})
    pyro.set_rng_seed(0)
    assert tune_on_grid(guide, factors=(0.25, 1.0, 4.0, 16.0), num_particles=1000).best == 4.0  # 0.0074 is best


def test_grid_with_pilots_in_any_order():
    model, _ = posterior([25.0])
    options = dict(dynamics=Langevin(StepSize(0.0074)), objective=GaussianReverse(pilots=1000))
    guide = ShortRunGuide(model, num_steps=25, **{"start": Prior(), **options}).setup()
    found = set()
    for factors in ((0.1, 1.0, 8.0), (8.0, 1.0, 0.1)):
        for mode in (True, False):
            guide.train(mode)
            pyro.set_rng_seed(0)
            found.add(tune_on_grid(guide, factors=factors, num_particles=500).best)
    assert found == {1.0}
    with pytest.raises(ValueError, match="max_invalid"):
        tune_on_grid(guide, max_invalid=5)
    for factors in (1.0, ["a"]):
        with pytest.raises(ValueError, match="factors"):
            tune_on_grid(guide, factors=factors)
    with pytest.raises(ValueError, match="ShortRunGuide"):
        tune_on_grid(AutoNormal(model))
