"""Somebody else's package of two files, outside this folder and without an edit here: its method, environment and
network train by ``train.py`` and ``benchmark.py``, go on, and are evaluated."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPE, AGENT, POINT = "my_pkg.recipe:METHOD", "my_pkg.point:LookingPPO", "my_pkg.point:Point"
QUIET = ["--no-tensorboard", "--no-progress"]
TINY = ["--model-layers", "1", "--model-width", "16", "--model-heads", "2", "--group-size", "4", "--n-prompts", "4"]


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    package = tmp_path / "my_pkg"
    shutil.copytree(Path(__file__).parent / "stranger", package)
    (package / "__init__.py").touch()
    return tmp_path


def script(folder: Path, name: str, *arguments: str, code: int = 0) -> str:
    """From the stranger's folder, without PYTHONPATH: the folder one works in is looked into."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "scripts" / name), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def run_of(root: Path) -> Path:
    (found,) = (path.parent for path in root.rglob("run.json"))
    return found


def test_a_network_and_an_environment_of_ones_own(elsewhere: Path) -> None:
    flags = ["--total-timesteps", "256", "--num-envs", "4", "--n-steps", "32", "--n-epochs", "1", "--hidden", "8",
             "--compile", "off", "--eval-every", "128", "--eval-episodes", "2",
             "--env-kwargs", '{"push": 2.0}']  # fmt: skip
    script(elsewhere, "train.py", AGENT, *flags, *QUIET)
    run = run_of(elsewhere / "runs")
    info = json.loads((run / "run.json").read_text())
    assert (info["agent"], info["env"], info["finished"]["step"]) == (AGENT, POINT, 256)
    refused = script(elsewhere, "evaluate.py", str(run), code=1)
    assert f"--trust {AGENT}" in refused.replace("\n", " ")
    assert "Traceback" not in refused
    assert "deterministic" in script(elsewhere, "evaluate.py", str(run), "--episodes", "2", "--trust", AGENT, POINT)
    settings = run / "config.yaml"
    settings.write_text(settings.read_text().replace("total_timesteps: 256", "total_timesteps: 384"))
    refused = script(elsewhere, "train.py", "--resume", str(run), code=1)
    assert f"names '{AGENT}', which would import the module 'my_pkg.point'" in refused
    assert "384 steps" in script(elsewhere, "train.py", "--resume", str(run), "--trust", AGENT, POINT)


def test_a_method_of_ones_own_on_text_and_on_episodes(elsewhere: Path) -> None:
    pytest.importorskip("transformers")
    text = ["llm", "--method", RECIPE, "--task", "arithmetic", *TINY, "--total-timesteps", "32", "--eval-episodes", "4"]
    said = script(elsewhere, "train.py", *text, "--weight", "0.25", "--run-root", "text", *QUIET)
    assert "32 steps" in said
    assert "weight: 0.25" in (run_of(elsewhere / "text") / "config.yaml").read_text()
    control = ["grouped", "--method", RECIPE, "--env", "CartPole-v1", "--group-size", "2", "--n-groups", "2",
               "--n-steps", "20", "--total-timesteps", "60", "--eval-episodes", "2"]  # fmt: skip
    assert "return" in script(elsewhere, "train.py", *control, "--run-root", "control", *QUIET)


def test_a_study_of_them(elsewhere: Path) -> None:
    pytest.importorskip("transformers")
    tiny = {"model_layers": 1, "model_width": 16, "model_heads": 2, "group_size": 4, "n_prompts": 4}
    small = {"num_envs": 4, "n_steps": 16, "n_epochs": 1, "hidden": [8], "compile": "off"}
    study = {
        "seeds": [0], "evals": 1, "eval_episodes": 2, "settings": {RECIPE: tiny, "grpo": tiny, AGENT: small},
        "entries": [
            {"agents": [RECIPE, "grpo"], "envs": ["arithmetic"], "total_timesteps": 16},
            {"agents": [AGENT], "envs": [POINT], "total_timesteps": 64},
        ],
    }  # fmt: skip
    (elsewhere / "study.yaml").write_text(json.dumps(study))
    command = ("benchmark.py", "--study", "study.yaml", "--out", "out")
    said = script(elsewhere, *command)
    assert "3 runs, 0 of them finished before" in said
    assert "FAILED" not in said
    assert "3 runs, 3 of them finished before" in script(
        elsewhere, "benchmark.py", "--study", "study.yaml", "--out", "out"
    )
