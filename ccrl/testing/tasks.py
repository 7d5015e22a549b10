"""Tiny tasks that only one kind of policy solves: with a memory, with convolutions, with factored actions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from ccrl.torch_env import TorchEnv

__all__ = ["FactorTask", "PixelTask", "RecallTask"]


class RecallTask(TorchEnv):
    """Two steps: the first observation shows a cue, -1 or 1; the second does not, and its action must name the cue.

    The return is 1 for the right action; whatever a policy without a memory does, its mean is 0.5. Observations are
    ``[cue or 0, step]``; the first action does nothing.
    """

    id = "RecallTask"
    single_observation_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
    single_action_space = spaces.Discrete(2)

    def initial(self, generator: torch.Generator, n: int) -> dict[str, Tensor]:
        cue = torch.randint(2, (n,), generator=generator, device=self.device)
        return {"cue": cue, "step": torch.zeros_like(cue)}

    def transition(self, state: Any, action: Tensor, noise: Any) -> tuple[Any, Tensor, Tensor]:
        asked = state["step"] == 1
        right = (action == state["cue"]) & asked
        return {"cue": state["cue"], "step": state["step"] + 1}, right.float(), asked

    def observe(self, state: Any) -> Tensor:
        shown = torch.where(state["step"] == 0, 2 * state["cue"] - 1, 0)
        return torch.stack([shown, state["step"].clamp_max(1)], -1).float()


class PixelTask(TorchEnv):
    """One step: a 3 x 3 square lies somewhere in a 16 x 16 image of dim noise; the action names its quadrant.

    The return is 1 for the right one of four. Observations are uint8 ``[1, 16, 16]``.
    """

    id = "PixelTask"
    single_observation_space = spaces.Box(0, 255, (1, 16, 16), np.uint8)
    single_action_space = spaces.Discrete(4)

    def initial(self, generator: torch.Generator, n: int) -> dict[str, Tensor]:
        quadrant = torch.randint(4, (n,), generator=generator, device=self.device)
        place = torch.randint(6, (n, 2), generator=generator, device=self.device)
        noise = torch.randint(64, (n, 16, 16), generator=generator, device=self.device, dtype=torch.uint8)
        corner = place + 8 * torch.stack([quadrant // 2, quadrant % 2], -1)
        grid = torch.arange(16, device=self.device)
        rows, columns = ((grid >= c.unsqueeze(-1)) & (grid < c.unsqueeze(-1) + 3) for c in corner.unbind(-1))
        square = rows.unsqueeze(-1) & columns.unsqueeze(-2)
        return {"quadrant": quadrant, "image": torch.where(square, 255, noise).unsqueeze(1)}

    def transition(self, state: Any, action: Tensor, noise: Any) -> tuple[Any, Tensor, Tensor]:
        return state, (action == state["quadrant"]).float(), torch.ones_like(action, dtype=torch.bool)

    def observe(self, state: Any) -> Tensor:
        image: Tensor = state["image"]
        return image


class FactorTask(TorchEnv):
    """One step: the observation shows three numbers one-hot, the action repeats them; reward: the share that is right.

    Actions are MultiDiscrete(3, 2, 4), or with ``binary`` MultiBinary(3).
    """

    id = "FactorTask"

    def __init__(self, num_envs: int = 1, *, binary: bool = False, **options: Any) -> None:
        self.sizes = (2, 2, 2) if binary else (3, 2, 4)
        self.single_action_space = spaces.MultiBinary(3) if binary else spaces.MultiDiscrete(self.sizes)
        self.single_observation_space = spaces.Box(0.0, 1.0, (sum(self.sizes),), np.float32)
        super().__init__(num_envs, **options)

    def initial(self, generator: torch.Generator, n: int) -> Tensor:
        draws = [torch.randint(size, (n,), generator=generator, device=self.device) for size in self.sizes]
        return torch.stack(draws, -1)

    def transition(self, state: Any, action: Tensor, noise: Any) -> tuple[Any, Tensor, Tensor]:
        reward = (action == state).float().mean(-1)
        return state, reward, torch.ones_like(reward, dtype=torch.bool)

    def observe(self, state: Any) -> Tensor:
        numbers = [torch.arange(size, device=self.device) for size in self.sizes]
        return torch.cat([(state[:, i : i + 1] == n).float() for i, n in enumerate(numbers)], -1)
