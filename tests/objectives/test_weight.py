"""Laws of the weight of a run, of every objective with every dynamics (``table.ROWS``)."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from runners import short_run
from table import ROWS, STEPS, Row, Trial, bound, curved
from torch import Tensor

from pyro_shortrun.objectives import Objective
from pyro_shortrun.runs import Gradients, ShortRun
from pyro_shortrun.starts import PriorBase

every_row = pytest.mark.parametrize("name", ROWS)


def trial(row: Row, clip: float = math.inf) -> tuple[Trial, Objective]:
    """On ``curved``, at random, of as many chains as two draws take."""
    dynamics = row.dynamics(max_drift=clip)
    dynamics.setup(torch.zeros(()))
    eta = (torch.rand(STEPS, 2) * 0.1 + 0.01).requires_grad_()
    objective = row.learned(bound(curved).layout, eta)
    u = torch.randn(2 * objective.copies, 3, 2, requires_grad=True)
    beta = torch.linspace(0.2, 1.0, STEPS).requires_grad_() if objective.tempers else None
    return Trial(dynamics, u, eta, torch.randn(STEPS, *u.shape), beta, row.base(3, 2), row.limit), objective


def go(made: Trial, objective: Objective, compile: bool = False, **options: Any) -> ShortRun:
    options = dict(noise=made.noise, gradients=Gradients.GUIDE) | options
    options |= dict(base=made.base, log_q=made.log_base(made.u), temperatures=made.beta)
    return short_run(bound(curved, compile=compile), made.dynamics, objective, made.u, made.eta, **options)


def slopes(end: Tensor, increment: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Derivatives of what weighs all elements of both unlike; of a triangular matrix those in its triangle."""
    back = [torch.linspace(-1.0, 2.0, t.numel()).reshape(t.shape) for t in (end, increment)]
    options = dict(allow_unused=True, materialize_grads=True, retain_graph=True)
    grads = torch.autograd.grad((end, increment), leaves, back, **options)
    return [g.tril() if g.shape[-2:] == (2, 2) and g.dim() == 3 else g for g in grads]


