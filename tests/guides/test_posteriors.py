"""The plain swap on programs of the benchmark, with data made there: its laws, not its times."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyro
import pytest
import torch

from pyro_shortrun import ShortRunGuide

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture
def posteriors(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import posteriors

    return posteriors


@pytest.mark.parametrize("name", ["AR(2) around 100", "negative binomial"])
def test_right_in_all_three_columns(name, posteriors):
    """Against five times as many adjusted steps, with other random numbers: means within .1 sd, deviations within 10 %,
    correlations within .1. Of 2000 draws each, what is right fails one in a thousand."""
    program = posteriors.POSTERIORS[name]
    args = program.arguments(np.random.default_rng(posteriors.SEED))
    tensors = tuple(map(torch.as_tensor, args))

    def draws(seed, **options):
        pyro.set_rng_seed(seed)
        pyro.clear_param_store()
        guide = ShortRunGuide(program.model)
        return {k: v.numpy() for k, v in guide.sample_posterior(*tensors, num_samples=2000, **options).items()}

    known = posteriors.Problem(name, args, program.parameters(draws(1, adjust=100)))
    mean, sd, gap = known.errors(draws(2))
    assert mean < 0.1 and sd < 10 and gap < 0.1
