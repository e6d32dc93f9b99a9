"""The table of a guide's posterior."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_shortrun import Prior, SemiImplicitGuide, ShortRunGuide, StepSize
from pyro_shortrun.guides.summary import table


def test_table():
    draws = {"z": torch.arange(101.0), "w": torch.stack([torch.arange(101.0), 2 * torch.arange(101.0)], 1)}
    head, z, first, second = (line.split() for line in table(draws, 0.8).splitlines())
    assert head == ["mean", "std", "median", "10.0%", "90.0%"]
    assert z[:4] == ["z", "50.00", "29.30", "50.00"] and float(z[5]) - float(z[4]) == 80
    assert first == ["w[0]", *z[1:]] and second[0] == "w[1]" and float(second[1]) == 100


def model(x: torch.Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.deterministic("double", 2 * z)
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_a_guide_prints_its_posterior_and_how_good_it_is(capsys):
    """The posterior is N(1.5, 1/4)."""
    pyro.set_rng_seed(0)
    ShortRunGuide(model, num_steps=2).summary(torch.full((3,), 2.0), num_samples=2000)
    _, z, double, adjusted, reliable = capsys.readouterr().out.splitlines()
    assert abs(float(z.split()[1]) - 1.5) < 0.05 and abs(float(z.split()[2]) - 0.5) < 0.03
    assert abs(float(double.split()[1]) - 3.0) < 0.1
    assert "Acceptance of the adjusted steps: 0." in adjusted and "good (good to 0.7)" in reliable


def test_runs_far_from_the_posterior_are_called_so(capsys):
    pyro.set_rng_seed(0)
    ShortRunGuide(model, num_steps=1, start=Prior(), step_size=StepSize(1e-3)).summary(torch.full((300,), 4.0))
    lines = capsys.readouterr().out.splitlines()
    assert "they are far from the posterior" in lines[-1] and not any("Acceptance" in line for line in lines)


@pytest.mark.parametrize(("options", "name"), [(dict(num_samples=1), "num_samples"), (dict(prob=2), "prob")])
def test_bad_input(options, name):
    with pytest.raises(ValueError, match=name):
        ShortRunGuide(model).summary(torch.ones(2), **options)


def test_other_guides_print_their_draws(capsys):
    SemiImplicitGuide(model).summary(torch.ones(3), num_samples=50)
    head, z = capsys.readouterr().out.splitlines()
    assert head.split()[0] == "mean" and z.split()[0] == "z" and len(z.split()) == 6
