"""What a training waits for beside its iterations' own phases: a compilation, an evaluation, a checkpoint.

Whoever makes it wait says so, and whoever shows it listens:

    with waiting("evaluation"):
        ...
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

__all__ = ["Listener", "listening", "waiting"]


class Listener(Protocol):
    """Hears of waits."""

    def begins(self, what: str) -> None: ...

    def ends(self, what: str, seconds: float) -> None: ...


_listeners: list[Listener] = []


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """``listener`` hears of the waits inside."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Training waits for ``what`` while this runs. Inside another wait it is part of that one."""
    global _inside
    if _inside or not _listeners:
        yield
        return
    start, _inside = time.perf_counter(), True
    for listener in _listeners:
        listener.begins(what)
    try:
        yield
    finally:
        _inside = False
        for listener in _listeners:
            listener.ends(what, time.perf_counter() - start)


_inside = False
