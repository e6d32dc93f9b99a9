"""Single precision gives what double precision gives, on every program of the zoo: the same states and the same noise.

(Far out in a prior it does not: probabilities there round to 1.)
"""

from __future__ import annotations

from collections.abc import Mapping

import pyro
import pytest
import torch
from torch import Tensor
from zoo import CASES, EXTRA, Case

from pyro_shortrun import Langevin, PathDensity
from pyro_shortrun.density import Binder, Call, Program
from pyro_shortrun.objectives import Exact
from pyro_shortrun.runs import ShortRun, run

STEPS, CHAINS = 3, 2
TOLERANCE = 1000 * torch.finfo(torch.float32).eps
CONDITION = {"gp_regression": 10.0}  # of the covariance of a Gaussian process, which rounding is multiplied by
SLOW = {"dmm", "gamma_def"}  # exact determinants of many coordinates


def call_of(case: Case, dtype: torch.dtype, indices: Mapping[str, Tensor] | None = None) -> Call:
    torch.set_default_dtype(dtype)
    pyro.clear_param_store()
    model, args = case.make()
    program = Program(model)
    return Binder(program)(program.draw(args, {}, indices), args, {})


def short(call: Call, begin: Tensor, noise: Tensor, account: bool) -> tuple[Tensor, Tensor, ShortRun]:
    """Log density and gradient where runs begin, and runs whose steps are short there."""
    dtype = torch.get_default_dtype()
    u = begin.to(dtype)
    value, grad = call.density.value_and_grad(u)
    eta = torch.full((STEPS, u.shape[-1]), min(1e-4, 1e-2 / grad.abs().max().double().item()), dtype=dtype)
    done = run(call.density, Langevin(1e-4), PathDensity(Exact()), u, eta, noise.to(dtype), account=account)
    return value, grad, done


def close(single: Tensor, double: Tensor, tolerance: float, size: float = 1.0) -> None:
    """Within rounding, in units of two sizes."""
    assert single.dtype == torch.float32 and double.dtype == torch.float64
    assert (single.double() - double).abs().max() <= tolerance * (size + double.abs().max())


@pytest.mark.parametrize("case", CASES + EXTRA, ids=lambda c: c.name)
def test_runs_in_single_precision_are_those_in_double(case):
    account = case.name not in SLOW
    call = call_of(case, torch.float64)
    begin = 4 * torch.rand_like(call.prior(1 if case.discrete else CHAINS)).float() - 2  # as Pyro initialises
    noise = torch.randn(STEPS, *begin.shape).float()
    indices = {name: plate.clone() for name, plate in call.bind.indices.items()}
    value, grad, exact = short(call, begin, noise, account)
    rounded = short(call_of(case, torch.float32, indices), begin, noise, account)
    tolerance = TOLERANCE * CONDITION.get(case.name, 1.0)
    close(rounded[0], value, tolerance)
    close(rounded[1], grad, tolerance, size=value.abs().max().item())
    close(rounded[2].end, exact.end, tolerance)
    close(rounded[2].increment, exact.increment, tolerance)
    assert not exact.info.frozen.any() and torch.equal(rounded[2].info.frozen, exact.info.frozen)
