"""The base of batched wrappers that pay another reward: which rows belong to which episode, once for all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ccrl.batched_env import AutoresetMode, BatchedEnv, StepResult, Tree, resume_note
from ccrl.data import tree_map

__all__ = ["RewardWrapper"]


class RewardWrapper:
    """A :class:`ccrl.batched_env.BatchedEnv` around another one, with a reward of its own.

    A subclass fills in :meth:`begin` and :meth:`pay`, and keeps what spans an episode in ``self.memory``, a flat dict
    of tensors ``[N, ...]`` that is saved with the environment.

    Raises:
        ValueError: an environment that resets within ``step`` and hides the last observation of an episode, of which
            the reward of its last step is a function.
    """

    def __init__(self, env: BatchedEnv) -> None:
        hidden = env.autoreset_mode == AutoresetMode.SAME_STEP and not env.provides_final_obs
        if hidden:
            raise ValueError(
                f"{type(self).__name__}: expected an environment that returns final_obs, got {type(env).__name__}, "
                "which does not; use another autoreset mode"
            )
        self.env, self.num_envs, self.device = env, env.num_envs, torch.device(env.device)
        self.single_observation_space, self.single_action_space = env.single_observation_space, env.single_action_space
        self.autoreset_mode, self.provides_final_obs = env.autoreset_mode, env.provides_final_obs
        self.max_episode_steps: int | None = getattr(env, "max_episode_steps", None)
        self.memory: dict[str, Tensor] = {}
        self._obs: Tree | None = None
        self._ended = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)

    # What a subclass fills in.

    def begin(self, obs: Tree, where: Tensor) -> None:
        """Episodes begin with ``obs`` ``[N, ...]`` in the rows ``where`` ``[N]`` bool."""

    def pay(self, obs: Tree, action: Tensor, successor: Tree, reward: Tensor, live: Tensor) -> Tensor:
        """The reward ``[N]`` of a step, in place of the environment's.

        Args:
            obs: before the step.
            action: of the step.
            successor: the true successor, also where the episode ended.
            reward: what the environment paid.
            live: rows ``[N]`` bool that took a step; the others (dummy steps, finished copies) must change no memory.
        """
        raise NotImplementedError

    def log(self, done: Tensor) -> dict[str, Any]:
        """Scalars for the logger, asked for after every step; ``done`` ``[N]``: episodes that ended in it."""
        return {}

    # The protocol.

    def reset(self, seed: int | None = None, mask: Tensor | None = None) -> Tree:
        """As the environment's."""
        obs = self.env.reset(seed=seed, mask=mask)
        where = torch.ones_like(self._ended) if mask is None else mask
        self.begin(obs, where)
        self._ended = self._ended & ~where
        # copied: environments may hand out buffers that the next step overwrites
        self._obs = tree_map(torch.clone, obs)
        return obs

    def step(self, action: Tensor) -> StepResult:
        """As the environment's, with another reward.

        Raises:
            RuntimeError: no reset yet.
        """
        if self._obs is None:
            raise RuntimeError(f"{type(self).__name__}: call reset() before step()")
        result = self.env.step(action)
        live, done = ~self._ended, result.terminated | result.truncated
        successor = result.obs
        if result.final_obs is not None:
            successor = where_rows(done, result.final_obs, result.obs)
        reward = self.pay(self._obs, action, successor, result.reward, live)
        reward = torch.where(live, reward, torch.zeros_like(reward)).to(result.reward.dtype)
        log = self.log(done & live)
        if self.autoreset_mode == AutoresetMode.SAME_STEP:
            self.begin(result.obs, done)
        else:
            if self.autoreset_mode == AutoresetMode.NEXT_STEP:
                self.begin(result.obs, self._ended)
            self._ended = done.clone()
        self._obs = tree_map(torch.clone, result.obs)
        return result._replace(reward=reward, log=result.log | log)

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    @property
    def resume_note(self) -> str | None:
        """Why the state cannot be had; ``None``: it can."""
        return resume_note(self.env)

    def state_dict(self) -> dict[str, Any]:
        """The environment's state, and what spans its episodes.

        Raises:
            RuntimeError: no reset yet.
        """
        if self._obs is None:
            raise RuntimeError(f"{type(self).__name__}: there is no state before the first reset()")
        return {
            "env": self.env.state_dict(),  # type: ignore[attr-defined]
            "obs": tree_map(torch.clone, self._obs),
            "ended": self._ended.clone(),
            "memory": {name: value.clone() for name, value in self.memory.items()},
        }

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Continue from ``state_dict()`` of the same wrapper around an environment of the same task and size."""
        self.env.load_state_dict(values["env"])  # type: ignore[attr-defined]
        self._obs = tree_map(lambda x: x.to(self.device, copy=True), values["obs"])
        self._ended = values["ended"].to(self.device, copy=True)
        self.memory = {name: value.to(self.device, copy=True) for name, value in values["memory"].items()}


def where_rows(mask: Tensor, chosen: Tree, other: Tree) -> Tree:
    """``chosen`` in the rows ``mask`` ``[N]``, ``other`` elsewhere."""
    if isinstance(chosen, dict):
        assert isinstance(other, dict)
        return {name: where_rows(mask, value, other[name]) for name, value in chosen.items()}  # type: ignore[misc]
    assert isinstance(other, Tensor)
    return torch.where(mask.view(-1, *[1] * (chosen.dim() - 1)), chosen, other)
