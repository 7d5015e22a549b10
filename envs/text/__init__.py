"""Text tasks with verifiable answers, and the one door to them: :func:`make_task`.

Nothing here is imported before a task is built, and no task needs more than torch and Python.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from typing import Any

from ccrl.llm.task import TextTask

__all__ = ["TASKS", "make_task"]

TASKS = {
    "arithmetic": ("envs.text.arithmetic", "Arithmetic"),
    "format_accuracy": ("envs.text.format_accuracy", "FormatAccuracy"),
    "countdown": ("envs.text.countdown", "Countdown"),
    "sorting": ("envs.text.sorting", "Sorting"),
    "guessing": ("envs.text.guessing", "Guessing"),
    "code": ("envs.text.code", "Code"),
    "jsonl": ("envs.text.jsonl", "JsonLines"),
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
        name: one of :data:`TASKS`.
        options: of the task, the arguments of its class.

    Raises:
        ValueError: there is no such task, or an option has a value the task cannot have.
        TypeError: the task has no such option.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=3)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise ValueError(f"no text task {name!r}; {hint}expected one of {', '.join(TASKS)}")
    module, attribute = TASKS[name]
    task = getattr(importlib.import_module(module), attribute)
    accepted = list(inspect.signature(task).parameters)
    for option in options:
        if option not in accepted:
            near = difflib.get_close_matches(option, accepted, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise TypeError(f"{name} has no option {option!r}; {hint}expected some of {', '.join(accepted)}")
    made: TextTask = task(**options)
    return made
