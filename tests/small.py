"""Small models, each of which is there for one feature, and Pyro's own numbers for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.reparam import LocScaleReparam
from pyro.ops.indexing import Vindex
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to
from zoo import CASES, EXTRA

from pyro_shortrun.density import Binder, Call, LogDensity, Program
from pyro_shortrun.density.layout import Arrow


def data(*shape: int) -> Tensor:
    """The same numbers in every dtype and on every device."""
    gen = torch.Generator(device="cpu").manual_seed(7)
    values = torch.randn(shape, generator=gen, dtype=torch.float64, device="cpu")
    return values.to(torch.empty(0))


def shared(x: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("n", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def local(x: Tensor, size: int | None = None) -> None:
    with pyro.plate("n", len(x), subsample_size=size) as i:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        s = pyro.sample("s", dist.Gamma(2.0, 1.0))
        pyro.sample("x", dist.Normal(z.prod(-1), s), obs=x[i])


def both(x: Tensor, size: int | None = None) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    with pyro.plate("n", len(x), subsample_size=size) as i:
        z = pyro.sample("z", dist.Normal(mu, tau))
        p = pyro.sample("p", dist.Beta(2.0, 3.0))
        pyro.sample("x", dist.Normal(torch.tanh(z), 0.1 + p), obs=x[i])


def constrained_rows(x: Tensor) -> None:
    with pyro.plate("n", len(x)):
        simplex = pyro.sample("simplex", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
        tril = pyro.sample("tril", dist.LKJCholesky(3, torch.tensor(2.0)))
        loc = (tril @ simplex.unsqueeze(-1)).squeeze(-1)
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


def extra_batch(x: Tensor) -> None:
    with pyro.plate("n", x.shape[-1]):
        z = pyro.sample("z", dist.Normal(torch.zeros(3, 1), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def outer_rows(y: Tensor) -> None:
    groups, members = pyro.plate("groups", y.shape[0], dim=-2), pyro.plate("members", y.shape[1], dim=-1)
    with groups:
        centre = pyro.sample("centre", dist.Normal(0.0, 2.0))
        with members:
            z = pyro.sample("z", dist.Normal(centre, 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)


def inner_coupled(y: Tensor) -> None:
    groups, members = pyro.plate("groups", y.shape[0], dim=-2), pyro.plate("members", y.shape[1], dim=-1)
    with groups:
        with members:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z.sum(-1, keepdim=True), 0.5), obs=y[:, :1])


def crossed(y: Tensor) -> None:
    groups, members = pyro.plate("groups", y.shape[0], dim=-2), pyro.plate("members", y.shape[1], dim=-1)
    with groups:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with members:
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with groups, members:
        pyro.sample("y", dist.Normal(a * b, 0.5), obs=y)


def coupled_by_data(x: Tensor) -> None:
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    pyro.sample("total", dist.Normal(z.sum(-1), 0.1), obs=torch.tensor(1.0))


def coupled_by_factor(x: Tensor) -> None:
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Normal(x, 1.0))
    pyro.factor("repulsion", -(z[..., 1:] * z[..., :-1]).sum(-1))


def coupled_by_latent(x: Tensor) -> None:
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Normal(x, 1.0))
    pyro.sample("top", dist.Uniform(0.0, z.exp().sum(-1)))


def words(x: Tensor) -> None:
    with pyro.plate("docs", 2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("words", len(x)):
        pyro.sample("x", dist.Normal(z[..., torch.arange(len(x)) % 2], 1.0), obs=x)


def factor_in_plate(x: Tensor) -> None:
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.deterministic("double", 2 * z)
        pyro.factor("energy", -((z - x) ** 4))
    pyro.factor("constant", torch.tensor(3.0))


def sequential(x: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    for i in pyro.plate("steps", len(x)):
        pyro.sample(f"x_{i}", dist.Normal(mu, 1.0), obs=x[i])


def missing_data(x: Tensor) -> None:
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        seen: Any = torch.arange(len(x)) % 2 == 0
        pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=seen)


def local_support(x: Tensor) -> None:
    with pyro.plate("n", len(x)):
        low = pyro.sample("low", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Uniform(low, low + 2.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def stepwise_support(x: Tensor, step: float = 0.0) -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    top = torch.where(a > step, torch.tensor(4.0), torch.tensor(1.0))  # no graph from top to a
    z = pyro.sample("z", dist.Uniform(0.0, top))
    with pyro.plate("n", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def param_support(x: Tensor) -> None:
    top = pyro.param("top", torch.tensor(3.0), constraint=constraints.positive)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Uniform(0.0, top))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


LOCS = (-1.0, 0.5, 2.0)


@config_enumerate
def mixture_rows(x: Tensor) -> None:
    with pyro.plate("n", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + torch.tensor(LOCS)[k], 0.5), obs=x)


@config_enumerate
def discrete_parent(x: Tensor) -> None:
    with pyro.plate("n", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
        z = pyro.sample("z", dist.Normal(torch.tensor(LOCS)[k], 0.5))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@config_enumerate
def nested_mixture(y: Tensor) -> None:
    groups, members = pyro.plate("groups", y.shape[0], dim=-2), pyro.plate("members", y.shape[1], dim=-1)
    with groups:
        z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
        j = pyro.sample("j", dist.Bernoulli(0.3))
        with members:
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
            pyro.sample("y", dist.Normal(z + j + torch.tensor(LOCS)[k], 0.5), obs=y)


@config_enumerate
def crossed_choice(y: Tensor) -> None:
    groups, members = pyro.plate("groups", y.shape[0], dim=-2), pyro.plate("members", y.shape[1], dim=-1)
    with groups:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with members:
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
    with groups, members:
        pyro.sample("y", dist.Normal(z + torch.tensor(LOCS)[k], 0.5), obs=y)


@config_enumerate
def masked_mixture(x: Tensor) -> None:
    keep: Any = torch.arange(len(x)) % 2 == 0
    with pyro.plate("n", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
        z = pyro.sample("z", dist.Normal(torch.tensor(LOCS)[k], 1.0))
        with poutine.mask(mask=keep):
            pyro.sample("x", dist.Normal(z + 2 * k, 0.5), obs=x)


@config_enumerate
def shared_choice(x: Tensor) -> None:
    k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Normal(Vindex(torch.tensor(LOCS))[k], 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@config_enumerate
def local_states(y: Tensor) -> None:
    transition = torch.tensor([[0.8, 0.2], [0.3, 0.7]])
    with pyro.plate("n", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        state = torch.tensor(0)
        for t in pyro.markov(range(y.shape[1])):
            state = pyro.sample(f"state_{t}", dist.Categorical(transition[state]))
            pyro.sample(f"y_{t}", dist.Normal(z * (1.0 + state), 0.5), obs=y[:, t])


def partly_scaled(x: Tensor) -> None:
    with pyro.plate("n", len(x)):
        with poutine.scale(scale=0.5):
            z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
        keep: Any = torch.arange(len(x)) != 1
        with poutine.mask(mask=keep), poutine.scale(scale=3.0):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def reparametrised(x: Tensor) -> None:
    with poutine.reparam(config={"z": LocScaleReparam(0.0)}):
        both(x)


SMALL: dict[str, tuple[Callable, tuple, tuple[int, int, Arrow | None]]] = {
    # name: model, arguments, (rows, size, arrow)
    "shared": (shared, (6,), (1, 1, None)),
    "local": (local, (6,), (6, 3, None)),
    "both": (both, (6,), (1, 14, Arrow(2, 6, 2, 1.0))),
    "one local": (local, (1,), (1, 3, None)),
    "both, one local": (both, (1,), (1, 4, Arrow(2, 1, 2, 1.0))),
    "subsampled local": (lambda x: local(x, 4), (6,), (4, 3, None)),
    "subsampled both": (lambda x: both(x, 4), (6,), (1, 10, Arrow(2, 4, 2, 1.5))),
    "constrained rows": (constrained_rows, (4, 3), (4, 5, None)),
    "extra batch": (extra_batch, (3, 4), (4, 3, None)),
    "outer rows": (outer_rows, (3, 4), (3, 5, None)),
    "inner coupled": (inner_coupled, (3, 4), (3, 4, None)),
    "crossed": (crossed, (3, 4), (1, 7, None)),
    "coupled by data": (coupled_by_data, (5,), (1, 5, None)),
    "coupled by factor": (coupled_by_factor, (5,), (1, 5, None)),
    "coupled by latent": (coupled_by_latent, (5,), (1, 6, None)),
    "words": (words, (5,), (1, 2, None)),
    "factor in plate": (factor_in_plate, (5,), (5, 1, None)),
    "sequential": (sequential, (3,), (1, 1, None)),
    "missing data": (missing_data, (5,), (5, 2, None)),
    "local support": (local_support, (5,), (5, 2, None)),
    "stepwise support": (stepwise_support, (5,), (1, 2, None)),
    "param support": (param_support, (5,), (5, 1, None)),
    "mixture rows": (mixture_rows, (5,), (5, 1, None)),
    "discrete parent": (discrete_parent, (5,), (5, 1, None)),
    "nested mixture": (nested_mixture, (3, 4), (3, 1, None)),
    "crossed choice": (crossed_choice, (3, 4), (1, 3, None)),
    "masked mixture": (masked_mixture, (5,), (5, 1, None)),
    "shared choice": (shared_choice, (5,), (1, 5, None)),
    "local states": (local_states, (4, 3), (4, 1, None)),
    "partly scaled": (partly_scaled, (5,), (5, 1, None)),
    "reparametrised": (reparametrised, (6,), (1, 14, Arrow(2, 6, 2, 1.0))),
}


@dataclass
class Bound:
    """A model bound as ShortRunGuide binds it, and what an independent evaluation needs."""

    model: Callable
    args: tuple
    call: Call

    @property
    def density(self) -> LogDensity:
        return self.call.model

    def point(self, chains: int = 1) -> Tensor:
        return 0.5 * torch.randn((chains, self.density.layout.rows, self.density.layout.size))


def bind(model: Callable, *args: Any, indices: Mapping | None = None, given: Mapping | None = None) -> Bound:
    program = Program(model)
    reading = program.draw(args, {}, indices, given)
    return Bound(model, args, Binder(program)(reading, args, {}, given))


ALL: dict[str, Callable[[], tuple[Callable, tuple]]] = {case.name: case.make for case in (*CASES, *EXTRA)}


ALL |= {name: lambda m=model, s=shape: (m, (data(*s),)) for name, (model, shape, _) in SMALL.items()}


@dataclass
class Oracle:
    """Pyro's own numbers at one state: totals over the rows."""

    joint: Tensor
    prior: Tensor
    jacobian: Tensor  # as in log q
    scaled_jacobian: Tensor  # as in the joint
    values: dict[str, Tensor]


