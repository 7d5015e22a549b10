"""Several batched environments of one task as one, reset with ONE seed: groups of episodes from equal starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ccrl.batched_env import BatchedEnv, StepResult, Tree, resume_note
from ccrl.stream import note

__all__ = ["StackedEnv"]


class StackedEnv:
    """``len(parts)`` environments of ``n`` copies each as one of ``len(parts) * n``.

    Copy ``i`` is copy ``i % n`` of part ``i // n``. ``reset(seed=s)`` gives every part the same seed, so that copies
    ``i`` and ``i + n`` start in the same state (and see the same noise, where the dynamics have some).

    :raises ValueError: without parts, or with parts of different spaces, sizes, devices or autoreset modes.
    """

    def __init__(self, parts: Sequence[BatchedEnv]) -> None:
        if not parts:
            raise ValueError("StackedEnv: expected at least one environment, got none")
        names = ("num_envs", "device", "single_observation_space", "single_action_space", "autoreset_mode",
                 "provides_final_obs")  # fmt: skip
        first = parts[0]
        for name in names:
            values = [getattr(part, name) for part in parts]
            if any(value != values[0] for value in values):
                raise ValueError(f"StackedEnv: expected environments of one task, got {name} = {values}")
        self.parts, self.num_envs = list(parts), first.num_envs * len(parts)
        self.device, self.autoreset_mode = torch.device(first.device), first.autoreset_mode
        self.provides_final_obs = first.provides_final_obs
        self.single_observation_space = first.single_observation_space
        self.single_action_space = first.single_action_space
        limits: list[Any] = [getattr(part, "max_episode_steps", None) for part in parts]
        self.max_episode_steps: int | None = None if None in limits else max(limits)
        """The longest time limit of a part; None: one has none, or does not tell."""

    def reset(self, seed: int | None = None, mask: Tensor | None = None) -> Tree:
        masks = [None] * len(self.parts) if mask is None else mask.chunk(len(self.parts))
        return _join([part.reset(seed=seed, mask=m) for part, m in zip(self.parts, masks)])

    def step(self, action: Tensor) -> StepResult:
        rows = [part.step(a) for part, a in zip(self.parts, action.chunk(len(self.parts)))]
        finals, log = [row.final_obs for row in rows], dict[str, Any]()
        counts: dict[str, Any] = {}
        for row in rows:
            note(row.log, log, counts)
        return StepResult(
            _join([row.obs for row in rows]), torch.cat([row.reward for row in rows]),
            torch.cat([row.terminated for row in rows]), torch.cat([row.truncated for row in rows]),
            None if any(f is None for f in finals) else _join(finals), log,  # type: ignore[arg-type]
        )  # fmt: skip

    def close(self) -> None:
        for part in self.parts:
            part.close()

    @property
    def resume_note(self) -> str | None:
        """Why the state of a part cannot be had, ``None`` where all can."""
        return next((note for note in map(resume_note, self.parts) if note is not None), None)

    def state_dict(self) -> dict[str, Any]:
        """States of all parts; ``AttributeError`` where the environment has none."""
        return {str(i): part.state_dict() for i, part in enumerate(self.parts)}  # type: ignore[attr-defined]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for i, part in enumerate(self.parts):
            part.load_state_dict(state[str(i)])  # type: ignore[attr-defined]


def _join(trees: Sequence[Tree]) -> Tree:
    first = trees[0]
    if isinstance(first, dict):
        return {key: torch.cat([tree[key] for tree in trees]) for key in first}  # type: ignore[index]
    return torch.cat(list(trees))  # type: ignore[arg-type]
