"""Action-value networks: several critics as one batched product (SAC, TD3), and quantiles per action (QR-DQN)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor, nn

from ccrl.batched_env import Tree
from ccrl.data import Data, Field, Unit, tree_map
from ccrl.policies.actions import ActionSpec
from ccrl.policies.distributions import CATEGORICAL
from ccrl.policies.encoders import ACTIVATIONS, mlp

__all__ = ["Ensemble", "QuantilePolicy", "TwinQ"]


class Ensemble(nn.Module):
    """``n`` perceptrons ``[B, inputs] -> [n, B]`` with a scalar output, every layer one batched product for all.

    The last layer is a multiplication and a sum: a product with one column leaves a matrix unit idle.
    Initialisation is that of ``nn.Linear``.
    """

    def __init__(self, n: int, inputs: int, hidden: Sequence[int], activation: str = "relu") -> None:
        super().__init__()
        if n < 1 or activation not in ACTIVATIONS or any(size < 1 for size in (inputs, *hidden)):
            raise ValueError(
                f"Ensemble: expected n >= 1, layers of >= 1 unit and an activation of {sorted(ACTIVATIONS)}, got {n}, "
                f"{(inputs, *hidden)}, {activation!r}"
            )
        self.act = ACTIVATIONS[activation]()
        sizes = [inputs, *hidden]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in itertools.pairwise(sizes):
            self.weights.append(_uniform((n, fan_in, fan_out), fan_in))
            self.biases.append(_uniform((n, 1, fan_out), fan_in))
        self.last_weight, self.last_bias = _uniform((n, 1, sizes[-1]), sizes[-1]), _uniform((n, 1), sizes[-1])

    def forward(self, x: Tensor) -> Tensor:
        x = x.expand(self.last_bias.shape[0], *x.shape)
        for weight, bias in zip(self.weights, self.biases):
            x = self.act(torch.baddbmm(bias, x, weight))
        return (x * self.last_weight).sum(-1) + self.last_bias


def _uniform(shape: tuple[int, ...], fan_in: int) -> nn.Parameter:
    bound = 1.0 / math.sqrt(fan_in)
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


class TwinQ(nn.Module):
    """``Q(features, action) -> [n, B]``: ``n`` critics (two) on the concatenation of both.

    :param features: width of the observation's features.
    :param actions: width of the action as the critic sees it (for squashed policies ``tanh`` of the stored one).
    """

    def __init__(
        self, features: int, actions: int, *, hidden: Sequence[int] = (256, 256), activation: str = "relu", n: int = 2
    ) -> None:
        super().__init__()
        self.net = Ensemble(n, features + actions, hidden, activation)

    def forward(self, features: Tensor, action: Tensor) -> Tensor:
        return self.net(torch.cat([features, action], -1))  # type: ignore[no-any-return]


class QuantilePolicy(nn.Module):
    """Epsilon-greedy on the mean of ``n_quantiles`` quantiles per action (Dabney et al. 2018, QR-DQN); one quantile is
    DQN's value.

    ``evaluate`` computes ``quantiles`` ``[T', B, A, n_quantiles]``. Behaviour columns: none.

    :param encoder: features of an observation, a module with ``.width``; None: the flat Box itself.
    :raises ValueError: for other actions than Discrete from 0.
    """

    unit: Unit = "transition"
    compiles = True
    heads: tuple[str, ...] = ()
    normalise_obs = False
    distribution = CATEGORICAL
    action_shape: tuple[int, ...] = ()
    epsilon: Tensor

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        *,
        hidden: Sequence[int] = (64, 64),
        activation: str = "relu",
        n_quantiles: int = 200,
        encoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        spec = ActionSpec.of(action_space)
        if spec.distribution is not CATEGORICAL or n_quantiles < 1:
            raise ValueError(f"expected Discrete actions and n_quantiles >= 1, got {action_space} and {n_quantiles}")
        if encoder is None and not isinstance(observation_space, gym.spaces.Box):
            raise ValueError(f"observation space: expected a Box, got {observation_space}; pass an encoder")
        self.n_out, self.n_quantiles = spec.size, n_quantiles
        self.encoder = nn.Flatten() if encoder is None else encoder
        width = math.prod(observation_space.shape or ()) if encoder is None else int(encoder.width)  # type: ignore[arg-type]
        self.net = mlp([width, *hidden, spec.size * n_quantiles], activation)
        self.register_buffer("epsilon", torch.ones(()))

    def quantiles(self, obs: Tree) -> Tensor:
        """``[B, A, n_quantiles]``."""
        out: Tensor = self.net(self.encoder(obs).to(self.net[0].weight.dtype))
        return out.reshape(-1, self.n_out, self.n_quantiles)

    def draw_noise(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """``[n, 2]``: whether to explore, and where to."""
        return torch.rand((n, 2), generator=generator, device=device)

    def initial_state(self, n: int) -> None:
        return None

    def act(
        self, obs: Tree, noise: Tensor | None, state: Tensor | None = None, first: Tensor | None = None
    ) -> dict[str, Tensor]:
        best = self.quantiles(obs).mean(-1).argmax(-1)
        if noise is None:
            return {"action": best}
        explore, place = noise.unbind(-1)
        uniform = (place * self.n_out).long().clamp_max(self.n_out - 1)
        return {"action": torch.where(explore < self.epsilon, uniform, best)}

    def to_env(self, action: Tensor) -> Tensor:
        return action

    def behaviour_fields(self) -> tuple[Field, ...]:
        return ()

    def behaviour(self, columns: Mapping[str, Tensor], action: Tensor) -> dict[str, Tensor]:
        return {}

    def evaluate(self, batch: Data, want: frozenset[str]) -> dict[str, Tensor]:
        obs = tree_map(lambda x: x.flatten(0, 1), batch["obs"])
        return {"quantiles": self.quantiles(obs).reshape(*batch.shape, self.n_out, self.n_quantiles)}

    def outputs(self) -> frozenset[str]:
        return frozenset({"quantiles"})

    def forward(self, batch: Data, want: frozenset[str]) -> dict[str, Tensor]:
        return self.evaluate(batch, want)
