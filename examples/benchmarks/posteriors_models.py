"""The posteriors of posteriors.py, each a program as a user would write it, in the data's own units.

:data:`KNOWN` are sixteen of posteriordb's (Magnusson et al.), whose data and reference draws are read from a folder;
:data:`MADE` are eleven whose data come from a seed. Both map names to :class:`Posterior`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
from posteriors_language import Flat, constraints, dist, logsumexp, np, pyro, scan

Data = dict[str, Any]
Arrays = tuple[numpy.ndarray, ...]
Draws = dict[str, numpy.ndarray]


def by_coordinate(draws: Draws) -> Draws:
    """``{"site[1]": (chains, draws)}``, counted from one as in Stan, from ``{"site": (chains, draws, *shape)}``."""
    found = {}
    for name, values in draws.items():
        if values.ndim == 2:
            found[name] = values
        else:
            parts = numpy.moveaxis(values.reshape(*values.shape[:2], -1), -1, 0)
            found |= {f"{name}[{i}]": part for i, part in enumerate(parts, 1)}
    return found


@dataclass(frozen=True)
class Posterior:
    """A program, its arguments, and the parameters that are compared.

    :param arguments: posteriordb's data to arguments of the program; of made ones a random generator instead.
    :param parameters: draws of the program's sites, by coordinate, from draws of them; others are left out.
    """

    model: Callable[..., Any]
    arguments: Callable[[Any], Arrays]
    parameters: Callable[[Draws], Draws] = by_coordinate


def flat(support: Any = constraints.real, *shape: int) -> Any:
    """Stan's flat prior."""
    return Flat(support, (), shape)


# ---------------------------------------------------------------- posteriordb: regressions


def kid_score(x: Any, score: Any) -> None:
    beta = pyro.sample("beta", flat(constraints.real_vector, x.shape[1]))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    with pyro.plate("children", len(score)):
        pyro.sample("score", dist.Normal(x @ beta, sigma), obs=score)


