"""The batched environment: contract, layout of observations and actions, what agents train on."""

from __future__ import annotations

import dataclasses
import datetime
from typing import Any

import pytest
import torch

import agents
import envs
from ccrl.batched_env import AutoresetMode, evaluation_env, resolve_env
from ccrl.inventory.policies import DataDrivenPolicy, GNNPolicy
from ccrl.seeding import named_generator
from ccrl.testing import EnvContract
from envs.inventory import TASKS, InventoryEnv, InventoryVector, make_task, retail_sales
from envs.inventory.batched import mean_flow
from envs.inventory.demand import Recorded, days_from_christmas

IDS = [name for name in envs.OWN if name.startswith("Inventory")]


class TestOneStore(EnvContract):
    time_limit = 6

    def make_env(self, num_envs, autoreset_mode):
        return InventoryVector("one_store_lost", num_envs, autoreset_mode=autoreset_mode, max_episode_steps=6)


class TestManyWarehouses(EnvContract):
    time_limit = 9

    def make_env(self, num_envs, autoreset_mode):
        return InventoryVector(
            "many_warehouses_lost_demand", num_envs, autoreset_mode=autoreset_mode, max_episode_steps=9
        )


class TestRecorded(EnvContract):
    time_limit = 8

    def make_env(self, num_envs, autoreset_mode):
        return InventoryVector(
            "one_store_real_data", num_envs, autoreset_mode=autoreset_mode, max_episode_steps=8, count=50
        )


class TestRandomLeadTimes(EnvContract):
    """Lead times are drawn in every episode, by the seed; finished copies have no row in their table."""

    time_limit = 7

    def make_env(self, num_envs, autoreset_mode):
        numbers = {"holding": 1.0, "underage": 9.0, "lead_time": 3, "lead_time_min": 1}
        return InventoryVector(
            "own_demand",
            num_envs,
            autoreset_mode=autoreset_mode,
            max_episode_steps=7,
            sales=retail_sales(50),
            **numbers,
        )


class TestTransshipmentId(EnvContract):
    time_limit = 50

    def make_env(self, num_envs, autoreset_mode):
        return envs.make("ccrl/InventoryTransshipment-v0", num_envs, autoreset_mode=autoreset_mode, stores=10)


def test_every_task_has_an_id():
    assert len(IDS) == len(TASKS)
    for name in IDS:
        options: dict[str, Any] = {"count": 5} if "Recorded" in name else {}
        if "Own" in name:
            options = {"sales": retail_sales(3), "holding": 1.0, "underage": 9.0, "lead_time": 2}
        env = envs.make(f"ccrl/{name}", 2, seed=0, **options)
        assert env.id == f"ccrl/{name}"
        assert env.step(torch.zeros(2, *env.single_action_space.shape)).reward.isfinite().all()


def test_a_step_is_that_of_the_simulator():
    """Serial system: action 0 asks for the mean demand on every edge, 1 for four times as much."""
    vector = InventoryVector("serial_system", 3, lead_time=2, underage=4.0)
    obs = vector.reset(seed=4)
    env = InventoryEnv(make_task("serial_system", lead_time=2, underage=4.0))
    scenarios = env.sample(3, named_generator(4, "scenarios"))
    state, demand = env.initial(scenarios), env.noise(scenarios)
    for period in range(5):
        valid = torch.cat([state["inventory"][:, node, :slots] for node, slots in enumerate((2, 4, 3, 2))], 1)
        assert torch.equal(obs, valid)
        action = torch.tensor([[0.0, 1.0, -1.0, 0.0]] * 3) if period % 2 else torch.full((3, 4), 0.5)
        wanted = 5.0 * torch.tensor([[1.0, 4, 0, 1]] * 3) if period % 2 else torch.full((3, 4), 5 * 2.25)
        state, cost = env.step(state, env.feasible(state, wanted), demand[period])
        result = vector.step(action)
        obs = result.obs
        assert torch.allclose(result.reward, -cost)


def test_recorded_demand_sets_the_scale_of_actions():
    """0 asks for the mean of the 16 weeks before plus a tenth of the mean of all series; nothing else is on the way."""
    env = InventoryVector("one_store_real_data", 5, count=30)
    start = env.reset(seed=0)
    assert torch.equal(start[:, :6], torch.zeros(5, 6))
    assert start[:, -3].tolist() == pytest.approx([(16 * 7 + 7) / 182] * 5), "2013-01-01 is a week after Christmas"
    obs = env.step(torch.zeros(5, 1)).obs
    asked = start[:, 6:22].mean(1) + 0.1 * env.env.task.demand.mean[0]
    slot = start[:, -1].long() - 1
    torch.testing.assert_close(obs[torch.arange(5), slot], asked)
    assert torch.equal(obs[:, :6].sum(1), obs[torch.arange(5), slot])


