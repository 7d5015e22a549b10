"""Actor-critic perceptrons for Box, Discrete and (flat) Dict observations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from ccrl.batched_env import Tree
from ccrl.data import Data, Field, Unit, tree_map
from ccrl.policies.distributions import CATEGORICAL, GAUSSIAN, SQUASHED, Distribution
from ccrl.policies.normaliser import RunningNorm

__all__ = ["MLPPolicy", "mlp"]

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU, "silu": nn.SiLU}


class _Perceptron(nn.Sequential):
    """A ``Sequential`` without module calls where no layer has hooks: for 16 rows and two hidden layers of 64 the calls
    took 12 of 31 us."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self._modules.values():
            assert layer is not None
            if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
                x = layer(x)
            elif type(layer) is nn.Linear:  # not a parametrised one, whose weight is computed
                own = layer._parameters
                x = nn.functional.linear(x, own["weight"], own["bias"])  # type: ignore[arg-type]
            else:
                x = layer.forward(x)
        return x


def mlp(sizes: Sequence[int], activation: str, gains: Sequence[float] | None = None) -> nn.Sequential:
    """Linear layers with ``activation`` between them; orthogonal weights of the given gains, zero biases.

    ``gains=None`` keeps PyTorch's own initialisation.
    """
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        linear = nn.Linear(fan_in, fan_out)
        if gains is not None:
            nn.init.orthogonal_(linear.weight, gains[i])
            nn.init.zeros_(linear.bias)
        layers += [linear, ACTIVATIONS[activation]()]
    return _Perceptron(*layers[:-1])


class _Actor(nn.Module):
    """``net`` and, for Gaussian actions, the state-independent ``log_std``."""

    log_std: Tensor

    def __init__(self, net: nn.Sequential, log_std: Tensor | None) -> None:
        super().__init__()
        self.net = net
        if log_std is not None:
            self.log_std = nn.Parameter(log_std)


class _Critic(nn.Module):
    """A trunk and named heads on its last latent."""

    def __init__(self, trunk: nn.Sequential, heads: dict[str, nn.Sequential]) -> None:
        super().__init__()
        self.trunk = trunk
        for name, head in heads.items():
            self.add_module(name, head)

    def forward(self, features: Tensor, heads: Sequence[str]) -> dict[str, Tensor]:
        """``[B]`` per head; the trunk runs once."""
        latent = self.trunk(features)
        return {head: self.get_submodule(head)(latent).squeeze(-1) for head in heads}


