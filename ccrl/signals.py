"""Ctrl-C and SIGTERM where they may act, and not in the middle of something."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

__all__ = ["DeferredSignals", "shielded"]


class DeferredSignals:
    """While it is active, the first of these signals only sets ``received``; the second acts at once.

    A loop looks at ``received`` between two iterations: there its state is whole and can be saved. A context manager;
    outside the main thread, where Python takes no handlers, it does nothing.

    Args:
        numbers: SIGINT and SIGTERM unless given.
    """

    def __init__(self, *numbers: signal.Signals) -> None:
        self.numbers = numbers or (signal.SIGINT, signal.SIGTERM)
        self.received: str | None = None
        """Name of the signal that came."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> DeferredSignals:
        if threading.current_thread() is threading.main_thread():
            for number in self.numbers:
                # a job in the background ignores SIGINT, so that Ctrl-C at its terminal does not reach it
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was not Python's

    def _note(self, number: int, frame: Any) -> None:
        self.received = signal.Signals(number).name
        handler = self._before.pop(number)
        self.__exit__()
        # the second acts at once, also inside another loop that defers
        while isinstance(outer := getattr(handler, "__self__", None), DeferredSignals):
            handler = outer._before.get(number, signal.SIG_DFL)
        signal.signal(number, handler or signal.SIG_DFL)
        # not print: the signal may have come in the middle of one, which refuses a second
        os.write(2, f"\n[ccrl] {self.received}: ends after this iteration; once more ends it at once\n".encode())


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """Processes that are started inside do not see SIGINT: a terminal sends Ctrl-C to all of them, and with its workers
    dead the iteration that a program means to finish could not end. They end with the program that started them."""
    if os.name != "posix" or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # children inherit the mask
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
