"""Scalars to TensorBoard, ``progress.csv`` and the screen, by their tags and against the agent's clock.

Tags are the caller's, unchanged; the suite uses those of Stable-Baselines3 (``rollout/ep_rew_mean``,
``train/approx_kl``, ``time/fps``, ...), so that curves of both lie in one plot.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ccrl.experiment.csv_table import CsvTable
from ccrl.experiment.files import Owner, writing

__all__ = ["Logger", "digits", "read_scalars", "table"]

Scalar = float | int | bool | Tensor


def read_scalars(values: Mapping[str, Scalar]) -> dict[str, float]:
    """Plain floats. The 0-d tensors of one device are read in one transfer, so a GPU is waited for once.

    Raises ``TypeError`` or ``ValueError`` naming the tag for anything that is not a scalar.
    """
    out: dict[str, float] = {}
    waiting: dict[torch.device, list[str]] = {}
    for tag, value in values.items():
        if isinstance(value, Tensor):
            if value.ndim:
                raise ValueError(f"{tag}: expected a 0-d tensor; received shape {tuple(value.shape)}. Reduce it first.")
            waiting.setdefault(value.device, []).append(tag)
            out[tag] = 0.0  # keeps the caller's order
        else:
            try:
                out[tag] = float(value)
            except (TypeError, ValueError):
                raise TypeError(
                    f"{tag}: expected a number or a 0-d tensor; received {value!r} ({type(value).__name__})."
                ) from None
    for tags in waiting.values():
        stacked = torch.stack([torch.as_tensor(values[tag]).detach().double() for tag in tags])
        out.update(zip(tags, stacked.tolist(), strict=True))
    return out


class Logger:
    """Writes each ``log`` call at once: a killed process loses at most the row it was writing.

    Args:
        folder: run folder; made if missing.
        tensorboard, csv, stdout: where to write.
        also: called with every row, ``also(step, scalars)``: a tracking service.
        resume_step: the step that a resumed run continues from. Rows past it (logged after the checkpoint, before
            the crash) leave ``progress.csv`` and are hidden in TensorBoard. None: a new run, in a folder without rows.

    Raises:
        FileExistsError: ``progress.csv`` has rows and ``resume_step`` is None.
        FolderInUseError: another process writes into the folder.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        tensorboard: bool = True,
        csv: bool = True,
        stdout: bool = False,
        resume_step: int | None = None,
        also: Callable[[int, Mapping[str, float]], None] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.also = also
        self.stdout = stdout
        self._events: Any = None
        self._owner = Owner(folder) if csv or tensorboard else None
        try:
            self._csv = CsvTable(self.folder / "progress.csv", resume_step) if csv else None
            if tensorboard:
                with writing(self.folder):
                    self._open_events(resume_step)
        except BaseException:
            self._release()
            raise

    def log(self, step: int, values: Mapping[str, Scalar]) -> dict[str, float]:
        """Write one row at ``step`` on the x axis; returns the values as floats."""
        scalars = read_scalars(values)
        if self._csv is not None:
            self._csv.write(step, scalars)
        if self._events is not None:
            from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

            one = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
            with writing(self.folder / "events.out.tfevents"):
                self._events.add_summary(Summary(value=one), step)
                self._events.flush()
        if self.also is not None:
            self.also(step, scalars)
        if self.stdout:
            print(table(step, scalars), flush=True)
        return scalars

    def log_text(self, step: int, tag: str, text: str) -> None:
        """Write a text (Markdown) to TensorBoard's TEXT tab."""
        if self._events is None:
            return
        from torch.utils.tensorboard.summary import text as text_summary

        with writing(self.folder / "events.out.tfevents"):
            self._events.add_summary(text_summary(tag, text), step)  # type: ignore[no-untyped-call]
            self._events.flush()

    def log_hparams(self, hparams: Mapping[str, Any], metrics: tuple[str, ...] = ("rollout/ep_rew_mean",)) -> None:
        """Fill TensorBoard's HPARAMS tab: flat ``hparams`` (``a.b`` for nested ones; other than numbers, bools and
        strings as text) beside the tags in ``metrics``, which ``log`` writes."""
        if self._events is None:
            return
        from torch.utils.tensorboard.summary import hparams as hparams_summaries

        plain = {
            key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in hparams.items()
        }
        for summary in hparams_summaries(plain, dict.fromkeys(metrics, 0.0)):  # type: ignore[no-untyped-call]
            self._events.add_summary(summary)
        self._events.flush()

    def close(self) -> None:
        """Close all files; further ``log`` calls fail."""
        if self._csv is not None:
            self._csv.close()
        if self._events is not None:
            with contextlib.suppress(OSError):  # what could not be written was said by log()
                self._events.close()
        self._release()

    def _release(self) -> None:
        if self._owner is not None:
            self._owner.release()

    def _open_events(self, resume_step: int | None) -> None:
        # Imported here: TensorBoard takes about a second, and runs without it need not wait.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
        from torch.utils.tensorboard.writer import FileWriter

        self._events = FileWriter(str(self.folder))
        if resume_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._events.add_event(Event(session_log=start), resume_step + 1)


def digits(value: float) -> str:
    """``value`` for a screen, with three significant digits: 0.012345 is 0.0123, 12345.6 is 12,300. Counts are
    exact."""
    if float(value).is_integer() and abs(value) < 1e12:
        return f"{value + 0.0:,.0f}"  # -0 is 0
    if not math.isfinite(value) or not 1e-4 <= abs(value) < 1e9:
        return f"{value:.3g}"
    places = 2 - math.floor(math.log10(abs(float(f"{value:.3g}"))))
    rounded = round(value, places)
    return f"{rounded:,.{max(0, places)}f}"


def table(step: int, scalars: Mapping[str, float]) -> str:
    """Scalars in aligned lines, grouped by what is before the first slash of the tag."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for tag, value in scalars.items():
        group, _, name = tag.partition("/") if "/" in tag else ("", "", tag)
        groups.setdefault(group, []).append((name, digits(value)))
    width = max((len(name) for rows in groups.values() for name, _ in rows), default=0)
    lines = [f"step {step:,}"]
    for group, rows in groups.items():
        lines += [group] if group else []
        lines += [f"  {name:<{width}}  {value:>12}" for name, value in rows]
    return "\n".join(lines)
