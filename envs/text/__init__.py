"""Text tasks with verifiable answers, and the one door to them: :func:`make_task`.

Nothing here is imported before a task is built, and no task needs more than torch and Python.
"""

from __future__ import annotations

from typing import Any

from ccrl.llm.task import TextTask
from envs.door import make_from

__all__ = ["TASKS", "make_task"]

TASKS = {
    "arithmetic": ("envs.text.arithmetic", "Arithmetic"),
    "format_accuracy": ("envs.text.format_accuracy", "FormatAccuracy"),
    "countdown": ("envs.text.countdown", "Countdown"),
    "sorting": ("envs.text.sorting", "Sorting"),
    "calculator": ("envs.text.tools", "Calculator"),
    "guessing": ("envs.text.guessing", "Guessing"),
    "code": ("envs.text.code", "Code"),
    "curriculum": ("envs.text.curriculum", "Curriculum"),
    "jsonl": ("envs.text.jsonl", "JsonLines"),
    "tools": ("envs.text.tools", "ToolLines"),
    "modsum": ("envs.text.bandits", "ModSum"),
    "sum_rule": ("envs.text.bandits", "SumRule"),
    "dead_prompts": ("envs.text.bandits", "DeadPrompts"),
    "easy_hard": ("envs.text.bandits", "EasyHard"),
    "sequence_match": ("envs.text.bandits", "SequenceMatch"),
    "arms": ("envs.text.bandits", "Arms"),
}
"""Name -> module and class."""


def make_task(name: str, **options: Any) -> TextTask:
    """The text task ``name``.

    Args:
        name: one of :data:`TASKS`, or ``reasoning_gym:NAME`` for a data set of reasoning-gym.
        options: of the task, the arguments of its class.

    Raises:
        ValueError: there is no such task, or an option has a value the task cannot have.
        TypeError: the task has no such option.
    """
    family, _, data_set = name.partition(":")
    if family == "reasoning_gym":
        from envs.text.reasoning import ReasoningGym

        found: TextTask = ReasoningGym(data_set, **options)
        return found
    made: TextTask = make_from(TASKS, "text task", name, options)
    return made
