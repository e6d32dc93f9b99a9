"""A small zoo of Pyro models for exercising automatic guides.

Every entry is a :class:`Case`; ``case.make()`` returns a fresh ``(model, args)`` pair, so that
``model(*args)`` and ``guide(*args)`` both work.  Data are synthetic (or tiny literals), drawn in
float64 on the CPU from a fixed, local :class:`torch.Generator` and then moved to the current
default dtype and device: the same numbers are seen in float32 and in float64.  The weights of
neural networks are likewise overwritten from a fixed generator.

The models broadcast over an extra plate to the left (``vectorize_particles=True``), except the
Bayesian network, because ``nn.Linear`` takes no batch of weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroSample
from pyro.ops.indexing import Vindex
from torch import Tensor, nn

Model = Callable[..., Any]
Made = tuple[Model, tuple[Any, ...]]

_PyroModule: Any = PyroModule  # type checkers do not know its ``[nn.Linear]``


@dataclass(frozen=True)
class Case:
    """One model of the zoo.

    ``discrete`` names the sites that are to be enumerated (``TraceEnum_ELBO``), and so hidden from
    a guide over the continuous latents.  ``create_plates`` is what an autoguide needs, as its
    argument of that name, when a plate of the model is subsampled.
    """

    name: str
    make: Callable[[], Made]
    discrete: tuple[str, ...] = ()
    create_plates: Callable[..., Any] | None = None


# ------------------------------------------------------------------------------------ helpers


def _generator(seed: int) -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed(seed)


def _randn(gen: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=gen, dtype=torch.float64, device="cpu")


def _rand(gen: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=gen, dtype=torch.float64, device="cpu")


def _cpu(values: Any) -> Tensor:
    """``values`` as a float64 tensor on the CPU, where data are prepared."""
    return torch.as_tensor(values, dtype=torch.float64, device="cpu")


def _data(values: Any) -> Tensor:
    """``values`` in the default dtype, on the default device."""
    device = torch.get_default_device()
    return _cpu(values).to(device=device, dtype=torch.get_default_dtype())


@torch.no_grad()
def _fill(module: nn.Module, seed: int) -> None:
    """Overwrite the parameters of ``module`` with fixed values of a sensible size."""
    gen = _generator(seed)
    for param in module.parameters():
        fan_in = param.shape[-1] if param.dim() > 1 else 100
        param.copy_(_randn(gen, *param.shape) / fan_in**0.5)


# -------------------------------------------------------------------------------------- CASES


def eight_schools(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def make_eight_schools() -> Made:
    """Centred hierarchy: a funnel of two globals over eight real locals, heavy-tailed scale."""
    y = _data([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = _data([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    return eight_schools, (y, sigma)


def baseball(at_bats: Tensor, hits: Tensor) -> None:
    m = pyro.sample("m", dist.Uniform(0.0, 1.0))
    kappa = pyro.sample("kappa", dist.Pareto(1.0, 1.5))
    with pyro.plate("players", len(at_bats)):
        phi = pyro.sample("phi", dist.Beta(m * kappa, (1.0 - m) * kappa))
        pyro.sample("hits", dist.Binomial(at_bats, phi), obs=hits)


def make_baseball() -> Made:
    """Partial pooling with locals and globals all constrained; one support set by a parameter."""
    gen = _generator(18)
    at_bats = 35.0 + torch.floor(20.0 * _rand(gen, 18))
    ability = 0.27 + 0.04 * _randn(gen, 18)
    hits = torch.binomial(at_bats, ability, generator=gen)
    return baseball, (_data(at_bats), _data(hits))


def regression(group: Tensor, slope: Tensor, y: Tensor) -> None:
    a = pyro.sample("a", dist.Normal(0.0, 10.0))
    b_group = pyro.sample("b_group", dist.Normal(0.0, 1.0))
    b_slope = pyro.sample("b_slope", dist.Normal(0.0, 1.0))
    b_both = pyro.sample("b_both", dist.Normal(0.0, 1.0))
    sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
    mean = a + b_group * group + b_slope * slope + b_both * group * slope
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mean, sigma), obs=y)


def make_regression() -> Made:
    """Scalar globals only, correlated through an interaction, and an interval-supported scale."""
    gen = _generator(100)
    group = (_rand(gen, 100) < 0.35).double()
    slope = 6.0 * _rand(gen, 100) ** 2
    y = 9.2 - 1.9 * group - 0.2 * slope + 0.4 * group * slope + 0.9 * _randn(gen, 100)
    return regression, (_data(group), _data(slope), _data(y))


def lkj(y: Tensor) -> None:
    d = y.shape[-1]
    scale = pyro.sample("scale", dist.HalfNormal(2.0).expand([d]).to_event(1))
    corr = pyro.sample("corr", dist.LKJCholesky(d, torch.tensor(2.0)))
    tril = scale.unsqueeze(-1) * corr
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(d), scale_tril=tril), obs=y)


def make_lkj() -> Made:
    """A latent whose unconstrained shape differs from its own (Cholesky factor of correlations)."""
    gen = _generator(60)
    mix = _cpu([[1.0, 0, 0, 0], [0.8, 1.2, 0, 0], [-0.3, 0.2, 0.5, 0], [0, 0.9, 0.4, 1.5]])
    return lkj, (_data(_randn(gen, 60, 4) @ mix.T),)


def gamma_def(x: Tensor) -> None:
    n, pixels = x.shape
    top, mid, low = 3, 4, 6
    alpha = 0.3

    def weights(name: str, rows: int, cols: int) -> Tensor:
        return pyro.sample(name, dist.Gamma(0.5, 0.5).expand([rows, cols]).to_event(2))

    def mean(z: Tensor, w: Tensor) -> Tensor:
        return (z.unsqueeze(-2) @ w).squeeze(-2)

    w_top = weights("w_top", top, mid)
    w_mid = weights("w_mid", mid, low)
    w_low = weights("w_low", low, pixels)
    with pyro.plate("images", n):
        z_top = pyro.sample("z_top", dist.Gamma(alpha, alpha).expand([top]).to_event(1))
        z_mid = pyro.sample("z_mid", dist.Gamma(alpha, alpha / mean(z_top, w_top)).to_event(1))
        z_low = pyro.sample("z_low", dist.Gamma(alpha, alpha / mean(z_mid, w_mid)).to_event(1))
        pyro.sample("x", dist.Poisson(mean(z_low, w_low)).to_event(1), obs=x)


def make_gamma_def() -> Made:
    """Sparse gamma deep exponential family: positive matrices, globals and three local layers."""
    gen = _generator(20)
    parts = 6.0 * (_rand(gen, 4, 12) < 0.4).double()
    usage = -torch.log(_rand(gen, 20, 4)) * (_rand(gen, 20, 4) < 0.6).double()
    return gamma_def, (_data(torch.poisson(usage @ parts, generator=gen)),)


def make_vae() -> Made:
    """Decoder parameters by ``pyro.module`` beside a vector-valued local latent."""
    gen = _generator(64)
    decoder = nn.Sequential(nn.Linear(4, 32), nn.Softplus(), nn.Linear(32, 16))
    _fill(decoder, 64)

    def vae(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), torch.ones(4)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    prototypes = 0.1 + 0.8 * (_rand(gen, 4, 16) < 0.5).double()
    probs = prototypes[torch.arange(64, device="cpu") % 4]
    return vae, (_data(torch.bernoulli(probs, generator=gen)),)


class DMM(PyroModule):
    """Gated Gaussian transition and Bernoulli emission over a padded batch of sequences."""

    def __init__(self, x_dim: int, z_dim: int, hidden: int) -> None:
        super().__init__()
        linear = _PyroModule[nn.Linear]
        self.z_dim = z_dim
        self.gate = linear(z_dim, z_dim)
        self.proposal = linear(z_dim, z_dim)
        self.raw_scale = linear(z_dim, z_dim)
        self.emit_hidden = linear(z_dim, hidden)
        self.emit = linear(hidden, x_dim)

    def transition(self, z: Tensor) -> tuple[Tensor, Tensor]:
        gate = torch.sigmoid(self.gate(z))
        loc = (1.0 - gate) * z + gate * self.proposal(z)
        return loc, 0.1 + nn.functional.softplus(self.raw_scale(z))

    def emission(self, z: Tensor) -> Tensor:
        return self.emit(torch.tanh(self.emit_hidden(z)))

    def forward(self, x: Tensor, lengths: Tensor) -> None:
        n, steps, _ = x.shape
        z = torch.zeros(n, self.z_dim)
        with pyro.plate("sequences", n):
            for t in range(steps):
                z = pyro.sample(f"z_{t + 1}", dist.Normal(*self.transition(z)).to_event(1))
                # Latents past the end keep their prior (so the density stays proper, whatever
                # the guide); only the padding is masked out.
                inside: Any = t < lengths
                with poutine.mask(mask=inside):
                    emitted = dist.Bernoulli(logits=self.emission(z)).to_event(1)
                    pyro.sample(f"x_{t + 1}", emitted, obs=x[:, t])


def make_dmm() -> Made:
    """Deep Markov model, itself a PyroModule: a chain of locals, padding by ``poutine.mask``."""
    gen = _generator(12)
    dmm = DMM(x_dim=6, z_dim=3, hidden=8)
    _fill(dmm, 12)
    lengths = _cpu([5, 5, 5, 4, 4, 4, 3, 3, 3, 2, 2, 1])
    steps = torch.arange(5, dtype=torch.float64, device="cpu")
    phase = 6.3 * _rand(gen, 12, 1, 6)
    x = torch.bernoulli(torch.sigmoid(3.0 * torch.sin(phase + steps[:, None])), generator=gen)
    x = x * (steps < lengths[:, None])[..., None]
    return dmm, (_data(x), _data(lengths))


def gp_regression(x: Tensor, y: Tensor) -> None:
    n = len(x)
    amplitude = pyro.sample("amplitude", dist.LogNormal(0.0, 0.5))
    length = pyro.sample("length", dist.LogNormal(0.0, 0.5))
    noise = pyro.sample("noise", dist.LogNormal(-1.5, 0.5))
    corr = torch.exp(-0.5 * ((x[:, None] - x) / length[..., None, None]) ** 2)
    # The jitter is relative to the amplitude, which keeps float32 safe for any amplitude.
    tril = amplitude[..., None, None] * torch.linalg.cholesky(corr + 1e-4 * torch.eye(n))
    f = pyro.sample("f", dist.MultivariateNormal(torch.zeros(n), scale_tril=tril))
    pyro.sample("y", dist.Normal(f, noise[..., None]).to_event(1), obs=y)


def make_gp_regression() -> Made:
    """One strongly correlated multivariate latent with positive hyper-parameters above it."""
    gen = _generator(21)
    x = torch.sort(5.0 * _rand(gen, 20)).values
    y = torch.sin(1.7 * x) + 0.2 * _randn(gen, 20)
    return gp_regression, (_data(x), _data(y))


CASES: list[Case] = [
    Case("eight_schools", make_eight_schools),
    Case("baseball", make_baseball),
    Case("regression", make_regression),
    Case("lkj", make_lkj),
    Case("gamma_def", make_gamma_def),
    Case("vae", make_vae),
    Case("dmm", make_dmm),
    Case("gp_regression", make_gp_regression),
]
"""The main models, all with continuous latents only.