class _WithoutData(Messenger):
    def _pyro_sample(self, msg: dict) -> None:
        if msg["is_observed"]:
            msg["mask"] = torch.tensor(False)


def oracle(bound: Bound, u: Tensor) -> Oracle:
    """The model conditioned on ``z(u)``, whose transforms are found from its own supports, one site at a time."""
    layout, indices = bound.density.layout, bound.call.bind.indices
    free, values = layout.unpack(u), {}
    sizes = {name: bound.call.reading.trace.nodes[name]["fn"].size for name in indices}

    def plates(*args: Any) -> None:
        for name, index in indices.items():
            pyro.plate(name, sizes[name], subsample=index)

    same_batch = poutine.trace(plates).get_trace()

    def run() -> poutine.Trace:
        model = poutine.replay(poutine.condition(bound.model, data=values), trace=same_batch)
        return poutine.trace(model).get_trace(*bound.args)

    for name in free:  # each support is read where the sites before it have their values
        fn = run().nodes[name]["fn"]
        values[name] = biject_to(fn.support)(free[name])
    trace = run()
    trace.compute_log_prob()
    joint, prior, jacobian, scaled = trace.log_prob_sum(), *torch.zeros(3)
    for name, z in values.items():
        site = trace.nodes[name]
        plated = [f for f in site["cond_indep_stack"] if f.vectorized]
        scale = math.prod((f.full_size or f.size) / f.size for f in plated)
        weight = scale if layout.is_arrow else 1.0
        transform = biject_to(site["fn"].support)
        terms = transform.log_abs_det_jacobian(free[name], z)
        keep = torch.ones(()) if site["mask"] is None else torch.as_tensor(site["mask"]).to(z)
        terms = keep * terms.reshape((*site["fn"].batch_shape, -1)).sum(-1)
        jacobian = jacobian + weight * terms.sum()
        scaled = scaled + scale * terms.sum()
        prior = prior + weight * (keep * site["fn"].log_prob(z)).sum()

    def summed_out(model: Callable) -> Tensor:
        elbo = TraceEnum_ELBO(max_plate_nesting=bound.call.reading.nesting)
        return torch.tensor(-elbo.loss(poutine.condition(model, data=values), plates, *bound.args))

    if bound.density.structure.summed:
        joint = summed_out(bound.model)
        if not any(p.scale != 1 for s in layout.sites for p in s.plates):  # Pyro would scale the prior
            prior = summed_out(_WithoutData()(bound.model))
    return Oracle(joint, prior, jacobian, scaled, values)


def close(actual: Any, expected: Any, rtol: float = 1e-9) -> None:
    """``rtol`` is for float64."""
    if torch.get_default_dtype() == torch.float32:
        rtol = max(rtol, 2e-4)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol)
