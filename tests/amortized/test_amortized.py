"""Amortised Langevin dynamics: laws, gradients, living inside Pyro."""

from __future__ import annotations

import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from encoders import Decoder, chain, conjugate, generator, net, posterior, skewed, waves
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal

from pyro_shortrun import EnergyELBO, LangevinEncoderGuide, energy_prior, to_arviz
from pyro_shortrun.amortized import Basis, Span, Whitened
from pyro_shortrun.amortized.chain import LinearTarget
from pyro_shortrun.amortized.encoding import Encoding
from pyro_shortrun.compile import Compiler, Untouched
from pyro_shortrun.density import LogDensity
from pyro_shortrun.evaluation import importance_log_likelihood

# ------------------------------------------------------------------------------------------------ laws


@pytest.mark.parametrize(("full", "basis"), [(None, None), (300, None), (None, Span()), (None, Whitened())])
def test_posteriors_of_every_datum(full, basis):
    """100 chains of 30 draws, 8 transitions apart: means within .05, covariances within .05 (both more than 4 standard
    errors if all were independent), for every size of the full plate and every basis; rows are independent of each
    other."""
    x = torch.tensor([[1.0, -1.0], [0.0, 0.5], [-2.0, 1.0]])
    guide = LangevinEncoderGuide(conjugate(full), waves, basis=basis)
    options = dict(num_samples=30, num_chains=100, warmup_steps=200, thinning=8)
    draws = guide.sample_posterior(x, **options)["z"].flatten(0, 1)
    exact = posterior(x)
    torch.testing.assert_close(draws.mean(0), exact.mean, rtol=0, atol=0.05)
    cov = draws.flatten(1).T.cov()
    torch.testing.assert_close(cov, torch.block_diag(*exact.covariance_matrix), rtol=0, atol=0.05)
    assert 0.4 < guide.info.acceptance.mean() < 0.75


def test_subsampling_changes_no_posterior():
    """The same random numbers give the same chain whatever the full plate's size."""
    x, phi, noise, found = torch.randn(4, 2), 0.1 * torch.randn(1, 2, 60), torch.randn(5, 1, 2, 60), []
    for full in (None, 400):
        guide = LangevinEncoderGuide(conjugate(full), waves).setup(x)
        goal = Encoding(guide._bind((x,), {}), waves(x), guide.chain).target
        run = guide.chain.run(goal, goal.at(phi), 5, noise=noise, log_uniform=torch.full((5, 1), -0.5))
        found.append((run.point.phi, run.info.acceptance))
    torch.testing.assert_close(found[0], found[1])
    assert found[0][1].min() < 1


def test_step_size_is_that_of_the_mean_energy():
    """eta times the gradient of the mean over the batch, noise sqrt(2 eta / n): the paper's code."""
    x, features = torch.randn(6, 2), net()
    guide = LangevinEncoderGuide(conjugate(), features, step_size=0.2, adjust=False)
    guide.setup(x)
    phi = guide.phi.clone()
    goal = Encoding(guide._bind((x,), {}), features(x), guide.chain).target
    noise = torch.randn(1, 1, *phi.shape)
    moved = guide.chain.run(goal, goal.at(phi.unsqueeze(0)), 1, noise=noise).point.phi[0]
    leaf = phi.clone().requires_grad_()
    z = features(x).detach() @ leaf.T
    cov = torch.tensor([[0.7, 0.6], [0.6, 0.8]])
    energy = -(Normal(0.0, 1.0).log_prob(z).sum(-1) + MultivariateNormal(z, cov).log_prob(x)).mean()
    (grad,) = torch.autograd.grad(energy, leaf)
    torch.testing.assert_close(moved, phi - 0.2 * grad + math.sqrt(2 * 0.2 / 6) * noise[0, 0])


def test_fewer_features_than_rows_collapse():
    """With d < n draws stay in a space of d dimensions, so posteriors cannot all be right; guides refuse."""
    goal, moves = LinearTarget(skewed, torch.randn(6, 4)), chain()
    moves.setup(2, goal.features)
    run = moves.run(goal, goal.at(moves.starts(1)), 200, wanted=0.574, keep_every=5)
    draws = torch.stack([goal.features @ phi[0].mT for phi, _ in run.kept])  # (draws, rows, size)
    assert torch.linalg.matrix_rank(draws[..., 0].T.cov()) == 4
    guide = LangevinEncoderGuide(conjugate(), net(width=4))
    with pytest.raises(ValueError, match="width 4 for 6 rows.*collapse"):
        guide(torch.randn(6, 2))
    assert guide.encode(torch.randn(6, 2))["z"].shape == (6, 2)  # without transitions there is nothing to refuse


