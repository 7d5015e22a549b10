"""Arithmetic, format, sorting, countdown and guessing: scores worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Generator

from ccrl.llm.task import Prompts, TextTask, pad_right
from envs.text import make_task
from envs.text.countdown import Countdown, evaluate
from envs.text.guessing import Guessing


def score(task: TextTask, truths: Sequence[Any], texts: Sequence[str]) -> tuple[list[list[float]], list[int]]:
    """Components and answers of finished completions, one question each."""
    n = len(truths)
    rows = [[*task.vocab.encode(text), task.vocab.eos] for text in texts]
    prompts = Prompts(torch.zeros(n, 1, dtype=torch.int64), torch.ones(n, 1), torch.arange(n), tuple(truths))
    length = torch.tensor([len(row) for row in rows])
    result = task.score(prompts, torch.arange(n), pad_right(rows, task.vocab.pad).t(), length)
    return result.components.tolist(), result.answer.tolist()


def texts(task: TextTask, n: int, split: Any = "train") -> list[str]:
    return [task.vocab.decode(row) for row in task.prompts(n, Generator().manual_seed(0), split).tokens.tolist()]


def test_arithmetic_by_hand() -> None:
    task = make_task("arithmetic")
    components, answers = score(task, [19, 19, 19, 19, 0, 0], ["19", "019", "91", "1-9", "0", ""])
    assert components == [[1], [1], [0], [0], [1], [0]]
    assert answers == [19, 19, 91, -1, 0, -1]


def test_prompts_begin_and_demonstrations_end_with_their_token() -> None:
    task = make_task("arithmetic")
    prompts = task.prompts(20, Generator().manual_seed(0))
    for row, valid, shown in zip(prompts.tokens, prompts.valid, prompts.demonstration):
        tokens = row[valid > 0].tolist()
        assert tokens == [task.vocab.bos, *task.vocab.encode(task.vocab.decode(tokens))]
        assert shown.tolist().count(task.vocab.eos) == 1


def test_arithmetic_questions_are_right() -> None:
    """Python's own operators, ``%`` made to bind weakest, against the task's evaluation."""
    task = make_task("arithmetic", operands=4, operators="*-+", digits=3, modulus=1000)
    prompts = task.prompts(200, Generator().manual_seed(0))
    for row, truth in zip(prompts.tokens.tolist(), prompts.truth):
        expression, _, modulus = task.vocab.decode(row).removesuffix("=").partition("%")
        assert eval(expression) % int(modulus) == truth


def test_an_unfinished_completion_is_wrong() -> None:
    task = make_task("arithmetic")
    prompts = task.prompts(1, Generator().manual_seed(0))
    tokens = prompts.demonstration.t()
    whole, cut = (task.score(prompts, torch.tensor([0]), tokens, torch.tensor([n])) for n in (len(tokens), 1))
    assert (whole.components.item(), cut.components.item(), cut.answer.item()) == (1.0, 0.0, -1)


def test_the_test_share_is_a_tenth() -> None:
    """Of the 100 questions of one digit each, the hash takes some in 3 to 17 (a tenth within 2.3 deviations)."""
    task = make_task("arithmetic", digits=1)
    train, test = set(texts(task, 3000)), set(texts(task, 1000, "test"))
    assert len(train) + len(test) == 100
    assert 3 <= len(test) <= 17


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("arithmetic", {"operands": 0}, r"operands: expected a whole number >= 1, got 0"),
        ("arithmetic", {"operators": "+/"}, r"operators: expected some of '\+-\*'"),
        ("arithmetic", {"modulus": 10**6}, r"max_new_tokens: expected a whole number >= 7, got 6"),
        ("arithmetic", {"operands": 12}, r"fewer than 2\^62 questions"),
        ("arithmetic", {"operands": 1, "digits": 1, "modulus": 2}, "no question in the split 'test'"),
        ("sorting", {"digits": 19}, "digits: expected a whole number <= 18, got 19"),
        ("countdown", {"numbers": 1}, "numbers: expected a whole number >= 2, got 1"),
        ("countdown", {"operators": "%"}, r"operators: expected some of '\+-\*/'"),
        ("guessing", {"turns": 2.5}, r"turns: expected a whole number >= 1, got 2\.5"),
        ("code", {"degree": 5}, "degree: expected a whole number <= 4"),
        (
            "code",
            {"cpu_seconds": 2.0, "wall_seconds": 1.0},
            "wall_seconds: expected at least cpu_seconds = 2.0, got 1.0",
        ),
    ],
)
def test_bad_options(task: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_task(task, **options)


def test_an_unknown_split() -> None:
    for task in (make_task("sorting"), make_task("modsum")):
        with pytest.raises(ValueError, match="expected the split 'train' or 'test', got 'dev'"):
            task.prompts(1, None, "dev")


def test_unknown_characters_are_named() -> None:
    with pytest.raises(ValueError, match="'1a2b' with the unknown 'ab'"):
        make_task("sorting").vocab.encode("1a2b")


def test_format_and_accuracy_are_had_apart() -> None:
    task = make_task("format_accuracy")
    assert task.components == ("accuracy", "format")
    components, answers = score(task, [19] * 7, ["#19#", "19", "#18#", "##", "#", "1#9#", "#1#9#"])
    assert components == [[1, 1], [1, 0], [0, 1], [0, 0], [0, 0], [1, 0], [1, 0]]
    assert answers == [19, 19, 18, -1, -1, 19, 19]


def test_sorting_by_hand() -> None:
    task = make_task("sorting")
    components, answers = score(task, ["02579"] * 4, ["02579", "2579", "52907", "02579"])
    assert components == [[1], [0], [0], [1]]
    assert answers[0] == answers[3] != answers[2]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3*4+7", 19),
        ("3+4*7", 31),
        ("(3+4)*7", 49),
        ("10-3-4", 3),
        ("10-(3-4)", 11),
        ("8/4/2", 1),
        ("1/3*3", 1),
        ("7/2", Fraction(7, 2)),
        ("((5))", 5),
    ],
)
def test_expressions(text: str, value: Any) -> None:
    assert evaluate(text)[0] == value


@pytest.mark.parametrize(
    "text", ["", "3+", "+3", "3 4", "(3", "3)", "3**4", "()", "4/0", "4/(2-2)", "-3", "3,4", "1" * 19, "(" * 9999, "²"]
)
def test_what_is_no_expression(text: str) -> None:
    with pytest.raises(ValueError):
        evaluate(text)


def test_countdown_by_hand() -> None:
    """Wrong: another value, a number twice, a number left out, an operator that is not allowed, no expression."""
    truth = (19, (3, 4, 7))
    right, wrong = ["3*4+7", "7+4*3", "(4*3)+7"], ["3+4+7", "7+4*3+3-3", "19", "3*4+7/1", "3*4+", "=", "34-7"]
    components, answers = score(Countdown(), [truth] * 10, right + wrong)
    assert components == [[1]] * 3 + [[0]] * 7
    assert answers[7:9] == [-1, -1]
    assert score(Countdown(), [(2, (4, 8))], ["8/4"])[0] == [[0]]
    assert score(Countdown(operators="+-*/"), [(2, (4, 8))], ["8/4"])[0] == [[1]]


def test_countdown_demonstrations_bracket_what_needs_it() -> None:
    """Of 300 demonstrations all are right and fit; the contract test sees a dozen."""
    task = make_task("countdown", numbers=4, operators="+-*/", target=30)
    prompts = task.prompts(300, Generator().manual_seed(0))
    length = prompts.demonstration_valid.sum(1).long()
    assert task.score(prompts, torch.arange(300), prompts.demonstration.t(), length).components.mean() == 1
    assert length.max() <= task.max_new_tokens
    targets = [truth[0] for truth in prompts.truth]
    assert (min(targets), max(targets)) == (0, 30)
    assert any("(" in task.vocab.decode(row) for row in prompts.demonstration.tolist())


def test_guessing_replies() -> None:
    task = Guessing(numbers=20, turns=3)

    def reply(text: str) -> str | None:
        tokens = task.respond(11, task.vocab.encode(text))
        return None if tokens is None else task.vocab.decode(tokens)

    assert reply("9;") == ">"
    assert reply("9;>14;") == "<"
    assert reply("11;") is None  # found
    assert reply("9;>14;<12;") is None  # the last guess
    assert reply(";") is None
    assert reply("9<;") is None


def test_guessing_by_hand() -> None:
    task = Guessing(numbers=20, turns=3)
    guesses = ["11;", "9;>14;<11;", "9;>14;<12;", "9;>11", "11;>12;", "x"[:0], "9;>14;<12;<11;", "011;"]
    components, answers = score(task, [11] * 8, guesses)
    assert components == [[1], [1], [0], [0], [0], [0], [0], [1]]
    assert answers == [11, 11, 12, 9, 12, -1, 12, 11]


def test_playing_by_halving_finds_every_number() -> None:
    """Guess and reply in turn, as an agent does: the transcript is the demonstration."""
    task = Guessing(numbers=20, turns=5)
    for question in task.draw(60, Generator().manual_seed(0)):
        low, high, transcript = 0, 19, []
        while True:
            guess = (low + high) // 2
            transcript += task.vocab.encode(f"{guess};")
            reply = task.respond(question.truth, transcript)
            if reply is None:
                break
            transcript += reply
            low, high = (guess + 1, high) if task.vocab.decode(reply) == ">" else (low, guess - 1)
        assert task.vocab.decode(transcript) == question.demonstration
        assert score(task, [question.truth], [task.vocab.decode(transcript)])[0] == [[1]]


def test_guessing_does_not_teach_the_replies() -> None:
    task = make_task("guessing")
    prompts = task.prompts(8, Generator().manual_seed(0))
    assert prompts.demonstration is not None
    assert prompts.demonstration_forced is not None
    for tokens, forced in zip(prompts.demonstration.tolist(), prompts.demonstration_forced.tolist()):
        text = task.vocab.decode([token for token, told in zip(tokens, forced) if not told])
        assert text == task.vocab.decode(tokens).replace("<", "").replace(">", "")
    assert int(prompts.demonstration_forced.sum()) > 0


def test_guessing_without_enough_turns_demonstrates_what_it_can() -> None:
    task = make_task("guessing", turns=1)
    prompts = task.prompts(400, Generator().manual_seed(0))
    shown = (prompts.demonstration_valid > 0).any(1)
    assert shown.tolist() == [truth == 9 for truth in prompts.truth]
