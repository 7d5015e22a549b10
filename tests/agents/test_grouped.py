"""Language-model recipes on control tasks: groups from one start, the recipe unchanged, the agent's contract."""

from __future__ import annotations

from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from stable_baselines3.common.evaluation import evaluate_policy

import envs  # noqa: F401  (registers ids)
from agents.grouped import Grouped, GroupedConfig
from agents.llm import METHODS
from ccrl.batched_env import resolve_env
from ccrl.collect import Collector, Request
from ccrl.wrappers import StackedEnv

SMALL = {"n_groups": 2, "group_size": 3, "n_steps": 12, "hidden": (8,), "compile": "off"}


def test_stacked_environments_are_their_parts() -> None:
    parts = [resolve_env("CartPole-v1", 2) for _ in range(3)]
    env, alone = StackedEnv(parts), resolve_env("CartPole-v1", 2)
    first = alone.reset(seed=5)
    assert torch.equal(env.reset(seed=5), first.repeat(3, 1))
    action = torch.tensor([0, 1])
    for _ in range(30):
        mine, theirs = env.step(action.repeat(3)), alone.step(action)
        for name in ("obs", "reward", "terminated", "truncated", "final_obs"):
            one = getattr(theirs, name)
            assert torch.equal(getattr(mine, name), one.repeat(3, *[1] * (one.dim() - 1))), name
    state = env.state_dict()
    after = env.step(action.repeat(3))
    env.load_state_dict(state)
    assert torch.equal(env.step(action.repeat(3)).obs, after.obs)


def test_signatures_resume_and_evaluation(tmp_path: Path) -> None:
    agent, whole = (Grouped("CartPole-v1", GroupedConfig(**SMALL, normalise_obs=True), seed=1) for _ in range(2))
    agent.learn(until=40)
    agent.save(tmp_path / "agent.pt")
    loaded = Grouped.load(tmp_path / "agent.pt")
    loaded.learn(until=150)
    whole.learn(until=40)
    whole.learn(until=150)
    for mine, theirs in zip(loaded.policy.state_dict().values(), whole.policy.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)
    action, state = loaded.predict(np.zeros(4, dtype=np.float32), deterministic=True)
    assert action in (0, 1)
    assert state is None
    mean, _ = evaluate_policy(loaded, gymnasium.make("CartPole-v1"), 2)
    assert mean > 0


def test_a_group_is_episodes_from_one_start() -> None:
    agent = Grouped("CartPole-v1", GroupedConfig(**SMALL), seed=3)
    data = agent.collector.collect(agent.estimator.parts.request, agent.policy)
    assert data["group"].tolist() == [0, 1, 0, 1, 0, 1]
    start = data["obs"][0]
    assert torch.equal(start[0], start[2])
    assert torch.equal(start[1], start[5])
    assert not torch.equal(start[0], start[1])


def test_the_recipe_sees_returns_compared_inside_groups() -> None:
    agent = Grouped("CartPole-v1", GroupedConfig(**SMALL, method="grpo"), seed=0)
    have = {"on": agent.collector.collect(agent.estimator.parts.request, agent.policy)}
    data = agent.estimator.prepare(have, agent.ctx)["on"]
    returns = have["on"]["valid"].sum(0)  # a cart-pole is paid 1 per step
    assert torch.equal(data["episode_reward"], returns)
    for group in (0, 1):
        scores = returns[group::2]
        expected = (scores - scores.mean()) / (scores.std() + 1e-6)
        assert torch.allclose(data["advantage"][0, group::2], expected, atol=1e-5)


