"""NumPyro's AutoDAIS on the posteriors of gradients.py: a child process that runs JAX, and the parent's side of it.

Each log density is written once more in JAX, over the unconstrained coordinates of the Pyro program. The parent
compares the two at random points; their difference must be a constant, which corrects the bound. As for short runs, the
base distribution is trained by itself first: from NumPyro's defaults AutoDAIS overflows on the stiffer posteriors.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from gradients_rivals import Bound, Fitted, Meter

NUM_PARTICLES, RATE = 4, 0.02


# ---------------------------------------------------------------- the child's side: densities


def densities() -> dict[str, Callable]:
    """Log density of ``u`` by the name of the Pyro program's function; then the inputs."""
    import jax
    import jax.numpy as jnp

    sigmoid, log_sigmoid = jax.nn.sigmoid, jax.nn.log_sigmoid

    def normal(x: Any, loc: Any, scale: Any) -> Any:
        return jnp.sum(-0.5 * ((x - loc) / scale) ** 2 - jnp.log(scale) + jnp.zeros_like(x))

    def half_cauchy(log_x: Any, scale: Any) -> Any:
        """Of ``exp(log_x)``, with the Jacobian."""
        return log_x - jnp.log1p((jnp.exp(log_x) / scale) ** 2)

    def half_normal(log_x: Any, scale: Any) -> Any:
        return log_x - 0.5 * (jnp.exp(log_x) / scale) ** 2

    def student(x: Any, loc: Any, scale: Any) -> Any:
        return -2.0 * jnp.log1p(((x - loc) / scale) ** 2 / 3.0)

    def flat_regression(u: Any, design: Any, offset: Any, y: Any, unit: Any, cauchy: Any) -> Any:
        prior = jnp.where(cauchy > 0, half_cauchy(u[-1], jnp.where(cauchy > 0, cauchy, 1.0)), u[-1])
        return prior + normal(y, offset + design @ u[:-1], unit * jnp.exp(u[-1]))

    def logit(u: Any, design: Any, votes: Any) -> Any:
        logits = design @ u
        return jnp.sum(votes * logits - jax.nn.softplus(logits))

    def normal_regression(u: Any, x: Any, y: Any) -> Any:
        prior = normal(u[:-1], 0.0, 10.0) + half_normal(u[-1], 10.0)
        return prior + normal(y, x @ u[:-1], jnp.exp(u[-1]))

    def diamonds(u: Any, centred: Any, y: Any) -> Any:
        b, intercept, log_sigma = u[:-2], u[-2], u[-1]
        sigma = jnp.exp(log_sigma)
        prior = normal(b, 0.0, 1.0) + student(intercept, 8.0, 10.0) + student(sigma, 0.0, 10.0) + log_sigma
        return prior + normal(y, intercept + centred @ b, sigma)

    def eight_schools(u: Any, y: Any, sigma: Any) -> Any:
        prior = normal(u[0], 0.0, 5.0) + half_cauchy(u[1], 5.0) + normal(u[2:], 0.0, 1.0)
        return prior + normal(y, u[0] + jnp.exp(u[1]) * u[2:], sigma)

    def eight_schools_centred(u: Any, y: Any, sigma: Any) -> Any:
        prior = normal(u[0], 0.0, 5.0) + half_cauchy(u[1], 5.0) + normal(u[2:], u[0], jnp.exp(u[1]))
        return prior + normal(y, u[2:], sigma)

    def autoregression(u: Any, lags: Any, y: Any) -> Any:
        prior = normal(u[:-1], 0.0, 10.0) + half_cauchy(u[-1], 2.5)
        return prior + normal(y, u[0] + lags @ u[1:-1], jnp.exp(u[-1]))

    def garch(u: Any, y: Any, first_scale: Any) -> Any:
        mu, log_alpha0, logit_alpha1, logit_fraction = u
        alpha1 = sigmoid(logit_alpha1)
        ratio = sigmoid(logit_fraction) * (1 - alpha1)
        shocks = jnp.exp(log_alpha0) + alpha1 * (y[:-1] - mu) ** 2
        terms = jnp.concatenate([first_scale[None] ** 2, shocks])

        def join(left: Any, right: Any) -> Any:
            return left[0] * right[0], right[0] * left[1] + right[1]

        variance = jax.lax.associative_scan(join, (jnp.full_like(terms, ratio), terms))[1]
        jacobian = log_alpha0 + log_sigmoid(logit_alpha1) + 2 * log_sigmoid(-logit_alpha1)
        jacobian += log_sigmoid(logit_fraction) + log_sigmoid(-logit_fraction)
        return jacobian + normal(y, mu, jnp.sqrt(variance))

    def hidden_markov(u: Any, y: Any) -> Any:
        log_theta = jnp.stack([log_sigmoid(u[:2]), log_sigmoid(-u[:2])], -1)
        low, gap = jnp.exp(u[2:])
        mu = jnp.stack([low, low + gap])
        emission = -0.5 * (y[:, None] - mu) ** 2

        def step(alpha: Any, here: Any) -> Any:
            return jax.nn.logsumexp(alpha[:, None] + log_theta, axis=0) + here, None

        last, _ = jax.lax.scan(step, emission[0], emission[1:])
        prior = jnp.sum(log_theta) + u[2] + u[3] + normal(mu, jnp.array([3.0, 10.0]), 1.0)
        return prior + jax.nn.logsumexp(last)

    def lotka_volterra(u: Any, y_init: Any, y: Any, substeps: Any) -> Any:
        theta, log_sigma, start = jnp.exp(u[:4]), u[4:6], u[6:]
        rate, coupling = theta[0::2] * jnp.array([1.0, -1.0]), theta[1::2] * jnp.array([-1.0, 1.0])
        h = 1.0 / len(substeps)

        def slope(x: Any) -> Any:
            return rate + coupling * jnp.exp(jnp.minimum(x[::-1], 10.0))

        def substep(x: Any, _: Any) -> Any:
            k1 = slope(x)
            k2 = slope(x + h / 2 * k1)
            k3 = slope(x + h / 2 * k2)
            k4 = slope(x + h * k3)
            return x + h / 6 * (k1 + k4 + 2 * (k2 + k3)), None

        def year(x: Any, _: Any) -> Any:
            x, _ = jax.lax.scan(substep, x, substeps)
            return x, x

        _, log_z = jax.lax.scan(year, start, y)
        prior = normal(theta, jnp.array([1.0, 0.05, 1.0, 0.05]), jnp.array([0.5, 0.05, 0.5, 0.05])) + jnp.sum(u[:4])
        prior += normal(log_sigma, -1.0, 1.0) + normal(start, jnp.log(10.0), 1.0)
        sigma = jnp.exp(log_sigma)
        return prior + normal(jnp.log(y_init), start, sigma) + normal(jnp.log(y), log_z, sigma)

    def gaussian_process(u: Any, x: Any, y: Any) -> Any:
        rho, alpha, sigma = jnp.exp(u)
        kernel = alpha**2 * jnp.exp(-0.5 * ((x[:, None] - x) / rho) ** 2) + sigma * jnp.eye(len(x))
        factor = jnp.linalg.cholesky(kernel)
        white = jax.scipy.linalg.solve_triangular(factor, y, lower=True)
        prior = 25.0 * u[0] - 4.0 * rho + half_normal(u[1], 2.0) + half_normal(u[2], 1.0)
        return prior - jnp.sum(jnp.log(jnp.diagonal(factor))) - 0.5 * jnp.sum(white**2)

    found = [flat_regression, logit, normal_regression, diamonds, eight_schools, eight_schools_centred, autoregression]
    return {f.__name__: f for f in (*found, garch, hidden_markov, lotka_volterra, gaussian_process)}


