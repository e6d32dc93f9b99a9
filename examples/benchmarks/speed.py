"""What a short run costs: against Pyro by hand, PyTorch by hand, JAX and NumPyro; in time, memory and compilation.

    python examples/benchmarks/speed.py                      # some fifteen minutes on two cores
    python examples/benchmarks/speed.py --quick              # some seven minutes
    python examples/benchmarks/speed.py --smoke              # seconds, to see that it runs
    python examples/benchmarks/speed.py --jax-python PATH    # where jax and numpyro are installed, if not here
    python examples/benchmarks/speed.py --tables runs svi --only mlp-64 schools

Every ratio is the median over rounds in which each contender ran once in turn (short calls several times), in this
process; JAX in a child process, in turn with the others, which then wait. A ratio below 1 means that ours is faster.

`runs`: draws by 20 Langevin steps in float32, from a prior draw to the sites' values. `eager` is ours with
`compile=False`, `Pyro` a loop over the potential of `pyro.infer.mcmc.util.initialize_model`, which traces the model in
each step, `PyTorch` a loop over a log density written by hand, `+compile` the same with its step under
`torch.compile`, `JAX` the same chain under `jax.jit` as one `lax.scan`. All gradients are compared before. The last
columns are seconds of the first call, compilation included, with cold caches.
`svi`: a step of SVI that tunes the step size and what else the guide has, of Pyro's own guides, and an update of
NumPyro's `AutoDAIS` with as many steps; the last column is the CPU seconds of the first three steps, the C++ compiler's
included, from a cold cache; then training steps, tuned in every tenth, against training steps that are never tuned.
`memory`: the peak during a run, or a step of SVI that tunes, above what was resident before (to about 1 MB).
`growth`: milliseconds of a run as rows, columns and steps grow, and the ratio to the line above.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import ELBO, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoGuide, AutoMultivariateNormal, AutoNormal
from pyro.infer.mcmc.util import initialize_model
from pyro.ops.integrator import potential_grad
from record import Table, record
from speed_jax import Jax
from speed_models import (
    Case,
    deconvolutional,
    eight_schools,
    gaussian_process,
    horseshoe,
    logistic,
    mixture,
    mlp,
    pyro_loop,
    torch_loop,
)
from torch import Tensor
from tqdm import tqdm

from pyro_shortrun import Annealed, Langevin, PathDensity, Prior, ShortRunELBO, ShortRunGuide, ShortRunSVI, StepSize

_WARM = 20  # steps before any is timed: among the first, several are compared with eager ones

Make = Callable[[str], Case]  # from a device
Timed = Callable[[int], float]  # seconds of so many calls
Rounds = dict[str, np.ndarray]  # seconds per call of each contender, one per round

RUNS: dict[str, Make] = {
    **{f"mlp-{batch}": partial(mlp, batch) for batch in (16, 64, 256, 1024)},
    **{f"deconv-{batch}": partial(deconvolutional, batch) for batch in (32, 128)},
    "schools": eight_schools,
    "logistic": partial(logistic, 1000, 20),
    "horseshoe": horseshoe,
    "gmm": mixture,
    "gp": gaussian_process,
}
TUNED: dict[str, Make] = {
    "schools": eight_schools,
    "logistic-5000x50": partial(logistic, 5000, 50),
    "logistic-20000x100": partial(logistic, 20000, 100),
    "horseshoe": horseshoe,
}
TRAINED: dict[str, Make] = {"mlp-64": RUNS["mlp-64"], "mlp-256": RUNS["mlp-256"], "logistic": RUNS["logistic"]}


def short_run(
    model: Callable, steps: int, eta: float, compile: bool = False, **options: Any
) -> tuple[ShortRunGuide, ELBO]:
    """As a user makes it, with a step size that is tuned."""
    options = {"start": Prior(), "objective": PathDensity(), **options}
    return ShortRunGuide(model, num_steps=steps, step_size=StepSize(eta), compile=compile, **options), ShortRunELBO()


def annealed(
    model: Callable, steps: int, eta: float, compile: bool, start: Any, particles: int = 1
) -> tuple[ShortRunGuide, ELBO]:
    """The bound and the start that AutoDAIS has."""
    return short_run(model, steps, eta, compile, objective=Annealed(), start=start)[0], ShortRunELBO(particles)


def diagonal(model: Callable, *numbers: Any, particles: int = 1) -> tuple[ShortRunGuide, ELBO]:
    return annealed(model, *numbers, start=AutoDiagonalNormal(model), particles=particles)


def auto(kind: type[AutoGuide]) -> Factory:
    """One of Pyro's own guides, with its own loss."""
    return lambda model, *numbers: (kind(model), Trace_ELBO())


