"""States that do not fit, and files that are not whole: named before anything changes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import data, hierarchy, local
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from pyro_shortrun import (
    Annealed,
    Langevin,
    Linearized,
    PathDensity,
    Persistent,
    Prior,
    SemiImplicitGuide,
    ShortRunGuide,
    StepSize,
    load_state,
    save_state,
)
from pyro_shortrun.objectives import Exact, Lanczos


def wider(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def guide(model: Callable = local, **options: Any) -> ShortRunGuide:
    pyro.clear_param_store()
    if "dynamics" not in options:
        options.setdefault("step_size", StepSize(0.3))
    return ShortRunGuide(model, **{"num_steps": 2, "start": Prior(), **options}).setup(data())


PAIRS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "sites": (guide, lambda: guide(hierarchy)),
    "coordinates of site 'z' in a row 1, and here has 2": (guide, lambda: guide(wider)),
    "num_steps 2, and here has 50": (guide, lambda: guide(num_steps=50)),
    "dynamics.noise True": (guide, lambda: guide(dynamics=Langevin(StepSize(0.3), noise=False))),
    "objective 'PathDensity', and here has 'Linearized'": (guide, lambda: guide(objective=Linearized())),
    "objective.learnable": (lambda: guide(objective=Annealed()), lambda: guide(objective=Annealed(learnable=False))),
    "objective.logdet 'Exact', and here has 'Lanczos'": (
        lambda: guide(objective=PathDensity(Exact())),
        lambda: guide(objective=PathDensity(Lanczos())),
    ),
    "start 'Prior', and here has 'AutoNormal'": (guide, lambda: guide(start=AutoNormal(local))),
    "start.refresh": (lambda: guide(start=Persistent()), lambda: guide(start=Persistent(refresh=0.5))),
    "dynamics.step_size.max 3.0, and here has 1.0": (guide, lambda: guide(step_size=StepSize(0.1))),
    "dynamics.step_size.per": (guide, lambda: guide(step_size=StepSize(0.3, per="step"))),
}


@pytest.mark.parametrize("what", PAIRS)
def test_what_a_guide_was_made_with_is_named(what, tmp_path):
    make, other = PAIRS[what]
    save_state(tmp_path / "run.pt", guide=make())
    wrong = other()
    before = {k: v.clone() for k, v in wrong.state_dict().items()}
    np.random.seed(3)
    torch.manual_seed(3)
    drawn = np.random.get_state()[1].copy(), torch.get_rng_state()
    with pytest.raises(ValueError, match=r"'guide' in .*run\.pt.* was saved with " + what.replace(".", r"\.")):
        load_state(tmp_path / "run.pt", guide=wrong)
    for k, v in wrong.state_dict().items():
        torch.testing.assert_close(v, before[k], rtol=0, atol=0, equal_nan=True)
    assert (np.random.get_state()[1] == drawn[0]).all() and torch.equal(torch.get_rng_state(), drawn[1])
    right = make()
    load_state(tmp_path / "run.pt", guide=right)


def test_other_guides_too(tmp_path):
    save_state(tmp_path / "run.pt", guide=SemiImplicitGuide(local, num_mixtures=2).setup(data()))
    pyro.clear_param_store()
    with pytest.raises(ValueError, match="num_mixtures 2, and here has 3"):
        load_state(tmp_path / "run.pt", guide=SemiImplicitGuide(local, num_mixtures=3).setup(data()))


def test_the_limit_of_the_drift_comes_back(tmp_path):
    """Backing off has set it; a later part that does not fit leaves it."""
    saved = guide()
    saved.dynamics.max_drift = 1.0
    save_state(tmp_path / "run.pt", guide=saved, net=nn.Linear(2, 1))
    again = guide()
    with pytest.raises(ValueError, match="'net'"):
        load_state(tmp_path / "run.pt", guide=again, net=nn.Linear(3, 1))
    assert again.dynamics.max_drift == 10.0
    load_state(tmp_path / "run.pt", guide=again, net=nn.Linear(2, 1))
    assert again.dynamics.max_drift == 1.0


def test_one_wrong_bit_is_found(tmp_path):
    path, net = tmp_path / "run.pt", nn.Linear(4, 4)
    save_state(path, net=net)
    raw = bytearray(path.read_bytes())
    raw[raw.find(net.weight.detach().numpy().tobytes()) + 3] ^= 0x40
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="damaged: the checksum"):
        load_state(path, net=net)


@pytest.mark.parametrize(
    "content, message",
    [
        ({"format": 0, "parts": {}, "random": {}}, "format 0; the first one is 1"),
        ({"format": 1, "parts": [1], "random": {}}, "its parts are not"),
        ({"format": 1, "parts": {"net": 3}, "random": {}}, "its parts are not"),
        ({"format": 1, "parts": {"net": {"type": "Linear"}}, "random": {}}, "its parts are not"),
        ({"format": 1, "parts": {}, "random": 3}, "its parts are not"),
    ],
)
def test_files_of_another_structure(content, message, tmp_path):
    torch.save(content, tmp_path / "run.pt")
    with pytest.raises(ValueError, match=message):
        load_state(tmp_path / "run.pt", net=nn.Linear(1, 1))


def test_a_file_with_any_entry_of_another_kind_changes_nothing_or_is_named(tmp_path):
    """Every value of the file in turn is another one, or missing."""
    path, net, run = tmp_path / "run.pt", nn.Linear(2, 1), guide()
    parts = {"guide": run, "net": net, "optimiser": torch.optim.Adam(net.parameters())}
    save_state(path, **parts, epoch=3)
    content = torch.load(path, weights_only=True)
    before = {k: v.clone() for k, v in run.state_dict().items()}
    for place in places(content):
        for new in (3, None, "x", [], {}, torch.zeros(2), MISSING):
            torch.save(replaced(content, place, new), path)
            with contextlib.suppress(ValueError):
                load_state(path, **parts)
            assert all(torch.equal(v, before[k]) for k, v in run.state_dict().items()), (place, new)
            if isinstance(run.dynamics.max_drift, float):
                continue
            assert run.dynamics.max_drift == 3, (place, new)  # a number like any other


MISSING = object()


def places(value: Any, above: tuple = ()) -> Iterator[tuple]:
    """Keys that lead to each value of nested dicts, four deep; but for numbers of the random states."""
    for key, inner in value.items() if isinstance(value, dict) and len(above) < 4 else ():
        yield *above, key
        yield from places(inner, (*above, key)) if key != "random" else ()


def replaced(value: dict, place: tuple, new: Any) -> dict:
    """The same with another value there."""
    out = dict(value)
    if len(place) > 1:
        out[place[0]] = replaced(value[place[0]], place[1:], new)
    elif new is MISSING:
        del out[place[0]]
    else:
        out[place[0]] = new
    return out


def test_random_numbers_stay_where_they_are_if_those_of_the_file_do_not_fit(tmp_path):
    path = tmp_path / "run.pt"
    save_state(path, epoch=1)
    content = torch.load(path, weights_only=True)
    content["random"]["numpy"] = ("MT19937", torch.zeros(3), 0, 0, 0.0)
    torch.save(content, path)
    before = torch.get_rng_state()
    torch.rand(3)
    now = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"run\.pt has random states that do not fit"):
        load_state(path)
    assert torch.equal(torch.get_rng_state(), now) and not torch.equal(now, before)


def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    save_state(path, epoch=1)

    def full(content: Any, scratch: Path) -> None:
        scratch.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed\nmore")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"run\.pt could not be written .* is there still\.$"):
        save_state(path, epoch=2)
    assert load_state(path) == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


def test_a_diverged_run_is_neither_saved_nor_loaded(tmp_path):
    path, net = tmp_path / "run.pt", nn.Linear(2, 1)
    save_state(path, net=net, epoch=1)
    whole = path.read_bytes()
    content = torch.load(path, weights_only=True)
    with torch.no_grad():
        net.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"parameter 'bias' of 'net' is NaN: .* holds what it held"):
        save_state(path, net=net, epoch=2)
    assert path.read_bytes() == whole
    content["parts"]["net"]["state"]["weight"].fill_(torch.nan)
    torch.save(content, path)
    with torch.no_grad():
        net.bias.fill_(3.0)
    with pytest.raises(ValueError, match=r"parameter 'weight' of 'net' in .*run\.pt is NaN \(nothing was changed\)"):
        load_state(path, net=net)
    assert net.bias.item() == 3.0
