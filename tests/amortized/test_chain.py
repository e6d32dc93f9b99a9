"""One transition of the chain over maps, and its Metropolis ratio, exactly."""

from __future__ import annotations

import pytest
import torch
from encoders import BASES, chain, eta, skewed, target
from torch import Tensor
from torch.distributions import Normal

from pyro_shortrun.amortized import Everywhere, Span, Whitened
from pyro_shortrun.amortized.chain import LinearTarget


@pytest.mark.parametrize("width", [2, 3, 7])
def test_a_transition_is_langevin_preconditioned_by_the_gram_matrix(width):
    """u' = u + eta K grad log pi(u) + sqrt(2 eta) xi, with xi ~ N(0, K) over rows; whatever the rank of K."""
    goal = target(3, width)
    point, noise = goal.at(torch.randn(4, 2, width)), torch.randn(4, 2, width)
    moved = goal.move(point, eta(), noise, None)
    u = goal.features @ point.phi.mT
    gram = goal.features @ goal.features.T
    xi = torch.einsum("id,csd->cis", goal.features, noise)
    expected = u + eta() * gram @ skewed(u)[1] + (2 * eta()).sqrt() * xi
    torch.testing.assert_close(goal.features @ moved.point.phi.mT, expected)
    torch.testing.assert_close(moved.point.value, skewed(expected)[0])
    draws = torch.randn(20_000, 2, width) @ goal.features.T  # xi's covariance, within 5 standard errors
    torch.testing.assert_close(draws[:, 0].T.cov(), gram, rtol=0, atol=5 * 1.5 * gram.max().item() / 20_000**0.5)


def log_f(goal: LinearTarget, begin: Tensor, end: Tensor) -> Tensor:
    """log density of the proposal from the map ``begin`` to ``end``, whose ``A`` are given."""
    at = begin if goal.basis is None else begin @ goal.basis.T
    return Normal(begin + eta() * goal.at(at).pull, (2 * eta()).sqrt()).log_prob(end).sum((-1, -2))


def maps(goal: LinearTarget, a: Tensor) -> Tensor:
    return a if goal.basis is None else a @ goal.basis.T


def states(goal: LinearTarget, count: int) -> Tensor:
    return 0.4 * torch.randn(count, 2, 5 if goal.basis is None else goal.basis.shape[1])


@pytest.mark.parametrize("basis", BASES, ids=lambda b: type(b).__name__)
def test_acceptance_has_the_reverse_mean_at_the_proposal(basis):
    goal = target(basis=basis)
    a = states(goal, 50)
    point, noise = goal.at(maps(goal, a)), torch.randn_like(a)
    accept = goal.move(point, eta(), noise, torch.zeros(50)).accept
    there = a + eta() * point.pull + (2 * eta()).sqrt() * noise
    log_pi = goal.at(maps(goal, there)).value.sum(-1) - point.value.sum(-1)
    ratio = log_pi + log_f(goal, there, a) - log_f(goal, a, there)
    assert (ratio < 0).any() and (ratio > 0).any()
    torch.testing.assert_close(accept, ratio.clamp(max=0).exp())


@pytest.mark.parametrize("basis", BASES, ids=lambda b: type(b).__name__)
def test_detailed_balance(basis):
    """pi(A) f(A'|A) a(A, A') = pi(A') f(A|A') a(A', A), all terms from independent pairs of states."""
    goal = target(basis=basis)
    here, there = states(goal, 200), states(goal, 200)

    def flow(begin: Tensor, end: Tensor) -> Tensor:
        point = goal.at(maps(goal, begin))
        noise = (end - begin - eta() * point.pull) / (2 * eta()).sqrt()
        accept = goal.move(point, eta(), noise, torch.zeros(200)).accept
        return point.value.sum(-1) + log_f(goal, begin, end) + accept.log()

    torch.testing.assert_close(flow(here, there), flow(there, here))


def test_small_steps_are_accepted_and_one_decision_is_made_for_all_rows():
    goal = target()
    point, noise = goal.at(0.4 * torch.randn(20, 2, 5)), torch.randn(20, 2, 5)
    assert goal.move(point, eta(1e-8), noise, torch.zeros(20)).accept.min() > 0.99
    moved = goal.move(point, eta(0.1), noise, torch.full((20,), 0.5).log())
    stays = moved.accept < 0.5
    assert 0 < stays.sum() < 20
    torch.testing.assert_close(moved.point.phi[stays], point.phi[stays])
    assert (moved.point.value[~stays] != point.value[~stays]).all()


def test_span_moves_the_rows_alike_and_nothing_else():
    """Same noise, same rows, same decisions; the part of the map that no feature sees stays as it was."""
    features, begin = torch.randn(3, 8), torch.randn(2, 2, 8)
    basis = Span().of(features)
    noise, log_uniform = torch.randn(6, 2, 2, 8), torch.rand(6, 2).log()
    blind = torch.eye(8) - torch.linalg.pinv(features) @ features
    ends = []
    for kind, eps in ((Everywhere(), noise), (Span(), noise @ basis)):
        moves = chain(kind)
        moves.setup(2, features)
        goal = moves.target(skewed, features)
        run = moves.run(goal, goal.at(begin), 6, noise=eps, log_uniform=log_uniform)
        assert 0 < run.info.acceptance.mean() < 1
        ends.append(run.point.phi)
    torch.testing.assert_close(features @ ends[0].mT, features @ ends[1].mT)
    torch.testing.assert_close(ends[1] @ blind, begin @ blind)
    assert not torch.allclose(ends[0] @ blind, begin @ blind)


def test_whitened_rows_move_by_plain_langevin():
    """As the ridge goes to zero, u' = u + eta grad log pi(u) + sqrt(2 eta) eps, whatever the features."""
    goal = target(3, 7, Whitened(1e-9))
    point, noise = goal.at(torch.randn(4, 2, 7)), torch.randn(4, 2, 3)
    u = goal.features @ point.phi.mT
    moved = goal.features @ goal.move(point, eta(), noise, None).point.phi.mT
    torch.testing.assert_close(moved, u + eta() * skewed(u)[1] + (2 * eta()).sqrt() * noise.mT, rtol=1e-5, atol=1e-6)


def test_a_proposal_that_is_not_finite_is_not_made():
    def cliff(u: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(u.sum(-1) > 0, torch.nan, 0.0) * u.sum(-1), torch.zeros_like(u)

    goal = LinearTarget(cliff, torch.eye(2))
    point, noise = goal.at(-torch.ones(2, 1, 2)), torch.tensor([[[-1.0, -1.0]], [[9.0, 9.0]]])
    for log_uniform in (None, torch.full((2,), -9.0)):
        moved = goal.move(point, eta(0.5), noise, log_uniform)
        assert moved.finite.tolist() == [True, False]
        assert moved.point.phi.isfinite().all() and torch.equal(moved.point.phi[1], point.phi[1])


def test_an_acceptance_that_is_no_number_is_a_rejection():
    """Gradients that are finite and too large to be squared: the step size's adaptation must not see NaN."""

    def steep(u: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(u[..., 0]), 1.5e308 * torch.tensor([[1.0], [-1.0]]).expand_as(u)

    goal = LinearTarget(steep, torch.eye(2))
    noise = torch.tensor([[[3.0, 5.0]]])
    moved = goal.move(goal.at(torch.zeros(1, 1, 2)), eta(1e-300), noise, torch.full((1,), -9.0))
    assert moved.accept.item() == 0 and moved.point.phi.eq(0).all()
