"""What small policies without a critic share: everything but the parameters of their action distribution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor, nn

from ccrl.batched_env import Tree
from ccrl.data import Data, Field, Unit
from ccrl.policies.distributions import Distribution

__all__ = ["ParametricPolicy"]


class ParametricPolicy(nn.Module):
    """The policy protocol on ``params(obs)``, which a subclass defines; see ``MLPPolicy`` for the methods.

    Subclasses set ``distribution``, ``n_out`` (width of its parameters) and ``action_shape``.
    """

    unit: Unit = "transition"
    heads: tuple[str, ...] = ()
    normalise_obs = False
    distribution: Distribution
    n_out: int
    action_shape: tuple[int, ...]

    def params(self, obs: Tensor) -> dict[str, Tensor]:
        """Distribution parameters ``[B, n_out]`` of observations ``[B, O]``."""
        raise NotImplementedError

    def draw_noise(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Noise for ``n`` actions ``[n, *noise_shape]`` (standard normal or uniform)."""
        draw = torch.randn if self.distribution.noise == "normal" else torch.rand
        return draw((n, *self.action_shape), generator=generator, device=device)

    def initial_state(self, n: int) -> None:
        """No memory."""
        return None

    def act(
        self, obs: Tree, noise: Tensor | None, state: Tensor | None = None, first: Tensor | None = None
    ) -> dict[str, Tensor]:
        """``action`` ``[B, ...]`` as stored and the distribution parameters; ``noise=None``: the mode."""
        params = self.params(self._tensor(obs))
        action = self.distribution.mode(params) if noise is None else self.distribution.sample(params, noise)
        return {"action": action, **params}

    def behaviour_fields(self) -> tuple[Field, ...]:
        """Raw columns of the behaviour policy: ``log_prob`` and its parameters ``old_*``."""
        return (Field("log_prob"), *(Field(f"old_{name}", (self.n_out,)) for name in self.distribution.names))

    def behaviour(self, columns: Mapping[str, Tensor], action: Tensor) -> dict[str, Tensor]:
        """``log_prob [T, N]`` of a whole rollout from its stored parameters."""
        params = {name: columns[f"old_{name}"] for name in self.distribution.names}
        return {"log_prob": self.distribution.log_prob(params, action)}

    def to_env(self, action: Tensor) -> Tensor:
        """The action that the environment executes."""
        return action

    def evaluate(self, batch: Data, want: frozenset[str]) -> dict[str, Tensor]:
        """``log_prob, entropy, dist`` (adds the parameters), each ``[T', B, ...]``."""
        lead = batch.shape
        params = self.params(batch["obs"].flatten(0, 1))
        action = batch["action"].flatten(0, 1)
        out: dict[str, Tensor] = {}
        if "log_prob" in want:
            out["log_prob"] = self.distribution.log_prob(params, action)
        if "entropy" in want:
            out["entropy"] = self.distribution.entropy(params, action)
        if "dist" in want:
            out |= params
        return {k: v.reshape(*lead, *v.shape[1:]) for k, v in out.items()}

    def outputs(self) -> frozenset[str]:
        """Names that ``evaluate`` can compute."""
        return frozenset({"log_prob", "entropy", "dist"})

    def forward(self, batch: Data, want: frozenset[str]) -> dict[str, Tensor]:
        """``evaluate``, under the name that ``torch.func.functional_call`` uses."""
        return self.evaluate(batch, want)

    @staticmethod
    def _tensor(obs: Tree) -> Tensor:
        if isinstance(obs, dict):
            raise ValueError(f"expected one observation tensor, got a dict of {sorted(obs)}; flatten it with a wrapper")
        return obs


def box_width(space: gym.Space[Any], what: str) -> int:
    """Width of a one-axis Box.

    :raises ValueError: for any other space.
    """
    if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
        raise ValueError(f"{what} space: expected a Box of one axis, got {space}; flatten it with a wrapper")
    return int(space.shape[0])
