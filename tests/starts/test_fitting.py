"""The fit of a Gaussian: exact on Gaussian targets, the same in all units, and stationary where there is none."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_shortrun.density.call import Call
from pyro_shortrun.starts.fitting import fit_normal
from pyro_shortrun.starts.natural import natural_fit
from pyro_shortrun.starts.newton import laplace_on_paths
from pyro_shortrun.starts.normal import Normal, antithetic, lower
from pyro_shortrun.starts.target import Target

COVARIANCE = [[4.0, -1.0, 0.3], [-1.0, 1.0, 0.2], [0.3, 0.2, 0.5]]
UNITS = [1.0, 1e-4, 1e5]


def gaussian(units: list[float]) -> tuple[Target, torch.Tensor, torch.Tensor]:
    """A Gaussian target of known mean and covariance, and an evidence of e^0."""
    unit = torch.tensor(units)
    loc, covariance = unit * torch.tensor([1.0, -3.0, 20.0]), torch.tensor(COVARIANCE) * unit.outer(unit)

    def model() -> None:
        pyro.sample("z", dist.MultivariateNormal(loc, covariance))

    return Target(Call.of(model, (), {}).jointly().density), loc.double(), covariance.double()


@pytest.mark.parametrize("units", [[1.0, 1.0, 1.0], UNITS])
def test_a_gaussian_is_fitted_exactly(units: list[float], dtype: torch.dtype):
    """By the Laplace approximation, in one step of natural gradients, and by both; the bound is the evidence."""
    target, loc, covariance = gaussian(units)
    sd = covariance.diagonal().sqrt()
    noise = antithetic(16, 3, loc)
    wide = Normal(loc + sd, torch.diag(2 * sd))
    fits = [
        laplace_on_paths(target, torch.zeros(1, 3).double(), noise)[0],
        natural_fit(target, wide)[0],
        fit_normal(target, torch.zeros(2, 3).double()).normal,
    ]
    tolerance = 1e-4 if dtype == torch.float64 else 3e-2  # natural gradients end at .02 of a standard deviation
    for fit, slack in zip(fits, (1, 200, 200), strict=True):
        assert ((fit.loc - loc).abs() / sd).max() < slack * tolerance
        ratio = torch.linalg.solve(covariance, fit.factor @ fit.factor.mT)
        assert (torch.linalg.eigvals(ratio).abs() - 1).abs().max() < slack * tolerance * 2
        value, error = fit.bound(target, noise)
        assert abs(value) < 1e-3 + 1e-2 * (slack > 1) and error < 0.01


def test_steps_are_the_same_in_all_units():
    fits = []
    for units in ([1.0, 1.0, 1.0], UNITS):
        pyro.set_rng_seed(0)
        target, loc, covariance = gaussian(units)
        sd = covariance.diagonal().sqrt()
        fit, residual = natural_fit(target, Normal(loc + sd, torch.diag(3 * sd)), max_steps=3)
        fits.append((fit.loc / torch.tensor(units), residual.mean))
    assert torch.allclose(fits[0][0], fits[1][0], rtol=1e-5) and torch.allclose(fits[0][1], fits[1][1], rtol=1e-4)


def test_stationary_on_a_skewed_target():
    """Of -log pi = e^u - a u, E[e^u] = a and the variance is 1 / a: m = log a - 1 / (2 a)."""
    a = 2.5

    def model() -> None:
        u = pyro.sample("u", dist.Normal(0.0, 1.0).mask(False))
        pyro.factor("f", a * u - u.exp())

    target = Target(Call.of(model, (), {}).jointly().density)
    fit = fit_normal(target, torch.zeros(3, 1).double())
    assert fit.kind == "natural gradients" and fit.converged
    assert math.isclose(fit.normal.loc.item(), math.log(a) - 0.5 / a, abs_tol=0.06)
    assert math.isclose(fit.normal.factor.item() ** 2, 1 / a, rel_tol=0.1)


def test_what_is_not_finite_does_not_count():
    """A target with a wall, and one whose linear algebra fails at some states, one after the other."""

    def walled() -> None:
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        pyro.factor("f", torch.where(u > 1.0, torch.nan, 0.0))

    def failing() -> None:
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        pyro.factor("f", torch.linalg.cholesky((2.0 - u).reshape(1, 1)).log().sum())

    states = torch.tensor([[0.0], [3.0], [0.5], [2.5]]).double()
    for model in (walled, failing):
        target = Target(Call.of(model, (), {}).jointly().density)
        assert target.value(states).isfinite().tolist() == [True, False, True, False]


def test_lower_is_a_factor():
    root = torch.randn(2, 4, 4).double()
    factor = lower(root)
    assert torch.allclose(factor @ factor.mT, root @ root.mT) and (factor.diagonal(dim1=-2, dim2=-1) > 0).all()
    assert torch.equal(factor, factor.tril())


def test_no_place_is_finite():
    def model() -> None:
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        pyro.factor("f", u * torch.nan)

    with pytest.raises(ValueError, match="no Gaussian has a finite bound.*start=Prior"):
        fit_normal(Target(Call.of(model, (), {}).jointly().density), torch.zeros(2, 1).double())


def test_two_modes_are_two():
    """Both are found from five places, and one that is 10 nats lower does not count."""

    def model(depth: float) -> None:
        u = pyro.sample("u", dist.Normal(0.0, 100.0))
        pyro.factor("f", torch.logaddexp(-0.5 * (u - 5.0) ** 2, -depth - 0.5 * (u + 5.0) ** 2))

    for depth, others in ((0.0, 1), (10.0, 0)):
        target = Target(Call.of(model, (depth,), {}).jointly().density)
        fit = fit_normal(target, torch.tensor([[-2.0], [0.5], [2.0]]).double())
        assert len(fit.others) == others
        assert abs(fit.normal.loc.item()) == pytest.approx(5.0, abs=0.1)
    assert fit.normal.loc > 0


def test_a_narrow_peak_does_not_win():
    """A centred hierarchy, whose density has no upper bound where its scale vanishes: the ascent from a unit Gaussian
    finds the broad part, whose bound is that of the same hierarchy non-centred within a nat."""
    y = torch.randn(30, 4) + torch.randn(30, 1) + 3.0

    def centred() -> None:
        scale = pyro.sample("scale", dist.HalfCauchy(1.0))
        with pyro.plate("groups", 30):
            z = pyro.sample("z", dist.Normal(3.0, scale))
            pyro.sample("y", dist.Normal(z.unsqueeze(-1), 1.0).to_event(1), obs=y)

    def non_centred() -> None:
        scale = pyro.sample("scale", dist.HalfCauchy(1.0))
        with pyro.plate("groups", 30):
            z = 3.0 + scale * pyro.sample("e", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z.unsqueeze(-1), 1.0).to_event(1), obs=y)

    fits = []
    for model in (centred, non_centred):
        target = Target(Call.of(model, (), {}).jointly().density)
        fits.append(fit_normal(target, torch.zeros(1, 31).double()))
    assert fits[0].bound == pytest.approx(fits[1].bound, abs=1.0) and all(fit.converged for fit in fits)
