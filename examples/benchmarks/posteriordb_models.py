"""Posteriors of posteriordb (Magnusson et al.) as Pyro programs.

:data:`POSTERIORS` maps posteriordb's names to :class:`Posterior`: a program, its arguments from posteriordb's data, and
the map from its draws to the parameters of the reference draws. Each density equals that of posteriordb's Stan program,
up to a constant, in coordinates chosen for samplers: all supports are fixed, and the flat-prior regressions are moved
in centred and scaled coefficients. The programs follow torch's default dtype (use float64) and run under vmap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import biject_to, constraints

Data = dict[str, Any]
Draws = dict[str, Tensor]


@dataclass(frozen=True)
class Posterior:
    """A posterior of posteriordb.

    :param name: as in posteriordb.
    :param model: Pyro program, called with ``arguments``.
    :param arguments: posteriordb's data (parsed json) to the program's arguments, in torch's default dtype.
    :param parameters: Pyro draws ``{site: (chains, draws, *shape)}`` to ``{"beta[1]": (chains, draws)}``, named as
        the reference draws.
    """

    name: str
    model: Callable[..., None]
    arguments: Callable[[Data], tuple[Tensor, ...]]
    parameters: Callable[[Draws], Draws]


class Flat(dist.ImproperUniform):
    """Stan's flat prior. Draws are only a place to start: uniform on (-2, 2) before the transform, as Stan does."""

    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        return biject_to(self.support)(4 * torch.rand(self.shape(sample_shape)) - 2)


def tensors(data: Data, *names: str) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(data[name], dtype=torch.get_default_dtype()) for name in names)


def indexed(name: str, values: Tensor) -> Draws:
    """``{"name[1]": ...}``, counted from one as in Stan."""
    return {f"{name}[{i}]": value for i, value in enumerate(values.unbind(-1), start=1)}


# Regressions with flat priors on the coefficients


@dataclass(frozen=True)
class Units:
    """Fixed units for the coefficients of a regression: ``beta = (centre, 0, ...) + unit * matrix @ coefficients``.

    In the data's own units intercept and slopes are correlated up to 0.998. The map is affine, so a flat prior on
    ``coefficients`` is a flat prior on ``beta``.
    """

    matrix: Tensor
    centre: float = 0.0
    unit: float = 1.0

    def beta(self, coefficients: Tensor) -> Tensor:
        scaled = self.unit * coefficients @ self.matrix.to(coefficients.dtype).mT
        return scaled + self.centre * torch.eye(len(self.matrix), dtype=scaled.dtype)[0]


def standardised(mean: float, deviation: float) -> Tensor:
    """Coefficients of ``1, x`` from those of ``1, (x - mean) / deviation``."""
    return torch.tensor([[1.0, -mean / deviation], [0.0, 1 / deviation]], dtype=torch.float64)


# Round figures near the data's means and deviations.
MOTHER_IQ = standardised(100.0, 15.0)
MOTHER_HIGH_SCHOOL = standardised(0.8, 0.4)
HEIGHT = standardised(66.6, 3.8)
INCOME = standardised(3.0, 1.1)
# Features 1, hs, iq, hs * iq are the products of (1, iq) and (1, hs); the leading block is the model without product.
INTERACTION = torch.kron(MOTHER_IQ, MOTHER_HIGH_SCHOOL)


def flat_regression(units: Units, x: Tensor, y: Tensor, cauchy: float | None = None) -> None:
    """Normal regression; noise flat on the positive half-line, or half-Cauchy of that scale, in the units of ``y``."""
    coefficients = pyro.sample("coefficients", Flat(constraints.real, (), (x.shape[1],)))
    prior = Flat(constraints.positive, (), ()) if cauchy is None else dist.HalfCauchy(x.new_tensor(cauchy / units.unit))
    noise = pyro.sample("noise", prior)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ units.beta(coefficients), units.unit * noise), obs=y)


def flat_regression_parameters(units: Units, draws: Draws) -> Draws:
    return {**indexed("beta", units.beta(draws["coefficients"])), "sigma": units.unit * draws["noise"]}


def kid_score_arguments(data: Data, *features: str) -> tuple[Tensor, Tensor]:
    score, hs, iq = tensors(data, "kid_score", "mom_hs", "mom_iq")
    columns = {"one": torch.ones_like(iq), "hs": hs, "iq": iq, "hs*iq": hs * iq}
    return torch.stack([columns[feature] for feature in features], -1), score


def earnings_arguments(data: Data, log: bool) -> tuple[Tensor, Tensor]:
    earn, height = tensors(data, "earn", "height")
    return torch.stack([torch.ones_like(height), height], -1), earn.log() if log else earn


