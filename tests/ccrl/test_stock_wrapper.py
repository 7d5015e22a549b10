"""Stocks at every kind of episode end, in every autoreset mode, and the reward of an objective."""

from __future__ import annotations

import math

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from ccrl.batched_env import AutoresetMode
from ccrl.collect import Collector, Request
from ccrl.distributional import Custom, CVaR, Entropic, Expected, Homeostasis, TargetReturn
from ccrl.testing import ClockEnv, EnvContract, Episode
from ccrl.torch_env import TorchEnv
from ccrl.wrappers import StackedEnv, StockEnv, StockWrapper, relabel_stock
from envs.classic import Pendulum
from envs.inventory import InventoryVector

F = torch.float64


def uniform(low, high):
    return lambda generator, n: (
        low + (high - low) * torch.rand(n, generator=generator, dtype=F, device=generator.device)
    )


class Script(TorchEnv):
    """Rewards 2, -1, 3, then 5, ...; ends after three steps, by termination or by the limit. Vectors: (r, -r)."""

    single_action_space = spaces.Discrete(2)
    rewards = (2.0, -1.0, 3.0, 5.0)

    def __init__(self, num_envs=1, *, ends=True, vectors=False, **options):
        super().__init__(num_envs, max_episode_steps=None if ends else 3, **options)
        self.ends, self.vectors = ends, vectors
        clock = spaces.Box(0.0, 9.0, (1,), np.float32)
        both = spaces.Dict({"clock": clock, "rewards": spaces.Box(-9.0, 9.0, (2,), np.float32)})
        self.single_observation_space = both if vectors else clock

    def initial(self, generator, n):
        return torch.zeros(n, 2, device=self.device)

    def transition(self, state, action, noise):
        table = torch.tensor(self.rewards, device=self.device)
        reward = table[state[:, 0].long()]
        after = torch.stack((state[:, 0] + 1.0, reward), 1)
        return after, reward, (after[:, 0] >= 3) & self.ends

    def observe(self, state):
        if not self.vectors:
            return state[:, :1]
        return {"clock": state[:, :1], "rewards": torch.stack((state[:, 1], -state[:, 1]), 1)}


class TestPendulum(EnvContract):
    time_limit = 12

    def make_env(self, num_envs, autoreset_mode):
        env = Pendulum(num_envs, autoreset_mode=autoreset_mode, max_episode_steps=12)
        return StockEnv(env, 0.9, uniform(-3.0, 1.0))


class TestShapedVectors(EnvContract):
    random_starts = False
    independent_copies = True

    def make_env(self, num_envs, autoreset_mode):
        env = Script(num_envs, vectors=True, autoreset_mode=autoreset_mode)
        return StockEnv(env, 0.5, (1.0, -2.0), rewards="rewards", objective=Homeostasis((0.0, 0.0)))


class TestGroups(EnvContract):
    """Dict observations of the environment's own, and terminations beside truncations."""

    random_starts = False

    def make_env(self, num_envs, autoreset_mode):
        script = [[Episode(10.0 * row, 4, "both"), Episode(3.0, 2, "truncate")] for row in range(num_envs)]
        return StockEnv(ClockEnv(script, autoreset_mode=autoreset_mode, groups=True), 0.9, uniform(-1.0, 1.0))


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_stocks_by_hand(mode, ends):
    """gamma .5, c_0 = 1, rewards 2, -1, 3: stocks 1, 6, 10, 26 (the last before any reset)."""
    env = StockEnv(Script(2, ends=ends, autoreset_mode=mode), 0.5, 1.0)
    obs = env.reset(seed=0)
    assert obs["stock"].tolist() == [1.0, 1.0]
    act = torch.zeros(2, dtype=torch.int64)
    for expected in (6.0, 10.0):
        obs = env.step(act).obs
        assert obs["stock"].tolist() == [expected] * 2
    result = env.step(act)
    assert bool((result.terminated if ends else result.truncated).all())
    last = result.final_obs if mode == AutoresetMode.SAME_STEP else result.obs
    assert last["stock"].tolist() == [26.0, 26.0]
    horizon = 1.0 if ends else 3.0
    assert last["time"].flatten().tolist() == [3.0 / horizon] * 2
    if mode == AutoresetMode.SAME_STEP:
        assert (result.obs["stock"].tolist(), env.t.tolist()) == ([1.0] * 2, [0, 0])
    elif mode == AutoresetMode.NEXT_STEP:
        env.set_start(-4.0)
        dummy = env.step(act)
        assert (dummy.obs["stock"].tolist(), dummy.reward.tolist(), env.t.tolist()) == ([-4.0] * 2, [0.0] * 2, [0, 0])
        assert env.step(act).obs["stock"].tolist() == [-4.0] * 2  # (-4 + 2) / .5
        assert env.start.tolist() == [-4.0] * 2
    else:
        assert env.step(act).obs["stock"].tolist() == [26.0] * 2, "a finished copy keeps its stock"
        env.set_start(-4.0)
        first = env.reset(mask=torch.tensor([True, False]))
        assert first["stock"].tolist() == [-4.0, 26.0]
        assert env.t.tolist() == [0, 3]
        assert env.step(act).obs["stock"].tolist() == [-4.0, 26.0]


