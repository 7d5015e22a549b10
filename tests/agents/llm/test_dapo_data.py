"""What DAPO samples and how it scores length: the overlong penalty, informative groups, dynamic sampling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from agents.llm.baselines import DAPO
from ccrl.data import Data
from ccrl.estimators.outcomes import OverlongPenalty, informative
from ccrl.testing.recipe_contract import RaggedTask


def test_overlong_penalty_in_both_conventions() -> None:
    length = torch.tensor([15, 16, 18, 20, 21])
    torch.testing.assert_close(OverlongPenalty(20, 5).penalty(length), torch.tensor([0, -0.2, -0.6, -1, -1]))
    unbounded = OverlongPenalty(20, 5, floor=False).penalty(length)
    torch.testing.assert_close(unbounded, torch.tensor([0, -0.2, -0.6, -1, -1.2]))
    with pytest.raises(ValueError, match="0 < buffer <= limit, got 30, 20"):
        OverlongPenalty(20, 30)


def test_informative_groups() -> None:
    outcome = torch.tensor([1, 1, 1, 1, 0, 1, 0, 0, 0, 0, 0, 0, 1, 1, 0, 1.0])
    data = Data({"episode_reward": outcome, "group": torch.arange(4).repeat_interleave(4)})
    assert informative(data).view(4, 4).any(1).tolist() == [False, True, False, True]


class Scripted(RaggedTask):
    """Rollout by rollout the first ``right`` groups are mixed, the others all wrong."""

    def __init__(self, right: list[int]) -> None:
        super().__init__(graded=False)
        self.right, self.asked = list(right), 0

    def score(self, prompts: Any, question: Tensor, tokens: Tensor, length: Tensor) -> Any:
        found = super().score(prompts, question, tokens, length)
        mixed = self.right[min(self.asked, len(self.right) - 1)]
        self.asked += 1
        outcome = ((torch.arange(len(question)) % 4 == 0) & (question < mixed)).float()
        return found._replace(components=torch.stack([outcome, torch.zeros_like(outcome)], 1))


@pytest.mark.parametrize(
    ("right", "rollouts", "groups"), [([4], 1, 4), ([3, 0, 2], 3, 4), ([1], 4, 4), ([0, 1, 0], 4, 1)]
)
def test_dynamic_sampling(right: list[int], rollouts: int, groups: int) -> None:
    task = Scripted(right)
    agent = DAPO(task, DAPO.Settings(model="tabular", n_prompts=4, group_size=4), seed=0)
    have: dict[str, Data] = {}
    while requests := agent.estimator.plan({}, have, agent.ctx):
        for request in requests:
            have[request.tag] = agent.collector.collect(request, agent.policy)
    data = agent.estimator.prepare(have, agent.ctx)
    assert len(have) == rollouts
    assert torch.unique(data["on"]["group"]).numel() == groups
    assert informative(data["on"]).all()
    assert data["sampled"] is have["on"]


def test_without_informative_groups_nothing_moves() -> None:
    agent = DAPO(Scripted([0]), DAPO.Settings(model="tabular", n_prompts=4, group_size=4), seed=0)
    before = agent.policy.logits.detach().clone()
    agent.learn(until=1)
    assert agent.num_timesteps == 4 * 16
    assert agent.n_updates == 0
    assert torch.equal(agent.policy.logits, before)
