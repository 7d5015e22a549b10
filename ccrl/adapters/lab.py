"""Isaac Lab (3.0) and mjlab (1.6) environments as a :class:`ccrl.batched_env.BatchedEnv`; nothing of them is imported.

Both are one object that is batched inside, with torch tensors on its own device. What the adapter settles:

* Observations are groups: ``policy`` (mjlab: ``actor``), ``critic`` and others. A group of vectors that comes in parts
  is concatenated in the order it has them; parts with more axes stay apart, as ``group/part``.
* ``terminated`` wins over ``truncated``; with ``cfg.is_finite_horizon`` time-outs are terminations.
* Isaac Lab resets within the step and, with ``cfg.compute_final_obs``, shows the true successor. mjlab does with
  ``cfg.auto_reset = False``, where the collector asks for the resets.
* They draw from, and seed, the global random streams: each keeps its own, swapped in around every call.
* ``extras["log"]`` holds what the last reset wrote until the next one: it is passed on once.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
import torch
from gymnasium.spaces import Box, Dict
from torch import Tensor

from ccrl.batched_env import AutoresetMode, StepResult, Tree

__all__ = ["LabEnv", "streams_kept"]

ACTOR_GROUPS = ("policy", "actor")


class LabEnv:
    """One simulation of ``env.num_envs`` copies.

    :param env: what ``gymnasium.make(task, cfg=cfg)`` (Isaac Lab) or ``ManagerBasedRlEnv(cfg, device)`` (mjlab) made.
    :param clip_actions: half width of a clip of the actions; None: none, as rsl_rl.
    :param random_ages: training begins in the middle of episodes (``randomise_ages``).
    :param on_close: called once the last user of the simulation has closed it.
    :raises ValueError: an action space that is no Box, or ``clip_actions`` that is not above 0.
    """

    def __init__(
        self,
        env: Any,
        *,
        clip_actions: float | None = None,
        random_ages: bool = True,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        if clip_actions is not None and not clip_actions > 0.0:
            raise ValueError(f"clip_actions: expected a number above 0 or None, got {clip_actions}")
        own = getattr(env, "unwrapped", env)
        self.num_envs, self.device = int(own.num_envs), torch.device(own.device)
        self._sim = _Simulation(env, own, self.device, on_close)
        self._clip, self._ages, self._closed = clip_actions, random_ages, False
        cfg = own.cfg
        self._finite = bool(getattr(cfg, "is_finite_horizon", False))
        manual = not getattr(cfg, "auto_reset", True)
        self.autoreset_mode = AutoresetMode.DISABLED if manual else AutoresetMode.SAME_STEP
        self.provides_final_obs = bool(getattr(cfg, "compute_final_obs", False)) and not manual
        self.single_action_space = _action_space(own.single_action_space, clip_actions)
        # what observations look like is read from one: mjlab has space classes of its own, and the declared groups of
        # Isaac Lab's Direct tasks differ from those that come
        obs = _groups(self._sim.call(env.reset)[0])
        self._keys = sorted(obs, key=lambda k: (k.split("/")[0] not in ACTOR_GROUPS, k.split("/")[0]))
        spaces = {k: _space(obs[k]) for k in self._keys}
        self._single = len(spaces) == 1
        self.single_observation_space: Box | Dict = spaces[self._keys[0]] if self._single else Dict(spaces)
        self._final: Tree = _map(torch.clone, self._tree(obs))
        self._obs: Tree | None = None
        self._wrote: dict[str, Any] = {}
        self._over = torch.zeros(2, self.num_envs, dtype=torch.bool, device=self.device)

    @property
    def unwrapped(self) -> Any:
        """The simulator's own object."""
        return self._sim.own

    def share(self) -> Self:
        """Another user of the same simulation, for evaluation where a process can hold only one. Whoever resets it
        has it; the other one is ``interrupted`` until it resets again."""
        other = object.__new__(type(self))
        own = {"_obs": None, "_ages": False, "_over": torch.zeros_like(self._over), "_closed": False}
        other.__dict__ |= self.__dict__ | own
        self._sim.users += 1
        return other

    @property
    def interrupted(self) -> bool:
        """Another user has moved the simulation on: the episodes seen here are gone."""
        return self._obs is not None and self._sim.current is not self

    def randomise_ages(self) -> None:
        """Let every copy be in the middle of an episode, by its clock alone: else all time limits of a training would
        come at the same step. Training does it once, at its beginning."""
        if self._ages:
            self._sim.call(self._draw_ages)

    def _draw_ages(self) -> None:
        own = self._sim.own
        own.episode_length_buf = torch.randint_like(own.episode_length_buf, high=int(own.max_episode_length))

    def reset(self, seed: int | None = None, mask: Tensor | None = None) -> Tree:
        """See ``BatchedEnv``; ``mask`` only where ``auto_reset`` is off."""
        if mask is None:
            self._sim.current = self
            self._obs = self._tree(_groups(self._sim.call(self._sim.env.reset, seed=seed)[0]))
            self._over.zero_()
            return self._obs
        if self.autoreset_mode != AutoresetMode.DISABLED:
            raise ValueError(f"reset: mask needs AutoresetMode.DISABLED, this one has {self.autoreset_mode}")
        assert self._obs is not None, "reset everything before some of it"
        if bool(mask.any()):
            rows = mask.nonzero().squeeze(-1)
            old = _map(torch.clone, self._obs)  # the reset may write the very buffers
            obs, extras = self._sim.call(self._sim.env.reset, env_ids=rows)
            self._wrote = self._sim.fresh_log(extras)
            new = self._tree(_groups(obs))
            self._obs = _where(mask, new, old)  # noise is drawn anew for the others, too
            self._over &= ~mask
        return self._obs

    def step(self, action: Tensor) -> StepResult:
        """See ``BatchedEnv``.

        :raises ValueError: actions of another shape.
        :raises RuntimeError: another user of the simulation has it.
        """
        expected = (self.num_envs, *self.single_action_space.shape)
        if tuple(action.shape) != expected:
            raise ValueError(f"action: expected shape {expected}, got {tuple(action.shape)}")
        if self._sim.current is not self:
            raise RuntimeError("step: another user has the simulation (or nobody): reset it first")
        if self._clip is not None:
            action = action.clamp(-self._clip, self._clip)
        obs, reward, terminated, truncated, extras = self._sim.call(self._sim.env.step, action)
        terminated, truncated = terminated.bool(), truncated.bool()
        if self._finite:
            terminated, truncated = terminated | truncated, torch.zeros_like(truncated)
        reward = reward.float()
        if self.autoreset_mode == AutoresetMode.DISABLED:
            # they do not wait: a copy that was not reset went on
            over = self._over.any(0)
            reward = reward.masked_fill(over, 0.0)
            terminated, truncated = (torch.where(over, old, x) for x, old in zip((terminated, truncated), self._over))
            self._over = torch.stack([terminated, truncated])
        self._obs = self._tree(_groups(obs))
        final = None
        if self.provides_final_obs:
            # of all rows; those that are not over are left from an earlier step
            final = self._tree(_groups(extras["final_obs"])) if "final_obs" in extras else self._final
        # a reset that was asked for is logged with the step after it
        log, self._wrote = self._wrote | self._sim.fresh_log(extras), {}
        return StepResult(self._obs, reward, terminated, truncated, final, log)

    def close(self) -> None:
        """Close the simulation, if this is its last user; again: nothing."""
        if not self._closed:
            self._closed = True
            self._sim.close()

    def _tree(self, groups: Mapping[str, Tensor]) -> Tree:
        leaves = {k: x.float() if x.is_floating_point() else x for k, x in groups.items()}
        return leaves[self._keys[0]] if self._single else {k: leaves[k] for k in self._keys}


