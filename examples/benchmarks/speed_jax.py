"""The child process of speed.py, and its handle: the same chains under `jax.jit`, and NumPyro's AutoDAIS.

It reads one request per line of standard input, a JSON object with the key `do`, and answers each by one line:

    {"do": "run", "twin": ..., "file": ..., "steps": K, "step_size": eta}   compile a run; check its gradient
    {"do": "svi", "twin": ..., "file": ..., "steps": K}                     compile an update of AutoDAIS
    {"do": "time", "calls": n}                                              seconds of n calls of the last of these
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SIGMA = 0.3
Run = Callable[[], None]


def limit_threads(threads: int) -> None:
    """XLA takes as many threads as the process may use cores; to be called before JAX is imported."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def twins() -> dict[str, tuple[Callable, Callable, Callable]]:
    """From a name to the log joint, the draw from the prior and the site values, as in speed_models.py."""
    import jax
    import jax.numpy as jnp
    from jax import random

    def squares(x: Any) -> Any:
        return jnp.sum(jnp.square(x))

    def half_cauchy(key: Any, *shape: int) -> Any:
        return jnp.abs(random.cauchy(key, shape))

    def same(u: Any) -> tuple:
        return (u,)

    def gelu(x: Any) -> Any:
        return jax.nn.gelu(x, approximate=False)

    def mlp(z: Any, x: Any, w1: Any, b1: Any, w2: Any, b2: Any, w3: Any, b3: Any) -> Any:
        h = gelu(gelu(z @ w1.T + b1) @ w2.T + b2)
        mean = jax.nn.sigmoid(h @ w3.T + b3)
        return -0.5 * squares(z) - 0.5 / SIGMA**2 * squares(x - mean)

    def fold(x: Any, axis: int) -> Any:
        """Sums over how the four taps of neighbours, on the next axis, overlap at stride 2 and padding 1."""
        taps = [jax.lax.index_in_dim(x, tap, axis + 1, keepdims=False) for tap in range(4)]
        length = x.shape[axis]

        def shifted(tap: Any, by: int) -> Any:
            widths = [(by, -by, 0) if i == axis else (0, 0, 0) for i in range(tap.ndim)]
            return jax.lax.pad(tap, jnp.zeros((), x.dtype), widths)

        pairs = jnp.stack([taps[1] + shifted(taps[3], 1), taps[2] + shifted(taps[0], -1)], axis + 1)
        return pairs.reshape(*pairs.shape[:axis], 2 * length, *pairs.shape[axis + 2 :])

    def transposed_convolution(h: Any, kernel: Any, bias: Any) -> Any:
        if jax.default_backend() == "cpu":
            # A matrix product and overlapping sums: XLA's own, below, is several times slower on CPUs.
            images, rows, columns, channels = h.shape
            patches = h.reshape(-1, channels) @ kernel.reshape(channels, -1)
            patches = patches.reshape(images, rows, columns, -1, 4, 4)
            return bias + fold(fold(jnp.transpose(patches, (0, 1, 4, 2, 5, 3)), 1), 2)
        flipped = jnp.transpose(kernel[:, :, ::-1, ::-1], (2, 3, 0, 1))
        return bias + jax.lax.conv_general_dilated(
            h,
            flipped,
            (1, 1),
            ((2, 2), (2, 2)),
            lhs_dilation=(2, 2),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    def deconvolutional(z: Any, x: Any, w: Any, b: Any, *kernels: Any) -> Any:
        k1, b1, k2, b2, k3, b3 = kernels
        h = jnp.transpose(jax.nn.relu(z @ w.T + b).reshape(len(z), 128, 4, 4), (0, 2, 3, 1))  # channels last
        h = jax.nn.relu(transposed_convolution(h, k1, b1))
        h = jax.nn.relu(transposed_convolution(h, k2, b2))
        mean = jnp.tanh(transposed_convolution(h, k3, b3))
        return -0.5 * squares(z) - 0.5 / SIGMA**2 * squares(jnp.transpose(x, (0, 2, 3, 1)) - mean)

    def draw_mlp(key: Any, x: Any, w1: Any, *weights: Any) -> Any:
        return random.normal(key, (len(x), w1.shape[1]))

    def eight_schools(u: Any, y: Any, sigma: Any) -> Any:
        mu, log_tau, eta = u[0], u[1], u[2:]
        tau = jnp.exp(log_tau)
        prior = -0.5 * (mu / 5.0) ** 2 - jnp.log1p((tau / 5.0) ** 2) + log_tau - 0.5 * squares(eta)
        return prior - 0.5 * squares((y - mu - tau * eta) / sigma)

    def draw_eight_schools(key: Any, *inputs: Any) -> Any:
        first, second = random.split(key)
        normal = random.normal(first, (9,))
        log_tau = jnp.log(5.0 * half_cauchy(second, 1))
        return jnp.concatenate([5.0 * normal[:1], log_tau, normal[1:]])

    def logistic(w: Any, x: Any, y: Any) -> Any:
        logits = x @ w
        return jnp.sum(y * logits - jax.nn.softplus(logits)) - 0.5 * squares(w)

    def draw_logistic(key: Any, x: Any, y: Any) -> Any:
        return random.normal(key, (x.shape[1],))

    def horseshoe(u: Any, x: Any, y: Any) -> Any:
        rows, columns = x.shape
        z, log_local, log_tau, log_sigma = u[:columns], u[columns : 2 * columns], u[-2], u[-1]
        local, tau = jnp.exp(log_local), jnp.exp(log_tau)
        prior = jnp.sum(log_local - jnp.log1p(local**2)) - 0.5 * squares(z)
        scales = log_tau - jnp.log1p((tau / 0.1) ** 2) - 0.5 * jnp.exp(log_sigma) ** 2 + (1 - rows) * log_sigma
        return prior + scales - 0.5 * squares((y - x @ (z * local * tau)) * jnp.exp(-log_sigma))

    def draw_horseshoe(key: Any, x: Any, y: Any) -> Any:
        columns = x.shape[1]
        first, second = random.split(key)
        normal, scales = random.normal(first, (columns + 1,)), jnp.log(half_cauchy(second, columns + 1))
        scales = scales.at[-1].add(jnp.log(0.1))
        return jnp.concatenate([normal[:-1], scales, jnp.log(jnp.abs(normal[-1:]))])

    def horseshoe_values(u: Any) -> tuple:
        columns = (len(u) - 2) // 2
        scales = jnp.exp(u[columns:])
        return u[:columns], scales[:columns], scales[-2], scales[-1]

    def mixture(u: Any, x: Any) -> Any:
        logit, low, log_gap, log_scale = u
        scale = jnp.exp(log_scale)
        log_shares = jax.nn.log_sigmoid(jnp.stack([-logit, logit]))
        prior = 2.0 * jnp.sum(log_shares) - 0.5 * ((low / 3.0) ** 2 + ((log_gap - 1.0) / 0.5) ** 2 + scale**2)
        errors = (x[:, None] - jnp.stack([low, low + jnp.exp(log_gap)])) / scale
        likelihood = jnp.sum(jax.nn.logsumexp(log_shares - 0.5 * errors**2, axis=-1))
        return prior + (1 - len(x)) * log_scale + likelihood

    def draw_mixture(key: Any, x: Any) -> Any:
        first, second = random.split(key)
        normal, share = random.normal(first, (3,)), jnp.median(random.uniform(second, (3,)))
        logit = jnp.log(share) - jnp.log1p(-share)
        return jnp.stack([logit, 3.0 * normal[0], 1.0 + 0.5 * normal[1], jnp.log(jnp.abs(normal[2]))])

    def mixture_values(u: Any) -> tuple:
        return jax.nn.sigmoid(u[0]), u[1], jnp.exp(u[2]), jnp.exp(u[3])

    def gaussian_process(u: Any, x: Any, y: Any) -> Any:
        length, amplitude, noise = jnp.exp(u)
        kernel = amplitude**2 * jnp.exp(-0.5 * ((x[:, None] - x) / length) ** 2)
        factor = jnp.linalg.cholesky(kernel + (noise**2 + 1e-3) * jnp.eye(len(x)))
        white = jax.scipy.linalg.solve_triangular(factor, y, lower=True)
        prior = -0.5 * ((u[0] / 0.5) ** 2 + amplitude**2 + (noise / 0.5) ** 2) + u[1] + u[2]
        return prior - jnp.sum(jnp.log(jnp.diagonal(factor))) - 0.5 * squares(white)

    def draw_gaussian_process(key: Any, *inputs: Any) -> Any:
        normal = random.normal(key, (3,))
        return jnp.stack([0.5 * normal[0], jnp.log(jnp.abs(normal[1])), jnp.log(jnp.abs(0.5 * normal[2]))])

    return {
        "mlp": (mlp, draw_mlp, same),
        "deconvolutional": (deconvolutional, draw_mlp, same),
        "eight_schools": (eight_schools, draw_eight_schools, lambda u: (u[0], jnp.exp(u[1]), u[2:])),
        "logistic": (logistic, draw_logistic, same),
        "horseshoe": (horseshoe, draw_horseshoe, horseshoe_values),
        "mixture": (mixture, draw_mixture, mixture_values),
        "gaussian_process": (gaussian_process, draw_gaussian_process, jnp.exp),
    }


def numpyro_models() -> dict[str, Callable]:
    """The same models in NumPyro, for AutoDAIS."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    def eight_schools(y: Any, sigma: Any) -> None:
        mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
        eta = numpyro.sample("eta", dist.Normal(jnp.zeros(8), 1.0).to_event(1))
        with numpyro.plate("schools", 8):
            numpyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)

    def logistic(x: Any, y: Any) -> None:
        w = numpyro.sample("w", dist.Normal(jnp.zeros(x.shape[1]), 1.0).to_event(1))
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)

    def horseshoe(x: Any, y: Any) -> None:
        columns = x.shape[1]
        z = numpyro.sample("z", dist.Normal(jnp.zeros(columns), 1.0).to_event(1))
        local = numpyro.sample("local", dist.HalfCauchy(jnp.ones(columns)).to_event(1))
        tau = numpyro.sample("tau", dist.HalfCauchy(0.1))
        sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Normal(x @ (z * local * tau), sigma), obs=y)

    return {"eight_schools": eight_schools, "logistic": logistic, "horseshoe": horseshoe}


def prepare_run(twin: str, arrays: list, state: Any, steps: int, step_size: float) -> tuple[Run, Any]:
    """A run under jit, and the gradient of the log joint at a state."""
    import jax
    import jax.numpy as jnp
    from jax import random

    log_joint, draw, values = twins()[twin]
    gradient = jax.grad(log_joint)

    @jax.jit
    def run(key: Any, *inputs: Any) -> tuple:
        key, first, second = random.split(key, 3)
        start = draw(first, *inputs)

        def step(u: Any, noise: Any) -> tuple:
            drift = jnp.clip(step_size * gradient(u, *inputs), -10.0, 10.0)
            return u + drift + (2.0 * step_size) ** 0.5 * noise, None

        end, _ = jax.lax.scan(step, start, random.normal(second, (steps, *start.shape)))
        return key, values(end)

    keys = [random.PRNGKey(0)]

    def once() -> None:
        keys[0], sites = run(keys[0], *arrays)
        jax.block_until_ready(sites)

    return once, gradient(state, *arrays)


def prepare_svi(twin: str, arrays: list, steps: int) -> Run:
    """An update of AutoDAIS under jit."""
    import jax
    import numpyro
    from jax import random
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoDAIS

    model = numpyro_models()[twin]
    svi = SVI(model, AutoDAIS(model, K=steps), numpyro.optim.Adam(0.01), Trace_ELBO())
    states = [svi.init(random.PRNGKey(0), *arrays)]
    update = jax.jit(svi.update)

    def once() -> None:
        states[0], loss = update(states[0], *arrays)
        jax.block_until_ready((states[0], loss))

    return once


def seconds_of(run: Run, calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return time.perf_counter() - begin


class Server:
    """Answers requests; remembers what was compiled last."""

    def __init__(self) -> None:
        self.current: Run | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        import jax.numpy as jnp

        do = request.pop("do")
        if do == "time":
            assert self.current is not None
            return {"seconds": seconds_of(self.current, request["calls"])}
        file = request.pop("file")
        with np.load(file) as data:
            state = jnp.asarray(data["state"])
            arrays = [jnp.asarray(data[f"arr_{i}"]) for i in range(len(data.files) - 1)]
        if do == "run":
            self.current, gradient = prepare_run(arrays=arrays, state=state, **request)
            np.save(f"{file}.gradient.npy", np.asarray(gradient))
        else:
            self.current = prepare_svi(arrays=arrays, **request)
        return {"first": seconds_of(self.current, 1)}


# ---------------------------------------------------------------- the parent's side


class Jax:
    """The process that runs JAX. It works only while it is asked, so that nothing else runs beside it.

    :raises RuntimeError: where jax or numpyro are not installed.
    """

    def __init__(self, python: str, device: str, threads: int, folder: str) -> None:
        child = Path(__file__).with_name("speed_jax.py")
        env = {**os.environ, "JAX_PLATFORMS": device, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self._process = subprocess.Popen(
            [python, str(child), "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        self._file = str(Path(folder) / "case.npz")
        self.versions = self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        reply = json.loads(self._process.stdout.readline() or '{"error": "the process ended"}')
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return reply

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def prepare(self, do: str, case: Any, state: Any, **options: Any) -> float:
        """Compile; seconds of the first call."""
        arrays = [t.cpu().numpy() for t in case.inputs]
        np.savez(self._file, *arrays, state=state.cpu().numpy())
        return self.ask(do=do, twin=case.twin, file=self._file, **options)["first"]

    def gradient(self) -> np.ndarray:
        """Of the log joint, at the state that was sent with the last run."""
        return np.load(self._file + ".gradient.npy")

    def seconds(self, calls: int) -> float:
        return self.ask(do="time", calls=calls)["seconds"]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    limit_threads(options.threads)
    replies, sys.stdout = sys.stdout, sys.stderr  # whatever else prints must not get between the answers
    try:
        import jax
        import numpyro

        jax.config.update("jax_default_matmul_precision", "float32")  # as PyTorch's default
        hello = {"jax": jax.__version__, "numpyro": numpyro.__version__, "device": jax.devices()[0].platform}
    except ImportError as reason:
        hello = {"error": str(reason)}
    print(json.dumps(hello), file=replies, flush=True)
    server = Server()
    for line in sys.stdin:
        try:
            reply = server.answer(json.loads(line))
        except Exception as reason:  # told to the parent, which leaves the entry out
            reply = {"error": f"{type(reason).__name__}: {reason}"}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