- ``eight_schools``: centred funnel, globals and real locals in a plate.
- ``baseball``: constrained globals and constrained locals, a support set by a parameter (Pareto).
- ``regression``: correlated scalar globals, no local latents.
- ``lkj``: a constrained matrix of fewer free coordinates than elements; a plate of scales.
- ``gamma_def``: positive global matrices, three chained layers of positive local vectors.
- ``vae``: local vectors under a learnt decoder registered by ``pyro.module``.
- ``dmm``: a PyroModule as the model, local latents chained in time, masked observations.
- ``gp_regression``: a dense multivariate latent whose prior is set by latent hyper-parameters.
"""


# -------------------------------------------------------------------------------------- EXTRA


def dependent_support(y: Tensor) -> None:
    low = pyro.sample("low", dist.Normal(0.0, 1.0))
    x = pyro.sample("x", dist.Uniform(low, low + 2.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(x, 0.5), obs=y)


def make_dependent_support() -> Made:
    """The support of one latent moves with the value of another."""
    return dependent_support, (_data(0.8 + 0.5 * _randn(_generator(1), 10)),)


def nested_inner(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    groups = pyro.plate("groups", y.shape[0], dim=-2)
    members = pyro.plate("members", y.shape[1], dim=-1)
    with groups, members:
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)


def nested_both(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    groups = pyro.plate("groups", y.shape[0], dim=-2)
    members = pyro.plate("members", y.shape[1], dim=-1)
    with groups:
        centre = pyro.sample("centre", dist.Normal(mu, 1.0))
        spread = pyro.sample("spread", dist.LogNormal(0.0, 0.5))
        with members:
            z = pyro.sample("z", dist.Normal(centre, spread))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)


def _nested_data() -> Tensor:
    gen = _generator(2)
    return _data(1.0 + _randn(gen, 5, 1) + 0.8 * _randn(gen, 5, 6))


def make_nested_inner() -> Made:
    """Two plates, with latents only where both are open."""
    return nested_inner, (_nested_data(),)


def make_nested_both() -> Made:
    """Two plates, with latents in the outer one alone (a plate to the left) and in both."""
    return nested_both, (_nested_data(),)


@config_enumerate
def mixture(x: Tensor) -> None:
    k = 3
    weights = pyro.sample("weights", dist.Dirichlet(2.0 * torch.ones(k)))
    scale = pyro.sample("scale", dist.LogNormal(-0.5, 0.5))
    with pyro.plate("components", k):
        locs = pyro.sample("locs", dist.Normal(0.0, 4.0))
    with pyro.plate("rows", len(x)):
        assignment = pyro.sample("assignment", dist.Categorical(weights))
        loc = Vindex(locs.unsqueeze(-2))[..., assignment]
        pyro.sample("x", dist.Normal(loc, scale), obs=x)


def make_mixture() -> Made:
    """Enumerated local assignments; continuous globals, one of them on the simplex."""
    gen = _generator(3)
    centres = _cpu([-4.0, 0.0, 3.0]).repeat_interleave(_cpu([10, 15, 20]).long())
    return mixture, (_data(centres + 0.7 * _randn(gen, 45)),)


@config_enumerate
def subsampled_mixture(x: Tensor, subsample_size: int) -> None:
    locs = pyro.sample("locs", dist.Normal(torch.tensor([-2.0, 2.0]), 1.0).to_event(1))
    with pyro.plate("rows", len(x), subsample_size=subsample_size) as index:
        assignment = pyro.sample("assignment", dist.Categorical(torch.tensor([0.4, 0.6])))
        shift = pyro.sample("shift", dist.Normal(0.0, 0.5))
        loc = Vindex(locs)[..., assignment]
        pyro.sample("x", dist.Normal(loc + shift, 0.3), obs=x[index])


def subsampled_mixture_plates(x: Tensor, subsample_size: int) -> Any:
    return pyro.plate("rows", len(x), subsample_size=subsample_size)


def make_subsampled_mixture() -> Made:
    """A subsampled plate holding an enumerated local and a continuous local together."""
    gen = _generator(4)
    centres = 4.0 * (_rand(gen, 30) < 0.6).double() - 2.0
    return subsampled_mixture, (_data(centres + 0.6 * _randn(gen, 30)), 8)


class BNN(PyroModule):
    """One hidden layer, every weight and bias a latent."""

    def __init__(self, x_dim: int, hidden: int) -> None:
        super().__init__()
        self.hidden = _PyroModule[nn.Linear](x_dim, hidden)
        self.out = _PyroModule[nn.Linear](hidden, 1)
        for layer in (self.hidden, self.out):
            for name, param in list(layer.named_parameters()):
                prior = dist.Normal(0.0, 1.0).expand(param.shape).to_event(param.dim())
                setattr(layer, name, PyroSample(prior))

    def forward(self, x: Tensor, y: Tensor) -> None:
        mean = self.out(torch.tanh(self.hidden(x))).squeeze(-1)
        noise = pyro.sample("noise", dist.LogNormal(-1.0, 0.5))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(mean, noise), obs=y)


def make_bnn() -> Made:
    """A Bayesian network by ``PyroSample``: dotted site names, no learnt parameters."""
    gen = _generator(5)
    x = 2.0 * _randn(gen, 30, 2)
    y = torch.tanh(x[:, 0]) - 0.5 * torch.tanh(x[:, 1]) + 0.1 * _randn(gen, 30)
    return BNN(x_dim=2, hidden=5), (_data(x), _data(y))


def make_reparam() -> Made:
    """Eight schools under ``LocScaleReparam(0)``: a renamed latent and a deterministic site."""
    _, args = make_eight_schools()
    return poutine.reparam(eight_schools, config={"theta": LocScaleReparam(0.0)}), args


def local_levels(y: Tensor) -> None:
    with pyro.plate("rows", len(y)):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        spread = pyro.sample("spread", dist.Exponential(1.0))
        pyro.sample("y", dist.Normal(level, 0.1 + spread), obs=y)


def make_scaled() -> Made:
    """The whole model under ``poutine.scale``: a tempered density."""
    return poutine.scale(local_levels, scale=0.25), (_data(_randn(_generator(6), 12)),)


def make_masked() -> Made:
    """The whole model under ``poutine.mask``: a third of the rows lose latents and data alike.

    The density of a masked row's latents is flat, so the posterior over them is improper: the
    ELBO of a guide that does not mask them too has no upper bound.
    """
    keep: Any = torch.arange(12, device=torch.get_default_device()) % 3 != 0
    return poutine.mask(local_levels, mask=keep), (_data(_randn(_generator(6), 12)),)


@config_enumerate
def hmm(y: Tensor) -> None:
    k = 2
    rows = 1.0 + 4.0 * torch.eye(k)
    transition = pyro.sample("transition", dist.Dirichlet(rows).to_event(1))
    locs = pyro.sample("locs", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(-0.5, 0.5))
    with pyro.plate("sequences", y.shape[0]):
        state = torch.tensor(0)
        for t in pyro.markov(range(y.shape[1])):
            probs = Vindex(transition)[..., state, :]
            state = pyro.sample(f"state_{t}", dist.Categorical(probs))
            loc = Vindex(locs)[..., state]
            pyro.sample(f"y_{t}", dist.Normal(loc, scale), obs=y[:, t])


def make_hmm() -> Made:
    """States enumerated along ``pyro.markov``; global continuous emission and transition."""
    gen = _generator(7)
    states = (torch.cumsum((_rand(gen, 4, 8) < 0.25).long(), dim=1) % 2).double()
    return hmm, (_data(2.0 * states - 1.0 + 0.5 * _randn(gen, 4, 8)),)


class TwoLayer(nn.Module):
    """The maps z2 -> z1 and z1 -> x of a two-layer Gaussian model."""

    def __init__(self) -> None:
        super().__init__()
        self.upper = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))
        self.lower = nn.Linear(3, 6)


def make_two_layer() -> Made:
    """Two stacked local vectors in one plate, the maps between them learnt."""
    gen = _generator(8)
    net = TwoLayer()
    _fill(net, 8)

    def two_layer(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("rows", len(x)):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(net.upper(z2), 0.5).to_event(1))
            pyro.sample("x", dist.Normal(net.lower(z1), 0.3).to_event(1), obs=x)

    x = torch.tanh(_randn(gen, 24, 2)) @ _randn(gen, 2, 6) + 0.3 * _randn(gen, 24, 6)
    return two_layer, (_data(x),)


EXTRA: list[Case] = [
    Case("dependent_support", make_dependent_support),
    Case("nested_inner", make_nested_inner),
    Case("nested_both", make_nested_both),
    Case("mixture", make_mixture, discrete=("assignment",)),
    Case(
        "subsampled_mixture",
        make_subsampled_mixture,
        discrete=("assignment",),
        create_plates=subsampled_mixture_plates,
    ),
    Case("bnn", make_bnn),
    Case("reparam", make_reparam),
    Case("scaled", make_scaled),
    Case("masked", make_masked),
    Case("hmm", make_hmm, discrete=tuple(f"state_{t}" for t in range(8))),
    Case("two_layer", make_two_layer),
]
"""Small models, each for one awkward feature.

- ``dependent_support``: a support that moves with another latent.
- ``nested_inner``, ``nested_both``: two plates, latents in the inner one, or in outer and inner.
- ``mixture``: enumerated locals beside continuous globals.
- ``subsampled_mixture``: enumerated and continuous locals in one subsampled plate.
- ``bnn``: ``PyroSample`` weights in a PyroModule.
- ``reparam``: a reparametrised local, with a deterministic site left in its place.
- ``scaled``, ``masked``: the whole model under ``poutine.scale`` or ``poutine.mask``.
- ``hmm``: states enumerated along ``pyro.markov``.
- ``two_layer``: chained local vectors with learnt maps.
"""
