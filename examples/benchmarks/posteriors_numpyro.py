"""NumPyro's NUTS and AutoDAIS on the programs of posteriors.py: a child process that runs JAX, and the parent's side.

The child is given the data and a request in a folder, and writes ``answer.npz`` there.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from posteriors_methods import Budget, Found

DAIS_STEPS, DAIS_RATE = 20, 0.005


# ---------------------------------------------------------------- the child's side


def nuts(model: Any, args: tuple[Any, ...], request: dict[str, Any]) -> dict[str, Any]:
    from jax import random
    from numpyro.infer import MCMC, NUTS

    began, (warmup, count), chains = time.process_time(), request["nuts"], request["chains"]
    options = {"num_chains": chains, "chain_method": "sequential", "progress_bar": False}
    mcmc = MCMC(NUTS(model), num_warmup=warmup, num_samples=count, **options)
    mcmc.run(random.PRNGKey(request["seed"]), *args)
    draws = {k: np.asarray(v) for k, v in mcmc.get_samples(group_by_chain=True).items()}
    return {"seconds": time.process_time() - began, **{f"z.{k}": v for k, v in draws.items()}}


def whitened(model: Any, args: tuple[Any, ...], request: dict[str, Any]) -> dict[str, Any]:
    """NUTS in coordinates ``v`` of the unconstrained space, ``u = loc + scale_tril v``."""
    import jax
    from jax import random
    from numpyro.infer import MCMC, NUTS
    from numpyro.infer.initialization import init_to_value
    from numpyro.infer.util import initialize_model

    key, (warmup, count), chains = random.PRNGKey(request["seed"]), request["nuts"], request["chains"]
    somewhere = {k: jax.numpy.asarray(v) for k, v in request["values"].items()}
    info = initialize_model(key, model, init_strategy=init_to_value(values=somewhere), model_args=args)
    shapes = {name: info.param_info.z[name].shape for name in somewhere}
    ends = list(np.cumsum([math.prod(s) for s in shapes.values()])[:-1])
    loc, scale = jax.numpy.asarray(request["loc"]), jax.numpy.asarray(request["scale_tril"])

    def sites(v: Any) -> dict[str, Any]:
        parts = jax.numpy.split(loc + scale @ v, ends)
        return {name: part.reshape(shape) for part, (name, shape) in zip(parts, shapes.items(), strict=True)}

    kernel = NUTS(potential_fn=lambda v: info.potential_fn(sites(v)))
    options = {"num_chains": chains, "chain_method": "sequential", "progress_bar": False}
    mcmc = MCMC(kernel, num_warmup=warmup, num_samples=count, **options)
    mcmc.run(key, init_params=random.normal(key, (chains, len(loc))))
    draws = jax.vmap(jax.vmap(lambda v: info.postprocess_fn(sites(v))))(mcmc.get_samples(group_by_chain=True))
    return {"seconds": 0.0, **{f"z.{k}": np.asarray(v) for k, v in draws.items()}}


def dais(model: Any, args: tuple[Any, ...], request: dict[str, Any]) -> dict[str, Any]:
    import jax
    import numpyro
    from jax import random
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoDAIS

    began, limit, steps = time.process_time(), request["seconds"], request["steps"]
    guide, share = AutoDAIS(model, K=DAIS_STEPS, eta_init=1e-3), [0.0]
    optimiser = numpyro.optim.ClippedAdam(lambda _: DAIS_RATE * 0.01 ** share[0])
    svi = SVI(model, guide, optimiser, Trace_ELBO())
    state = svi.init(random.PRNGKey(request["seed"]), *args)

    @jax.jit
    def update(state: Any, over: Any) -> Any:
        share[0] = over
        return svi.stable_update(state, *args)[0]

    done, over = 0, 0.0
    while over < 1:
        state, done = update(state, over), done + 1
        if limit is not None or done == steps:
            jax.block_until_ready(state)
        over = done / steps if limit is None else (time.process_time() - began) / limit
    params = svi.get_params(state)

    def draw(count: int, seed: int) -> Any:
        keys = random.split(random.PRNGKey(seed), count)
        return jax.block_until_ready(jax.lax.map(lambda k: guide.sample_posterior(k, params), keys))

    draw(request["draws"], 1)
    seconds = time.process_time() - began
    losses = jax.lax.map(
        lambda k: Trace_ELBO().loss(k, params, model, guide, *args), random.split(random.PRNGKey(2), 1000)
    )
    draws = {f"z.{k}": np.asarray(v)[None] for k, v in draw(request["more"], 3).items()}
    return {"seconds": seconds, "bound": -float(losses.mean()), **draws}


def child(folder: Path) -> None:
    os.environ["PROGRAMS"] = "numpyro"
    import jax

    jax.config.update("jax_enable_x64", True)
    from posteriors_models import POSTERIORS

    request = json.loads((folder / "request.json").read_text())
    with np.load(folder / "inputs.npz") as data:
        args = tuple(jax.numpy.asarray(data[f"arr_{i}"]) for i in range(len(data.files)))
    method = {"nuts": nuts, "whitened": whitened, "dais": dais}[request["method"]]
    np.savez(folder / "answer.npz", **method(POSTERIORS[request["name"]].model, args, request))


# ---------------------------------------------------------------- the parent's side


def ask(python: str, method: str, name: str, args: tuple[np.ndarray, ...], request: dict[str, Any]) -> Found:
    """Let a Python that has NumPyro do it.

    :raises RuntimeError: with the last line of what it says, where it fails.
    """
    from posteriors_methods import Found

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "request.json").write_text(json.dumps({"method": method, "name": name, **request}))
        np.savez(Path(folder, "inputs.npz"), *args)
        flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PROGRAMS": "numpyro"}
        done = subprocess.run([python, __file__, folder], env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError((done.stderr.strip() or f"ended by signal {-done.returncode}").splitlines()[-1])
        with np.load(Path(folder, "answer.npz")) as data:
            draws = {k[2:]: data[k] for k in data.files if k.startswith("z.")}
            return Found(draws, None, float(data["bound"]) if "bound" in data else None, float(data["seconds"]))


def long_run(python: str, name: str, model: Any, args: tuple[np.ndarray, ...], budget: Budget) -> Found:
    """Four chains of NUTS in the coordinates of a Gaussian that this package fits, which leave its draws exact."""
    import torch

    from pyro_shortrun import ShortRunGuide

    tensors = tuple(map(torch.as_tensor, args))
    guide = ShortRunGuide(model).pretrain(*tensors)
    drawn = guide.sample_posterior(*tensors, num_samples=1)
    request = {"loc": guide.start.loc.tolist(), "scale_tril": guide.start.scale_tril.tolist()}
    request["values"] = {k: v[0, 0].tolist() for k, v in drawn.items()}  # in the order of the coordinates
    return ask(python, "whitened", name, args, {**request_of(budget, 1, chains=4), **request})


def request_of(budget: Budget, seed: int, chains: int = 1) -> dict[str, Any]:
    return {**asdict(budget), "seed": seed, "chains": chains}


if __name__ == "__main__":
    child(Path(sys.argv[1]))
