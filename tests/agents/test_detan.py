"""D-eta-N: greedy rule, targets and losses by hand, relabelled draws, one network for every level, resume."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch

import envs
from agents import MDPO, PPO, DetaN
from agents.detan import DetaNConfig, StockPolicy, energy_loss
from ccrl.batched_env import AutoresetMode
from ccrl.data import Batching, Data
from ccrl.distributional import (
    CVaR,
    Expected,
    Homeostasis,
    MeanCVaR,
    OptimisticTail,
    SoftConstraints,
    TargetReturn,
    law_of,
)
from ccrl.testing import AgentContract, ClockEnv, Episode
from ccrl.wrappers import StockEnv

F = torch.float64


class TestContract(AgentContract):
    """Without the tests that predict from the environment's own observations: this agent's have a stock."""

    agent = DetaN
    config = DetaNConfig(
        num_envs=2, n_steps=15, rounds=1, learning_starts=10, updates=2, batch_size=8, buffer_size=100, hidden=(8,),
        n_quantiles=4, target_every=3, compile="off",
    )  # fmt: skip
    env_id = "CartPole-v1"
    test_predict_takes_one_observation_or_a_batch = None
    test_predict_takes_dict_observations = None
    test_predict_takes_discrete_observations = None
    test_predict_repeats_only_when_deterministic = None
    test_predict_hands_the_state_through = None
    test_sb3_evaluates_it = None
    test_a_loaded_agent_acts_alike = None


def test_predict_takes_observations_with_a_stock(tmp_path):
    made = agent()
    made.learn(until=24)
    obs = {"obs": np.eye(5, dtype=np.float32)[:3], "stock": np.array([-3.0, 0.0, 2.0], np.float32),
           "time": np.zeros((3, 1), np.float32)}  # fmt: skip
    several, state = made.predict(obs, deterministic=True)
    assert (several.shape, state) == ((3,), None)
    assert made.predict({k: v[1] for k, v in obs.items()}, deterministic=True)[0] == several[1]
    many = {k: np.repeat(v, 50, 0) for k, v in obs.items()}
    assert not np.array_equal(made.predict(many)[0], made.predict(many)[0]), "exploration"
    made.save(tmp_path / "a.pt")
    assert np.array_equal(DetaN.load(tmp_path / "a.pt").predict(many, deterministic=True)[0],
                          made.predict(many, deterministic=True)[0])  # fmt: skip


TINY = {
    "num_envs": 2, "rounds": 4, "batch_size": 16, "learning_starts": 8, "hidden": (8,), "n_quantiles": 4,
    "buffer_size": 200, "target_every": 3, "compile": "off",
}  # fmt: skip


def agent(env="ccrl/SABChain-v0", **settings):
    return DetaN(env, **(TINY | settings))


def policy_of(objective, quantiles, low=-5.0, high=5.0):
    """A policy whose quantiles are the same everywhere, ``[A, N]`` or ``[A, N, m]``."""
    m = max(objective.dims, 1)
    shape = (objective.dims,) if objective.dims else ()
    space = gym.spaces.Dict({"obs": gym.spaces.Box(-1, 1, (1,)), "stock": gym.spaces.Box(-np.inf, np.inf, shape)})
    ends = (torch.full(shape, x, dtype=F) for x in (low, high))
    table = torch.tensor(quantiles)
    low, high = ends
    made = StockPolicy(space, gym.spaces.Discrete(len(table)), objective=objective, low=low, high=high,
                       n_quantiles=table.shape[1], hidden=())  # fmt: skip
    with torch.no_grad():
        made.actor.net[0].weight.zero_()
        made.actor.net[0].bias.copy_(table.flatten())
    assert made.actor.net[0].out_features == table.shape[0] * table.shape[1] * m
    return made


def obs_of(*stocks):
    return {"obs": torch.zeros(len(stocks), 1), "stock": torch.tensor(stocks, dtype=F)}


@pytest.mark.parametrize(
    ("objective", "score"),
    [
        (CVaR(1.0), -0.5),  # stock 1 on (-3, -1, 0, 2): (-2, 0, 1, 3): (-2) / 4
        (CVaR(0.25), -2.0),
        (TargetReturn(0.0), -1.5),  # (2 + 0 + 1 + 3) / 4
        (Expected(), 0.5),
        (OptimisticTail(0.0), 1.0),
        (MeanCVaR(0.5, 0.5), (-2 * 1.5 + 4 * 0.5) / 4),  # slopes .5 / .5 + .5 and .5
    ],
)
def test_scores_by_hand(objective, score):
    policy = policy_of(objective, [[-3.0, -1.0, 0.0, 2.0]])
    assert policy.utilities(obs_of(1.0)).item() == pytest.approx(score)


def test_scores_of_vectors():
    policy = policy_of(Homeostasis((0.0, 0.0)), [[[2.0, 3.0], [-1.0, -1.0]], [[-1.0, -1.0], [-1.0, -1.0]]])
    # stock (1, 1): particles (3, 4), (0, 0): -2.5; the second action is at 0
    assert policy.utilities(obs_of([1.0, 1.0])).tolist() == [[-2.5, 0.0]]
    assert policy.act(obs_of([1.0, 1.0]), None)["action"].tolist() == [1]
    soft = policy_of(SoftConstraints((0.0,), trade_off=2.0), [[[2.0, 3.0], [-1.0, -1.0]]])
    # (3, 4) and (0, 0) with stock (1, 1): 3 and 0; with (1, -5): 3 - 2 * 2 and 0 - 2 * 6
    assert soft.utilities(obs_of([1.0, 1.0], [1.0, -5.0])).flatten().tolist() == [1.5, -6.5]


def test_the_stock_changes_what_is_greedy_and_ties_are_broken_by_noise():
    policy = policy_of(CVaR(1.0), [[0.0, 0.0], [-2.0, 3.0]])
    # stock -4: -4 against (-6 - 1) / 2 = -3.5; stock 0: 0 against -1; stock 2: 0 and 0
    assert policy.act(obs_of(-4.0, 0.0, 2.0), None)["action"].tolist() == [1, 0, 0]
    policy.epsilon.zero_()
    for order, chosen in (((0.1, 0.9), 1), ((0.9, 0.1), 0)):
        noise = torch.tensor([[0.5, 0.5, *order]] * 3)
        assert policy.act(obs_of(-4.0, 0.0, 2.0), noise)["action"].tolist() == [1, 0, chosen]
    policy.epsilon.fill_(1.0)
    noise = torch.tensor([[0.5, 0.1, 0.0, 0.0], [0.5, 0.9, 0.0, 0.0]])
    assert policy.act(obs_of(-4.0, -4.0), noise)["action"].tolist() == [0, 1]


def test_the_network_sees_the_stock_clipped_and_the_utility_sees_it_whole():
    policy = policy_of(CVaR(1.0), [[0.0, 1.0]], low=-2.0, high=6.0)
    features = policy.features(obs_of(-9.0, -2.0, 2.0, 6.0, 99.0), "actor")
    assert features[:, -1].tolist() == [-1.0, -1.0, 0.0, 1.0, 1.0]
    assert policy.utilities(obs_of(-9.0)).item() == -8.5


class Fixed:
    """A bank of one version."""

    def __init__(self, module):
        self.module = module

    def policy(self, version):
        assert version == "target"
        return self.module


def test_targets_by_hand():
    """gamma .5. Row 0: r 1, c' = -4: action 1 is greedy, so y = 1 + .5 (-2, 3). Row 1: c' = 2: action 0, y = 4. Row 2
    terminated: y = r."""
    made = agent(gamma=0.5, stock_low=(-5.0,), stock_high=(5.0,))
    target = policy_of(CVaR(1.0), [[0.0, 0.0], [-2.0, 3.0]])
    after = {"obs": torch.zeros(1, 3, 1), "stock": torch.tensor([[-4.0, 2.0, -4.0]], dtype=F)}
    reward = torch.tensor([[1.0, 4.0, 7.0]])
    draw = Data(
        {"next_obs": after, "reward": reward, "vector_reward": reward.double(),
         "alive": torch.tensor([[1.0, 1.0, 0.0]]), "valid": torch.ones(1, 3)}, raw=frozenset()
    )  # fmt: skip
    ctx = made.ctx
    ctx.bank = Fixed(target)
    y = made.learner.cycle.targets(draw, ctx)["target"]
    assert y[0].tolist() == [[0.0, 2.5], [4.0, 4.0], [7.0, 7.0]]


def test_energy_distance_by_hand_and_its_gradient():
    """Particles (0, 0), (3, 4) of one action against (0, 0) twice: mean distance 2.5; among themselves 2.5 / 2."""
    theta = torch.tensor([[[[[0.0, 0.0], [3.0, 4.0]]]]], dtype=F, requires_grad=True)
    batch = Data({"action": torch.zeros(1, 1, dtype=torch.int64), "target": torch.zeros(1, 1, 2, 2, dtype=F),
                  "valid": torch.ones(1, 1, dtype=F)})  # fmt: skip
    loss = lambda x: energy_loss(None, None, {"quantiles": x}, batch)  # noqa: E731
    assert float(loss(theta.detach())) == pytest.approx(2.5 - 1.25, abs=1e-5)
    (gradient,) = torch.autograd.grad(loss(theta).sum(), theta)
    assert bool(gradient.isfinite().all()), "two equal particles"
    # of the second: .5 (.6, .8) from the targets, -.25 (.6, .8) from the first
    assert torch.allclose(gradient[0, 0, 0, 1], torch.tensor([0.15, 0.2], dtype=F), atol=1e-5)
    apart = torch.randn(1, 1, 2, 3, 2, dtype=F, requires_grad=True)
    other = Data(dict(batch) | {"target": torch.randn(1, 1, 5, 2, dtype=F)})
    assert torch.autograd.gradcheck(lambda x: energy_loss(None, None, {"quantiles": x}, other), (apart,))


def test_replayed_stocks_are_drawn_anew_and_move_with_the_reward():
    made = agent(gamma=0.5, stock_low=(-2.0,), stock_high=(6.0,))
    made.learn(until=8)
    ring = made.learner.ring
    stored = {k: v.clone() for k, v in ring._columns["obs"].items()}
    data = ring.sample(Batching(size=400), made.ctx.generator)
    now, after = data["obs"]["stock"], data["next_obs"]["stock"]
    assert now.dtype == after.dtype == F
    assert torch.equal(after, (now + data["reward"].double()) / 0.5)
    assert -2.0 <= float(now.min()) < -1.5 < 5.5 < float(now.max()) <= 6.0
    assert len(now.unique()) > 300
    assert torch.equal(stored["stock"], ring._columns["obs"]["stock"]), "the ring keeps what happened"


def test_without_relabelling_stocks_are_those_that_happened():
    made = agent(gamma=0.5, relabel=0.0, stock_low=(-2.0,), stock_high=(6.0,))
    made.learn(until=8)
    data = made.learner.ring.sample(Batching(size=100), made.ctx.generator)
    kept = made.learner.ring._columns["obs"]["stock"][:8]
    assert bool(torch.isin(data["obs"]["stock"].float(), kept).all())
    assert torch.equal(data["next_obs"]["stock"], (data["obs"]["stock"] + data["reward"].double()) / 0.5)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_learning_in_every_autoreset_mode(mode):
    env = envs.make("ccrl/SABChain-v0", 2, autoreset_mode=mode)
    made = agent(env)
    before = made.learner.updaters["critic"].flat.clone()
    made.learn(until=40)
    assert not torch.equal(before, made.learner.updaters["critic"].flat)
    assert bool(made.learner.updaters["critic"].flat.isfinite().all())
    size = len(made.learner.ring)
    assert size == made.num_timesteps, "a dummy row is in the ring"


def test_dict_observations_of_the_environment():
    script = [[Episode(10.0 * row, 3 + row, "truncate")] for row in range(2)]
    made = agent(ClockEnv(script, groups=True))
    made.learn(until=24)
    assert made.num_timesteps == 24


@pytest.mark.parametrize(
    ("env", "settings"),
    [
        ("ccrl/Homeostat-v0", {"objective": "homeostasis", "deviation": (-1.0, -1.0)}),
        ("ccrl/CostBudget-v0", {"objective": "soft_constraints", "bounds": (-3.0,), "trade_off": 3.0}),
    ],
)
def test_vector_objectives(env, settings):
    made = agent(env, gamma=1.0, stock_low=(-4.0,), stock_high=(4.0,), **settings)
    made.learn(until=24)
    start = made.start_for()
    returns = made.returns(start, 6)
    assert returns.shape == (6, 2)
    assert bool(returns.isfinite().all())
    data = made.learner.ring.sample(Batching(size=20), made.ctx.generator)
    moved = data["obs"]["stock"] + data["next_obs"]["rewards"].double()
    assert torch.equal(data["next_obs"]["stock"], moved)
    assert "rewards" not in made.policy._groups["actor"]


def test_returns_are_discounted_and_those_of_the_stock():
    made = agent(gamma=0.5, stock_low=(-3.0,), stock_high=(3.0,))
    with torch.no_grad():  # always action 1
        made.policy.actor.net[-1].weight.zero_()
        made.policy.actor.net[-1].bias.copy_(torch.tensor([0.0] * 4 + [1.0] * 4 + [-1.0] * 4))
    returns = made.returns(-2.0, 300)
    # +-1 +-.5 +-.25 +-.125
    grid = {sum((2 * i - 1) * 0.5**t for t, i in enumerate(x)) for x in np.ndindex(2, 2, 2, 2)}
    assert {round(x, 6) for x in returns.tolist()} <= grid
    assert abs(float(returns.mean()) - 0.5 * 1.875) < 0.25


@pytest.mark.parametrize("shown", [True, False])
def test_returns_where_the_last_observation_is_hidden(shown):
    """Its stock would be the return; the rewards are there all the same."""
    envs = [ClockEnv([[Episode(0, 3)]] * 2, provides_final_obs=shown) for _ in range(2)]
    assert agent(envs[0], gamma=1.0).returns(0.0, 2, env=envs[1]).tolist() == [3.0, 3.0]


def test_returns_of_long_episodes_are_finite():
    """A reward of 1 for 500 steps at gamma = .8 is 5; the stock c_T grows to .8^-500 = 2.9e48, which is no float32."""
    envs = [ClockEnv([[Episode(0, 500)]] * 2) for _ in range(2)]
    assert agent(envs[0], gamma=0.8).returns(-1.0, 2, env=envs[1]).tolist() == pytest.approx([5.0, 5.0])


def test_a_policy_of_ones_own_is_refused():
    with pytest.raises(ValueError, match="takes none"):
        DetaN("CartPole-v1", policy=torch.nn.Linear(4, 2))


def test_one_network_serves_every_level():
    """After a short training the chain's actions differ with the level, and the exact value of the policy is close."""
    torch.manual_seed(0)
    made = DetaN(
        "ccrl/SABChain-v0", gamma=1.0, stock_low=(-14.0,), stock_high=(4.0,), num_envs=8, n_steps=4, updates=16,
        rounds=10, batch_size=128, learning_starts=320, hidden=(64,), n_quantiles=16, learning_rate=3e-3,
        exploration_end=1.0, target_every=25, compile="off", env_kwargs={"horizon": 2},
    )  # fmt: skip
    made.learn(until=320 * 5)
    mdp = made.env.env.mdp

    def act(t, s, c):
        obs = {"obs": torch.eye(3)[t][None], "stock": torch.tensor([c], dtype=F), "time": torch.tensor([[float(t)]])}
        return int(made.act(obs, deterministic=True)[0])

    for tau, optimum in ((1.0, 2.0), (0.5, made.env.env.optimum(CVaR(0.5)).value)):
        starts = torch.linspace(-8.0, 2.0, 41).tolist()
        best = max(float(CVaR(tau).value(*law_of(mdp, act, 2, 1.0, 0, c))) for c in starts)
        assert best > 0.9 * optimum
    assert made.start_for(CVaR(1.0)) < made.start_for(CVaR(0.25))
    start, value = made.validate(CVaR(1.0), starts=[-8.0, 0.0], episodes=200)
    assert start == -8.0
    assert abs(value - 2.0) < 1.0
    with pytest.raises(ValueError, match="proportional to that of CVaR"):
        made.start_for(TargetReturn(1.0))
    assert made.evaluate(envs.make("ccrl/SABChain-v0", 3, horizon=2), episodes=6).returns.shape == (6,)


