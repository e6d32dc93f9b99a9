"""Affine coordinates: the same density in them, by every way of asking."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch

from pyro_shortrun.compile.compiler import Compiler
from pyro_shortrun.compile.executor import density_of
from pyro_shortrun.density.affine import Affine, AffineDensity
from pyro_shortrun.density.call import Call
from pyro_shortrun.dynamics import Langevin
from pyro_shortrun.objectives import Annealed, PathDensity
from pyro_shortrun.runs.run import Gradients, run
from pyro_shortrun.starts.base import GaussianBase
from pyro_shortrun.starts.start import StartDraw


def frame() -> Affine:
    return Affine(torch.tensor([1.0, -2.0, 0.5]), torch.tensor([[2.0, 0, 0], [0.5, 0.1, 0], [-1.0, 0.3, 5.0]]))


def model():
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    b = pyro.sample("b", dist.HalfCauchy(1.0))
    with pyro.plate("data", 3):
        pyro.sample("y", dist.StudentT(4.0, a, b), obs=torch.tensor([0.3, 1.0, -2.0]))
    pyro.sample("c", dist.Normal(a * b, 1.0))


def densities(compiles: bool = False):
    call = Call.of(model, (), {}).jointly()
    density = density_of(call.model, Compiler() if compiles else None)
    return density, AffineDensity(density, frame())


def test_there_and_back():
    v = torch.randn(4, 2, 3)
    assert torch.allclose(frame().inward(frame().outward(v)), v)
    jacobian = torch.autograd.functional.jacobian(frame().outward, v[0, 0])
    assert torch.allclose(torch.linalg.slogdet(jacobian).logabsdet, frame().log_scale)


def test_value_gradient_and_hessian_are_those_of_the_density_changed_by_hand():
    inner, density = densities()
    v = torch.randn(5, 1, 3, requires_grad=True)
    value, grad = density.value_and_grad(v, create_graph=True)
    by_hand = inner(frame().outward(v)) + frame().log_scale
    (expected,) = torch.autograd.grad(by_hand.sum(), v, create_graph=True)
    assert torch.allclose(value, by_hand) and torch.allclose(grad, expected)
    assert all(torch.allclose(a, b) for a, b in zip(density.value_and_grad(v), (value, grad), strict=True))
    vectors = torch.randn(2, 5, 1, 3)
    products = density.hessian_product(v, grad, create_graph=False)(vectors)
    columns = [torch.autograd.grad(expected, v, w, retain_graph=True)[0] for w in vectors]
    assert torch.allclose(products, torch.stack(columns))
    for name in ("land", "with_start"):
        first, *rest = getattr(density, name)(v.detach())
        known, *others = getattr(inner, name)(frame().outward(v.detach()))
        assert torch.allclose(first, known + frame().log_scale)
        scale = frame().log_scale if name == "with_start" else 0
        assert all(torch.allclose(a, b + scale) for a, b in zip(rest, others, strict=True))


def steps(density, gradients=Gradients.NONE):
    pyro.set_rng_seed(1)
    base = GaussianBase(torch.zeros(1, 3, requires_grad=True), torch.eye(3).unsqueeze(0).requires_grad_())
    v, terms = base.draw(6)
    start = StartDraw(v, terms.sum(-1), density(v.detach()), base)
    objective, eta = Annealed(learnable=False), torch.full((4, 3), 0.05, requires_grad=True)
    objective.setup(4, density.layout, v)
    result = run(density, Langevin(), objective, start, eta, gradients=gradients)
    if gradients is Gradients.NONE:
        return result.end, result.increment
    loss = (result.end.sum(-1) + result.increment).sum()
    return result.end, result.increment, *torch.autograd.grad(loss, [eta, base.loc, base.scale])


def test_compiled_runs_are_the_eager_ones():
    for gradients in (Gradients.NONE, Gradients.GUIDE):
        eager, compiled = (steps(densities(compiles)[1], gradients) for compiles in (False, True))
        assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(eager, compiled, strict=True))


def test_a_run_outside_is_the_run_inside():
    _, density = densities()
    pyro.set_rng_seed(2)
    v = 0.1 * torch.randn(4, 1, 3)
    inside = run(density, Langevin(), PathDensity(), v, torch.full((3, 3), 0.01), keep_states=True)
    outside = inside.outside(frame())
    assert torch.allclose(outside.states[-1], outside.end) and torch.allclose(outside.states[0], frame().outward(v))
    assert torch.allclose(outside.landed[0], densities()[0](outside.end))
    assert torch.equal(outside.increment, inside.increment)
    assert math.isclose(outside.info.log_density[0], densities()[0](frame().outward(v)).mean().item(), rel_tol=1e-6)
