"""Refiner: conditions, references, schedules, broken rows, replay."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from teachers import MEAN, ROOT, Around, Broken, Encoder, Gaussian, Linear, sgd, teach
from torch import Tensor, nn

from pyro_shortrun import MCMCTeaching, Refiner
from pyro_shortrun.compile import Compiler, Untouched
from pyro_shortrun.density import LogDensity
from pyro_shortrun.starts import Replay
from pyro_shortrun.teaching import AncestralSampler


@pytest.mark.parametrize("compile", [False, True])
def test_contexts_and_parameters_reach_the_runs(compile):
    """Ends without noise, against the closed form; context and parameter change after compilation."""
    energy = Around()
    refiner = Refiner(energy, 4, 0.1, noise=0.0, compile=compile)
    if compile:
        refiner._prior._compiler = Compiler(Untouched())
    for scale in (1.0, 2.0):
        with torch.no_grad():
            energy.scale.fill_(scale)
        x, c = torch.randn(5, 2), torch.randn(5, 2)
        torch.testing.assert_close(refiner(x, c).end, c + (1 - 0.1 * scale) ** 4 * (x - c))
    if compile:
        assert not refiner._prior._compiler.is_eager


def test_conditional_teaching():
    """Generator and energy know the context; the student gets it along with its samples."""
    energy, model = Around(), Linear()
    teaching = teach(energy, model, num_steps=2)
    x, c = torch.randn(6, 2), 5 * torch.randn(6, 2)
    teaching.step(x, c)
    with torch.no_grad():  # b is learned from x - c, not from x
        torch.testing.assert_close(model.b, torch.zeros(2), rtol=0, atol=0.5)
    assert teaching.sample(x, c).end.sub(c).abs().max() < c.abs().max()


def test_reference_and_score():
    refiner = Refiner(Gaussian(MEAN, ROOT), 150, 0.2, noise=0.0, reference=dist.Normal(0.0, 0.5))
    p = torch.tensor(ROOT)
    mode = -torch.linalg.solve((p + p.T) / 2 + 4 * torch.eye(2), torch.tensor(MEAN))
    torch.testing.assert_close(refiner(torch.zeros(3, 2)).end, mode.expand(3, 2))
    x = torch.randn(4, 2)
    expected = dist.Normal(0.0, 0.5).log_prob(x).sum(-1) - Gaussian(MEAN, ROOT)(x)
    torch.testing.assert_close(refiner.log_density(x), expected)


def test_bounded_reference_keeps_runs_inside():
    refiner = Refiner(Gaussian([30.0, -30.0]), 50, 0.1, reference=dist.Uniform(0.0, 1.0))
    end = refiner(torch.full((20, 2), 0.5)).end
    assert ((end >= 0) & (end <= 1)).all() and end[:, 0].mean() < 0.2 and end[:, 1].mean() > 0.8


def test_images_keep_their_shape():
    class Sum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * torch.arange(12.0).reshape(1, 3, 4)).flatten(1).sum(1)

    end = Refiner(Sum(), 1, 0.1, noise=0.0)(torch.zeros(5, 1, 3, 4)).end
    torch.testing.assert_close(end, -0.1 * torch.arange(12.0).reshape(1, 1, 3, 4).expand(5, 1, 3, 4))


def test_schedules():
    """Number of steps, step size and noise by functions of the iteration, and by a torch scheduler that is read."""
    dummy = torch.optim.SGD([torch.zeros((), requires_grad=True)], lr=0.2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(dummy, 0.5)
    x, flat = torch.zeros(3, 2), Gaussian([1.0, 1.0])
    refiner = Refiner(flat, lambda t: 1 + t, scheduler, noise=lambda t: 0.0)
    torch.testing.assert_close(refiner(x, iteration=2).end, torch.full((3, 2), -0.6))
    dummy.step()
    scheduler.step()
    torch.testing.assert_close(refiner(x, iteration=0).end, torch.full((3, 2), -0.1))
    refiner = Refiner(flat, 1, lambda t: 0.1 / (1 + t), noise=lambda t: float(t))
    torch.testing.assert_close(refiner(x, iteration=0).end, torch.full((3, 2), -0.1))
    pyro.set_rng_seed(0)
    end = refiner(x, iteration=3).end
    pyro.set_rng_seed(0)
    torch.testing.assert_close(end, -0.025 + 3 * math.sqrt(0.05) * torch.randn(3, 2))


def test_schedule_follows_the_iterations_of_teaching():
    seen = []

    def count(t: int) -> int:
        seen.append(t)
        return 1

    teaching = teach(Gaussian(), Linear(), num_steps=count)
    seen.clear()
    for _ in range(3):
        teaching.step(torch.randn(4, 2))
    assert seen == [0, 1, 2]


def test_modes_of_modules():
    """Runs evaluate; the energy's own step has the mode that it was left in."""

    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.last = nn.Dropout(0.5), nn.Linear(2, 1)
            self.last.eval()
            self.seen: list[bool] = []

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(self.drop.training)
            return self.last(self.drop(x)).squeeze(-1)

    energy = Dropped()
    teaching = teach(energy, Linear())
    teaching.step(torch.randn(4, 2))
    assert energy.seen[-2:] == [True, True] and not any(energy.seen[:-2])
    assert energy.drop.training and not energy.last.training


