"""DBQPG and UAPG: identities of the sheet (section 7, oracles 2, 8 and 9), solvers, steps, the deep kernel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("gpytorch")

import envs  # noqa: F401  (registers ids)
from agents.dbqpg import DBQPG, DBQPGConfig
from ccrl.data import Data
from ccrl.gp.deep_kernel import DeepKernel, log_marginal_likelihood
from ccrl.gp.deep_quadrature import GradientSystem, StateGram
from ccrl.gp.kernels import rbf

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
def test_mean_and_covariance_are_those_of_the_definition(solver: str) -> None:
    made, u, gram = system(solver=solver)
    w = weights(u, gram)
    targets, v = torch.randn(N, dtype=DOUBLE), torch.randn(SIZE, 2, dtype=DOUBLE)
    assert torch.allclose(u @ made.weights(targets), 0.3 * u @ w @ targets, atol=1e-6)
    covariance = 0.3 * u @ u.T / N - 0.09 * u @ w @ u.T
    assert torch.allclose(made.covariance(v), covariance @ v, atol=1e-6)


def test_without_a_state_kernel_it_is_monte_carlo() -> None:
    """Oracle 2: c2 N / (c2 N + sigma^2) times U A / N."""
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


# -- the agent --------------------------------------------------------------------------------------------------------

SMALL = {"num_envs": 2, "n_steps": 20, "hidden": (8,), "rank": 60, "kernel_hidden": (8,), "normalise_obs": False}


def prepared(env: str = "Pendulum-v1", **options) -> tuple[DBQPG, Data]:
    agent = DBQPG(env, DBQPGConfig(**(SMALL | options)), seed=2)
    agent._started = (0.0, 0)
    (request,) = agent.estimator.plan({}, {}, agent.ctx)
    have = {"on": agent.collector.collect(request, agent.policy)}
    agent.estimator.fit(have, agent.ctx)
    with torch.no_grad():
        return agent, agent.estimator.prepare(have, agent.ctx)["on"]


def test_whitened_scores_give_the_fisher_kernel() -> None:
    agent, data = prepared()
    theta = agent.updaters["policy"].flat
    u = agent.ctx.scores(theta.double(), data, "step").dense()
    _, values, right = torch.linalg.svd(u, full_matrices=False)
    right = right[values > 1e-10 * values.max()]
    whitened = data["whitened"].reshape(40, -1)
    assert torch.allclose(whitened @ whitened.T, 40.0 * right.T @ right, atol=1e-4)
    # with a well-conditioned Fisher matrix this is U^T G^-1 U
    agent, data = prepared(rank=2)
    leading = data["whitened"].reshape(40, -1)
    u = (leading / 40**0.5).T
    kernel = u.T @ torch.linalg.inv(u @ u.T / 40) @ u
    assert torch.allclose(leading @ leading.T, kernel, atol=1e-6)


def test_the_gradient_is_the_weighted_score() -> None:
    """And with c1 -> 0 that of Monte Carlo on the standardised advantages."""
    agent, data = prepared(state_scale=0.0, fisher_scale=0.1)
    theta = agent.updaters["policy"].flat
    estimate = agent.estimator.gradient(theta, data, agent.ctx)
    u = agent.ctx.scores(theta.double(), data, "step").dense()
    noise = agent.estimator.deep.noise.item()
    target = data["target"].reshape(-1).double()
    assert float(target.mean()) == pytest.approx(0.0, abs=1e-6)
    share = 0.1 * 40 / (0.1 * 40 + noise)
    assert torch.allclose(estimate.mean, share * u @ target / 40, atol=1e-5)


@pytest.mark.parametrize("update", ["vanilla", "natural", "trpo"])
def test_uncertainty_changes_the_step(update: str) -> None:
    flats = []
    for uncertainty in (False, True):
        config = DBQPGConfig(**SMALL, update=update, uncertainty=uncertainty)
        agent = DBQPG("Pendulum-v1", config, seed=2)
        before = agent.updaters["policy"].flat.clone()
        agent.learn(agent.batch_steps)
        flats.append(agent.updaters["policy"].flat - before)
    assert not torch.allclose(*flats)
    assert float(flats[0] @ flats[1]) > 0.0, "it shapes the step, it does not turn it around"


def test_the_natural_step_has_the_published_scale() -> None:
    """lr (F + damping)^-1 mean(w_t grad log pi) with w = W A, whatever c2 is."""
    agent, data = prepared(update="natural", learning_rate=0.5, state_scale=0.0, damping=0.3)
    theta = agent.updaters["policy"].flat
    u = agent.ctx.scores(theta.double(), data, "step").dense()
    estimate = agent.estimator.gradient(theta, data, agent.ctx)
    w = agent.estimator.weight.reshape(-1) / agent.config.fisher_scale
    fisher = torch.stack([agent.estimator.scores.fvp(e) for e in torch.eye(len(theta), dtype=DOUBLE)], 1)
    expected = 0.5 * torch.linalg.solve(fisher + 0.3 * torch.eye(len(theta), dtype=DOUBLE), u @ w / 40)
    moved = agent.direction.step(theta, lambda tag: estimate, {"on": data}, agent.ctx) - theta
    assert torch.allclose(moved.double(), expected, rtol=1e-3, atol=1e-6)


def test_the_trust_region_is_kept() -> None:
    agent = DBQPG("Pendulum-v1", DBQPGConfig(**SMALL, update="trpo", max_kl=1e-3), seed=2)
    agent.learn(agent.batch_steps)
    assert float(agent.scalars["train/line_search"]) > 0.0
    data = agent.collector._stream.buffers.popitem()[1]
    out = agent.policy.params(data.obs[:-1].reshape(-1, 3))
    old = {k: data.extra[f"old_{k}"].reshape(-1, 1) for k in agent.policy.distribution.names}
    assert float(agent.policy.distribution.kl(old, {k: v.detach() for k, v in out.items()}).mean()) <= 1e-3


def test_dummy_rows_are_left_out() -> None:
    """Twice the same columns, one copy invalid: the same gradient."""
    agent, data = prepared(state_scale=0.5)
    theta = agent.updaters["policy"].flat
    expected = agent.estimator.gradient(theta, data, agent.ctx).mean
    columns = {k: torch.cat([data[k], torch.full_like(data[k], 77)], 1) for k in data if k not in data.sequence}
    columns["valid"] = torch.cat([data["valid"], torch.zeros_like(data["valid"])], 1)
    doubled = agent.estimator.gradient(theta, Data(columns), agent.ctx).mean
    assert torch.allclose(doubled, expected, atol=1e-8)


def test_it_learns_the_cart_pole() -> None:
    config = DBQPGConfig(num_envs=4, n_steps=100, hidden=(16,), update="trpo", max_kl=0.02, rank=20)
    agent = DBQPG("CartPole-v1", config, seed=0)
    agent.learn(400)
    early = agent.ep_rew_mean
    agent.learn(400 * 10)
    agent.episodes.clear()
    agent.learn(400 * 12)
    assert agent.ep_rew_mean > 2.0 * early


def test_equal_targets_give_no_gradient() -> None:
    agent, data = prepared("CartPole-v1")
    flat = data.derive(target=torch.zeros_like(data["target"]))
    estimate = agent.estimator.gradient(agent.updaters["policy"].flat, flat, agent.ctx)
    assert float(estimate.mean.abs().max()) == 0.0


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


def test_features_fill_the_unit_box_and_constant_ones_stay_finite() -> None:
    deep = DeepKernel(2, (4,), 3)
    phi = deep.features(torch.randn(20, 2, dtype=DOUBLE))
    assert torch.allclose(phi.amin(0), -torch.ones(3, dtype=DOUBLE))
    assert torch.allclose(phi.amax(0), torch.ones(3, dtype=DOUBLE))
    assert bool(deep.features(torch.ones(5, 2, dtype=DOUBLE)).isfinite().all())
    with pytest.raises(ValueError, match="hidden"):
        DeepKernel(2, ())


@pytest.mark.parametrize(
    "wrong",
    [
        {"update": "adam"}, {"targets": "td"}, {"solver": "lu"}, {"cg_tolerance": 1e-2}, {"fisher_scale": 0.0},
        {"rank": 0}, {"stretch_limit": 0.5}, {"damping": -1.0}, {"normalise_reward": True}, {"min_noise": 0.0},
    ],
)  # fmt: skip
def test_wrong_settings(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DBQPGConfig(**wrong)
