"""A progress bar on terminals, above a table of where time goes; silent elsewhere, so that log files stay readable."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from ccrl.experiment.logger import digits

__all__ = ["ProgressBar", "shares"]

_REFRESH = 0.5
"""Seconds between two drawings of the table, where nothing begins or ends."""


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Shares of the whole, largest first; what took no time is left out. Empty where nothing did."""
    total = sum(seconds.values())
    found = {name: value / total for name, value in seconds.items() if value > 0.0}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


class ProgressBar:
    """Counts the agent's clock up to ``total``; shows steps per second, time left and the recent return, and below it
    the shares of every phase and what is waited for (a ``ccrl.waiting.Listener``).

    Args:
        total: steps at the end. initial: steps already done (a resumed run).
        enabled: False shows nothing, also on a terminal.
        seconds: of every phase so far, read whenever the table is drawn.
    """

    def __init__(
        self, total: int, initial: int = 0, enabled: bool = True, seconds: Mapping[str, float] | None = None
    ) -> None:
        # disable=None is tqdm's "only on a terminal".
        self._bar = tqdm(
            total=total, initial=initial, unit=" steps", unit_scale=True, disable=None if enabled else True
        )
        self._seconds, self._drawn, self._now = seconds, 0.0, ""
        self._table: list[Any] = []
        if not self._bar.disable and seconds is not None:
            self._table = [tqdm(bar_format="{desc}", position=i, leave=False) for i in (1, 2)]

    def update(self, step: int, ep_rew_mean: float | None = None) -> None:
        """Move to ``step``; ``ep_rew_mean`` is shown as ``return``."""
        if self._bar.disable:
            return
        if ep_rew_mean is not None:
            self._bar.set_postfix_str(f"return {digits(ep_rew_mean)}", refresh=False)
        self._bar.update(step - self._bar.n)
        self._draw()

    def begins(self, what: str) -> None:
        """Say what is waited for."""
        self._now = what
        self._draw(force=True)

    def ends(self, what: str, seconds: float) -> None:
        """It is over."""
        self._now = ""
        self._draw(force=True)

    def close(self) -> None:
        """Leave the bar as it is, without the table, and end the line."""
        for line in reversed(self._table):
            line.close()
        self._bar.close()

    def _draw(self, force: bool = False) -> None:
        if not self._table or not (force or time.monotonic() - self._drawn > _REFRESH):
            return
        self._drawn = time.monotonic()
        found = shares(self._seconds or {})
        columns = [("waiting for", (self._now or "nothing").ljust(11))]
        # in the order in which they came: columns that change places cannot be read
        columns += [(name, f"{100 * found[name]:.0f} %") for name in self._seconds or {} if name in found]
        widths = [max(len(name), len(value)) for name, value in columns]
        for line, row in zip(self._table, zip(*columns, strict=True), strict=True):
            cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
            line.set_description_str("  " + "  ".join(cells))
