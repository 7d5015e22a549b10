"""The baselines' data and advantages in the cases where they could go wrong: groups of one, several groups, equal
scores, what lies after the end, DAPO without dynamic sampling, KL in the reward."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from agents.llm.agent import LLMMethod
from agents.llm.baselines import CISPO, DAPO, GRPO, GSPO, SAPO, DAPOConfig, DrGRPO
from agents.llm.reinforce import PPO, REINFORCE, RLOO
from ccrl.bank import Bank
from ccrl.collect import Request
from ccrl.data import Data
from ccrl.estimators.base import Context
from ccrl.estimators.recipe import Parts
from ccrl.estimators.terms import no_ratio
from ccrl.testing.recipe_contract import RaggedTask

F64 = torch.float64
LENGTH = torch.tensor([3, 1, 2, 4, 2])
"""Five completions of at most four tokens."""
VALID = (torch.arange(4)[:, None] < LENGTH).double()
LAST = (torch.arange(4)[:, None] == LENGTH - 1).double()


def rollout(score: Any, group: Any, **columns: Tensor) -> Data:
    score = torch.as_tensor(score, dtype=F64)
    steps = {"valid": VALID, "carry": VALID - LAST, "reward": LAST * score, "log_prob": torch.zeros_like(VALID)}
    sequence = {"episode_reward": score, "group": torch.as_tensor(group)}
    return Data(steps | columns | sequence, sequence=frozenset(sequence))


def advantages(agent: LLMMethod, data: Data, request: Request | None = None, **settings: Any) -> Tensor:
    """``[T, N]`` after an agent's stages."""
    request = request or Request(counts=torch.tensor([5]))
    parts = Parts(nn.Identity(), None, request, 4)  # type: ignore[arg-type]
    for stage in agent.Recipe(agent.Config(**settings), parts).stages():
        data = stage(data)
    return data["advantage"]


def close(found: Tensor, expected: Any) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=F64), rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("agent", [RLOO, PPO, GRPO, DrGRPO, DAPO, GSPO, CISPO, SAPO])
def test_a_group_of_one_has_no_advantage(agent: LLMMethod) -> None:
    settings = {PPO: {"whiten": False}, DAPO: {"overlong_share": 0.0}}.get(agent, {})
    found = advantages(agent, rollout([1, 0, 1, 1, 5], [0, 0, 0, 0, 9]), **settings)
    assert found[:, 4].eq(0.0).all()
    assert (found[0, :4] != 0.0).all()


def test_ppo_compares_inside_groups() -> None:
    found = advantages(PPO, rollout([1, 0, 5, 7, 9], [0, 0, 1, 1, 1]), whiten=False)
    close(found, torch.tensor([0.5, -0.5, -2.0, 0.0, 2.0], dtype=F64) * VALID)


def test_what_follows_an_episode_is_not_its_return() -> None:
    """Control columns go on with the next episode after the end of theirs."""
    reward = LAST * torch.tensor([1.0, 0, 5, 7, 9], dtype=F64) + 100.0 * (1.0 - VALID)
    data = rollout([1, 0, 5, 7, 9], [0, 0, 1, 1, 1], reward=reward)
    close(advantages(PPO, data, whiten=False)[0], [0.5, -0.5, -2.0, 0.0, 2.0])


@pytest.mark.parametrize("value", [0.23, 0.46, 0.81])
def test_equal_scores_have_no_advantage(value: float) -> None:
    """The rounded mean of five of these numbers differs from them, in single and in double precision."""
    for agent in (REINFORCE, RLOO, PPO, GRPO, DrGRPO):
        data = rollout([value] * 5, [0] * 5)
        data = Data({k: v.float() if v.is_floating_point() else v for k, v in data.items()}, sequence=data.sequence)  # type: ignore[union-attr]
        assert not advantages(agent, data).any(), agent


# -- DAPO -------------------------------------------------------------------------------------------------------------


def test_dapo_compares_scores_less_the_length_penalty() -> None:
    """Limit 4, buffer 2: a token over 2 costs one half."""
    shaped = torch.tensor([1.0 - 0.5, 0.0, 1.0, 1.0 - 1.0, 0.0], dtype=F64)
    expected = (shaped - shaped.mean()) / (shaped.std() + 1e-6)
    found = advantages(DAPO, rollout([1, 0, 1, 1, 0], [0] * 5), overlong_share=0.5)
    close(found, expected * VALID)


