"""The flat state: packing is a bijection that keeps rows apart, and log-probabilities add up."""

from __future__ import annotations

import pytest
import torch

from pyro_shortrun.density import LatentSite, Layout, Plate
from pyro_shortrun.density.coordinates import dim_index, site_index
from pyro_shortrun.density.layout import Arrow, constant
from pyro_shortrun.density.rows import sum_to_rows
from pyro_shortrun.density.structure import unscalable

OUTER, INNER = Plate("outer", -2, 3, 3), Plate("inner", -1, 4, 4)
HALF = Plate("half", -1, 4, 8)  # subsampled: 4 of 8
PARTS = Plate("parts", -1, 5, 5)


def site(name: str, batch: tuple, event: tuple, *plates: Plate) -> LatentSite:
    return LatentSite(name, torch.Size(batch), torch.Size(event), plates)


SHARED = (site("a", (), (2,)), site("b", (), ()))
LOCAL = (site("y", (4,), (), INNER), site("z", (4,), (2, 3), INNER))

LAYOUTS = {
    "shared": Layout(SHARED, ()),
    "shared in a plate": Layout((*SHARED, site("p", (5,), (2,), PARTS)), ()),
    "coupled plate": Layout(LOCAL, ()),
    "plate": Layout(LOCAL, (INNER,)),
    "extra batch": Layout((*LOCAL, site("x", (2, 1, 4), (2,), INNER)), (INNER,)),
    "nested, rows left": Layout((site("c", (3, 1), (2,), OUTER), site("z", (3, 4), (2,), OUTER, INNER)), (OUTER,)),
    "nested, rows right": Layout((site("c", (4,), (2,), INNER), site("z", (3, 4), (2,), OUTER, INNER)), (INNER,)),
    "nested, rows both": Layout(
        (site("c", (3, 4), (), OUTER, INNER), site("z", (3, 4), (2,), OUTER, INNER)),
        (OUTER, INNER),
    ),
    "nested, extra batch": Layout((site("z", (2, 3, 4), (2,), OUTER, INNER),), (OUTER,)),
    "arrow": Layout((*SHARED, *LOCAL), (INNER,)),
    "arrow, locals first": Layout((*LOCAL, *SHARED), (INNER,)),
    "arrow, shared in a plate": Layout((site("p", (5,), (2,), PARTS), *LOCAL), (INNER,)),
    "arrow, nested": Layout((*SHARED, site("c", (3, 1), (), OUTER), site("z", (3, 4), (2,), OUTER, INNER)), (OUTER,)),
    "arrow, rows both": Layout((*SHARED, site("z", (3, 4), (2,), OUTER, INNER)), (OUTER, INNER)),
    "arrow, subsampled": Layout((site("a", (), (2,)), site("z", (4,), (2,), HALF)), (HALF,)),
}

SIZES = {
    "shared": (1, 3, None),
    "shared in a plate": (1, 13, None),
    "coupled plate": (1, 28, None),
    "plate": (4, 7, None),
    "extra batch": (4, 11, None),
    "nested, rows left": (3, 10, None),
    "nested, rows right": (4, 8, None),
    "nested, rows both": (12, 3, None),
    "nested, extra batch": (3, 16, None),
    "arrow": (1, 31, Arrow(3, 4, 7, 1.0)),
    "arrow, locals first": (1, 31, Arrow(3, 4, 7, 1.0)),
    "arrow, shared in a plate": (1, 38, Arrow(10, 4, 7, 1.0)),
    "arrow, nested": (1, 30, Arrow(3, 3, 9, 1.0)),
    "arrow, rows both": (1, 27, Arrow(3, 12, 2, 1.0)),
    "arrow, subsampled": (1, 10, Arrow(2, 4, 2, 2.0)),
}

every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_sizes(name: str) -> None:
    layout = LAYOUTS[name]
    assert (layout.rows, layout.size, layout.arrow) == SIZES[name]
    assert layout.is_arrow == (layout.arrow is not None)
    total = sum(s.shape.numel() for s in layout.sites)
    assert layout.rows * layout.size == total


@every_layout
@pytest.mark.parametrize("lead", [(), (5,), (2, 3)], ids=str)
def test_pack_and_unpack_are_inverse(layout: Layout, lead: tuple[int, ...]) -> None:
    values = {s.name: torch.randn((*lead, *s.shape)) for s in layout.sites}
    u = layout.pack(values)
    assert u.shape == (*lead, layout.rows, layout.size)
    again = layout.unpack(u)
    assert list(again) == [s.name for s in layout.sites]
    for name, value in values.items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=0)
    torch.testing.assert_close(layout.pack(again), u, rtol=0, atol=0)


