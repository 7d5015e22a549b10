"""Studies as cells in one CSV file: run what the file lacks, add each cell whole, go on after a kill."""

from __future__ import annotations

import csv
import io
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from ccrl.experiment.csv_table import read_rows
from ccrl.experiment.files import alone_in, write_atomic
from ccrl.experiment.logger import digits

__all__ = ["Cell", "CellsFailed", "complete"]

Cell = Mapping[str, Any]
"""Settings of one run, by name: numbers, short texts, None."""

Play = Callable[[dict[str, Any]], Sequence[Mapping[str, Any]]]
"""Runs a cell; its results, one mapping per row. With several jobs it must be a function of a module."""


class CellsFailed(RuntimeError):
    """``count`` cells failed; all others are in the file, and the same call again runs the failed ones."""

    def __init__(self, message: str, count: int) -> None:
        super().__init__(message)
        self.count = count


def complete(
    path: Path,
    cells: Sequence[Cell],
    play: Play,
    *,
    jobs: int = 1,
    name: str = "study",
    names: Sequence[str] | None = None,
) -> list[dict[str, str]]:
    """All rows of ``cells``, in their order and as text: from ``path`` where it has them, else from new runs, which are
    added to it.

    A row is the cell's settings, ``seconds`` and ``cpu_seconds`` (wall time and processor time of the whole cell,
    unless the results have their own) and the results; None is an empty text. A cell is in the file with all its rows
    or not at all, so a killed study goes on with the cells it was at. A cell that fails does not stop the others.
    Several processes may add to one file: of a cell that two of them ran the first one's rows are kept.

    :param names: settings that tell cells apart, of which the file must then have none with different other settings;
        None: all settings, so that other settings are other cells.
    :raises ValueError: if ``jobs < 1``, cells have different settings' names, the file's columns are others, or it has
        a cell with other settings.
    :raises CellsFailed: in the end, if cells failed.
    """
    if jobs < 1:
        raise ValueError(f"jobs: expected >= 1, got {jobs}")
    keys = list(cells[0]) if cells else []
    for cell in cells:
        if list(cell) != keys:
            raise ValueError(f"cells: expected the settings {keys} in every cell, got {list(cell)}")
    wanted = [{k: _text(v) for k, v in cell.items()} for cell in cells]
    rows = read_rows(path) if path.exists() else []
    if rows and not set(keys) <= set(rows[0]):
        raise ValueError(f"{path}: expected the columns {keys}, got {list(rows[0])}; choose another file")
    names = keys if names is None else names
    have = {_key(row, names): row for row in rows}
    for settings in wanted:
        _check_same(path, names, settings, have.get(_key(settings, names), settings))
    left = [dict(cell) for cell, settings in zip(cells, wanted) if _key(settings, names) not in have]
    print(f"[{name}] {path}: {len(cells)} cells, {len(cells) - len(left)} of them finished before", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = [k for k in keys if len({settings[k] for settings in wanted}) > 1] or keys
    failures = []
    running = _here(left, play) if jobs == 1 else _processes(left, play, jobs)
    for count, (cell, found, (seconds, cpu)) in enumerate(running, 1):
        head = f"[{name} {count}/{len(left)}] " + ", ".join(f"{k} {cell[k]}" for k in shown)
        if not found:  # it would be run again by every call
            found = f"expected at least one row of results, got {found!r}"
        if isinstance(found, str):
            failures.append(f"{head}: {found.splitlines()[-1]}")
            print(f"{head}: FAILED\n{found}", flush=True)
            continue
        row = {k: _text(v) for k, v in cell.items()} | {"seconds": f"{seconds:.1f}", "cpu_seconds": f"{cpu:.1f}"}
        rows = _add(path, [row | {k: _text(v) for k, v in point.items()} for point in found], names)
        last = ", ".join(
            f"{k} {digits(v)}" if isinstance(v, float) else f"{k} {v}"
            for k, v in found[-1].items()
            if not isinstance(v, str)
        )
        print(f"{head}: {last} ({seconds:.0f} s)", flush=True)
    if failures:
        raise CellsFailed(f"{path}: {len(failures)} cells failed\n" + "\n".join(failures), len(failures))
    order = {_key(settings, names): i for i, settings in enumerate(wanted)}
    mine = [row for row in rows if _key(row, names) in order]
    # a result must not depend on which run was ready first
    return sorted(mine, key=lambda row: order[_key(row, names)])


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _key(row: Mapping[str, str], names: Sequence[str]) -> tuple[str, ...]:
    return tuple(row[k] for k in names)


def _check_same(path: Path, names: Sequence[str], settings: Mapping[str, str], row: Mapping[str, str]) -> None:
    if other := [k for k in settings if settings[k] != row[k]]:
        there, here = (" ".join(f"{k}={x[k]}" for k in other) for x in (row, settings))
        cell = " ".join(_key(row, names))
        raise ValueError(f"{path}: {cell} was run with {there}, expected {here}; choose another file")


_Found = tuple[Sequence[Mapping[str, Any]] | str, tuple[float, float]]
"""Rows or the traceback, which as an exception would not outlive the way between processes; wall and CPU seconds."""


def _timed(play: Play, cell: dict[str, Any]) -> _Found:
    start, start_cpu = time.perf_counter(), time.process_time()
    found: Sequence[Mapping[str, Any]] | str
    try:
        found = play(cell)
    except Exception:
        found = traceback.format_exc()
    return found, (time.perf_counter() - start, time.process_time() - start_cpu)


def _here(left: list[dict[str, Any]], play: Play) -> Iterator[tuple[Cell, *_Found]]:
    for cell in left:
        yield cell, *_timed(play, cell)


def _processes(left: list[dict[str, Any]], play: Play, jobs: int) -> Iterator[tuple[Cell, *_Found]]:
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _begin) as pool:
        futures = {pool.submit(_timed, play, cell): cell for cell in left}
        try:
            for future in as_completed(futures):
                yield futures[future], *future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after Ctrl-C the rest must not start


def _begin() -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # a killed study must not leave processes behind
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(130)


def _add(path: Path, new: list[dict[str, str]], names: Sequence[str]) -> list[dict[str, str]]:
    """The rows of the file as it is now, with those of a cell at its end; they are written."""
    with alone_in(path.parent):
        rows = read_rows(path) if path.exists() else []
        if _key(new[0], names) not in {_key(row, names) for row in rows}:
            rows += new
            _write(path, rows)
    return rows


def _write(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, lambda file: file.write(text.getvalue().encode()))