def test_dapo_says_that_its_length_penalty_falls_on_right_answers() -> None:
    """Limit 4, buffer 2, lengths 3 and 4 right, others shorter or wrong. Once is enough."""
    parts = Parts(nn.Identity(), None, Request(counts=torch.tensor([5])), 4)  # type: ignore[arg-type]
    recipe = DAPO.Recipe(DAPOConfig(max_tries=1, overlong_share=0.5), parts)
    context = Context(torch.Generator(), Bank(parts.policy), lambda *_: None)  # type: ignore[arg-type,return-value]

    def idle(recipe: Any, right: list[int]) -> bool:
        return bool(recipe.idle(recipe.prepare({"on": rollout(right, [0] * 5)}, context)["on"], context))

    with pytest.warns(UserWarning, match=r"falls on 100% of the best completions: .* 50% of the 4 tokens"):
        assert not idle(recipe, [1, 0, 0, 1, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not idle(recipe, [1, 0, 0, 1, 0])
        # a short right answer beside them: lengths can be learnt
        assert not idle(DAPO.Recipe(recipe.config, parts), [1, 0, 1, 0, 0])


def test_dapo_without_a_buffer_is_grpo() -> None:
    data = rollout([1, 0, 1, 1, 0], [0] * 5)
    close(advantages(DAPO, data, overlong_share=0.0), advantages(GRPO, data))


def test_long_episodes_of_control_tasks_are_not_punished() -> None:
    data, request = rollout([1, 0, 1, 1, 0], [0] * 5), Request(episodes=5, horizon=4)
    close(advantages(DAPO, data, request), advantages(GRPO, data))


def test_without_dynamic_sampling_all_groups_stay() -> None:
    parts = Parts(nn.Identity(), None, Request(counts=torch.tensor([3, 2])), 4)  # type: ignore[arg-type]
    recipe = DAPO.Recipe(DAPOConfig(max_tries=1, overlong_share=0.0), parts)
    data = rollout([1, 0, 1, 1, 1], [0, 0, 0, 1, 1])
    context = Context(torch.Generator(), Bank(parts.policy), lambda *_: None)  # type: ignore[arg-type,return-value]
    assert recipe.plan({}, {"on": data}, context) == []
    assert recipe.prepare({"on": data}, context)["on"]["group"].tolist() == [0, 0, 0, 1, 1]
    some = recipe.__class__(DAPOConfig(max_tries=2, overlong_share=0.0), parts)
    assert some.prepare({"on": data}, context)["on"]["group"].tolist() == [0, 0, 0]


@pytest.mark.parametrize(("tries", "updates"), [(2, 0), (1, 1)])
def test_length_alone_is_nothing_to_learn_from(tries: int, updates: int) -> None:
    """All wrong, at different lengths: with dynamic sampling the batch is empty; without, the penalty is a reward."""

    class Wrong(RaggedTask):
        def score(self, *args: Any) -> Any:
            found = super().score(*args)
            return found._replace(components=torch.zeros_like(found.components))

    config = DAPO.Settings(model="tabular", n_prompts=2, group_size=4, max_tries=tries, overlong_share=1.0)
    agent = DAPO(Wrong(), config, seed=0)
    agent.learn(until=1)
    assert agent.n_updates == updates


# -- KL and options ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("agent", [REINFORCE, RLOO, PPO])
def test_the_kl_is_in_the_reward_or_in_the_loss(agent: LLMMethod) -> None:
    """k1 in the reward already is the penalty: k3 in the loss would count it twice."""

    def names(of: LLMMethod) -> list[str]:
        parts = Parts(nn.Identity(), None, Request(counts=torch.tensor([5])), 4)  # type: ignore[arg-type]
        return [term.name for term in of.Recipe(of.Config(kl_coef=0.1, entropy_coef=0.1), parts).terms()]

    assert names(agent) == ["policy_gradient_loss", "entropy_loss"]
    assert names(GRPO) == ["policy_gradient_loss", "kl", "entropy_loss"]


def test_reinforce_with_kl_subtracts_the_mean_of_what_is_left() -> None:
    gap = torch.arange(20.0, dtype=F64).view(4, 5) / 10.0
    data = rollout([1, 0, 1, 1, 0], [0] * 5, log_prob=gap, ref_log_prob=torch.zeros_like(gap))
    left = data["episode_reward"] - 0.5 * (gap * VALID).sum(0)
    close(advantages(REINFORCE, data, kl_coef=0.5), (left - left.mean()) * VALID)
    close(advantages(REINFORCE, data, kl_coef=0.5, baseline="none"), left * VALID)


def test_the_entropy_bonus_lowers_the_loss_of_uncertain_policies() -> None:
    parts = Parts(nn.Identity(), None, Request(counts=torch.tensor([5])), 4)  # type: ignore[arg-type]
    term = GRPO.Recipe(GRPO.Config(entropy_coef=0.1), parts).terms()[-1]
    assert term.coef == 0.1
    entropy = torch.full_like(VALID, 2.0)
    batch = rollout([0] * 5, [0] * 5)
    assert term.ratio is None
    level = no_ratio(batch["valid"])
    close(term.loss(level, VALID, {"entropy": entropy}, batch), -entropy)


def test_every_recipe_makes_the_epochs_and_pieces_that_are_asked_for() -> None:
    parts = Parts(nn.Identity(), None, Request(counts=torch.tensor([5])), 4)  # type: ignore[arg-type]
    config = GRPO.Config(n_epochs=3, batch_size=4, microbatch=2)
    batching = GRPO.Recipe(config, parts).phases()[0].batching
    assert (batching.unit, batching.size, batching.epochs, batching.microbatch) == ("sequence", 4, 3, 2)
    batching = GRPO.Recipe(replace(config, batch_size=0, microbatch=0), parts).phases()[0].batching
    assert (batching.size, batching.microbatch) == ("full", None)
