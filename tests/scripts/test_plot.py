"""The command line of plot.py."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ccrl.experiment.others import read_others, write_runs

ROOT = Path(__file__).parents[2]


def test_figures_tables_and_what_is_refused(tmp_path):
    runs, out = tmp_path / "runs", tmp_path / "figures" / "x"
    for env, agent, seed in itertools.product(("A", "ns/B-v0"), ("ppo", "mdpo"), (0, 1)):
        folder = runs / f"{env.replace('/', '-')}__{agent}__{seed}"
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"env": env, "agent": agent, "seed": seed}))
        (folder / "config.yaml").write_text("")
        rows = [f"{step},{step * (1 + seed)}\n" for step in range(0, 1001, 50)]
        (folder / "progress.csv").write_text("step,rollout/ep_rew_mean\n" + "".join(rows))
    command = [sys.executable, "scripts/plot.py", str(runs), "--out", str(out), "--title", "T", "--points", "20"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = {f"x_{figure}.{suffix}" for figure in ("curves", "profile", "improvement") for suffix in ("png", "svg")}
    assert {path.name for path in out.parent.iterdir()} == names | {"x_table.md", "x_table.csv", "x_runs.csv"}
    kept = {key: (steps, returns) for *key_, steps, returns in read_others(out.parent / "x_runs.csv")
            if (key := tuple(key_))}  # fmt: skip
    assert set(kept) == set(itertools.product(("A", "ns/B-v0"), ("ppo", "mdpo"), (0, 1)))
    assert kept["A", "ppo", 1][0].tolist() == list(range(0, 1001, 50))
    assert kept["A", "ppo", 1][1].tolist() == list(range(0, 2001, 100))
    assert (out.parent / "x_curves.png").read_bytes()[:4] == b"\x89PNG"
    assert "scripts/plot.py" in (out.parent / "x_curves.svg").read_text()
    failed = subprocess.run(
        [*command, "--metric", "nothing"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: expected runs with nothing")


def test_long_runs_are_thinned_at_even_places():
    steps = np.arange(1000.0)
    text = write_runs([("E", "a", 3, steps, steps / 3)], points=4)
    # places 0, 333, 666, 999 of 1,000
    assert text.split("\n") == ["env,agent,seed,step,return", "E,a,3,0,0", "E,a,3,333,111", "E,a,3,666,222",
                                "E,a,3,999,333", ""]  # fmt: skip


def test_steps_that_are_no_whole_numbers_are_read_again(tmp_path):
    """In millions, say: rounded, nine points would have two steps, and the figure could not be drawn again."""
    steps = np.arange(1, 10) / 10
    (tmp_path / "x.csv").write_text(write_runs([("E", "a", 0, steps, steps), ("E", "b", 0, steps * 1e7, steps)]))
    (a, b) = read_others(tmp_path / "x.csv")
    assert a[3].tolist() == steps.tolist()
    assert b[3].tolist() == list(range(1_000_000, 9_000_001, 1_000_000))


def test_tables_as_others_write_them(tmp_path):
    """With a byte order mark and spaces, as spreadsheets and people do, and without an end of the last line."""
    file = tmp_path / "x.csv"
    file.write_bytes(b"\xef\xbb\xbfenv, agent, seed, step, return\r\nE, a, 0, 10, 1\r\nE, a, 0, 20, 2")
    ((env, agent, seed, steps, returns),) = read_others(file)
    assert (env, agent, seed, steps.tolist(), returns.tolist()) == ("E", "a", 0, [10, 20], [1, 2])
    for text, message in (
        ("env;agent;seed;step;return\nE;a;0;10;1\n", "expected commas between the columns, got ';'"),
        ("env,agent,seed,step,return\n", "expected a first line with names and rows below it, got no rows"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            list(read_others(file))
