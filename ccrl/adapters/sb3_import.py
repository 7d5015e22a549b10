"""An SB3 ``VecEnv`` as a :class:`ccrl.batched_env.BatchedEnv`, and the door to the other direction."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

from ccrl.adapters.border import ReusedArrays, check_arrays, put_borders
from ccrl.adapters.seeds import copy_seeds
from ccrl.adapters.spaces import action_array, batch_buffer, check_action_space, check_batch, float32_space, store
from ccrl.batched_env import AutoresetMode, BatchedEnv, StepResult, Tree, check_device
from ccrl.packages import require

__all__ = ["SB3Env", "as_vec_env"]


class SB3Env:
    """An SB3 ``VecEnv`` seen as a ``BatchedEnv`` in ``SAME_STEP`` mode. Duck-typed: SB3 itself is not imported.

    ``infos[i]["terminal_observation"]`` becomes ``final_obs``; ``infos[i]["TimeLimit.truncated"]`` tells truncations
    from terminations. The returned tensors are persistent buffers. There is no ``state_dict``.

    The copies of a ``DummyVecEnv`` are put into a :class:`ccrl.adapters.border.Border` here; those in processes of SB3
    keep references over a reset, which this class can only warn of.

    Raises:
        TypeError: an object without the methods of a ``VecEnv``, or a space that is not supported.
    """

    def __init__(self, env: Any, *, device: torch.device | str = "cpu") -> None:
        self.name = type(env).__name__
        missing = [
            name for name in ("num_envs", "observation_space", "step_async", "step_wait") if not hasattr(env, name)
        ]
        if missing:
            raise TypeError(
                f"expected an SB3 VecEnv, got {self.name} without {', '.join(missing)}; for Gymnasium's environments "
                "there are GymnasiumEnv and from_gymnasium"
            )
        check_action_space(env.action_space, where=self.name)
        inner = env
        while hasattr(inner, "venv"):
            inner = inner.venv
        try:
            singles = inner.envs
        except AttributeError:  # in processes
            singles = []
        self._bordered = bool(singles) and all(isinstance(each, gymnasium.Env) for each in singles)
        if self._bordered:
            put_borders(singles)
        self._reused = ReusedArrays(self.name)
        self._checked = False
        self.env = env
        self.num_envs: int = env.num_envs
        self.device = check_device(device)
        self.single_action_space = env.action_space
        self.single_observation_space = float32_space(env.observation_space, where=self.name)
        self.autoreset_mode = AutoresetMode.SAME_STEP
        self.provides_final_obs = True
        self._obs = batch_buffer(self.single_observation_space, self.num_envs, self.device)
        self._final_obs = batch_buffer(self.single_observation_space, self.num_envs, self.device)
        self._reward = torch.zeros(self.num_envs, device=self.device)
        self._terminated = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)
        self._truncated = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)

    def reset(self, seed: int | None = None, mask: Tensor | None = None) -> Tree:
        """Start episodes in every copy.

        Raises:
            ValueError: a ``mask``; a ``VecEnv`` resets all copies or none. Or observations of another shape than the
                space has.
        """
        if mask is not None:
            raise ValueError(f"{self.name}: an SB3 VecEnv cannot reset single copies; call reset() without a mask")
        if seed is not None:
            self.env.seed(copy_seeds(seed, 1)[0])  # SB3 counts on from it: neighbouring seeds would share copies
        obs = self.env.reset()
        check_batch(self._obs, obs, where=self.name)
        store(self._obs, obs)
        return self._obs

    def step(self, action: Tensor) -> StepResult:
        """See :class:`ccrl.batched_env.BatchedEnv`.

        Raises:
            ValueError: an action of another shape or kind.
            RuntimeError: an episode's end without its last observation.
        """
        self.env.step_async(action_array(action, self.single_action_space, self.num_envs, where=self.name))
        result = self.env.step_wait()
        if not self._checked:
            self._check(result)
        obs, reward, done, infos = result
        truncated = np.zeros(self.num_envs, dtype=bool)
        for row in np.flatnonzero(done):
            truncated[row] = infos[row].get("TimeLimit.truncated", False)
            if "terminal_observation" not in infos[row]:
                raise RuntimeError(
                    f"{self.name}: expected infos[{row}]['terminal_observation'] at an episode's end, as SB3's VecEnvs "
                    f"have it, got {sorted(infos[row])}"
                )
            store(self._final_obs, infos[row]["terminal_observation"], int(row))
        store(self._obs, obs)
        if not self._bordered and np.any(done):
            self._reused.check(self._obs, self._final_obs, np.flatnonzero(done))
        store(self._reward, reward)
        store(self._terminated, np.asarray(done, dtype=bool) & ~truncated)
        store(self._truncated, truncated)
        return StepResult(self._obs, self._reward, self._terminated, self._truncated, self._final_obs)

    def _check(self, result: Any) -> None:
        """Raises:
        ValueError: in the first step, arrays that would be broadcast or cast without a word.
        """
        if not isinstance(result, tuple) or len(result) != 4:
            got = f"{len(result)} values" if isinstance(result, tuple) else type(result).__name__
            raise ValueError(f"{self.name}: expected (obs, rewards, dones, infos) from step_wait(), got {got}")
        check_arrays(f"{self.name}, step_wait()", self.num_envs, {"rewards": result[1]}, {"dones": result[2]})
        self._checked = True

    def close(self) -> None:
        """Close the environment and its processes."""
        self.env.close()


def as_vec_env(env: BatchedEnv) -> Any:
    """``env`` as an SB3 ``VecEnv``, so that SB3's algorithms train on it. Each finished episode is reported as
    ``infos[i]["episode"] = {"r": return, "l": length, "t": seconds}``, as SB3's ``Monitor`` does.

    Raises:
        ImportError: SB3 is not installed.
        ValueError: an environment that is not in ``SAME_STEP`` mode with ``final_obs``.
    """
    require("stable_baselines3", "sb3")
    from ccrl.adapters.sb3_export import BatchedVecEnv

    return BatchedVecEnv(env)