def kid_score(name: str, matrix: Tensor, *features: str) -> Posterior:
    units = Units(matrix, centre=87.0, unit=20.0)
    return Posterior(
        name,
        partial(flat_regression, units, cauchy=2.5),
        lambda data: kid_score_arguments(data, *features),
        partial(flat_regression_parameters, units),
    )


def earnings(name: str, log: bool) -> Posterior:
    units = Units(HEIGHT, centre=9.7, unit=0.9) if log else Units(HEIGHT, centre=23000.0, unit=19000.0)
    return Posterior(
        name,
        partial(flat_regression, units),
        partial(earnings_arguments, log=log),
        partial(flat_regression_parameters, units),
    )


def logit(x: Tensor, votes: Tensor) -> None:
    coefficients = pyro.sample("coefficients", Flat(constraints.real, (), (2,)))
    with pyro.plate("data", len(votes)):
        pyro.sample("vote", dist.Bernoulli(logits=x @ Units(INCOME).beta(coefficients)), obs=votes)


def logit_arguments(data: Data) -> tuple[Tensor, Tensor]:
    income, vote = tensors(data, "income", "vote")
    return torch.stack([torch.ones_like(income), income], -1), vote


def logit_parameters(draws: Draws) -> Draws:
    alpha, beta = Units(INCOME).beta(draws["coefficients"]).unbind(-1)
    return {"alpha": alpha, "beta[1]": beta}


# Regressions with proper priors, in their own coordinates


def normal_regression(x: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(x.new_zeros(x.shape[1]), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(x.new_tensor(10.0)))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def normal_regression_parameters(draws: Draws) -> Draws:
    return {**indexed("beta", draws["beta"]), "sigma": draws["sigma"]}


def diamonds(centred: Tensor, y: Tensor) -> None:
    """Ill-conditioned as in posteriordb: columns are correlated up to 0.999, and the prior is too weak to help."""
    b = pyro.sample("b", dist.Normal(centred.new_zeros(centred.shape[1]), 1.0).to_event(1))
    intercept = pyro.sample("intercept", dist.StudentT(y.new_tensor(3.0), 8.0, 10.0))
    # Student's t on the positive half-line; Pyro has no half-Student's t. The factor of two is a constant.
    sigma = pyro.sample("sigma", Flat(constraints.positive, (), ()))
    pyro.factor("sigma_prior", dist.StudentT(y.new_tensor(3.0), 0.0, 10.0).log_prob(sigma))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(intercept + centred @ b, sigma), obs=y)


def diamonds_arguments(data: Data) -> tuple[Tensor, Tensor]:
    x, y = tensors(data, "X", "Y")
    return x[:, 1:] - x[:, 1:].mean(0), y


def diamonds_parameters(draws: Draws) -> Draws:
    return {**indexed("b", draws["b"]), "Intercept": draws["intercept"], "sigma": draws["sigma"]}


# Hierarchy


def eight_schools(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(y.new_tensor(0.0), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(y.new_tensor(5.0)))
    eta = pyro.sample("eta", dist.Normal(y.new_zeros(len(y)), 1.0).to_event(1))
    with pyro.plate("schools", len(y)):
        pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)


def eight_schools_parameters(draws: Draws) -> Draws:
    theta = draws["mu"].unsqueeze(-1) + draws["tau"].unsqueeze(-1) * draws["eta"]
    return {**indexed("theta", theta), "mu": draws["mu"], "tau": draws["tau"]}