def test_split_is_that_of_the_simulator():
    assert InventoryVector("one_store_lost", split="dev").env.periods == 100
    start = InventoryVector("one_store_real_data", split="test", count=5).reset(seed=0)
    assert torch.equal(start[:, -3], torch.full((1,), days_from_christmas(datetime.date(2013, 1, 1), 135)[134] / 182))


def test_actions_beyond_the_bounds_count_as_the_bounds():
    for beyond, bound in ((9.0, 1.0), (-9.0, -1.0)):
        observed = []
        for action in (beyond, bound):
            env = InventoryVector("one_store_lost", 3)
            env.reset(seed=0)
            observed.append(env.step(torch.full((3, 1), action)).obs)
        assert torch.equal(*observed)
        assert observed[0][:, 3].tolist() == [20.0 * (bound > 0)] * 3  # four times the mean, four periods away


def test_a_reset_of_some_leaves_the_others_alone():
    """The copies that go on meet the demand that they would have met."""
    one, other = [InventoryVector("serial_system", 3, autoreset_mode=AutoresetMode.DISABLED) for _ in range(2)]
    for env in (one, other):
        env.reset(seed=0)
        env.step(torch.zeros(3, 4))
    one.reset(mask=torch.tensor([True, False, False]))
    for _ in range(5):
        left, right = one.step(torch.zeros(3, 4)), other.step(torch.zeros(3, 4))
        assert torch.equal(left.reward[1:], right.reward[1:])
        assert torch.equal(left.obs[1:], right.obs[1:])
        assert left.reward[0] != right.reward[0]


def test_reward_is_per_store():
    vector = InventoryVector("one_warehouse_lost_demand", 2, stores=4)
    vector.reset(seed=0)
    env = vector.env
    scenarios = env.sample(2, named_generator(0, "scenarios"))
    state = env.initial(scenarios)
    _, cost = env.step(state, torch.zeros(2, 5), env.noise(scenarios)[0])
    assert torch.allclose(vector.step(torch.full((2, 5), -1.0)).reward, -cost / 4)


def test_mean_flow():
    """Store 0 is served by both warehouses, store 1 by the second."""
    net = make_task("many_warehouses_lost_demand").network
    flow = mean_flow(net)
    served_by_both = {2, 3, 4, 7, 8}
    for store in range(10):
        edges = {e: flow[store, e].item() for e in range(17) if flow[store, e]}
        assert sum(v for e, v in edges.items() if net.edges[e][1] == 2 + store) == 1.0
        assert sum(v for e, v in edges.items() if net.edges[e][0] == -1) == 1.0
        assert (set(edges.values()) == {0.5}) == (store in served_by_both)
    serial = mean_flow(make_task("serial_system").network)
    assert serial.tolist() == [[1, 1, 1, 1]]


def test_evaluation_plays_weeks_that_training_does_not():
    id, options = "ccrl/InventoryOneStoreRecorded-v0", {"count": 5}
    train = resolve_env(id, 2, **options).env
    ends = train.first_week + train.periods
    weeks = {split: evaluation_env(id, 2, split, **options).env for split in ("dev", "test")}
    # behind the warm-up, as published: it may reach back
    assert weeks["dev"].first_week + weeks["dev"].ignore >= ends
    assert weeks["test"].first_week + weeks["test"].ignore >= weeks["dev"].first_week + weeks["dev"].periods
    # the caller's own word
    assert evaluation_env(id, 2, "test", split="train", **options).env.first_week == train.first_week
    short = evaluation_env(id, 2, "dev", max_episode_steps=7, **options)
    assert (short.env.periods, short.env.first_week) == (7, weeks["dev"].first_week)
    # demand that is drawn has no weeks: the same horizon as in training
    drawn = evaluation_env("ccrl/InventoryOneStoreLost-v0", 2, "test")
    assert drawn.env.periods == resolve_env("ccrl/InventoryOneStoreLost-v0", 2).env.periods


def test_recorded_copies_play_different_series():
    env = InventoryVector("one_store_real_data", 40, count=100)
    first = env.reset(seed=0)
    assert len(first.unique(dim=0)) > 20
    assert set(first[:, -1].tolist()) <= {4.0, 5.0, 6.0}
    assert first[:, -2].min() >= 6.3
    assert first[:, -2].max() <= 11.7


@pytest.mark.parametrize(
    ("name", "task", "options"),
    [
        ("ppo", "InventorySerial-v0", {}),
        ("mdpo", "InventoryManyWarehousesLost-v0", {}),
        ("bpo", "InventoryOneStoreRecorded-v0", {"count": 5}),
    ],
)
def test_agents_train_on_the_ids(name, task, options):
    cls = agents.get_agent(name)
    agent = cls(f"ccrl/{task}", cls.Config(n_steps=64, num_envs=4), env_kwargs=options)
    before = [p.detach().clone() for p in agent.policy.parameters()]
    agent.learn(until=1)
    after = list(agent.policy.parameters())
    assert all(p.isfinite().all() for p in after)
    assert not all(torch.equal(p, q) for p, q in zip(before, after))


