"""What every configuration keeps: wrong types and numbers that are none are refused, every flag says what it does."""

from __future__ import annotations

import math
import types
from collections.abc import Collection
from dataclasses import fields
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from ccrl.experiment.config import field_docs
from ccrl.settings import ConfigError, Range, hints_of

__all__ = ["settings_faults"]


def settings_faults(config: Any, texts: Collection[str] = ()) -> list[str]:
    """What is wrong with the class of ``config``, as sentences; a test asserts that there are none.

    Args:
        config: a valid object; each field in turn is set to what it must refuse.
        texts: fields that may hold any text: names of files, models, tasks. Others of type ``str`` are choices.
    """
    cls: Any = type(config)
    hints, docs = hints_of(cls), field_docs(cls)
    faults: list[str] = []
    for field in fields(config):
        doc = docs.get(field.name, "")
        if not (doc.endswith(".") and len(doc.split()) > 2):
            faults.append(f"{field.name}: expected a sentence under it, got {doc!r}")
        for hint in _parts(hints[field.name]):
            for value in _wrong(hint):
                try:
                    cls(**{f.name: getattr(config, f.name) for f in fields(config)} | {field.name: value})
                except ConfigError:
                    continue
                faults.append(f"{field.name}: expected {value!r} to be refused")
            if hint is str and field.name not in texts:
                faults.append(f"{field.name}: expected a Literal, got a str, which takes any text")
            if hint in (int, float):
                faults.append(f"{field.name}: expected a range, got a bare {hint.__name__}")
    return faults


def _parts(hint: Any) -> list[Any]:
    if get_origin(hint) in (Union, types.UnionType):
        return [part for option in get_args(hint) for part in _parts(option)]
    return [hint]


def _wrong(hint: Any) -> list[Any]:
    if get_origin(hint) is Annotated:
        kind, ranges = get_args(hint)[0], [each for each in get_args(hint)[1:] if isinstance(each, Range)]
        if not ranges:
            return []
        (allowed,) = ranges
        values = [math.nan, math.inf, -math.inf, "1", True] if kind is float else [1.5, "1", True]
        edges = [allowed.low - 1.0, allowed.high + 1.0] if kind is float else [allowed.low - 1, allowed.high + 1]
        values += [int(x) if kind is int else x for x in edges if math.isfinite(x)]
        return [value for value in values if not (isinstance(value, float) and value in allowed.also)]
    if hint is bool:
        return ["no", 1, None]
    if get_origin(hint) is Literal:
        return ["no such choice", True] if True not in get_args(hint) else ["no such choice"]
    return []