def test_the_identity_of_stock_and_return():
    """c_0 + G_0 = gamma^t (c_t + G_t): 3.25 at every step of the script."""
    rewards, gamma, c = [2.0, -1.0, 3.0], 0.5, 1.0
    for t in range(4):
        later = sum(gamma**k * r for k, r in enumerate(rewards[t:]))
        assert gamma**t * (c + later) == 3.25
        if t < 3:
            c = float(relabel_stock(torch.tensor(rewards[t]), torch.tensor(c), gamma))


def test_relabelled_stocks_are_those_of_an_episode_that_began_there():
    """c_t' = c_t + gamma^-t (c_0' - c_0): from c_0' = -.5 the stocks are -.5, 3, 4, 14."""
    own, other = [1.0, 6.0, 10.0, 26.0], [-0.5]
    for r in (2.0, -1.0, 3.0):
        other.append(float(relabel_stock(torch.tensor(r), torch.tensor(other[-1], dtype=F), 0.5)))
    assert other == [-0.5, 3.0, 4.0, 14.0]
    assert other == [c + 0.5**-t * (-0.5 - 1.0) for t, c in enumerate(own)]


def test_vectors_and_starts_of_vectors():
    env = StockEnv(Script(1, vectors=True), 0.5, (1.0, 2.0), rewards="rewards")
    env.reset(seed=0)
    act = torch.zeros(1, dtype=torch.int64)
    assert env.step(act).obs["stock"].tolist() == [[6.0, 0.0]]
    assert env.step(act).obs["stock"].tolist() == [[10.0, 2.0]]
    result = env.step(act)
    assert result.final_obs["stock"].tolist() == [[26.0, -2.0]], "the vector of the true last step"
    assert result.obs["stock"].tolist() == [[1.0, 2.0]]
    assert env.step(act).obs["stock"].tolist() == [[6.0, 0.0]], "the vector before the reset is forgotten"


@pytest.mark.parametrize(
    "objective", [Expected(), CVaR(0.5), TargetReturn(1.0), CVaR(0.25)], ids=["mean", "cvar", "target", "low"]
)
@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_shaped_rewards_add_up_to_the_utility(objective, gamma):
    start = -2.0
    env = StockEnv(Script(1), gamma, start, objective=objective)
    env.reset(seed=0)
    act = torch.zeros(1, dtype=torch.int64)
    total = sum(gamma**t * float(env.step(act).reward[0]) for t in range(3))
    ret = 2.0 - gamma + 3.0 * gamma**2
    f = lambda x: float(objective.utility(torch.tensor(x, dtype=F)))  # noqa: E731
    assert abs(total - (f(start + ret) - f(start))) < 1e-6


def test_shaped_rewards_stay_those_of_the_step_where_the_stock_has_grown():
    """gamma .9 for 400 steps: the stock is 1e19, of which gamma f(c') - f(c) rounds by thousands. With f(x) = x below 0
    and a reward of 1 the shaped one is c + 1 - c: at most 2, the spacing of float64 where 1 is half of it."""
    env = StockEnv(ClockEnv([[Episode(0.0, 500)]]), 0.9, -20.0, objective=CVaR(1.0))
    env.reset(seed=0)
    shaped = torch.cat([env.step(torch.zeros(1, dtype=torch.int64)).reward for _ in range(400)])
    assert float(env.stock) < -1e18
    assert shaped[:100].tolist() == pytest.approx([1.0] * 100)
    assert 0.0 <= float(shaped.min()) <= float(shaped.max()) <= 2.0


def test_the_float64_stock_outlives_what_float32_would_lose():
    """1e8 and a reward of 1: float32 would not move."""
    env = StockEnv(Script(1), 1.0, 1e8)
    env.reset(seed=0)
    env.step(torch.zeros(1, dtype=torch.int64))
    assert env.stock.dtype == F
    assert float(env.stock[0]) == 1e8 + 2.0


def test_the_collector_stores_true_successors():
    class Zero:
        distribution = None

        def draw_noise(self, n, generator, device):
            return torch.zeros(n)

        def initial_state(self, n):
            return None

        def act(self, obs, noise, state=None, first=None):
            return {"action": torch.zeros(len(noise), dtype=torch.int64)}

        def to_env(self, action):
            return action

        def behaviour_fields(self):
            return ()

        def behaviour(self, columns, action):
            return {}

    for mode in AutoresetMode:
        collector = Collector(StockEnv(Script(1, autoreset_mode=mode), 0.5, 1.0))
        data = collector.collect(Request(steps=9), Zero())
        kept = data["valid"][:, 0] > 0
        now, after = data["obs"]["stock"][kept, 0], data.next_obs()["stock"][kept, 0]
        assert torch.equal(after, (now + data["reward"][kept, 0]) / 0.5), mode
        assert now[:6].tolist() == [1.0, 6.0, 10.0] * 2, mode


