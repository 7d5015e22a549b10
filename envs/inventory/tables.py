"""Tables that a planner brings, CSV or Parquet, as columns of text: readers that name the row that is wrong."""

from __future__ import annotations

import csv
import datetime
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ccrl.packages import require

__all__ = ["Table", "as_day", "as_number", "read_table", "refuse"]

_SHOWN = 5
"""How many bad rows a message names."""


class Table(NamedTuple):
    """``columns``: name -> one text per row, blank where the file has nothing."""

    name: str
    columns: dict[str, list[str]]
    numbers: Sequence[int]
    """What the file calls each row: from 2 in a CSV file, after the header, where blank lines count; from 1 in a
    Parquet file."""

    @property
    def rows(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def need(self, *names: str, option: str = "") -> None:
        """:raises ValueError: where a column is missing."""
        missing = [name for name in names if name not in self.columns]
        if missing:
            raise ValueError(
                f"{self.name}: expected the columns {', '.join(names)}, got {', '.join(self.columns)} without "
                f"{', '.join(missing)}{option and '; ' + option}"
            )

    def only(self, known: Iterable[str]) -> None:
        """:raises ValueError: for columns that nobody would read."""
        expected = list(known)
        others = [name for name in self.columns if name not in expected]
        if others:
            raise ValueError(f"{self.name}: expected columns among {', '.join(expected)}, got also {', '.join(others)}")

    def row(self, index: int) -> int:
        """The number of a row, as the user counts."""
        return self.numbers[index]


def read_table(path: str | Path, what: str) -> Table:
    """The file ``path``, ``.csv`` (also with semicolons or tabs) or ``.parquet``.

    Args:
        what: what it holds, for messages.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another ending, no header, no row, a row of another length, a column twice.
        ImportError: a Parquet file without pyarrow (extra ``offline``).
    """
    path = Path(path)
    if not path.is_file():
        where = "" if path.is_absolute() else f" in {Path.cwd()}; a relative path counts from the working folder"
        raise FileNotFoundError(f"{what}: expected a file, got {str(path)!r}, which there is not{where}")
    if path.suffix == ".parquet":
        parquet = require("pyarrow.parquet", "offline")
        try:
            columns = {
                name: [_text(v) for v in column] for name, column in parquet.read_table(path).to_pydict().items()
            }
        except Exception as error:  # pyarrow's own classes, which are not to be imported here
            raise ValueError(f"{path.name}: expected a Parquet file, got one that is none: {error}") from error
        return _filled(Table(path.name, columns, range(1, 1 + len(next(iter(columns.values()), [])))))
    if path.suffix != ".csv":
        raise ValueError(f"{what}: expected a .csv or .parquet file, got {path.name}")
    try:
        text = path.read_bytes().decode("utf-8-sig")  # spreadsheets begin their files with a mark
        head = text.partition("\n")[0]
        separator = max(",;\t", key=head.count)
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        lines = [(index, row) for index, row in enumerate(rows, 1) if any(row)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path.name}: expected a table as CSV in UTF-8, got a file that is none: {error}") from error
    if not lines:
        raise ValueError(f"{path.name}: expected a header and rows, got an empty file")
    names = [name.strip() for name in lines[0][1]]
    if len(set(names)) != len(names) or "" in names:
        raise ValueError(f"{path.name}: expected a name for every column, each once, got {', '.join(names)}")
    for index, row in lines[1:]:
        if len(row) != len(names):
            raise ValueError(f"{path.name}: expected {len(names)} values in row {index}, got {len(row)}: {row}")
    columns = {name: [row[i].strip() for _, row in lines[1:]] for i, name in enumerate(names)}
    return _filled(Table(path.name, columns, [index for index, _ in lines[1:]]))


def _filled(table: Table) -> Table:
    if not table.rows:
        raise ValueError(f"{table.name}: expected at least one row, got none")
    return table


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, datetime.datetime):
        return value.date().isoformat() if value.time() == datetime.time() else value.isoformat()
    return str(value)


def as_number(text: str) -> float | None:
    """A finite number, or ``None``."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def as_day(text: str) -> datetime.date | None:
    """A day as ``2024-01-31`` (a time behind it is left out), or ``None``."""
    try:
        return datetime.date.fromisoformat(text[:10]) if len(text) == 10 or text[10:11] in (" ", "T") else None
    except ValueError:
        return None


def refuse(table: Table, bad: Sequence[tuple[int, str]], fix: str) -> None:
    """:raises ValueError: naming the rows of ``bad`` (index, what is wrong), if there are any."""
    if not bad:
        return
    shown = "; ".join(f"row {table.row(index)}: {why}" for index, why in bad[:_SHOWN])
    more = f"; and {len(bad) - _SHOWN} more rows" if len(bad) > _SHOWN else ""
    raise ValueError(f"{table.name}: {shown}{more}. {fix}")
