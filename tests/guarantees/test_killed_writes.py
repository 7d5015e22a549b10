"""SIGKILL inside a checkpoint write of a training agent: the newest whole checkpoint loads and training goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agents import PPO
from ccrl.experiment import checkpoint

ROOT = Path(__file__).parents[2]

# wide layers: megabytes per checkpoint, so that most of the time goes into writing
TRAINER = """
import sys, torch
torch.set_num_threads(1)
import envs
from agents.ppo import PPO, PPOConfig
from ccrl.experiment.callbacks import CheckpointCallback
config = PPOConfig(num_envs=2, n_steps=4, batch_size=8, n_epochs=1, hidden=(700, 700), compile="off")
PPO("CartPole-v1", config).learn(until=10**9, callback=CheckpointCallback(sys.argv[1], every=1, keep=2))
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_killed_write_leaves_a_loadable_checkpoint(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    trainer = subprocess.Popen([sys.executable, "-c", TRAINER, str(tmp_path)], cwd=ROOT, env=environment)
    try:
        deadline = time.monotonic() + 120
        while True:
            assert trainer.poll() is None, "the trainer ended by itself"
            assert time.monotonic() < deadline, "no write seen"
            if len(list(tmp_path.glob("step_*.pt"))) >= 2 and any(tmp_path.glob(".step_*.tmp")):
                break
            time.sleep(0.0005)
    finally:
        trainer.send_signal(signal.SIGKILL)
        trainer.wait()
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    agent = PPO.load(newest)
    assert checkpoint.checkpoint_path(tmp_path, agent.num_timesteps) == newest
    steps = agent.num_timesteps
    agent.learn(until=steps + 1)
    assert agent.num_timesteps == steps + 8