# What is compared with AutoDAIS: from a model, a number of steps, a step size and `compile`.
Factory = Callable[..., tuple[Any, ELBO]]
CONFIGURATIONS: dict[str, Factory] = {
    "annealed": diagonal,
    "annealed, 16 particles": partial(diagonal, particles=16),
    "annealed, eager": lambda model, steps, eta, compile: diagonal(model, steps, eta, False),
    "path density": short_run,
    "AutoNormal": auto(AutoNormal),
    "AutoDiagonalNormal": auto(AutoDiagonalNormal),
    "AutoMultivariateNormal": auto(AutoMultivariateNormal),
}


@dataclass(frozen=True)
class Budget:
    """How long to run.

    :param rounds: at most, ``seconds`` a row once there are three.
    :param least: seconds of a contender in a round; shorter calls are repeated.
    :param memory: numbers of steps and batches; ``memory_tuned``: the same, tuned.
    :param growth: rows, columns and numbers of steps of a logistic regression.
    """

    steps: int = 20
    rounds: int = 25
    seconds: float = 12.0
    least: float = 0.01
    consecutive: int = 20
    compile: bool = True
    runs: Sequence[str] = tuple(RUNS)
    tuned: Sequence[str] = tuple(TUNED)
    trained: Sequence[str] = tuple(TRAINED)
    memory: tuple[Sequence[int], Sequence[int]] = ((10, 40, 160), (64, 256, 1024))
    memory_tuned: tuple[Sequence[int], Sequence[int]] = ((10, 40, 160), (16, 64))
    growth: tuple[Sequence[int], Sequence[int], Sequence[int]] = (
        (1000, 4000, 16000, 64000),
        (20, 80, 320),
        (10, 20, 40, 80),
    )


QUICK = Budget(
    rounds=7,
    seconds=3.0,
    tuned=("schools", "logistic-5000x50"),
    trained=("mlp-64", "logistic"),
    memory=((10, 160), (64, 1024)),
    memory_tuned=((10, 40), (16, 64)),
    growth=((1000, 16000), (20, 80), (20, 80)),
)
SMOKE = Budget(
    steps=2,
    rounds=2,
    seconds=0.0,
    least=0.0,
    consecutive=2,
    compile=False,
    runs=("schools",),
    tuned=("schools",),
    trained=(),
    memory=((2,), (4,)),
    memory_tuned=((2,), (4,)),
    growth=((20, 40), (2,), (2,)),
)


# ---------------------------------------------------------------- time


def here(fn: Callable[[], Any], device: str) -> Timed:
    """Seconds of calls in this process."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def seconds(calls: int) -> float:
        wait()
        begin = time.perf_counter()
        for _ in range(calls):
            fn()
            wait()
        return time.perf_counter() - begin

    return seconds


def interleave(contenders: dict[str, Timed], budget: Budget) -> Rounds:
    """Each contender once in turn, in every round; they are warm already."""
    calls = {name: max(1, math.ceil(budget.least / timed(1))) for name, timed in contenders.items()}
    rounds: list[list[float]] = []
    begin = time.perf_counter()
    while len(rounds) < budget.rounds and (len(rounds) < 3 or time.perf_counter() - begin < budget.seconds):
        rounds.append([])
        for name, timed in contenders.items():
            time.sleep(0.002)  # the threads of the one before spin for a while before they sleep
            rounds[-1].append(timed(calls[name]) / calls[name])
    return dict(zip(contenders, np.array(rounds).T, strict=True))


def milliseconds(rounds: Rounds, name: str) -> str:
    return f"{1000 * np.median(rounds[name]):.3g}" if name in rounds else "-"


def ratio(rounds: Rounds, ours: str, other: str) -> str:
    """Median of the ratios within rounds."""
    return f"{np.median(rounds[ours] / rounds[other]):.2f}" if other in rounds and ours in rounds else "-"


def aligned(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table whose columns are as wide as they need be."""
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]
    forms = {
        name: f">{width + 1}s" if i else f"{width}s" for i, (name, width) in enumerate(zip(head, widths, strict=True))
    }
    return Table(title, forms, [list(row) for row in rows])


# ---------------------------------------------------------------- runs


def attempt(what: str, prepare: Callable[[], Any]) -> Any:
    """None, and a note, where a contender cannot do it."""
    try:
        return prepare()
    except Exception as reason:  # torch.compile and JAX raise whatever they meet
        tqdm.write(f"{what} left out: {str(reason).strip().splitlines()[0]}", file=sys.stderr)
        return None


