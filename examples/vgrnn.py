"""Dynamic graphs: a variational graph recurrent network (VGRNN), and the same with a semi-implicit guide (SI-VGRNN).

    python examples/vgrnn.py             # a generated graph of communities that people move between; a minute
    python examples/vgrnn.py --smoke     # seconds, to see that it runs

The model is a Pyro program. Snapshot t of a graph with N nodes has adjacency A_t; for t = 1, ..., T

    z_t,i ~ N(mu(h_{t-1,i}), sigma(h_{t-1,i})^2)            one latent vector for each node
    A_t,ij ~ Bernoulli(sigmoid(z_t,i . z_t,j))
    h_t = GraphGRU(A_t, [x, phi(z_t)], h_{t-1})             every map in it is a graph convolution

and the guide sees A_t and h_{t-1}. The semi-implicit guide has N(psi, sigma^2) for each node, where psi is a network of
what the graph convolutions found for that node *and of noise of the node's own*. Noise that passes through the graph
convolutions, as in the SI-VGRNN paper, makes the nodes dependent given the data. Then the sum over mixing draws for
each node by itself is no bound (SemiImplicit_ELBO refuses it); one for the whole graph would be, but is hopeless in
N x 16 dims. Several networks (seeds) train at once, as a leading batch dim of every parameter.

Prints AUC and AP of predicted edges of the last snapshots and writes a picture of true and predicted adjacency.

Hajiramezanali, Hasanzadeh, Duffield, Narayanan, Zhou, Qian: Variational Graph Recurrent Neural Networks, NeurIPS 2019.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, TraceMeanField_ELBO
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import softplus
from tqdm import tqdm

from pyro_shortrun import SemiImplicit_ELBO
from pyro_shortrun.semi_implicit import SemiImplicit

NOISE = 16


class _Convolve(torch.autograd.Function):
    """``P x`` for a symmetric constant P."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, x: Tensor) -> Tensor:
        ctx.p = p
        return torch.sparse.mm(p, x.reshape(-1, x.shape[-1])).reshape(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, _Convolve.apply(ctx.p, grad)


class Graph:
    """``graph @ x`` multiplies ``(seeds, N, features)`` by ``P = D^{-1/2} (A + 2 I) D^{-1/2}``, the graph convolution.

    :param adjacency: ``(N, N)``, or ``(seeds, N, N)`` where each network sees a graph of its own.
    :param seeds: number of networks.
    :param sparse: whether P is kept as its non-zero entries; by default where they are few.
    """

    def __init__(self, adjacency: Tensor, seeds: int, sparse: bool | None = None) -> None:
        loops = adjacency + 2 * torch.eye(adjacency.shape[-1])
        root = loops.sum(-1).rsqrt()
        self.p = root.unsqueeze(-1) * loops * root.unsqueeze(-2)
        self.sparse = bool((self.p != 0).float().mean() < 0.1) if sparse is None else sparse
        if self.sparse:  # all seeds in one matrix with blocks along its diagonal
            blocks = self.p.expand(seeds, *self.p.shape[-2:])
            seed, i, j = blocks.nonzero().T
            n = blocks.shape[-1]
            where = torch.stack([seed * n + i, seed * n + j])
            with warnings.catch_warnings():  # the format is "in beta state"
                warnings.simplefilter("ignore", UserWarning)
                self.p = torch.sparse_coo_tensor(where, blocks[seed, i, j], (seeds * n,) * 2).coalesce().to_sparse_csr()

    def __matmul__(self, x: Tensor) -> Tensor:
        return _Convolve.apply(self.p, x) if self.sparse else self.p @ x


class Snapshot:
    """One time step: the graph that networks see, and the adjacency ``(N, N)`` that the model generates."""

    def __init__(self, adjacency: Tensor, seeds: int, seen: Tensor | None = None) -> None:
        self.adjacency = adjacency
        self.graph = Graph(adjacency if seen is None else seen, seeds)
        self.edges = adjacency.flatten().nonzero().squeeze(-1)


class _AllPairs(torch.autograd.Function):
    """``sum_ij softplus(z_i . z_j)``: most of a training step, so with half the products of autograd's own way back."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        logits = z @ z.mT
        ctx.save_for_backward(z, logits)
        return softplus(logits).sum((-1, -2))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        z, logits = ctx.saved_tensors
        return 2 * grad[..., None, None] * (logits.sigmoid() @ z)


class Edges(dist.TorchDistribution):
    """Edges with logits ``z_i . z_j``; ``log_prob`` is weighted so that edges count as much as their absence.

    ``norm * (positive * A * log p + (1 - A) * log(1 - p))`` summed over all N^2 pairs, with
    ``positive = (N^2 - S) / S`` and ``norm = N^2 / (2 (N^2 - S))`` for S directed edges, as in the papers' code.
    """

    arg_constraints = {}

    def __init__(self, z: Tensor, snapshot: Snapshot) -> None:
        self.z, self.snapshot = z, snapshot
        super().__init__((*z.shape[:-2], 1), (z.shape[-2],) * 2, validate_args=False)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return torch.bernoulli((self.z @ self.z.mT).sigmoid()).unsqueeze(-3)

    def log_prob(self, value: Tensor) -> Tensor:
        known = value is self.snapshot.adjacency
        edges = self.snapshot.edges if known else value.flatten().nonzero().squeeze(-1)
        count, found = value.numel(), len(edges)
        positive, norm = (count - found) / found, count / (2 * (count - found))
        i, j = (self.z.index_select(-2, k) for k in (edges // value.shape[-1], edges % value.shape[-1]))
        at_edges = (i * j).sum(-1)
        total = _AllPairs.apply(self.z) + ((positive - 1) * softplus(at_edges) - positive * at_edges).sum(-1)
        return -norm * total.unsqueeze(-1)


def glorot(rng: Sequence[torch.Generator], fan_in: int, fan_out: int) -> nn.Parameter:
    """``(seeds, fan_in, fan_out)``, each from a generator of its own."""
    limit = math.sqrt(6 / (fan_in + fan_out))
    return nn.Parameter(torch.stack([(2 * torch.rand(fan_in, fan_out, generator=g) - 1) * limit for g in rng]))


def gates(rng: Sequence[torch.Generator], hidden: int) -> nn.Parameter:
    """Update and reset gates of a GRU from two inputs and the state, ``(seeds, 3 hidden, 2 hidden)``."""
    parts = [torch.cat([glorot(rng, 2 * hidden, hidden), glorot(rng, hidden, hidden)], -2) for _ in range(2)]
    return nn.Parameter(torch.cat(parts, -1).detach())


class VGRNN(nn.Module):
    """The networks of model and guides. Values are ``(seeds, nodes, features)``.

    :param nodes: N; features are the identity.
    :param seeds: one network for each.
    :param train_recurrence: whether the graph GRU is trained. In the authors' code its weights are in no parameter
        list, so that it stays as it was drawn.
    """

    def __init__(
        self, nodes: int, seeds: Sequence[int], hidden: int = 32, latent: int = 16, train_recurrence: bool = True
    ) -> None:
        super().__init__()
        rng = [torch.Generator().manual_seed(s) for s in seeds]
        self.seeds, self.nodes, self.hidden, self.latent = len(rng), nodes, hidden, latent
        self.x = glorot(rng, nodes, hidden)
        self.z = glorot(rng, latent, hidden)
        self.encode = glorot(rng, 2 * hidden, hidden)
        self.posterior_head = glorot(rng, hidden, 2 * latent)
        self.prior_hidden = glorot(rng, hidden, hidden)
        self.prior_head = glorot(rng, hidden, 2 * latent)
        self.gru_gates = gates(rng, hidden)
        self.gru_new = glorot(rng, 2 * hidden, hidden)
        self.gru_state = glorot(rng, hidden, hidden)
        biases = {"x": hidden, "z": hidden, "prior_hidden": hidden, "prior_head": 2 * latent}
        self.bias = nn.ParameterDict({k: nn.Parameter(torch.zeros(len(rng), 1, n)) for k, n in biases.items()})
        self.mix_context, self.mix_noise = glorot(rng, hidden, 64), glorot(rng, NOISE, 64)
        self.mix_out = glorot(rng, 64, latent)
        if not train_recurrence:
            for name in ("gru_new", "gru_gates", "gru_state"):
                drawn = getattr(self, name).detach()
                delattr(self, name)
                self.register_buffer(name, drawn)
        self.memory: dict[Any, tuple] | None = None

    def begin(self) -> tuple[Tensor, Tensor]:
        """Features of the nodes, and the first state; the model takes the guide's, or no later state would be its."""
        stamp = (torch.is_grad_enabled(), *(p._version for p in self.parameters()))
        if self.memory and self.memory["stamp"] == stamp:
            return self.memory["begin"]
        x = (self.x + self.bias["x"]).relu()
        first = x, x.new_zeros(x.shape)
        if self.memory is not None:
            self.memory = {"stamp": stamp, "begin": first}
        return first

    def prior(self, h: Tensor) -> tuple[Tensor, Tensor]:
        e = (h @ self.prior_hidden + self.bias["prior_hidden"]).relu()
        loc, scale = (e @ self.prior_head + self.bias["prior_head"]).chunk(2, -1)
        return loc, softplus(scale)

    def posterior(self, graph: Graph, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Location, scale, and what the graph convolutions found, for each node."""
        e = ((graph @ torch.cat([x, h], -1)) @ self.encode).relu()
        found = graph @ e
        loc, scale = (found @ self.posterior_head).chunk(2, -1)
        return loc, softplus(scale), found

    def mix(self, eps: Tensor, loc: Tensor, found: Tensor) -> Tensor:
        """``psi``, ``(K + 1, seeds, N, latent)``: noise moves the location."""
        hidden = (eps @ self.mix_noise + found @ self.mix_context).tanh()
        return loc + hidden @ self.mix_out

    def step(self, t: int, graph: Graph, x: Tensor, z: Tensor, h: Tensor) -> Tensor:
        """``h_t``. The model takes it from the guide where it was computed from the very same ``z_t``."""
        if self.memory is not None and t in self.memory and self.memory[t][0] is z and self.memory[t][1] is h:
            return self.memory[t][2]
        found = graph @ torch.cat([x, (z @ self.z + self.bias["z"]).relu(), h], -1)
        gates = (found @ self.gru_gates).sigmoid()
        update, reset = gates.chunk(2, -1)
        new = (found[..., : 2 * self.hidden] @ self.gru_new + (graph @ (reset * h)) @ self.gru_state).tanh()
        out = update * h + (1 - update) * new
        if self.memory is not None:
            self.memory[t] = (z, h, out)
        return out


def model_of(net: VGRNN, scale: float | None = None) -> Callable:
    """The Pyro model.

    :param scale: factor of its log density, ``1 / N^2`` as in the papers' code if None (which, for an ELBO, only moves
        Adam's epsilon); 1 where the density itself is followed, as by ShortRunGuide.
    """
    weight = 1 / net.nodes**2 if scale is None else scale

    def model(data: Sequence[Snapshot]) -> None:
        pyro.module("vgrnn", net)
        x, h = net.begin()
        nodes = pyro.plate("nodes", net.nodes, dim=-1)
        with poutine.scale(scale=weight), pyro.plate("seeds", net.seeds, dim=-2):
            for t, now in pyro.markov(enumerate(data)):
                with nodes:
                    loc, scale = net.prior(h)
                    z = pyro.sample(f"z_{t}", dist.Normal(loc, scale, validate_args=False).to_event(1))
                pyro.sample(f"A_{t}", Edges(z, now), obs=now.adjacency)
                h = net.step(t, now.graph, x, z, h)
        net.memory = None

    return model


class Gaussian:
    """VGRNN's guide: independent Gaussians given the past."""

    def __call__(self, net: VGRNN, loc: Tensor, scale: Tensor, found: Tensor) -> dist.TorchDistribution:
        return dist.Normal(loc, scale, validate_args=False).to_event(1)


class NoiseFed:
    """SI-VGRNN's guide: Gaussians around a network of noise."""

    def __call__(self, net: VGRNN, loc: Tensor, scale: Tensor, found: Tensor) -> dist.TorchDistribution:
        def conditional(psi: Tensor) -> dist.TorchDistribution:
            return dist.Normal(psi, scale, validate_args=False).to_event(1)

        return SemiImplicit(lambda eps: net.mix(eps, loc, found), conditional, noise=NOISE)


def guide_of(net: VGRNN, family: Callable) -> Callable:
    def guide(data: Sequence[Snapshot]) -> None:
        pyro.module("vgrnn", net)
        net.memory = {}
        x, h = net.begin()
        nodes = pyro.plate("nodes", net.nodes, dim=-1)
        with poutine.scale(scale=1 / net.nodes**2), pyro.plate("seeds", net.seeds, dim=-2):
            for t, now in pyro.markov(enumerate(data)):
                with nodes:
                    fn = family(net, *net.posterior(now.graph, x, h))
                    z = pyro.sample(f"z_{t}", fn)
                h = net.step(t, now.graph, x, z, h)

    return guide


def train(
    net: VGRNN,
    family: Callable,
    data: Sequence[Snapshot],
    epochs: int,
    lr: float = 0.01,
    num_mixtures: int = 5,
    name: str = "",
) -> Callable:
    """Full-batch Adam; returns the guide."""
    model, guide = model_of(net), guide_of(net, family)
    loss = SemiImplicit_ELBO(num_mixtures) if isinstance(family, NoiseFed) else TraceMeanField_ELBO()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": lr}), loss)
    with tqdm(range(epochs), desc=name or "epochs", mininterval=5) as bar:
        for _ in bar:
            bar.set_postfix(loss=f"{svi.step(data):.3f}", refresh=False)
    return guide


@torch.no_grad()
def means(net: VGRNN, guide: Callable, data: Sequence[Snapshot]) -> tuple[Tensor, Tensor]:
    """Means of z_t under the prior, which knows the snapshots before t alone, and under the guide, which sees t:
    ``(T, seeds, N, latent)``. Of a semi-implicit guide, over its mixing draws."""
    traced = poutine.trace(guide).get_trace(data)
    replayed = poutine.trace(poutine.replay(model_of(net), traced)).get_trace(data)

    def loc(fn: dist.TorchDistribution) -> Tensor:
        return fn.components.base_dist.loc.mean(0) if isinstance(fn, SemiImplicit) else fn.base_dist.loc

    names = [f"z_{t}" for t in range(len(data))]
    return tuple(torch.stack([loc(trace.nodes[n]["fn"]) for n in names]) for trace in (replayed, traced))


def scores(z: Tensor, positive: Tensor, negative: Tensor) -> tuple[float, float]:
    """AUC and AP of ``z_i . z_j`` on pairs ``(n, 2)`` with and without an edge."""
    pairs = torch.cat([positive, negative])
    value = (z[pairs[:, 0]] * z[pairs[:, 1]]).sum(-1)
    truth = np.r_[np.ones(len(positive)), np.zeros(len(negative))]
    return float(roc_auc_score(truth, value)), float(average_precision_score(truth, value))


def non_edges(adjacency: Tensor, count: int, rng: np.random.Generator) -> Tensor:
    """``count`` distinct pairs ``i < j`` without an edge."""
    pairs = torch.triu(1 - adjacency, 1).nonzero()
    return pairs[rng.choice(len(pairs), count, replace=False)]


def communities(nodes: int, steps: int, groups: int, seed: int) -> Tensor:
    """People who move between communities now and then: ``(steps, nodes, nodes)``."""
    rng = torch.Generator().manual_seed(seed)
    member = torch.randint(groups, (nodes,), generator=rng)
    out = []
    for _ in range(steps):
        moves = torch.rand(nodes, generator=rng) < 0.05
        member = torch.where(moves, torch.randint(groups, (nodes,), generator=rng), member)
        p = torch.where(member[:, None] == member[None, :], 0.3, 0.01)
        upper = torch.triu((torch.rand(nodes, nodes, generator=rng) < p).float(), 1)
        out.append(upper + upper.T)
    return torch.stack(out)


def main(args: argparse.Namespace) -> None:
    import matplotlib.pyplot as plt

    torch.set_num_threads(1)
    pyro.enable_validation(False)
    if args.smoke:
        args.epochs, args.nodes, args.steps = 3, 24, 5
    adjacency = communities(args.nodes, args.steps, 4, args.seed)
    data, kept = [Snapshot(a, 1) for a in adjacency], args.steps - 2
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{'guide':<12}{'AUC':>8}{'AP':>8}   (prediction of the last two snapshots)")
    last = torch.zeros(0)
    for name, family in (("Gaussian", Gaussian()), ("semi-impl.", NoiseFed())):
        pyro.clear_param_store()
        pyro.set_rng_seed(args.seed)
        net = VGRNN(args.nodes, [args.seed])
        guide = train(net, family, data[:kept], args.epochs, name=name)
        prior, _ = means(net, guide, data)
        rng, found = np.random.default_rng(args.seed), []
        for t in range(kept, args.steps):
            edges = torch.triu(adjacency[t]).nonzero()
            found.append(scores(prior[t, 0], edges, non_edges(adjacency[t], len(edges), rng)))
        print(f"{name:<12}{np.mean(found, 0)[0]:>8.3f}{np.mean(found, 0)[1]:>8.3f}", flush=True)
        last = prior[-1, 0]
    order = torch.pca_lowrank(last, 2)[0][:, 0].argsort()  # so that communities stand together
    figure, axes = plt.subplots(1, 2, figsize=(8, 4))
    for axis, image, title in zip(
        axes, (adjacency[-1], (last @ last.T).sigmoid()), ("last snapshot", "predicted from those before"), strict=True
    ):
        axis.imshow(image[order][:, order], cmap="Greys", vmin=0, vmax=1)
        axis.set(title=title, xticks=[], yticks=[])
    figure.tight_layout()
    figure.savefig(folder / "vgrnn.png", dpi=120)


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--nodes", type=int, default=80)
    out.add_argument("--steps", type=int, default=10)
    out.add_argument("--epochs", type=int, default=300)
    out.add_argument("--seed", type=int, default=0)
    out.add_argument("--output", default="vgrnn-output")
    out.add_argument("--smoke", action="store_true", help="tiny settings, to see that it runs")
    return out


if __name__ == "__main__":
    main(parser().parse_args())
