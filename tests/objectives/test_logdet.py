"""Estimators of log|det(I + D H)| against the dense matrix: value, gradient, rows, and the singular flag."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from small import bind, both, close, data
from torch import Tensor

from pyro_shortrun.density import LatentSite, Layout, Plate
from pyro_shortrun.objectives import Automatic, Exact, Lanczos, LogDet
from pyro_shortrun.objectives.logdet import LogDetResult

CHAINS, ROWS, SIZE = 2, 3, 6


@dataclass(frozen=True)
class Problem:
    """``H`` as a dense matrix, built independently, and by its products; both differentiable in the ``leaves``."""

    layout: Layout
    diagonal: Tensor  # (chains, rows, size)
    hessian: Tensor  # (chains, rows, size, size)
    product: Callable[[Tensor], Tensor]
    leaves: tuple[Tensor, ...]

    def oracle(self) -> Tensor:
        eye = torch.eye(self.hessian.shape[-1])
        return torch.linalg.slogdet(eye + self.diagonal.unsqueeze(-1) * self.hessian)[1]

    def smallest(self) -> Tensor:
        """Smallest eigenvalue of ``I + D^(1/2) H D^(1/2)``."""
        root = self.diagonal.sqrt()
        matrix = root.unsqueeze(-1) * self.hessian * root.unsqueeze(-2)
        return 1 + torch.linalg.eigvalsh(matrix.detach())[..., 0]


def plain(rows: int, size: int) -> Layout:
    plate = Plate("n", -1, rows, rows)
    return Layout((LatentSite("z", torch.Size([rows]), torch.Size([size]), (plate,)),), (plate,))


def arrowhead(shared: int, count: int, local: int, weight: int = 1) -> Layout:
    plate = Plate("n", -1, count, weight * count)
    a = LatentSite("a", torch.Size(), torch.Size([shared]), ())
    z = LatentSite("z", torch.Size([count]), torch.Size([local]), (plate,))
    return Layout((a, z), (plate,))


def times(hessian: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda v: torch.einsum("...ij,m...j->m...i", hessian, v)


def with_spectrum(eigenvalues: Tensor) -> Tensor:
    """Random symmetric matrices with these eigenvalues in the last axis."""
    basis = torch.linalg.qr(torch.randn((*eigenvalues.shape, eigenvalues.shape[-1])))[0]
    return (basis * eigenvalues.unsqueeze(-2)) @ basis.mT


def given(hessian: Tensor, diagonal: Tensor | None = None, layout: Layout | None = None) -> Problem:
    """``H = theta * hessian`` at ``theta = 1``."""
    theta = torch.ones((), requires_grad=True)
    if diagonal is None:
        diagonal = 0.02 + 0.08 * torch.rand(hessian.shape[:-1])
    diagonal = diagonal.requires_grad_()
    scaled = theta * hessian
    layout = layout or plain(*hessian.shape[1:3])
    return Problem(layout, diagonal, scaled, times(scaled), (diagonal, theta))


def spectrum() -> Problem:
    """Eigenvalues from -8 to 2, so every step is invertible."""
    return given(with_spectrum(torch.linspace(-8.0, 2.0, SIZE).expand(CHAINS, ROWS, SIZE)))


def indefinite() -> Problem:
    """Some eigenvalues of ``I + A`` are negative: the value is log of the absolute determinant."""
    return given(with_spectrum(torch.linspace(-60.0, 9.0, SIZE).expand(CHAINS, ROWS, SIZE)))


def arrow_matrix(shared: int, count: int, local: int, curvature: float = -5.0) -> Tensor:
    size = shared + count * local
    block = torch.zeros(size, dtype=torch.long)
    block[shared:] = 1 + torch.arange(count).repeat_interleave(local)
    mixes = (block[:, None] == block) | (block[:, None] == 0) | (block == 0)
    half = torch.randn((CHAINS, 1, size, size))
    return torch.where(mixes, half + half.mT, torch.zeros(())) + curvature * torch.eye(size)


def arrow() -> Problem:
    return given(arrow_matrix(2, 3, 2), layout=arrowhead(2, 3, 2))


def tanh() -> Problem:
    """Rows of a posterior over the weights of ``y = tanh(x w) + noise``; ``H`` in closed form and from the model."""
    x, y = data(4, SIZE), data(5, ROWS, 4)[0]
    noise = torch.tensor(0.8, requires_grad=True)

    def model(noise: Tensor) -> None:
        with pyro.plate("n", ROWS):
            w = pyro.sample("w", dist.Normal(torch.zeros(SIZE), 1.0).to_event(1))
            mean = torch.tanh((x @ w.unsqueeze(-1)).squeeze(-1))
            pyro.sample("y", dist.Normal(mean, noise).to_event(1), obs=y)

    density = bind(model, noise).density
    u = torch.randn((CHAINS, ROWS, SIZE), requires_grad=True)
    _, grad = density.value_and_grad(u, create_graph=True)
    f = torch.tanh((x @ u.unsqueeze(-1)).squeeze(-1))
    slope = 1 - f.square()
    weight = ((y - f) * (-2 * f * slope) - slope.square()) / noise.square()
    hessian = torch.einsum("...n,ni,nj->...ij", weight, x, x) - torch.eye(SIZE)
    diagonal = (0.02 + 0.03 * torch.rand_like(u)).detach().requires_grad_()
    product = density.hessian_product(u, grad, create_graph=True)
    return Problem(density.layout, diagonal, hessian, product, (diagonal, noise, u))


PROBLEMS = {f.__name__: f for f in (spectrum, indefinite, tanh, arrow)}
every_problem = pytest.mark.parametrize("make", PROBLEMS.values(), ids=PROBLEMS)


def complete(size: int) -> Lanczos:
    """Lanczos whose mean over probes is a trace: sqrt(size) times the unit vectors, every iteration."""

    class Complete(Lanczos):
        def probes(self, like: Tensor, layout: Layout) -> Tensor:
            basis = math.sqrt(size) * torch.eye(size)
            return basis[:, None, None].expand(size, *like.shape).contiguous()

    return Complete(size, size)


ESTIMATORS: dict[str, Callable[[int], LogDet]] = {
    "exact": lambda size: Exact(),
    "lanczos": complete,
    "automatic": lambda size: Automatic(),
}
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)


def apply(estimator: LogDet, problem: Problem) -> LogDetResult:
    probes = estimator.probes(problem.diagonal, problem.layout)
    return estimator(problem.product, problem.diagonal, problem.layout, probes)


def gradients(value: Tensor, problem: Problem) -> tuple[Tensor, ...]:
    weights = torch.linspace(1.0, 2.0, value.numel()).reshape(value.shape)
    return torch.autograd.grad((weights * value).sum(), problem.leaves, retain_graph=True)


# ------------------------------------------------------------------------------------------------ value, gradient


@every_problem
@every_estimator
def test_value_and_gradient_are_those_of_the_dense_matrix(estimator: Callable, make: Callable) -> None:
    problem = make()
    result, expected = apply(estimator(problem.layout.size), problem), problem.oracle()
    assert result.value.shape == result.singular.shape == problem.diagonal.shape[:2]
    close(result.value, expected, rtol=1e-10)
    close(gradients(result.value, problem), gradients(expected, problem), rtol=1e-8)
    assert torch.equal(result.singular, problem.smallest() <= 0)


@every_estimator
def test_the_arrowhead_and_the_dense_path_agree(estimator: Callable) -> None:
    problem = arrow()
    dense = replace(problem, layout=plain(1, problem.layout.size))
    result, expected = apply(estimator(problem.layout.size), problem), apply(Exact(), dense)
    close(result.value, expected.value, rtol=1e-10)
    close(gradients(result.value, problem), gradients(expected.value, problem), rtol=1e-8)


@every_problem
@every_estimator
def test_no_graph_where_none_is_wanted(estimator: Callable, make: Callable) -> None:
    problem = make()
    with torch.no_grad():
        value = apply(estimator(problem.layout.size), problem).value
    assert not value.requires_grad
    close(value, problem.oracle().detach(), rtol=1e-10)


@pytest.mark.parametrize("num_probes", [1, 4, 400])
def test_rademacher_probes_are_unbiased(num_probes: int) -> None:
    """Within 4 standard errors, which are known: ``Var(v' B v) = 2 sum_{i != j} B_ij^2`` for symmetric ``B``.

    Over seeds, about 1 in 2000 of these 7 comparisons would fail.
    """
    problem = spectrum()
    estimator = Lanczos(num_probes, SIZE)
    probes = estimator.probes(problem.diagonal, problem.layout)
    assert probes.shape == (num_probes, CHAINS, ROWS, SIZE)
    assert torch.equal(probes.abs(), torch.ones_like(probes))
    value = apply(estimator, problem).value
    slope = torch.autograd.grad(value.sum(), problem.leaves[1], retain_graph=True)[0]

    root = problem.diagonal.detach().sqrt()
    a = root.unsqueeze(-1) * problem.hessian.detach() * root.unsqueeze(-2)
    eigenvalues, basis = torch.linalg.eigh(a)

    def spread(of_eigenvalues: Tensor) -> Tensor:
        b = (basis * of_eigenvalues.unsqueeze(-2)) @ basis.mT
        off = b - torch.diag_embed(b.diagonal(dim1=-1, dim2=-2))
        return 2 * off.square().sum((-1, -2)) / num_probes

    expected = problem.oracle()
    error = value - expected
    assert (error.abs() < 4 * spread(eigenvalues.log1p()).sqrt()).all()
    expected_slope = torch.autograd.grad(expected.sum(), problem.leaves[1])[0]
    error = slope - expected_slope
    assert error.abs() < 4 * spread(eigenvalues / (1 + eigenvalues)).sum().sqrt()


@pytest.mark.parametrize("iterations", [1, 2, 3, 4])
def test_few_iterations_keep_the_bound_of_gauss_quadrature(iterations: int) -> None:
    r"""The error is at most twice that of the best polynomial of degree 2m - 1.

    On ``[a, b]``, ``log`` has the Chebyshev coefficients ``-(2/k) (-r)^k`` with
    ``r = (sqrt(b/a) - 1) / (sqrt(b/a) + 1)``, so the best polynomial is at most ``r^{2m} / (m (1 - r))`` away.
    """
    h = with_spectrum(torch.linspace(-7.0, 9.0, SIZE).expand(CHAINS, ROWS, SIZE))
    problem = given(h, torch.full((CHAINS, ROWS, SIZE), 0.1))
    estimator = complete(SIZE)
    estimator.num_iterations = iterations
    kappa = math.sqrt((1 + 0.9) / (1 - 0.7))
    r = (kappa - 1) / (kappa + 1)
    bound = SIZE * 2 * r ** (2 * iterations) / (iterations * (1 - r))
    error = (apply(estimator, problem).value - problem.oracle()).abs()
    assert (error < bound).all()
    assert (error > 0).all()  # and it is the truncated value


def test_as_many_iterations_as_eigenvalues_are_enough() -> None:
    eigenvalues = torch.tensor([-6.0, -6.0, -1.0, -1.0, 3.0, 3.0])
    h = with_spectrum(eigenvalues.expand(CHAINS, ROWS, SIZE))
    problem = given(h, torch.full((CHAINS, ROWS, SIZE), 0.1))
    estimator = complete(SIZE)
    estimator.num_iterations = 3
    value, expected = apply(estimator, problem).value, problem.oracle()
    close(value, expected, rtol=1e-10)
    theta = problem.leaves[1]
    actual, dense = (torch.autograd.grad(v.sum(), theta, retain_graph=True) for v in (value, expected))
    close(actual, dense, rtol=1e-8)


@every_estimator
@pytest.mark.parametrize("scale", [0.0, 1.0, -3.0])
def test_multiples_of_the_identity(estimator: Callable, scale: float) -> None:
    """The Krylov space has one dimension, so Lanczos breaks down at once."""
    problem = given((scale * torch.eye(SIZE)).expand(CHAINS, ROWS, SIZE, SIZE), torch.full((CHAINS, ROWS, SIZE), 0.1))
    result = apply(estimator(SIZE), problem)
    close(result.value, torch.full((CHAINS, ROWS), SIZE * math.log1p(0.1 * scale)), rtol=1e-10)
    expected = SIZE * 0.1 * scale / (1 + 0.1 * scale) * CHAINS * ROWS
    close(torch.autograd.grad(result.value.sum(), problem.leaves[1])[0], torch.tensor(expected), rtol=1e-8)


# ------------------------------------------------------------------------------------------------ rows


@every_estimator
def test_rows_do_not_mix(estimator: Callable) -> None:
    problem = spectrum()
    together = apply(estimator(SIZE), problem)
    for c in range(CHAINS):
        for r in range(ROWS):
            h = problem.hessian[c : c + 1, r : r + 1]
            diagonal = problem.diagonal[c : c + 1, r : r + 1]
            alone = replace(problem, layout=plain(1, SIZE), diagonal=diagonal, product=times(h))
            close(apply(estimator(SIZE), alone).value[0, 0], together.value[c, r], rtol=1e-10)
    gradient = torch.autograd.grad(together.value[1, 2], problem.diagonal)[0]
    assert gradient[1, 2].abs().min() > 0
    gradient[1, 2] = 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


@every_estimator
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_row_stays_alone(estimator: Callable, bad: float) -> None:
    problem = spectrum()
    h = problem.hessian.detach().clone()
    h[1, 0, 2, 2] = bad
    result = apply(estimator(SIZE), replace(problem, product=times(h)))
    expected = problem.oracle()
    fine = torch.ones((CHAINS, ROWS), dtype=torch.bool)
    fine[1, 0] = False
    close(result.value[fine], expected[fine], rtol=1e-10)
    assert not result.value[1, 0].isfinite()
    assert not result.singular[fine].any()


@every_estimator
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 3], ids=["shared", "local"])
def test_a_non_finite_arrowhead_stays_alone(estimator: Callable, bad: float, place: int) -> None:
    problem = arrow()
    h = problem.hessian.detach().clone()
    h[1, 0, place, place] = bad
    result = apply(estimator(problem.layout.size), replace(problem, product=times(h)))
    close(result.value[0], problem.oracle()[0], rtol=1e-10)
    assert not result.value[1, 0].isfinite()


# ------------------------------------------------------------------------------------------------ the singular flag


@every_estimator
@pytest.mark.parametrize("shape", ["dense", "arrow"])
def test_singular_means_an_eigenvalue_that_is_not_positive(estimator: Callable, shape: str) -> None:
    """Over random matrices around the threshold; the sign of the determinant would not do (two bad eigenvalues)."""
    flags, expected = [], []
    for _ in range(20):
        if shape == "dense":
            h, layout = with_spectrum(4.0 * torch.randn((CHAINS, ROWS, 3)) - 4.0), plain(ROWS, 3)
        else:
            h, layout = arrow_matrix(2, 2, 2, curvature=-3.0), arrowhead(2, 2, 2)
        problem = given(h, 0.2 * torch.rand(h.shape[:-1]), layout)
        flags.append(apply(estimator(problem.layout.size), problem).singular)
        expected.append(problem.smallest() <= 0)
    assert 0.1 < torch.stack(expected).to(torch.get_default_dtype()).mean() < 0.9
    assert torch.equal(torch.stack(flags), torch.stack(expected))


@every_estimator
@pytest.mark.parametrize(("eigenvalue", "singular"), [(-0.5, False), (-1.0, True), (-1.5, True)])
def test_the_threshold_itself_is_singular(estimator: Callable, eigenvalue: float, singular: bool) -> None:
    problem = given(torch.diag(torch.tensor([eigenvalue, 0.5])).expand(1, 1, 2, 2), torch.ones((1, 1, 2)))
    assert apply(estimator(2), problem).singular.item() is singular


@pytest.mark.parametrize(
    ("shared", "local", "singular"),
    [(-0.5, -0.5, False), (-3.0, -0.5, True), (-0.5, -3.0, True), (-3.0, -3.0, True)],
)
def test_an_arrowhead_is_singular_in_its_blocks_or_its_complement(shared: float, local: float, singular: bool) -> None:
    h = torch.diag(torch.tensor([shared, local, -0.5])) + 0.1 * torch.tensor([[0.0, 1, 1], [1, 0, 0], [1, 0, 0]])
    problem = given(h.expand(1, 1, 3, 3), torch.full((1, 1, 3), 0.5), arrowhead(1, 2, 1))
    assert apply(Exact(), problem).singular.item() is singular


# ------------------------------------------------------------------------------------------------ clipped coordinates


@every_estimator
@pytest.mark.parametrize("make", [spectrum, arrow])
@pytest.mark.parametrize("clipped", ["some", "all"])
def test_zeros_in_the_diagonal(estimator: Callable, make: Callable, clipped: str) -> None:
    """A clipped coordinate's row of the Jacobian is that of the identity; other gradients are those of the rest."""
    problem = make()
    with torch.no_grad():
        problem.diagonal[..., :: 1 if clipped == "all" else 2] = 0
    result, expected = apply(estimator(problem.layout.size), problem), problem.oracle()
    close(result.value, expected, rtol=1e-10)
    assert not result.singular.any()
    (d, theta), (d_dense, theta_dense) = (gradients(v, problem) for v in (result.value, expected))
    assert d.isfinite().all()
    moving = problem.diagonal > 0
    close(d[moving], d_dense[moving], rtol=1e-8)
    close(theta, theta_dense, rtol=1e-8)


# ------------------------------------------------------------------------------------------------ subsampling


def test_a_subsampled_arrowhead_stands_for_the_full_data() -> None:
    """A batch of 4 of 8, where the other half of the data and of its latents is a copy of the batch."""
    batch = data(4)
    x, index = torch.cat([batch, batch]), torch.arange(4)
    half, full = bind(both, x, 4, indices={"n": index}).density, bind(both, x).density
    assert half.layout.arrow is not None and half.layout.arrow.weight == 2
    u = 0.3 * torch.randn((CHAINS, 1, half.layout.size))
    free = half.layout.unpack(u)
    copies = {k: torch.cat([v, v], -1) if v.dim() > 1 else v for k, v in free.items()}
    eta = torch.tensor(0.03, requires_grad=True)

    def log_det(density: object, u: Tensor, dense: bool) -> tuple[Tensor, Tensor]:
        u = u.detach().requires_grad_()
        _, grad = density.value_and_grad(u, create_graph=True)
        product = density.hessian_product(u, grad, create_graph=True)
        layout = plain(1, u.shape[-1]) if dense else density.layout
        diagonal = (eta * density.layout.drift_scale(u)).expand_as(u)
        value, singular = Exact()(product, diagonal, layout)
        assert not singular.any()
        return value, torch.autograd.grad(value.sum(), eta)[0]

    close(log_det(half, u, False), log_det(full, full.layout.pack(copies), True), rtol=1e-10)


def test_lanczos_refuses_a_subsampled_arrowhead() -> None:
    problem = given(arrow_matrix(2, 3, 2), layout=arrowhead(2, 3, 2, weight=2))
    with pytest.raises(NotImplementedError, match=r"logdet=Exact\(\)"):
        apply(Lanczos(), problem)


# ------------------------------------------------------------------------------------------------ choices


def test_automatic_counts_hessian_products() -> None:
    automatic = Automatic(max_products=6)
    assert isinstance(automatic.choose(plain(3, 6)), Exact)
    assert isinstance(automatic.choose(plain(3, 7)), Lanczos)
    assert isinstance(automatic.choose(arrowhead(4, 100, 2)), Exact)
    assert isinstance(automatic.choose(arrowhead(4, 100, 3)), Lanczos)


@pytest.mark.parametrize("counts", [(0, 1), (1, 0), (-1, 5)])
def test_lanczos_needs_probes_and_iterations(counts: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="num_(probes|iterations) must be an integer >= 1"):
        Lanczos(*counts)
