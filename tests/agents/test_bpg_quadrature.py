"""Bayesian quadrature of the policy gradient: numbers by hand, identities, edge cases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("gpytorch")

from agents.bpg.quadrature import model1, model2
from ccrl.gp.fisher import BatchFisher, FisherEstimate

DOUBLE = torch.float64
MODELS = [model1, model2]


def bandit(a: list[float] | Tensor) -> tuple[Tensor, Tensor]:
    """Scores of ``N(0, 1)`` in (mean, deviation), and actions."""
    a = torch.as_tensor(a, dtype=DOUBLE)
    return torch.stack([a, a * a - 1.0]), a


def known(*diagonal: float) -> FisherEstimate:
    matrix = torch.diag(torch.tensor(diagonal, dtype=DOUBLE))
    return FisherEstimate(matrix, matrix.inverse())


def close(x: Tensor, expected: object, atol: float = 1e-6) -> bool:
    return torch.allclose(x, torch.tensor(expected, dtype=DOUBLE), atol=atol, rtol=0)


def test_hand_numbers() -> None:
    """Bandit: u = (a, a^2 - 1) at a = (-1, .5, 2), R = a, G = diag(1, 2), sigma^2 = .1.

    K_F = [[1, -.5, -2], [-.5, .53125, -.125], [-2, -.125, 8.5]] and the posteriors of docs/bpg.md: U diag(R) C b with
    b_i = 1 + K_ii and C = ((1 + K_F)^2 + .1 I)^-1; U C R and G - U C U^T with C = (K_F + .1 I)^-1.
    """
    u, a = bandit([-1.0, 0.5, 2.0])
    one, two = model1(u, a, known(1, 2), 0.1), model2(u, a, known(1, 2), 0.1)
    assert close(one.mean, [0.951660, 0.367068])
    assert close(one.covariance.dense(), [[0.383547, 0.0], [0.0, 0.383547]])
    assert close(two.mean, [0.952583, 0.054641])
    assert close(two.covariance.dense(), [[0.047417, -0.054641], [-0.054641, 0.103940]])


def test_model_2_with_the_matrix_of_its_own_batch_is_monte_carlo() -> None:
    """U y / (M + sigma^2), whatever the data."""
    u, y = torch.randn(3, 12, dtype=DOUBLE), torch.randn(12, dtype=DOUBLE)
    posterior = model2(u, y, BatchFisher("mean", 0.0).estimate(u), 0.7)
    assert torch.allclose(posterior.mean, u @ y / (12 + 0.7))


def test_returns_in_the_span_are_found_exactly() -> None:
    """R = a = u_1 lies in the span of model 2's kernel, R u of R = a^2 in that of model 1: gradients (1, 0), (0, 2)."""
    u, a = bandit([-0.7, 1.3])
    assert close(model2(u, a, known(1, 2), 1e-8).mean, [1.0, 0.0], atol=1e-5)
    u, a = bandit([-1.6, -0.7, 0.1, 0.9, 2.0])
    assert close(model1(u, a * a, known(1, 2), 1e-8).mean, [0.0, 2.0], atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("constant", [0.0, 2.0])
def test_sparse_equals_dense_once_the_dictionary_spans(model, constant: float) -> None:
    u, y = torch.randn(2, 30, dtype=DOUBLE), torch.randn(30, dtype=DOUBLE)
    options = {"amplitude": 1.5, "constant": constant}
    dense = model(u, y, known(1, 2), 0.3, **options)
    sparse = model(u, y, known(1, 2), 0.3, sparsity=1e-9, **options)
    assert torch.allclose(dense.mean, sparse.mean, atol=1e-6)
    assert torch.allclose(dense.covariance.dense(), sparse.covariance.dense(), atol=1e-6)


@pytest.mark.parametrize("model", MODELS)
def test_amplitude_and_noise_scale_together(model) -> None:
    u, y = bandit(torch.randn(6))
    one = model(u, y, known(1, 2), 0.2, amplitude=1.0, constant=0.5)
    ten = model(u, y, known(1, 2), 2.0, amplitude=10.0, constant=5.0)
    assert torch.allclose(one.mean, ten.mean)
    assert torch.allclose(10.0 * one.covariance.dense(), ten.covariance.dense())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("constant", [0.0, 3.0])
def test_properties_of_the_posterior(model, constant: float) -> None:
    """Between 0 and the prior, never wider for one path more, blind to order, and the prior itself in endless noise."""
    u, y = torch.randn(3, 9, dtype=DOUBLE), torch.randn(9, dtype=DOUBLE)
    fisher = known(1.0, 2.0, 0.5)
    options = {"constant": constant}
    posterior = model(u, y, fisher, 0.4, **options)
    covariance = posterior.covariance.dense()
    prior = fisher.matrix if model is model2 else (1.0 + 3 + constant) * torch.eye(3, dtype=DOUBLE)
    for matrix in (covariance, prior - covariance):
        assert float(torch.linalg.eigvalsh(matrix).min()) > -1e-10
    fewer = model(u[:, :8], y[:8], fisher, 0.4, **options).covariance.diagonal()
    assert bool((covariance.diagonal() <= fewer + 1e-12).all())
    order = torch.randperm(9)
    shuffled = model(u[:, order], y[order], fisher, 0.4, **options)
    assert torch.allclose(shuffled.mean, posterior.mean)
    assert torch.allclose(shuffled.covariance.dense(), covariance)
    nothing = model(u, y, fisher, 1e12, **options)
    assert float(nothing.mean.abs().max()) < 1e-9
    assert torch.allclose(nothing.covariance.dense(), prior)


@pytest.mark.parametrize("constant", [0.0, 3.0])
def test_model_1_with_amplitude_and_constant_by_hand(constant: float) -> None:
    """k = s (1 + q_ij)^2 + c, b_i = s (1 + q_ii) + c, b0 = s (1 + n) + c with q = u' G^-1 u."""
    u, y = torch.randn(2, 5, dtype=DOUBLE), torch.randn(5, dtype=DOUBLE)
    fisher = known(1.0, 2.0)
    q = u.T @ fisher.inverse @ u
    inverse = torch.linalg.inv(1.5 * (1.0 + q).square() + constant + 0.3 * torch.eye(5, dtype=DOUBLE))
    b = 1.5 * (1.0 + q.diagonal()) + constant
    posterior = model1(u, y, fisher, 0.3, amplitude=1.5, constant=constant)
    assert torch.allclose(posterior.mean, u @ (y * (inverse @ b)))
    variance = 1.5 * 3.0 + constant - b @ inverse @ b
    assert torch.allclose(posterior.covariance.dense(), variance * torch.eye(2, dtype=DOUBLE))


def test_the_natural_gradient_has_the_transformed_covariance() -> None:
    u, y = torch.randn(2, 5, dtype=DOUBLE), torch.randn(5, dtype=DOUBLE)
    fisher = known(1.0, 4.0)
    posterior = model2(u, y, fisher, 0.1)
    natural = posterior.natural(fisher.inverse)
    assert torch.allclose(natural.mean, fisher.inverse @ posterior.mean)
    assert torch.allclose(natural.covariance.dense(), fisher.inverse @ posterior.covariance.dense() @ fisher.inverse)


def test_equal_returns_need_the_constant() -> None:
    """Model 2 takes c U C 1 for a gradient, the constant explains it away."""
    u = torch.randn(2, 8, dtype=DOUBLE)
    y = torch.full((8,), 5.0, dtype=DOUBLE)
    plain = model2(u, y, known(1, 1), 0.1)
    solution = torch.linalg.solve(u.T @ u + 0.1 * torch.eye(8, dtype=DOUBLE), y)
    assert torch.allclose(plain.mean, u @ solution)
    assert float(plain.mean.norm()) > 0.1
    helped = model2(u, y, known(1, 1), 0.1, constant=1e6)
    assert float(helped.mean.norm()) < 1e-3


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("sparsity", [None, 1e-6])
def test_edge_cases_give_finite_posteriors(model, sparsity: float | None) -> None:
    fisher = known(1.0, 2.0)
    prior = fisher.matrix if model is model2 else 3.0 * torch.eye(2, dtype=DOUBLE)
    for m in (0, 3):  # no path; paths of a saturated policy
        posterior = model(torch.zeros(2, m, dtype=DOUBLE), torch.ones(m, dtype=DOUBLE), fisher, 0.1, sparsity=sparsity)
        assert torch.equal(posterior.mean, torch.zeros(2, dtype=DOUBLE))
        assert torch.allclose(posterior.covariance.dense(), prior)
    u, y = bandit([1.5])
    single = model(u, y, fisher, 0.1, sparsity=sparsity)
    assert bool(single.mean.isfinite().all())
    twins = model(u.repeat(1, 4), y.repeat(4), fisher, 1e-12, sparsity=sparsity)  # a kernel matrix of rank 1
    assert bool(twins.mean.isfinite().all())
    assert float(twins.covariance.trace()) >= -1e-6


@pytest.mark.parametrize("model", MODELS)
def test_a_singular_fisher_matrix(model) -> None:
    """Two parameters that do the same: the gradient stays in the direction that the scores have."""
    u = torch.randn(1, 6, dtype=DOUBLE).repeat(2, 1)
    fisher = BatchFisher("mean", 0.0).estimate(u)
    posterior = model(u, torch.randn(6, dtype=DOUBLE), fisher, 0.1)
    assert bool(posterior.mean.isfinite().all())
    assert torch.allclose(posterior.mean[0], posterior.mean[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise": 0.0}, "noise"), ({"amplitude": -1.0}, "amplitude"), ({"constant": -1.0}, "constant"),
        ({"returns": torch.zeros(4)}, r"returns \[M\]"), ({"fisher": known(1.0)}, "G\\^-1"), ({"sparsity": 0.0}, "nu"),
    ],
)  # fmt: skip
def test_wrong_arguments(change: dict, message: str) -> None:
    u, a = bandit([1.0, 2.0])
    arguments = {"scores": u, "returns": a, "fisher": known(1, 2), "noise": 0.1} | change
    with pytest.raises(ValueError, match=message):
        model2(**arguments)


def test_the_bandit_table() -> None:
    """Section 6: Bayesian quadrature at M = 10 has about a tenth of Monte Carlo's deviation."""
    generator = torch.Generator().manual_seed(0)
    means, plain = [], []
    for _ in range(200):
        u, a = bandit(torch.randn(10, generator=generator, dtype=DOUBLE))
        means.append(model1(u, a, known(1, 2), 1e-3).mean)
        plain.append(u @ a / 10)
    bq, mc = torch.stack(means), torch.stack(plain)
    assert close(bq.mean(0), [0.986, 0.001], atol=0.02)
    assert bool((bq.std(0) < torch.tensor([0.1, 0.12])).all())
    assert bool((mc.std(0) > torch.tensor([0.35, 0.8])).all())