def assert_close(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(list(found), list(wanted), rtol=1e-4, atol=1e-5)


@every_row
@pytest.mark.parametrize(
    "clip,compile", [(math.inf, False), (0.02, False), (0.02, True)], ids=["", "clipped", "compiled"]
)
def test_weight_and_its_gradients(name: str, clip: float, compile: bool) -> None:
    """By hand; in the start, step sizes, temperatures, the start's and the dynamics' own parameters."""
    row = ROWS[name]
    made, objective = trial(row, clip)
    pyro.set_rng_seed(1)
    result = go(made, objective, compile)
    if row.by_hand is None:
        pyro.set_rng_seed(1)  # the same probes
        wanted = go(made, objective, gradients=Gradients.FULL)
        end, increment = wanted.end, wanted.increment
    else:
        states, increment = row.by_hand(made, objective)
        end = states[-1]
    assert_close((result.end, result.increment), (end, increment))
    assert_close(slopes(result.end, result.increment, made.leaves), slopes(end, increment, made.leaves))
    assert result.info.log_det.shape == (STEPS,) and result.info.log_density.shape == (STEPS + 1,)
    if row.by_step:
        assert_close([result.info.log_det.sum()], [result.increment.mean()])
    assert not result.info.frozen.any() and not result.info.singular.any()


@every_row
def test_full_gradient(name: str) -> None:
    """By hand, in the model's parameter too, which otherwise gets none; and the path on the way."""
    row = ROWS[name]
    made, objective = trial(row)
    leaves = [*made.leaves, pyro.param("width")]
    result = go(made, objective, gradients=Gradients.FULL, keep_states=True)
    if row.by_hand is not None:
        states, increment = row.by_hand(made, objective)
        assert_close(slopes(result.end, result.increment, leaves), slopes(states[-1], increment, leaves))
        assert_close(result.states, states)
    guide = go(made, objective)
    assert slopes(guide.end, guide.increment, leaves)[-1] == 0
    assert slopes(result.end, result.increment, leaves)[-1] != 0


@every_row
def test_what_a_run_is_asked_for_does_not_change_it(name: str) -> None:
    """Gradients, states, checkpoints, increments: the same random numbers give the same end and weight."""
    made, objective = trial(ROWS[name])
    found = []
    for options in (
        dict(),
        dict(gradients=Gradients.FULL),
        dict(keep_states=True),
        dict(checkpoint=True),
        dict(gradients=Gradients.NONE),
        dict(gradients=Gradients.NONE, account=False),
    ):
        pyro.set_rng_seed(3)
        found.append(go(made, objective, noise=None, **options))
    assert [r.end.requires_grad for r in found] == [True] * 4 + [False] * 2
    for other in found[1:]:
        torch.testing.assert_close(other.end, found[0].end)
    for other in found[1:-1]:
        torch.testing.assert_close(other.increment, found[0].increment)
        torch.testing.assert_close(other.info.log_density, found[0].info.log_density)


@every_row
@pytest.mark.parametrize("at_once", [2**20, 12, 50])
def test_a_checkpointed_run_has_the_same_gradient(name: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the noise is drawn in several parts, and drawn again on the way back."""
    monkeypatch.setattr("pyro_shortrun.runs.noise._NOISE_AT_ONCE", at_once)
    made, objective = trial(ROWS[name])
    found = []
    for checkpoint in (False, True):
        pyro.set_rng_seed(3)
        result = go(made, objective, noise=None, checkpoint=checkpoint)
        after = torch.get_rng_state()
        found.append([result.end, result.increment, *slopes(result.end, result.increment, made.leaves)])
        assert torch.equal(torch.get_rng_state(), after)  # drawing again leaves the generator alone
    torch.testing.assert_close(found[1], found[0])


def nodes(dimensions: int) -> tuple[Tensor, Tensor]:
    """Points ``(dimensions, points)`` and weights of the trapezium rule over standard normals, whatever the tails."""
    line = torch.linspace(-7, 7, 27) if dimensions > 3 else torch.linspace(-9, 9, 55)
    mass = dist.Normal(0.0, 1.0).log_prob(line).exp() * (line[1] - line[0])
    points, masses = (torch.cartesian_prod(*[t] * dimensions).reshape(-1, dimensions) for t in (line, mass))
    return points.mT, masses.prod(-1)


def sloping(rows: int) -> None:
    with pyro.plate("data", rows):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(torch.tanh(z), 1.0), obs=torch.full((rows,), 0.6))


def log_evidence() -> float:
    line = torch.linspace(-14, 14, 8001)
    joint = dist.Normal(0.0, 1.0).log_prob(line) + dist.Normal(torch.tanh(line), 1.0).log_prob(torch.tensor(0.6))
    return torch.trapezoid(joint.exp(), line).log().item()


UNBIASED = [k for k, row in ROWS.items() if row.by_hand and row.start == "prior" and row.objective().weighs]


@pytest.mark.parametrize("name", UNBIASED)
@pytest.mark.parametrize("eta", [0.1, 0.2])
def test_mean_weight_is_the_evidence(name: str, eta: float) -> None:
    """``E[exp(log w)] = p(x)`` by quadrature over starts and noise, of a target that is not Gaussian."""
    row = ROWS[name]
    dynamics, copies = row.dynamics(), row.objective().copies
    dynamics.setup(torch.zeros(()))
    steps = 2 if copies == 1 else 1
    points, weights = nodes(copies * (1 + steps * dynamics.has_noise))
    etas = torch.full(
        (steps, 1), eta * copies**2
    )  # of a mixture only the last one counts: the longer, the shorter the tails
    objective = row.learned(bound(sloping, 4).layout, etas)
    u, density = points[:copies].unsqueeze(-1), bound(sloping, len(weights))
    noise = torch.zeros(steps, *u.shape) if len(points) == copies else points[copies:].reshape(steps, *u.shape)
    log_q = dist.Normal(0.0, 1.0).log_prob(u.squeeze(-1))
    beta = torch.tensor([0.4, 1.0])[-steps:] if objective.tempers else None
    result = short_run(density, dynamics, objective, u, etas, noise, base=PriorBase(), log_q=log_q, temperatures=beta)
    log_w = density(result.end) + result.increment - log_q[::copies]
    assert not result.info.singular.any()
    assert (weights * log_w[0].exp()).sum().log().item() == pytest.approx(log_evidence(), abs=1e-5)


TROUBLES = {  # a factor, and a start that meets it
    "wall": (lambda z: torch.where(z > 3, torch.nan, 20 * z), 2.9),
    "kink": (lambda z: -(z - 1).abs().sqrt(), 1.0),
    "fold": (lambda z: -(z.abs() ** 4), 3.0),
}


MEETINGS = [(k, t, c) for k in ROWS for t, c in (("wall", False), ("wall", True), ("kink", False))]
MEETINGS += [(k, "fold", False) for k, row in ROWS.items() if row.judges]


@pytest.mark.parametrize("name,trouble,compile", MEETINGS)
def test_a_row_in_trouble_does_not_spoil_the_others(name: str, trouble: str, compile: bool) -> None:
    """A row that meets no density, no gradient or a step that folds the space is told. The others' weights and
    gradients are as if it were elsewhere, and it takes the place of a row whose loss is ``log eta``, averaged over
    steps and coordinates."""
    row, (factor, start) = ROWS[name], TROUBLES[trouble]

    def model() -> None:
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("trouble", factor(z))

    density, dynamics = bound(model, compile=compile), row.dynamics()
    dynamics.setup(torch.zeros(()))
    eta = torch.full((3, 1), 0.02, requires_grad=True)
    objective, base = row.learned(density.layout, eta), row.base(3, 1)
    beta = torch.tensor([0.6, 0.8, 1.0], requires_grad=True) if objective.tempers else None
    found = []
    for place, weigh in ((start, 1.0), (start, 0.0), (-0.8, 0.0)):
        u = torch.tensor([-1.0, place, -0.5]).reshape(1, 3, 1).repeat(objective.copies, 1, 1).requires_grad_()
        made = Trial(dynamics, u, eta, torch.zeros(3, *u.shape), beta, base)
        log_q = dist.Normal(0.0, 1.0).log_prob(u.squeeze(-1))
        options = dict(base=base, log_q=log_q, temperatures=beta, gradients=Gradients.GUIDE)
        pyro.set_rng_seed(2)
        result = short_run(density, dynamics, objective, u, eta, made.noise, **options)
        goal = (result.increment * torch.tensor([1.0, weigh, -2.0])).sum() + result.end[:, ::2].sum()
        grads = torch.autograd.grad(goal, made.leaves, allow_unused=True, materialize_grads=True)
        found.append((result, grads))
    (result, heavy), (_, light), (elsewhere, wanted) = found
    told = result.info.singular if trouble == "fold" else result.info.frozen
    assert told.tolist() == [[False, True, False]] and result.end.isfinite().all()
    assert not elsewhere.info.frozen.any() and not elsewhere.info.singular.any()
    pairs = zip((result.end, result.increment, light[0]), (elsewhere.end, elsewhere.increment, wanted[0]), strict=True)
    for a, b in pairs:
        assert_close([a[:, ::2]], [b[:, ::2]])
    assert_close(light[1:], wanted[1:])
    assert light[0][:, 1].eq(0).all()
    assert_close(heavy[2:], light[2:])
    assert_close([heavy[1]], [light[1] - 1 / (eta.detach() * eta.numel())])
