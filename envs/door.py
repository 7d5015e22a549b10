"""The one door to tasks of a kind: by name, imported when one is built, options checked by name."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Mapping
from typing import Any

__all__ = ["Table", "make_from"]

Table = Mapping[str, tuple[str, str]]
"""Name -> module and class."""


def make_from(table: Table, kind: str, name: str, options: Mapping[str, Any]) -> Any:
    """The task ``name`` of ``table``; ``kind`` ("text task") is what messages call it.

    Raises:
        ValueError: there is no such task, or an option has a value the task cannot have.
        TypeError: the task has no such option.
    """
    if name not in table:
        near = difflib.get_close_matches(name, table, n=3)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise ValueError(f"no {kind} {name!r}; {hint}expected one of {', '.join(table)}")
    module, attribute = table[name]
    task = getattr(importlib.import_module(module), attribute)
    accepted = list(inspect.signature(task).parameters)
    for option in options:
        if option not in accepted:
            near = difflib.get_close_matches(option, accepted, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise TypeError(f"{name} has no option {option!r}; {hint}expected some of {', '.join(accepted) or 'none'}")
    return task(**options)
