"""Rollouts joined and evaluated."""

from __future__ import annotations

import pytest
import torch

from ccrl.collect import Request
from ccrl.data import Data
from ccrl.estimators.rollouts import concatenate, evaluate_columns
from ccrl.llm.sampler import TokenCollector
from ccrl.llm.tabular import TabularTokenPolicy
from ccrl.testing.recipe_contract import RaggedTask


def rollout(steps: int, width: int, group: list[int], prompt: int = 2) -> Data:
    n = len(group)
    columns = {
        "valid": torch.ones(steps, n), "log_prob": torch.randn(steps, n), "topk": torch.randn(steps, n, width),
    }  # fmt: skip
    sequence = {
        "group": torch.tensor(group), "prompt": torch.full((n, prompt), 7), "prompt_valid": torch.ones(n, prompt),
        "episode_reward": torch.arange(n) + 10.0 * steps,
    }  # fmt: skip
    return Data(columns | sequence, sequence=frozenset(sequence))


def test_concatenate_pads_steps_and_prompts() -> None:
    first, second = rollout(2, 3, [0, 0, 1]), rollout(4, 3, [0, 1], prompt=5)
    both = concatenate([first, second])
    assert both.shape == (4, 5)
    assert both["valid"].sum(0).tolist() == [2, 2, 2, 4, 4]
    assert both["topk"].shape == (4, 5, 3)
    assert both["group"].tolist() == [0, 0, 1, 2, 3]
    assert both["episode_reward"].tolist() == [20, 21, 22, 40, 41]
    assert both["prompt_valid"][0].tolist() == [0, 0, 0, 1, 1]
    assert both["prompt"][0].tolist() == [0, 0, 0, 7, 7]
    assert torch.equal(both["log_prob"][:2, :3], first["log_prob"])
    assert torch.equal(both["log_prob"][:, 3:], second["log_prob"])


def test_concatenate_keeps_groups_of_the_same_prompts() -> None:
    both = concatenate([rollout(2, 3, [0, 1]), rollout(2, 3, [0, 1])], same_prompts=True)
    assert both["group"].tolist() == [0, 1, 0, 1]


def test_concatenate_drops_what_not_all_have() -> None:
    more = rollout(2, 3, [0]).derive(entropy=torch.zeros(2, 1))
    assert "entropy" not in concatenate([more, rollout(2, 3, [0])])
    with pytest.raises(ValueError, match="expected at least one rollout, got none"):
        concatenate([])


def test_evaluate_columns_in_pieces() -> None:
    task = RaggedTask()
    policy = TabularTokenPolicy(3, 8, 5, init=torch.randn(3, 8, 5))
    collector = TokenCollector(task, seed=0)
    data = collector.collect(Request(counts=torch.tensor([3, 1, 3])), policy)
    whole = evaluate_columns(policy, data, frozenset({"log_prob", "entropy"}))
    pieces = evaluate_columns(policy, data, frozenset({"log_prob", "entropy"}), columns=2)
    for name, value in whole.items():
        assert torch.equal(pieces[name], value)
        assert not value.requires_grad
