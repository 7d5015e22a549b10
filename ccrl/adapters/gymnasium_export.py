"""A :class:`ccrl.batched_env.BatchedEnv` as a Gymnasium environment, with NumPy arrays in and out."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from ccrl.adapters.spaces import to_numpy
from ccrl.batched_env import AutoresetMode, BatchedEnv

__all__ = ["SingleEnv", "TorchVectorEnv", "as_vector_env"]


_RENDERING = {"render_modes": ["rgb_array"], "render_fps": 30}


class TorchVectorEnv(VectorEnv[Any, Any, Any]):  # type: ignore[misc]
    """The adapter behind :func:`as_vector_env`."""

    def __init__(self, env: BatchedEnv, render_mode: str | None = None) -> None:
        self.env = env
        self.num_envs = env.num_envs
        self.metadata = {"autoreset_mode": env.autoreset_mode, **_RENDERING}
        self.render_mode = _checked(render_mode)
        self.single_observation_space = env.single_observation_space
        self.single_action_space = env.single_action_space
        self.observation_space = batch_space(env.single_observation_space, env.num_envs)
        self.action_space = batch_space(env.single_action_space, env.num_envs)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """``options={"reset_mask": bool array [N]}`` resets only these copies."""
        mask = None if options is None else options.get("reset_mask")
        return to_numpy(self.env.reset(seed, None if mask is None else self._tensor(mask))), {}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Gymnasium's five values; ``infos["final_obs"]`` and its mask ``"_final_obs"`` when an episode ended."""
        result = self.env.step(self._tensor(actions))
        terminated, truncated = to_numpy(result.terminated), to_numpy(result.truncated)
        infos: dict[str, Any] = {}
        done = terminated | truncated
        if result.final_obs is not None and done.any():
            final = np.full(self.num_envs, None, dtype=object)
            rows = to_numpy(result.final_obs)
            for index in np.flatnonzero(done):
                final[index] = _row(rows, int(index))
            # `final_info` is empty but present: Gymnasium's own statistics wrapper looks into it.
            infos = {"final_obs": final, "_final_obs": done, "final_info": {}, "_final_info": done.copy()}
        return to_numpy(result.obs), to_numpy(result.reward), terminated, truncated, infos

    def render(self) -> tuple[Any, ...] | None:
        """The pictures of all copies with ``render_mode="rgb_array"``, else ``None``."""
        if self.render_mode is None:
            return None
        return tuple(self.env.render(i) for i in range(self.num_envs))  # type: ignore[attr-defined]

    def close_extras(self, **kwargs: Any) -> None:
        self.env.close()

    def _tensor(self, array: Any) -> Tensor:
        return torch.as_tensor(np.asarray(array)).to(self.env.device)


def as_vector_env(env: BatchedEnv, render_mode: str | None = None) -> TorchVectorEnv:
    """``env`` as a ``gymnasium.vector.VectorEnv``, in the same autoreset mode; ``render_mode`` is ``None`` or
    ``"rgb_array"`` (``ValueError`` for others)."""
    return TorchVectorEnv(env, render_mode)


class SingleEnv(gymnasium.Env[Any, Any]):  # type: ignore[misc]
    """A ``BatchedEnv`` with one copy and autoreset ``DISABLED`` as a single Gymnasium environment.

    Args:
        env: the environment; ``render(0)`` is used when it has that method.
        render_mode: ``None`` or ``"rgb_array"``.

    Raises:
        ValueError: more than one copy, autoreset, or another ``render_mode``.
    """

    metadata = _RENDERING

    def __init__(self, env: BatchedEnv, render_mode: str | None = None) -> None:
        if env.num_envs != 1 or env.autoreset_mode != AutoresetMode.DISABLED:
            raise ValueError(
                f"expected one copy with AutoresetMode.DISABLED, got num_envs={env.num_envs} and {env.autoreset_mode}"
            )
        self.env = env
        self.observation_space = env.single_observation_space
        self.action_space = env.single_action_space
        self.render_mode = _checked(render_mode)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode; ``options`` is not used."""
        super().reset(seed=seed)
        return _row(to_numpy(self.env.reset(seed)), 0), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One step with one action."""
        result = self.env.step(torch.as_tensor(np.asarray(action))[None].to(self.env.device))
        obs = _row(to_numpy(result.obs), 0)
        return obs, float(result.reward[0]), bool(result.terminated[0]), bool(result.truncated[0]), {}

    def render(self) -> Any:
        """The current picture with ``render_mode="rgb_array"``, else ``None``."""
        return self.env.render(0) if self.render_mode == "rgb_array" else None  # type: ignore[attr-defined]

    def close(self) -> None:
        self.env.close()


def _row(tree: Any, index: int) -> Any:
    return {key: leaf[index] for key, leaf in tree.items()} if isinstance(tree, dict) else tree[index]


def _checked(render_mode: str | None) -> str | None:
    if render_mode not in (None, "rgb_array"):
        raise ValueError(f"render_mode: expected None or 'rgb_array', got {render_mode!r}; these have no window")
    return render_mode
