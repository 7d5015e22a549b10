"""Every text task keeps the contract."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ccrl.llm.task import ConversationTask, TextTask
from ccrl.testing.text_contract import TextTaskContract
from envs.text import TASKS, make_task

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