# ---------------------------------------------------------------- the child's side: AutoDAIS


class Clock:
    """The budget in gradients and seconds, and draws seen on the way; the clock leaves out the first three steps."""

    def __init__(self, request: dict[str, Any]) -> None:
        self._request, self._marks = request, list(request["marks"])
        self.spent, self.seconds, self.seen = 0, 0.0, {}  # type: ignore[var-annotated]

    @property
    def progress(self) -> float:
        return max(self.spent / self._request["gradients"], self.seconds / self._request["seconds"])

    def run(self, step: Callable[[float], None], draw: Callable[[], Any], gradients: int, until: float) -> None:
        """Steps, each told which share of this part is over."""
        begin, count = self.progress, 0
        while self.progress < until:
            start, count = time.perf_counter(), count + 1
            step((self.progress - begin) / (until - begin))
            self.spent += gradients
            self.seconds += time.perf_counter() - start if count > 3 else 0.0
            if self._marks and self.spent >= self._marks[-1]:
                self.seen[f"at_{self._marks[-1]}"] = np.asarray(draw())
                self._marks = [mark for mark in self._marks if mark > self.spent]


def train(log_density: Callable, points: np.ndarray, request: dict[str, Any]) -> dict[str, np.ndarray]:
    """AutoDAIS until the budget is spent: its draws along the way, the last of them with log weights."""
    import jax
    import numpyro
    import numpyro.distributions as dist
    from jax import random
    from numpyro.infer import SVI, Trace_ELBO, init_to_feasible
    from numpyro.infer.autoguide import AutoDAIS, AutoDiagonalNormal, AutoMultivariateNormal

    def model() -> None:
        flat = dist.ImproperUniform(dist.constraints.real_vector, (), points.shape[1:])
        numpyro.factor("log_density", log_density(numpyro.sample("u", flat)))

    clock, shape = Clock(request), (request["probe"],)

    def fit(guide: Any, rate: float, gradients: int, until: float, given: dict) -> tuple[Any, Callable]:
        """Parameters, and ``(params, key) -> u`` of a guide trained until that share of the budget is spent."""
        share = [0.0]  # of this part; in an update, that update's own argument
        optimiser = numpyro.optim.ClippedAdam(lambda i: rate * request["decay"] ** share[0])
        svi = SVI(model, guide, optimiser, Trace_ELBO(NUM_PARTICLES))
        states = [svi.init(random.PRNGKey(request["seed"]), init_params=given)]

        @jax.jit
        def update(state: Any, over: Any) -> Any:
            share[0] = over
            return svi.stable_update(state)

        def step(over: float) -> None:
            states[0], loss = update(states[0], over)
            jax.block_until_ready(loss)

        @jax.jit
        def draw(params: Any, key: Any) -> Any:
            return jax.vmap(lambda k: guide.sample_posterior(k, params)["u"])(random.split(key, *shape))

        key = random.PRNGKey(request["seed"] + 1)
        clock.run(step, lambda: draw(svi.get_params(states[0]), key), gradients, until)
        return svi.get_params(states[0]), draw

    diagonal = request["base"] == "diagonal"
    alone = (AutoDiagonalNormal if diagonal else AutoMultivariateNormal)(model, init_loc_fn=init_to_feasible)
    begun, _ = fit(alone, request["start_rate"], NUM_PARTICLES, request["alone"], {})
    names = {"auto_loc": "auto_z_0_loc", "auto_scale": "auto_z_0_scale", "auto_scale_tril": "auto_z_0_scale_tril"}
    guide = AutoDAIS(model, K=request["steps"], base_dist=request["base"], eta_init=1e-3, init_loc_fn=init_to_feasible)
    given = {names[k]: v for k, v in begun.items()}
    final, draw = fit(guide, RATE, request["steps"] * NUM_PARTICLES, 1.0, given)

    @jax.jit
    def log_weights(keys: Any) -> Any:
        return jax.vmap(lambda k: -Trace_ELBO().loss(k, final, model, guide))(keys)

    keys = random.split(random.PRNGKey(request["seed"] + 2), request["draws"]).reshape(-1, *shape, 2)
    weights = np.concatenate([np.asarray(log_weights(part)) for part in keys])
    ends = np.concatenate([np.asarray(draw(final, part[0])) for part in keys])
    values = np.stack([np.asarray(log_density(p)) for p in points])
    return {"u": ends, "log_weights": weights, "values": values, "spent": np.array(clock.spent), **clock.seen}