def test_starts_do_not_repeat_the_environments_random_numbers():
    env = StockEnv(Pendulum(4), 0.9, uniform(0.0, 1.0))
    first, second = env.reset(seed=1)["stock"].clone(), env.reset(seed=2)["stock"]
    assert not torch.equal(first, second)
    assert torch.equal(env.reset(seed=1)["stock"], first)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: StockEnv(Script(2), 0.0), r"gamma: expected a number in \(0, 1\], got 0"),
        (lambda: StockEnv(StockEnv(Script(2), 0.9), 0.9), "wrapped already"),
        (lambda: StockEnv(Script(2), 0.9, rewards="costs"), r"rewards: expected a key .*\['obs'\], got 'costs'"),
        (lambda: StockEnv(Script(2), 0.9, (1.0, 2.0)), "start: expected a number"),
        (lambda: StockEnv(Script(2), 0.9, float("nan")), "start: expected finite numbers, got nan"),
        (lambda: StockEnv(Script(2), 0.9, objective=Entropic(1.0)), "gamma = 1"),
        (lambda: StockEnv(Script(2), 0.9, objective=Custom(f=torch.sign, homogeneous=0.0)), "degree 1"),
        (lambda: StockEnv(Script(2), 0.9, objective=Homeostasis((0.0, 0.0))), "rewards of 2 dimensions, got numbers"),
        (lambda: StockEnv(Script(2), 0.9, lambda g, n: torch.zeros(1)).reset(), r"expected \(2,\), got \(1,\)"),
        (
            lambda: StockEnv(Script(2), 0.9, lambda g, n: torch.full((n,), torch.nan)).reset(),
            r"from the function, got \[nan",
        ),
        (lambda: StockWrapper(Numpy(), 0.9, lambda rng: math.inf).reset(), "start: expected finite numbers, got inf"),
    ],
)
def test_wrong_settings_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# Gymnasium


class Numpy(gymnasium.Env):
    observation_space = spaces.Box(0.0, 9.0, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        reward = (2.0, -1.0, 3.0)[self.count]
        self.count += 1
        obs = np.full(1, self.count, np.float32)
        return obs, reward, self.count == 3, False, {"rewards": np.array([reward, -reward])}


def test_one_gymnasium_environment():
    env = StockWrapper(Numpy(), 0.5, 1.0)
    obs, info = env.reset(seed=0)
    assert env.observation_space.contains(obs)
    assert (float(obs["stock"]), float(info["start"]), info["t"]) == (1.0, 1.0, 0)
    seen = []
    for _ in range(3):
        obs, _, terminated, _, info = env.step(0)
        assert env.observation_space.contains(obs)
        seen.append(float(info["stock"]))
    assert seen == [6.0, 10.0, 26.0]
    assert terminated
    assert float(env.reset(options={"start": -0.5})[0]["stock"]) == -0.5
    assert float(env.step(0)[0]["stock"]) == 3.0
    drawn = StockWrapper(Numpy(), 0.5, lambda rng: rng.uniform(-1, 1))
    assert float(drawn.reset(seed=3)[0]["stock"]) == float(drawn.reset(seed=3)[0]["stock"])


def test_gymnasium_vectors_and_shaped_rewards():
    env = StockWrapper(Numpy(), 0.5, (1.0, 2.0), rewards="rewards", dims=2)
    env.reset(seed=0)
    assert env.step(0)[0]["stock"].tolist() == [6.0, 0.0]
    shaped = StockWrapper(Numpy(), 0.5, -2.0, objective=CVaR(0.5))
    shaped.reset(seed=0)
    total = sum(0.5**t * shaped.step(0)[1] for t in range(3))
    assert abs(total - (min(-2.0 + 2.25, 0.0) / 0.5 + 2.0 / 0.5)) < 1e-12
    with pytest.raises(ValueError, match="rewards and dims together"):
        StockWrapper(Numpy(), 0.5, rewards="rewards")


def test_time_is_a_share_of_the_limit_in_stacks_and_inventories():
    stacked = StackedEnv([Pendulum(1, max_episode_steps=limit) for limit in (5, 10)])
    env = StockEnv(stacked, 0.9)
    assert (stacked.max_episode_steps, env.max_episode_steps, env.horizon) == (10, 10, 10.0)
    assert StackedEnv([Script(1), Script(1)]).max_episode_steps is None
    assert StockEnv(InventoryVector("one_store_lost", max_episode_steps=4), 0.9).horizon == 4.0
