"""The HTML page of a benchmark: complete in itself, and everything of the runs escaped."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

from scripts import report


def runs(folder: Path) -> Path:
    for env, agent, seed in itertools.product(("A", "B"), ("ppo", "<mdpo>"), (0, 1)):
        run = folder / f"{env}__{agent.strip('<>')}__{seed}"
        run.mkdir(parents=True)
        info = {"env": env, "agent": agent, "seed": seed, "git": {"commit": "0123456789abcdef"}}
        (run / "run.json").write_text(json.dumps(info | ({"finished": 1} if seed else {})))
        (run / "config.yaml").write_text(f"seed: {seed}\nagent: {{gamma: 0.9, lr: {0.1 if agent == 'ppo' else 0.2}}}\n")
        rows = [f"{step},{step * (1 + seed)}\n" for step in range(0, 1001, 50)]
        (run / "progress.csv").write_text("step,rollout/ep_rew_mean\n" + "".join(rows))
    return folder


def test_the_page_needs_no_other_file(tmp_path: Path) -> None:
    others = tmp_path / "others.csv"
    others.write_text("env,agent,seed,step,return\nA,theirs,7,0,1\nA,theirs,7,1000,5\n")
    out = tmp_path / "page.html"
    report.main(report.Options(runs=(runs(tmp_path / "runs"), others), out=out, title="T & T"), "python x < y")
    text = out.read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    assert text.count("<img") == 2, "curves and improvement: with others on A alone there is one shared env"
    assert "<h1>T &amp; T</h1>" in text
    assert "python x &lt; y" in text
    assert "&lt;mdpo&gt;" in text
    assert "<mdpo>" not in text
    assert "theirs" in text
    assert text.count("<td>finished</td>") == 4
    assert text.count("<td>not finished</td>") == 4
    assert "<td>agent.lr</td>" in text
    assert "agent.gamma" not in text, "equal everywhere"
    assert "<td>0123456789</td>" in text or "0123456789</td>" in text


def test_settings_that_differ_in_the_fourth_digit(tmp_path: Path) -> None:
    paths = sorted(runs(tmp_path / "runs").glob("A__ppo__*/config.yaml"))
    for path, gamma in zip(paths, (0.9995, 0.9999), strict=True):
        path.write_text(f"agent: {{gamma: {gamma}, lr: 0.1}}\n")
    report.main(report.Options(runs=(paths[0].parents[1],), out=tmp_path / "x.html"))
    assert "0.9995, 0.9999" in (tmp_path / "x.html").read_text()


def test_metrics_that_no_run_has(tmp_path: Path) -> None:
    folder = runs(tmp_path / "runs")
    with pytest.raises(ValueError, match="expected runs with eval/x"):
        report.main(report.Options(runs=(folder,), out=tmp_path / "x.html", metrics=("eval/x",)))
    assert not (tmp_path / "x.html").exists()


def test_a_damaged_file_is_said_and_not_left_out(tmp_path: Path) -> None:
    """A metric that no run has is left out; one of which a file is damaged was left out too, without a word."""
    folder, out = runs(tmp_path / "runs"), tmp_path / "new" / "x.html"
    report.main(report.Options(runs=(folder,), out=out))
    for number, run in enumerate(sorted(folder.iterdir())):
        (run / "eval.csv").write_text(f"step,eval/mean_reward\n1,1\n{'x' if number == 3 else 5},2\n9,3\n")
    with pytest.raises(ValueError, match=r"A__ppo__1/eval.csv: expected a number in the column 'step'"):
        report.main(report.Options(runs=(folder,), out=out))