def test_resume_is_exact(tmp_path):
    whole, half = agent(), agent()
    whole.learn(until=64)
    half.learn(until=64, callback=lambda a: a.save(tmp_path / "a.pt") if a.iteration == 4 else None)
    loaded = DetaN.load(tmp_path / "a.pt")
    assert loaded.num_timesteps == 32
    loaded.learn(until=64)
    for key, value in whole.policy.state_dict().items():
        assert torch.equal(value, loaded.policy.state_dict()[key]), key
    obs = {k: v.numpy() for k, v in whole.env.reset(seed=5).items()}
    assert np.array_equal(whole.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "target", "level": 0.5}, "level: the objective target has none"),
        ({"objective": "cvar", "target": 1.0}, "target: the objective cvar has none"),
        ({"objective": "cvar", "level": 0.0}, "level: expected"),
        ({"objective": "mean_cvar", "mean_weight": 2.0}, "mean_weight: expected"),
        ({"objective": "homeostasis"}, "deviation"),
        ({"objective": "homeostasis", "deviation": (0.0, 0.0), "kappa": 1.0}, "kappa"),
        ({"objective": "risky"}, "expected one of"),
        ({"stock_low": (1.0,), "stock_high": (1.0,)}, "stock_low: expected less"),
        ({"stock_low": (1.0, 2.0)}, "stock_low: expected 1 number"),
        ({"gamma": 0.0}, "gamma"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DetaNConfig(**settings)


def test_continuous_actions_are_refused():
    with pytest.raises(ValueError, match="Discrete"):
        agent("Pendulum-v1")


@pytest.mark.parametrize("cls", [PPO, MDPO])
def test_policy_gradients_learn_from_the_shaped_rewards(cls):
    """Their returns are those of the objective: f(c_0 + G) - f(c_0), the stock in the observation."""
    env = StockEnv(envs.make("ccrl/OrderExecution-v0", 4), 1.0, 0.5, objective=CVaR(0.5))
    size = {"batch_size": 20} if cls is PPO else {"critic_batch_size": 20}
    made = cls(env, num_envs=4, n_steps=10, gamma=1.0, hidden=(8,), compile="off", **size)
    made.learn(until=80)
    # c_0 = .5 is never used up by gains, so f(c_0) = 0 and what is earned is a shortfall
    assert made.ep_rew_mean <= 0.0
    last = env.stock - env.start
    assert bool(last.isfinite().all())
