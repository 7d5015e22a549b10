"""Levels that follow the share of right completions, and come back with a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator

from agents.llm.baselines import GRPO
from agents.llm.mmr1_vas import MMR1
from ccrl.llm.task import AdaptiveTask, ConversationTask, pad_right
from envs.text import make_task

DIGITS = [{"digits": 1}, {"digits": 2}, {"digits": 3}]


def curriculum(**options: Any) -> Any:
    return make_task("curriculum", **{"task": "arithmetic", "levels": DIGITS, "options": {"modulus": 1000}, **options})


def test_the_level_follows_the_share_of_right_completions() -> None:
    """A window of 4: 3 of 4 right raises at 0.75, 1 of 4 lowers at 0.25, 2 of 4 stays. Completions of other levels do
    not count."""
    task = curriculum(window=4, raise_at=0.75, lower_at=0.25, start=1)
    assert isinstance(task, AdaptiveTask)

    def rollout(level: int, right: list[float]) -> dict[str, float]:
        said: dict[str, float] = task.learned(torch.full((len(right),), 7 * 3 + level), torch.tensor(right))
        return said

    assert rollout(1, [1.0, 0.0, 0.5, 1.0]) == {"rollout/level": 1.0, "rollout/level_success": 0.5}
    assert task.level == 1
    assert rollout(0, [0.0] * 8) == {"rollout/level": 1.0}
    assert task.state_dict() == {"level": 1, "right": 0, "seen": 0}
    rollout(1, [1.0, 1.0])
    assert task.state_dict() == {"level": 1, "right": 2, "seen": 2}
    rollout(1, [1.0, 0.9])  # 3 of 4: what is nearly right is not right
    assert task.level == 2
    rollout(2, [1.0] * 4)  # there is no higher one
    assert task.level == 2
    for level in (2, 1, 0):
        rollout(level, [0.0, 0.0, 0.0, 1.0])
    assert task.level == 0


def test_questions_of_the_level_and_below() -> None:
    task = curriculum(start=2, earlier=0.5)
    levels = [level for level, _ in task.prompts(200, Generator().manual_seed(0)).truth]
    # half of them of the present level, the others evenly of the two below: 100, 50, 50, up to chance
    assert [abs(levels.count(k) - n) < 25 for k, n in ((0, 50), (1, 50), (2, 100))] == [True] * 3
    assert {level for level, _ in curriculum(start=2, earlier=0.0).prompts(20, None).truth} == {2}
    test = task.prompts(7, Generator().manual_seed(0), "test")
    assert [level for level, _ in test.truth] == [0, 1, 2, 0, 1, 2, 0]
    # each is judged by its own level
    shown = [row[valid > 0].tolist() for row, valid in zip(test.demonstration, test.demonstration_valid)]
    tokens = pad_right([*shown, shown[0][:1]], task.vocab.pad).t()
    length = torch.tensor([*map(len, shown), 1])
    assert task.score(test, torch.tensor([*range(7), 0]), tokens, length).components.flatten().tolist() == [1.0] * 7 + [
        0.0
    ]


def test_exact_resume_of_the_level(tmp_path: Path) -> None:
    """Nothing is right, so the level falls every second iteration: 2, 2, 1, 1, 0. A run that is loaded at 1 goes on as
    the one that was not stopped, parameters included."""
    options = {"start": 2, "window": 16, "earlier": 0.5, "lower_at": 0.4}
    settings = {"n_prompts": 2, "group_size": 4, "model_layers": 1, "model_width": 16, "model_heads": 2,
                "learning_rate": 1e-2, "kl_coef": 0.1}  # fmt: skip
    kwargs = {"task": "arithmetic", "levels": DIGITS, "options": {"modulus": 1000}, **options}
    agent = GRPO("curriculum", seed=3, env_kwargs=kwargs, **settings)
    agent.learn(until=32)
    level, seen = agent.task.level, agent.task.seen
    assert (level, seen) != (2, 0)
    agent.save(tmp_path / "saved.pt")
    agent.learn(until=64)
    again = GRPO.load(tmp_path / "saved.pt", restore_rng=True)
    assert (again.task.level, again.task.seen) == (level, seen)
    again.learn(until=64)
    assert again.task.state_dict() == agent.task.state_dict()
    assert again.task.level < level
    assert torch.equal(again.learner.last["action"], agent.learner.last["action"])
    assert all(torch.equal(a, b) for a, b in zip(again.policy.parameters(), agent.policy.parameters()))
    assert agent.scalars["rollout/level"] >= agent.task.level


def test_levels_that_reply() -> None:
    """The reply is that of the question's own level: one call is answered at the first, two at the second."""
    task = make_task("curriculum", task="calculator", levels=[{"calls": 1}, {"calls": 2}], start=1)
    assert isinstance(task, ConversationTask)
    tokens = task.vocab.encode("<1+1>2;<2+2>")
    assert [task.vocab.decode(task.respond((k, None), tokens) or []) for k in (0, 1)] == ["?;", "4;"]
    prompts = task.prompts(4, Generator().manual_seed(0))
    assert prompts.demonstration_forced is not None
    assert bool((prompts.demonstration_forced.sum(1) >= 2).all())


def test_numbers_of_questions_near_the_largest_integer() -> None:
    levels = [{"max_new_tokens": 20 + i} for i in range(12)]  # 10^18 questions each, times 12 levels
    task = curriculum(levels=levels, options={"operands": 1, "digits": 18, "modulus": 10**18}, start=11, earlier=0.0)
    index = task.prompts(20, Generator().manual_seed(0)).index
    assert (index % 12).tolist() == [11] * 20
    assert int(index.min()) >= 0


def test_a_batch_without_demonstrations() -> None:
    """One guess hits the one secret that halving begins with."""
    task = make_task("curriculum", task="guessing", levels=[{"turns": 1}, {"turns": 1, "numbers": 30}])
    for seed in range(4):
        assert task.prompts(1, Generator().manual_seed(seed)).demonstration_valid is not None


def test_evaluation_moves_nothing() -> None:
    agent = GRPO("curriculum", env_kwargs={"task": "arithmetic", "levels": DIGITS, "window": 1, "start": 1},
                 n_prompts=2, group_size=2, model_layers=1, model_width=16, model_heads=2)  # fmt: skip
    before = agent.task.state_dict()
    agent.evaluate(None, 8, seed=0)
    agent.pass_at([1], questions=4, samples=2)
    agent.complete(["1+1%1000="])
    assert agent.task.state_dict() == before


def test_what_cannot_be_a_curriculum() -> None:
    for options, message in (
        ({"levels": [{"digits": 1}]}, "at least two"),
        ({"levels": 3}, "only tasks of reasoning-gym"),
        ({"raise_at": 0.1}, "less than raise_at"),
        ({"start": 3}, "expected 0 to 2"),
        ({"task": "curriculum"}, "another one than curriculum"),
        ({"levels": [{"digits": 1}, {"digit": 2}]}, "no option 'digit'"),
        ({"task": "modsum", "levels": [{"questions": 5}, {"questions": 9}], "options": {}}, "questions are numbers"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            curriculum(**options)
    with pytest.raises(ValueError, match="expected questions that stay"):
        MMR1(curriculum(), model_layers=1, model_width=16, model_heads=2)
    assert not isinstance(curriculum(), ConversationTask)
