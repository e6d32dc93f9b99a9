"""Operations in another form give the same."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_shortrun.compile import inductor
from pyro_shortrun.compile.graph import Live, trace
from pyro_shortrun.compile.rewrites import rewrite
from pyro_shortrun.compile.scan import Scan
from pyro_shortrun.density.recurrence import Recurrence


@pytest.mark.parametrize(
    ("shape", "dim", "is_rewritten"), [((5,), 0, True), ((2, 5), -1, True), ((2, 5), 0, False), ((70,), 0, False)]
)
def test_cumulative_sums(shape, dim, is_rewritten):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    x.view(-1)[-1] = float("inf")  # must not spoil what comes before
    module = make_fx(lambda x: (x.cumsum(dim),))(x)
    rewrite(module)
    assert ("cumsum" not in module.code) is is_rewritten
    torch.testing.assert_close(module(x)[0], x.cumsum(dim))


@pytest.mark.parametrize(
    ("turn", "is_transposed"),
    [
        (lambda x: x.t(), True),
        (lambda x: x.permute(-1, 0), True),
        (lambda x: x.transpose(0, -1), True),
        (lambda x: x.permute(0, 1), False),
        (lambda x: x.permute(-2, 1), False),
        (lambda x: x.transpose(1, 1), False),
    ],
    ids=["t", "permute", "transpose", "as it is", "as it is, from the end", "with itself"],
)
def test_products_with_large_transposed_matrices(turn, is_transposed):
    torch.manual_seed(0)
    x, r = torch.randn(400, 60, dtype=torch.float64), torch.randn(400 if is_transposed else 60, dtype=torch.float64)
    module = make_fx(lambda x, r: (torch.mv(turn(x), r),))(x, r)
    rewrite(module)
    assert ("aten.mv" not in module.code) is is_transposed
    torch.testing.assert_close(module(x, r)[0], turn(x) @ r)


def test_small_buffers_of_loops_are_on_the_stack(monkeypatch):
    """That is: what is written for them compiles, and nothing else is tried."""

    def refuse() -> None:
        raise AssertionError

    def block(u, eta):
        means = []
        for step in eta:
            u = u + step * (u.softmax(-1) - u.logsumexp(-1, keepdim=True))
            means.append(u.mean())
        return u, torch.stack(means)

    monkeypatch.setattr(inductor, "nullcontext", refuse)
    given = torch.randn(2, 6), torch.rand(4, 1)
    module, constants = trace(Scan(block, Recurrence(1, 1)), given, Live({}, ()))
    run = inductor.Inductor().build(module, [*given, *constants])
    for found, known in zip(run(*given, *constants), block(*given), strict=True):
        torch.testing.assert_close(found, known)
    again = [t.clone() for t in run(*given, *constants)]
    assert all(torch.equal(a, b) for a, b in zip(again, run(*given, *constants), strict=True))


def test_threads_that_compile_leave_inductor_as_it_was():
    from torch._inductor.codegen.common import device_codegens

    from pyro_shortrun.compile.stack import on_the_stack

    def enter() -> None:
        with on_the_stack():
            entered.set()

    with on_the_stack():
        pass
    known, entered, other = device_codegens["cpu"], threading.Event(), threading.Thread(target=enter)
    with on_the_stack():
        other.start()
        assert not entered.wait(0.05)  # while this one is within
    other.join()
    assert entered.is_set() and device_codegens["cpu"] is known


def test_factorisations_that_fail_give_nan():
    """In a batch, those alone."""
    good = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    both = torch.stack([good, -good])
    module = make_fx(lambda a: (torch.linalg.cholesky(a).sum((-2, -1)),))(torch.stack([good, good]))
    rewrite(module)
    assert "_linalg_check_errors" not in module.code
    (found,) = module(both)
    assert found[0] == torch.linalg.cholesky(good).sum() and found[1].isnan()


def test_loops_with_factorisations_compile():
    covariance = torch.tensor([[1.0, 0.9], [0.9, 1.0]])

    def block(u, eta):
        means = []
        for step in eta:
            u = u - step * (u @ torch.linalg.cholesky(covariance))
            means.append(u.mean())
        return u, torch.stack(means)

    given = torch.randn(3, 2), torch.rand(4, 1)
    module, constants = trace(Scan(block, Recurrence(1, 1)), given, Live({}, ()))
    run = inductor.Inductor().build(module, [*given, *constants])
    for found, known in zip(run(*given, *constants), block(*given), strict=True):
        torch.testing.assert_close(found, known)