def child(folder: Path) -> None:
    request = json.loads((folder / "request.json").read_text())
    if hasattr(os, "sched_setaffinity"):  # XLA takes a thread for each core that it may use
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    import jax

    jax.config.update("jax_enable_x64", True)
    with np.load(folder / "inputs.npz") as data:
        points, inputs = data["points"], [jax.numpy.asarray(data[f"arr_{i}"]) for i in range(len(data.files) - 1)]
    density = densities()[request["density"]]
    np.savez(folder / "answer.npz", **train(lambda u: density(u, *inputs), points, request))


# ---------------------------------------------------------------- the parent's side


def inputs_of(bound: Bound) -> tuple[str, list[np.ndarray]]:
    """Name of the density and its inputs; regressions get their design in the program's own units."""
    from posteriordb_models import INCOME, SUBSTEPS

    model = bound.model
    function = model.func if isinstance(model, partial) else model
    inputs = [a.numpy() for a in bound.args]
    if isinstance(model, partial):
        units, (x, y), cauchy = model.args[0], inputs, model.keywords.get("cauchy")
        scale = 0.0 if cauchy is None else cauchy / units.unit
        design = units.unit * x @ units.matrix.numpy()
        inputs = [design, units.centre * x[:, 0], y, np.array(units.unit), np.array(scale)]
    elif function.__name__ == "logit":
        inputs = [inputs[0] @ INCOME.numpy(), inputs[1]]
    elif function.__name__ == "lotka_volterra":
        inputs.append(np.zeros(SUBSTEPS))
    return function.__name__, inputs


