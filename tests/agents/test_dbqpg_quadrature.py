"""Deep Bayesian quadrature: identities of the posterior, solvers, the deep kernel, UAPG's shaping of a step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("gpytorch")

from agents.dbqpg.kernel import DeepKernel, log_marginal_likelihood
from agents.dbqpg.quadrature import GradientSystem, StateGram
from agents.dbqpg.uncertainty import shrink, stretch
from ccrl.gp.kernels import rbf
from ccrl.gp.lowrank import Eigen

DOUBLE = torch.float64
N, SIZE = 30, 4


def system(
    c1: float = 1.0, c2: float = 0.3, noise: float = 0.2, solver: str = "exact"
) -> tuple[GradientSystem, Tensor, Tensor]:
    """With scores ``U [4, 30]`` of full rank and a smooth state kernel."""
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(SIZE, N, generator=generator, dtype=DOUBLE)
    x = torch.rand(N, generator=generator, dtype=DOUBLE)
    gram = StateGram(rbf(1.0), x.unsqueeze(1))
    right = torch.linalg.svd(u, full_matrices=False).Vh.T
    made = GradientSystem(
        lambda w: u @ w, lambda v: u.T @ v, gram, right, c1=c1, c2=c2, noise=noise, solver=solver, tolerance=1e-10
    )
    return made, u, torch.exp(-0.5 * (x[:, None] - x).square())


def weights(u: Tensor, gram: Tensor, c1: float = 1.0, c2: float = 0.3, noise: float = 0.2) -> Tensor:
    fisher = u @ u.T / N
    return torch.linalg.inv(c1 * gram + c2 * u.T @ torch.linalg.inv(fisher) @ u + noise * torch.eye(N, dtype=DOUBLE))


@pytest.mark.parametrize("solver", ["exact", "cg", "low_rank"])
@pytest.mark.parametrize("c1", [1.0, 0.4])
def test_mean_and_covariance_are_those_of_the_definition(c1: float, solver: str) -> None:
    made, u, gram = system(c1, solver=solver)
    w = weights(u, gram, c1)
    targets, v = torch.randn(N, dtype=DOUBLE), torch.randn(SIZE, 2, dtype=DOUBLE)
    assert torch.allclose(u @ made.weights(targets), 0.3 * u @ w @ targets, atol=1e-6)
    covariance = 0.3 * u @ u.T / N - 0.09 * u @ w @ u.T
    assert torch.allclose(made.covariance(v), covariance @ v, atol=1e-6)


def test_without_a_state_kernel_it_is_monte_carlo() -> None:
    """Without the state kernel: c2 N / (c2 N + sigma^2) times U A / N."""
    made, u, _ = system(c1=0.0)
    targets = torch.randn(N, dtype=DOUBLE)
    share = 0.3 * N / (0.3 * N + 0.2)
    assert torch.allclose(u @ made.weights(targets), share * u @ targets / N)


@pytest.mark.parametrize("solver", ["exact", "cg", "low_rank"])
def test_the_inverse_natural_covariance(solver: str) -> None:
    made, u, gram = system(solver=solver)
    inverse = torch.linalg.inv(u @ u.T / N)
    covariance = 0.3 * u @ u.T / N - 0.09 * u @ weights(u, gram) @ u.T
    expected = torch.linalg.inv(inverse @ covariance @ inverse)
    assert torch.allclose(made.natural_precision(torch.eye(SIZE, dtype=DOUBLE)), expected, rtol=1e-5, atol=1e-5)


def test_the_covariance_is_positive_and_below_the_prior() -> None:
    """Also with a Fisher kernel of lower rank than the scores."""
    whole, u, _ = system()
    right = torch.linalg.svd(u, full_matrices=False).Vh.T[:, :2]
    made = GradientSystem(lambda w: u @ w, lambda v: u.T @ v, whole.gram, right, c1=1.0, c2=0.3, noise=0.2)
    covariance = made.covariance(torch.eye(SIZE, dtype=DOUBLE))
    prior = 0.3 * u @ u.T / N
    assert float(torch.linalg.eigvalsh(prior - covariance).min()) > -1e-10
    full = whole.covariance(torch.eye(SIZE, dtype=DOUBLE))
    assert float(torch.linalg.eigvalsh(full).min()) > -1e-10


def test_the_low_rank_solver_never_sees_the_kernel_matrix() -> None:
    made, _, _ = system(solver="low_rank")
    made.weights(torch.randn(N, dtype=DOUBLE))
    made.natural_precision(torch.eye(SIZE, dtype=DOUBLE))
    assert "dense" not in vars(made.gram)
    with pytest.raises(ValueError, match="solver"):
        system(solver="lu")


def test_conjugate_gradients_have_the_tolerance_asked_for() -> None:
    assert system(solver="cg")[0].solver.tolerance == 1e-10


@pytest.mark.parametrize(
    ("c1", "noise", "kind"), [(1e-8, 1.0, "low_rank"), (1e-5, 100.0, "low_rank"), (1e-5, 1e-3, "exact")]
)
def test_what_a_factor_may_miss_is_relative_to_the_noise(c1: float, noise: float, kind: str) -> None:
    """Of a kernel without low rank half the trace of 600 is missed, times c1: at most 1e-4 of the noise is allowed."""
    x = torch.linspace(0.0, 1.0, 600, dtype=DOUBLE).unsqueeze(1)
    right = torch.eye(600, 2, dtype=DOUBLE)
    made = GradientSystem(
        lambda w: w, lambda v: v, StateGram(rbf(1e-5), x), right, c1=c1, c2=0.1, noise=noise, solver="auto"
    )
    assert made.kind == kind


@pytest.mark.parametrize(("lengthscale", "kind"), [(1.0, "low_rank"), (1e-4, "exact")])
def test_the_solver_is_chosen_by_the_rank_of_the_kernel(lengthscale: float, kind: str) -> None:
    x = torch.rand(600, 1, dtype=DOUBLE)
    gram, u = StateGram(rbf(lengthscale), x), torch.randn(2, 600, dtype=DOUBLE)
    right = torch.linalg.svd(u, full_matrices=False).Vh.T
    systems = [
        GradientSystem(lambda w: u @ w, lambda v: u.T @ v, gram, right, c1=1.0, c2=0.1, noise=1e-3, solver=s)
        for s in ("auto", "exact")
    ]
    assert systems[0].kind == kind
    y = torch.randn(600, dtype=DOUBLE)
    first, second = (each.weights(y) for each in systems)
    assert float((first - second).norm()) <= 1e-4 * float(second.norm())


# -- the deep kernel --------------------------------------------------------------------------------------------------


def test_the_marginal_likelihood_is_that_of_a_normal() -> None:
    x = torch.rand(12, dtype=DOUBLE)
    gram, noise = torch.exp(-0.5 * (x[:, None] - x).square()), torch.tensor(0.1, dtype=DOUBLE)
    y = torch.randn(12, dtype=DOUBLE)
    normal = torch.distributions.MultivariateNormal(torch.zeros(12).double(), gram + 0.1 * torch.eye(12).double())
    assert torch.allclose(log_marginal_likelihood(gram, noise, y), normal.log_prob(y))
    assert torch.autograd.gradcheck(lambda s: log_marginal_likelihood(gram, s, y), noise.requires_grad_())


def test_fitting_explains_the_targets_and_the_returns() -> None:
    torch.manual_seed(0)
    deep = DeepKernel(2, (16,), 3)
    x = torch.randn(100, 2, dtype=DOUBLE)
    y, nothing = x[:, 0].sin(), torch.zeros(100, 1, dtype=DOUBLE)
    generator = torch.Generator().manual_seed(0)
    rows = [
        deep.fit(x, nothing, y, y, state_scale=1.0, fisher_scale=0.0, points=50, generator=generator, lr=1e-2)
        for _ in range(120)
    ]
    assert float(rows[-1]["log_likelihood"]) > float(rows[0]["log_likelihood"]) + 0.3
    assert float(rows[-1]["value_loss"]) < 0.3 * float(rows[0]["value_loss"])
    assert deep.noise.item() >= deep.min_noise
    copy = DeepKernel(2, (16,), 3)
    copy.load_state_dict(deep.state_dict())  # with the moments of its optimiser
    for model in (deep, copy):
        generator = torch.Generator().manual_seed(1)
        model.fit(x, nothing, y, y, state_scale=1.0, fisher_scale=0.0, points=50, generator=generator, lr=1e-2)
    assert torch.equal(deep.values(x), copy.values(x))


def test_a_fit_is_one_adam_step_on_likelihood_and_value_error() -> None:
    """Both written out, on the rows drawn; features are scaled by all rows, and only head and kernel decay."""
    torch.manual_seed(0)
    deep, twin = (DeepKernel(2, (4,), 3, min_noise=0.01) for _ in range(2))
    twin.load_state_dict(deep.state_dict())
    shared = [*twin.trunk.parameters(), *twin.value.parameters()]
    own = [*twin.head.parameters(), *twin.kernel.parameters(), twin.raw_noise]
    adam = torch.optim.Adam([{"params": shared}, {"params": own, "weight_decay": 1e-3}], lr=0.03)
    x, scores = torch.randn(20, 2, dtype=DOUBLE), torch.randn(20, 2, dtype=DOUBLE)
    y, returns = torch.randn(20, dtype=DOUBLE), torch.randn(20, dtype=DOUBLE)
    for seed in range(3):
        stats = deep.fit(
            x, scores, y, returns, state_scale=0.7, fisher_scale=0.2, points=8,
            generator=torch.Generator().manual_seed(seed), lr=0.03,
        )  # fmt: skip
        rows = torch.randperm(20, generator=torch.Generator().manual_seed(seed))[:8]
        phi = twin.head(twin.trunk(x))
        low, high = phi.detach().amin(0), phi.detach().amax(0)
        phi = (2.0 * (phi - low) / (high - low) - 1.0)[rows] / twin.kernel.lengthscale
        gram = 0.7 * (-0.5 * (phi[:, None] - phi).square()).exp().sum(-1) + 0.2 * scores[rows] @ scores[rows].T
        noise = 0.01 + torch.nn.functional.softplus(twin.raw_noise)
        normal = torch.distributions.MultivariateNormal(
            torch.zeros(8, dtype=DOUBLE), gram + noise * torch.eye(8, dtype=DOUBLE)
        )
        likelihood = normal.log_prob(y[rows]) / 8
        value_loss = (twin.value(twin.trunk(x)).squeeze(-1) - returns).square().mean()
        assert float(stats["log_likelihood"]) == pytest.approx(float(likelihood.detach()))
        assert float(stats["value_loss"]) == pytest.approx(float(value_loss.detach()))
        adam.zero_grad()
        (value_loss - likelihood).backward()
        adam.step()
        for mine, theirs in zip(deep.parameters(), twin.parameters()):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)
    with torch.no_grad():
        deep.raw_noise.fill_(-60.0)
    assert deep.noise.item() == pytest.approx(0.01)


def test_a_saved_kernel_does_not_go_on_learning() -> None:
    deep = DeepKernel(2, (4,), 3)
    x, y = torch.randn(10, 2, dtype=DOUBLE), torch.randn(10, dtype=DOUBLE)
    options = {"state_scale": 1.0, "fisher_scale": 0.0, "points": 10, "generator": torch.Generator(), "lr": 0.1}
    deep.fit(x, x, y, y, **options)
    saved = deep.get_extra_state()["state"][0]
    before = {k: v.clone() for k, v in saved.items()}
    deep.fit(x, x, y, y, **options)
    assert all(torch.equal(saved[k], v) for k, v in before.items())


def test_features_fill_the_unit_box_and_constant_ones_stay_finite() -> None:
    deep = DeepKernel(2, (4,), 3)
    phi = deep.features(torch.randn(20, 2, dtype=DOUBLE))
    assert torch.allclose(phi.amin(0), -torch.ones(3, dtype=DOUBLE))
    assert torch.allclose(phi.amax(0), torch.ones(3, dtype=DOUBLE))
    assert bool(deep.features(torch.ones(5, 2, dtype=DOUBLE)).isfinite().all())
    with pytest.raises(ValueError, match="hidden"):
        DeepKernel(2, ())


# -- UAPG -------------------------------------------------------------------------------------------------------------


def test_uncertainty_rescaling_by_hand() -> None:
    """h = (4, 1, .25): L_i sqrt(.25 / h_i) = (1/4, 2/2, 3); the step times min(sqrt(h_i / .25), 3) = (3, 2, 1)."""
    pairs = Eigen(torch.tensor([4.0, 1.0, 0.25], dtype=DOUBLE), torch.eye(3, dtype=DOUBLE))
    step = torch.tensor([1.0, 2.0, 3.0], dtype=DOUBLE)
    assert shrink(step, pairs).tolist() == [0.25, 1.0, 3.0]
    assert stretch(step, pairs, 3.0).tolist() == [3.0, 4.0, 3.0]
    with pytest.raises(ValueError, match="limit"):
        stretch(step, pairs, 0.5)


def test_certain_directions_do_not_stop_the_others() -> None:
    """An eigenvalue of 0 (or of rounding size) is no smallest uncertainty to compare with."""
    step = torch.ones(3, dtype=DOUBLE)
    for zero in (0.0, 1e-17, -1e-17):
        pairs = Eigen(torch.tensor([4.0, 1.0, zero], dtype=DOUBLE), torch.eye(3, dtype=DOUBLE))
        assert shrink(step, pairs).tolist() == [0.5, 1.0, 1.0]
        assert stretch(step, pairs).tolist() == [2.0, 1.0, 1.0]
    nothing = Eigen(torch.zeros(2, dtype=DOUBLE), torch.eye(3, dtype=DOUBLE)[:, :2])
    assert torch.equal(shrink(step, nothing), step)
    assert torch.equal(stretch(step, nothing), step)