OTHERS = ("eager", "Pyro", "PyTorch", "+compile", "JAX")
COMPILED = ("ours", "+compile", "JAX")


def ours(case: Case, steps: int, compile: bool) -> Callable[[], Any]:
    dynamics = Langevin(StepSize(case.step_size, learnable=False))
    guide = ShortRunGuide(case.model, num_steps=steps, dynamics=dynamics, start=Prior(), compile=compile)
    return lambda: guide.sample_posterior(*case.args, num_samples=1)


def gradient(case: Case, u: Tensor) -> Tensor:
    return torch.func.grad(case.log_joint)(u, *case.inputs)


def agree(name: str, found: Tensor, expected: Tensor) -> None:
    """Both are gradients of one log joint, or the comparison is void."""
    tolerance = 1e-3 * expected.abs().max().item()
    if not torch.allclose(found.flatten().cpu(), expected.flatten().cpu(), rtol=1e-3, atol=tolerance):
        raise AssertionError(f"{name}: the log joint written by hand is not the model's")


def run_row(name: str, case: Case, budget: Budget, device: str, jax: Jax | None) -> list[str]:
    """Time 20 steps."""
    steps = budget.steps
    state = 0.3 * torch.randn_like(case.draw())
    expected = gradient(case, state)
    _, potential, transforms, _ = initialize_model(case.model, case.args)
    grads, _ = potential_grad(potential, case.unpack(state))
    agree(name, -case.pack(grads), expected)
    runs = {
        "ours": ours(case, steps, True),
        "eager": ours(case, steps, False),
        "Pyro": pyro_loop(case, steps, potential, transforms),
        "PyTorch": torch_loop(case, steps, False),
    }
    if budget.compile:
        runs["+compile"] = torch_loop(case, steps, True)
    contenders, first = {}, {}
    for contender, run in runs.items():
        timed = here(run, device)
        seconds = attempt(f"{name}: {contender}", partial(timed, 1))
        if seconds is not None:
            contenders[contender], first[contender] = timed, f"{seconds:.1f}"
    if jax is not None:
        options = {"steps": steps, "step_size": case.step_size}
        seconds = attempt(f"{name}: JAX", partial(jax.prepare, "run", case, state, **options))
        if seconds is not None:
            agree(f"{name}, JAX", torch.from_numpy(jax.gradient()), expected)
            contenders["JAX"], first["JAX"] = jax.seconds, f"{seconds:.1f}"
    rounds = interleave(contenders, budget)
    ratios = [ratio(rounds, "ours", other) for other in OTHERS]
    return [name, milliseconds(rounds, "ours"), *ratios, *(first.get(c, "-") for c in COMPILED)]


def rows_of(known: dict[str, Make], wanted: Iterable[str], device: str, title: str) -> Iterable[tuple[str, Case]]:
    """The cases, made one after another, each from the same seed and with an empty parameter store."""
    for name in tqdm([n for n in known if n in wanted], desc=title):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        torch.compiler.reset()
        gc.collect()
        yield name, known[name](device)


def runs_table(budget: Budget, device: str, jax: Jax | None) -> list[Table]:
    cases = rows_of(RUNS, budget.runs, device, "runs")
    rows = [run_row(name, case, budget, device, jax) for name, case in cases]
    head = ["model", "ours ms", *(f"/{other}" for other in OTHERS), *(f"1st s {c}" for c in COMPILED)]
    return [aligned(f"Runs of {budget.steps} steps: ours (compiled) over others; seconds of first calls", head, rows)]


# ---------------------------------------------------------------- SVI


def training(case: Case, guide: Any, elbo: ELBO, consecutive: int, device: str) -> Timed:
    """Steps of SVI, ``consecutive`` in each call, with a parameter store of their own: names would clash."""
    kind = ShortRunSVI if isinstance(guide, ShortRunGuide) else SVI
    svi = kind(case.model, guide, pyro.optim.Adam({"lr": 0.001}), elbo)
    store = pyro.get_param_store()
    state: dict = {"params": {}, "constraints": {}}

    def several() -> None:
        for _ in range(consecutive):
            svi.step(*case.args)

    timed = here(several, device)

    def seconds(calls: int) -> float:
        with store.scope(state):
            return timed(calls)

    return seconds


