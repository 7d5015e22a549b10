"""Studies as cells in one CSV file: run what the file lacks, add each cell whole, go on after a kill."""

from __future__ import annotations

import csv
import io
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from ccrl.experiment.checkpoint import write_atomic
from ccrl.experiment.csv_table import read_rows

__all__ = ["Cell", "complete"]

Cell = Mapping[str, Any]
"""Settings of one run, by name: numbers and short texts."""

Play = Callable[[dict[str, Any]], Sequence[Mapping[str, Any]]]
"""Runs a cell; its results, one mapping per row. With several jobs it must be a function of a module."""


def complete(
    path: Path, cells: Sequence[Cell], play: Play, *, jobs: int = 1, name: str = "study"
) -> list[dict[str, str]]:
    """All rows of ``cells``, as text: from ``path`` where it has them, else from new runs, which are added to it.

    A row is the cell's settings, its results and ``seconds`` (of the whole cell). A cell is in the file with all its
    rows or not at all, so a killed study goes on with the cell it was at. Cells are told apart by all their settings.

    :raises ValueError: if ``jobs < 1``, cells have different settings' names, or the file's columns are others.
    """
    if jobs < 1:
        raise ValueError(f"jobs: expected >= 1, got {jobs}")
    keys = list(cells[0]) if cells else []
    for cell in cells:
        if list(cell) != keys:
            raise ValueError(f"cells: expected the settings {keys} in every cell, got {list(cell)}")
    rows = read_rows(path) if path.exists() else []
    if rows and not set(keys) <= set(rows[0]):
        raise ValueError(f"{path}: expected the columns {keys}, got {list(rows[0])}; choose another file")
    have = {_key(row, keys) for row in rows}
    left = [dict(cell) for cell in cells if _key(cell, keys) not in have]
    print(f"[{name}] {path}: {len(cells)} cells, {len(cells) - len(left)} of them finished before", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    for count, (cell, found, seconds) in enumerate(_here(left, play) if jobs == 1 else _processes(left, play, jobs), 1):
        settings = {k: str(v) for k, v in cell.items()}
        rows += [settings | {k: str(v) for k, v in row.items()} | {"seconds": f"{seconds:.1f}"} for row in found]
        _write(path, rows)
        last = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in found[-1].items())
        words = " ".join(str(v) for v in cell.values())
        print(f"[{name} {count}/{len(left)}] {words}: {last} ({seconds:.0f} s)", flush=True)
    wanted = {_key(cell, keys) for cell in cells}
    return [row for row in rows if _key(row, keys) in wanted]


def _key(row: Mapping[str, Any], keys: Sequence[str]) -> tuple[str, ...]:
    return tuple(str(row[k]) for k in keys)


def _timed(play: Play, cell: dict[str, Any]) -> tuple[Sequence[Mapping[str, Any]], float]:
    start = time.perf_counter()
    return play(cell), time.perf_counter() - start


def _here(left: list[dict[str, Any]], play: Play) -> Iterator[tuple[Cell, Sequence[Mapping[str, Any]], float]]:
    for cell in left:
        yield cell, *_timed(play, cell)


def _processes(
    left: list[dict[str, Any]], play: Play, jobs: int
) -> Iterator[tuple[Cell, Sequence[Mapping[str, Any]], float]]:
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


def _write(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, lambda file: file.write(text.getvalue().encode()))
