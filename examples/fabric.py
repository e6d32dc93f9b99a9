"""Data-parallel training with Lightning Fabric: the loss of ``distributed.py``, set up and launched by Fabric.

    python examples/fabric.py --ranks 2                  # two processes on the CPU (gloo)
    python examples/fabric.py --accelerator cuda --ranks 8
    python examples/fabric.py --smoke                    # seconds, to see that it runs

Fabric wraps any ``nn.Module``: here one whose ``forward`` is minus the bound per datum, of generator and guide
together. First the gradient that Fabric averages over ranks is compared with that of one process on all data; then it
trains, each rank with a random generator of its own, through a data loader that Fabric splits among the ranks.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyro
import torch
from distributed import PIXELS, Loss, gradients, random, repeatable
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset


def difference(fabric: Fabric, x: Tensor, hidden: int) -> float:
    """Between the averaged gradient and that of one process, over the largest component."""
    torch.manual_seed(0)
    alone = Loss(hidden, repeatable(), x)
    alone(x).backward()
    pyro.clear_param_store()  # Pyro knows parameters by name, and the second copy's have the same
    shared = Loss(hidden, repeatable(), x)
    shared.load_state_dict(alone.state_dict())
    parallel = fabric.setup(shared)
    fabric.backward(parallel(x.chunk(fabric.world_size)[fabric.global_rank]))
    wanted = gradients(alone)
    return float((gradients(shared) - wanted).abs().max() / wanted.abs().max())


def train(fabric: Fabric, x: Tensor, options: argparse.Namespace) -> list[float]:
    """The bound per datum, mean over ranks, of every epoch."""
    torch.manual_seed(0)
    pyro.clear_param_store()
    loss = Loss(options.hidden, random(), x[: options.batch])
    parallel, optimiser = fabric.setup(loss, torch.optim.Adam(loss.parameters(), lr=1e-3))
    batches = fabric.setup_dataloaders(DataLoader(TensorDataset(x), options.batch, shuffle=True, drop_last=True))
    torch.manual_seed(1 + fabric.global_rank)  # every rank draws its own noise
    bounds = []
    for epoch in range(options.epochs):
        if hasattr(batches.sampler, "set_epoch"):  # more than one rank
            batches.sampler.set_epoch(epoch)
        total = x.new_zeros(())
        for (part,) in batches:
            optimiser.zero_grad()
            value = parallel(part)
            fabric.backward(value)
            optimiser.step()
            total += value.detach()
        bounds.append(-float(fabric.all_reduce(total / len(batches))))
    return bounds


def work(fabric: Fabric, options: argparse.Namespace) -> None:
    """One rank."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(2)
    mixing = torch.randn(8, PIXELS, device=fabric.device)
    x = torch.randn(options.rows, 8, device=fabric.device) @ mixing / 8**0.5
    found = difference(fabric, x[: 4 * fabric.world_size], options.hidden)
    bounds = train(fabric, x, options)
    lines = [
        f"gradient of {fabric.world_size} ranks against one process: {found:.1e} of the largest component",
        *(f"epoch {i}: bound {bound:.2f} nats per datum" for i, bound in enumerate(bounds)),
    ]
    fabric.print("\n".join(lines))
    if fabric.is_global_zero:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "fabric.txt").write_text("\n".join(lines) + "\n")
    if not found < 1e-10:
        raise AssertionError(f"the averaged gradient is not that of all data: {found:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--accelerator", default="cpu", help="Fabric's name of the hardware (default: cpu)")
    parser.add_argument("--rows", type=int, default=4096, help="data (default: 4096)")
    parser.add_argument("--batch", type=int, default=128, help="data per rank and step (default: 128)")
    parser.add_argument("--hidden", type=int, default=256, help="hidden units (default: 256)")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the data (default: 10)")
    parser.add_argument("--smoke", action="store_true", help="seconds only")
    parser.add_argument("--output", type=Path, default=Path("fabric-output"), help="folder for fabric.txt")
    options = parser.parse_args()
    if options.smoke:
        options.rows, options.batch, options.hidden, options.epochs = 32, 8, 16, 2
    strategy = DDPStrategy(start_method="spawn") if options.ranks > 1 else "auto"
    fabric = Fabric(accelerator=options.accelerator, devices=options.ranks, strategy=strategy, precision="64-true")
    fabric.launch(work, options)


if __name__ == "__main__":
    main()
