"""The command line of export.py: from a run folder to a file that runs without the project."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from agents.ppo import PPO
from ccrl.registry import UntrustedError
from scripts import export, train

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--num-envs", "4", "--n-steps", "16", "--hidden", "8", "--no-tensorboard", "--eval-every", "0"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    argv = ["ppo", "--env", "Pendulum-v1", "--normalise-obs", "--recurrent", "gru", "--recurrent-size", "4"]
    return train.main([*argv, "--total-timesteps", "128", "--run-root", str(root), *TINY])


def test_the_example_of_the_page_runs_without_the_project(run, tmp_path):
    pytest.importorskip("onnxruntime")
    path = export.main(export.ExportConfig(run.path))
    assert path == run.path / "policy.onnx"
    page = (ROOT / "docs/export.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(code) == 1
    assert len(code[0].splitlines()) <= 20
    blocked = "import sys\nfor name in ('ccrl', 'agents', 'envs', 'torch'):\n    sys.modules[name] = None\n"
    (tmp_path / "example.py").write_text(blocked + code[0])
    done = subprocess.run(
        [sys.executable, "-I", "example.py", str(path)], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "ppo (5, 1)\n", done.stderr


def test_torchscript_of_a_checkpoint_acts_as_the_loaded_agent(run, tmp_path):
    path = export.main(export.ExportConfig(run.path, "torchscript", out=tmp_path / "deep" / "p.ts"))
    agent = PPO.load(run.checkpoints / "step_000000000128.pt")
    obs = np.array([[0.6, 0.8, 1.0], [1.0, 0.0, -2.0]], np.float32)
    action, _ = agent.predict(obs, deterministic=True)
    found, state = torch.jit.load(str(path))(torch.from_numpy(obs), torch.zeros(2, 4))
    np.testing.assert_allclose(found.numpy(), action, atol=1e-5)
    assert state.shape == (2, 4)


def test_a_run_folder_imports_nothing_by_itself(run, tmp_path):
    """An agent that the folder names as a module is refused; so is a checkpoint that is not there."""
    forged = tmp_path / "forged"
    forged.mkdir()
    (forged / "checkpoints").symlink_to(run.checkpoints)
    (forged / "run.json").write_text(json.dumps(run.info | {"agent": "antigravity:Agent"}))
    with pytest.raises(UntrustedError, match="antigravity"):
        export.main(export.ExportConfig(forged))
    with pytest.raises(FileNotFoundError, match="best"):
        export.main(export.ExportConfig(run.path, checkpoint="best"))


@pytest.mark.parametrize("gap", [1.0, float("nan")])
def test_a_refused_export_leaves_the_file_of_before(run, tmp_path, monkeypatch, gap):
    """Nor does it leave one of its own."""
    out = tmp_path / "p.ts"
    out.write_text("before")
    monkeypatch.setattr(export, "largest_difference", lambda *_: gap)
    with pytest.raises(RuntimeError, match="not written"):
        export.main(export.ExportConfig(run.path, "torchscript", out=out))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("p.ts", "before")]
    with pytest.raises(ValueError, match="expected the name of a file, got the folder"):
        export.main(export.ExportConfig(run.path, "torchscript", out=tmp_path))
