"""Whole episodes of a controller or an agent as a data set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

from ccrl.batched_env import AutoresetMode, BatchedEnv
from ccrl.offline import Dataset, from_arrays
from ccrl.policies import RandomActor
from ccrl.seeding import named_generator, stream_seed
from ccrl.torch_env import TorchEnv

__all__ = ["Act", "collect", "mean_return", "uniform"]

Act = Callable[[Tensor], Tensor]


def collect(
    env: BatchedEnv,
    act: Act,
    steps: int,
    seed: int,
    name: str,
    restart: Callable[[Tensor | None], None] | None = None,
) -> Dataset:
    """Whole episodes of at least ``steps`` transitions, episode after episode.

    What was executed is stored: actions are clipped to the space. Episodes that are under way when there are enough
    are left out, and how many is printed. ``restart(first [N] | None)`` tells a policy with a memory where episodes
    begin.
    """
    if env.autoreset_mode != AutoresetMode.SAME_STEP:
        raise ValueError(f"{name}: expected an environment that resets in the same step, got {env.autoreset_mode}")
    space: Any = env.single_action_space
    if isinstance(env.single_observation_space, gymnasium.spaces.Dict):
        raise ValueError(f"{name}: expected observations of one array, got {env.single_observation_space}")
    obs, kept = env.reset(seed=stream_seed(seed, "data set: environment")), 0
    now: list[list[tuple[Any, ...]]] = [[] for _ in range(env.num_envs)]
    done: list[list[tuple[Any, ...]]] = []
    if restart is not None:
        restart(None)
    with torch.no_grad():
        while kept < steps:
            action = act(obs)  # type: ignore[arg-type]
            if isinstance(space, gymnasium.spaces.Box):
                action = action.clamp(*(torch.as_tensor(x).to(action) for x in (space.low, space.high)))
            before = np.array(obs.cpu().numpy())  # type: ignore[union-attr]  # the step may overwrite it
            result = env.step(action)
            ended = result.terminated | result.truncated
            parts = (
                action,
                result.reward,
                # rows of final_obs hold a successor only where an episode ended
                torch.where(ended.view(-1, *(1,) * (before.ndim - 1)), result.final_obs, result.obs),  # type: ignore[arg-type]
                result.terminated,
                result.truncated & ~result.terminated,
            )
            columns = [before, *(np.array(x.cpu().numpy()) for x in parts)]
            for i in range(env.num_envs):
                now[i].append(tuple(c[i] for c in columns))
                if columns[4][i] or columns[5][i]:
                    done.append(now[i])
                    kept += len(now[i])
                    now[i] = []
            if restart is not None:
                restart(ended)
            obs = result.obs
    if begun := [len(e) for e in now if e]:
        print(f"[ccrl] {name}: left out {len(begun)} episodes ({sum(begun):,} transitions) that were under way in the "
              "other copies: where episodes differ in length, short ones are too many (fewer num_envs, or more steps)",
              flush=True)  # fmt: skip
    names = ("obs", "action", "reward", "next_obs", "terminated", "truncated")
    flat = {k: np.stack([row[j] for e in done for row in e]) for j, k in enumerate(names)}
    return from_arrays(flat | {"episode": np.repeat(np.arange(len(done)), [len(e) for e in done])}, name)


def uniform(env: BatchedEnv, seed: int) -> Act:
    """Uniform random actions."""
    generator = named_generator(seed, "data set: random actions")

    class Plain:
        distribution = None

        def to_env(self, action: Tensor) -> Tensor:
            return action

    actor = RandomActor(env.single_action_space, Plain())
    return lambda obs: actor.act(obs, actor.draw_noise(len(obs), generator, env.device))["action"]


def mean_return(env: TorchEnv, act: Act, seed: int) -> float:
    """The mean return of one episode per copy; episodes end by the time limit alone."""
    obs, total = env.reset(seed=stream_seed(seed, "data set: reference")), torch.zeros(env.num_envs)
    for _ in range(env.max_episode_steps or 0):
        result = env.step(act(obs))  # type: ignore[arg-type]
        obs, total = result.obs, total + result.reward
    return float(total.mean())
