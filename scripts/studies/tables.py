"""What studies write: a Markdown table under the command that made it, and rows as CSV."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from ccrl.experiment.run import describe

__all__ = ["Rows", "made", "markdown", "write"]

Rows = list[dict[str, Any]]


def made() -> dict[str, Any]:
    """Columns that say what makes rows, with one thread; asked for before a study's runs, for the commit may move while
    they last."""
    about = describe()
    commit = (about["git"] or {}).get("commit", "")[:12]
    return {"torch": (about["versions"]["torch"] or "").partition("+")[0], "threads": 1, "commit": commit}


def markdown(rows: Rows) -> str:
    """A table of all columns in order of appearance; numbers have four digits, and what is missing or NaN is empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(names) + " |", "|---|" + "---:|" * (len(names) - 1)]
    lines += ["| " + " | ".join(_cell(row.get(name, "")) for name in names) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(x: Any) -> str:
    if isinstance(x, float):
        return "" if x != x else f"{x:.4g}"
    return str(x)


def write(stem: Path, command: str, table: Rows, rows: Rows | None = None, *more: Rows, note: str = "") -> None:
    """Print ``table`` and the tables ``more`` and write them to ``stem.md``, with ``note`` above them; ``rows``, with
    the columns of the first one, to ``stem.csv``."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join([*([note + "\n"] if note else []), *(markdown(part) for part in (table, *more))])
    print(text)
    stem.with_suffix(".md").write_text(f"`{command}`\n\n{text}", encoding="utf-8")
    if rows is not None:
        with stem.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
