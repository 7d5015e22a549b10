"""The token bandits: rewards and success rates worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from envs.text import make_task
from envs.text.bandits import TokenBandit


def everything(task: TokenBandit) -> Tensor:
    """``[questions, symbols^length]``: the reward of every completion to every question."""
    digits = [torch.arange(task.symbols)] * task.fixed_length
    tokens = torch.cartesian_prod(*digits).reshape(-1, task.fixed_length).t()
    prompts = task.prompts(task.questions, Generator().manual_seed(0), "test")
    order = prompts.index.argsort()
    full = torch.full((tokens.shape[1],), task.fixed_length)
    rows = [task.score(prompts, q.expand(tokens.shape[1]), tokens, full).components[:, 0] for q in order]
    return torch.stack(rows)


def test_modsum_by_hand() -> None:
    task = make_task("modsum")
    prompts = task.prompts(10, Generator().manual_seed(0), "test")
    assert sorted(prompts.index.tolist()) == list(range(10))
    four = prompts.index.tolist().index(4)
    tokens = torch.tensor([[9, 4, 0], [9, 0, 0], [9, 0, 0], [7, 0, 3]])  # sums 34, 4, 3
    score = task.score(prompts, torch.full((3,), four), tokens, torch.full((3,), 4))
    assert score.components.tolist() == [[1], [1], [0]]
    assert score.answer.tolist() == [7999, 4, 3000]
    short = task.score(prompts, torch.full((3,), four), tokens, torch.tensor([3, 4, 4]))
    assert short.components.tolist() == [[0], [1], [0]]
    assert short.answer.tolist()[0] == -1


def test_modsum_succeeds_once_in_ten() -> None:
    assert (everything(make_task("modsum", fixed_length=3)).mean(1) == 0.1).all()
    assert everything(make_task("modsum", questions=13, fixed_length=2)).shape == (13, 100)


def test_sum_rule_has_every_difficulty() -> None:
    """Sums of uniform tokens are uniform modulo ``symbols``: the rate is a multiple of 1/16, never 0 or 1."""
    rate = everything(make_task("sum_rule", fixed_length=2)).mean(1) * 16
    assert set(rate.tolist()) == set(range(1, 16))


def test_dead_prompts() -> None:
    task = make_task("dead_prompts", questions=20)
    reward = everything(task)
    assert task.dead.sum() == 8
    assert (reward[task.dead].sum(1) == 1).all()
    # Two tokens decide, with 4 to 11 right symbols each, and 16^2 ways to go on.
    right = reward[~task.dead].sum(1) / 256
    assert ((right >= 16) & (right <= 121)).all()
    shown = task.demonstrations @ torch.tensor([16**3, 16**2, 16, 1])
    assert (reward[torch.arange(20), shown] == 1).all()


def test_easy_hard() -> None:
    right = everything(make_task("easy_hard")).sum(1)
    assert right.tolist() == [10, 1] * 20


def test_sequence_match_is_graded() -> None:
    task = make_task("sequence_match", questions=3, fixed_length=3)
    values, counts = everything(task).flatten().unique(return_counts=True)
    # Per question: one has all three, 3 * 7 have two, 3 * 49 one, 343 none.
    torch.testing.assert_close(values, torch.tensor([0, 1 / 3, 2 / 3, 1]))
    assert counts.tolist() == [3 * 343, 3 * 147, 3 * 21, 3]


def test_arms() -> None:
    torch.testing.assert_close(everything(make_task("arms")), torch.tensor([[1, 0.3, -0.5]]))


@pytest.mark.parametrize(
    ("name", "rules"),
    [
        ("dead_prompts", ("allowed", "dead", "demonstrations")),
        ("sum_rule", ("allowed",)),
        ("easy_hard", ("allowed",)),
        ("sequence_match", ("targets",)),
    ],
)
def test_rules_come_from_the_seed_alone(name: str, rules: tuple[str, ...]) -> None:
    tasks = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(tasks))
        tasks.append(make_task(name, seed=seed))
    for rule in rules:
        one, same, other = (getattr(task, rule) for task in tasks)
        assert one.equal(same)
        assert not one.equal(other)


def test_test_questions_come_once_before_any_comes_again() -> None:
    index = make_task("modsum").prompts(25, Generator().manual_seed(0), "test").index
    assert sorted(index.bincount().tolist()) == [2] * 5 + [3] * 5


def test_no_symbol_ends_a_completion() -> None:
    vocab = make_task("modsum").vocab
    assert (vocab.eos, vocab.size) == (-1, 10)
    assert vocab.decode([3, 1, -1]) == "3 1"
    assert vocab.encode("3 1") == [3, 1]
    with pytest.raises(ValueError, match="expected symbols 0 to 9, got '3 10'"):
        vocab.encode("3 10")


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("modsum", {"questions": 0}, "questions: expected a whole number >= 1, got 0"),
        ("modsum", {"fixed_length": 30}, r"symbols\^fixed_length < 2\^62, got 10\^30"),
        ("dead_prompts", {"dead": 1.5}, r"dead: expected a share from 0 to 1, got 1\.5"),
        ("dead_prompts", {"largest": 17}, "1 <= smallest <= largest <= 16, got 4 and 17"),
        ("easy_hard", {"easy": 21}, "easy: expected a whole number <= 20, got 21"),
        ("arms", {"rewards": (2.0, 0.0)}, "finite numbers up to 1"),
        ("arms", {"rewards": (float("nan"), 0.0)}, "finite numbers up to 1"),
        ("arms", {"rewards": ("1", 0.0)}, "expected two or more finite numbers"),
        ("arms", {"rewards": (1.0,)}, "expected two or more finite numbers"),
        ("modsum", {"fixed_length": 2**63}, "fixed_length: expected a whole number <= 61"),
        ("modsum", {"questions": 2**63}, "questions: expected a whole number <= 2147483647"),
        ("modsum", {"questions": 2**31 - 1}, "expected a table of at most 16777216 logits"),
        ("modsum", {"symbols": 2.0}, "symbols: expected a whole number"),
        ("sum_rule", {"seed": 2**63}, "seed: expected a whole number <= 9223372036854775807"),
        ("dead_prompts", {"dead": "half"}, "dead: expected a share from 0 to 1, got 'half'"),
        ("dead_prompts", {"smallest": 4.5}, "smallest: expected a whole number"),
    ],
)
def test_bad_options(task: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_task(task, **options)