def eight_schools_centred(y: Tensor, sigma: Tensor) -> None:
    """The funnel: the scale of ``theta`` is ``tau``."""
    mu = pyro.sample("mu", dist.Normal(y.new_tensor(0.0), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(y.new_tensor(5.0)))
    theta = pyro.sample("theta", dist.Normal(mu.expand(len(y)), tau).to_event(1))
    with pyro.plate("schools", len(y)):
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools_centred_parameters(draws: Draws) -> Draws:
    return {**indexed("theta", draws["theta"]), "mu": draws["mu"], "tau": draws["tau"]}


# Time series


def autoregression(lags: Tensor, y: Tensor) -> None:
    alpha = pyro.sample("alpha", dist.Normal(y.new_tensor(0.0), 10.0))
    beta = pyro.sample("beta", dist.Normal(y.new_zeros(lags.shape[1]), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(y.new_tensor(2.5)))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(alpha + lags @ beta, sigma), obs=y)


def autoregression_arguments(data: Data) -> tuple[Tensor, Tensor]:
    (y,), order = tensors(data, "y"), data["K"]
    return y.unfold(0, order, 1)[:-1].flip(-1), y[order:]


def autoregression_parameters(draws: Draws) -> Draws:
    return {"alpha": draws["alpha"], **indexed("beta", draws["beta"]), "sigma": draws["sigma"]}


def geometric_sums(terms: Tensor, ratio: Tensor) -> Tensor:
    """``v[t] = terms[t] + ratio * v[t - 1]`` in log2(T) steps: each doubles the number of terms in every sum."""
    length, shift = terms.shape[-1], 1
    while shift < length:
        terms = terms + ratio * torch.nn.functional.pad(terms[..., :-shift], (shift, 0))
        ratio, shift = ratio * ratio, 2 * shift
    return terms


def garch(y: Tensor, first_scale: Tensor) -> None:
    """Stan's prior is flat on the triangle alpha1, beta1 >= 0, alpha1 + beta1 <= 1.

    There alpha1 has density 2 (1 - alpha1), and beta1 / (1 - alpha1) is uniform and independent of it.
    """
    mu = pyro.sample("mu", Flat(constraints.real, (), ()))
    alpha0 = pyro.sample("alpha0", Flat(constraints.positive, (), ()))
    alpha1 = pyro.sample("alpha1", dist.Beta(y.new_tensor(1.0), 2.0))
    fraction = pyro.sample("fraction", dist.Uniform(y.new_tensor(0.0), 1.0))
    shocks = alpha0 + alpha1 * (y[:-1] - mu).square()
    first = first_scale.square().expand(shocks[..., :1].shape)
    variance = geometric_sums(torch.cat([first, shocks], -1), fraction * (1 - alpha1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, variance.sqrt()), obs=y)


def garch_parameters(draws: Draws) -> Draws:
    beta1 = draws["fraction"] * (1 - draws["alpha1"])
    return {**{name: draws[name] for name in ("mu", "alpha0", "alpha1")}, "beta1": beta1}


def log_matrix_chain(matrices: Tensor) -> Tensor:
    """Log of the product of ``exp(matrices)``, ``(T, K, K)``, in log2(T) steps of pairwise products."""
    while (length := matrices.shape[-3]) > 1:
        left, right = matrices[..., 0 : length - 1 : 2, :, :], matrices[..., 1::2, :, :]
        pairs = torch.logsumexp(left.unsqueeze(-1) + right.unsqueeze(-3), -2)
        matrices = torch.cat([pairs, matrices[..., length - length % 2 :, :, :]], -3)
    return matrices[..., 0, :, :]


def hidden_markov(y: Tensor) -> None:
    """Two states, summed out; as in Stan's program every first state has weight one."""
    theta = pyro.sample("theta", dist.Dirichlet(y.new_ones(2, 2)).to_event(1))  # rows: from state
    low = pyro.sample("low", Flat(constraints.positive, (), ()))
    gap = pyro.sample("gap", Flat(constraints.positive, (), ()))  # 0 < mu[1] < mu[2]; (low, gap) -> mu has Jacobian 1
    mu = torch.stack([low, low + gap], -1)
    pyro.factor("mu_prior", dist.Normal(y.new_tensor([3.0, 10.0]), 1.0).log_prob(mu).sum(-1))
    emission = dist.Normal(mu, 1.0).log_prob(y.unsqueeze(-1))
    steps = log_matrix_chain(theta.log() + emission[1:].unsqueeze(-2))
    pyro.factor("y", torch.logsumexp(emission[0].unsqueeze(-1) + steps, (-2, -1)))


def hidden_markov_parameters(draws: Draws) -> Draws:
    from_first, from_second = draws["theta"].unbind(-2)
    mu = torch.stack([draws["low"], draws["low"] + draws["gap"]], -1)
    return {**indexed("theta1", from_first), **indexed("theta2", from_second), **indexed("mu", mu)}


# Differential equation


class PositiveNormal(dist.Normal):
    """A Normal cut to the positive half-line."""

    support = constraints.positive

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value) - torch.special.log_ndtr(self.loc / self.scale)

    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        u = torch.rand(self.shape(sample_shape), dtype=self.loc.dtype)
        return self.loc - self.scale * torch.special.ndtri(u * torch.special.ndtr(self.loc / self.scale))


SUBSTEPS = 4  # a year; log populations at the posterior are then off by less than 3e-4