def test_equal_features_are_told(caplog):
    x = torch.randn(1, 2).expand(3, 2)
    LangevinEncoderGuide(conjugate(), net()).setup(x)
    assert "have rank 1" in caplog.text


# ------------------------------------------------------------------------------------------- gradients and the loss


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_gradients_and_loss(elbo):
    """grad_theta log p(x, z) at fixed z, features' through z = Phi g(x) at fixed Phi, nothing else, nothing twice."""
    x, decoder, features = torch.randn(5, 4), Decoder(), net(inputs=4)
    guide = LangevinEncoderGuide(generator(decoder), features, num_steps=3)
    loss = elbo().differentiable_loss(generator(decoder), guide, x)
    loss.backward()
    parameters = [*decoder.parameters(), *features.parameters()]
    found = [p.grad.clone() for p in parameters]
    z = features(x) @ guide.phi.T
    expected = -(Normal(0.0, 1.0).log_prob(z).sum() + decoder(z).log_prob(x).sum())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(guide.info.log_density[-1] * 5, -expected.detach())
    torch.testing.assert_close(found, list(torch.autograd.grad(expected, parameters)))
    assert not guide.phi.requires_grad and "chain.phi" in dict(guide.named_buffers())
    assert {n for n, _ in guide.named_parameters()} == {f"features.{n}" for n, _ in features.named_parameters()}


def test_svi_sees_features_and_decoder_and_training_works():
    """A linear generator of 4 dimensions from 2: reconstructions are good, and no better than the noise allows."""
    z = torch.randn(60, 2)
    x = z @ torch.randn(2, 4) + 0.3 * torch.randn(60, 4)
    decoder, features = nn.Linear(2, 4), net(width=64, inputs=4)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.3).to_event(1), obs=x)

    guide = LangevinEncoderGuide(model, features)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for k in range(300):
        svi.step(x.roll(20 * k, 0)[:20])
    error = (decoder(guide.encode(x)["z"]) - x).square().mean()
    assert 0.3**2 / 3 < error < 0.2 * x.var()
    names = set(pyro.get_param_store().keys())
    assert any("features" in k for k in names) and any("decoder" in k for k in names)
    assert not any("chain" in k for k in names)


