"""One training in several processes: the same step as in one, one writer, an exact resume."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from agents import MDPO, NPGIGT
from agents.grouped import Grouped
from ccrl.experiment import checkpoint
from ccrl.experiment.config import ConfigError
from ccrl.experiment.csv_table import read_rows
from ccrl.experiment.run import RunFolder
from ccrl.learn.parallel import distribute
from ccrl.testing import prepare_rollout
from scripts import evaluate, train
from scripts.group import Group

ROOT = Path(__file__).resolve().parents[2]
CASES = Path(__file__).with_name("several_cases.py")
FLAGS = ["ppo", "--env", "Pendulum-v1", "--num-envs", "2", "--n-steps", "16", "--hidden", "8", "--n-minibatches", "2",
         "--desired-kl", "0.01", "--normalise-obs", "--normalise-reward", "--checkpoint-every", "64",
         "--eval-every", "64", "--eval-episodes", "1", "--no-tensorboard", "--no-progress", "--seed", "5"]  # fmt: skip


def torchrun(*arguments: object) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        *map(str, arguments),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_step_of_two_processes_is_the_step_of_one_on_all_copies(tmp_path):
    """Two processes of 8 copies and one of 16, on the same 128 rows: parameters and observation statistics."""
    cases = runpy.run_path(str(CASES))
    one = cases["make"](16, seed=0)
    data = prepare_rollout(one)
    columns = {k: data[k].clone() for k in ("obs", "action", "log_prob", "value", "advantage", "return", "valid")}
    columns |= {k: data[k].clone() for k in data if k.startswith("old_")}
    torch.save(columns, tmp_path / "rollout.pt")
    cases["update"](one, columns)
    torchrun(CASES, tmp_path)
    expected = one.policy.state_dict()
    for rank in (0, 1):
        found = torch.load(tmp_path / f"after_{rank}.pt")
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    # and they stay together over a training with rollouts of their own
    first, second = (torch.load(tmp_path / f"trained_{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["actor.net.0.weight"], expected["actor.net.0.weight"])


def test_a_run_has_one_writer_and_goes_on_exactly(tmp_path):
    script = ROOT / "scripts" / "train.py"
    torchrun(script, *FLAGS, "--total-timesteps", "256", "--run-root", tmp_path / "whole")
    torchrun(script, *FLAGS, "--total-timesteps", "128", "--run-root", tmp_path / "parts")
    (whole,), (parts,) = ([RunFolder.open(p) for p in (tmp_path / name).iterdir()] for name in ("whole", "parts"))
    assert whole.info["processes"] == 2
    assert whole.info["finished"]["step"] == 256
    # 2 processes x 2 copies x 16 steps
    steps = [int(row["step"]) for row in read_rows(whole.path / "progress.csv") if row["time/fps"]]
    assert steps == [64, 128, 192, 256]
    assert sorted(p.name for p in (whole.path / "processes").iterdir()) == ["1"]

    parts.config_file.write_text(parts.config_file.read_text().replace("total_timesteps: 128", "total_timesteps: 256"))
    with pytest.raises(ConfigError, match=r"expected 2 processes.*torchrun --nproc-per-node 2"):
        train.main(["--resume", str(parts.path)])
    torchrun(script, "--resume", parts.path)
    for place in ("checkpoints", "processes/1"):
        a, b = (
            torch.load(run.path / place / "step_000000000256.pt", weights_only=True)["state"]["learner"]
            for run in (whole, parts)
        )
        assert torch.equal(a["updaters/policy"]["flat"], b["updaters/policy"]["flat"])
        assert torch.equal(a["collector"]["obs"], b["collector"]["obs"])
        assert torch.equal(a["policy"]["norm.obs.count"], torch.tensor(256.0, dtype=torch.float64))
    # one process evaluates it as any run, and knows how long it trained
    assert evaluate.main(evaluate.EvaluateConfig(whole.path, episodes=1))["steps"] == 256.0


def test_what_would_drift_apart_is_refused():
    processes = None  # refused before it is used
    for agent in (
        NPGIGT("Pendulum-v1", num_envs=2, n_steps=8, hidden=(4,)),
        MDPO("Pendulum-v1", num_envs=2, n_steps=8, hidden=(4,)),
        Grouped("CartPole-v1", method="oblr_po", baseline_weight="length", n_groups=2, n_steps=8, hidden=(4,)),
        Grouped("CartPole-v1", n_groups=2, group_size=2, n_steps=8, hidden=(4,)),  # episodes of other lengths
    ):
        with pytest.raises(ValueError, match="one process"):
            distribute(agent.learner, processes)


@pytest.mark.parametrize(("first", "second"), [((64, 128), (64, 128, 192)), ((64, 128, 192), (64, 128))])
def test_a_kill_between_two_savings_costs_the_newer_checkpoint_alone(tmp_path, first, second):
    """While the first process evaluates, the second has saved already."""
    run = RunFolder.create(tmp_path, "e", "a", 0)
    for folder, steps in ((run.checkpoints, first), (run.path / "processes" / "1", second)):
        for step in steps:
            checkpoint.save(checkpoint.checkpoint_path(folder, step), {"step": step})
    said = []
    for rank in (0, 1):
        same = (lambda text: said.append(text) or text) if rank == 0 else (lambda text: said[0])
        group = Group(SimpleNamespace(rank=rank, size=2, same_text=same))
        path = group.checkpoint(run)
        assert path == checkpoint.checkpoint_path(group.folder(run), 128)
        assert sorted(p.name for p in path.parent.glob("*.pt")) == ["step_000000000064.pt", "step_000000000128.pt"]
