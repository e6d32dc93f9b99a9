"""Whether ranks are uniform: exact simultaneous bands of their empirical distribution, p-values, and the picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..checks import check_between, check_count

_POINTS = 100  # at which a distribution function is looked at


class UniformBand:
    r"""Simultaneous limits of the empirical distribution function of ``count`` uniform ranks in ``0, ..., levels - 1``.

    At points :math:`z_i` the number of ranks below is Binomial(count, z_i), and the statistic is the smallest
    two-sided probability,

    .. math:: \gamma = 2 \min_i \min\{P(\mathrm{Bin}(n, z_i) \le c_i),\; P(\mathrm{Bin}(n, z_i) \ge c_i)\} .

    The probability that all counts lie within limits is found exactly: given their sum, counts between points are
    independent Poisson variables, so that it is a chain of convolutions. No simulation, so p-values can be small.

    Säilynoja, Bürkner, Vehtari: Graphical test for discrete uniformity and its applications in goodness-of-fit
    evaluation and multiple sample comparison, Statistics and Computing 2022.

    :param count: ``n``, the number of ranks.
    :param levels: the number of values that a rank can have, ``>= 2``.
    """

    def __init__(self, count: int, levels: int) -> None:
        check_count("count", count)
        check_count("levels", levels, least=2)
        from scipy.stats import binom  # changes warning filters when imported

        self.count, self.levels = count, levels
        inner = np.unique(np.linspace(1, levels - 1, min(_POINTS, levels - 1)).round().astype(int))
        self.cuts = inner  # ranks < cuts[i] are counted at points[i]
        self.points = inner / levels
        self._below = binom.cdf(np.arange(count + 1), count, self.points[:, None])  # (points, counts)
        self._above = binom.sf(np.arange(-1, count), count, self.points[:, None])

    def counts(self, ranks: np.ndarray) -> np.ndarray:
        """Ranks below every cut, ``(points, ...)``, of ``ranks (count, ...)``."""
        return (ranks < self.cuts.reshape(-1, *([1] * ranks.ndim))).sum(1)

    def level(self, ranks: np.ndarray) -> float:
        """``gamma`` of one set of ranks, ``(count,)``."""
        at = np.arange(len(self.cuts)), self.counts(ranks)
        return 2 * float(np.minimum(self._below[at], self._above[at]).min())

    def pvalue(self, ranks: np.ndarray) -> float:
        """Probability that uniform ranks have a ``gamma`` as small as that of ``ranks (count,)``."""
        level = self.level(ranks) * (1 + 1e-9)  # as small, rounding aside
        return min(1.0, max(0.0, 1.0 - self._coverage(*self._limits(level))))

    def limits(self, prob: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest counts at the points that hold together with probability ``>= prob``, ``(points,)``."""
        check_between("prob", prob, 0, 1, "0.95")
        low, high = 0.0, 1.0
        for _ in range(25):  # the coverage falls with gamma
            middle = 0.5 * (low + high)
            covered = self._coverage(*self._limits(middle)) >= prob
            low, high = (middle, high) if covered else (low, middle)
        return self._limits(low)

    def _limits(self, level: float) -> tuple[np.ndarray, np.ndarray]:
        """Counts whose two-sided probability is above ``level``."""
        low = (self._below <= level / 2).sum(1)
        return low, self.count - (self._above <= level / 2).sum(1)

    def _coverage(self, low: np.ndarray, high: np.ndarray) -> float:
        from scipy.stats import poisson

        n, values = self.count, np.arange(self.count + 1)
        reached = np.zeros(n + 1)
        reached[0] = 1.0
        for step, a, b in zip(np.diff(self.points, prepend=0.0), low, high, strict=True):
            reached = np.convolve(reached, poisson.pmf(values, n * step))[: n + 1]
            reached[(values < a) | (values > b)] = 0.0
        last = poisson.pmf(n - values, n * (1 - self.points[-1]))
        return float(reached @ last / poisson.pmf(n, n))


def symmetry_pvalue(values: np.ndarray) -> tuple[float, float]:
    r"""Kolmogorov-Smirnov distance of ``p`` and ``1 - p``, and its p-value where p is symmetric around 1/2.

    .. math:: D = \sup_t |F_p(t) - F_{1 - p}(t)| = \frac{1}{n} \max_k \Big|\sum_{j \le k} s_j\Big| ,

    ``s_j`` the signs of ``p - 1/2`` in falling order of ``|p - 1/2|``. Under symmetry the sums are a simple random
    walk, whose maximum has a known law; the table of the two-sample test, for samples that are independent of each
    other, would reject too often. Ties (ranks of few draws) make it conservative.

    The statistic: Yao, Vehtari, Simpson, Gelman: Yes, but did it work? Evaluating variational inference, ICML 2018.
    Its law: Butler: A test for symmetry using the sample distribution function, Annals of Math. Statistics 1969.

    :param values: ``(n,)``, in [0, 1].
    """
    if np.ndim(values) != 1 or not len(values):
        raise ValueError(f"values must be an array of one dimension and one element at least, got {np.shape(values)}.")
    distance = np.abs(values - 0.5)
    order = np.argsort(-distance, kind="stable")
    signs = np.sign(np.where(distance < 1e-12, 0.0, values - 0.5))[order]
    ends = np.append(np.abs(np.diff(distance[order])) > 1e-12, True)  # of runs of ties
    top = int(np.abs(np.cumsum(signs))[ends].max())
    return top / len(values), _walk_reaches(len(values), top)


