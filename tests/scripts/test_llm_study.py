"""scripts/studies/llm: equal rollouts from one warm start, resumable, tables that say what they compare."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from ccrl.experiment.csv_table import read_rows
from scripts.studies.llm import study

pytest.importorskip("transformers", reason='pip install -c constraints.txt -e ".[llm]"')

TINY = {"layers": 1, "width": 16, "warm_steps": 2, "iterations": 2, "eval_every": 1}


def test_student_s_quantiles_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for n, quantile in study.STUDENT.items():
        assert quantile == pytest.approx(stats.t.ppf(0.975, n - 1), abs=6e-4)


def test_interval_by_hand():
    mean, half = study.interval([1.0, 2.0, 6.0])
    assert mean == 3.0
    # s = sqrt(7), 4.303 s / sqrt(3)
    assert half == pytest.approx(6.573, abs=1e-3)
    assert math.isnan(study.interval([1.0])[1])


def test_methods_start_alike_use_equal_rollouts_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    options = study.Run(tmp_path, methods=("grpo", "bnpo"), seeds=(0, 1), **TINY)
    options.run()
    rows = read_rows(tmp_path / "runs.csv")
    assert [(r["method"], r["seed"], r["completions"]) for r in rows] == [
        (method, seed, completions)
        for seed in "01" for method in ("grpo", "bnpo") for completions in ("0", "128", "256")
    ]  # fmt: skip
    first = {(r["seed"], r["pass1"], r["entropy"]) for r in rows if r["completions"] == "0"}
    assert len(first) == 2, "all methods of a seed start from the same model"
    monkeypatch.setattr(study, "play", lambda *args, **kwargs: pytest.fail("a finished cell was run again"))
    options.run()
    assert "--layers 1" in (tmp_path / "command.txt").read_text()

    text = study.Report(tmp_path, target=tmp_path / "figures").run()
    assert text.count("\n| ") == 3
    assert "| bnpo |" in text
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {
        "llm_study.md", "llm_study_runs.csv", "llm_study_differences.png",
    }  # fmt: skip
    assert read_rows(tmp_path / "figures" / "llm_study_runs.csv") == rows


def test_differences_are_paired_by_seed():
    def row(method: str, seed: int, pass1: float) -> dict[str, str]:
        return {"method": method, "seed": str(seed), "iteration": "1", "completions": "8", "pass1": str(pass1),
                "pass8": "0.5", "entropy": "1.0", "grad_norm": "0.1"}  # fmt: skip

    rows = [row("grpo", s, x) for s, x in enumerate((0.1, 0.5, 0.9))]
    rows += [row("bnpo", s, x) for s, x in enumerate((0.2, 0.6, 1.0))]
    rows += [row("mhpo", s, x) for s, x in enumerate((0.9, 0.5, 0.1))]
    warm = [{"parameters": "1500000", "pass1": "0.1", "pass8": "0.2", "entropy": "1.5"}]
    text = study.table(rows, warm, "command")
    lines = {
        line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]]
        for line in text.splitlines()
        if "|" in line
    }
    # far apart between seeds, always 0.1 above: only the paired difference sees it
    assert lines["bnpo"][4:6] == ["+0.100 +- 0.000", "better"]
    assert lines["mhpo"][5] == "no"
    assert lines["grpo"][4:6] == ["", ""]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"methods": ("grop",)}, "methods"),
        ({"iterations": 0}, "iterations"),
        ({"jobs": 0}, "jobs"),
        ({"seeds": tuple(range(11))}, "seeds: expected 1 to 10 different ones"),
        ({"seeds": (0, 0)}, "seeds"),
        ({"seeds": ()}, "seeds"),
    ],
)
def test_bad_input(tmp_path: Path, options: dict, match: str):
    with pytest.raises(ValueError, match=match):
        study.Run(tmp_path, **options)