class MLPPolicy(nn.Module):
    """A policy network and value heads on their own trunk (no parameters shared between actor and critic).

    Parameters are named ``actor.*`` (with ``actor.log_std``) and ``critic.*``, so updaters can own one or both.

    :param heads: value heads -> sizes of extra hidden layers on the critic's last latent, e.g. ``{"value": ()}`` or
        ``{"value": (), "median": (64, 64)}``. Empty: no critic.
    :param squash: Box actions through ``tanh`` onto the bounds; else Gaussian actions, clipped for the environment.
    :param normalise_obs: running observation statistics as buffers of this module.
    :param groups: Dict observations, as in Isaac Lab: which keys the actor and the critic see, in this order.
    """

    unit: Unit = "transition"
    low: Tensor
    high: Tensor

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        *,
        hidden: Sequence[int] = (64, 64),
        critic_hidden: Sequence[int] | None = None,
        activation: str = "tanh",
        heads: Mapping[str, Sequence[int]] | None = None,
        squash: bool = False,
        log_std_init: float = 0.0,
        orthogonal: bool = True,
        normalise_obs: bool = False,
        clip_obs: float = 10.0,
        groups: Mapping[Literal["actor", "critic"], Sequence[str]] | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {sorted(ACTIVATIONS)}, got {activation!r}")
        heads = {"value": ()} if heads is None else heads
        self._sizes = _observation_sizes(observation_space)
        self._groups = {"actor": list(self._sizes), "critic": list(self._sizes)}
        for role, keys in (groups or {}).items():
            unknown = set(keys) - set(self._sizes)
            if unknown or role not in self._groups:
                raise ValueError(f"groups: expected keys of {sorted(self._sizes)}, got {role}: {list(keys)}")
            self._groups[role] = list(keys)
        self.distribution, self.action_shape, self.n_out = self._read_action_space(action_space, squash)
        self.norm = nn.ModuleDict(
            {k: RunningNorm((n,), clip_obs) for k, n in self._sizes.items() if n > 0} if normalise_obs else {}
        )
        self.normalise_obs = normalise_obs

        hidden, critic_hidden = list(hidden), list(hidden if critic_hidden is None else critic_hidden)
        root2 = math.sqrt(2.0)

        def gains(hidden_layers: int, last: float) -> list[float] | None:
            return [root2] * hidden_layers + [last] if orthogonal else None

        log_std = torch.full((self.n_out,), float(log_std_init)) if self.distribution is not CATEGORICAL else None
        net = mlp([self._width("actor"), *hidden, self.n_out], activation, gains(len(hidden), 0.01))
        self.actor = _Actor(net, log_std)
        self.heads = tuple(heads)
        if heads:
            trunk = mlp([self._width("critic"), *critic_hidden], activation, gains(len(critic_hidden) - 1, root2))
            latent = critic_hidden[-1] if critic_hidden else self._width("critic")
            self.critic = _Critic(
                _Perceptron(*trunk, *([ACTIVATIONS[activation]()] if critic_hidden else [])),
                {k: mlp([latent, *sizes, 1], activation, gains(len(sizes), 1.0)) for k, sizes in heads.items()},
            )

    # -- spaces -----------------------------------------------------------------------------------------------------

    def _read_action_space(self, space: gym.Space[Any], squash: bool) -> tuple[Distribution, tuple[int, ...], int]:
        if isinstance(space, gym.spaces.Discrete):
            if space.start != 0:
                raise ValueError(f"action space: expected Discrete starting at 0, got start {space.start}")
            return CATEGORICAL, (), int(space.n)
        if isinstance(space, gym.spaces.Box) and len(space.shape) == 1 and np.issubdtype(space.dtype, np.floating):
            low, high = (torch.as_tensor(x, dtype=torch.float32) for x in (space.low, space.high))
            bounded = bool((low.isfinite() & high.isfinite()).all())
            if squash and not bounded:
                raise ValueError("squash=True needs finite action bounds; use squash=False or a bounded action space")
            self.register_buffer("low", low, persistent=False)
            self.register_buffer("high", high, persistent=False)
            return SQUASHED if squash else GAUSSIAN, (space.shape[0],), space.shape[0]
        raise ValueError(
            f"action space: expected a Box of one axis in floating point or Discrete, got {space}; use a wrapper (for "
            "two axes one that flattens)"
        )

    def _width(self, role: str) -> int:
        return sum(abs(self._sizes[k]) for k in self._groups[role])

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.actor.parameters()).dtype

    def features(self, obs: Tree, role: str) -> Tensor:
        """Concatenated (normalised, one-hot) observation ``[B, width]`` for the actor or the critic."""
        parts = []
        for key in self._groups[role]:
            x, size = (obs[key] if isinstance(obs, dict) else obs), self._sizes[key]
            if size < 0:
                # not one_hot: it checks its input on the host, which vmap over samples (Scores.dense) cannot do
                numbers = torch.arange(-size, device=x.device)
                parts.append((x.unsqueeze(-1) == numbers).to(self._dtype))
                continue
            x = x if x.ndim == 2 else x.reshape(x.shape[0], size)
            x = x if x.is_floating_point() else x.to(self._dtype)
            parts.append(self.norm[key](x) if self.normalise_obs else x)
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    # -- the policy protocol ----------------------------------------------------------------------------------------

    def draw_noise(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Noise for ``n`` actions ``[n, *noise_shape]`` (standard normal or uniform)."""
        draw = torch.randn if self.distribution.noise == "normal" else torch.rand
        return draw((n, *self.action_shape), generator=generator, device=device)

    def params(self, obs: Tree) -> dict[str, Tensor]:
        """Distribution parameters ``[B, ...]``."""
        out = self.actor.net(self.features(obs, "actor"))
        if self.distribution is CATEGORICAL:
            return {"logits": out}
        return {"mean": out, "log_std": self.actor.log_std.expand_as(out)}

    def act(self, obs: Tree, noise: Tensor | None) -> dict[str, Tensor]:
        """``action`` ``[B, ...]`` as stored and the distribution parameters; ``noise=None``: the mode."""
        params = self.params(obs)
        action = self.distribution.mode(params) if noise is None else self.distribution.sample(params, noise)
        return {"action": action, **params}

    def behaviour_fields(self) -> tuple[Field, ...]:
        """Raw columns of the behaviour policy: ``log_prob`` and its parameters ``old_*`` (small, so stored)."""
        shape = (self.n_out,)
        return (Field("log_prob"), *(Field(f"old_{name}", shape) for name in self.distribution.names))

    def behaviour(self, columns: Mapping[str, Tensor], action: Tensor) -> dict[str, Tensor]:
        """``log_prob [T, N]`` of a whole rollout from its stored parameters: one pass instead of one per step."""
        params = {name: columns[f"old_{name}"] for name in self.distribution.names}
        return {"log_prob": self.distribution.log_prob(params, action)}

    def to_env(self, action: Tensor) -> Tensor:
        """The action that the environment executes: clipped or squashed onto the bounds; Discrete unchanged."""
        if self.distribution is GAUSSIAN:
            return action.clamp(self.low, self.high)
        if self.distribution is SQUASHED:
            return self.low + 0.5 * (action.tanh() + 1.0) * (self.high - self.low)
        return action

    def values(self, obs: Tree, head: str = "value") -> Tensor:
        """One critic head, ``[B]``."""
        return self.critic.forward(self.features(obs, "critic"), (head,))[head]

    def evaluate(self, batch: Data, want: frozenset[str]) -> dict[str, Tensor]:
        """What ``want`` names, each ``[T', B]``: ``log_prob, entropy, dist`` (adds the parameters) and value heads.

        Rows are flattened for the networks: ``[1, B, D]`` matmuls cost up to 14 % more than ``[B, D]``.
        """
        lead = batch.shape
        obs: Tree = tree_map(_flat, batch["obs"])
        out: dict[str, Tensor] = {}
        if want & {"log_prob", "entropy", "dist"}:
            params, action = self.params(obs), _flat(batch["action"])
            if "log_prob" in want:
                out["log_prob"] = self.distribution.log_prob(params, action)
            if "entropy" in want:
                out["entropy"] = self.distribution.entropy(params, action)
            if "dist" in want:
                out |= params
        heads = [h for h in self.heads if h in want]
        if heads:
            out |= self.critic.forward(self.features(obs, "critic"), heads)
        return {k: v.reshape(*lead, *v.shape[1:]) for k, v in out.items()}

    def outputs(self) -> frozenset[str]:
        """Names that ``evaluate`` can compute."""
        return frozenset({"log_prob", "entropy", "dist", *self.heads})

    @torch.no_grad()
    def update_normaliser(self, obs: Tree, valid: Tensor) -> None:
        """Move the observation statistics by one rollout: ``obs [T, N, ...]``, ``valid [T, N]``."""
        for key, norm in self.norm.items():
            assert isinstance(norm, RunningNorm)
            x = obs[key] if isinstance(obs, dict) else obs
            norm.update(x.reshape(*valid.shape, -1), valid)

    def forward(self, batch: Data, want: frozenset[str]) -> dict[str, Tensor]:
        """``evaluate``, under the name that ``torch.func.functional_call`` uses."""
        return self.evaluate(batch, want)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[2:])


def _observation_sizes(space: gym.Space[Any]) -> dict[str, int]:
    """Observation key -> flat width; negative: one-hot of a Discrete. A single space has the key ``obs``."""
    if isinstance(space, gym.spaces.Dict):
        nested = [k for k, s in space.items() if isinstance(s, gym.spaces.Dict)]
        if nested:
            raise ValueError(f"observation space: expected a flat Dict, got nested keys {nested}; flatten it first")
        return {k: _observation_sizes(s)["obs"] for k, s in space.items()}
    if isinstance(space, gym.spaces.Box):
        return {"obs": int(np.prod(space.shape))}
    if isinstance(space, gym.spaces.Discrete):
        if space.start != 0:
            raise ValueError(f"observation space: expected Discrete starting at 0, got start {space.start}")
        return {"obs": -int(space.n)}
    raise ValueError(
        f"observation space: expected Box, Discrete or Dict of them, got {space}; flatten it with a wrapper"
    )
