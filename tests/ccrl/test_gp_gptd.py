"""GPTD, batch and recursive, and sparsification."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ccrl.gp.gptd import Chain, gptd, recursive_gptd
from ccrl.gp.solve import Cholesky
from ccrl.gp.sparsify import Dictionary, ald

DOUBLE = torch.float64


def gram(z: list[float] | Tensor, other: list[float] | None = None) -> Tensor:
    z = torch.as_tensor(z, dtype=DOUBLE)
    other = z if other is None else torch.tensor(other, dtype=DOUBLE)
    return torch.exp(-0.5 * (z[:, None] - other).square())


def chain(reward: list[float], rewarded: list[int], follows: list[int], gamma: float = 0.5) -> Chain:
    flags = [torch.tensor(x, dtype=torch.bool) for x in (rewarded, follows)]
    return Chain(torch.tensor(reward, dtype=DOUBLE), *flags, gamma)


def close(x: Tensor, expected: object) -> bool:
    return torch.allclose(x, torch.tensor(expected, dtype=DOUBLE), atol=1e-6, rtol=0)


def recursion(k: Tensor, steps: Chain, noise: float, nu: float):
    return recursive_gptd(lambda i: k[:, i], k.diagonal(), steps, noise, nu)


# -- hand numbers -----------------------------------------------------------------------------------------------------


def test_a_terminated_episode() -> None:
    """Regression on the returns (1 + .5 * 2, 2) = (2, 2): by symmetry alpha = 2 / (1 + .5 + exp(-1/2)), both of it.

    Q^ = (1 + exp(-1/2)) alpha, and C is the inverse of [[1.5, e], [e, 1.5]] with e = exp(-1/2) = 0.606531.
    """
    k, steps = gram([0.0, 1.0]), chain([1, 2], [1, 1], [1, 0])
    assert steps.returns().tolist() == [2.0, 2.0]
    for posterior in (gptd(k, steps, 0.5), recursion(k, steps, 0.5, 1e-12)):
        assert close(posterior.alpha, [0.949428, 0.949428])
        assert close(k @ posterior.alpha, [1.525286, 1.525286])
        precision = posterior.precision(torch.eye(2, dtype=DOUBLE))
        assert close(precision, [[0.796973, -0.322259], [-0.322259, 0.796973]])


def test_a_truncated_episode() -> None:
    """The last point has no reward: H = [[1, -.5, 0], [0, 1, -.5]], alpha = H^T (H (K + .5 I) H^T)^-1 (1, 2)."""
    k, steps = gram([0.0, 1.0, 2.0]), chain([1, 2, 99], [1, 1, 0], [1, 1, 0])
    for posterior in (gptd(k, steps, 0.5), recursion(k, steps, 0.5, 1e-12)):
        assert close(posterior.alpha, [0.864217, 1.185136, -0.808622])
        assert close(k @ posterior.alpha, [1.473603, 1.218856, 0.027158])


@pytest.mark.parametrize(
    ("nu", "index", "alpha", "mean", "variance"),
    [
        (1e-12, [0, 1, 2, 3], [1.754969, 1.152872, -1.364464, 0.191772], 1.368861, 0.194416),
        (0.05, [0, 1, 3], [0.478575, 1.006176, 0.216637], 1.380620, 0.200133),
    ],
)
def test_a_second_episode(nu: float, index: list[int], alpha: list[float], mean: float, variance: float) -> None:
    """z = (0, 1), r = (1, 2), then z = (.1, 2), r = (0, 1): with all four points regression on (2, 2, .5, 1).

    A threshold of .05 leaves .1 out, which lies 1 - exp(-.01) = .00995 from the span of 0 alone.
    """
    z = [0.0, 1.0, 0.1, 2.0]
    posterior = recursion(gram(z), chain([1, 2, 0, 1], [1] * 4, [1, 0, 1, 0]), 0.5, nu)
    assert posterior.index.tolist() == index
    assert close(posterior.alpha, alpha)
    at = gram([z[i] for i in index], [0.5])[:, 0]
    assert float(at @ posterior.alpha) == pytest.approx(mean, abs=1e-6)
    assert float(1.0 - at @ posterior.precision(at)) == pytest.approx(variance, abs=1e-6)


# -- identities -------------------------------------------------------------------------------------------------------


def random_chain(truncate: bool) -> tuple[Tensor, Chain]:
    """Three episodes of 4, 1 and 6 steps; the second and the last are cut if ``truncate``."""
    rewarded, follows = [], []
    for length, cut in ((4, False), (1, truncate), (6, truncate)):
        rewarded += [1] * length + [0] * cut
        follows += [1] * (length - 1) + [int(cut)] + [0] * cut
    z = torch.randperm(len(rewarded)).double()  # apart: no point is a combination of the others
    return gram(z), chain(torch.randn(len(rewarded)).tolist(), rewarded, follows, 0.9)


@pytest.mark.parametrize("truncate", [False, True])
def test_batch_recursion_and_conjugate_gradients_agree(truncate: bool) -> None:
    k, steps = random_chain(truncate)
    batch = gptd(k, steps, 0.3)
    others = [recursion(k, steps, 0.3, 1e-13), gptd(lambda x: k @ x, steps, 0.3, tolerance=1e-12)]
    v = torch.randn(len(k), 2, dtype=DOUBLE)
    for other in others:
        assert torch.allclose(other.alpha, batch.alpha, atol=1e-7)
        assert torch.allclose(other.precision(v), batch.precision(v), atol=1e-7)


@pytest.mark.parametrize("truncate", [False, True])
def test_the_definition(truncate: bool) -> None:
    """H^T (H K H^T + s H H^T)^-1 r with an H written out row by row."""
    k, steps = random_chain(truncate)
    rows = []
    for i in range(len(k)):
        if steps.rewarded[i]:
            row = torch.zeros(len(k), dtype=DOUBLE)
            row[i] = 1.0
            if steps.follows[i]:
                row[i + 1] = -0.9
            rows.append(row)
    h = torch.stack(rows)
    inner = torch.linalg.inv(h @ k @ h.T + 0.3 * h @ h.T)
    posterior = gptd(k, steps, 0.3)
    assert torch.allclose(posterior.alpha, h.T @ inner @ steps.reward[steps.rewarded])
    assert torch.allclose(posterior.precision(torch.eye(len(k), dtype=DOUBLE)), h.T @ inner @ h)
    x, y = torch.randn(len(k), dtype=DOUBLE), torch.randn(len(h), dtype=DOUBLE)
    # to the last digits: a discount that passes through float32 is off by 1e-8
    assert torch.allclose(steps.apply(x), h @ x, rtol=0, atol=1e-14)
    assert torch.allclose(steps.adjoint(y), h.T @ y, rtol=0, atol=1e-14)


@pytest.mark.parametrize("truncate", [False, True])
def test_the_recursion_is_exact_where_the_dictionary_spans(truncate: bool) -> None:
    """A kernel of rank 3: after three points no other joins, and nothing is lost."""
    k, steps = random_chain(truncate)
    features = torch.randn(len(k), 3, dtype=DOUBLE)
    k = features @ features.T
    batch, sparse = gptd(k, steps, 0.3), recursion(k, steps, 0.3, 1e-9)
    assert len(sparse.index) == 3
    part = k[:, sparse.index]
    assert torch.allclose(part @ sparse.alpha, k @ batch.alpha, atol=1e-8)
    assert torch.allclose(part @ sparse.precision(part.T), k @ batch.precision(k), atol=1e-8)


@pytest.mark.parametrize("truncate", [False, True])
def test_a_preconditioner_saves_products(truncate: bool) -> None:
    """It is one of K + sigma^2 I, also where episodes are cut: the exact inverse needs a single iteration a solve."""
    k, steps = random_chain(truncate)
    calls: list[int] = []

    def product(x: Tensor) -> Tensor:
        calls.append(1)
        return k @ x

    expected, counts = gptd(k, steps, 0.3), []
    for preconditioner in (None, Cholesky(k + 0.3 * torch.eye(len(k), dtype=DOUBLE))):
        calls.clear()
        found = gptd(product, steps, 0.3, tolerance=1e-10, preconditioner=preconditioner)
        assert torch.allclose(found.alpha, expected.alpha, atol=1e-7)
        counts.append(len(calls))
    assert counts[1] <= (4 if truncate else 2)
    assert counts[1] < counts[0]


def test_the_null_space_of_truncated_episodes() -> None:
    """H D = 0: powers of gamma back from each closing point, here of an episode of two steps and one of one."""
    steps = chain([1, 2, 7, 1, 7], [1, 1, 0, 1, 0], [1, 1, 0, 1, 0])
    null = steps.null_space()
    assert null.tolist() == [[0.25, 0.0], [0.5, 0.0], [1.0, 0.0], [0.0, 0.5], [0.0, 1.0]]
    assert steps.apply(null).abs().max() == 0.0
    assert chain([1, 2], [1, 1], [1, 0]).null_space().shape == (2, 0)


def test_the_threshold_is_in_the_unit_of_the_kernel() -> None:
    """delta of the second point is 100 (1 - 0.9^2) = 19: above a threshold of 18, below one of 20."""
    k = 100.0 * torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=DOUBLE)
    sizes = [len(ald(lambda i: k[:, i], k.diagonal(), nu).index) for nu in (18.0, 20.0)]
    assert sizes == [2, 1]


def test_sparsity_bounds_the_dictionary_and_the_error() -> None:
    z = torch.rand(80, dtype=DOUBLE)
    k = gram(z)
    steps = chain([1.0] * 80, [1] * 80, [1] * 79 + [0], 0.9)
    exact = k @ gptd(k, steps, 0.1).alpha
    errors, sizes = [], []
    for nu in (1e-1, 1e-3, 1e-6):
        sparse = recursion(k, steps, 0.1, nu)
        sizes.append(len(sparse.index))
        errors.append(float((k[:, sparse.index] @ sparse.alpha - exact).abs().max()))
    assert sizes[0] < sizes[1] < sizes[2] < 20
    assert errors[0] > errors[2]
    assert errors[2] < 1e-2 * float(exact.abs().max())


def test_every_point_is_near_the_span_of_the_dictionary() -> None:
    k = gram(torch.rand(40, dtype=DOUBLE) * 4.0)
    found = ald(lambda i: k[:, i], k.diagonal(), 1e-2)
    a = found.coefficients
    assert torch.equal(a[found.index, torch.arange(len(found.index))], torch.ones(len(found.index), dtype=DOUBLE))
    assert torch.equal(found.gram, k[found.index][:, found.index])
    residual = (k - a @ found.gram @ a.T).diagonal()
    assert float(residual.max()) <= 1e-2 + 1e-9
    assert float(residual.min()) >= -1e-9


def test_the_inverse_of_the_dictionary_survives_growth() -> None:
    k = torch.eye(40, dtype=DOUBLE) + 0.5
    dictionary = Dictionary(lambda i: k[:, i], k.diagonal(), 1e-6)
    for i in range(40):  # more than the first allocation holds
        a, joins = dictionary.test(i)
        assert joins
        dictionary.add(i, a)
    assert torch.allclose(dictionary.inverse, torch.linalg.inv(k))
    assert torch.equal(dictionary.gram, k)


def test_a_dictionary_refuses_kernels_that_are_not_finite() -> None:
    k = torch.eye(2, dtype=DOUBLE)
    k[0, 1] = k[1, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="got nan for point 1"):
        ald(lambda i: k[:, i], k.diagonal(), 0.1)


def test_an_empty_and_a_single_point() -> None:
    nothing = chain([], [], [])
    assert gptd(torch.zeros(0, 0, dtype=DOUBLE), nothing, 0.1).alpha.shape == (0,)
    assert recursion(torch.zeros(0, 0, dtype=DOUBLE), nothing, 0.1, 1e-3).alpha.shape == (0,)
    single = chain([3], [1], [0])
    for posterior in (gptd(torch.ones(1, 1, dtype=DOUBLE), single, 0.5), recursion(gram([0.0]), single, 0.5, 1e-9)):
        assert posterior.alpha.tolist() == pytest.approx([2.0])


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="shapes"):
        chain([1, 2], [1], [0])
    with pytest.raises(ValueError, match="gamma"):
        chain([1], [1], [0], gamma=1.5)
    with pytest.raises(ValueError, match="last point"):
        chain([1], [1], [1])
    with pytest.raises(ValueError, match="without reward"):
        chain([1, 2], [0, 1], [1, 0])
    steps = chain([1], [1], [0])
    with pytest.raises(ValueError, match="noise"):
        gptd(gram([0.0]), steps, 0.0)
    with pytest.raises(ValueError, match="noise"):
        recursion(gram([0.0]), steps, 0.0, 0.1)
    with pytest.raises(ValueError, match=r"\[1, 1\]"):
        gptd(gram([0.0, 1.0]), steps, 0.1)
    with pytest.raises(ValueError, match="nu"):
        recursion(gram([0.0]), steps, 0.1, 0.0)
