"""A CSV file that grows by rows and, now and then, by columns, and that a killed process leaves readable."""

from __future__ import annotations

import contextlib
import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ccrl.experiment.files import write_atomic, writing

__all__ = ["CsvTable", "read_columns", "read_rows"]

Cell = float | int | str
_LONGEST = 2**31 - 1


class CsvTable:
    """Rows keyed by ``step``, appended and flushed one at a time.

    A row with a new column rewrites the file (atomically) with the wider header; earlier rows are empty there. A file
    with rows is continued from ``resume_step``: rows past it are dropped, so that a curve does not run back on itself.

    Raises:
        FileExistsError: the file has rows and ``resume_step`` is None: two runs in one file are no curve.
        WriteError: the disk does not take a row.
    """

    def __init__(self, path: str | os.PathLike[str], resume_step: int | None = None) -> None:
        self.path = Path(path)
        self.columns: list[str] = ["step"]
        if self.path.exists():
            rows = read_rows(self.path)
            if rows and resume_step is None:
                raise FileExistsError(
                    f"{self.path}: expected no rows for a new run, got {len(rows)}, of another one up to step "
                    f"{rows[-1]['step']}; choose another folder, or continue that run (resume_step)"
                )
            kept = [row for i, row in enumerate(rows, 2) if resume_step is None or self._step(row, i) <= resume_step]
            self.columns = list(rows[0]) if rows else self.columns
            # Also without dropped rows: the last line may be half a line, and appending to it would spoil both.
            self._rewrite(kept)
        with writing(self.path):
            self._file = open(self.path, "a", newline="", encoding="utf-8")  # noqa: SIM115  (open for the run's life)

    def _step(self, row: Mapping[str, str], line: int) -> int:
        text = row.get("step")
        if text is None or not text.isdecimal():
            raise ValueError(f"{self.path}:{line}: expected a whole number in the column 'step', got {text!r}")
        return int(text)

    def write(self, step: int, row: Mapping[str, Cell]) -> None:
        """Append one row. Floats are written so that they read back exactly."""
        new = [name for name in row if name not in self.columns]
        with writing(self.path):
            if new or self._file.tell() == 0:
                self.columns += new
                self._file.close()
                self._rewrite(read_rows(self.path))
                self._file = open(self.path, "a", newline="", encoding="utf-8")  # noqa: SIM115
            self._file.write(_line([step, *(row.get(name, "") for name in self.columns[1:])]))
            self._file.flush()  # hands the row to the operating system: a later kill -9 cannot take it back

    def close(self) -> None:
        """Close the file; further writes fail."""
        with contextlib.suppress(OSError):  # what could not be written was said by write()
            self._file.close()

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        lines = [_line(self.columns), *(_line([row.get(name, "") for name in self.columns]) for row in rows)]
        write_atomic(self.path, lambda file: file.write("".join(lines).encode()))


def _line(cells: list[Cell] | list[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def read_rows(path: str | os.PathLike[str], whole: bool = False) -> list[dict[str, str]]:
    """All complete rows as text; the half line that a killed writer may leave is ignored.

    Args:
        whole: the file was not written here: a last line without its end counts too, and neither a byte order mark nor
            spaces around names and cells are part of them.

    Raises:
        ValueError: no text in UTF-8, or rows with more cells than the first line has names.
    """
    # a cell may hold the returns of thousands of episodes; the limit is one for all of the process
    limit = csv.field_size_limit(_LONGEST)
    try:
        text = Path(path).read_bytes().decode("utf-8-sig" if whole else "utf-8")
        text = text if whole else text[: text.rfind("\n") + 1]
        rows = list(csv.DictReader(io.StringIO(text), skipinitialspace=whole))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: expected a table as CSV in UTF-8, got a file that is none: {error}") from error
    finally:
        csv.field_size_limit(limit)
    for line, row in enumerate(rows, 2):
        if None in row:
            raise ValueError(f"{path}:{line}: expected {len(row) - 1} cells, as the first line has, got more")
    return [{n.strip(): (c or "").strip() for n, c in row.items()} for row in rows] if whole else rows


def read_columns(path: str | os.PathLike[str]) -> dict[str, NDArray[np.float64]]:
    """Numeric columns ``[rows]``, NaN where a cell is empty; columns of text are left out."""
    rows = read_rows(path)
    columns: dict[str, NDArray[np.float64]] = {}
    for name in rows[0] if rows else ():
        try:
            columns[name] = np.array([float(row[name] or "nan") for row in rows])
        except ValueError:
            continue
    return columns
