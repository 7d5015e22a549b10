"""Networks of offline agents: an actor and critics on standardised observations and actions in [-1, 1]."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from ccrl.batched_env import Tree
from ccrl.data import Data, Field, Unit
from ccrl.policies import GAUSSIAN, ActionSpec, TwinQ
from ccrl.policies.acting import has_memory
from ccrl.policies.actions import box_bounds
from ccrl.policies.encoders import mlp
from ccrl.policies.q import Ensemble

__all__ = ["OfflinePolicy", "check_acts"]

_LOG_2PI = math.log(2.0 * math.pi)


class OfflinePolicy(nn.Module):
    """``actor.*`` (``mean = tanh(net)``; stochastic: with a free ``log_std`` in [-20, 2]), ``critic.*`` (two action
    values) and ``value.*``, each only where asked for. Hidden layers are ReLU.

    Stored actions are in [-1, 1] per dimension, ``to_env`` maps them onto the Box. Observations are standardised with
    the data set's mean and standard deviation + 1e-3, which are buffers: they are saved with the policy and used in
    evaluation too. A Dict observation is its entries side by side (``observation`` and ``desired_goal`` where it is a
    goal's; other keys in their order).

    ``evaluate`` computes, ``[T', B, ...]``: ``mean`` ``[.., A]``; ``log_prob`` of the stored action; ``q`` ``[.., n]``
    of it; of the actor's mean ``mean_q`` ``[.., n]`` and ``mean_q1`` (the first critic's alone); ``value``.

    :raises ValueError: for actions that are no Box with finite bounds, one above the other, or observations that are no
        vectors.
    """

    unit: Unit = "transition"
    compiles = True
    heads: tuple[str, ...] = ()
    normalise_obs = False
    distribution = GAUSSIAN
    obs_mean: Tensor
    obs_std: Tensor
    low: Tensor
    high: Tensor

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        *,
        hidden: Sequence[int] = (256, 256),
        stochastic: bool = False,
        critics: int = 0,
        value: bool = False,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        spec = ActionSpec.of(action_space)
        bounded = isinstance(action_space, gym.spaces.Box) and action_space.is_bounded()
        if not bounded or not (action_space.high > action_space.low).all():  # type: ignore[attr-defined]
            raise ValueError(f"action space: expected a Box with finite bounds, low < high, got {action_space}")
        self.n_out, self.stochastic, self.action_shape = spec.size, stochastic, spec.shape
        self.keys, width = _widths(observation_space)
        self.width = width
        for name, bound in zip(("low", "high"), box_bounds(action_space)):
            self.register_buffer(name, bound, persistent=False)
        self.register_buffer("obs_mean", torch.zeros(width))
        self.register_buffer("obs_std", torch.ones(width))
        self.actor = nn.Module()
        self.actor.net = mlp([width, *hidden, self.n_out], "relu")
        if stochastic:
            self.actor.log_std = nn.Parameter(torch.zeros(self.n_out))
        if critics:
            net = Ensemble(critics, width + self.n_out, hidden, layer_norm=layer_norm)
            self.critic = TwinQ(width, self.n_out, net=net)
        if value:
            self.value = mlp([width, *hidden, 1], "relu")

    # -- parts ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def standardise(self, obs: Tensor) -> None:
        """Take the statistics of ``obs`` ``[M, S]``."""
        rows = obs.double()
        self.obs_mean.copy_(rows.mean(0))
        self.obs_std.copy_(rows.std(0, correction=0) + 1e-3)

    def flat(self, obs: Tree) -> Tensor:
        """Raw observations side by side, ``[B, S]``."""
        if isinstance(obs, dict):
            return torch.cat([obs[k].flatten(1) for k in self.keys], -1).float()
        return obs.float()

    def features(self, obs: Tree) -> Tensor:
        """Standardised, ``[B, S]``."""
        return (self.flat(obs) - self.obs_mean) / self.obs_std

    def mean(self, features: Tensor) -> Tensor:
        """``[B, A]`` in [-1, 1]."""
        return self.actor.net(features).tanh()  # type: ignore[no-any-return, operator, union-attr]

    @property
    def log_std(self) -> Tensor:
        """Of the stochastic actor, ``[A]``."""
        found: Tensor = self.actor.log_std.clamp(-20.0, 2.0)  # type: ignore[operator, union-attr, assignment]
        return found

    def unit_action(self, action: Tensor) -> Tensor:
        """Executed actions as stored ones, clipped to [-1, 1]."""
        low, high = self.low.to(action), self.high.to(action)
        return (2.0 * (action - low) / (high - low) - 1.0).clamp(-1.0, 1.0)

    # -- the policy protocol -------------------------------------------------------------------------------------------

    def draw_noise(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        return torch.randn((n, *self.action_shape), generator=generator, device=device)

    def initial_state(self, n: int) -> None:
        return None

    def act(
        self, obs: Tree, noise: Tensor | None, state: Tensor | None = None, first: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The mean, plus the noise times the standard deviation of a stochastic actor."""
        action = self.mean(self.features(obs))
        if noise is not None and self.stochastic:
            action = action + self.log_std.exp() * noise
        return {"action": action}

    def to_env(self, action: Tensor) -> Tensor:
        low, high = self.low, self.high
        executed = low + 0.5 * (action.to(low.dtype) + 1.0) * (high - low)
        return executed.clamp(low, high)

    def behaviour_fields(self) -> tuple[Field, ...]:
        return ()

    def behaviour(self, columns: Mapping[str, Tensor], action: Tensor) -> dict[str, Tensor]:
        return {}

    def evaluate(self, batch: Data, want: frozenset[str]) -> dict[str, Tensor]:
        features, action = self.features(batch["obs"].flatten(0, 1)), batch["action"].flatten(0, 1)
        out: dict[str, Tensor] = {}
        if want & {"mean", "log_prob", "mean_q", "mean_q1"}:
            out["mean"] = self.mean(features)
        if "log_prob" in want:
            away = (action - out["mean"]) * (-self.log_std).exp()
            out["log_prob"] = (-0.5 * away.square() - self.log_std - 0.5 * _LOG_2PI).sum(-1)
        if "q" in want:
            out["q"] = self.critic(features, action).t()
        if "mean_q" in want:
            out["mean_q"] = self.critic(features, out["mean"]).t()
        if "mean_q1" in want:
            out["mean_q1"] = self.critic(features, out["mean"], 1).squeeze(0)
        if "value" in want:
            out["value"] = self.value(features).squeeze(-1)
        return {k: v.reshape(*batch.shape, *v.shape[1:]) for k, v in out.items() if k in want}

    def outputs(self) -> frozenset[str]:
        found = {"mean"} | ({"log_prob"} if self.stochastic else set())
        found |= {"q", "mean_q", "mean_q1"} if hasattr(self, "critic") else set()
        return frozenset(found | ({"value"} if hasattr(self, "value") else set()))

    def forward(self, batch: Data, want: frozenset[str]) -> dict[str, Tensor]:
        return self.evaluate(batch, want)


def _widths(space: gym.Space[Any]) -> tuple[list[str], int]:
    """The keys that are read (none: a vector), and how many numbers they are."""
    parts: Mapping[str, gym.Space[Any]] = space.spaces if isinstance(space, gym.spaces.Dict) else {"": space}
    if "observation" in parts:
        parts = {k: parts[k] for k in ("observation", "desired_goal") if k in parts}
    for key, part in parts.items():
        if not isinstance(part, gym.spaces.Box) or len(part.shape) != 1 or not np.issubdtype(part.dtype, np.floating):
            where = f" under {key!r}" if key else ""
            raise ValueError(f"observation space: expected vectors of real numbers, got {part}{where}")
    width = sum(part.shape[0] for part in parts.values() if part.shape)
    return ([k for k in parts if k], width)


@torch.no_grad()
def check_acts(policy: Any, observation_space: Any, action_space: Any) -> None:
    """Let ``policy``, or a function from observations to actions, act on an observation of zeros.

    :raises ValueError: it has a memory, which nobody would keep, it fails on the observation, or its action has another
        size than the task's.
    """
    if has_memory(policy):
        raise ValueError("policy: expected one without a memory, got a recurrent one, whose state nobody would keep")
    held = list(policy.parameters()) if isinstance(policy, nn.Module) else []
    device = held[0].device if held else torch.device("cpu")

    def zeros(space: Any) -> Any:
        if isinstance(space, gym.spaces.Dict):
            return {k: zeros(leaf) for k, leaf in space.spaces.items()}
        return torch.zeros(1, *(space.shape or ()), device=device)

    obs, size = zeros(observation_space), action_space.shape
    try:
        action = policy.to_env(policy.act(obs, None)["action"]) if hasattr(policy, "act") else policy(obs)
    except (RuntimeError, KeyError, IndexError) as error:
        raise ValueError(
            f"policy: expected one for the environment's observations, {observation_space}, but it fails on them "
            f"({str(error).splitlines()[0]})"
        ) from error
    if tuple(action.shape[1:]) != tuple(size):
        raise ValueError(f"policy: expected actions of shape {size} as the environment has, got {action.shape[1:]}")