def test_bad_input():
    with pytest.raises(ValueError, match="num_envs: expected >= 1, got 0"):
        InventoryVector("one_store_lost", 0)
    with pytest.raises(ValueError, match="no inventory task"):
        InventoryVector("two_stores")
    with pytest.raises(TypeError, match="built already"):
        InventoryVector(make_task("one_store_lost"), lead_time=2)
    env = InventoryVector("one_store_lost", 2)
    with pytest.raises(RuntimeError, match="call reset"):
        env.step(torch.zeros(2, 1))
    with pytest.raises(RuntimeError, match="no state before"):
        env.state_dict()
    with pytest.raises(ValueError, match="not at the first reset"):
        env.reset(mask=torch.tensor([True, False]))
    env.reset(seed=0)
    with pytest.raises(ValueError, match="floating-point actions of shape"):
        env.step(torch.zeros(2, 1, dtype=torch.int64))
    other = InventoryVector("one_store_lost", 3)
    with pytest.raises(ValueError, match="expected inventory and demand of shapes"):
        other.load_state_dict(env.state_dict())


def test_promotions_and_the_season_reach_every_agent():
    """Two products of 80 weeks, one store, lead time 2: stocks of 2 slots, 16 past weeks, Christmas, the log of the
    unit, the season, and the promotion of this week and the two that an order meets."""
    weeks = 80
    series = torch.stack([torch.full((weeks, 1), 4.0), torch.full((weeks, 1), 100.0)])
    promotion = (torch.arange(weeks) % 7 == 0).float().expand(2, weeks)[:, :, None, None].contiguous()
    sales = Recorded(series, "made up", features=promotion, feature_names=("promo",))
    env = InventoryVector("own_demand", 6, sales=sales, holding=1.0, underage=9.0, lead_time=2)
    start = env.reset(seed=0)
    seasons = env.env.observe(env._state)["season"].shape[1]
    assert start.shape == (6, 2 + 16 + 1 + 1 + seasons + 3)
    assert torch.equal(start[:, 2:18], torch.ones(6, 16))  # in units of the usual demand, whatever it is
    assert set(start[:, 19].tolist()) == set((0.1 + torch.tensor([4.0, 100.0])).log().tolist())
    for week in range(16, 16 + env.env.periods):
        assert start[0, -3:].tolist() == [float((week + k) % 7 == 0) for k in range(3)]
        result = env.step(torch.zeros(6, 1))
        start = result.obs
    assert bool(result.truncated.all())
    assert result.final_obs[0, -3:].tolist() == [float((week + 1 + k) % 7 == 0) for k in range(3)]
    # what is the same of all products is not shown, what differs is: lead times 1 and 2, no capacity and one of 100
    task = make_task("own_demand", sales=sales, holding=1.0, underage=9.0, lead_time=2)
    task.by_series["capacity"][1] = 100.0
    other = InventoryVector(task, 6)
    found = other.reset(seed=0)
    assert found.shape[1] == start.shape[1] + 1
    assert set(found[:, -4].tolist()) == {0.0, 0.5}  # 1 / (1 + one unit)


@pytest.mark.parametrize("policy", [DataDrivenPolicy, GNNPolicy])
def test_promotions_reach_other_policies_of_networks(policy):
    """The same observation but for the plan gives other orders; a task without plans has no such inputs."""
    torch.manual_seed(0)
    series = torch.full((2, 80, 1), 4.0)
    sales = Recorded(series, "made up", features=torch.zeros(2, 80, 1, 1), feature_names=("promo",))
    env = InventoryEnv(make_task("own_demand", sales=sales, holding=1.0, underage=9.0, lead_time=2))
    seen = env.observe(env.initial(env.sample(2, torch.Generator())))
    made = policy(env.network, seen)
    for name in ("planned", "season"):
        assert not torch.allclose(made(seen), made(seen | {name: seen[name] + 1.0}))


def test_agents_meet_every_lead_time_that_varies():
    numbers = {"sales": retail_sales(2), "holding": 1.0, "underage": 9.0, "lead_time": 2, "vary_lead_time": 1}
    env = InventoryVector("own_demand", 32, **numbers)
    env.reset(seed=0)
    assert env._state["lead_time"].unique().tolist() == [1.0, 2.0, 3.0]
    held = env.held_out("test")
    held.reset(seed=0)
    assert held._state["lead_time"].unique().tolist() == [2.0], "products are judged with the lead time that they have"


def test_random_stock_of_recorded_demand_is_decided_by_the_seed():
    task = dataclasses.replace(make_task("one_store_real_data", count=2), random_stock=True)
    first, second = (InventoryVector(task, 4) for _ in range(2))
    assert torch.equal(first.reset(seed=0), second.reset(seed=0))