@contextmanager
def streams_kept(device: torch.device) -> Iterator[None]:
    """The global random streams (Python, NumPy, torch, the device) are afterwards what they were."""
    saved = _streams(device)
    try:
        yield
    finally:
        _restore(saved, device)


def _streams(device: torch.device) -> Any:
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda  # noqa: NPY002


def _restore(streams: Any, device: torch.device) -> None:
    random.setstate(streams[0])
    np.random.set_state(streams[1])  # noqa: NPY002
    torch.set_rng_state(streams[2])
    if streams[3] is not None:
        torch.cuda.set_rng_state(streams[3], device)


class _Simulation:
    """The simulator's object, its random streams, and who uses it."""

    def __init__(self, env: Any, own: Any, device: torch.device, on_close: Callable[[], None] | None) -> None:
        self.env, self.own, self.on_close = env, own, on_close
        self.users = 1
        self.current: LabEnv | None = None
        self._device = device
        self._inside: Any = None
        self._log: Mapping[str, Any] = {}
        self._seen: dict[str, tuple[Any, int]] = {}
        seed = int(getattr(own.cfg, "seed", None) or 0)
        self.call(self._seed, seed)  # its constructor has left the global streams wherever it stopped

    @staticmethod
    def _seed(seed: int) -> None:
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002  (the global stream is what it draws from)
        torch.manual_seed(seed)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A call with the simulator's random streams in place of the caller's. What it makes are ordinary tensors, also
        under ``inference_mode``: others have no version, by which ``fresh_log`` tells that they were written."""
        with streams_kept(self._device), torch.inference_mode(False), torch.no_grad():
            if self._inside is not None:
                _restore(self._inside, self._device)
            args = tuple(x.clone() if isinstance(x, Tensor) and x.is_inference() else x for x in args)
            try:
                return function(*args, **kwargs)
            finally:
                self._inside = _streams(self._device)

    def fresh_log(self, extras: Mapping[str, Any]) -> dict[str, Any]:
        """The scalars that this step wrote; empty where it wrote none. Told by identity, so without asking the device
        whether an episode ended: a new mapping, a new value, or one that was written in place."""
        log = extras.get("log") or {}
        scalars = {
            k: v for k, v in log.items() if isinstance(v, int | float) or (isinstance(v, Tensor) and v.ndim == 0)
        }
        seen = {k: (v, v._version if isinstance(v, Tensor) else 0) for k, v in scalars.items()}
        old = self._seen
        same = log is self._log and seen.keys() == old.keys()
        if same and all(v is old[k][0] and version == old[k][1] for k, (v, version) in seen.items()):
            return {}
        self._log, self._seen = log, seen
        return {k: v.clone() if isinstance(v, Tensor) else v for k, v in scalars.items()}

    def close(self) -> None:
        self.users -= 1
        if self.users == 0:
            self.env.close()
            if self.on_close is not None:
                self.on_close()


def _groups(obs: Mapping[str, Any]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, group in obs.items():
        if isinstance(group, Tensor):
            found[name] = group
        elif all(part.ndim == 2 and part.is_floating_point() for part in group.values()):
            found[name] = torch.cat(list(group.values()), -1)
        else:
            found |= {f"{name}/{part}": x for part, x in group.items()}
    return found


def _space(x: Tensor) -> Box:
    shape = tuple(x.shape[1:])
    if x.dtype == torch.uint8:
        return Box(0, 255, shape, np.uint8)
    return Box(-np.inf, np.inf, shape, np.float32)


def _action_space(space: Any, clip: float | None) -> Box:
    """A Box with the same bounds, from any class that has them."""
    if not (hasattr(space, "shape") and (hasattr(space, "low") or type(space).__name__ == "Box")):
        raise ValueError(f"action space: expected a Box, got {space}; this adapter takes continuous actions")
    shape = tuple(space.shape)
    low, high = (
        np.broadcast_to(np.asarray(getattr(space, name, unbounded), np.float32), shape).copy()
        for name, unbounded in (("low", -np.inf), ("high", np.inf))
    )
    if clip is not None:
        low, high = np.maximum(low, -clip), np.minimum(high, clip)
    return Box(low.astype(np.float32), high.astype(np.float32), dtype=np.float32)


def _map(function: Callable[[Tensor], Tensor], tree: Tree) -> Tree:
    return {k: function(x) for k, x in tree.items()} if isinstance(tree, dict) else function(tree)


def _where(mask: Tensor, new: Tree, old: Tree) -> Tree:
    if isinstance(new, dict):
        assert isinstance(old, dict)
        return {k: torch.where(mask.view(-1, *(1,) * (x.ndim - 1)), x, old[k]) for k, x in new.items()}
    assert isinstance(old, Tensor)
    return torch.where(mask.view(-1, *(1,) * (new.ndim - 1)), new, old)
