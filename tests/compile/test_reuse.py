"""What the way back takes from the way there, and which nodes count as the same value."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal
from torch import Tensor
from torch._higher_order_ops.scan import scan_op
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_shortrun import Annealed, Langevin, ShortRunELBO, ShortRunGuide, StepSize
from pyro_shortrun.compile import Compiler, Untouched, reuse
from pyro_shortrun.compile.values import Values


class Looking(Untouched):
    """Keeps the graph."""

    module: GraphModule

    def build(self, module: GraphModule, inputs: list[Tensor]) -> Any:
        self.module = module
        return super().build(module, inputs)

    @property
    def products(self) -> list[int]:
        """Numbers of products with a matrix in the steps of each loop."""
        loops = [n for n in self.module.graph.nodes if n.target is scan_op]
        steps = [getattr(self.module, n.args[0].target) for n in loops]
        return [sum("aten.mv" in str(n.target) for n in step.graph.nodes) for step in steps]


def regression(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(x.new_zeros(3), 10.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


def loss_and_gradients(compile: bool) -> tuple[Looking, float, dict[str, Tensor]]:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    data = torch.randn(7, 3), torch.randn(7).gt(0).float()
    guide = ShortRunGuide(
        regression,
        num_steps=4,
        dynamics=Langevin(StepSize(0.01)),
        start=AutoDiagonalNormal(regression),
        objective=Annealed(),
    )
    backend = Looking()
    if compile:
        guide._compiler = Compiler(backend)
    for _ in range(3):
        for p in pyro.get_param_store()._params.values():
            p.grad = None
        loss = ShortRunELBO().loss_and_grads(regression, guide, *data)
    grads = {k: p.grad for k, p in pyro.get_param_store()._params.items() if p.grad is not None}
    return backend, loss, grads


@pytest.mark.parametrize(("room", "products"), [(2**24, [2, 2]), (0, [2, 4])], ids=["kept", "no room"])
def test_a_regression_passes_over_its_data_four_times_per_step(room, products, monkeypatch):
    monkeypatch.setattr(reuse, "_NUMBERS_AT_MOST", room)
    backend, loss, grads = loss_and_gradients(compile=True)
    assert backend.products == products
    _, known, expected = loss_and_gradients(compile=False)
    assert loss == pytest.approx(known, rel=1e-5)
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-5)


def test_what_several_nodes_compute_is_written_down_once():
    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x @ w, (x @ w).exp()).to_event(1), obs=x[:, 0])

    guide = ShortRunGuide(
        model, num_steps=4, dynamics=Langevin(StepSize(0.01)), start=AutoDiagonalNormal(model), objective=Annealed()
    )
    backend, x = Looking(), torch.randn(7, 3)
    guide._compiler = Compiler(backend)
    for _ in range(2):
        ShortRunELBO().loss_and_grads(model, guide, x)
    *_, back = (n for n in backend.module.graph.nodes if n.target is scan_op)
    inputs = getattr(backend.module, back.args[0].target).graph.nodes
    kept = [n for n in inputs if n.op == "placeholder" and n.name.startswith("kept")]
    assert len(kept) == 3  # of x @ w, and of x.T with the derivatives in mean and scale


def numbers(fn: Any, *inputs: Tensor) -> tuple[int, ...]:
    """Of what a function of tensors gives."""
    graph = make_fx(fn)(*inputs).graph
    values = Values()
    given = {n: values.number("input", i) for i, n in enumerate(n for n in graph.nodes if n.op == "placeholder")}
    found = values.of_graph(graph, given)
    (end,) = (n for n in graph.nodes if n.op == "output")
    return tuple(found[n] for n in end.args[0])


@pytest.mark.parametrize(
    ("fn", "same"),
    [
        (lambda x: (x.exp(), x.clone().exp()), True),
        (lambda x: (x.exp(), x.detach().expand(2, 3)[:].exp()), True),
        (lambda x: (x.exp(), torch.stack([x, x.sin()], 1)[:, 0].exp()), True),
        (lambda x: (x.exp(), torch.stack([x.sin(), x], 1)[:, 0].exp()), False),
        (lambda x: (x.exp(), torch.stack([x, x], -1).unbind(-1)[1].exp()), True),
        (lambda x: (x.exp(), x.unsqueeze(0).squeeze(0).exp()), True),
        (lambda x: (x.exp(), x.unsqueeze(0)[0].exp()), True),
        (lambda x: (x.t().exp(), x.permute(1, 0).exp()), False),
        (lambda x: (x.exp(), x.permute(-1, 0).exp()), False),
        (lambda x: (x.exp(), x.permute(-2, 1).exp()), True),
        (lambda x: (x.t().as_strided((6,), (1,)), x.t().contiguous().as_strided((6,), (1,))), False),
        (lambda x: (x.float().exp(), torch.stack([x.float(), x.double()])[0].exp()), False),
        (lambda x: (torch.empty_like(x), torch.empty_like(x)), False),
        (lambda x: (x[0].exp(), x[1].exp()), False),
        (lambda x: (torch.zeros_like(x.exp()), torch.zeros_like(x)), True),
        (lambda x: (torch.zeros_like(x), torch.zeros_like(x).add_(1)), False),
        (lambda x: (x.sum(0), x.sum(1)), False),
        (lambda x: (x * 2, x * 2.0), False),
        (lambda x: (torch.rand_like(x), torch.rand_like(x)), False),
    ],
)
def test_the_same_value_has_the_same_number(fn, same):
    a, b = numbers(fn, torch.randn(2, 3))
    assert (a == b) is same


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b[0].fill_(1.0),
        lambda b: b.unbind(0)[1].fill_(1.0),
        lambda b: b.chunk(2)[1].fill_(1.0),
        lambda b: torch.exp(torch.ones(4), out=b),
        lambda b: torch._foreach_add_([b], 1.0),
    ],
    ids=["view", "unbound", "chunk", "out", "list"],
)
def test_what_changes_in_place_is_like_nothing_else(change):
    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = torch.zeros(4), torch.zeros(4)
        change(b)
        return a + x, b + x

    a, b = numbers(fn, torch.randn(4))
    assert a != b
