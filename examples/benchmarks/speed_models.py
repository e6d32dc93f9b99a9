"""The models of speed.py, each twice: in Pyro, and by hand as a function of one unconstrained tensor.

The functions by hand are what one writes who knows the model and wants speed: no distribution objects, no constants,
no checks. speed_jax.py has their twins in JAX, with the same names and arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.ops.integrator import potential_grad
from torch import Tensor, nn

SIGMA = 0.3  # of the generators' pixels


@dataclass(frozen=True)
class Case:
    """A model with data.

    :param twin: name of the functions in speed_jax.py.
    :param model: in Pyro.
    :param args: its arguments.
    :param log_joint: by hand: ``log pi(u, *inputs)`` up to a constant, a scalar.
    :param draw: a state from the prior, by hand.
    :param values: the sites' values of a state, by hand.
    :param shapes: unconstrained shapes of the sites, in the order of the state.
    :param step_size: below 1 / curvature.
    :param weights: of a generator; ``inputs`` are the arguments and these.
    """

    twin: str
    model: Callable[..., None]
    args: tuple[Tensor, ...]
    log_joint: Callable[..., Tensor]
    draw: Callable[[], Tensor]
    values: Callable[[Tensor], tuple[Tensor, ...]]
    shapes: dict[str, tuple[int, ...]]
    step_size: float
    weights: tuple[Tensor, ...] = ()

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (*self.args, *self.weights)

    def unpack(self, u: Tensor) -> dict[str, Tensor]:
        """Unconstrained values by site."""
        parts = u.flatten().split([math.prod(shape) for shape in self.shapes.values()])
        return {k: v.reshape(shape) for (k, shape), v in zip(self.shapes.items(), parts, strict=True)}

    def pack(self, sites: dict[str, Tensor]) -> Tensor:
        """The inverse, flat."""
        return torch.cat([sites[k].flatten() for k in self.shapes])


# ---------------------------------------------------------------- generators


def generator_case(twin: str, generator: nn.Module, latent: int, batch: int, eta: float, log_joint: Callable) -> Case:
    """Images of a frozen random generator with noise; one row of ``z`` per image."""
    device = next(generator.parameters()).device
    with torch.no_grad():
        mean = generator(torch.randn(batch, latent, device=device))
        images = mean + SIGMA * torch.randn_like(mean)

    def model(x: Tensor) -> None:
        pyro.module("generator", generator)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(latent), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(generator(z), SIGMA).to_event(x.dim() - 1), obs=x)

    weights = tuple(p.detach() for p in generator.parameters())
    return Case(
        twin,
        model,
        (images,),
        log_joint,
        lambda: torch.randn(batch, latent, device=device),
        lambda u: (u,),
        {"z": (batch, latent)},
        eta,
        weights,
    )


def mlp(batch: int, device: str, latent: int = 20) -> Case:
    """Three layers, 784 pixels."""
    layers = [nn.Linear(latent, 256), nn.GELU(), nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 784), nn.Sigmoid()]
    return generator_case("mlp", nn.Sequential(*layers).to(device), latent, batch, 1e-3, mlp_log_joint)


def mlp_log_joint(z: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor):
    h = F.gelu(F.linear(z, w1, b1))
    h = F.gelu(F.linear(h, w2, b2))
    mean = F.linear(h, w3, b3).sigmoid()
    return -0.5 * z.square().sum() - 0.5 / SIGMA**2 * (x - mean).square().sum()


def deconvolutional(batch: int, device: str, latent: int = 64) -> Case:
    """Three transposed convolutions, 32 x 32 pixels in three colours."""
    layers = [
        nn.Linear(latent, 128 * 4 * 4),
        nn.ReLU(),
        nn.Unflatten(-1, (128, 4, 4)),
        nn.ConvTranspose2d(128, 64, 4, 2, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 4, 2, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 3, 4, 2, 1),
        nn.Tanh(),
    ]
    generator = nn.Sequential(*layers).to(device)
    return generator_case("deconvolutional", generator, latent, batch, 1e-3, deconvolutional_log_joint)


def deconvolutional_log_joint(z: Tensor, x: Tensor, w: Tensor, b: Tensor, *kernels: Tensor) -> Tensor:
    k1, b1, k2, b2, k3, b3 = kernels
    h = F.relu(F.linear(z, w, b)).reshape(len(z), 128, 4, 4)
    h = F.relu(F.conv_transpose2d(h, k1, b1, stride=2, padding=1))
    h = F.relu(F.conv_transpose2d(h, k2, b2, stride=2, padding=1))
    mean = F.conv_transpose2d(h, k3, b3, stride=2, padding=1).tanh()
    return -0.5 * z.square().sum() - 0.5 / SIGMA**2 * (x - mean).square().sum()


# ---------------------------------------------------------------- small Bayesian models


def eight_schools(device: str) -> Case:
    """Non-centred."""
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], device=device)
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], device=device)

    def model(y: Tensor, sigma: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(y.new_tensor(5.0)))
        eta = pyro.sample("eta", dist.Normal(y.new_zeros(8), 1.0).to_event(1))
        with pyro.plate("schools", 8):
            pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)

    def draw() -> Tensor:
        log_tau = (5.0 * half_cauchy(1, device)).log()
        return torch.cat([5.0 * torch.randn(1, device=device), log_tau, torch.randn(8, device=device)])

    def values(u: Tensor) -> tuple[Tensor, ...]:
        return u[0], u[1].exp(), u[2:]

    shapes = {"mu": (), "tau": (), "eta": (8,)}
    return Case("eight_schools", model, (y, sigma), eight_schools_log_joint, draw, values, shapes, 0.01)


def eight_schools_log_joint(u: Tensor, y: Tensor, sigma: Tensor) -> Tensor:
    mu, log_tau, eta = u.split([1, 1, 8])
    tau = log_tau.exp()
    prior = -0.5 * (mu / 5.0).square() - (tau / 5.0).square().log1p() + log_tau
    return prior.sum() - 0.5 * eta.square().sum() - 0.5 * ((y - mu - tau * eta) / sigma).square().sum()


def half_cauchy(size: int, device: str) -> Tensor:
    return torch.empty(size, device=device).cauchy_().abs()


def logistic(rows: int, columns: int, device: str) -> Case:
    """Features of norm about 1."""
    x = torch.randn(rows, columns, device=device) / columns**0.5
    y = (torch.rand(rows, device=device) < (3.0 * x[:, :5].sum(-1)).sigmoid()).float()

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(columns), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)

    step_size = 0.2 / (1.0 + rows / (4.0 * columns))
    return Case(
        "logistic",
        model,
        (x, y),
        logistic_log_joint,
        lambda: torch.randn(columns, device=device),
        lambda u: (u,),
        {"w": (columns,)},
        step_size,
    )


def logistic_log_joint(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    logits = x @ w
    return (y * logits - F.softplus(logits)).sum() - 0.5 * w.square().sum()


def horseshoe(device: str, rows: int = 100, columns: int = 20) -> Case:
    """Regression with a horseshoe prior, non-centred."""
    x = torch.randn(rows, columns, device=device)
    y = x[:, :2].sum(-1) + 0.5 * torch.randn(rows, device=device)

    def model(x: Tensor, y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(x.new_zeros(columns), 1.0).to_event(1))
        local = pyro.sample("local", dist.HalfCauchy(x.new_ones(columns)).to_event(1))
        tau = pyro.sample("tau", dist.HalfCauchy(x.new_tensor(0.1)))
        sigma = pyro.sample("sigma", dist.HalfNormal(x.new_ones(())))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ (z * local * tau), sigma), obs=y)

    def draw() -> Tensor:
        log_local, log_tau = half_cauchy(columns, device).log(), (0.1 * half_cauchy(1, device)).log()
        log_sigma = torch.randn(1, device=device).abs().log()
        return torch.cat([torch.randn(columns, device=device), log_local, log_tau, log_sigma])

    def values(u: Tensor) -> tuple[Tensor, ...]:
        z, scales = u[:columns], u[columns:].exp()
        return z, scales[:columns], scales[-2], scales[-1]

    shapes = {"z": (columns,), "local": (columns,), "tau": (), "sigma": ()}
    return Case("horseshoe", model, (x, y), horseshoe_log_joint, draw, values, shapes, 1e-4)


def horseshoe_log_joint(u: Tensor, x: Tensor, y: Tensor) -> Tensor:
    rows, columns = x.shape
    z, log_local, log_tau, log_sigma = u.split([columns, columns, 1, 1])
    local, tau = log_local.exp(), log_tau.exp()
    prior = (log_local - local.square().log1p() - 0.5 * z.square()).sum()
    scales = log_tau - (tau / 0.1).square().log1p() - 0.5 * log_sigma.exp().square() + (1 - rows) * log_sigma
    error = (y - x @ (z * local * tau)) * (-log_sigma).exp()
    return prior + scales.sum() - 0.5 * error.square().sum()


def mixture(device: str) -> Case:
    """200 points of two Gaussians, whose assignments are enumerated."""
    x = torch.cat([torch.randn(80) - 2.0, torch.randn(120) + 2.0]).to(device)

    @config_enumerate
    def model(x: Tensor) -> None:
        share = pyro.sample("share", dist.Beta(x.new_tensor(2.0), x.new_tensor(2.0)))
        low = pyro.sample("low", dist.Normal(x.new_zeros(()), 3.0))
        gap = pyro.sample("gap", dist.LogNormal(x.new_ones(()), 0.5))
        scale = pyro.sample("scale", dist.HalfNormal(x.new_ones(())))
        locs = torch.stack([low, low + gap])
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(share)).long()
            pyro.sample("x", dist.Normal(locs[k], scale), obs=x)

    def draw() -> Tensor:
        share = torch.rand(3, device=device).median().reshape(1)  # Beta(2, 2)
        normal = torch.randn(3, device=device)
        rest = torch.stack([3.0 * normal[0], 1.0 + 0.5 * normal[1], normal[2].abs().log()])
        return torch.cat([share.logit(), rest])

    def values(u: Tensor) -> tuple[Tensor, ...]:
        return u[0].sigmoid(), u[1], u[2].exp(), u[3].exp()

    shapes: dict[str, tuple[int, ...]] = {"share": (), "low": (), "gap": (), "scale": ()}
    return Case("mixture", model, (x,), mixture_log_joint, draw, values, shapes, 1e-3)


def mixture_log_joint(u: Tensor, x: Tensor) -> Tensor:
    logit, low, log_gap, log_scale = u.unbind()
    scale = log_scale.exp()
    log_shares = F.logsigmoid(torch.stack([-logit, logit]))
    # The log-normal density's 1 / gap cancels with the Jacobian of exp.
    prior = 2.0 * log_shares.sum() - 0.5 * ((low / 3.0).square() + ((log_gap - 1.0) / 0.5).square() + scale.square())
    errors = (x.unsqueeze(-1) - torch.stack([low, low + log_gap.exp()])) / scale
    return prior + (1 - len(x)) * log_scale + (log_shares - 0.5 * errors.square()).logsumexp(-1).sum()


def gaussian_process(device: str) -> Case:
    """Hyper-parameters of a GP regression on 30 points."""
    x = torch.linspace(0, 5, 30, device=device)
    y = torch.sin(x) + 0.3 * torch.randn(30, device=device)

    def model(x: Tensor, y: Tensor) -> None:
        length = pyro.sample("length", dist.LogNormal(x.new_zeros(()), 0.5))
        amplitude = pyro.sample("amplitude", dist.HalfNormal(x.new_ones(())))
        noise = pyro.sample("noise", dist.HalfNormal(x.new_tensor(0.5)))
        kernel = amplitude**2 * torch.exp(-0.5 * ((x.unsqueeze(-1) - x) / length) ** 2)
        covariance = kernel + (noise**2 + 1e-3) * torch.eye(len(x), device=x.device)
        pyro.sample("y", dist.MultivariateNormal(torch.zeros_like(y), covariance), obs=y)

    def draw() -> Tensor:
        normal = torch.randn(3, device=device)
        return torch.stack([0.5 * normal[0], normal[1].abs().log(), (0.5 * normal[2]).abs().log()])

    def values(u: Tensor) -> tuple[Tensor, ...]:
        return u.exp().unbind()

    shapes: dict[str, tuple[int, ...]] = {"length": (), "amplitude": (), "noise": ()}
    return Case("gaussian_process", model, (x, y), gaussian_process_log_joint, draw, values, shapes, 1e-3)


def gaussian_process_log_joint(u: Tensor, x: Tensor, y: Tensor) -> Tensor:
    length, amplitude, noise = u.exp().unbind()
    squares = ((x.unsqueeze(-1) - x) / length).square()
    eye = torch.eye(len(x), device=x.device)
    factor = torch.linalg.cholesky(amplitude.square() * (-0.5 * squares).exp() + (noise.square() + 1e-3) * eye)
    white = torch.linalg.solve_triangular(factor, y.unsqueeze(-1), upper=False)
    # The log-normal density's 1 / length cancels with the Jacobian of exp.
    prior = -0.5 * ((u[0] / 0.5).square() + amplitude.square() + (noise / 0.5).square()) + u[1] + u[2]
    return prior - factor.diagonal().log().sum() - 0.5 * white.square().sum()


# ---------------------------------------------------------------- chains


def pyro_loop(case: Case, steps: int, potential: Callable, transforms: dict) -> Callable[[], Any]:
    """Naive: the model is traced in every step."""
    eta = case.step_size

    def run() -> dict[str, Tensor]:
        with torch.no_grad():
            trace = poutine.trace(case.model).get_trace(*case.args)
            u = {name: t(trace.nodes[name]["value"]) for name, t in transforms.items()}
        for _ in range(steps):
            grads, _ = potential_grad(potential, u)
            u = {k: v - (eta * grads[k]).clamp(-10.0, 10.0) + (2 * eta) ** 0.5 * torch.randn_like(v)
                 for k, v in u.items()}  # fmt: skip
        return {name: transforms[name].inv(v) for name, v in u.items()}

    return run


def torch_loop(case: Case, steps: int, compile: bool) -> Callable[[], Any]:
    """By hand."""
    eta, scale, inputs = case.step_size, (2.0 * case.step_size) ** 0.5, case.inputs

    def eager(u: Tensor, noise: Tensor) -> Tensor:
        u = u.detach().requires_grad_()
        (grad,) = torch.autograd.grad(case.log_joint(u, *inputs), u)
        return (u + (eta * grad).clamp(-10.0, 10.0) + scale * noise).detach()

    def functional(u: Tensor, noise: Tensor, *inputs: Tensor) -> Tensor:
        return u + (eta * torch.func.grad(case.log_joint)(u, *inputs)).clamp(-10.0, 10.0) + scale * noise

    options = {"mode": "reduce-overhead"} if inputs[0].is_cuda else {}
    compiled = torch.compile(functional, fullgraph=True, dynamic=False, **options)

    def run() -> tuple[Tensor, ...]:
        u = case.draw()
        for noise in torch.randn(steps, *u.shape, device=u.device):
            if not compile:
                u = eager(u, noise)
            elif inputs[0].is_cuda:  # the next replay of the CUDA graph overwrites its output
                u = compiled(u, noise, *inputs).clone()
            else:
                u = compiled(u, noise, *inputs)
        return case.values(u)

    return torch.no_grad()(run) if compile else run
