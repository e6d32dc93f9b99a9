"""Plots: what the artists hold, against the numbers they were given."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_shortrun import Langevin, Prior, ShortRunGuide, StepSize, energy_prior, to_arviz
from pyro_shortrun.diagnostics import (
    StepSizeHistory,
    plot_aggregate_posterior,
    plot_hierarchy,
    plot_images,
    plot_reconstructions,
    plot_step_sizes,
    plot_trajectories,
)
from pyro_shortrun.energy import PriorRuns

PIXELS = 6


def model(x: Tensor) -> None:
    """An image is z2 in its upper row and z1 in its lower one."""
    with pyro.plate("data", len(x)):
        z2 = pyro.sample("z2", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        z1 = pyro.sample("z1", dist.Normal(z2, 1.0).to_event(1))
        image = pyro.deterministic("image", torch.cat([z2, z1], -1), event_dim=1)
        pyro.sample("x", dist.Normal(image, 0.5).to_event(1), obs=x)


def guide() -> ShortRunGuide:
    return ShortRunGuide(model, num_steps=5, dynamics=Langevin(StepSize(0.05)), start=Prior())


def ydata(ax) -> list[list[float]]:
    return [list(line.get_ydata()) for line in ax.lines]


def test_trajectories_hold_the_record_of_the_run():
    run = guide()
    with pytest.raises(ValueError, match="has run"):
        plot_trajectories(run)
    x = torch.randn(4, PIXELS)
    trajectory = run.trajectory(x, num_chains=3)
    info = run.info
    axes = plot_trajectories(run, label="first")
    assert ydata(axes[0]) == [info.log_density.tolist()] and ydata(axes[1]) == [info.grad_norm.tolist()]
    assert ydata(axes[2])[0] == pytest.approx((0.05 * info.grad_norm).tolist())
    plot_trajectories(info, trajectory, axes, label="second")
    flat = torch.cat([trajectory[k].flatten(2) for k in ("z2", "z1")], -1)
    moved = (flat[1:] - flat[:-1]).square().sum(-1).sqrt().mean(1)
    assert ydata(axes[2])[1] == pytest.approx(moved.tolist())
    assert [t.get_text() for t in axes[0].get_legend().get_texts()] == ["first", "second"]
    assert "displacement" in axes[2].get_ylabel()
    scalars = {"loc": torch.tensor([[0.0, 0.0], [3.0, 1.0]]), "z": torch.tensor([[0.0, 0.0], [4.0, 0.0]]).unsqueeze(-1)}
    assert ydata(plot_trajectories(info, scalars)[2]) == [[3.0]]  # (5 + 1) / 2


@pytest.mark.parametrize("per, lines", [("shared", 1), ("step", 5), ("site", 2)])
def test_step_sizes_over_training(per, lines):
    run = ShortRunGuide(model, num_steps=5, dynamics=Langevin(StepSize(0.05, per=per)), start=Prior())
    run.setup(torch.randn(4, PIXELS))
    history = []
    for factor in (1.0, 0.5):
        run.dynamics.step_size.shrink(factor)
        history.append(run.step_sizes())
    ax = plot_step_sizes(history)
    assert len(ax.lines) == lines and ax.get_yscale() == "log"
    for line in ydata(ax):
        assert line == pytest.approx([0.05, 0.025])
    assert (ax.get_legend() is not None) == (per == "site")
    assert ydata(plot_step_sizes([0.3, 0.2, 0.1], label="mine")) == [[0.3, 0.2, 0.1]]
    with pytest.raises(ValueError, match="append"):
        plot_step_sizes([])


@pytest.mark.parametrize("per", ["shared", "site"])
def test_recorded_step_sizes_keep_their_values(per):
    run = ShortRunGuide(model, num_steps=5, dynamics=Langevin(StepSize(0.05, per=per)), start=Prior())
    history = StepSizeHistory(run)
    with pytest.raises(RuntimeError, match="no step sizes yet"):
        history.record()
    run.setup(torch.randn(4, PIXELS))
    for factor in (1.0, 0.5):
        run.dynamics.step_size.shrink(factor)
        history.record()
    assert len(history) == 2
    for line in ydata(plot_step_sizes(history)):
        assert line == pytest.approx([0.05, 0.025])
    with pytest.raises(ValueError, match="step_sizes"):
        StepSizeHistory(model)


def test_images_lie_row_by_row():
    images = torch.arange(6 * 4.0).reshape(6, 4)
    grid = torch.as_tensor(plot_images(images, columns=3, title="six").images[0].get_array().data)
    assert grid.shape == (4, 6)
    (lines,) = plot_images(images, columns=2).collections
    assert [path[0, 1] for path in lines.get_segments()] == [1.5, 3.5]
    for i in range(6):
        row, column = divmod(i, 3)
        tile = grid[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert tile.flatten().tolist() == images[i].tolist()
    assert plot_images(images[:, :2], shape=(1, 2)).images[0].get_array().shape == (1, 12)
    colours = plot_images(torch.rand(2, 3, 2, 3), shape=(3, 2, 3)).images[0]
    assert colours.get_array().shape == (3, 4, 3)
    ax = plot_images(images, vmin=-1, vmax=30)
    assert ax.images[0].get_clim() == (-1, 30) and ax.images[0].get_cmap().name == "gray_r"
    with pytest.raises(ValueError, match="do not fill"):
        plot_images(images, columns=4)
    with pytest.raises(ValueError, match="shape"):
        plot_images(images[:, :3])


def test_reconstructions_are_below_the_data():
    x, y = torch.rand(5, 4), torch.rand(5, 4)
    axes = plot_reconstructions(x, {"one": y, "two": 1 - y})
    assert [ax.get_title(loc="left") for ax in axes] == ["data", "one", "two"]
    for ax, images in zip(axes, (x, y, 1 - y), strict=True):
        expected = images.reshape(5, 2, 2).transpose(0, 1).reshape(2, 10)
        torch.testing.assert_close(torch.as_tensor(ax.images[0].get_array().data), expected)
    assert len(plot_reconstructions(x, y)) == 2
    with pytest.raises(ValueError, match="'one' has shape"):
        plot_reconstructions(x, {"one": y[:2]})
    with pytest.raises(ValueError, match="needs 2 axes"):
        plot_reconstructions(x, y, axes[:1])


@pytest.mark.parametrize("tilted", [False, True])
def test_hierarchy_holds_what_is_above(tilted):
    """Panel by panel: nothing is the same along a row; then the upper half of the images is."""

    def with_energy(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(z2, 1.0).to_event(1))
            energy_prior("ebm", lambda a, b: (a - b).square().sum(-1), z2, z1)
            image = pyro.deterministic("image", torch.cat([z2, z1], -1), event_dim=1)
            pyro.sample("x", dist.Normal(image, 0.5).to_event(1), obs=x)

    chosen = with_energy if tilted else model
    x, held = torch.randn(4, PIXELS), torch.randn(1, 4, 3)
    options = dict(layers=("z2", "z1"), image="image", num_samples=5, rows=3, shape=(2, 3), runs=PriorRuns(3))
    draws = {"z2": held, "z1": torch.randn(1, 4, 3)}
    axes = plot_hierarchy(chosen, draws, x, **options)
    first, second = (torch.as_tensor(ax.images[0].get_array().data) for ax in axes)
    assert first.shape == second.shape == (6, 15)
    tiles = second.reshape(3, 2, 5, 3).transpose(1, 2)  # rows, columns, height, width
    torch.testing.assert_close(tiles[:, :, 0], held[0, :3].unsqueeze(1).expand(3, 5, 3))
    assert (tiles[:, :, 1].std(1) > 0).all() and (first.reshape(3, 2, 5, 3).std(2) > 0).all()
    assert [ax.get_title(loc="left") for ax in axes] == ["from z2 on", "from z1 on given z2"]
    assert len(plot_hierarchy(chosen, guide(), x, **options)) == 2
    assert len(plot_hierarchy(chosen, draws, x, **{**options, "layers": ("z2",)})) == 1
    with pytest.raises(ValueError, match="layers"):
        plot_hierarchy(chosen, draws, x, **{**options, "layers": ("z3",)})
    with pytest.raises(ValueError, match="image must be one of"):
        plot_hierarchy(chosen, draws, x, **{**options, "image": "picture"})


def test_aggregate_posterior_shows_both_clouds():
    posterior, prior = {"z": torch.randn(2, 10, 4, 3), "s": torch.rand(2, 10, 4)}, {"z": torch.randn(50, 4, 3)}
    (ax,) = plot_aggregate_posterior(posterior, prior, coordinates=(2, 0))
    below, above = (torch.as_tensor(c.get_offsets().data) for c in ax.collections)
    flat = posterior["z"].reshape(-1, 3)
    torch.testing.assert_close(above, flat[:, [2, 0]], check_dtype=False)
    torch.testing.assert_close(below, prior["z"].reshape(-1, 3)[:, [2, 0]], check_dtype=False)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["prior", "posterior"] and ax.get_title() == "z"
    (ax,) = plot_aggregate_posterior({"s": posterior["s"]}, {"s": torch.rand(7)}, event_dim=0)
    assert len(ax.patches) == 2 and not ax.collections
    many = {"z": torch.randn(5000, 2)}
    assert len(plot_aggregate_posterior(many, many)[0].collections[0].get_offsets()) <= 2000
    with pytest.raises(ValueError, match="both have"):
        plot_aggregate_posterior(posterior, {"y": prior["z"]})
    with pytest.raises(ValueError, match="prior must be"):
        plot_aggregate_posterior(posterior, {})


def test_aggregate_posterior_of_an_arviz_object():
    idata = to_arviz(guide(), torch.randn(4, PIXELS), num_samples=6, num_chains=2, num_prior=5, log_likelihood=False)
    axes = plot_aggregate_posterior(idata, sites=["z2", "z1"])
    offsets = axes[0].collections[1].get_offsets().data
    expected = torch.as_tensor(idata["posterior"]["z2"].values).reshape(-1, 3)[:, :2]
    torch.testing.assert_close(torch.as_tensor(offsets), expected, check_dtype=False)
    assert len(axes[0].collections[0].get_offsets()) == 5 * 4
    bare = to_arviz(guide(), torch.randn(4, PIXELS), num_samples=6, num_chains=2, num_prior=0, log_likelihood=False)
    with pytest.raises(ValueError, match="no group 'prior'"):
        plot_aggregate_posterior(bare)
