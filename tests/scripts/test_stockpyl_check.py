"""Our numbers beside stockpyl's, here played by a stand-in that answers with what stockpyl 1.0.2 gave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts import stockpyl_check
from scripts.stockpyl_check import CheckConfig

ANSWER = {
    "newsvendor": [[3.167408, [11.90]], [6.278819202221802, [29.585018]], [12.405784, [65.40]]],
    "serial": [[6.920815, [64.44, 54.34, 30.65, 13.56]], [10.759827, [83.15, 72.77, 48.96, 32.34]]],
    "r_Q": [[13.593082, []], [10.488042, []]],
}
"""``scripts/stockpyl_check.py --python ...`` with stockpyl 1.0.2, numpy 1.26.4."""


def stand_in(folder: Path, body: str) -> Path:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_ours_are_theirs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    python = stand_in(tmp_path, f"echo '{json.dumps(ANSWER)}'")
    rows = stockpyl_check.main(CheckConfig(python, scenarios=200))
    for row in rows:
        if row.error:  # simulated
            assert abs(row.ours - row.theirs) < 4 * row.error
        else:  # in closed form to the digits above; on grids, ours for demand clipped at 0, to half a percent
            assert row.ours == pytest.approx(row.theirs, rel=5e-3 if "serial" in row.case else 1e-6)
            assert row.levels == pytest.approx(row.their_levels, abs=0.1)
    assert len(rows) == 7
    assert "| newsvendor, L = 4, p = 9 | 6.278819 | 6.278819 | 29.59 | 29.59 |" in capsys.readouterr().out


def test_without_stockpyl(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="stockpyl-env/bin/pip install"):
        stockpyl_check.main(CheckConfig(tmp_path / "none"))
    python = stand_in(tmp_path, "echo \"ModuleNotFoundError: No module named 'stockpyl'\" >&2; exit 1")
    with pytest.raises(ValueError, match=r"expected stockpyl 1.0.2 to answer, got: ModuleNotFoundError"):
        stockpyl_check.main(CheckConfig(python))
