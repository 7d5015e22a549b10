"""Every text task keeps the contract."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ccrl.llm.task import ConversationTask, TextTask
from ccrl.testing.text_contract import TextTaskContract
from envs.text import TASKS, make_task
from envs.text.generated import Verdict
from envs.text.sorting import Sorting

PROMPTS = Path(__file__).with_name("prompts.jsonl")


class TestArithmetic(TextTaskContract):
    def make_task(self) -> TextTask:
        return make_task("arithmetic", operands=3, operators="+-*")


class TestFormatAccuracy(TextTaskContract):
    def make_task(self) -> TextTask:
        return make_task("format_accuracy")


class TestSorting(TextTaskContract):
    def make_task(self) -> TextTask:
        return make_task("sorting")


class TestCountdown(TextTaskContract):
    def make_task(self) -> TextTask:
        return make_task("countdown", operators="+-*/", numbers=4)


class TestGuessing(TextTaskContract):
    disjoint = False
    prompt_tells = False

    def make_task(self) -> TextTask:
        return make_task("guessing")

    def test_it_replies(self) -> None:
        assert isinstance(self.make_task(), ConversationTask)


class TestCode(TextTaskContract):
    def make_task(self) -> TextTask:
        return make_task("code", cpu_seconds=0.2, degree=2)


class TestJsonLines(TextTaskContract):
    def make_task(self) -> TextTask:
        return make_task("jsonl", path=PROMPTS, max_new_tokens=8)


class TestTools(TextTaskContract):
    garbage_scores = None  # as for jsonl

    def make_task(self) -> TextTask:
        return make_task("tools", path=PROMPTS, max_new_tokens=8, call=("<", ">"), result=("", ";"))


class TestCalculator(TextTaskContract):
    def make_task(self) -> TextTask:
        return make_task("calculator", operands=2)


class TestCurriculum(TextTaskContract):
    prompt_tells = False  # a question of one level may be one of a higher level too

    def make_task(self) -> TextTask:
        levels = [{"digits": 1}, {"digits": 2}]
        return make_task("curriculum", task="arithmetic", levels=levels, start=1, earlier=0.5)


class BanditContract(TextTaskContract):
    disjoint = False
    task = ""

    def make_task(self) -> TextTask:
        return make_task(self.task)


class TestModSum(BanditContract):
    task = "modsum"


class TestSumRule(BanditContract):
    task = "sum_rule"


class TestDeadPrompts(BanditContract):
    task = "dead_prompts"


class TestEasyHard(BanditContract):
    task = "easy_hard"
    garbage_scores = None  # one token is a completion here


class TestSequenceMatch(BanditContract):
    task = "sequence_match"
    several = False


class TestArms(BanditContract):
    task = "arms"
    several = False
    garbage_scores = None


def test_every_task_is_tested_here() -> None:
    tested = [
        c().make_task() for c in list(globals().values()) if isinstance(c, type) and c.__name__.startswith("Test")
    ]
    assert sorted(task.name for task in tested) == sorted(TASKS)


# -- the contract itself: tasks with a fault are found ----------------------------------------------------------------


class TruthByPosition(Sorting):
    """Takes the question of completion ``n`` to be question ``n``."""

    def score(self, prompts, question, tokens, length):
        return super().score(prompts, torch.arange(len(question)) % len(prompts), tokens, length)


class ReadsBeyondTheEnd(Sorting):
    def score(self, prompts, question, tokens, length):
        return super().score(prompts, question, tokens, torch.full_like(length, len(tokens)))


class Overwrites(Sorting):
    """Blanks what follows a completion, in the rollout itself."""

    def score(self, prompts, question, tokens, length):
        tokens[torch.arange(len(tokens))[:, None] >= length] = self.vocab.pad
        return super().score(prompts, question, tokens, length)


class Remembers(Sorting):
    """Pays for what it has not seen before."""

    def __init__(self):
        self.seen = set()
        super().__init__()

    def judge(self, truth, text):
        fresh = text not in self.seen
        self.seen.add(text)
        return super().judge(truth, text) if fresh else Verdict((0.0,), -1)


class SqueezesOne(Sorting):
    def score(self, prompts, question, tokens, length):
        score = super().score(prompts, question, tokens, length)
        return score._replace(answer=score.answer.squeeze())


class IgnoresTheGenerator(Sorting):
    def draw(self, n, generator):
        return super().draw(n, None)


class TrainsOnTheTest(Sorting):
    def prompts(self, n, generator, split="train"):
        return super().prompts(n, generator, "train")


class PadsRight(Sorting):
    """Prompts of different lengths end at different columns."""

    def prompts(self, n, generator, split="train"):
        prompts = super().prompts(n, generator, split)
        tokens, valid = (torch.cat((x, torch.zeros_like(x[:, :1])), 1) for x in (prompts.tokens, prompts.valid))
        return dataclasses.replace(prompts, tokens=tokens, valid=valid)


class ForgetsTheEnd(Sorting):
    """Demonstrations without the end token: their policy never stops."""

    def prompts(self, n, generator, split="train"):
        prompts = super().prompts(n, generator, split)
        mask = prompts.demonstration_valid * (prompts.demonstration != self.vocab.eos)
        return dataclasses.replace(prompts, demonstration_valid=mask)


@pytest.mark.parametrize(
    ("faulty", "test"),
    [
        (TruthByPosition, "test_completions_are_judged_apart"),
        (ReadsBeyondTheEnd, "test_only_the_length_counts"),
        (Overwrites, "test_scoring_writes_nothing"),
        (Remembers, "test_scoring_writes_nothing"),
        (SqueezesOne, "test_one_question_and_one_completion_keep_their_axis"),
        (IgnoresTheGenerator, "test_generator_decides_the_prompts"),
        (TrainsOnTheTest, "test_splits_are_disjoint"),
        (PadsRight, "test_prompts_are_left_padded"),
        (ForgetsTheEnd, "test_demonstrations_are_right"),
    ],
)
def test_the_contract_finds_faulty_tasks(faulty: type[Sorting], test: str) -> None:
    contract = TestSorting()
    getattr(contract, test)()
    contract.make_task = faulty  # type: ignore[method-assign]
    with pytest.raises(AssertionError):
        getattr(contract, test)()


def test_an_unknown_task_and_an_unknown_option() -> None:
    with pytest.raises(ValueError, match=r"no text task 'aritmetic'; did you mean arithmetic\? expected one of"):
        make_task("aritmetic")
    with pytest.raises(TypeError, match=r"no option 'operand'; did you mean operands\? expected some of operands, dig"):
        make_task("arithmetic", operand=3)


def test_nothing_is_imported_before_it_is_needed() -> None:
    code = (
        "import sys, envs; assert 'envs.text' not in sys.modules; import envs.text as t; t.make_task('sorting');"
        "assert 'envs.text.arithmetic' not in sys.modules and 'transformers' not in sys.modules; print('fine')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "fine\n", done.stderr