def earnings(x: Any, y: Any) -> None:
    beta = pyro.sample("beta", flat(constraints.real_vector, x.shape[1]))
    sigma = pyro.sample("sigma", flat(constraints.positive))
    with pyro.plate("people", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def vote(income: Any, vote: Any) -> None:
    alpha = pyro.sample("alpha", flat())
    beta = pyro.sample("beta", flat(constraints.real_vector, 1))
    with pyro.plate("people", len(vote)):
        pyro.sample("vote", dist.Bernoulli(logits=alpha + income * beta), obs=vote)


def normal_regression(x: Any, y: Any) -> None:
    beta = pyro.sample("beta", dist.Normal(np.zeros(x.shape[1]), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(10.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def diamonds(x: Any, y: Any) -> None:
    """Columns are correlated up to 0.999, and the prior is too weak to help."""
    b = pyro.sample("b", dist.Normal(np.zeros(x.shape[1]), 1.0).to_event(1))
    intercept = pyro.sample("Intercept", dist.StudentT(3.0, 8.0, 10.0))
    sigma = pyro.sample("sigma", flat(constraints.positive))
    pyro.factor("half_student", dist.StudentT(3.0, 0.0, 10.0).log_prob(sigma))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(intercept + (x - x.mean(0)) @ b, sigma), obs=y)


# ---------------------------------------------------------------- posteriordb: hierarchy, time series and others


def schools(y: Any, sigma: Any) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)


def schools_parameters(draws: Draws) -> Draws:
    mu, tau = draws["mu"], draws["tau"]
    return by_coordinate({"theta": mu[..., None] + tau[..., None] * draws["eta"], "mu": mu, "tau": tau})


def schools_centred(y: Any, sigma: Any) -> None:
    """A funnel: the scale of ``theta`` is ``tau``."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def autoregression(lags: Any, y: Any) -> None:
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(np.zeros(lags.shape[1]), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    with pyro.plate("times", len(y)):
        pyro.sample("y", dist.Normal(alpha + lags @ beta, sigma), obs=y)


def lagged(series: Any, order: int) -> Arrays:
    """Rows of the last ``order`` values, the newest first, and what follows."""
    series = numpy.asarray(series, float)
    windows = numpy.lib.stride_tricks.sliding_window_view(series, order)[:-1, ::-1]
    return numpy.ascontiguousarray(windows), series[order:]


def garch(y: Any, first_scale: Any) -> None:
    """Flat on the triangle alpha1 + beta1 <= 1, where alpha1 is Beta(1, 2) and beta1 / (1 - alpha1) uniform."""
    mu, alpha0 = pyro.sample("mu", flat()), pyro.sample("alpha0", flat(constraints.positive))
    alpha1 = pyro.sample("alpha1", dist.Beta(1.0, 2.0))
    fraction = pyro.sample("fraction", dist.Uniform(0.0, 1.0))
    terms = np.concatenate([first_scale[None] ** 2, alpha0 + alpha1 * (y[:-1] - mu) ** 2], -1)
    ratio, shift = fraction * (1 - alpha1), 1
    while shift < len(y):  # v[t] = terms[t] + ratio * v[t - 1], the number of terms in every sum doubled
        terms = terms + ratio * np.concatenate([0 * terms[..., :shift], terms[..., :-shift]], -1)
        ratio, shift = ratio * ratio, 2 * shift
    with pyro.plate("times", len(y)):
        pyro.sample("y", dist.Normal(mu, np.sqrt(terms)), obs=y)


def garch_parameters(draws: Draws) -> Draws:
    beta1 = draws["fraction"] * (1 - draws["alpha1"])
    return {**{name: draws[name] for name in ("mu", "alpha0", "alpha1")}, "beta1": beta1}


def hidden_markov(y: Any) -> None:
    """Two states, summed out; every first state has weight one."""
    theta = pyro.sample("theta", dist.Dirichlet(np.ones((2, 2))).to_event(1))  # rows: from state
    low, gap = pyro.sample("low", flat(constraints.positive)), pyro.sample("gap", flat(constraints.positive))
    mu = np.stack([low, low + gap], -1)
    pyro.factor("mu_prior", dist.Normal(np.asarray([3.0, 10.0]), 1.0).log_prob(mu).sum(-1))
    emission = dist.Normal(mu, 1.0).log_prob(y[:, None])
    chain = np.log(theta) + emission[1:, None, :]
    while (length := chain.shape[-3]) > 1:  # products of neighbours, so that the program is short
        left, right = chain[..., 0 : length - 1 : 2, :, :], chain[..., 1::2, :, :]
        pairs = logsumexp(left[..., :, :, None] + right[..., None, :, :], -2)
        chain = np.concatenate([pairs, chain[..., length - length % 2 :, :, :]], -3)
    pyro.factor("y", logsumexp(emission[0][:, None] + chain[0], (-2, -1)))


def hidden_markov_parameters(draws: Draws) -> Draws:
    mu = numpy.stack([draws["low"], draws["low"] + draws["gap"]], -1)
    return by_coordinate({"theta1": draws["theta"][..., 0, :], "theta2": draws["theta"][..., 1, :], "mu": mu})


def lotka_volterra(y_init: Any, y: Any) -> None:
    """Hares and lynxes; rows of ``y`` are the years after the one of ``y_init``."""
    theta = pyro.sample("theta", flat(constraints.independent(constraints.positive, 1), 4))
    loc, scale = np.asarray([1.0, 0.05, 1.0, 0.05]), np.asarray([0.5, 0.05, 0.5, 0.05])
    pyro.factor("theta_prior", dist.Normal(loc, scale).log_prob(theta).sum(-1))
    sigma = pyro.sample("sigma", dist.LogNormal(np.asarray([-1.0, -1.0]), 1.0).to_event(1))
    z_init = pyro.sample("z_init", dist.LogNormal(np.log(np.asarray([10.0, 10.0])), 1.0).to_event(1))
    signs, h = np.asarray([1.0, -1.0]), 1 / 4

    def slope(log_z: Any) -> Any:  # logs keep populations positive, the limit all finite where they explode
        other = np.stack([log_z[..., 1], log_z[..., 0]], -1)
        return signs * (theta[..., 0::2] - theta[..., 1::2] * np.exp(np.clip(other, -100.0, 10.0)))

    def quarter(x: Any) -> Any:
        k1 = slope(x)
        k2 = slope(x + h / 2 * k1)
        k3 = slope(x + h / 2 * k2)
        k4 = slope(x + h * k3)
        return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)

    log_z = scan(quarter, np.log(z_init), 4 * len(y))[..., 3::4, :]
    with pyro.plate("species", 2):
        pyro.sample("y_init", dist.LogNormal(np.log(z_init), sigma), obs=y_init)
        with pyro.plate("years", len(y)):
            pyro.sample("y", dist.LogNormal(log_z, sigma), obs=y)


def gaussian_process(x: Any, y: Any) -> None:
    rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))  # a variance in Stan's program, despite its name
    kernel = alpha**2 * np.exp(-0.5 * ((x[:, None] - x) / rho) ** 2) + sigma * np.eye(len(x))
    pyro.sample("y", dist.MultivariateNormal(np.zeros(len(x)), kernel), obs=y)


def columns(*names: str) -> Callable[[Data], Arrays]:
    return lambda data: tuple(numpy.asarray(data[name], float) for name in names)


def design(data: Data, *features: str) -> numpy.ndarray:
    """Columns of ones, of features, and of products ``a*b`` of features."""
    parts = [numpy.prod([numpy.asarray(data[name], float) for name in f.split("*")], axis=0) for f in features]
    return numpy.stack([numpy.ones_like(parts[0]), *parts], -1)


def children(*features: str) -> Posterior:
    return Posterior(kid_score, lambda d: (design(d, *features), numpy.asarray(d["kid_score"], float)))


def people(transform: Callable) -> Posterior:
    return Posterior(earnings, lambda d: (design(d, "height"), transform(numpy.asarray(d["earn"], float))))


def _diamonds(data: Data) -> Arrays:
    x, y = columns("X", "Y")(data)
    return x[:, 1:], y


KNOWN = {
    "arK-arK": Posterior(autoregression, lambda d: lagged(d["y"], d["K"])),
    "sblrc-blr": Posterior(normal_regression, columns("X", "y")),
    "sblri-blr": Posterior(normal_regression, columns("X", "y")),
    "eight_schools-eight_schools_noncentered": Posterior(schools, columns("y", "sigma"), schools_parameters),
    "eight_schools-eight_schools_centered": Posterior(schools_centred, columns("y", "sigma")),
    "hudson_lynx_hare-lotka_volterra": Posterior(lotka_volterra, columns("y_init", "y")),
    "gp_pois_regr-gp_regr": Posterior(gaussian_process, columns("x", "y")),
    "nes_logit_data-nes_logit_model": Posterior(vote, columns("income", "vote")),
    "garch-garch11": Posterior(garch, columns("y", "sigma1"), garch_parameters),
    "hmm_example-hmm_example": Posterior(hidden_markov, columns("y"), hidden_markov_parameters),
    "kidiq-kidscore_momiq": children("mom_iq"),
    "kidiq-kidscore_momhsiq": children("mom_hs", "mom_iq"),
    "kidiq-kidscore_interaction": children("mom_hs", "mom_iq", "mom_hs*mom_iq"),
    "earnings-earn_height": people(lambda y: y),
    "earnings-logearn_height": people(numpy.log),
    "diamonds-diamonds": Posterior(diamonds, _diamonds),
}


# ---------------------------------------------------------------- made here: regressions


def logistic(x: Any, y: Any) -> None:
    a = pyro.sample("a", dist.Normal(0.0, 100.0))
    w = pyro.sample("w", dist.Normal(np.zeros(x.shape[1]), 1000.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=a + x @ w), obs=y)


def logistic_data(random: numpy.random.Generator) -> Arrays:
    """30 covariates, neighbours correlated by .9, of scales .01 to 100."""
    noise, scale = random.standard_normal((600, 30)), 10 ** random.uniform(-2, 2, 30)
    x = numpy.stack([noise[:, 0]] + [numpy.zeros(600)] * 29, -1)
    for j in range(1, 30):
        x[:, j] = 0.9 * x[:, j - 1] + 0.19**0.5 * noise[:, j]
    logits = 0.5 + x @ random.normal(0, 0.5, 30)
    return x * scale, (random.random(600) < 1 / (1 + numpy.exp(-logits))).astype(float)


def student(x: Any, y: Any) -> None:
    a = pyro.sample("a", dist.Cauchy(0.0, 10.0))
    w = pyro.sample("w", dist.Cauchy(np.zeros(x.shape[1]), 2500.0).to_event(1))
    s, nu = pyro.sample("s", dist.HalfCauchy(5.0)), pyro.sample("nu", dist.Gamma(2.0, 0.1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.StudentT(nu, a + x @ w, s), obs=y)


def student_data(random: numpy.random.Generator) -> Arrays:
    x = random.standard_normal((200, 3)) * [1.0, 1e-3, 1e5]
    return x, 100 + x @ [2.0, 3000.0, -1e-5] + 0.5 * random.standard_t(3, 200)


def poisson(x: Any, group: Any, y: Any) -> None:
    """With an intercept for each of 20 groups."""
    a = pyro.sample("a", dist.Normal(0.0, 10.0))
    w = pyro.sample("w", dist.Normal(np.zeros(2), 10.0).to_event(1))
    s = pyro.sample("s", dist.HalfNormal(1.0))
    with pyro.plate("groups", 20):
        e = pyro.sample("e", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Poisson(np.exp(a + x @ w + s * e[group])), obs=y)


def poisson_data(random: numpy.random.Generator) -> Arrays:
    group, x = numpy.arange(200) % 20, random.standard_normal((200, 2)) * [1.0, 100.0]
    rate = numpy.exp(0.5 + x @ [0.3, 0.004] + 0.5 * random.standard_normal(20)[group])
    return x, group, random.poisson(rate).astype(float)


def negative_binomial(x: Any, y: Any) -> None:
    a = pyro.sample("a", dist.Normal(0.0, 10.0))
    w = pyro.sample("w", dist.Normal(np.zeros(x.shape[1]), 10.0).to_event(1))
    shape = pyro.sample("shape", dist.HalfCauchy(5.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.GammaPoisson(shape, shape / np.exp(a + x @ w)), obs=y)


def negative_binomial_data(random: numpy.random.Generator) -> Arrays:
    """Ages, incomes, and a yes or no."""
    age, income = random.uniform(20, 80, 400), random.lognormal(10, 0.6, 400)
    x = numpy.stack([age, income, (random.random(400) < 0.3).astype(float)], -1)
    mean = numpy.exp(0.2 + x @ [0.02, 1e-5, -0.5])
    return x, random.poisson(mean * random.gamma(2.0, 0.5, 400)).astype(float)


def horseshoe(x: Any, y: Any) -> None:
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(10.0))
    with pyro.plate("columns", x.shape[1]):
        size = pyro.sample("size", dist.HalfCauchy(1.0))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ (tau * size * z), sigma), obs=y)


def horseshoe_parameters(draws: Draws) -> Draws:
    """Coefficients; single sizes have no mean."""
    beta = draws["tau"][..., None] * draws["size"] * draws["z"]
    return by_coordinate({"beta": beta, "log tau": numpy.log(draws["tau"]), "sigma": draws["sigma"]})


def horseshoe_data(random: numpy.random.Generator) -> Arrays:
    x = random.standard_normal((100, 20))
    return x, x[:, :4] @ [3.0, -2.0, 1.0, 0.5] + random.standard_normal(100)


# ---------------------------------------------------------------- made here: others


def cox_process(x: Any, y: Any) -> None:
    """Counts whose log rate is a Gaussian process."""
    level = pyro.sample("level", dist.Normal(0.0, 5.0))
    length = pyro.sample("length", dist.LogNormal(0.0, 1.0))
    height = pyro.sample("height", dist.HalfNormal(2.0))
    z = pyro.sample("z", dist.Normal(np.zeros(len(x)), 1.0).to_event(1))
    kernel = np.exp(-0.5 * ((x[:, None] - x) / length) ** 2) + 1e-6 * np.eye(len(x))
    f = level + height * (np.linalg.cholesky(kernel) @ z)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Poisson(np.exp(f)), obs=y)


def cox_process_data(random: numpy.random.Generator) -> Arrays:
    x = numpy.linspace(0, 10, 40)
    return x, random.poisson(numpy.exp(1 + numpy.sin(x))).astype(float)


def groups(x: Any, group: Any, y: Any) -> None:
    """50 intercepts and slopes, centred; the covariate is not."""
    mu = pyro.sample("mu", dist.Normal(np.zeros(2), 100.0).to_event(1))
    tau = pyro.sample("tau", dist.HalfCauchy(np.asarray([10.0, 1.0])).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(10.0))
    with pyro.plate("groups", 50):
        a = pyro.sample("a", dist.Normal(mu[..., 0], tau[..., 0]))
        b = pyro.sample("b", dist.Normal(mu[..., 1], tau[..., 1]))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(a[group] + b[group] * x, sigma), obs=y)


def groups_non_centred(x: Any, group: Any, y: Any) -> None:
    mu = pyro.sample("mu", dist.Normal(np.zeros(2), 100.0).to_event(1))
    tau = pyro.sample("tau", dist.HalfCauchy(np.asarray([10.0, 1.0])).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(10.0))
    with pyro.plate("groups", 50):
        za, zb = pyro.sample("za", dist.Normal(0.0, 1.0)), pyro.sample("zb", dist.Normal(0.0, 1.0))
    a, b = mu[..., 0] + tau[..., 0] * za, mu[..., 1] + tau[..., 1] * zb
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(a[group] + b[group] * x, sigma), obs=y)


def groups_data(random: numpy.random.Generator) -> Arrays:
    group, x = numpy.arange(500) % 50, random.normal(30, 10, 500)
    a, b = random.normal(20, 5, 50), random.normal(1.5, 0.2, 50)
    return x, group, a[group] + b[group] * x + random.normal(0, 4, 500)


def autoregression_data(random: numpy.random.Generator) -> Arrays:
    """Two lags, around a level of 100."""
    y = [100.0, 100.0]
    for _ in range(150):
        y.append(20 + 1.1 * y[-1] - 0.3 * y[-2] + random.normal(0, 2))
    return lagged(y, 2)


def network(x: Any, y: Any) -> None:
    """A neural network of 200 weights."""
    w = pyro.sample("w", dist.Normal(np.zeros((2, 50)), 1.0).to_event(2))
    b = pyro.sample("b", dist.Normal(np.zeros(50), 1.0).to_event(1))
    v = pyro.sample("v", dist.Normal(np.zeros(50), 0.3).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(np.tanh(x @ w + b) @ v, sigma), obs=y)


def network_parameters(draws: Draws) -> Draws:
    """The function at some points: weights may be exchanged and change signs in pairs."""
    hidden = numpy.tanh(numpy.einsum("ni,...ij->...nj", AT, draws["w"]) + draws["b"][..., None, :])
    return by_coordinate({"f": numpy.einsum("...nj,...j->...n", hidden, draws["v"]), "sigma": draws["sigma"]})


AT = numpy.array([[i, j] for i in (-1.5, -0.5, 0.5, 1.5) for j in (-1.0, 1.0)])


def network_data(random: numpy.random.Generator) -> Arrays:
    x = random.uniform(-2, 2, (100, 2))
    return x, numpy.sin(2 * x[:, 0]) + 0.5 * x[:, 1] + 0.2 * random.standard_normal(100)


def item_response(y: Any) -> None:
    """240 people and 30 questions of unknown difficulty and discrimination."""
    people, questions = pyro.plate("people", len(y), dim=-2), pyro.plate("questions", y.shape[1], dim=-1)
    with people:
        ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
    with questions:
        difficulty = pyro.sample("difficulty", dist.Normal(0.0, 2.0))
        slope = pyro.sample("slope", dist.LogNormal(0.0, 0.5))
    with people, questions:
        pyro.sample("y", dist.Bernoulli(logits=slope * (ability - difficulty)), obs=y)


def item_response_data(random: numpy.random.Generator) -> Arrays:
    ability, difficulty = random.standard_normal((240, 1)), random.normal(0, 1, 30)
    logits = random.lognormal(0, 0.4, 30) * (ability - difficulty)
    return ((random.random((240, 30)) < 1 / (1 + numpy.exp(-logits))).astype(float),)


MADE = {
    "logistic, 30 correlated": Posterior(logistic, logistic_data),
    "Student errors": Posterior(student, student_data),
    "mixed Poisson": Posterior(poisson, poisson_data),
    "negative binomial": Posterior(negative_binomial, negative_binomial_data),
    "Cox process": Posterior(cox_process, cox_process_data),
    "50 groups, centred": Posterior(groups, groups_data),
    "50 groups, non-centred": Posterior(groups_non_centred, groups_data),
    "horseshoe": Posterior(horseshoe, horseshoe_data, horseshoe_parameters),
    "AR(2) around 100": Posterior(autoregression, autoregression_data),
    "network, 200 weights": Posterior(network, network_data, network_parameters),
    "item response, 300 latents": Posterior(item_response, item_response_data),
}
POSTERIORS = KNOWN | MADE
SEED = 5
