"""Solvers, Fisher estimates, randomised decompositions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ccrl.gp.fisher import AnalyticFisher, BatchFisher, RunningFisher, symmetric_inverse
from ccrl.gp.lowrank import randomised_eigh, randomised_right_svd
from ccrl.gp.posterior import Covariance
from ccrl.gp.solve import CG, Cholesky, LowRank, pivoted_cholesky

DOUBLE = torch.float64


def smooth(n: int) -> Tensor:
    x = torch.linspace(0.0, 3.0, n, dtype=DOUBLE)
    return torch.exp(-0.5 * (x[:, None] - x).square())


# -- solvers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40,), (40, 3)])
def test_three_ways_one_solution(shape: tuple[int, ...]) -> None:
    gram, noise, b = smooth(40), 1e-2, torch.randn(*shape, dtype=DOUBLE)
    matrix = gram + noise * torch.eye(40, dtype=DOUBLE)
    expected = torch.linalg.solve(matrix, b)
    root = pivoted_cholesky(lambda i: gram[:, i], gram.diagonal(), 40)
    assert root.shape[1] < 20, "a smooth kernel has a small numerical rank"
    preconditioner = LowRank(root[:, :5], noise)
    for solver in (
        Cholesky(matrix), LowRank(root, noise), CG(lambda x: matrix @ x, tolerance=1e-10),
        CG(lambda x: matrix @ x, tolerance=1e-10, preconditioner=preconditioner),
    ):  # fmt: skip
        assert torch.allclose(solver.solve(b), expected, rtol=1e-6, atol=1e-7), type(solver)


def test_preconditioning_saves_iterations() -> None:
    gram, noise = smooth(60), 1e-3
    matrix = gram + noise * torch.eye(60, dtype=DOUBLE)
    b = torch.randn(60, dtype=DOUBLE)
    plain = CG(lambda x: matrix @ x)
    good = CG(
        lambda x: matrix @ x,
        preconditioner=LowRank(pivoted_cholesky(lambda i: gram[:, i], gram.diagonal(), 8), noise),
    )
    plain.solve(b)
    good.solve(b)
    assert good.iterations < plain.iterations


@pytest.mark.parametrize("tolerance", [1e-3, 0.01, 1.0, 0.0])
def test_loose_tolerances_are_refused(tolerance: float) -> None:
    with pytest.raises(ValueError, match="tolerance"):
        CG(lambda x: x, tolerance=tolerance)


def test_the_tolerance_is_kept_whatever_gpytorch_is_set_to() -> None:
    gpytorch = pytest.importorskip("gpytorch")
    matrix = smooth(50) + 1e-4 * torch.eye(50, dtype=DOUBLE)
    b = torch.randn(50, dtype=DOUBLE)
    with gpytorch.settings.cg_tolerance(1.0), gpytorch.settings.max_cholesky_size(1):
        x = CG(lambda v: matrix @ v, tolerance=1e-8).solve(b)
    assert float((matrix @ x - b).norm()) <= 1.1e-8 * float(b.norm())


def test_every_column_is_solved_relative_to_its_own_length() -> None:
    """A short column next to a long one, and an easy one (an eigenvector) next to a hard one."""
    matrix = smooth(50) + 1e-3 * torch.eye(50, dtype=DOUBLE)
    b = torch.randn(50, 3, dtype=DOUBLE) * torch.tensor([1.0, 1e-9, 1.0], dtype=DOUBLE)
    b[:, 2] = torch.linalg.eigh(matrix).eigenvectors[:, -1]
    solver = CG(lambda v: matrix @ v, tolerance=1e-8)
    for right in (b, b[:, 1:2]):  # alone, the short one has no neighbour that keeps the iterations going
        residual = matrix @ solver.solve(right) - right
        assert bool((residual.norm(dim=0) <= 1.1e-8 * right.norm(dim=0)).all())


def test_the_greedy_factor_stops_at_its_tolerance() -> None:
    """What is missed: less than this share of the trace, with no more columns than that takes."""
    gram = smooth(40)
    ranks = []
    for tolerance in (1e-2, 1e-5):
        root = pivoted_cholesky(lambda i: gram[:, i], gram.diagonal(), 40, tolerance)
        missed = [float(gram.trace() - root[:, :k].square().sum()) for k in range(root.shape[1] + 1)]
        assert missed[-1] <= tolerance * 40.0 < missed[-2]
        ranks.append(root.shape[1])
    assert ranks[0] < ranks[1]


def test_conjugate_gradients_say_when_they_fail() -> None:
    matrix = smooth(50) + 1e-10 * torch.eye(50, dtype=DOUBLE)
    with pytest.raises(FloatingPointError, match="after 2 iterations"):
        CG(lambda v: matrix @ v, max_iterations=2).solve(torch.randn(50, dtype=DOUBLE))


def test_conjugate_gradients_of_nan_are_no_zero() -> None:
    """No residual is above the tolerance where all are NaN: the start, 0, was the solution."""
    for matrix, b in ((torch.nan, 1.0), (1.0, torch.nan)):
        with pytest.raises(FloatingPointError, match="got nan after"):
            CG(lambda v, matrix=matrix: matrix * v).solve(torch.full((3,), b, dtype=DOUBLE))


def test_conjugate_gradients_solve_zero_by_zero() -> None:
    b = torch.zeros(4, 2, dtype=DOUBLE)
    b[:, 1] = 1.0
    x = CG(lambda v: 2.0 * v).solve(b)
    assert torch.equal(x, 0.5 * b)


def test_failed_factorisations_get_the_smallest_jitter_that_works() -> None:
    matrix = torch.ones(3, 3, dtype=DOUBLE)
    matrix[0, 1] = matrix[1, 0] = 1.0 + 5e-8  # eigenvalue -5e-8
    for scale in (1.0, 1e3):  # the jitter is a share of the mean diagonal
        solver = Cholesky(scale * matrix)
        assert solver.jitter == pytest.approx(1e-7 * scale)
        assert bool(solver.solve(torch.ones(3, dtype=DOUBLE)).isfinite().all())
    assert Cholesky(torch.eye(2, dtype=DOUBLE)).jitter == 0.0


@pytest.mark.parametrize("bad", [-torch.eye(2, dtype=DOUBLE), torch.full((2, 2), torch.nan, dtype=DOUBLE)])
def test_hopeless_matrices_raise_instead_of_giving_nan(bad: Tensor) -> None:
    with pytest.raises(FloatingPointError, match="positive definite"):
        Cholesky(bad)


def test_wrong_solver_arguments() -> None:
    with pytest.raises(ValueError, match="square"):
        Cholesky(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="noise"):
        LowRank(torch.zeros(2, 1), 0.0)
    with pytest.raises(ValueError, match="max_iterations"):
        CG(lambda x: x, max_iterations=0)


# -- Fisher matrices --------------------------------------------------------------------------------------------------


def test_running_inverse_is_the_inverse_of_the_running_matrix() -> None:
    u = torch.randn(3, 20, dtype=DOUBLE)
    for rate in (0.0, 0.2):
        fisher = RunningFisher(3, rate)
        fisher.estimate(u[:, :8])
        matrix, inverse = fisher.estimate(u[:, 8:])
        assert torch.allclose(matrix @ inverse, torch.eye(3, dtype=DOUBLE), atol=1e-10)
    fisher, w = RunningFisher(3), torch.rand(20, dtype=DOUBLE)
    matrix, _ = fisher.estimate(u)
    assert torch.allclose(matrix, (torch.eye(3, dtype=DOUBLE) + u @ u.T) / 21.0)
    weighted = RunningFisher(3).estimate(u, w).matrix
    assert torch.allclose(weighted, (torch.eye(3, dtype=DOUBLE) + (u * w) @ u.T) / 21.0)
    kept, before = fisher.estimate(u[:, :3]), fisher.matrix.clone()
    fisher.estimate(u[:, 3:])
    assert torch.equal(kept.matrix, before), "the covariance of the last iteration would change with this one"
    assert torch.allclose(kept.matrix @ kept.inverse, torch.eye(3, dtype=DOUBLE))
    copy = RunningFisher(3)
    copy.load_state_dict(fisher.state_dict())
    assert torch.equal(copy.estimate(u[:, :1]).inverse, fisher.estimate(u[:, :1]).inverse)


def test_the_running_matrix_forgets_at_its_rate_but_not_the_identity() -> None:
    """z = 1/2, 1/3, then the rate; a direction without scores keeps ``damping``, also after a checkpoint."""
    u = torch.randn(3, 8, dtype=DOUBLE)
    expected = torch.eye(3, dtype=DOUBLE)
    for z, x in zip((1 / 2, 1 / 3, *[0.3] * 6), u.unbind(1)):
        expected = (1.0 - z) * expected + z * torch.outer(x, x)
    assert torch.allclose(RunningFisher(3, 0.3).estimate(u).matrix, expected)

    along = torch.zeros(2, 6, dtype=DOUBLE)
    along[0] = 2.0
    first = RunningFisher(2, 0.5, damping=1e-2)
    matrix, inverse = first.estimate(along)  # 0.5^6 of the identity is left: more than damping
    assert float(matrix[1, 1]) == pytest.approx(0.5**6)
    second = RunningFisher(2, 0.5, damping=1e-2)
    second.load_state_dict(first.state_dict())
    for fisher in (first, second):
        matrix, inverse = fisher.estimate(along[:, :1])
        assert float(matrix[1, 1]) == pytest.approx(1e-2)
        assert torch.allclose(matrix @ inverse, torch.eye(2, dtype=DOUBLE))


def test_batch_estimates() -> None:
    u, w = torch.randn(2, 10, dtype=DOUBLE), torch.rand(10, dtype=DOUBLE)
    eye = torch.eye(2, dtype=DOUBLE)
    assert torch.allclose(BatchFisher("sum", 0.5).estimate(u).matrix, u @ u.T + 0.5 * eye)
    assert torch.allclose(BatchFisher("mean", 0.0).estimate(u, w).matrix, (u * w) @ u.T / 10)


def test_analytic_estimates_are_checked() -> None:
    fisher = AnalyticFisher(lambda: torch.diag(torch.tensor([1.0, 2.0])))
    inverse = fisher.estimate(torch.zeros(2, 3, dtype=DOUBLE)).inverse
    assert inverse.diagonal().tolist() == pytest.approx([1.0, 0.5])
    with pytest.raises(ValueError, match="AnalyticFisher"):
        fisher.estimate(torch.zeros(3, 3, dtype=DOUBLE))


def test_singular_matrices_have_a_pseudo_inverse() -> None:
    u = torch.tensor([[1.0, -1.0], [2.0, -2.0]], dtype=DOUBLE)
    matrix, inverse = BatchFisher("sum", 0.0).estimate(u)
    assert torch.allclose(matrix @ inverse @ matrix, matrix)
    assert torch.equal(symmetric_inverse(torch.zeros(2, 2, dtype=DOUBLE)), torch.zeros(2, 2, dtype=DOUBLE))
    # of rounding size, but positive: Cholesky succeeds where the inverse would be noise
    nearly = torch.diag(torch.tensor([1.0, 1e-12], dtype=DOUBLE))
    assert torch.equal(symmetric_inverse(nearly), torch.diag(torch.tensor([1.0, 0.0], dtype=DOUBLE)))
    assert symmetric_inverse(nearly, rtol=0.0)[1, 1] == pytest.approx(1e12)
    with pytest.raises(FloatingPointError, match="finite"):
        symmetric_inverse(torch.full((2, 2), torch.nan, dtype=DOUBLE))


def test_wrong_fisher_arguments() -> None:
    with pytest.raises(ValueError, match="reduction"):
        BatchFisher("total")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="damping"):
        BatchFisher(damping=-1.0)
    with pytest.raises(ValueError, match="rate"):
        RunningFisher(2, 1.0)
    with pytest.raises(ValueError, match="RunningFisher"):
        RunningFisher(2).estimate(torch.zeros(3, 1))


# -- decompositions ---------------------------------------------------------------------------------------------------


def test_randomised_decompositions_are_exact_on_low_ranks() -> None:
    u = torch.randn(6, 3, dtype=DOUBLE) @ torch.randn(3, 30, dtype=DOUBLE)
    generator = torch.Generator().manual_seed(0)
    found = randomised_right_svd(lambda w: u @ w, lambda v: u.T @ v, 30, 3, generator, like=u)
    assert torch.allclose((found.vectors * found.values.square()) @ found.vectors.T, u.T @ u, atol=1e-8)
    covariance = u @ u.T
    pairs = randomised_eigh(lambda v: covariance @ v, 6, 3, generator, like=u)
    assert torch.allclose((pairs.vectors * pairs.values) @ pairs.vectors.T, covariance, atol=1e-8)
    assert torch.equal(pairs.values, pairs.values.sort(descending=True).values)
    assert (found.vectors.shape, pairs.vectors.shape) == ((30, 3), (6, 3))
    # rounding below 0 would be a NaN under the square roots of UAPG
    rounded = torch.diag(torch.tensor([1.0, -1e-17], dtype=DOUBLE))
    assert float(randomised_eigh(lambda v: rounded @ v, 2, 2, generator, like=u).values.min()) >= 0.0
    for call in (
        lambda: randomised_eigh(lambda v: v, 3, 0, generator, like=u),
        lambda: randomised_right_svd(lambda v: v, lambda v: v, 3, 0, generator, like=u),
    ):
        with pytest.raises(ValueError, match="rank"):
            call()


def test_covariances_are_operators() -> None:
    matrix = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=DOUBLE)
    covariance = Covariance(2, lambda v: matrix @ v, matrix)
    assert torch.equal(covariance.dense(), matrix)
    assert float(covariance.trace()) == 3.0
    assert covariance(torch.ones(2)).tolist() == [2.5, 1.5]
    rounded = Covariance(2, lambda v: matrix.triu() @ v, matrix).dense()  # products are symmetric up to rounding
    assert torch.equal(rounded, rounded.T)
    with pytest.raises(ValueError, match=r"\[2\]"):
        covariance(torch.ones(3))
