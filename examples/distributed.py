"""Data-parallel training on torch's own engine: every rank runs its own chains on its own data, DDP averages gradients.

    python examples/distributed.py --ranks 2                            # starts the processes itself (gloo, CPU)
    torchrun --nproc-per-node 8 examples/distributed.py                 # or under torchrun (nccl where there are GPUs)
    python examples/distributed.py --smoke                              # seconds, to see that it runs

First the check: with chains that start at the same place, the gradient that DDP averages over ranks is that of one
process on the whole batch, to rounding. Then training, each rank with a random generator of its own, and one line for
this number of ranks: rows per second, milliseconds of a step, of that the averaging, and what it sends.
"""

from __future__ import annotations

import argparse
import os
import socket
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
import torch.distributed as distributed
from pyro.infer.autoguide import init_to_mean
from torch import Tensor, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from pyro_shortrun import Annealed, Init, Langevin, ShortRunELBO, ShortRunGuide, StepSize

LATENTS, PIXELS = 8, 64


class Generator(nn.Module):
    """x | z ~ N(net(z), 0.3^2), z ~ N(0, 1): every datum has latents of its own, so ranks share parameters only."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(LATENTS, hidden), nn.GELU(), nn.Linear(hidden, PIXELS))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENTS), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z), 0.3).to_event(1), obs=x)


class Loss(nn.Module):
    """Minus the bound per datum, as a module that DDP can wrap: parameters of generator and guide alike."""

    def __init__(self, hidden: int, guide_options: dict, x: Tensor) -> None:
        super().__init__()
        self.generator = Generator(hidden).to(x.device)
        self.guide = ShortRunGuide(self.generator.model, num_steps=10, **guide_options).setup(x)
        self.elbo = ShortRunELBO()

    def forward(self, x: Tensor) -> Tensor:
        return self.elbo.differentiable_loss(self.generator.model, self.guide, x) / len(x)


def repeatable() -> dict:
    """Runs that all begin at the same point, but for rounding, and without noise."""
    return {"dynamics": Langevin(StepSize(0.01), noise=False), "start": Init(init_to_mean, scale=1e-14)}


def random() -> dict:
    return {"dynamics": Langevin(StepSize(0.1)), "objective": Annealed()}


def gradients(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def largest_difference(x: Tensor, hidden: int) -> float:
    """Between the gradients of DDP on shards and of one process on all data, over the largest component."""
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(0)
    alone = Loss(hidden, repeatable(), x)
    alone(x).backward()
    pyro.clear_param_store()  # Pyro knows parameters by name, and the second copy's have the same
    shared = Loss(hidden, repeatable(), x)
    shared.load_state_dict(alone.state_dict())
    parallel = DistributedDataParallel(shared)  # must live until the gradients are there
    parallel(x.chunk(ranks)[rank]).backward()
    wanted = gradients(alone)
    return float((gradients(shared) - wanted).abs().max() / wanted.abs().max())


def train(x: Tensor, hidden: int, steps: int) -> tuple[float, float, int]:
    """Seconds of a step, of that the averaging of gradients, and bytes that a rank sends in one."""
    rank = distributed.get_rank()
    torch.manual_seed(0)
    pyro.clear_param_store()
    loss = Loss(hidden, random(), x)
    parallel = DistributedDataParallel(loss)
    optimiser = torch.optim.Adam(parallel.parameters(), lr=1e-3)
    torch.manual_seed(1 + rank)  # every rank draws its own noise
    size = gradients_size(loss)

    def step(module: nn.Module) -> None:
        optimiser.zero_grad()
        module(x).backward()
        optimiser.step()

    def seconds(module: nn.Module) -> float:
        step(module)
        distributed.barrier()
        begin = time.perf_counter()
        for _ in range(steps):
            step(module)
        return (time.perf_counter() - begin) / steps

    together, alone = seconds(parallel), seconds(loss)
    return together, max(together - alone, 0.0), size


def gradients_size(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def work(options: argparse.Namespace) -> None:
    """One rank."""
    gpu = torch.cuda.is_available()
    distributed.init_process_group("nccl" if gpu else "gloo")
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if gpu else torch.device("cpu")
    torch.set_num_threads(1)
    torch.manual_seed(2)
    x = torch.randn(options.rows * ranks, PIXELS, dtype=torch.float64).to(device)
    difference = largest_difference(x, options.hidden)
    shard = x.chunk(ranks)[rank].float()
    torch.set_default_dtype(torch.float32)
    together, averaging, size = train(shard, options.hidden, options.steps)
    if rank == 0:
        lines = [
            f"gradient of {ranks} ranks against one process on all data: {difference:.1e} of the largest component",
            f"{'ranks':>5s} {'rows/rank':>9s} {'rows/s':>9s} {'ms/step':>8s} {'ms averaging':>12s} {'kB sent':>8s}",
            f"{ranks:5d} {options.rows:9d} {ranks * options.rows / together:9.0f} {1e3 * together:8.1f} "
            f"{1e3 * averaging:12.1f} {size / 1024:8.0f}",
        ]
        print("\n".join(lines))
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / f"ranks-{ranks}.txt").write_text("\n".join(lines) + "\n")
    distributed.destroy_process_group()


def spawned(rank: int, ranks: int, port: int, options: argparse.Namespace) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_default_dtype(torch.float64)
    work(options)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes to start, without torchrun (default: 2)")
    parser.add_argument("--rows", type=int, default=256, help="data per rank and step (default: 256)")
    parser.add_argument("--hidden", type=int, default=256, help="hidden units (default: 256)")
    parser.add_argument("--steps", type=int, default=50, help="timed steps of training (default: 50)")
    parser.add_argument("--smoke", action="store_true", help="seconds only")
    parser.add_argument("--output", type=Path, default=Path("distributed-output"), help="folder for the line")
    options = parser.parse_args()
    if options.smoke:
        options.rows, options.hidden, options.steps = 8, 16, 2
    torch.set_default_dtype(torch.float64)
    if "RANK" in os.environ:
        work(options)
    else:
        multiprocessing.spawn(spawned, (options.ranks, free_port(), options), nprocs=options.ranks)


if __name__ == "__main__":
    main()