def runge_kutta(state: Tensor, rate: Tensor, coupling: Tensor, years: int) -> Tensor:
    """``d log(hare, lynx) / dt = rate + coupling * (lynx, hare)`` once a year, ``(..., years, 2)``.

    Logs keep populations positive; the clamp keeps all finite where a start makes them explode.
    """

    def slope(x: Tensor) -> Tensor:
        return torch.addcmul(rate, coupling, x.flip(-1).clamp(max=10).exp())

    h, states = 1 / SUBSTEPS, []
    for _ in range(years):
        for _ in range(SUBSTEPS):
            k1 = slope(state)
            k2 = slope(state.add(k1, alpha=h / 2))
            k3 = slope(state.add(k2, alpha=h / 2))
            k4 = slope(state.add(k3, alpha=h))
            state = state.add(k1 + k4, alpha=h / 6).add(k2 + k3, alpha=h / 3)
        states.append(state)
    return torch.stack(states, -2)


def lotka_volterra(y_init: Tensor, y: Tensor) -> None:
    """Hares and lynxes; rows of ``y`` are the years after the one of ``y_init``."""
    scales = y.new_tensor([0.5, 0.05, 0.5, 0.05])
    theta = pyro.sample("theta", PositiveNormal(y.new_tensor([1.0, 0.05, 1.0, 0.05]), scales).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(-y.new_ones(2), 1.0).to_event(1))
    z_init = pyro.sample("z_init", dist.LogNormal(y.new_full((2,), 10.0).log(), 1.0).to_event(1))
    signs = y.new_tensor([1.0, -1.0])
    start = z_init.log()
    log_z = runge_kutta(start, signs * theta[..., 0::2], -signs * theta[..., 1::2], len(y))
    with pyro.plate("species", 2):
        pyro.sample("y_init", dist.LogNormal(start, sigma), obs=y_init)
        with pyro.plate("years", len(y)):
            pyro.sample("y", dist.LogNormal(log_z, sigma), obs=y)


def lotka_volterra_parameters(draws: Draws) -> Draws:
    return {k: v for name in ("theta", "z_init", "sigma") for k, v in indexed(name, draws[name]).items()}


# Gaussian process


def gaussian_process(x: Tensor, y: Tensor) -> None:
    rho = pyro.sample("rho", dist.Gamma(y.new_tensor(25.0), 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(y.new_tensor(2.0)))
    sigma = pyro.sample("sigma", dist.HalfNormal(y.new_tensor(1.0)))  # a variance in Stan's program, despite its name
    squares = (x.unsqueeze(-1) - x).square()
    kernel = alpha.square() * torch.exp(-0.5 * squares / rho.square())
    # A kernel that is not positive definite to rounding gets the density NaN: one chain must not stop the others.
    factor, info = torch.linalg.cholesky_ex(kernel + sigma * torch.eye(len(x), dtype=x.dtype))
    factor = torch.where(info == 0, factor, torch.nan)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros_like(y), scale_tril=factor), obs=y)


def gaussian_process_parameters(draws: Draws) -> Draws:
    return {name: draws[name] for name in ("rho", "alpha", "sigma")}


def _data(*names: str) -> Callable[[Data], tuple[Tensor, ...]]:
    return lambda data: tensors(data, *names)


_ALL = [
    Posterior("arK-arK", autoregression, autoregression_arguments, autoregression_parameters),
    Posterior("sblrc-blr", normal_regression, _data("X", "y"), normal_regression_parameters),
    Posterior("sblri-blr", normal_regression, _data("X", "y"), normal_regression_parameters),
    Posterior("eight_schools-eight_schools_noncentered", eight_schools, _data("y", "sigma"), eight_schools_parameters),
    Posterior(
        "eight_schools-eight_schools_centered",
        eight_schools_centred,
        _data("y", "sigma"),
        eight_schools_centred_parameters,
    ),
    Posterior("hudson_lynx_hare-lotka_volterra", lotka_volterra, _data("y_init", "y"), lotka_volterra_parameters),
    Posterior("gp_pois_regr-gp_regr", gaussian_process, _data("x", "y"), gaussian_process_parameters),
    Posterior("nes_logit_data-nes_logit_model", logit, logit_arguments, logit_parameters),
    Posterior("garch-garch11", garch, _data("y", "sigma1"), garch_parameters),
    Posterior("hmm_example-hmm_example", hidden_markov, _data("y"), hidden_markov_parameters),
    kid_score("kidiq-kidscore_momiq", MOTHER_IQ, "one", "iq"),
    kid_score("kidiq-kidscore_momhsiq", INTERACTION[:3, :3], "one", "hs", "iq"),
    kid_score("kidiq-kidscore_interaction", INTERACTION, "one", "hs", "iq", "hs*iq"),
    earnings("earnings-earn_height", log=False),
    earnings("earnings-logearn_height", log=True),
    Posterior("diamonds-diamonds", diamonds, diamonds_arguments, diamonds_parameters),
]
POSTERIORS = {posterior.name: posterior for posterior in _ALL}
