"""Completions that the cap cuts inside a reply: the reward is on a last token that is present and not valid."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from agents.llm.oblr_po import OBLRPOConfig, ScoreBaseline
from ccrl.data import Data
from ccrl.estimators.outcomes import OverlongPenalty


@pytest.fixture
def cut() -> Data:
    """Column 0 is cut behind two tokens and one of a reply, and is right; column 1 has three tokens of its own."""
    columns = {
        "valid": torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 1.0]]), "present": torch.ones(3, 2),
        "reward": torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]]),
        "carry": torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]), "log_prob": torch.zeros(3, 2),
        "episode_reward": torch.tensor([1.0, 0.0]), "group": torch.zeros(2, dtype=torch.int64),
        "length": torch.tensor([3, 3]),
    }  # fmt: skip
    return Data(columns, sequence=frozenset({"episode_reward", "group", "length"}))


def test_the_reward_reaches_the_tokens_before_the_reply(cut: Data) -> None:
    config = OBLRPOConfig(granularity="token", baseline_weight="length", baseline="self", snr_pieces=0)
    found = ScoreBaseline(config, nn.Identity())(cut)["advantage"]
    # rewards to go 1 and 0 with equal weights: the baseline is 1/2, and 0 where column 1 is alone
    assert found.tolist() == [[0.5, -0.5], [0.5, -0.5], [0.0, 0.0]]


def test_the_length_penalty_is_of_the_whole_completion(cut: Data) -> None:
    found = OverlongPenalty(limit=3, buffer=2)(cut)["shaped_episode_reward"]
    assert found.tolist() == [0.0, -1.0]  # 1 - 1 and 0 - 1: both have as many tokens as there may be
