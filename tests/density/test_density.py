"""The unconstrained log density of a Pyro program against Pyro's own trace, over the zoo and small models."""

from __future__ import annotations

import pytest
import torch
from small import ALL, Bound, bind, close, oracle
from torch import Tensor


@pytest.fixture(params=ALL)
def bound(request: pytest.FixtureRequest) -> Bound:
    model, args = ALL[request.param]()
    return bind(model, *args)


@pytest.fixture
def float64(clean_state: None) -> None:
    """Finite differences mean something in double precision only."""
    torch.set_default_dtype(torch.float64)


def test_rows_sum_to_pyros_log_joint(bound: Bound) -> None:
    u = bound.point()
    expected = oracle(bound, u[0])
    rows = bound.density(u)
    assert rows.shape == (1, bound.density.layout.rows)
    close(rows.sum(), expected.joint + expected.scaled_jacobian)


def test_start_is_the_prior(bound: Bound) -> None:
    u = bound.point()
    expected = oracle(bound, u[0])
    value, prior = bound.density.with_start(u)
    close(value, bound.density(u))
    close(prior.sum(), expected.prior + expected.jacobian)


def test_gradient(float64: None, bound: Bound) -> None:
    density, u = bound.density, bound.point()
    _, grad = density.value_and_grad(u)
    h = 1e-5
    for i in torch.randperm(u.numel())[:4].tolist():
        e = torch.zeros_like(u).view(-1)
        e[i] = h
        slope = (density(u + e.view_as(u)).sum() - density(u - e.view_as(u)).sum()) / (2 * h)
        scale = 1 + grad.abs().max().item() + 1e-3 * abs(density(u).sum().item())
        torch.testing.assert_close(grad.view(-1)[i], slope, rtol=1e-6, atol=1e-7 * scale)


def test_hessian_product(float64: None, bound: Bound) -> None:
    density, h = bound.density, 1e-5
    u = bound.point().requires_grad_()
    vectors = torch.randn((2, *u.shape))
    _, grad = density.value_and_grad(u, create_graph=True)
    products = density.hessian_product(u, grad, create_graph=False)(vectors)
    assert products.shape == vectors.shape
    for v, product in zip(vectors, products, strict=True):
        up, down = density.value_and_grad(u + h * v)[1], density.value_and_grad(u - h * v)[1]
        scale = 1 + grad.abs().max().item() + product.abs().max().item()
        torch.testing.assert_close(product, (up - down) / (2 * h), rtol=1e-6, atol=1e-7 * scale)


@pytest.mark.parametrize("vmap", [True, False], ids=["vmap", "loop"])
def test_chains_are_independent(bound: Bound, vmap: bool) -> None:
    density, u = bound.density, bound.point(chains=3)
    vectorizes = density.structure.vectorizes
    vectorizes.update({} if vmap else {"density": False, "hessian": False})
    vectors = torch.randn((2, *u.shape))

    def everything(u: Tensor, vectors: Tensor) -> list[Tensor]:
        u = u.clone().requires_grad_()
        value, grad = density.value_and_grad(u, create_graph=True)
        products = density.hessian_product(u, grad, create_graph=False)(vectors)
        values, jacobian = density.constrain(u)
        return [value, grad, products.movedim(0, 1), *density.with_start(u), *values.values(), jacobian]

    together = everything(u, vectors)
    apart = [everything(u[c : c + 1], vectors[:, c : c + 1]) for c in range(3)]
    for whole, *parts in zip(together, *apart, strict=True):
        scale = 1 + whole.detach().abs().max()
        close(whole / scale, torch.cat(parts) / scale)
    assert density.structure.summed or vectorizes.get("density", True) == vmap
    assert vectorizes.get("hessian", True) == vmap


def test_constrain_and_unconstrain(bound: Bound) -> None:
    density, u = bound.density, bound.point()
    values, jacobian = density.constrain(u)
    expected = oracle(bound, u[0])
    assert values.keys() == expected.values.keys()
    for name, value in values.items():
        close(value[0], expected.values[name])
    close(jacobian.sum(), expected.jacobian)
    # A transform such as stick-breaking loses some digits on the way back.
    close(density.unconstrain({k: v[0] for k, v in values.items()}), u[0], rtol=1e-7)


def test_rows_do_not_mix(bound: Bound) -> None:
    density, u = bound.density, bound.point()
    rows = density.layout.rows
    before = torch.stack([*density.with_start(u), density.constrain(u)[1]])
    for i in {0, rows // 2, rows - 1} if rows > 1 else ():
        moved = u.clone()
        moved[:, i] += 0.5 * torch.randn(u.shape[-1])
        after = torch.stack([*density.with_start(moved), density.constrain(moved)[1]])
        others = torch.arange(rows) != i
        close(after[..., others], before[..., others])
        masked = before[0, 0, i] == 0
        assert masked or (after[0, :, i] - before[0, :, i]).abs() > 1e-3
