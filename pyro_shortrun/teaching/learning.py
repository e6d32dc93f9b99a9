"""The energy's own step: maximum likelihood from data and refined samples."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .refiner import evaluating


def learn(
    energy: nn.Module,
    optim: Optimizer | None,
    l2: float,
    observed: tuple[Any, ...],
    refined: tuple[Any, ...],
) -> tuple[float, tuple[float, float]]:
    """A step of the optimiser; the loss, and the mean energies of both.

    :param optim: None for no step.
    :param observed: arguments of the energy: data and contexts.
    :param refined: the same of refined samples.
    :raises ValueError: where the loss, or a gradient, is not finite.
    """
    with torch.set_grad_enabled(optim is not None), nullcontext() if optim is not None else evaluating(energy):
        of_data, of_samples = energy(*observed), energy(*refined)
        loss = of_data.mean() - of_samples.mean()
        if l2:
            loss = loss + l2 * (of_data.square().mean() + of_samples.square().mean())
    if not loss.isfinite():
        raise ValueError("the energy of the data is not finite: it may have diverged. Lower its learning rate.")
    if optim is not None:
        optim.zero_grad()
        loss.backward()
        _check_gradients(energy)
        optim.step()
    return loss.item(), (of_data.mean().item(), of_samples.mean().item())


def _check_gradients(energy: nn.Module) -> None:
    """Refuse a step that would lose the energy."""
    grads: dict[str, Tensor] = {k: p.grad for k, p in energy.named_parameters() if p.grad is not None}
    finite = torch.stack([g.isfinite().all() for g in grads.values()])
    if not finite.all():
        name = list(grads)[int((~finite).nonzero()[0])]
        raise ValueError(
            f"the energy's gradient in parameter '{name}' is not finite (its parameters are as they were): it may "
            "have diverged, or be a function without a derivative there. Lower its learning rate."
        )


def check_optim(energy: nn.Module, optim: Any) -> None:
    """Refuse what is no optimiser of the energy's parameters."""
    if optim is None:
        return
    if not isinstance(optim, Optimizer):
        raise ValueError(
            f"optim must be a torch optimiser of the energy, torch.optim.Adam(energy.parameters()), got {optim!r}."
        )
    if not any(p.requires_grad for p in energy.parameters()):
        raise ValueError("the energy has nothing to train: pass optim=None, which leaves it as it is.")
    held = {id(p) for group in optim.param_groups for p in group["params"]}
    lost = [k for k, p in energy.named_parameters() if p.requires_grad and id(p) not in held]
    if lost:
        raise ValueError(f"optim does not hold the energy's parameter '{lost[0]}': pass energy.parameters() to it.")
