"""What BNPO, GDPO and G2RPO have in common: statistics of the whole rollout, PPO's loss, any recipe's guarantees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from agents.llm import get_method
from agents.llm.agent import LLM, LLMMethod
from agents.llm.bnpo import BNPO
from agents.llm.g2rpo import G2RPO
from agents.llm.gdpo import GDPO
from ccrl.collect import Request
from ccrl.data import Batching, Data
from ccrl.estimators import losses, ratios
from ccrl.estimators.recipe import Parts
from ccrl.estimators.terms import surrogate
from ccrl.updaters import ModuleUpdater

AGENTS = [BNPO, GDPO, G2RPO]
agents = pytest.mark.parametrize("agent", AGENTS, ids=lambda a: a.name)
SHAPED = {"g2rpo": {"entropy_bounds": ((2.0, 2.1),), "length_bounds": ((0.0, 2.0, 3.0, 9.0),)}}
"""Settings that switch on everything a method has."""


def make(agent: LLMMethod, task: str = "sequence_match", env_kwargs: Any = None, **options: Any) -> LLM:
    settings = {"model": "tabular", "optimiser": "sgd", "learning_rate": 2.0, "max_grad_norm": 0.0, "n_prompts": 6}
    return agent(task, **settings | options, env_kwargs=env_kwargs or {"questions": 4, "fixed_length": 3})


def prepared(agent: LLM, data: Data | None = None) -> Data:
    data = agent.collector.collect(agent.estimator.parts.request, agent.policy) if data is None else data
    with torch.no_grad():
        return agent.estimator.prepare({"on": data}, agent.ctx)["on"]


def gradient(agent: LLM, data: Data, microbatch: int | None = None) -> Tensor:
    batch = data.epoch(Batching("sequence", "full", microbatch=microbatch), None)[0]
    return agent.updaters["policy"].gradient(agent.estimator.phases()[0].terms, batch).mean


def lift(data: Data, name: str, value: Tensor) -> Data:
    """The rollout with another column, as if it had been collected so."""
    return Data({**{k: data[k] for k in data}, name: value}, sequence=data.sequence)


@agents
def test_registered_under_its_name(agent: LLMMethod) -> None:
    assert get_method(agent.name) is agent


@agents
def test_micro_batches_padding_and_order_do_not_matter(agent: LLMMethod) -> None:
    made = make(agent, **SHAPED.get(agent.name, {}))
    raw = made.collector.collect(made.estimator.parts.request, made.policy)
    raw = lift(raw, "log_prob", raw["log_prob"] + 0.5 * torch.randn_like(raw["log_prob"]))  # ratios away from 1
    expected = gradient(made, prepared(made, raw))
    assert expected.norm() > 1e-3
    torch.testing.assert_close(gradient(made, prepared(made, raw), microbatch=7), expected)
    torch.testing.assert_close(gradient(made, prepared(made, raw.take(torch.randperm(48)))), expected)
    # a step whose rows are not valid, with numbers that must not be read
    steps = {k: raw[k] for k in ("action", "valid", "present", "log_prob")}
    padded = {k: torch.cat([v, torch.full_like(v[:1], 0 if k in ("action", "valid") else 9)]) for k, v in steps.items()}
    wide = Data(padded | {k: raw[k] for k in raw.sequence}, sequence=raw.sequence)
    table = made.policy.logits
    made.policy.logits = nn.Parameter(torch.cat([table.detach(), torch.full_like(table[:, :1], 50.0)], 1))
    made.updaters["policy"].params = [made.policy.logits]
    found = gradient(made, prepared(made, wide)).view_as(made.policy.logits)
    torch.testing.assert_close(found[:, :-1], expected.view_as(table))
    assert found[:, -1].eq(0.0).all()


@agents
def test_on_policy_the_gradient_is_reinforce(agent: LLMMethod) -> None:
    made = make(agent)
    on = prepared(made)
    table = made.policy.logits
    log_prob = made.policy(on, frozenset({"log_prob"}))["log_prob"]
    per_token = 1.0 if agent is BNPO else 1.0 / on.shape[0]
    (expected,) = torch.autograd.grad(-(on["advantage"] * log_prob).sum() * per_token / on.shape[1], table)
    torch.testing.assert_close(gradient(made, on).view_as(table), expected)


@agents
def test_equal_rewards_give_no_gradient(agent: LLMMethod) -> None:
    made = make(agent)
    raw = made.collector.collect(made.estimator.parts.request, made.policy)
    raw = lift(
        lift(raw, "episode_reward", torch.full_like(raw["episode_reward"], 0.1)),
        "reward_components",
        torch.full_like(raw["reward_components"], 0.1),
    )
    assert gradient(made, prepared(made, raw)).eq(0.0).all()


@agents
def test_episodes_of_control_tasks(agent: LLMMethod) -> None:
    """No tokens, no components, returns of any size, lengths that differ."""
    policy = nn.Linear(2, 1)
    updater = ModuleUpdater(policy, lambda params: torch.optim.SGD(params, lr=0.1))
    recipe = agent.Recipe(agent.Config(), Parts(policy, updater, Request(episodes=6, horizon=4), 4))
    valid = (torch.arange(4)[:, None] < torch.tensor([4, 2, 3, 1, 4, 4])).float()
    columns = {
        "valid": valid, "log_prob": -torch.ones(4, 6), "reward": valid * torch.tensor([[-9.0, 30, 1, 70, 2, 2]]),
        "carry": valid, "group": torch.tensor([0, 0, 1, 1, 2, 2]),
    }  # fmt: skip
    data = Data(columns, sequence=frozenset({"group"}))
    on = recipe.prepare({"on": data}, None)["on"]  # type: ignore[arg-type]  # read for references only
    advantage = on["advantage"]
    assert advantage.isfinite().all()
    assert advantage[valid == 0].eq(0.0).all()
    assert advantage[:, 4:].abs().max() < 1e-6
    assert advantage[0, 1] > 0.1 > -0.1 > advantage[0, 0]
    assert advantage[0, 3] > advantage[0, 2]
    batch = on.epoch(Batching("sequence", "full"), None)[0]
    log_prob = (-torch.ones(4, 6)).requires_grad_()
    loss, _ = surrogate(recipe.terms(), {"log_prob": log_prob}, batch)
    (found,) = torch.autograd.grad(loss, log_prob)
    assert found.isfinite().all()
    assert found[valid == 0].eq(0.0).all()
    assert found.abs().max() > 0.0


@agents
def test_learns(agent: LLMMethod) -> None:
    # graded rewards stay small under BNPO: its weights are no deviations, and it wants a larger step
    made = make(agent, learning_rate=30.0 if agent is BNPO else 6.0, group_size=8)
    before = made.pass_at([1], questions=4, samples=64)["episode_reward"]
    made.learn(until=48 * 60)
    after = made.pass_at([1], questions=4, samples=64)["episode_reward"]
    assert before < 0.25
    assert after > 0.85


@agents
def test_resumes_exactly(agent: LLMMethod, tmp_path: Path) -> None:
    options = {
        "optimiser": "adamw",
        "batch_size": 16,
        "n_epochs": 2,
        "lr_schedule": "linear",
        **SHAPED.get(agent.name, {}),
    }
    whole = make(agent, **options)
    whole.learn(until=48 * 4)
    half = make(agent, **options)
    half.learn(until=48 * 4, callback=lambda a: a.iteration < 2)
    half.save(tmp_path / "half.pt")
    resumed = agent.load(tmp_path / "half.pt")
    assert resumed.iteration == 2
    resumed.learn(until=48 * 4)
    assert resumed.iteration == whole.iteration == 4
    assert torch.equal(resumed.policy.logits, whole.policy.logits)
    assert torch.equal(resumed.ctx.generator.get_state(), whole.ctx.generator.get_state())


def test_the_normaliser_is_logged() -> None:
    made = make(BNPO)
    made.learn(until=48)
    assert made.scalars["train/alpha_reward"] >= 1.0
    assert made.scalars["train/beta_reward"] >= 1.0


def test_the_clipped_loss_has_the_gradient_of_its_value() -> None:
    """Finite differences in float64, away from the kinks; old log-probabilities and advantages get none."""
    log_prob = torch.tensor([[0.1, 0.5, -0.5, 0.5, -0.5, 3.0]], dtype=torch.float64, requires_grad=True)
    old, advantage = torch.zeros(1, 6, dtype=torch.float64), torch.tensor([[1.0, 1, 1, -1, -1, -1]]).double()
    old.requires_grad_(), advantage.requires_grad_()
    batch = Data({"log_prob": old.detach(), "valid": torch.ones(1, 6, dtype=torch.float64)})
    loss = lambda x: losses.clip(0.2, 0.28, 10.0)(  # noqa: E731
        ratios.token({"log_prob": x}, batch), advantage.detach(), {}, batch
    )
    assert torch.autograd.gradcheck(loss, log_prob)
    (found,) = torch.autograd.grad(loss(log_prob).sum(), log_prob)
    assert (found != 0).tolist() == [[True, False, True, True, False, False]]
