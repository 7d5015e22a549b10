"""Scores against autograd loops, finite differences, torch.distributions and full enumeration."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ccrl.data import Data
from ccrl.estimators.scores import Scores
from ccrl.policies import CATEGORICAL, MLPPolicy

F64 = torch.float64
T, N = 4, 3


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


def make(action_space: gym.Space, **options: bool) -> tuple[MLPPolicy, Data]:
    """A float64 policy with a critic, and rows of which two are invalid garbage."""
    torch.manual_seed(0)
    policy = MLPPolicy(gym.spaces.Box(-1, 1, (2,)), action_space, hidden=(3,), **options).double()
    with torch.no_grad():  # the small initial gain of the last layer would hide errors
        for p in policy.parameters():
            p.add_(0.3 * torch.randn_like(p))
    obs = torch.randn(T, N, 2, dtype=F64)
    valid = torch.ones(T, N, dtype=F64)
    valid[2:, 1] = 0.0
    action = (
        torch.randint(0, 3, (T, N))
        if isinstance(action_space, gym.spaces.Discrete)
        else torch.randn(T, N, 2, dtype=F64)
    )
    if action.is_floating_point():
        action[2, 1] = torch.inf  # log-probability -inf where nobody may look
    return policy, Data({"obs": obs, "action": action, "valid": valid, "reward": torch.ones(T, N)})


SPACES = [
    (gym.spaces.Discrete(3), {}),
    (gym.spaces.Box(-1, 1, (2,)), {}),
    (gym.spaces.Box(-1, 1, (2,)), {"squash": True}),
]


def loop(policy: MLPPolicy, data: Data) -> Tensor:
    """Score of every step by ordinary autograd, ``[n, T, N]``; zeros where invalid."""
    out = torch.zeros(flat(policy).numel(), T, N, dtype=F64)
    for t, n in itertools.product(range(T), range(N)):
        if data["valid"][t, n] > 0:
            one = Data({k: data[k][t : t + 1, n : n + 1] for k in ("obs", "action", "valid")})
            log_prob = policy.evaluate(one, frozenset({"log_prob"}))["log_prob"].sum()
            grads = torch.autograd.grad(log_prob, list(policy.parameters()), allow_unused=True, materialize_grads=True)
            out[:, t, n] = torch.cat([g.reshape(-1) for g in grads])
    return out


@pytest.mark.parametrize(("space", "options"), SPACES)
def test_products_match_an_autograd_loop(space: gym.Space, options: dict[str, bool]) -> None:
    policy, data = make(space, **options)
    theta, u = flat(policy), loop(*(policy, data))
    v = torch.randn_like(theta)
    for level, rows in (("step", u), ("trajectory", u.sum(1))):
        scores = Scores(policy, theta, data, level)  # type: ignore[arg-type]
        matrix = rows.flatten(1)
        w = torch.randn(rows.shape[1:], dtype=F64)
        torch.testing.assert_close(scores.dense(chunk=5), matrix, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(scores.vjp(w), matrix @ w.flatten(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(scores.jvp(v).flatten(), matrix.T @ v, rtol=1e-10, atol=1e-12)
    critic = [name.startswith("critic") for name, p in policy.named_parameters() for _ in range(p.numel())]
    assert u[torch.tensor(critic)].eq(0).all()
    assert u.abs().sum() > 0


def test_invalid_rows_and_empty_columns_contribute_nothing() -> None:
    policy, data = make(gym.spaces.Box(-1, 1, (2,)))
    scores = Scores(policy, flat(policy), data)
    w = torch.where(data["valid"] > 0, 0.0, 1.0)
    assert scores.vjp(w).eq(0).all()
    assert scores.jvp(torch.ones_like(scores.theta))[data["valid"] == 0].eq(0).all()
    assert scores.dense()[:, (data["valid"] == 0).flatten()].eq(0).all()
    assert int(scores.count) == 10
    assert int(Scores(policy, flat(policy), data, "trajectory").count) == 3
    late = data["valid"].clone()
    late[0, 0] = 0.0  # a column may begin with rows that do not count, as a prompt
    late[:, 2] = 0.0
    shifted = Data({k: data[k] for k in data if k != "valid"} | {"valid": late})
    assert int(Scores(policy, flat(policy), shifted, "trajectory").count) == 2
    v, weight = torch.ones_like(scores.theta), torch.randn(T, N, dtype=F64)
    garbage = torch.where(data["valid"] > 0, weight, torch.nan)
    torch.testing.assert_close(scores.hvp(garbage, v), scores.hvp(weight, v), rtol=0, atol=0)


def test_parameters_that_are_not_owned_are_cast_too() -> None:
    policy, data = make(gym.spaces.Discrete(3))
    first = [name.startswith("actor.net.0") for name, p in policy.named_parameters() for _ in range(p.numel())]
    policy.float()
    data = Data({k: data[k].float() if data[k].is_floating_point() else data[k] for k in data})
    theta = flat(policy).double()
    expected = Scores(policy, theta, data).dense()[torch.tensor(first)]
    got = Scores(policy, theta[torch.tensor(first)], data, prefixes=("actor.net.0",)).dense()
    assert got.dtype == F64
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def central(fn: Callable[[Tensor], Tensor], theta: Tensor, v: Tensor, e: float = 1e-5) -> Tensor:
    return (fn(theta + e * v) - fn(theta - e * v)) / (2 * e)


@pytest.mark.parametrize(("space", "options"), SPACES)
def test_hvp_is_its_definition_by_finite_differences(space: gym.Space, options: dict[str, bool]) -> None:
    policy, data = make(space, **options)
    theta = flat(policy)
    v, weight = torch.randn_like(theta), torch.randn(T, N, dtype=F64)
    at = lambda x: Scores(policy, x, data)  # noqa: E731
    curvature = central(lambda x: at(x).vjp(weight), theta, v)
    u = at(theta).dense().view(-1, T, N)
    along = torch.einsum("itn,i->tn", u, v)
    per_column = torch.einsum("itn,tn->in", u, weight) @ along.sum(0)
    got = Scores(policy, theta, data, "trajectory").hvp(weight, v)
    torch.testing.assert_close(got, (curvature + per_column) / N, rtol=1e-6, atol=1e-7)
    per_step = torch.einsum("itn,tn,tn->i", u, weight, along)
    torch.testing.assert_close(at(theta).hvp(weight, v), (curvature + per_step) / 10, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("space", "options"), SPACES)
def test_fvp_is_the_hessian_of_the_kl(space: gym.Space, options: dict[str, bool]) -> None:
    policy, data = make(space, **options)
    theta = flat(policy)
    v, obs = torch.randn_like(theta), data["obs"][data["valid"] > 0]

    def distribution(x: Tensor) -> torch.distributions.Distribution:
        sizes = {k: p.shape for k, p in policy.named_parameters()}
        pieces = dict(
            zip(sizes, (p.view(s) for p, s in zip(x.split([s.numel() for s in sizes.values()]), sizes.values())))
        )
        net = {k.removeprefix("actor.net."): p for k, p in pieces.items() if k.startswith("actor.net.")}
        out = torch.func.functional_call(policy.actor.net, net, (obs,))
        if "actor.log_std" not in pieces:
            return torch.distributions.Categorical(logits=out)
        return torch.distributions.Independent(torch.distributions.Normal(out, pieces["actor.log_std"].exp()), 1)

    old = distribution(theta)
    hessian = torch.autograd.functional.hessian(
        lambda x: torch.distributions.kl_divergence(distribution(x), old).mean(), theta
    )
    torch.testing.assert_close(Scores(policy, theta, data).fvp(v), hessian @ v, rtol=1e-9, atol=1e-10)


def test_float64_vector_gives_float64_scores_of_a_float32_policy() -> None:
    policy, data = make(gym.spaces.Box(-1, 1, (2,)))
    exact = Scores(policy, flat(policy), data).dense()
    policy.float()
    single = Data({k: data[k].float() if data[k].is_floating_point() else data[k] for k in data})
    low = Scores(policy, flat(policy), single).dense()
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), exact, rtol=1e-3, atol=1e-4)
    high = Scores(policy, flat(policy).double(), single).dense()
    assert high.dtype == F64
    torch.testing.assert_close(high, exact, rtol=1e-4, atol=1e-5)
    assert next(policy.parameters()).dtype == torch.float32, "the policy itself is left alone"


def test_prefixes_restrict_the_vector() -> None:
    policy, data = make(gym.spaces.Discrete(3))
    actor = torch.cat([p.detach().reshape(-1) for k, p in policy.named_parameters() if k.startswith("actor")])
    whole = Scores(policy, flat(policy), data).dense()
    part = Scores(policy, actor, data, prefixes=("actor",))
    torch.testing.assert_close(part.dense(), whole[: actor.numel()])
    torch.testing.assert_close(part.log_prob(actor), Scores(policy, flat(policy), data).log_prob(flat(policy)))


def test_scores_are_taken_at_the_vector_not_at_the_module() -> None:
    policy, data = make(gym.spaces.Discrete(3))
    theta = flat(policy)
    before = Scores(policy, theta, data).dense()
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(1.0)
    torch.testing.assert_close(Scores(policy, theta, data).dense(), before, rtol=0, atol=0)


def test_products_work_where_gradients_are_off() -> None:
    policy, data = make(gym.spaces.Discrete(3))
    theta, weight = flat(policy), torch.ones(T, N, dtype=F64)
    scores = Scores(policy, theta, data, "trajectory")
    expected = (scores.vjp(weight[0]), scores.hvp(weight, theta), scores.fvp(theta), scores.dense())
    with torch.no_grad():
        got = (scores.vjp(weight[0]), scores.hvp(weight, theta), scores.fvp(theta), scores.dense())
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        assert not b.requires_grad
        assert float(b.abs().max()) > 0


def test_shapes_are_checked() -> None:
    policy, data = make(gym.spaces.Discrete(3))
    theta = flat(policy)
    with pytest.raises(ValueError, match="theta of shape"):
        Scores(policy, theta[:-1], data)
    with pytest.raises(ValueError, match="level"):
        Scores(policy, theta, data, "episode")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"w of shape \(3,\), got \(4, 3\)"):
        Scores(policy, theta, data, "trajectory").vjp(torch.ones(T, N))
    with pytest.raises(ValueError, match="v of shape"):
        Scores(policy, theta, data).jvp(torch.ones(3))
    with pytest.raises(ValueError, match="weight of shape"):
        Scores(policy, theta, data, "trajectory").hvp(torch.ones(N), theta)


# -- a two-state MDP, all trajectories --------------------------------------------------------------------------------


class Table(nn.Module):
    """Softmax table: logits ``[states, actions]``."""

    distribution = CATEGORICAL

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, batch: Data, want: frozenset[str]) -> dict[str, Tensor]:
        params = {"logits": self.logits[batch["obs"]]}
        return {"log_prob": CATEGORICAL.log_prob(params, batch["action"]), **params}


P = np.array([[[0.7, 0.3], [0.2, 0.8]], [[0.5, 0.5], [0.9, 0.1]]])
R = np.array([[1.0, 0.0], [-0.5, 2.0]])
THETA, V = torch.tensor([0.3, -0.2, 0.1, 0.5], dtype=F64), torch.tensor([1, -0.5, 0.25, 2], dtype=F64)
DISCOUNT = 0.9


def enumerate_(theta: Tensor, horizon: int = 3) -> tuple[Scores, Tensor, Tensor]:
    """Every trajectory as a column: its scores, ``psi [T, M]`` and its probability ``[M]``."""
    pi = theta.view(2, 2).softmax(-1).numpy()
    states, actions, psi, probability = [], [], [], []
    for a in itertools.product(range(2), repeat=horizon):
        for s in itertools.product(range(2), repeat=horizon - 1):
            path = (0, *s)
            p = np.prod([pi[x, y] for x, y in zip(path, a)])
            probability.append(p * np.prod([P[path[t], a[t], path[t + 1]] for t in range(horizon - 1)]))
            reward = [DISCOUNT**t * R[path[t], a[t]] for t in range(horizon)]
            psi.append(np.cumsum(reward[::-1])[::-1].copy())
            states.append(path)
            actions.append(a)
    obs = torch.tensor(states).T
    data = Data({"obs": obs, "action": torch.tensor(actions).T, "valid": torch.ones(obs.shape, dtype=F64)})
    scores = Scores(Table(torch.zeros(2, 2)), theta, data, "trajectory")
    return scores, torch.tensor(np.array(psi)).T, torch.tensor(probability)


def expected_hvp(theta: Tensor, v: Tensor) -> Tensor:
    """``hvp`` averages columns evenly; linear in the weights, so ``M p psi`` turns it into the expectation."""
    scores, psi, p = enumerate_(theta)
    return scores.hvp(psi * p * p.numel(), v)


def test_expectations_are_the_exact_gradient_and_hessian() -> None:
    scores, psi, p = enumerate_(THETA)
    assert float(p.sum()) == pytest.approx(1.0)
    assert float(p @ psi[0]) == pytest.approx(1.965851, abs=1e-6)
    step = Scores(scores.module, THETA, scores._data, "step")
    assert step.vjp(psi * p).tolist() == pytest.approx([0.4120, -0.4120, -0.4335, 0.4335], abs=5e-5)
    assert expected_hvp(THETA, V).tolist() == pytest.approx([-0.1882, 0.1882, 0.3307, -0.3307], abs=5e-5)


def test_one_trajectory_and_the_sign() -> None:
    obs, action = torch.tensor([[0], [1], [0]]), torch.tensor([[1], [0], [1]])
    data = Data({"obs": obs, "action": action, "valid": torch.ones(3, 1, dtype=F64)})
    table = Table(torch.zeros(2, 2))
    # r = 0, -.5, 0: psi = (-.45, -.45, 0)
    psi = torch.tensor([[-0.45], [-0.45], [0.0]], dtype=F64)
    step, whole = Scores(table, THETA, data, "step"), Scores(table, THETA, data, "trajectory")
    assert float((psi * step.log_prob(THETA)).sum()) == pytest.approx(0.849192, abs=1e-6)
    g = step.vjp(psi)
    assert g.tolist() == pytest.approx([0.2801, -0.2801, -0.2694, 0.2694], abs=5e-5)
    along = whole.jvp(V)
    assert float(along) == pytest.approx(-2.915081, abs=1e-6)
    curvature = whole.hvp(psi, V) - g * along
    assert curvature.tolist() == pytest.approx([0.1586, -0.1586, -0.1892, 0.1892], abs=5e-5)
    assert whole.hvp(psi, V).tolist() == pytest.approx([-0.6579, 0.6579, 0.5961, -0.5961], abs=5e-5)
    # a finite difference on the fixed trajectory sees the first term only
    other = central(lambda x: Scores(table, x, data, "step").vjp(psi), THETA, V)
    torch.testing.assert_close(other, curvature, rtol=1e-6, atol=1e-8)


def test_the_line_integral_of_the_hessian() -> None:
    delta = 0.3 * V
    nodes, weights = np.polynomial.legendre.leggauss(8)
    integral = sum(w / 2 * expected_hvp(THETA + (x + 1) / 2 * delta, delta) for x, w in zip(nodes, weights))
    assert integral.tolist() == pytest.approx([-0.0690, 0.0690, 0.1089, -0.1089], abs=5e-5)  # type: ignore[union-attr]


def test_fisher_of_the_table_is_the_covariance_of_scores() -> None:
    # visited evenly: F = mean over states of diag(pi) - pi pi^T
    data = Data({"obs": torch.tensor([[0, 1]]), "action": torch.tensor([[0, 0]]), "valid": torch.ones(1, 2, dtype=F64)})
    pi = THETA.view(2, 2).softmax(-1)
    blocks = [0.5 * (torch.diag(q) - torch.outer(q, q)) for q in pi]
    got = Scores(Table(torch.zeros(2, 2)), THETA, data).fvp(V)
    torch.testing.assert_close(got, torch.block_diag(*blocks) @ V)