def auto_dais(python: str | None, steps: int, seed: int, base: str, bound: Bound, meter: Meter) -> Fitted:
    """AutoDAIS in a child process.

    :raises RuntimeError: without NumPyro, and where the two densities do not agree.
    """
    import torch
    from gradients_rivals import ALONE, DECAY, NUM_DRAWS, PROBE_DRAWS, START_RATE, Fitted

    if python is None:
        raise RuntimeError("needs --jax-python")
    points = 0.5 * np.random.default_rng(0).standard_normal((8, bound.size))
    density, inputs = inputs_of(bound)
    request = {"density": density, "steps": steps, "seed": seed, "base": base, "decay": DECAY, "probe": PROBE_DRAWS}
    request |= {"start_rate": START_RATE, "alone": ALONE}
    request |= {"gradients": meter.budget, "seconds": meter.limit, "marks": meter.marks, "draws": NUM_DRAWS}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "request.json").write_text(json.dumps(request))
        np.savez(Path(folder, "inputs.npz"), *inputs, points=points)
        flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "JAX_TRACEBACK_FILTERING": "off"}
        done = subprocess.run([python, __file__, folder], env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError((done.stderr.strip() or "the process ended").splitlines()[-1])
        with np.load(Path(folder, "answer.npz")) as data:
            answer = {k: torch.tensor(data[k]) for k in data.files}
    offset = bound.log_density(torch.tensor(points)) - answer["values"]
    if offset.std() > 1e-8 * max(1.0, answer["values"].abs().max().item()):
        raise RuntimeError(f"the densities in JAX and Pyro differ by {offset.tolist()}")
    for mark in reversed(meter.marks):
        if f"at_{mark}" in answer:
            meter.record(mark, lambda u=answer[f"at_{mark}"]: {k: v[None] for k, v in bound.constrain(u).items()})
    meter.spent = int(answer["spent"])
    draws = {k: v[None] for k, v in bound.constrain(answer["u"]).items()}
    return Fitted(draws, answer["log_weights"] + offset.mean())


if __name__ == "__main__":
    child(Path(sys.argv[1]))
