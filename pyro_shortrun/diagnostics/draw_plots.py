"""Pictures of draws: images, reconstructions, layers of a hierarchy, the aggregate posterior.

Every function takes the axes to draw on, or makes some, and returns them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ..checks import check_count
from ..density.handlers import init_uniform
from ..density.program import Program
from ..density.sites import is_factor
from ..energy.predictive import sample_prior
from ..energy.runs import PriorRuns
from ..tensors import plain
from .axes import ax_of, axes_of, numpy_of
from .sources import draws_of

_POINTS = 2000  # of a scatter plot


def plot_images(
    images: Tensor,
    ax: Any = None,
    *,
    columns: int | None = None,
    shape: tuple[int, ...] | None = None,
    title: str = "",
    **options: Any,
) -> Any:
    """Images in a grid, row by row, with a white line between rows.

    :param images: ``(..., pixels)``, or ``(..., *shape)`` where ``shape`` is given.
    :param columns: of the grid; by default all images in one row.
    :param shape: ``(height, width)`` or ``(height, width, channels)``; square ones without channels by default.
    :param options: for ``imshow``; ``cmap="gray_r", vmin=0, vmax=1`` by default.
    :return: the axes.
    :raises ValueError: where the pixels do not fit the shape, or the images the columns.
    """
    ax = ax_of(ax)
    found = _tiles(images, shape)
    columns = len(found) if columns is None else columns
    check_count("columns", columns)
    if len(found) % columns:
        raise ValueError(f"{len(found)} images do not fill rows of {columns}: take fewer images, or other columns.")
    height, width, *channels = found.shape[1:]
    grid = found.reshape(-1, columns, height, width, *channels).swapaxes(1, 2)
    ax.imshow(grid.reshape(-1, columns * width, *channels), **{"cmap": "gray_r", "vmin": 0, "vmax": 1, **options})
    rows = len(found) // columns
    ax.hlines(np.arange(1, rows) * height - 0.5, -0.5, columns * width - 0.5, color="white", linewidth=3)
    ax.set_axis_off()
    ax.set_title(title, loc="left", fontsize=8)
    return ax


def _tiles(images: Tensor, shape: tuple[int, ...] | None) -> np.ndarray:
    """``(count, height, width[, channels])``."""
    if shape is None:
        side = math.isqrt(images.shape[-1])
        shape = (side, side)
    fits = images.shape[-1] == math.prod(shape) or tuple(images.shape[-len(shape) :]) == tuple(shape)
    if not images.numel() or not fits:
        raise ValueError(
            f"images of shape {tuple(images.shape)} do not have {shape} pixels: pass shape=(height, width)."
        )
    return numpy_of(images).reshape(-1, *shape)


def plot_reconstructions(
    x: Tensor,
    reconstructed: Tensor | Mapping[str, Tensor],
    axes: Any = None,
    *,
    shape: tuple[int, ...] | None = None,
    **options: Any,
) -> Any:
    """Data above what was made of them, image by image.

    :param x: ``(rows, pixels)``.
    :param reconstructed: the same shape, or several of these under names.
    :param axes: one for the data and one for each reconstruction.
    :param shape: as for :func:`plot_images`, as ``options``.
    :return: the axes.
    :raises ValueError: where shapes differ.
    """
    named = reconstructed if isinstance(reconstructed, Mapping) else {"reconstructed": reconstructed}
    for name, images in named.items():
        if images.shape != x.shape:
            raise ValueError(f"'{name}' has shape {tuple(images.shape)}, and must have that of x, {tuple(x.shape)}.")
    axes = axes_of(axes, 1 + len(named), 1, (9, 0.8 * (1 + len(named))))
    for ax, (title, images) in zip(axes, {"data": x, **named}.items(), strict=True):
        plot_images(images, ax, shape=shape, title=title, **options)
    return axes


@torch.no_grad()
def plot_hierarchy(
    model: Callable[..., Any],
    source: Any,
    *args: Any,
    layers: Sequence[str],
    image: str,
    num_samples: int = 8,
    rows: int = 6,
    runs: PriorRuns | None = None,
    shape: tuple[int, ...] | None = None,
    axes: Any = None,
    **kwargs: Any,
) -> Any:
    """What each layer of a hierarchy decides: images in which it and those below are drawn anew, those above held.

    A panel for each layer. Along a row the layers above it stay at one draw of ``source``; the layer itself and all
    that follows is drawn from the model given these, by :func:`~pyro_shortrun.sample_prior`, with the model's energies
    where it has any. What varies along a row is what the layer and those below it decide.

    :param model: a Pyro model.
    :param source: a guide, whose posterior draw is held, or draws by site, ``(draws, *site shape)``; the first is held.
    :param args: the model's arguments, as ``kwargs``.
    :param layers: latent sites from top to bottom.
    :param image: the site that holds images, ``(rows, pixels)``: a deterministic one, or the data.
    :param num_samples: images in a row.
    :param rows: data to show, the first ones.
    :param runs: runs in a tilted prior, :class:`~pyro_shortrun.energy.PriorRuns`; 40 steps of 0.1 by default.
    :param shape: as for :func:`plot_images`.
    :param axes: one for each layer.
    :return: the axes.
    :raises ValueError: where a layer or the image is no site of the model.
    """
    check_count("num_samples", num_samples)
    if not layers or isinstance(layers, str):
        raise ValueError(f"layers must be a list of latent sites from top to bottom, got {layers!r}.")
    _check_sites(model, args, kwargs, layers, image)
    held = {k: v[0, 0] for k, v in draws_of(_draws(source), args, kwargs, 1, 1).items()}
    missing = [name for name in layers if name not in held]
    if missing:
        raise ValueError(f"layers must be latent sites of the source, which has {sorted(held)}; got {list(layers)}.")
    axes = axes_of(axes, 1, len(layers), (3.2 * len(layers), 2.6))
    for i, (ax, name) in enumerate(zip(axes, layers, strict=True)):
        given = {k: held[k] for k in layers[:i]}
        options: dict[str, Any] = dict(num_samples=num_samples, runs=runs, given=given)
        drawn = sample_prior(model, *args, **options, **kwargs)
        images = drawn[image].transpose(0, 1)[:rows]
        above = f" given {', '.join(layers[:i])}" if i else ""
        plot_images(images.flatten(0, 1), ax, columns=num_samples, shape=shape, title=f"from {name} on{above}")
    return axes


def _check_sites(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], layers: Sequence[str], image: str
) -> None:
    """Refuse layers that are no latents of the model, and an image that is no site."""
    reading = Program(model).draw(plain(args), plain(kwargs), init=init_uniform)
    latents = [s["name"] for s in reading.latents]
    sites = {k: s for k, s in reading.trace.nodes.items() if s["type"] == "sample"}
    there = [k for k, s in sites.items() if not (site_is_subsample(s) or is_factor(s))]
    if missing := [name for name in layers if name not in latents]:
        raise ValueError(f"layers must be latent sites of the model, which has {latents}; got {missing}.")
    if image not in there:
        raise ValueError(f"image must be one of the model's sites {there}, got '{image}'.")


def _draws(source: Any) -> Any:
    """Draws by site with a leading dimension for chains."""
    return {k: v.unsqueeze(0) for k, v in source.items()} if isinstance(source, Mapping) else source


def plot_aggregate_posterior(
    posterior: Any,
    prior: Any = None,
    axes: Any = None,
    *,
    sites: Sequence[str] | None = None,
    coordinates: tuple[int, int] = (0, 1),
    event_dim: int = 1,
) -> Any:
    r"""The aggregate posterior :math:`E_{p(x)}\, q(z \mid x)` against the prior that it should be equal to.

    A panel for each site: two coordinates as points, one coordinate as histograms. Regions that the prior fills and
    the posterior does not are where draws from the model decode to nothing in particular (and where an
    :func:`~pyro_shortrun.energy_prior` helps).

    :param posterior: draws by site, of any leading shape (chains, draws, data), or what :func:`to_arviz` gave.
    :param prior: the same from the prior; by default that of the ArviZ object.
    :param axes: one for each site.
    :param sites: by default all that both have.
    :param coordinates: the two that are shown.
    :param event_dim: how many trailing dimensions of a value are the coordinates of one latent: 0 for scalar sites.
    :return: the axes.
    :raises ValueError: where there is no prior, or no common site.
    """
    a, b = _group(posterior, "posterior"), _group(posterior if prior is None else prior, "prior")
    names = [k for k in a if k in b] if sites is None else list(sites)
    missing = [k for k in names if k not in a or k not in b]
    if missing or not names:
        raise ValueError(
            f"posterior and prior must both have the sites {missing}; they have {sorted(a)} and {sorted(b)}."
        )
    check_count("event_dim", event_dim, least=0)
    for name in names:
        width = _flat(a[name], event_dim).shape[1]
        if width > 1 and not all(0 <= i < width for i in coordinates):
            raise ValueError(f"coordinates must be below {width}, the size of '{name}', got {coordinates}.")
    axes = axes_of(axes, 1, len(names), (3.4 * len(names), 3.2))
    for ax, name in zip(axes, names, strict=True):
        pairs = [(_flat(values[name], event_dim), what) for values, what in ((b, "prior"), (a, "posterior"))]
        for (value, what), color in zip(pairs, ("0.6", "C0"), strict=True):
            _cloud(ax, value, coordinates, what, color)
        ax.set_title(name, fontsize=8)
    axes[0].legend(fontsize=8)
    return axes


def _group(source: Any, name: str) -> Mapping[str, Any]:
    if hasattr(source, "groups"):  # of ArviZ
        try:
            group = source[name]
        except KeyError as reason:
            raise ValueError(f"the ArviZ object has no group '{name}': export it, or pass {name}=....") from reason
        return {str(k): group[k].values for k in group.data_vars}
    if not isinstance(source, Mapping) or not source:
        raise ValueError(f"{name} must be draws by site, or an ArviZ object, got {source!r}.")
    return source


def _flat(value: Any, event_dim: int) -> np.ndarray:
    """``(points, coordinates)``."""
    array = numpy_of(value)
    event = array.shape[array.ndim - event_dim :]
    return array.reshape(-1, math.prod(event))


def _cloud(ax: Any, value: np.ndarray, coordinates: tuple[int, int], label: str, color: str) -> None:
    if value.shape[1] < 2:
        ax.hist(value[:, 0], bins=50, density=True, histtype="step", label=label, color=color)
        return
    first, second = coordinates
    some = value[:: max(1, -(-len(value) // _POINTS))]
    ax.scatter(some[:, first], some[:, second], s=3, alpha=0.5, label=label, color=color)
    ax.set(xlabel=f"coordinate {first}", ylabel=f"coordinate {second}")