def _walk_reaches(steps: int, height: int) -> float:
    """Probability that a simple random walk gets to ``+- height`` within ``steps``."""
    if height <= 0:
        return 1.0
    inside = np.zeros(2 * height + 1)
    inside[height] = 1.0
    for _ in range(steps):
        inside = 0.5 * (np.roll(inside, 1) + np.roll(inside, -1))
        inside[[0, -1]] = 0.0
    return max(0.0, 1.0 - float(inside.sum()))


def holm(pvalues: Sequence[float]) -> list[float]:
    """p-values adjusted for their number, whatever their dependence (Holm 1979)."""
    order = np.argsort(pvalues)
    adjusted = np.empty(len(pvalues))
    scaled = np.asarray(pvalues)[order] * np.arange(len(pvalues), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted.tolist()


def plot_ecdf(sbc: Any, *, difference: bool = True, prob: float = 0.95, columns: int = 4) -> Any:
    """Empirical distribution function of the ranks of every quantity, with its simultaneous band.

    A curve within the band is what uniform ranks give with probability ``prob``, per panel. As differences from the
    diagonal: an arch above zero is draws that are too large, one below draws too small; above and then below zero is
    a posterior that is too narrow, and the other way round one that is too wide.

    Säilynoja, Bürkner, Vehtari: Graphical test for discrete uniformity and its applications, 2022.

    :param sbc: what :func:`~pyro_shortrun.diagnostics.sbc` returned.
    :param difference: whether the diagonal is subtracted.
    :param prob: of the bands.
    :param columns: panels per row.
    :return: Matplotlib's axes, one for each quantity.
    """
    _check_ranks(sbc)
    check_count("columns", columns)
    band = UniformBand(len(sbc.ranks), sbc.num_draws + 1)
    low, high = (x / band.count for x in band.limits(prob))
    curves = band.counts(sbc.ranks.cpu().numpy()) / band.count  # (points, quantities)
    shift = band.points if difference else 0 * band.points
    figure, panels = _panels(sbc.names, columns)
    for axes, curve in zip(panels, curves.T, strict=True):
        axes.fill_between(band.points, low - shift, high - shift, alpha=0.3, step="mid", label=f"{prob:.0%} band")
        axes.step(band.points, curve - shift, where="mid")
    figure.supxlabel("rank / (draws + 1)")
    figure.supylabel("ECDF - uniform" if difference else "ECDF")
    return panels


def plot_ranks(sbc: Any, *, bins: int | None = None, prob: float = 0.95, columns: int = 4) -> Any:
    """Histograms of the ranks of every quantity, with the band that each bar of uniform ranks has by itself.

    Ranks piled up at the right are draws that are too small, at the left draws too large; at both ends a posterior that
    is too narrow, in the middle one that is too wide. One bar in twenty is outside a 95 % band where all is right, and
    what is seen depends on the bins: :func:`plot_ecdf` has neither fault.

    Talts, Betancourt, Simpson, Vehtari, Gelman: Validating Bayesian inference algorithms with simulation-based
    calibration, 2018.

    :param sbc: what :func:`~pyro_shortrun.diagnostics.sbc` returned, with ranks ``(simulations, quantities)``.
    :param bins: equal ones where they divide the ``num_draws + 1`` ranks; by default as many as leave about ten ranks
        in each, 20 at most.
    :param prob: of the band, bar by bar.
    :param columns: panels per row.
    :return: Matplotlib's axes, one for each quantity.
    :raises ValueError: where there are more bins than ranks are possible.
    """
    from scipy.stats import binom

    _check_ranks(sbc)
    check_between("prob", prob, 0, 1, "0.95")
    count, levels = len(sbc.ranks), sbc.num_draws + 1
    if bins is None:
        most = max(2, min(20, levels, count // 10))
        bins = next((b for b in range(most, 1, -1) if levels % b == 0), most)
    check_count("bins", bins)
    if bins > levels:
        raise ValueError(f"bins={bins} are more than the {levels} ranks that there are.")
    edges = np.linspace(0, levels, bins + 1).round()
    tail, share = (1 - prob) / 2, np.diff(edges) / levels
    low, high = (binom.ppf(q, count, share) for q in (tail, 1 - tail))
    figure, panels = _panels(sbc.names, columns)
    for axes, ranks in zip(panels, sbc.ranks.cpu().numpy().T, strict=True):
        heights, _ = np.histogram(ranks, edges)
        axes.fill_between(edges, *(np.append(v, v[-1]) for v in (low, high)), alpha=0.3, step="post")
        axes.stairs(heights, edges)
    figure.supxlabel("rank")
    figure.supylabel("simulations")
    return panels


def _check_ranks(sbc: Any) -> None:
    if not hasattr(sbc, "ranks"):
        raise ValueError(f"sbc must be what sbc(model, posterior, *args) gives, got a {type(sbc).__name__}.")


def _panels(names: Sequence[str], columns: int) -> tuple[Any, Any]:
    """A figure with one titled panel for each name."""
    import matplotlib.pyplot as plt

    check_count("columns", columns)
    columns = min(columns, len(names))
    rows = math.ceil(len(names) / columns)
    figure, grid = plt.subplots(rows, columns, figsize=(3 * columns, 2.5 * rows), squeeze=False, layout="constrained")
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    panels = grid.flat[: len(names)]
    for axes, name in zip(panels, names, strict=True):
        axes.set_title(name)
    return figure, panels