@every_layout
def test_a_row_or_local_block_holds_one_element_of_the_row_plates(layout: Layout) -> None:
    """Paint every coordinate with its element of the row plates, shared ones with -1."""
    element = torch.arange(layout.row_shape.numel() or 1).reshape(layout.row_shape)
    values = {}
    for s in layout.sites:
        paint = torch.full(s.shape, -1)
        if layout.row_plates and set(layout.row_plates) <= set(s.plates):
            index = [1] * len(s.batch_shape)
            for plate in layout.row_plates:
                index[plate.dim] = plate.size
            paint = element.reshape(*index, *(1 for _ in s.event_shape)).expand(s.shape)
        values[s.name] = paint
    u = layout.pack(values)
    if layout.arrow is not None:
        arrow = layout.arrow
        blocks = torch.arange(arrow.count).repeat_interleave(arrow.local)
        expected = torch.cat([torch.full((arrow.shared,), -1), blocks])[None]
    elif layout.row_plates:
        expected = torch.arange(layout.rows)[:, None].expand(layout.rows, layout.size)
    else:
        expected = torch.full((1, layout.size), -1)
    assert torch.equal(u, expected)


@every_layout
def test_rows_add_up(layout: Layout) -> None:
    """Terms in the rows' plates, in more plates, and outside them."""
    for plates, shape in [
        ((), ()),
        ((), (2,)),
        ((PARTS,), (5,)),
        ((INNER,), (4,)),
        ((HALF,), (4,)),
        ((OUTER,), (3, 1)),
        ((OUTER, INNER), (3, 4)),
        ((OUTER, INNER), (2, 3, 4)),
    ]:
        term = torch.randn(shape)
        rows = sum_to_rows(layout, term, plates)
        assert rows.shape == (layout.rows,)
        torch.testing.assert_close(rows.sum(), term.sum())


@every_layout
def test_sum_to_rows_agrees_with_packing(layout: Layout) -> None:
    """A sum over a site's coordinates, taken over packed rows or over log-probability terms."""
    values = {s.name: torch.randn(s.shape) for s in layout.sites}
    terms = [
        sum_to_rows(layout, values[s.name].sum([*range(len(s.batch_shape), len(s.shape))]), s.plates)
        if s.event_shape
        else sum_to_rows(layout, values[s.name], s.plates)
        for s in layout.sites
    ]
    torch.testing.assert_close(sum(terms), layout.pack(values).sum(-1))


def test_a_term_in_the_rows_is_not_shared_and_one_outside_is() -> None:
    layout = LAYOUTS["nested, rows left"]
    inside = sum_to_rows(layout, torch.arange(12.0).reshape(3, 4), (OUTER, INNER))
    assert inside.tolist() == [6.0, 22.0, 38.0]
    assert sum_to_rows(layout, torch.tensor([[1.0], [2.0], [3.0]]), (OUTER,)).tolist() == [1, 2, 3]
    assert sum_to_rows(layout, torch.tensor([3.0, 6.0]), (INNER,)).tolist() == [3, 3, 3]


def test_indices_of_a_plain_layout() -> None:
    layout = Layout((site("y", (4,), (), INNER), site("z", (4,), (2,), INNER)), (INNER,))
    assert site_index(layout).tolist() == [0, 1, 1]
    assert dim_index(layout).tolist() == [0, 1, 2]
    assert constant(layout, {"y": 7.0, "z": 8.0}).tolist() == [7, 8, 8]


def test_indices_of_an_arrowhead() -> None:
    """Shared coordinates come first, whatever the order of the sites; blocks share dim indices."""
    layout = Layout((site("z", (3,), (2,), Plate("n", -1, 3, 3)), site("a", (), (2,))), ())
    assert site_index(layout).tolist() == [0] * 6 + [1] * 2
    layout = Layout(layout.sites, layout.sites[0].plates)
    assert site_index(layout).tolist() == [1, 1] + [0] * 6
    assert dim_index(layout).tolist() == [0, 1, 2, 3, 2, 3, 2, 3]


def test_drift_scale() -> None:
    layout = LAYOUTS["arrow, subsampled"]
    like = torch.zeros(())
    assert layout.drift_scale(like).tolist() == [1.0, 1.0] + [0.5] * 8
    assert layout.drift_scale(like).dtype == like.dtype
    assert layout.drift_scale(like.to(torch.float16)).dtype == torch.float16
    both = Plate("tenth", -2, 3, 30)
    nested = Layout((site("z", (3, 4), (), both, HALF),), (both, HALF))
    torch.testing.assert_close(nested.drift_scale(like), torch.tensor([1 / 20]))
    assert LAYOUTS["arrow"].drift_scale(like).tolist() == [1.0] * 31


def test_scales() -> None:
    assert HALF.scale == 2.0
    assert Plate("empty", -1, 0, 0).scale == 1.0
    tenth = Plate("tenth", -2, 3, 30)
    assert site("z", (3, 4), (), tenth, HALF).scale == 20.0


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        (LAYOUTS["arrow, subsampled"], None),
        (LAYOUTS["arrow"], None),
        (Layout((site("z", (4,), (), HALF),), (HALF,)), None),
        (Layout((site("z", (4,), (), HALF),), ()), "z"),
        (Layout((site("a", (), ()), site("z", (4,), (), HALF)), ()), "z"),
        (
            Layout((site("c", (3, 1), (), OUTER), site("z", (3, 4), (), OUTER, HALF)), (OUTER,)),
            "z",
        ),
    ],
)
def test_unscalable_names_the_latent_whose_scale_no_row_carries(layout: Layout, name: str | None) -> None:
    assert unscalable(layout) == name
