"""A point that is pushed to the middle of a picture, and PPO with a stranger's own network for pictures."""

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from torch import nn

from agents.ppo import PPO
from ccrl.torch_env import TorchEnv

SIDE = 9


class Point(TorchEnv):
    """Five pushes; the reward is minus the distance to the middle; the observation is a picture of the point."""

    single_action_space = Discrete(5)
    single_observation_space = Box(0, 255, (1, SIDE, SIDE), np.uint8)
    default_max_episode_steps = 12

    def __init__(self, num_envs=1, *, push=1.0, **options):
        super().__init__(num_envs, **options)
        self.push = push

    def initial(self, generator, n):
        return torch.randint(SIDE, (n, 2), generator=generator, device=self.device).float()

    def transition(self, state, action, noise):
        moves = torch.tensor([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]], device=self.device) * self.push
        state = (state + moves[action]).clamp(0, SIDE - 1)
        return state, -(state - SIDE // 2).abs().sum(-1), torch.zeros(len(state), dtype=torch.bool, device=self.device)

    def observe(self, state):
        at = state.round().long()
        flat = nn.functional.one_hot(at[:, 0] * SIDE + at[:, 1], SIDE * SIDE)
        return (255 * flat).to(torch.uint8).view(-1, 1, SIDE, SIDE)


class Look(nn.Module):
    """Two convolutions of the stranger's own."""

    def __init__(self, space):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, 2), nn.SiLU(), nn.Conv2d(8, 8, 3, 2), nn.SiLU(), nn.Flatten()
        )  # fmt: skip
        self.width = 8 * 1 * 1

    def forward(self, x):
        return self.net(x.float() / 255.0)


class LookingPPO(PPO):
    """PPO that looks."""

    name = "looking_ppo"
    example_env = "my_pkg.point:Point"

    def make_policy(self, heads, **options):
        return super().make_policy(heads, encoders={"obs": Look}, **options)
