"""The recurrent models of the examples: likelihood, graph convolution, what is trained, and the particle filter."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch.nn.functional import binary_cross_entropy_with_logits

from pyro_shortrun import SemiImplicit_ELBO
from pyro_shortrun.semi_implicit import SemiImplicit

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import sis_rnn  # noqa: E402
import vgrnn  # noqa: E402


@pytest.fixture(autouse=True)
def on_cpu(device) -> None:
    if device.type != "cpu":
        pytest.skip("the examples draw with generators of the CPU")


@pytest.fixture
def adjacency() -> torch.Tensor:
    return vgrnn.communities(12, 3, 3, seed=0).to(torch.get_default_dtype())


def test_edges_against_weighted_cross_entropy(adjacency):
    snapshot, z = vgrnn.Snapshot(adjacency[0], 2), torch.randn(2, 12, 4, requires_grad=True)
    count, edges = 144, adjacency[0].sum()
    positive, norm = (count - edges) / edges, count / (2 * (count - edges))
    target = adjacency[0].expand(2, 12, 12)
    each = binary_cross_entropy_with_logits(z @ z.mT, target, pos_weight=positive, reduction="none")
    found, expected = vgrnn.Edges(z, snapshot).log_prob(snapshot.adjacency), -norm * each.sum((-1, -2))
    torch.testing.assert_close(found.squeeze(-1), expected)
    torch.testing.assert_close(*(torch.autograd.grad(v.sum(), z) for v in (found, expected)))
    torch.testing.assert_close(vgrnn.Edges(z, snapshot).log_prob(adjacency[0].clone()), found)


def test_sparse_and_dense_convolutions_agree(adjacency):
    seen = torch.stack([adjacency[0], adjacency[1]])
    x = torch.randn(2, 12, 5, requires_grad=True)
    sparse, dense = (vgrnn.Graph(seen, 2, sparse=s) @ x for s in (True, False))
    torch.testing.assert_close(sparse, dense)
    weights = torch.randn(2, 12, 5)
    torch.testing.assert_close(*(torch.autograd.grad((v * weights).sum(), x) for v in (sparse, dense)))


@pytest.mark.parametrize("family", [vgrnn.Gaussian(), vgrnn.NoiseFed()], ids=["gaussian", "noise"])
def test_every_weight_of_the_recurrence_is_trained(adjacency, family):
    net = vgrnn.VGRNN(12, [0, 1])
    data = [vgrnn.Snapshot(a, 2) for a in adjacency]
    loss = SemiImplicit_ELBO(2) if isinstance(family, vgrnn.NoiseFed) else TraceMeanField_ELBO()
    loss.loss_and_grads(vgrnn.model_of(net), vgrnn.guide_of(net, family), data)
    noisy = isinstance(family, vgrnn.NoiseFed)
    for name, p in net.named_parameters():
        assert noisy or "mix" in name or (p.grad is not None and (p.grad != 0).flatten(1).any(1).all()), name
        assert not noisy or (p.grad is not None and p.grad.abs().sum() > 0), name
    fixed = vgrnn.VGRNN(12, [0, 1], train_recurrence=False)
    assert {k for k, _ in net.named_parameters()} - {k for k, _ in fixed.named_parameters()} == {
        "gru_gates",
        "gru_new",
        "gru_state",
    }
    torch.testing.assert_close(fixed.gru_new, net.gru_new.detach())  # the same draw


def test_state_taken_from_the_guide_is_the_state(adjacency):
    net = vgrnn.VGRNN(12, [0])
    data = [vgrnn.Snapshot(a, 1) for a in adjacency]
    model, guide = vgrnn.model_of(net), vgrnn.guide_of(net, vgrnn.Gaussian())

    def forgetful(data) -> None:
        guide(data)
        net.memory = None

    losses = []
    for one in (guide, forgetful):
        pyro.set_rng_seed(0)
        losses.append(TraceMeanField_ELBO().loss(model, one, data))
    assert losses[0] == pytest.approx(losses[1])


def test_state_is_computed_once(adjacency, monkeypatch):
    """The GRU's two convolutions of a step are most of the model's work."""
    net, data, count = vgrnn.VGRNN(12, [0]), [vgrnn.Snapshot(a, 1) for a in adjacency], []
    multiply = vgrnn.Graph.__matmul__
    monkeypatch.setattr(vgrnn.Graph, "__matmul__", lambda graph, x: count.append(1) or multiply(graph, x))
    guide = vgrnn.guide_of(net, vgrnn.Gaussian())
    for _ in range(2):  # with the guide's state of the call before at hand, too
        count.clear()
        TraceMeanField_ELBO().loss_and_grads(vgrnn.model_of(net), guide, data)
        assert len(count) == 4 * len(data)  # two of the guide's encoder, two of the GRU


def test_state_of_other_weights_is_forgotten(adjacency):
    net, data = vgrnn.VGRNN(12, [0]), [vgrnn.Snapshot(a, 1) for a in adjacency]
    guide, optimiser = vgrnn.guide_of(net, vgrnn.Gaussian()), torch.optim.Adam(net.parameters(), lr=0.1)
    vgrnn.guide_of(net, vgrnn.Gaussian())(data)
    sum(p.square().sum() for p in net.parameters()).backward()
    optimiser.step()
    torch.testing.assert_close(net.begin()[0], (net.x + net.bias["x"]).relu())
    with torch.no_grad():
        guide(data)
    assert net.begin()[0].requires_grad
    vgrnn.model_of(net)(data)
    assert net.memory is None  # or it would keep the graph of the last step


@pytest.mark.parametrize("option", ["num_mixtures", "run", "step_size", "judge_run", "epochs", "seeds", "short_epochs"])
def test_kept_results_are_those_of_the_settings(tmp_path, monkeypatch, adjacency, option):
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "benchmarks"))
    import link_prediction

    ran, kinds = [], [link_prediction.KINDS[1], link_prediction.KINDS[3]]

    def compute(*given):
        ran.append(given)
        return np.zeros((2, 4)), (0.0, 0.0)

    monkeypatch.setattr(link_prediction, "by_guide", compute)
    monkeypatch.setattr(link_prediction, "by_short_runs", compute)
    args = link_prediction.parser().parse_args(["--tasks", "prediction"])
    for changed in (False, False, True):
        if changed:
            setattr(args, option, [7, 8] if option == "seeds" else 17)
        for kind in kinds:
            link_prediction.find(kind, "set", adjacency, link_prediction.Store(tmp_path / "r.json"), args)
        assert len(ran) == 2 if not changed else len(ran) > 2


def test_noise_through_the_graph_is_refused(adjacency):
    """As in the SI-VGRNN paper: nodes are then dependent, and the sum for each node is no bound."""
    net = vgrnn.VGRNN(12, [0])
    data = [vgrnn.Snapshot(a, 1) for a in adjacency]

    def through(net, loc, scale, found) -> dist.TorchDistribution:
        def mixing(eps: torch.Tensor) -> torch.Tensor:
            return torch.stack([data[0].graph @ one for one in net.mix(eps, loc, found)])

        return SemiImplicit(mixing, lambda psi: dist.Normal(psi, scale).to_event(1), noise=vgrnn.NOISE)

    with pytest.raises(ValueError, match="graph convolution"):
        SemiImplicit_ELBO(2).loss(vgrnn.model_of(net), vgrnn.guide_of(net, through), data)


def test_particle_filter_is_at_the_importance_weighted_bound():
    """Two estimates of one log p(x), neither of which knows the other."""
    net, x = sis_rnn.VRNN(4), sis_rnn.double_well(3, 3, seed=0).to(torch.get_default_dtype())
    net.log_scale.data.fill_(1.0)  # weights that a few thousand particles can average
    filtered = sis_rnn.particle_filter(net, x, 20_000).sum().item()
    model = sis_rnn.model_of(net)

    def prior(x: torch.Tensor) -> None:
        h = net.first((len(x),))
        with pyro.plate("sequences", len(x)):
            for t in range(x.shape[1]):
                z = pyro.sample(f"z_{t}", net.prior(h))
                h = net.step(x[:, t], z, h)

    judge = Trace_ELBO(num_particles=20_000, vectorize_particles=True, max_plate_nesting=1)
    ((traced, _),) = judge._get_traces(model, prior, (x,), {})
    log_w = sum(traced.nodes[f"x_{t}"]["log_prob"] for t in range(3)).detach()
    expected = (log_w.logsumexp(0) - math.log(20_000)).sum().item()
    assert filtered == pytest.approx(expected, abs=0.02)
