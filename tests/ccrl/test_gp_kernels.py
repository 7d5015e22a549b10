"""The contract of GPyTorch kernels, kept by the kernels on scores."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from torch import Tensor

pytest.importorskip("gpytorch")

from ccrl.gp.kernels import AdditiveRBFKernel, FisherKernel, QuadraticFisherKernel, StateFisherKernel, rbf

INVERSE = torch.tensor([[1.0, 0.2, 0.0], [0.2, 0.5, 0.1], [0.0, 0.1, 2.0]], dtype=torch.float64)
KERNELS = {
    "fisher": lambda: FisherKernel(INVERSE),
    "whitened": lambda: FisherKernel(),
    "quadratic": lambda: QuadraticFisherKernel(INVERSE),
    "state": lambda: StateFisherKernel(rbf(0.7), 1, INVERSE[:2, :2], state_scale=2.0, fisher_scale=0.3),
    "additive": lambda: AdditiveRBFKernel(3).double(),
}


@pytest.fixture(params=sorted(KERNELS))
def kernel(request: pytest.FixtureRequest):
    return KERNELS[request.param]()


def points(*shape: int) -> Tensor:
    return torch.randn(*shape, 3, dtype=torch.float64)


def test_matrices_are_symmetric_and_positive_semidefinite(kernel) -> None:
    matrix = kernel(points(12)).to_dense().detach()
    assert matrix.dtype == torch.float64
    assert torch.allclose(matrix, matrix.T, atol=1e-12)
    assert float(torch.linalg.eigvalsh(matrix).min()) > -1e-9 * float(matrix.diagonal().max())


def test_the_diagonal_is_that_of_the_matrix(kernel) -> None:
    x = points(6)
    assert torch.allclose(kernel(x, diag=True), kernel(x).to_dense().diagonal())
    y = points(6)
    assert torch.allclose(kernel(x, y, diag=True), kernel(x, y).to_dense().diagonal())


def test_two_sets_give_a_rectangle(kernel) -> None:
    x, y = points(5), points(4)
    cross = kernel(x, y).to_dense()
    whole = kernel(torch.cat([x, y])).to_dense()
    assert cross.shape == (5, 4)
    assert torch.allclose(cross, whole[:5, 5:])


def test_batches_are_computed_one_by_one(kernel) -> None:
    x = points(2, 5)
    batched = kernel(x).to_dense()
    assert batched.shape == (2, 5, 5)
    for i in range(2):
        assert torch.allclose(batched[i], kernel(x[i]).to_dense())
    assert torch.allclose(kernel(x, diag=True), batched.diagonal(dim1=-2, dim2=-1))


def test_products_do_not_need_the_matrix(kernel) -> None:
    x, v = points(7), torch.randn(7, 2, dtype=torch.float64)
    assert torch.allclose(kernel(x) @ v, kernel(x).to_dense() @ v)


def test_gradients_reach_the_inputs(kernel) -> None:
    x = points(4)
    assert torch.autograd.gradcheck(lambda z: kernel(z).to_dense(), x.requires_grad_())


def test_saved_kernels_are_the_same(kernel) -> None:
    x = points(4)
    before = kernel(x).to_dense()
    state = {k: v.clone() for k, v in kernel.state_dict().items()}
    for value in kernel.state_dict().values():
        value.mul_(1.5)
    kernel.load_state_dict(state)
    assert torch.equal(kernel(x).to_dense(), before)


def test_a_bandit_by_hand() -> None:
    """Actions (-1, .5, 2), scores (a, a^2 - 1) = (-1, 0), (.5, -.75), (2, 3), G = diag(1, 2).

    u1' G^-1 u1 = 1, u1' G^-1 u2 = -.5, u1' G^-1 u3 = -2; u2: .25 + .28125, 1 - 1.125; u3: 4 + 4.5.
    """
    a = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    u = torch.stack([a, a * a - 1.0], 1)
    inverse = torch.diag(torch.tensor([1.0, 0.5], dtype=torch.float64))
    expected = torch.tensor([[1, -0.5, -2], [-0.5, 0.53125, -0.125], [-2, -0.125, 8.5]], dtype=torch.float64)
    assert torch.allclose(FisherKernel(inverse)(u).to_dense(), expected)
    assert torch.allclose(QuadraticFisherKernel(inverse)(u).to_dense(), (1.0 + expected).square())
    whitened = FisherKernel()(u @ torch.linalg.cholesky(inverse)).to_dense()
    assert torch.allclose(whitened, expected)


def test_state_and_fisher_add_up_with_their_scales() -> None:
    x = points(5)
    kernel = KERNELS["state"]()
    distance = x[:, :1] - x[:, 0]
    state = torch.exp(-0.5 * (distance / 0.7).square())
    expected = 2.0 * state + 0.3 * x[:, 1:] @ INVERSE[:2, :2] @ x[:, 1:].T
    assert torch.allclose(kernel(x).to_dense(), expected)


def test_the_additive_kernel_is_a_sum_over_features() -> None:
    kernel, x = KERNELS["additive"](), points(5)
    kernel.lengthscale = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    scaled = (x[:, None] - x) / torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(kernel(x).to_dense().detach(), (-0.5 * scaled.square()).exp().sum(-1))


def test_only_the_deep_kernel_learns() -> None:
    """A learnable amplitude would silently rescale the gradient."""
    learnt = {name: [p for p in make().parameters() if p.requires_grad] for name, make in KERNELS.items()}
    assert [name for name, parameters in learnt.items() if parameters] == ["additive"]


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"square inverse.*\(2, 3\)"):
        FisherKernel(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"expected scores \[\.\.\., M, 3\]"):
        FisherKernel(INVERSE)(torch.zeros(4, 2, dtype=torch.float64)).to_dense()
    with pytest.raises(ValueError, match="state_dim"):
        StateFisherKernel(rbf(1.0), 0)
    with pytest.raises(ValueError, match="scales"):
        StateFisherKernel(rbf(1.0), 1, state_scale=-1.0)
    with pytest.raises(ValueError, match="length scale"):
        rbf(0.0)


def test_a_missing_extra_says_how_to_install_it() -> None:
    code = """
        import sys
        sys.modules["gpytorch"] = None   # as if it were not installed
        import envs, agents.bpg, agents.bac, agents.dbqpg   # to list agents needs no extra
        from agents.bpg import BPG
        try:
            BPG("CartPole-v1")
        except ImportError as error:
            assert '.[gp]' in str(error), error
        else:
            raise SystemExit("built without GPyTorch")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
