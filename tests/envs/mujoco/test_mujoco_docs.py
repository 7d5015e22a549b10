"""The page that shows how to add a task: its files are written out and run as they stand."""

from __future__ import annotations

import importlib.util
import re
import runpy
import sys
from pathlib import Path

import gymnasium
import pytest
import torch

import envs
from ccrl.batched_env import AutoresetMode
from envs.mujoco import MujocoEnv

PAGE = Path(__file__).parents[3] / "docs" / "new_mujoco_task.md"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "puck.xml").write_text(blocks("xml")[0])
    (tmp_path / "puck.py").write_text(blocks("python")[0])
    return tmp_path


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def puck(folder, monkeypatch):
    spec = importlib.util.spec_from_file_location("puck", folder / "puck.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "puck", module)  # dataclass looks its module up
    spec.loader.exec_module(module)
    return module.Puck


def test_the_example_runs_and_solves_its_task(folder, capsys):
    runpy.run_path(str(folder / "puck.py"), run_name="__main__")
    (number,) = re.findall(r"over 200 steps: (\S+)", capsys.readouterr().out)
    (promised,) = re.findall(r"prints about (\d+)", PAGE.read_text())
    assert float(number) == pytest.approx(float(promised), rel=0.05)


def test_reward_and_termination_of_the_example(puck):
    """Two metres per second for 0.05 s towards a goal 1 m away, without damping's share: by hand from the equation
    of motion v' = -0.5 v, x = 4 (1 - exp(-t / 2))."""
    env = MujocoEnv(puck(), 2, dtype=torch.float64, autoreset_mode=AutoresetMode.DISABLED)
    qpos = torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.05, 0.0]], dtype=torch.float64)
    qvel = torch.tensor([[2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    obs = env.set_state(qpos, qvel)
    assert obs.tolist() == [[0.0, 0.0, 2.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.05, 0.0]]
    result = env.step(torch.zeros(2, 2))
    # xpos lags by one of the five simulation steps: 0.04 s.
    travelled = 4 * (1 - torch.tensor(-0.02).exp().item())
    assert result.reward[0].item() == pytest.approx(travelled, rel=1e-2)
    assert result.reward[1].item() == pytest.approx(1.0, abs=1e-9)
    assert result.terminated.tolist() == [False, True]


def test_the_class_of_the_example_is_about_forty_lines():
    text = PAGE.read_text()
    body = text[text.index("@dataclass") : text.index('if __name__ == "__main__"')]
    assert len(body.strip().splitlines()) <= 45


def test_an_id_for_the_example(folder, monkeypatch):
    example, registration = blocks("python")
    (folder / "puck.py").write_text(example + registration)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "puck", raising=False)
    try:
        env = envs.make("puck:Puck-v0", 3, bonus=5.0)
        assert type(env) is MujocoEnv  # with its state, not behind Gymnasium's NumPy
        assert (env.task.bonus, env.max_episode_steps, env.reset(seed=0).shape) == (5.0, 100, (3, 6))
    finally:
        gymnasium.registry.pop("Puck-v0", None)
        sys.modules.pop("puck", None)
