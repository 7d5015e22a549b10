"""By command: tasks of reasoning-gym, difficulty, curriculum; the commands of docs/text_tasks.md."""

from __future__ import annotations

import csv
import re
import shlex
from pathlib import Path

import pytest
import tyro

from scripts import evaluate, train

ROOT = Path(__file__).resolve().parents[2]
TINY = ("--model-layers", "1", "--model-width", "16", "--model-heads", "2", "--n-prompts", "2", "--group-size", "2",
        "--max-new-tokens", "4", "--warm-start-steps", "2", "--total-timesteps", "8", "--eval-every", "8",
        "--eval-episodes", "4", "--checkpoint-every", "4")  # fmt: skip


def page() -> dict[str, list[list[str]]]:
    """The arguments of the page's commands about these tasks, by script."""
    text = (ROOT / "docs/text_tasks.md").read_text(encoding="utf-8")
    found: dict[str, list[list[str]]] = {}
    for script, line in re.findall(
        r"^ *python scripts/(\w+)\.py (.*(?:reasoning_gym|RUN).*)$", text, flags=re.MULTILINE
    ):
        found.setdefault(script, []).append(shlex.split(line))
    return found


@pytest.mark.parametrize("which", range(3), ids=["chain_sum", "letter_counting", "curriculum"])
def test_trains_evaluates_and_goes_on(
    which: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("reasoning_gym", "transformers"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    started = [argv for argv in page()["train"] if "--resume" not in argv][which]
    run = train.main([*started, *TINY])
    config = (run.path / "config.yaml").read_text()
    (run.path / "config.yaml").write_text(config.replace("total_timesteps: 8", "total_timesteps: 12"))
    train.main(["--resume", str(run.path)])
    with (run.path / "progress.csv").open() as file:
        assert {"4.0", "8.0", "12.0"} <= {row["time/total_timesteps"] for row in csv.DictReader(file)}
    asked = [str(run.path) if word == "RUN" else word for word in page()["evaluate"][0]]
    asked += ["--episodes", "4", "--samples", "2"]
    evaluate.main(tyro.cli(evaluate.EvaluateConfig, args=asked))
    assert "pass@2" in capsys.readouterr().out


def test_the_page_has_these_commands() -> None:
    tasks = [argv[argv.index("--task") + 1] for argv in page()["train"] if "--task" in argv]
    assert tasks == ["reasoning_gym:chain_sum", "reasoning_gym:letter_counting", "curriculum"]