def svi_rows(name: str, case: Case, budget: Budget, device: str, jax: Jax | None) -> list[list[str]]:
    """A row for each contender."""
    contenders: dict[str, Timed] = {}
    first: dict[str, str] = {}
    for label, factory in CONFIGURATIONS.items():
        pyro.clear_param_store()
        guide, elbo = factory(case.model, budget.steps, case.step_size, budget.compile)
        contenders[label] = training(case, guide, elbo, 1, device)
        begin = time.process_time() + time_of_children()
        contenders[label](3)  # the first is eager
        first[label] = f"{time.process_time() + time_of_children() - begin:.1f}"
        contenders[label](_WARM)
    if jax is not None:
        state = case.draw()
        seconds = attempt(f"{name}: AutoDAIS", partial(jax.prepare, "svi", case, state, steps=budget.steps))
        if seconds is not None:
            contenders["AutoDAIS (NumPyro)"], first["AutoDAIS (NumPyro)"] = jax.seconds, f"{seconds:.1f}"
    rounds = interleave(contenders, budget)
    return [[name, c, milliseconds(rounds, c), ratio(rounds, c, "AutoDAIS (NumPyro)"), first[c]] for c in contenders]


def time_of_children() -> float:
    """CPU seconds of what this process had others do: the C++ compiler."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def training_row(name: str, case: Case, budget: Budget, device: str) -> list[str]:
    contenders: dict[str, Timed] = {}
    for label, objective in (("path density", PathDensity), ("annealed", Annealed)):
        for every in (10, 10**9):  # in between, log q has the log-determinants of the last tuned step
            options: Any = dict(tune_every=every, objective=objective())
            guide, elbo = short_run(case.model, budget.steps, case.step_size, True, **options)
            contenders[f"{label} {every}"] = training(case, guide, elbo, budget.consecutive, device)
    for timed in contenders.values():
        timed(1)  # compiles; the steps that come later are tuned at 1, 11, 21, ...
    rounds = {k: v / budget.consecutive for k, v in interleave(contenders, budget).items()}
    cells = [name]
    for label in ("path density", "annealed"):
        tenth, never = f"{label} 10", f"{label} {10**9}"
        cells += [milliseconds(rounds, tenth), milliseconds(rounds, never), ratio(rounds, tenth, never)]
    return cells


def svi_tables(budget: Budget, device: str, jax: Jax | None) -> list[Table]:
    tuned = rows_of(TUNED, budget.tuned, device, "SVI")
    rows = [row for name, case in tuned for row in svi_rows(name, case, budget, device, jax)]
    head = ["model", "step", "ms", "/AutoDAIS", "1st CPU s"]
    first = aligned(f"SVI steps that tune (K = {budget.steps}) beside AutoDAIS and Pyro's guides", head, rows)
    trained = rows_of(TRAINED, budget.trained, device, "training")
    rows = [training_row(name, case, budget, device) for name, case in trained]
    head = [
        "model",
        *(h for c in ("path density", "annealed") for h in (f"{c}: every 10th ms", f"{c}: never ms", f"{c}: ratio")),
    ]
    title = f"Training steps, mean of {budget.consecutive} in a row: tuned in every tenth over never tuned"
    return [first, aligned(title, head, rows)]


# ---------------------------------------------------------------- memory


MMAP_THRESHOLD = -3  # of glibc's mallopt


def status(key: str) -> int:
    """Bytes of ``VmRSS`` (resident now) or ``VmHWM`` (its peak)."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in text.splitlines() if line.startswith(key)).split()[1])