def test_the_reference_is_the_policy_at_the_start(tmp_path: Path) -> None:
    agent = Grouped("CartPole-v1", GroupedConfig(**SMALL, kl_coef=0.1, n_epochs=3, learning_rate=1e-2), seed=0)
    start = [p.detach().clone() for p in agent.policy.parameters()]
    agent.learn(until=100)
    assert float(agent.scalars["train/kl"]) > 0.0
    agent.save(tmp_path / "agent.pt")
    for bank in (agent.ctx.bank, Grouped.load(tmp_path / "agent.pt").ctx.bank):
        assert all(torch.equal(p, q) for p, q in zip(bank.policy("ref").parameters(), start, strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(agent.policy.parameters(), start, strict=True))


def test_settings_go_where_they_belong() -> None:
    """What the recipe shares with this config comes from here, unless the recipe's settings say otherwise."""
    own = {"clip_low": 0.05, "tau_positive": 2.0}
    config = GroupedConfig(**SMALL, method="sapo", n_epochs=3, clip_high=0.4, settings=own)
    recipe = config.recipe()[1]
    assert (recipe.clip_low, recipe.clip_high, recipe.n_epochs, recipe.group_size) == (0.05, 0.4, 3, 3)
    assert (recipe.tau_positive, recipe.tau_negative) == (2.0, 1.05)
    config = GroupedConfig(**SMALL, learning_rate=0.02, max_grad_norm=0.3, adam_eps=1e-6)
    agent = Grouped("CartPole-v1", config)
    updater, parts = agent.updaters["policy"], agent.estimator.parts
    assert (float(updater.lr), updater.max_grad_norm, updater.eps) == (0.02, 0.3, 1e-6)
    assert parts.request == Request(episodes=6, horizon=12, groups=2)
    assert parts.max_length == 12


def test_two_behaviours_are_refused() -> None:
    config = GroupedConfig(**SMALL, method="copg", settings={"behaviours": ("live", "ref")})
    with pytest.raises(ValueError, match="'copg' does not fit control tasks: behaviours: expected one"):
        Grouped("CartPole-v1", config)


def test_episodes_that_groups_do_not_divide_are_refused() -> None:
    env = resolve_env("CartPole-v1", 4)
    collector = Collector(env, make_env=lambda n: resolve_env("CartPole-v1", n))
    agent = Grouped("CartPole-v1", GroupedConfig(**SMALL))
    with pytest.raises(ValueError, match="multiple of groups"):
        collector.collect(Request(episodes=4, horizon=3, groups=3), agent.policy)


def test_stacked_environments_are_of_one_task() -> None:
    with pytest.raises(ValueError, match="one task"):
        StackedEnv([resolve_env("CartPole-v1", 1), resolve_env("Pendulum-v1", 1)])
    with pytest.raises(ValueError, match="at least one"):
        StackedEnv([])


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"method": "grop"}, "expected one of"),
        ({"settings": {"lerning_rate": 1.0}}, "has no"),
        ({"settings": {"clip_low": 2.0}}, "clip_low"),
        ({"n_groups": 0}, "n_groups"),
        ({"compile": "maybe"}, "compile"),
    ],
)
def test_bad_settings_are_named(settings: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        GroupedConfig(**settings)


@pytest.mark.parametrize(
    ("method", "settings", "instead"),
    [
        ("sft", {}, "choose another method"),
        ("hpt", {}, "settings of hpt without demonstrations"),
        ("hpt", {"mixture": "luffy", "gate": -1.0}, "settings of hpt without demonstrations"),
        ("hpt", {"mixture": "srft", "gate": -1.0}, "settings of hpt without demonstrations"),
        ("dpo", {"pairs": "demonstrations"}, "settings of dpo without demonstrations"),
        ("ipo", {"pairs": "demonstrations"}, "settings of ipo without demonstrations"),
    ],
)
def test_methods_that_need_demonstrations_are_refused(method: str, settings: dict, instead: str) -> None:
    expected = f"learns from episodes alone, got '{method}' .*needs demonstrations.*{instead}, or a text task"
    with pytest.raises(ValueError, match=expected):
        GroupedConfig(**SMALL, method=method, settings=settings)


def test_a_method_that_needs_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'dcpo' does not fit control tasks.*two temperatures.*choose another method"):
        Grouped("CartPole-v1", GroupedConfig(**SMALL, method="dcpo"))


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"sft", "dcpo"}))
def test_every_other_method_takes_a_step(method: str) -> None:
    settings = {"hpt": {"gate": -1.0}, "real": {"labels": "group_mean"}}.get(method, {})
    # not the cart-pole: in 12 steps few of its episodes differ in their return
    agent = Grouped("Pendulum-v1", GroupedConfig(**SMALL, method=method, settings=settings), seed=0)
    before = [p.detach().clone() for p in agent.policy.parameters()]
    agent.learn(until=agent.samples_per_iteration)
    after = [p.detach() for p in agent.policy.parameters()]
    assert all(bool(p.isfinite().all()) for p in after)
    assert any(not torch.equal(p, q) for p, q in zip(before, after, strict=True))


def test_dpo_learns_from_pairs_of_episodes() -> None:
    config = GroupedConfig(n_groups=4, group_size=8, n_epochs=4, n_steps=100, method="dpo", compile="off")
    agent = Grouped("CartPole-v1", config, seed=0)
    agent.learn(until=12_000)
    assert agent.ep_rew_mean > 40  # a random policy: about 20


def test_grpo_learns_to_balance() -> None:
    config = GroupedConfig(n_groups=4, group_size=8, n_epochs=4, batch_size=8, n_steps=100, compile="off")
    agent = Grouped("CartPole-v1", config, seed=0)
    agent.learn(until=20_000)
    assert agent.ep_rew_mean > 60  # a random policy: about 20
