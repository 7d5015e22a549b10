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
from ccrl.data import Data, Field, tree_map
from ccrl.policies.actions import ActionSpec
from ccrl.policies.distributions import CATEGORICAL
from ccrl.policies.encoders import ACTIVATIONS
from ccrl.policies.mlp import MLPPolicy

__all__ = ["Ensemble", "QuantilePolicy", "TwinQ"]


class Ensemble(nn.Module):
    """``n`` perceptrons ``[B, inputs] -> [n, B]`` with a scalar output, every layer one batched product for all.

    The last layer is a multiplication and a sum: a product with one column leaves a matrix unit idle.
    Initialisation is that of ``nn.Linear``. With ``layer_norm`` every activation is followed by a layer normalisation
    (ReBRAC: Tarasov et al. 2023).
    """

    def __init__(
        self, n: int, inputs: int, hidden: Sequence[int], activation: str = "relu", layer_norm: bool = False
    ) -> None:
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
        self.layer_norms = nn.ParameterList()
        if layer_norm:
            self.layer_norms.extend(torch.stack([torch.ones(n, 1, h), torch.zeros(n, 1, h)]) for h in hidden)
        self.last_weight, self.last_bias = _uniform((n, 1, sizes[-1]), sizes[-1]), _uniform((n, 1), sizes[-1])

    def forward(self, x: Tensor, first: int | None = None) -> Tensor:
        """:param first: only so many of them."""
        x = x.expand(self.last_bias[:first].shape[0], *x.shape)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            x = self.act(torch.baddbmm(bias[:first], x, weight[:first]))
            if len(self.layer_norms):
                scale, shift = self.layer_norms[i][:, :first]
                x = nn.functional.layer_norm(x, x.shape[-1:]) * scale + shift
        return (x * self.last_weight[:first]).sum(-1) + self.last_bias[:first]


def _uniform(shape: tuple[int, ...], fan_in: int) -> nn.Parameter:
    bound = 1.0 / math.sqrt(fan_in)
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


class TwinQ(nn.Module):
    """``Q(features, action) -> [n, B]``: ``n`` critics (two) on the concatenation of both.

    :param features: width of the observation's features.
    :param actions: width of the action as the critic sees it (for squashed policies ``tanh`` of the stored one).
    :param net: the critics, where they are not plain perceptrons.
    """

    def __init__(
        self,
        features: int,
        actions: int,
        *,
        hidden: Sequence[int] = (256, 256),
        activation: str = "relu",
        n: int = 2,
        net: Ensemble | None = None,
    ) -> None:
        super().__init__()
        self.net = Ensemble(n, features + actions, hidden, activation) if net is None else net

    def forward(self, features: Tensor, action: Tensor, first: int | None = None, **options: bool) -> Tensor:
        return self.net(torch.cat([features, action], -1), first, **options)  # type: ignore[no-any-return]


class QuantilePolicy(MLPPolicy):
    """Epsilon-greedy on the mean of ``n_quantiles`` quantiles per action (Dabney et al. 2018, QR-DQN); one quantile is
    DQN's value. Observations, encoders and their normaliser are those of ``MLPPolicy``.

    ``evaluate`` computes ``quantiles`` ``[T', B, A, n_quantiles]``. Behaviour columns: none.

    :raises ValueError: for other actions than Discrete from 0.
    """

    actor: Any
    epsilon: Tensor

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        *,
        n_quantiles: int = 200,
        activation: str = "relu",
        orthogonal: bool = False,
        heads: Mapping[str, Sequence[int]] | None = None,
        **settings: Any,
    ) -> None:
        spec = ActionSpec.of(action_space)
        if spec.distribution is not CATEGORICAL or n_quantiles < 1:
            raise ValueError(f"expected Discrete actions and n_quantiles >= 1, got {action_space} and {n_quantiles}")
        self.n_quantiles, self._n_actions = n_quantiles, spec.size
        super().__init__(
            observation_space, action_space, heads={}, activation=activation, orthogonal=orthogonal, **settings
        )
        self.register_buffer("epsilon", torch.ones(()))

    @property
    def _outputs(self) -> int:
        return self._n_actions * self.n_quantiles

    def quantiles(self, obs: Tree) -> Tensor:
        """``[B, A, n_quantiles]``."""
        out: Tensor = self.actor.net(self.features(obs, "actor"))
        return out.reshape(-1, self.n_out, self.n_quantiles)

    def draw_noise(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """``[n, 2]``: whether to explore, and where to."""
        return torch.rand((n, 2), generator=generator, device=device)

    def act(
        self, obs: Tree, noise: Tensor | None, state: Tensor | None = None, first: Tensor | None = None
    ) -> dict[str, Tensor]:
        best = self.quantiles(obs).mean(-1).argmax(-1)
        if noise is None:
            return {"action": best}
        explore, place = noise.unbind(-1)
        uniform = (place * self.n_out).long().clamp_max(self.n_out - 1)
        return {"action": torch.where(explore < self.epsilon, uniform, best)}

    def behaviour_fields(self) -> tuple[Field, ...]:
        return ()

    def behaviour(self, columns: Mapping[str, Tensor], action: Tensor) -> dict[str, Tensor]:
        return {}

    def evaluate(self, batch: Data, want: frozenset[str]) -> dict[str, Tensor]:
        obs = tree_map(lambda x: x.flatten(0, 1), batch["obs"])
        return {"quantiles": self.quantiles(obs).reshape(*batch.shape, self.n_out, self.n_quantiles)}

    def outputs(self) -> frozenset[str]:
        return frozenset({"quantiles"})
