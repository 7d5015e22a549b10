"""How policies see action spaces: the distribution of stored actions, and what the environment executes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from ccrl.batched_env import Tree
from ccrl.data import Field
from ccrl.policies.distributions import CATEGORICAL, GAUSSIAN, SQUASHED, Distribution, FactoredCategorical

__all__ = ["ActionSpec", "RandomActor", "box_bounds", "to_box"]


class ActionSpec(NamedTuple):
    """Stored actions: their distribution, their shape, and how many numbers parametrise one (means or logits)."""

    distribution: Distribution
    shape: tuple[int, ...]
    size: int

    @classmethod
    def of(cls, space: gym.Space[Any], squash: bool = False) -> ActionSpec:
        """Gaussian for Box (through tanh with ``squash``), categorical for Discrete, one categorical factor per entry
        of MultiDiscrete and MultiBinary.

        :raises ValueError: for other spaces, several axes, starts other than 0, or ``squash`` without finite bounds.
        """
        if isinstance(space, gym.spaces.Discrete):
            if space.start != 0:
                raise ValueError(f"action space: expected Discrete starting at 0, got start {space.start}")
            return cls(CATEGORICAL, (), int(space.n))
        if isinstance(space, gym.spaces.MultiDiscrete) and space.nvec.ndim == 1:
            if space.start.any():
                raise ValueError(f"action space: expected MultiDiscrete starting at 0, got start {space.start}")
            sizes = tuple(int(n) for n in space.nvec)
            return cls(FactoredCategorical(sizes), (len(sizes),), sum(sizes))
        if isinstance(space, gym.spaces.MultiBinary) and len(space.shape) == 1:
            return cls(FactoredCategorical((2,) * space.shape[0]), space.shape, 2 * space.shape[0])
        if isinstance(space, gym.spaces.Box) and len(space.shape) == 1 and np.issubdtype(space.dtype, np.floating):
            if squash and not (space.high * 0.5 - space.low * 0.5 < np.finfo(space.dtype).max / 2).all():
                raise ValueError("squash=True needs finite action bounds; use squash=False or a bounded action space")
            return cls(SQUASHED if squash else GAUSSIAN, space.shape, space.shape[0])
        raise ValueError(
            f"action space: expected a Box of one axis in floating point, Discrete, or MultiDiscrete or MultiBinary of "
            f"one axis, got {space}; use a wrapper (for two axes one that flattens)"
        )


def box_bounds(space: gym.Space[Any]) -> tuple[Tensor, Tensor]:
    """``low, high`` of a Box in its own type: a bound rounded to float32 may lie outside a float64 Box."""
    return torch.as_tensor(space.low), torch.as_tensor(space.high)  # type: ignore[attr-defined]


def to_box(action: Tensor, low: Tensor, high: Tensor, squash: bool) -> Tensor:
    """Stored actions ``[B, A]`` as executed, inside the Box in the Box's own type: clipped, or through tanh onto it.

    Squashed actions are clipped too: ``low + (high - low)`` may round to a number above ``high``.
    """
    if squash:
        action = low + 0.5 * (action.tanh() + 1.0) * (high - low)
    return action.to(low.dtype).clamp(low, high)


class RandomActor:
    """Uniform actions of the space (warm-up of replay agents), stored in the coordinates of ``policy``.

    As Gymnasium's ``sample``, unbounded sides of a Box are normal, half-bounded ones exponential. Rows have no
    behaviour columns: these actions do not come from the policy's distribution.
    """

    def __init__(self, space: gym.Space[Any], policy: Any) -> None:
        self.policy, self.squash = policy, policy.distribution is SQUASHED
        self.reads: frozenset[str] | None = getattr(policy, "reads", None)
        self.spec = ActionSpec.of(space, self.squash)
        self.ends = box_bounds(space) if isinstance(space, gym.spaces.Box) else None

    def initial_state(self, n: int) -> None:
        return None

    def draw_noise(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        return torch.rand((n, *self.spec.shape), generator=generator, device=device)

    def act(
        self, obs: Tree, noise: Tensor | None, state: Tensor | None = None, first: Tensor | None = None
    ) -> dict[str, Tensor]:
        assert noise is not None, "random actions need noise"
        if self.ends is None:
            uniform = {"logits": torch.zeros(*noise.shape[:1], self.spec.size, device=noise.device)}
            return {"action": self.spec.distribution.sample(uniform, noise)}
        if self.squash:
            # open at both ends: the stored number of an action on the bound would be infinite
            return {"action": (2.0 * noise - 1.0).clamp(-1.0 + 1e-6, 1.0 - 1e-6).atanh()}
        low, high = (end.to(noise.device, noise.dtype) for end in self.ends)
        tail = -torch.log1p(-noise)
        below, above = low.isfinite(), high.isfinite()
        inside = torch.where(
            below & above, low + noise * (high - low), torch.special.ndtri(noise.clamp(1e-6, 1 - 1e-6))
        )
        half = torch.where(below, low + tail, high - tail)
        return {"action": torch.where(below == above, inside, half)}

    def to_env(self, action: Tensor) -> Tensor:
        executed: Tensor = self.policy.to_env(action)
        return executed

    def behaviour_fields(self) -> tuple[Field, ...]:
        return ()

    def behaviour(self, columns: Mapping[str, Tensor], action: Tensor) -> dict[str, Tensor]:
        return {}
