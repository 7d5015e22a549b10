"""Guidance: samples are moved up the likelihood of their actions under the policy that is being trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from agents.offline.pgd.trajectories import Codec
from ccrl.diffusion import Denoise

__all__ = ["Actor", "PolicyGuide", "strengths"]

Actor = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Raw observations ``[M, S]`` -> mean and standard deviation of actions in [-1, 1], ``[M, A]`` each."""


def strengths(strength: float, steps: int, bump: float = 0.3) -> list[float]:
    """``lam (1 - i / N + c sin(pi (i + 1) / N))`` of every step, 0 at the last: a ramp and half a sine."""
    found = [strength * (1.0 - i / steps + bump * math.sin(math.pi * (i + 1) / steps)) for i in range(steps)]
    return [*found[:-1], 0.0]


@dataclass(frozen=True)
class PolicyGuide:
    """Before step i, ``u <- u + lam_i g`` with ``g = grad_u log N(tanh(u); mean(o), std(o))`` (unit variance for a
    deterministic policy); ``u`` the raw action channels, ``o`` the observations of the same rows, which do not move.

    The Jacobian of ``tanh`` is left out of the density, as in the authors' code. ``normalise`` divides ``g`` by its
    norm over a whole trajectory: at high noise an unnormalised one is far too large.

    :param denoised: take ``u`` and ``o`` from the denoised sample.
    """

    codec: Codec
    actor: Actor
    strengths: list[float]
    normalise: bool = True
    denoised: bool = False

    def gradient(self, x: Tensor) -> Tensor:
        """``g [B, T, A]`` at ``x [B, T, D]``."""
        obs = self.codec.observation(x)
        mean, std = self.actor(obs.flatten(0, 1))
        action, s = self.codec.action(x), self.codec.action_slice
        away = (action - mean.view_as(action)) / std.view_as(action).square()
        return -away * (1.0 - action.square()) * self.codec.std[s]

    @torch.no_grad()
    def __call__(self, x: Tensor, step: int, sigma: float, denoise: Denoise) -> Tensor:
        strength = self.strengths[step]
        if strength == 0.0:
            return x
        g = self.gradient(denoise(x, x.new_tensor(sigma)) if self.denoised else x)
        if self.normalise:
            g = g / (g.flatten(1).norm(dim=1).view(-1, 1, 1) + 1e-8)
        moved = x.clone()
        moved[..., self.codec.action_slice] += strength * g
        return moved
