"""A :class:`ccrl.batched_env.BatchedEnv` as an SB3 ``VecEnv``. Importing this module needs SB3."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.vec_env import VecEnv

from ccrl.adapters.spaces import to_numpy
from ccrl.batched_env import AutoresetMode, BatchedEnv, StepResult

__all__ = ["BatchedVecEnv"]


class BatchedVecEnv(VecEnv):  # type: ignore[misc]  # SB3 is optional, so its classes are untyped here
    """The adapter behind :func:`ccrl.adapters.as_vec_env`."""

    def __init__(self, env: BatchedEnv) -> None:
        if env.autoreset_mode != AutoresetMode.SAME_STEP or not env.provides_final_obs:
            raise ValueError(
                f"an SB3 VecEnv resets in the same step and reports the last observation: expected "
                f"AutoresetMode.SAME_STEP with final_obs, got {env.autoreset_mode} and "
                f"provides_final_obs={env.provides_final_obs}"
            )
        self.env = env
        self.render_mode: str | None = "rgb_array" if hasattr(env, "render") else None
        self._result: StepResult | None = None
        self._start = time.time()
        self._returns = np.zeros(env.num_envs)
        self._lengths = np.zeros(env.num_envs, dtype=np.int64)
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> Any:
        obs = to_numpy(self.env.reset(self._seeds[0]))
        self._reset_seeds()
        self._returns[:] = 0.0
        self._lengths[:] = 0
        return obs

    def step_async(self, actions: Any) -> None:
        self._result = self.env.step(torch.as_tensor(np.asarray(actions)).to(self.env.device))

    def step_wait(self) -> tuple[Any, Any, Any, list[dict[str, Any]]]:
        assert self._result is not None, "call step_async() before step_wait()"
        result, self._result = self._result, None
        reward, terminated = to_numpy(result.reward), to_numpy(result.terminated)
        done = terminated | to_numpy(result.truncated)
        self._returns += reward
        self._lengths += 1
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        if done.any():
            assert result.final_obs is not None
            final = to_numpy(result.final_obs)
            seconds = round(time.time() - self._start, 6)
            for row in np.flatnonzero(done):
                episode = {"r": float(self._returns[row]), "l": int(self._lengths[row]), "t": seconds}
                last = {key: leaf[row] for key, leaf in final.items()} if isinstance(final, dict) else final[row]
                infos[row] = {
                    "episode": episode,
                    "terminal_observation": last,
                    "TimeLimit.truncated": not bool(terminated[row]),
                }
            self._returns[done] = 0.0
            self._lengths[done] = 0
        return to_numpy(result.obs), reward, done, infos

    def close(self) -> None:
        self.env.close()

    def get_images(self) -> list[Any]:
        render = getattr(self.env, "render", None)
        return [None if render is None else render(row) for row in range(self.num_envs)]

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        owner = self if attr_name == "render_mode" else self.env
        return [getattr(owner, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise AttributeError(f"the copies share their attributes; set {attr_name!r} on the batched environment")

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        raise AttributeError(
            f"the copies have no methods of their own; call {method_name!r} on the batched environment"
        )

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        # The episode statistics of `Monitor` are built in; saying so keeps SB3 from warning that they are missing.
        from stable_baselines3.common.monitor import Monitor

        return [wrapper_class is Monitor for _ in self._get_indices(indices)]
