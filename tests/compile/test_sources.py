"""What making graphs leaves behind."""

from __future__ import annotations

import torch
from torch.fx import graph_module

from pyro_shortrun.compile import Compiler, Untouched
from pyro_shortrun.compile.graph import Live
from pyro_shortrun.compile.whole import Whole


def test_torch_keeps_no_source_of_graphs():
    kept = graph_module._loader.eval_cache
    before = set(kept)
    x = torch.ones(3)
    whole = Whole.of(lambda: (x.sin() + torch.randn(3),), Live({}, ()), Untouched())
    graph = Compiler(Untouched()).graph("key", "what", lambda u: (u * x,), (x,), Live({}, ()))
    assert set(kept) == before
    assert whole(Live({}, ())) is not None and graph is not None
    assert torch.equal(graph.bind(Live({}, ()))(x)[0], x)