def test_broken_runs_are_dropped_with_their_latents_and_contexts():
    """Two of six rows meet the wall on their way, one is beyond it from the first: copies of the others stand in, with
    latents and contexts of their own."""

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor, c: Tensor) -> None:
            pyro.module("rows", self)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(c, 1e-3).to_event(1))
                pyro.sample("x", dist.Normal(self.w * z, 0.1).to_event(1), obs=x)

    model, seen = Rows(), []
    sampler = AncestralSampler(model)

    class Spy(Trace_ELBO):
        def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
            seen.append((*args, sampler._latents["z"]))
            return super().loss_and_grads(model, guide, *args, **kwargs)

    energy = Broken(1.0)
    optim = torch.optim.SGD(energy.parameters(), lr=0.1)
    refiner = Refiner(energy, 3, 0.1, noise=0.0)
    teaching = MCMCTeaching(sampler, refiner, SVI(model, sampler, sgd(0.01), Spy()), optim)
    c = torch.tensor([-4.0, 0.85, -3.0, 2.0, -2.0, 0.95]).unsqueeze(-1).expand(6, 2)
    with pytest.warns(UserWarning, match="3 of 6 runs"):
        teaching.step(torch.zeros(6, 2), c)
    assert teaching.info.nonfinite == 3
    x, given, z = seen[0]
    kept = [0, 2, 4]
    assert {round(v, 1) for v in given[:, 0].tolist()} == {-4.0, -3.0, -2.0}
    torch.testing.assert_close(given[kept], c[kept])
    torch.testing.assert_close(z, given, rtol=0, atol=0.01)
    torch.testing.assert_close(x, given + 0.3, rtol=0, atol=0.01)
    assert all(p.isfinite().all() for p in [*energy.parameters(), *model.parameters()])


def test_two_energies_do_not_share_parameters():
    first, second = Gaussian([1.0, 0.0]), Gaussian([0.0, 1.0])
    ends = [Refiner(e, 1, 0.1, noise=0.0)(torch.zeros(1, 2)).end.tolist() for e in (first, second)]
    assert ends == [[[-0.1, 0.0]], [[0.0, -0.1]]]
    assert not list(pyro.get_param_store())


def test_replay_goes_on():
    """With an encoder as guide; the second run begins at the ends of the first."""
    replay = Replay(4, refresh=0.0)
    teaching = teach(Gaussian([1.0, 1.0]), Linear(), lambda s: Encoder(), lr=0.0, replay=replay, num_steps=2)
    teaching.step(torch.randn(4, 2))
    ends = replay.store.clone()
    teaching.step(torch.randn(4, 2))
    gaps = torch.cdist(replay.store + 0.2, ends).min(1).values  # each moved by -0.1 in both directions, twice
    assert gaps.max() < 1e-9


@pytest.mark.parametrize("reference", ["flat", "normal", "uniform"])
def test_steps_take_no_run_of_pyro(reference, monkeypatch):
    """The density of a step is the one that Pyro gives, without asking it."""
    kind = {"flat": None, "normal": dist.Normal(0.3, 0.7), "uniform": dist.Uniform(-1.0, 2.0)}[reference]
    refiner, x, c = Refiner(Around(), step_size=0.01, reference=kind), 0.1 * torch.randn(4, 2), torch.randn(4, 2)
    call = refiner._bind(x, (c,))
    u = torch.randn(1, 4, 2)
    by_pyro = call.model.value_and_grad(u)
    for found, expected in zip(call.density.value_and_grad(u), by_pyro, strict=True):
        torch.testing.assert_close(found, expected)
    runs, counts, read = [], [], LogDensity.read
    monkeypatch.setattr(LogDensity, "read", lambda d, u: runs.append(1) or read(d, u))
    for steps in (2, 20):
        runs.clear()
        refiner(x, c, num_steps=steps)
        counts.append(len(runs))
    assert counts[0] == counts[1] <= 3


def test_looking_at_samples_leaves_replay_alone():
    """Samples, and refiner(x), begin at the generator's draws; neither they nor setup() write to the buffer."""
    replay = Replay(10, refresh=0.0)
    teaching = teach(Gaussian([1.0, 1.0]), Linear(), lambda s: Encoder(), lr=0.0, replay=replay, num_steps=2)
    teaching.setup(torch.randn(4, 2))
    assert replay.written == 0
    teaching.step(torch.randn(4, 2))
    store = replay.store.clone()
    drawn = teaching.sample(torch.zeros(3, 2))
    assert torch.cdist(drawn.start, store[:4]).min() > 1e-6
    torch.testing.assert_close(drawn.end, drawn.start - 0.2)
    x = torch.randn(3, 2)
    torch.testing.assert_close(teaching.refiner(x).start, x)
    assert replay.written == 4 and torch.equal(replay.store, store)


def test_replay_passes_over_states_that_the_energy_lost():
    """Where the energy has learned since and is no number at the ends of earlier runs, rows begin at the proposals."""
    replay = Replay(10, refresh=0.0)
    refiner = Refiner(Broken(1.0), 1, 0.1, noise=0.0, replay=replay)
    x = -torch.ones(4, 2)
    refiner.go_on(x)
    replay.store.fill_(5.0)
    assert refiner.go_on(x).start.tolist() == x.tolist()
    assert (replay.store[4:8] < 1).all()
