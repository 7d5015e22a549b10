"""SubPO: its credit against enumeration, identities, the contract, and a grid that it learns to sweep."""

from __future__ import annotations

import itertools
from functools import partial

import gymnasium
import pytest
import torch
from torch import Tensor

import envs  # noqa: F401  (registers ids)
from agents.subpo import SubPO, SubPOConfig, credited, without_mean
from ccrl.policies import GibbsPolicy
from ccrl.returns import discounted_sum
from ccrl.testing import AgentContract, prepare_rollout
from ccrl.wrappers import SetReward
from envs.coverage import GridWorld

SMALL = {"num_envs": 2, "n_steps": 15, "hidden": (8,), "compile": "off"}


class TestSubPOClipped(AgentContract):
    agent = SubPO
    config = SubPOConfig(
        credit="gae", surrogate="clip", gamma=0.99, batch_size=8, n_epochs=2, ent_coef=0.01, normalise_advantage=True,
        **SMALL,
    )  # fmt: skip
    env_id = "CartPole-v1"
    single_env = partial(gymnasium.make, "CartPole-v1")


class TestSubPOContinuous(TestSubPOClipped):
    env_id = "Pendulum-v1"
    single_env = partial(gymnasium.make, "Pendulum-v1")


class TestSubPOEpisodes(AgentContract):
    agent = SubPO
    config = SubPOConfig(ent_coef=0.01, **SMALL | {"n_steps": 19})
    env_id = "ccrl/GridCoverage-v0"
    single_env = partial(gymnasium.make, "ccrl/GridCoverage-v0")


# -- by enumeration: cells 0..3 in a row, moves left and right, start 0, three moves, weights 1, 2, 4, 8 --------------

THETA = (0.4, -0.3, 0.2, 0.1)
"""Logit of a move to the right in every cell."""
WEIGHTS = (1.0, 2.0, 4.0, 8.0)