def test_a_constrained_latent_and_two_sites():
    """The loss is minus log pi, log-Jacobian included, and so are the features' gradients."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Gamma(2.0, 1.0))
            b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(a.unsqueeze(-1) * b, 1.0).to_event(1), obs=x)

    x, features = torch.randn(4, 2), net()
    guide = LangevinEncoderGuide(model, features)
    loss = Trace_ELBO().differentiable_loss(model, guide, x)
    loss.backward()
    found = [p.grad.clone() for p in features.parameters()]
    u = features(x) @ guide.phi.T
    a, b = u[:, 0].exp(), u[:, 1:]
    terms = dist.Gamma(2.0, 1.0).log_prob(a) + u[:, 0] + Normal(0.0, 1.0).log_prob(b).sum(-1)
    expected = -(terms + Normal(a.unsqueeze(-1) * b, 1.0).log_prob(x).sum(-1)).sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, list(torch.autograd.grad(expected, list(features.parameters()))))
    draws = guide.sample_posterior(x, num_samples=70, num_chains=2, warmup_steps=5)
    assert draws["a"].shape == (2, 70, 4) and draws["b"].shape == (2, 70, 4, 2) and (draws["a"] > 0).all()


def test_bound_and_importance_likelihood():
    """A Gaussian with the posterior's moments has no gap; the paper's scale of .05 has a known one."""
    x = torch.randn(4, 2)
    exact = MultivariateNormal(torch.zeros(2), torch.eye(2) + torch.tensor([[0.7, 0.6], [0.6, 0.8]])).log_prob(x)
    guide = LangevinEncoderGuide(conjugate(), waves)
    guide.setup(x)
    at = posterior(x)
    loc, scale = guide.moments(x, num_samples=100, num_chains=20, thinning=2)
    torch.testing.assert_close(loc, at.mean, rtol=0, atol=0.15)
    torch.testing.assert_close(scale, at.variance.sqrt(), rtol=0.15, atol=0)
    assert (guide.log_bound(x, loc=loc, scale=scale, num_samples=1000) > exact - 0.5).all()  # correlations lose .3
    found = guide.log_bound(x, loc=at.mean, num_samples=20_000)
    precision = at.precision_matrix.diagonal(dim1=-2, dim2=-1)
    entropy = (math.log(0.05) + 0.5 * math.log(2 * math.pi * math.e)) * 2
    gap = -at.log_prob(at.mean) + 0.5 * 0.05**2 * precision.sum(-1) - entropy
    torch.testing.assert_close(found, exact - gap, rtol=0, atol=0.05)
    draws = guide.sample_posterior(x, num_samples=200, thinning=3)["z"][0]
    estimate = importance_log_likelihood(conjugate(), {"z": draws}, x, num_samples=1000)
    torch.testing.assert_close(estimate.value, exact, rtol=0, atol=0.05)


def test_what_needs_no_gradient_has_no_graph(monkeypatch):
    """Nor does a first call on more rows than features, which may be all data, look at all pairs of them."""

    class Never(Basis):
        def of(self, features: Tensor) -> Tensor | None:
            raise AssertionError

    graphs, eager = [], LogDensity.__call__
    guide = LangevinEncoderGuide(conjugate(), net(), basis=Never())
    guide.encode(torch.randn(50, 2))
    monkeypatch.setattr(LogDensity, "__call__", lambda d, u: graphs.append(torch.is_grad_enabled()) or eager(d, u))
    guide.log_bound(torch.randn(50, 2), num_samples=3)
    assert graphs == [False]


# ------------------------------------------------------------------------------------------------ state


def test_the_map_goes_on_in_training_calls_only():
    x, model = torch.randn(4, 2), conjugate()
    guide = LangevinEncoderGuide(model, net())
    with pytest.raises(RuntimeError, match="guide.setup"):
        guide.phi  # noqa: B018
    guide.setup(x)
    before = guide.phi.clone()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.evaluate_loss(x)
    guide.encode(x)
    guide.sample_posterior(x, num_samples=2)
    with torch.no_grad():
        guide(x)
    guide.eval()(x)
    assert len(guide.info.acceptance) == 20
    assert torch.equal(guide.phi, before)
    guide.train()
    svi.step(x)
    assert len(guide.info.acceptance) == 2
    assert not torch.equal(guide.phi, before)
    assert "acceptance" in repr(guide.info) and guide.info.nonfinite == 0
    torch.testing.assert_close(guide.info.phi_norm, guide.phi.norm())


def test_step_size_adapts_to_the_acceptance():
    x, model = torch.randn(6, 2), conjugate()
    guide = LangevinEncoderGuide(model, net(), step_size=1e-3, num_steps=20)
    for _ in range(30):
        guide(x)
    first, accept = guide.info.step_size, []
    for _ in range(25):
        guide(x)
        accept.append(guide.info.acceptance.mean())
    assert first > 1e-2
    assert torch.stack(accept).mean().item() == pytest.approx(guide.chain.target_accept_prob, abs=0.1)
    guide.sample_posterior(x, num_samples=200, num_chains=4)  # a target that stays has another optimum
    assert guide.info.acceptance.mean().item() == pytest.approx(0.574, abs=0.1)
    assert guide.chain.log_step.exp() < guide.info.step_size
    fixed = LangevinEncoderGuide(model, net(), step_size=1e-3, target_accept_prob=None)
    fixed(x)
    torch.testing.assert_close(fixed.info.step_size, torch.tensor(1e-3))


def test_state_dict_and_pickle():
    x, model = torch.randn(4, 2), conjugate()
    guide = LangevinEncoderGuide(model, net())
    for _ in range(3):
        guide(x)
    saved = {k: v.clone() for k, v in guide.state_dict().items()}
    assert {"chain.phi", "chain.log_step"} <= set(saved)
    pyro.clear_param_store()
    other = LangevinEncoderGuide(model, net())
    with pytest.raises(RuntimeError, match="before load_state_dict"):
        other.load_state_dict(saved)
    other.setup(x).load_state_dict(saved)
    torch.testing.assert_close(other.encode(x)["z"], guide.encode(x)["z"])
    again = pickle.loads(pickle.dumps(guide)).attach(model)
    torch.testing.assert_close(again.encode(x)["z"], guide.encode(x)["z"])
    again(x)


# ------------------------------------------------------------------------------------------------ inside Pyro


def test_particles_and_predictive():
    x, model = torch.randn(4, 2), conjugate()
    guide = LangevinEncoderGuide(model, net())
    elbo = Trace_ELBO(num_particles=7, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    assert math.isfinite(svi.step(x))
    assert guide.phi.shape == (2, 12)
    for parallel in (False, True):
        draws = Predictive(model, guide=guide, num_samples=5, parallel=parallel)(x)
        assert draws["z"].shape == (5, 4, 2)
        assert len(draws["z"].unique(dim=0)) == 5
    guide.condition_on(x)
    assert Predictive(model, guide=guide, num_samples=5)(x)["z"].shape == (5, 4, 2)
    assert guide.median(x)["z"].shape == (4, 2)


@pytest.mark.parametrize("rows", ["full plate", "batch"])
def test_plates_that_subsample_in_the_model(rows):
    x = torch.randn(50, 2)

    def plates(x: Tensor) -> pyro.plate:
        return pyro.plate("data", len(x), subsample_size=8)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=8) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.1).to_event(1), obs=x[index])

    weights = torch.randn(2, 40)

    def features(x: Tensor) -> Tensor:
        return torch.tanh(x @ weights) if rows == "full plate" else torch.tanh(x[:8] @ weights)

    guide = LangevinEncoderGuide(model, features, create_plates=plates, num_steps=5)
    values = guide(x)
    index = guide.plates["data"].indices
    wanted = torch.tanh(x[index] @ weights) if rows == "full plate" else features(x)
    torch.testing.assert_close(values["z"], wanted @ guide.phi.T)
    loss = Trace_ELBO().loss(model, LangevinEncoderGuide(model, features), x)  # without create_plates as well
    assert math.isfinite(loss)


def test_two_plates_make_rows():
    def model(x: Tensor) -> None:
        with pyro.plate("pixels", 3, dim=-2), pyro.plate("data", x.shape[-1], dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    guide = LangevinEncoderGuide(model, lambda x: torch.stack([x**k for k in range(12)], -1), num_steps=30)
    x = 0.5 * torch.randn(3, 4)
    values = guide(x)
    assert values["z"].shape == (3, 4)
    torch.testing.assert_close(values["z"], (torch.stack([x**k for k in range(12)], -1) @ guide.phi.T).squeeze(-1))


def with_global(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x[:, 0])


def test_global_latents_are_refused_by_name_and_the_remedy_works():
    x = torch.randn(6, 2)
    with pytest.raises(NotImplementedError, match="'loc' is not local"):
        LangevinEncoderGuide(with_global, net())(x)
    guides = AutoGuideList(with_global, create_plates=lambda x: pyro.plate("data", len(x), dim=-1))
    guides.append(AutoNormal(poutine.block(with_global, expose=["loc"])))
    guides.append(LangevinEncoderGuide(poutine.block(with_global, hide=["loc"]), net()))
    svi = SVI(with_global, guides, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    nodes = poutine.trace(guides).get_trace(x).nodes
    assert {"loc", "z"} <= set(nodes) and nodes["z"]["value"].shape == (6,)
    for batch in (x, x[:4], x):
        assert math.isfinite(svi.step(batch))
    pyro.clear_param_store()

    def alone(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w, 0.5), obs=x[:, 0])

    with pytest.raises(NotImplementedError, match="'w' is not local"):
        LangevinEncoderGuide(alone, net())(x)


def test_energy_priors():
    decoder, energy = Decoder(), nn.Sequential(nn.Linear(2, 8), nn.GELU(), nn.Linear(8, 1), nn.Flatten(-2))

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            energy_prior("ebm", energy, z)
            pyro.sample("x", decoder(z), obs=x)

    guide = LangevinEncoderGuide(model, net(inputs=4))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), EnergyELBO(Trace_ELBO(), num_steps=3))
    assert math.isfinite(svi.step(torch.randn(5, 4)))


@pytest.mark.parametrize("backend", [Untouched(), None], ids=["traced", "inductor"])
def test_compiled_is_eager(backend):
    x, decoder, features = torch.randn(5, 4), Decoder(), net(inputs=4)
    phis = []
    for compile in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = LangevinEncoderGuide(generator(decoder), features, num_steps=4, compile=compile)
        if compile and backend is not None:
            guide._compiler = Compiler(backend)
        for k in range(3):  # new data and new parameters change the result
            guide(x + k)
            with torch.no_grad():
                decoder.linear.weight.mul_(0.9)
        with torch.no_grad():
            decoder.linear.weight.div_(0.9**3)
        phis.append(guide.phi)
    torch.testing.assert_close(phis[0], phis[1])


def test_arviz():
    x = torch.randn(4, 2)
    guide = LangevinEncoderGuide(conjugate(), waves)
    idata = to_arviz(guide, x, num_samples=30, num_chains=2, num_prior=5)
    assert dict(idata["posterior"].sizes) == {"chain": 2, "draw": 30, "data": 4, "z_dim_1": 2}
    z = torch.as_tensor(idata["posterior"]["z"].values).to(x)
    cov = torch.tensor([[0.7, 0.6], [0.6, 0.8]])
    lp = Normal(0.0, 1.0).log_prob(z).sum((-1, -2)) + MultivariateNormal(z, cov).log_prob(x).sum(-1)
    torch.testing.assert_close(torch.as_tensor(idata["sample_stats"]["lp"].values).to(x), lp)


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(num_steps=0), "num_steps must be an integer >= 1"),
        (dict(eval_steps=0), "eval_steps must be an integer >= 1"),
        (dict(step_size=-1.0), "step_size must be a number in"),
        (dict(step_size=math.nan), "step_size must be a number in"),
        (dict(init_scale=0.0), "init_scale must be a number in"),
        (dict(target_accept_prob=1.5), "target_accept_prob must be a number in"),
    ],
)
def test_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        LangevinEncoderGuide(conjugate(), net(), **options)


@pytest.mark.parametrize(
    ("features", "match"),
    [
        (lambda x: x.sum(), "must return a tensor of shape"),
        (lambda x: [x], "must return a tensor, got list"),
        (lambda x: torch.ones(3, 12), "with 4 rows along plate 'data'"),
        (lambda x: torch.ones(4, 12, dtype=torch.float16), "float16"),
        (lambda x: torch.zeros(4, 12), "mean length is 0.0"),
        (lambda x: torch.full((4, 12), torch.nan), "mean length is nan"),
    ],
)
def test_features(features, match):
    with pytest.raises(ValueError, match=match):
        LangevinEncoderGuide(conjugate(), features)(torch.randn(4, 2))


def test_other_bad_input():
    with pytest.raises(ValueError, match="features must be a module or function"):
        LangevinEncoderGuide(conjugate(), 3)
    with pytest.raises(ValueError, match="is not finite at the encoding.*site 'x'"):
        LangevinEncoderGuide(conjugate(), lambda x: net()(x.nan_to_num()))(torch.full((4, 2), torch.nan))
    with pytest.raises(ValueError, match="or its gradient, is not finite at the encoding.*first at site"):
        LangevinEncoderGuide(corner, net())(torch.randn(4, 2))
    guide = LangevinEncoderGuide(conjugate(), waves)
    for _ in range(2):  # a refused first call leaves nothing half set up
        with pytest.raises(ValueError, match="is not finite at the encoding"):
            guide(torch.full((4, 2), torch.inf).sub(torch.inf).nan_to_num(1e300))
    guide = LangevinEncoderGuide(conjugate(), lambda x: torch.ones(len(x), 4 + len(x)))
    guide(torch.randn(4, 2))
    with pytest.raises(ValueError, match="width 9, 8 when the guide was set up"):
        guide(torch.randn(5, 2))
    for name in ("num_samples", "num_chains", "thinning"):
        with pytest.raises(ValueError, match=name):
            guide.sample_posterior(torch.randn(4, 2), **{name: 0})
    with pytest.raises(ValueError, match="scale must be a number"):
        guide.log_bound(torch.randn(4, 2), scale=0.0)
    with pytest.raises(ValueError, match="at least two draws"):
        guide.moments(torch.randn(4, 2), num_samples=1)


def corner(x: Tensor) -> None:
    """A density that is finite and has no gradient."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z + (0 * z).abs().sqrt(), 1.0).to_event(1), obs=x)


def test_whitened_features_that_died():
    last = nn.Linear(2, 12)
    guide = LangevinEncoderGuide(conjugate(), nn.Sequential(last, nn.ReLU()), basis=Whitened())
    guide(torch.randn(4, 2))
    nn.init.constant_(last.bias, -100.0)
    with pytest.raises(ValueError, match="features of all rows are zero"):
        guide(torch.randn(4, 2))
