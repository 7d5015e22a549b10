"""The environment contract on the real simulators; each runs in an environment of its own (docs/robots.md):

FOLDER/venv/bin/python -m pytest tests/envs/test_simulators.py
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

import envs
from ccrl.batched_env import AutoresetMode
from ccrl.testing import EnvContract
from envs import isaac

LIMIT = 12


def installed(name):
    return importlib.util.find_spec(name) is not None


@pytest.mark.skipif(not installed("mjlab"), reason="needs mjlab")
class TestMjlab(EnvContract):
    autoreset_modes = (AutoresetMode.DISABLED,)
    time_limit, max_steps, resumable = LIMIT, 40, False

    def make_env(self, num_envs, autoreset_mode):
        # 5 substeps of 0.01 s; rounded up to whole steps
        return envs.make("mjlab:Mjlab-Cartpole-Balance", num_envs, cfg={"episode_length_s": (LIMIT - 0.5) * 0.05})


@pytest.mark.skipif(not installed("isaaclab"), reason="needs Isaac Lab")
class TestIsaac(EnvContract):
    autoreset_modes = (AutoresetMode.SAME_STEP,)
    time_limit, max_steps, resumable = LIMIT, 60, False
    task = "isaac:Isaac-Cartpole-Direct"

    @pytest.fixture(autouse=True)
    def _one_simulation(self):
        yield
        while isaac._open:
            isaac._open["env"].close()

    def make_env(self, num_envs, autoreset_mode):
        # 2 substeps of 1 / 120 s
        return envs.make(self.task, num_envs, cfg={"episode_length_s": (LIMIT - 0.5) / 60.0})

    def test_environments_leave_each_other_and_the_callers_random_numbers_alone(self):
        """There is one: a second is the same simulation, and who steps it without a reset is told."""
        state = torch.get_rng_state()
        env, other = self._env(AutoresetMode.SAME_STEP), self._env(AutoresetMode.SAME_STEP)
        env.reset(seed=3)
        other.reset(seed=4)
        with pytest.raises(RuntimeError, match="another user has the simulation"):
            env.step(torch.zeros(3, 1))
        assert torch.equal(state, torch.get_rng_state())

    def test_the_row_after_a_time_out_continues_the_trajectory(self):
        rows = {}
        for steps in (LIMIT, 500):
            env = envs.make(self.task, 3, cfg={"episode_length_s": (steps - 0.5) / 60.0})
            env.reset(seed=5)
            for _ in range(LIMIT):
                result = env.step(torch.full((3, 1), 0.1))
            rows[steps] = (result.final_obs if steps == LIMIT else result.obs).clone(), result.truncated.clone()
            env.close()
        assert rows[LIMIT][1].all()
        assert not rows[500][1].any()
        assert torch.equal(rows[LIMIT][0], rows[500][0])