def trajectories(theta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``log pi`` of every step ``[3, 8]``, gains, additive rewards and cells ``[4, 8]`` of all trajectories."""
    log_prob, gain, additive, cells = [], [], [], []
    for moves in itertools.product((0, 1), repeat=3):
        cell, seen, rows = 0, {0}, []
        path = [0]
        for right in moves:
            p = torch.sigmoid(theta[cell])
            now = torch.log(p if right else 1.0 - p)
            cell = min(max(cell + (1 if right else -1), 0), 3)
            rows.append((now, 0.0 if cell in seen else WEIGHTS[cell], WEIGHTS[cell]))
            seen.add(cell)
            path.append(cell)
        log_prob.append(torch.stack([r[0] for r in rows]))
        gain.append([r[1] for r in rows])
        additive.append([r[2] for r in rows])
        cells.append(path)
    as_columns = lambda x: torch.tensor(x, dtype=torch.float64).T  # noqa: E731
    return torch.stack(log_prob, 1), as_columns(gain), as_columns(additive), torch.tensor(cells).T


def expected_gradient(weight: Tensor, log_prob: Tensor, theta: Tensor) -> list[float]:
    """``E sum_i grad log pi_i w_i``."""
    probability = log_prob.detach().sum(0).exp()
    (gradient,) = torch.autograd.grad((probability * (weight * log_prob).sum(0)).sum(), theta, retain_graph=True)
    return gradient.tolist()


@pytest.fixture
def chain():
    theta = torch.tensor(THETA, dtype=torch.float64, requires_grad=True)
    log_prob, gain, additive, cells = trajectories(theta)
    carry = torch.ones_like(gain)
    carry[-1] = 0.0
    return theta, log_prob, gain, additive, carry, cells


def test_marginal_gains_to_go_are_the_gradient(chain):
    theta, log_prob, gain, _, carry, _ = chain
    value = (log_prob.sum(0).exp() * (1.0 + gain.sum(0))).sum()  # F({s_0}) = 1
    assert float(value.detach()) == pytest.approx(5.419495, abs=1e-6)
    truth = torch.autograd.grad(value, theta, retain_graph=True)[0].tolist()
    assert truth == pytest.approx([1.010164, 1.464116, 0.504490, 0.0], abs=1e-6)
    assert expected_gradient(credited(gain, carry, "togo"), log_prob, theta) == pytest.approx(truth, abs=1e-12)
    whole = gain.sum(0, keepdim=True).expand_as(gain)
    assert expected_gradient(whole, log_prob, theta) == pytest.approx(truth, abs=1e-12)


def test_the_released_credit_is_the_greedy_one_in_expectation(chain):
    theta, log_prob, gain, _, carry, _ = chain
    expected = [0.750749, 0.820352, 0.504490, 0.0]
    assert expected_gradient(credited(gain, carry, "greedy"), log_prob, theta) == pytest.approx(expected, abs=1e-6)
    cumulative = 1.0 + credited(gain, carry, "cumulative")  # F(tau_{0:i+1})
    assert expected_gradient(cumulative, log_prob, theta) == pytest.approx(expected, abs=1e-6)


def test_the_additive_reward_has_another_optimum(chain):
    theta, log_prob, _, additive, carry, _ = chain
    value = (log_prob.sum(0).exp() * (1.0 + additive.sum(0))).sum()
    assert float(value.detach()) == pytest.approx(7.307610, abs=1e-6)
    found = expected_gradient(credited(additive, carry, "togo"), log_prob, theta)
    assert found == pytest.approx([0.967083, 1.156820, 0.378368, 0.0], abs=1e-6)


def test_a_baseline_of_the_prefix_changes_no_expectation(chain):
    theta, log_prob, gain, _, carry, cells = chain
    plain = expected_gradient(credited(gain, carry, "togo"), log_prob, theta)
    # any function of the cells so far: a random number per prefix
    numbers: dict[tuple[int, ...], float] = {}
    generator = torch.Generator().manual_seed(0)
    baseline = torch.empty_like(gain)
    for i, n in itertools.product(range(3), range(8)):
        prefix = tuple(cells[: i + 1, n].tolist())
        baseline[i, n] = numbers.setdefault(prefix, float(torch.randn((), generator=generator)))
    assert expected_gradient(credited(gain, carry, "togo") - baseline, log_prob, theta) == pytest.approx(plain)


def test_modular_gains_are_rewards_to_go():
    reward = torch.rand(6, 4, generator=torch.Generator().manual_seed(0))
    carry = torch.ones(6, 4)
    carry[-1] = 0.0
    assert torch.equal(credited(reward, carry, "togo"), discounted_sum(reward, 1.0, carry))


def test_credit_ends_with_the_episode():
    gain = torch.tensor([[1.0], [2.0], [4.0], [8.0]])
    carry = torch.tensor([[1.0], [0.0], [1.0], [0.0]])
    assert credited(gain, carry, "togo").flatten().tolist() == [3.0, 2.0, 12.0, 8.0]
    assert credited(gain, carry, "cumulative").flatten().tolist() == [1.0, 3.0, 4.0, 12.0]
    assert credited(gain, carry, "togo", gamma=0.5).flatten().tolist() == [2.0, 2.0, 8.0, 8.0]


def test_the_mean_is_taken_at_equal_times():
    weight = torch.tensor([[1.0, 5.0], [2.0, 4.0], [9.0, 0.0]])
    time, valid = torch.tensor([[0, 1], [1, 0], [2, 2]]), torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
    # time 0: 1 and 4, mean 2.5; time 1: 5 and 2, mean 3.5; time 2: the valid 9 alone
    assert without_mean(weight, time, valid).tolist() == [[-1.5, 1.5], [-1.5, 1.5], [0.0, 0.0]]


def make(env_kwargs: dict | None = None, **settings) -> SubPO:
    options = {"num_envs": 40, "n_steps": 6, "hidden": (8,), "compile": "off"} | settings
    kwargs = {"size": (4, 4), "max_episode_steps": 6} | (env_kwargs or {})
    return SubPO("ccrl/GridCoverage-v0", seed=0, env_kwargs=kwargs, **options)


def test_returns_are_the_value_of_the_set():
    agent = make()
    data = prepare_rollout(agent)
    elements = agent.env.element(data["obs"].flatten(0, 1)).view(data.shape)
    last = agent.env.element(data.next_obs()[-1])
    paths = torch.cat([elements, last.unsqueeze(0)]).T
    values = agent.env.function.value(paths)
    assert torch.allclose(4.0 + data["reward"].sum(0), values), "F({s_0}) = 4, and the gains"


def test_the_order_of_episodes_does_not_matter():
    agent = make()
    data = prepare_rollout(agent)
    (phase,) = agent.estimator.phases()
    updater = agent.updaters["policy"]

    def gradient(columns: Tensor) -> Tensor:
        batch = data.take(columns).whole(phase.batching)
        return updater.gradient(phase.terms, batch).mean.clone()

    n = data.shape[1]
    first, second = gradient(torch.arange(n)), gradient(torch.randperm(n, generator=torch.Generator().manual_seed(0)))
    assert torch.allclose(first, second, atol=1e-6)
    # 40 equal copies of a path: every weight is the mean, so the gradient is 0, not NaN
    data = agent.estimator.advantages(data.take(torch.zeros(n, dtype=torch.int64)))
    assert not data["advantage"].any()


@pytest.mark.parametrize("settings", [{}, {"recurrent": "gru", "recurrent_size": 8}])
def test_markovian_and_recurrent_policies_learn_to_sweep(settings):
    agent = make(learning_rate=0.03, **settings)
    agent.learn(agent.samples_per_iteration)
    before = float(agent.scalars["rollout/set_value"])
    agent.learn(40 * agent.samples_per_iteration)
    # 16 cells in all, the best path of 6 moves covers all of them; random walks cover about 8.5
    assert before < 10.0
    assert float(agent.scalars["rollout/set_value"]) > before + 2.0


class Squared:
    """``F(A) = |A|^2`` of the distinct cells: gains grow, so that it is not submodular."""

    n, capacity = 16, None

    def initial(self, count: int) -> dict[str, Tensor]:
        return {"visited": torch.zeros(count, self.n, dtype=torch.bool)}

    def gain(self, state: dict[str, Tensor], element: Tensor) -> Tensor:
        fresh = ~state["visited"].gather(1, element.unsqueeze(1)).squeeze(1)
        return fresh * (2.0 * state["visited"].sum(1) + 1.0)

    def insert(self, state: dict[str, Tensor], element: Tensor) -> dict[str, Tensor]:
        return {"visited": state["visited"].scatter(1, element.unsqueeze(1), True)}


def test_general_rewards_have_marginal_gains_too():
    env = SetReward(GridWorld(40, size=(4, 4), max_episode_steps=6), Squared())
    agent = SubPO(env, seed=0, num_envs=40, n_steps=6, hidden=(8,), learning_rate=0.03, compile="off")
    agent.learn(agent.samples_per_iteration)
    before = float(agent.scalars["rollout/set_value"])
    agent.learn(40 * agent.samples_per_iteration)
    # 7 distinct cells are 49; a random walk finds fewer than 5
    assert before < 25.0
    assert float(agent.scalars["rollout/set_value"]) > before + 10.0


def test_without_a_critic_a_policy_needs_no_values():
    agent = SubPO(
        "ccrl/GridCoverage-v0", num_envs=2, policy=lambda obs, action, heads: GibbsPolicy(obs, action), compile="off",
        env_kwargs={"observation": "scaled"},
    )  # fmt: skip
    assert agent.learn(1).iteration == 1


def test_the_entropy_weight_falls_as_one_over_the_iteration():
    agent = make(ent_coef=0.6)
    weights = []
    agent.learn(3 * agent.samples_per_iteration, lambda a: weights.append(float(a.estimator.ent_coef)))
    assert weights == pytest.approx([0.6, 0.3, 0.2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"credit": "gae", "baseline": "none"}, "baseline"),
        ({"gae_lambda": 0.5}, "gae_lambda"),
        ({"n_epochs": 3}, "n_epochs"),
        ({"ent_decay": "none"}, "ent_decay"),
        ({"credit": "greedy", "gamma": 0.9}, "gamma"),
        ({"credit": "cumulative", "gamma": 0.9}, "gamma"),
        ({"credit": "modular"}, "credit"),
        ({"n_steps": 7}, "multiple of the task's 6 steps"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)