def peak(work: Callable[[], Any], device: str) -> float:
    """Bytes that a second call needs beyond what was resident before it."""
    work()
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # gives back what the first call left free
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def memory_cell(steps: int, batch: int, mode: str, threads: int, device: str) -> str:
    """Megabytes; to be called in a process of its own, where nothing else was allocated."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    try:
        if device == "cpu":  # large blocks go back to the system at once: holes in the heap are not what a run needs
            ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 2**16)
        if mode == "tuned":
            case = mlp(batch, device, latent=5)
            guide, elbo = short_run(case.model, steps, case.step_size)
            timed = training(case, guide, elbo, 1, device)
            return f"{peak(partial(timed, 1), device) / 1e6:.1f}"
        case = mlp(batch, device)
        work = torch_loop(case, steps, False) if mode == "PyTorch" else ours(case, steps, False)
        return f"{peak(work, device) / 1e6:.1f}"
    except (OSError, AttributeError):  # not Linux
        return "-"


def memory_tables(budget: Budget, device: str, threads: int) -> list[Table]:
    wanted = [(mode, grid) for mode, grid in (("ours", budget.memory), ("PyTorch", budget.memory), ("tuned",
              budget.memory_tuned))]  # fmt: skip
    cells = [(k, batch, mode) for mode, (ks, batches) in wanted for batch in batches for k in ks]
    found = {}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pyro.infer", "arviz"])  # imported once: most of what starting a process takes
    with context.Pool(1, maxtasksperchild=1) as pool:
        for cell in tqdm(cells, desc="memory"):
            found[cell] = pool.apply(memory_cell, (*cell, threads, device))
    tables = []
    for mode, (ks, batches) in wanted:
        what = {"ours": "a run, ours", "PyTorch": "a run, PyTorch by hand", "tuned": "an SVI step that tunes, d = 5"}
        rows = [[f"batch {batch}", *(found[k, batch, mode] for k in ks)] for batch in batches]
        tables.append(
            aligned(f"Peak memory, MB above resident: mlp, {what[mode]}", ["", *(f"K={k}" for k in ks)], rows)
        )
    return tables


# ---------------------------------------------------------------- growth


def growth_table(budget: Budget, device: str) -> list[Table]:
    numbers, columns, steps = budget.growth
    n, d, k = numbers[0], columns[0], budget.steps
    series = [
        ("N", [(i, d, k) for i in numbers]),
        ("d", [(n, i, k) for i in columns]),
        ("K", [(n, d, i) for i in steps]),
    ]
    lines = []
    for letter, sizes in tqdm(series, desc="growth"):
        pyro.clear_param_store()
        torch.compiler.reset()
        contenders: dict[str, Timed] = {}
        for size in sizes:
            pyro.set_rng_seed(0)
            case = logistic(*size[:2], device)
            for compile in (False, True)[: 1 + budget.compile]:
                contenders[f"{size}{compile}"] = here(ours(case, size[2], compile), device)
                contenders[f"{size}{compile}"](1)
        rounds = interleave(contenders, budget)
        for before, size in zip([None, *sizes], sizes, strict=False):
            cells = [f"{letter}={size['NdK'.index(letter)]}"]
            for compile in (False, True):
                name = f"{size}{compile}"
                cells += [milliseconds(rounds, name), ratio(rounds, name, f"{before}{compile}")]
            lines.append(cells)
    title = f"Growth of a run, logistic regression (else N = {n}, d = {d}, K = {k}): ms, and over the line above"
    return [aligned(title, ["", "eager ms", "eager ratio", "compiled ms", "compiled ratio"], lines)]


# ---------------------------------------------------------------- all of it


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = ["runs", "svi", "memory", "growth"]
    parser.add_argument("--quick", action="store_true", help="some minutes: fewer rounds and sizes")
    parser.add_argument("--smoke", action="store_true", help="seconds only")
    parser.add_argument("--tables", nargs="+", choices=tables, default=tables, help="default: all")
    parser.add_argument("--only", nargs="+", choices=sorted({*RUNS, *TUNED}), help="rows of runs and svi")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch, and cores of JAX (default: 2)")
    parser.add_argument("--jax-python", default=sys.executable, help="a Python that has jax and numpyro")
    parser.add_argument("--output", type=Path, help="folder for speed.txt and results.json")
    return parser.parse_args()


def measure(options: argparse.Namespace, budget: Budget, jax: Jax | None) -> Iterable[Table]:
    """The tables, one after another."""
    device = options.device
    if "runs" in options.tables:
        yield from runs_table(budget, device, jax)
    if "svi" in options.tables:
        yield from svi_tables(budget, device, jax)
    if "memory" in options.tables:
        yield from memory_tables(budget, device, options.threads)
    if "growth" in options.tables:
        yield from growth_table(budget, device)


def main() -> None:
    options = parse()
    budget = SMOKE if options.smoke else QUICK if options.quick else Budget()
    if options.only:
        named = {k: [n for n in getattr(budget, k) if n in options.only] for k in ("runs", "tuned", "trained")}
        budget = replace(budget, **named)
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")  # the compiler's own
    torch.backends.cudnn.allow_tf32 = False  # float32 for all
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # cold, for honest first calls
        torch.compile(torch.exp)(torch.ones(2))  # loads the compiler, which is not to count as the first row's
        jax = None
        try:
            jax = Jax(options.jax_python, options.device, options.threads, folder)
            versions = f"jax {jax.versions['jax']}, numpyro {jax.versions['numpyro']} ({jax.versions['device']})"
        except (RuntimeError, OSError) as reason:
            versions = f"without JAX ({reason})"
        lines = [f"torch {torch.__version__}, pyro {pyro.__version__}, {versions}; {options.threads} threads"]
        print(lines[0])
        tables = []
        for table in measure(options, budget, jax):
            lines += ["", table.title, *table.lines()]
            print("\n".join(["", table.title, *table.lines()]), flush=True)
            tables.append(table)
        if jax is not None:
            jax.close()
    record(options.output, tables, None if jax is None else {k: jax.versions[k] for k in ("jax", "numpyro")})
    if options.output is not None:
        (options.output / "speed.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
