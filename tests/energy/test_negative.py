"""The negative phase: which part of a model its runs see, where they begin, what they keep."""

from __future__ import annotations

import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta
from tilted import Layered, Quadratic, encoder, one_layer, silent, two_layers
from torch import Tensor

from pyro_shortrun import EnergyELBO, Persistent, energy_prior
from pyro_shortrun.compile import Compiler, Untouched
from pyro_shortrun.energy import TiltedPrior
from pyro_shortrun.runs import ShortRun
from pyro_shortrun.starts import Replay


def test_the_decoder_does_not_run_in_the_negative_phase():
    calls = []

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            energy_prior("ebm", lambda z: z.square(), z)
            calls.append(z)
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    prior = TiltedPrior(model)
    call = prior.bind((torch.zeros(3),), {})
    EnergyELBO(Trace_ELBO(), num_steps=10).runs.make(call, 2)
    assert len(calls) == 1


def test_plain_factors_and_data_are_no_part_of_the_prior():
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.factor("likelihood", -5 * (z - 3).square())
        pyro.sample("y", dist.Normal(z, 0.1), obs=x)
        energy_prior("ebm", lambda z: z.square(), z)

    call = TiltedPrior(model).bind((torch.tensor(2.0),), {})
    u = torch.tensor([[[0.3]], [[-1.0]]])
    exact = dist.Normal(0.0, 1.0).log_prob(u).squeeze(-1) - u.squeeze(-1).square()
    torch.testing.assert_close(call.density(u), exact)


def test_latents_after_the_last_energy_are_not_run():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(()), 1.0))
            energy_prior("ebm", lambda z: z.square(), z2)
            z1 = pyro.sample("z1", dist.Normal(z2, 1.0))
            pyro.sample("x", dist.Normal(z1, 0.5), obs=x)

    call = TiltedPrior(model).bind((torch.zeros(3),), {})
    assert [s.name for s in call.density.layout.sites] == ["z2"]


def test_compiled_runs_equal_eager_ones():
    x, ends = torch.zeros(4), []
    energy, runs = Quadratic(0.5), EnergyELBO(Trace_ELBO(), num_steps=6).runs
    for compile in (False, True):
        prior = TiltedPrior(one_layer(energy), compile)
        if compile:
            prior._compiler = Compiler(Untouched())
        for c in (0.5, 2.0):  # a changed parameter changes the result
            energy.c.data.fill_(c)
            pyro.set_rng_seed(3)
            call = prior.bind((x,), {})
            ends.append(runs.make(call, 2).end)
        if compile:
            assert len(prior._compiler._graphs) == 2  # of the steps and of the end, not of each call
    torch.testing.assert_close(ends[:2], ends[2:])
    assert not torch.allclose(ends[0], ends[1])


def test_another_batch_size_is_compiled_once():
    energy = Quadratic(0.5)
    elbo = EnergyELBO(Trace_ELBO(), num_steps=6, start=Replay(50))
    elbo._prior = TiltedPrior(one_layer(energy), compile=True)
    elbo._prior._compiler = compiler = Compiler(Untouched())
    counts = []
    for size in (4, 7, 4, 7):
        elbo.loss_and_grads(elbo._prior.model, encoder, torch.zeros(size))
        energy.c.data += 0.1
        counts.append(len(compiler._graphs))
    assert counts[1:] == [2 * counts[0]] * 3 and compiler._renewals == 0


@pytest.mark.parametrize("start", [Replay(50, refresh=0.0), Persistent()], ids=lambda s: type(s).__name__)
def test_runs_that_go_on(start):
    """Steps too small to get anywhere in one run do so in many: the variance falls from 1 towards 1 / 9."""
    model, x = one_layer(Quadratic(8.0)), torch.zeros(50)
    elbo = EnergyELBO(Trace_ELBO(), num_steps=2, step_size=0.01, start=start)
    guide = AutoDelta(model)
    guide(x)
    means = []
    for _ in range(60):
        elbo.loss_and_grads(model, guide, x)
        means.append(elbo.info.negative["ebm"])
    assert means[0] > 2.5 and sum(means[-10:]) / 10 < 1.0  # 4 at the start, 8 / 18 in the end


@pytest.mark.parametrize("make", [lambda: Replay(50), Persistent], ids=["Replay", "Persistent"])
def test_states_are_saved_and_loaded(make):
    """Into a start that has not been called, too."""
    start, model, x = make(), one_layer(Quadratic()), torch.zeros(7)
    guide = AutoDelta(model)
    guide(x)
    EnergyELBO(Trace_ELBO(), num_steps=2, start=start).loss_and_grads(model, guide, x)
    again = make()
    again.load_state_dict(start.state_dict())
    assert torch.equal(again.store, start.store) and again.store.abs().sum() > 0
    EnergyELBO(Trace_ELBO(), num_steps=2, start=again).loss_and_grads(model, guide, x)
    assert not torch.equal(again.store, start.store)


def test_replay_takes_other_batch_sizes():
    start, model = Replay(10), one_layer(Quadratic())
    elbo = EnergyELBO(Trace_ELBO(), num_steps=2, start=start)
    for size in (4, 7, 12, 1):
        elbo.loss_and_grads(model, encoder, torch.zeros(size))
    assert int(start.written) == 4 + 7 + 10 + 1


def test_frozen_rows_are_not_replayed():
    """They would freeze again: new draws of the prior take their place."""
    start = Replay(40, refresh=0.0)
    call = TiltedPrior(one_layer(Quadratic())).bind((torch.zeros(40),), {})
    elbo = EnergyELBO(Trace_ELBO(), num_steps=20, start=start)
    frozen = torch.arange(40) % 2 == 0
    end = torch.where(frozen, 7.0, 0.25).reshape(1, 40, 1)
    start.setup(call.density)
    elbo._keep(call, ShortRun(end, end, end, replace(silent(end), frozen=frozen.unsqueeze(0))))
    assert not (start.store == 7.0).any() and (start.store == 0.25).sum() == 20


def test_replay_of_another_model_is_refused():
    start = Replay(50)
    elbo = EnergyELBO(Trace_ELBO(), num_steps=2, start=start)
    elbo.runs.make(TiltedPrior(one_layer(Quadratic())).bind((torch.zeros(3),), {}), 1)
    with pytest.raises(ValueError, match="rows of 1 coordinates and the model now has 2"):
        elbo.runs.make(TiltedPrior(two_layers(Layered())).bind((torch.zeros(3),), {}), 1)


def test_methods_as_models_keep_their_graphs():
    """``obj.model`` is a new object each time."""

    class Owner:
        def model(self, x: Tensor) -> None:
            one_layer(Quadratic())(x)

    owner, elbo = Owner(), EnergyELBO(Trace_ELBO(), num_steps=2)
    elbo.loss_and_grads(owner.model, encoder, torch.zeros(3))
    prior = elbo._prior
    elbo.loss_and_grads(owner.model, encoder, torch.zeros(3))
    assert elbo._prior is prior


def test_rows_that_are_not_finite_are_left_out():
    def energy(z: Tensor) -> Tensor:
        return torch.where(z > 0.5, torch.full_like(z, torch.nan), z.square())

    model, x = one_layer(energy), torch.zeros(40)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(()) - 3, 0.1))

    elbo = EnergyELBO(Trace_ELBO(), num_steps=20)
    with pytest.warns(UserWarning, match="are left out"):
        elbo.loss_and_grads(model, guide, x)
    assert 0 < elbo.info.excluded < 40
    elbo.loss_and_grads(model, guide, x)  # warned about once
    assert math.isfinite(elbo.info.negative["ebm"])
