"""Actor-critic perceptrons behind an encoder per observation key."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from ccrl.batched_env import Tree
from ccrl.data import Data, Field, Unit, tree_map
from ccrl.policies.actions import ActionSpec, box_bounds, to_box
from ccrl.policies.distributions import SQUASHED
from ccrl.policies.encoders import ACTIVATIONS, Encoders, Perceptron, default_encoder, make_encoder, mlp
from ccrl.policies.memory import Memory
from ccrl.policies.normaliser import RunningNorm
from ccrl.policies.observations import (
    Role,
    module_name,
    observation_groups,
    observation_sizes,
    observation_spaces,
)

__all__ = ["MLPPolicy"]

LOG_STD_RANGE = (-20.0, 2.0)
"""Of state-dependent standard deviations (Haarnoja et al. 2018): beyond it densities overflow."""


class _Actor(nn.Module):
    """``net`` and, for Gaussian actions with a free scale, ``log_std``; with encoders and a memory where there are."""

    log_std: Tensor
    encoders: nn.ModuleDict
    memory: Memory

    def __init__(self, net: nn.Sequential, log_std: Tensor | None) -> None:
        super().__init__()
        self.net = net
        if log_std is not None:
            self.log_std = nn.Parameter(log_std)


class _RawStdActor(_Actor):
    """The parameter is the standard deviation itself, as in rsl_rl, not its logarithm: ``log_std`` follows from it.
    A step past 0 comes out on the other side, where its absolute value is the deviation."""

    def __init__(self, net: nn.Sequential, log_std: Tensor) -> None:
        super().__init__(net, None)
        self.std = nn.Parameter(log_std.exp())

    @property
    def log_std(self) -> Tensor:  # type: ignore[override]
        return self.std.abs().log()


class _Critic(nn.Module):
    """A trunk and named heads on its last latent."""

    encoders: nn.ModuleDict
    memory: Memory

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

    Observations are vectors, images, Discrete, MultiDiscrete, MultiBinary or a flat Dict of them; every key passes
    through its encoder (``ccrl.policies.encoders``), and the features of all keys are concatenated.

    Parameters are named ``actor.*`` (with ``actor.log_std``) and ``critic.*``, so updaters can own one or both.

    :param critic_hidden: hidden layers of the critic; None: as ``hidden``.
    :param heads: value heads -> sizes of extra hidden layers on the critic's last latent, e.g. ``{"value": ()}`` or
        ``{"value": (), "median": (64, 64)}``. Empty: no critic.
    :param squash: Box actions through ``tanh`` onto the bounds; else Gaussian actions, clipped for the environment.
    :param state_dependent_std: the network also outputs the log standard deviations, starting around ``log_std_init``;
        else they are parameters of their own.
    :param std_parameter: whether free standard deviations are learnt as logarithms or as they are.
    :param normalise_obs: running observation statistics as buffers of this module, for vectors (never for pixels).
    :param groups: Dict observations: which keys the actor and the critic see, in this order; see
        ``observation_groups`` for what they see without it.
    :param encoders: key (``obs`` where the space is no Dict) -> encoder, or a function from the key's space to one.
    :raises ValueError, TypeError: for spaces, groups and encoders that do not fit together.
    """

    unit: Unit = "transition"
    compiles = True
    """Whether updates may be compiled."""
    low: Tensor
    high: Tensor
    critic: _Critic

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
        state_dependent_std: bool = False,
        std_parameter: Literal["log", "raw"] = "log",
        orthogonal: bool = True,
        normalise_obs: bool = False,
        clip_obs: float = 10.0,
        groups: Mapping[Role, Sequence[str] | None] | None = None,
        encoders: Mapping[str, Encoders] | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {sorted(ACTIVATIONS)}, got {activation!r}")
        heads = {"value": ()} if heads is None else heads
        self.distribution, self.action_shape, self.n_out = ActionSpec.of(action_space, squash)
        if isinstance(action_space, gym.spaces.Box):
            for name, bound in zip(("low", "high"), box_bounds(action_space)):
                self.register_buffer(name, bound, persistent=False)
        gaussian = "mean" in self.distribution.names
        for name, on in (("state_dependent_std", state_dependent_std), ("squash", squash)):
            if on and not gaussian:
                raise ValueError(f"{name}=True needs a Box action space, got {action_space}")
        self._log_std_init = float(log_std_init) if state_dependent_std else None
        roles: tuple[Role, ...] = ("actor", "critic") if heads else ("actor",)
        made = self._read_observations(observation_space, groups, encoders or {}, roles)
        normed = {k: n for k, n in self._sizes.items() if n > 0} if normalise_obs else {}
        self._norm_names = {k: module_name(k) for k in normed}
        self.norm = nn.ModuleDict({module_name(k): RunningNorm((n,), clip_obs) for k, n in normed.items()})
        self.normalise_obs = normalise_obs

        hidden, critic_hidden = list(hidden), list(hidden if critic_hidden is None else critic_hidden)
        root2 = math.sqrt(2.0)

        def gains(hidden_layers: int, last: float) -> list[float] | None:
            return [root2] * hidden_layers + [last] if orthogonal else None

        log_std = torch.full((self.n_out,), float(log_std_init)) if gaussian and not state_dependent_std else None
        memory = self._make_memory("actor", orthogonal)
        width = memory.width if memory is not None else self._width("actor")
        net = mlp([width, *hidden, self._outputs], activation, gains(len(hidden), 0.01))
        if std_parameter == "log":
            self.actor = _Actor(net, log_std)
        elif log_std is None:
            raise ValueError(
                "std_parameter='raw': expected Gaussian actions whose deviations are parameters; use 'log'"
            )
        else:
            self.actor = _RawStdActor(net, log_std)
        self._attach(self.actor, made["actor"], memory)
        self.heads = tuple(heads)
        if heads:
            memory = self._make_memory("critic", orthogonal)
            width = memory.width if memory is not None else self._width("critic")
            self.critic = self._make_critic(width, critic_hidden, activation, heads, gains)
            self._attach(self.critic, made["critic"], memory)

    @property
    def _outputs(self) -> int:
        """Width of the actor's last layer."""
        return 2 * self.n_out if self._log_std_init is not None else self.n_out

    def _make_critic(
        self,
        width: int,
        hidden: Sequence[int],
        activation: str,
        heads: Mapping[str, Sequence[int]],
        gains: Callable[[int, float], list[float] | None],
    ) -> Any:
        """The critic on features of ``width``; ``gains(hidden layers, last gain)`` are those of its weights."""
        trunk = mlp([width, *hidden], activation, gains(len(hidden) - 1, math.sqrt(2.0)))
        latent = hidden[-1] if hidden else width
        return _Critic(
            Perceptron(*trunk, *([ACTIVATIONS[activation]()] if hidden else [])),
            {k: mlp([latent, *sizes, 1], activation, gains(len(sizes), 1.0)) for k, sizes in heads.items()},
        )

    # -- spaces -----------------------------------------------------------------------------------------------------

    def _read_observations(
        self,
        space: gym.Space[Any],
        groups: Mapping[Role, Sequence[str] | None] | None,
        encoders: Mapping[str, Encoders],
        roles: Sequence[Role],
    ) -> dict[Role, dict[str, nn.Module]]:
        """Set groups and widths; the encoders of every role, by key."""
        spaces = observation_spaces(space)
        self._groups = observation_groups(list(spaces), groups)
        used = {key for role in roles for key in self._groups[role]}
        if unknown := set(encoders) - used:
            raise ValueError(f"encoders: expected keys that are observed, {sorted(used)}, got {sorted(unknown)}")
        chosen = {k: encoders.get(k) or default_encoder(s) for k, s in spaces.items()}
        made: dict[Role, dict[str, nn.Module]] = {
            role: {k: make_encoder(e, spaces[k], k) for k in self._groups[role] if (e := chosen[k]) is not None}
            for role in roles
        }
        # flat widths of what is normalised or concatenated as it is; encoders of vectors get them normalised
        self._sizes = {k: observation_sizes(spaces[k]) for k in spaces if k in used and (
            chosen[k] is None or (isinstance(spaces[k], gym.spaces.Box) and len(spaces[k].shape or ()) == 1
                                  and spaces[k].dtype != np.uint8))}  # fmt: skip
        self._encoded: dict[Role, dict[str, tuple[str, int]]] = {
            role: {k: (module_name(k), int(m.width)) for k, m in modules.items()}  # type: ignore[arg-type]
            for role, modules in made.items()
        }
        return made

    @staticmethod
    def _attach(module: Any, encoders: dict[str, nn.Module], memory: Memory | None) -> None:
        if encoders:
            module.encoders = nn.ModuleDict({module_name(k): m for k, m in encoders.items()})
        if memory is not None:
            module.memory = memory

    def _make_memory(self, role: Role, orthogonal: bool) -> Memory | None:
        """The recurrent layer between a role's features and its network."""
        return None

    def _width(self, role: Role) -> int:
        encoded = self._encoded[role]
        return sum(encoded[k][1] if k in encoded else abs(self._sizes[k]) for k in self._groups[role])

    def observed(self, role: Role) -> list[str]:
        """The observation keys that a role reads, in order; ``obs`` where the space is no Dict."""
        return list(self._groups[role])

    @property
    def reads(self) -> frozenset[str] | None:
        """The observation keys that a network reads; others may hold anything. None where a subclass has ``features``
        of its own, which may read all."""
        if type(self).features is not MLPPolicy.features:
            return None
        return frozenset(self._groups["actor"]) | (frozenset(self._groups["critic"]) if self.heads else frozenset())

    def without_critic(self) -> Self:
        """A copy that only acts, for deployment: it asks for the actor's observations alone."""
        own = copy.deepcopy(self)
        if own.heads:
            del own.critic
        own.heads = ()
        return own

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.actor.parameters()).dtype

    def features(self, obs: Tree, role: Role) -> Tensor:
        """Concatenated (normalised, encoded, one-hot) observation ``[B, width]`` for the actor or the critic."""
        parts = []
        encoded = self._encoded.get(role, {})
        for key in self._groups[role]:
            x, size = (obs[key] if isinstance(obs, dict) else obs), self._sizes.get(key, 0)
            if size < 0 and key not in encoded:
                # not one_hot: it checks its input on the host, which vmap over samples (Scores.dense) cannot do
                numbers = torch.arange(-size, device=x.device)
                parts.append((x.unsqueeze(-1) == numbers).to(self._dtype))
                continue
            if size > 0:
                x = x if x.ndim == 2 else x.reshape(x.shape[0], size)
                x = x if x.is_floating_point() else x.to(self._dtype)
                x = self.norm[self._norm_names[key]](x) if self.normalise_obs else x
            if key in encoded:
                owner = self.actor if role == "actor" else self.critic
                x = owner.encoders[encoded[key][0]](x).to(self._dtype)
            parts.append(x)
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    # -- the policy protocol ----------------------------------------------------------------------------------------

    def draw_noise(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Noise for ``n`` actions ``[n, *noise_shape]`` (standard normal or uniform)."""
        draw = torch.randn if self.distribution.noise == "normal" else torch.rand
        return draw((n, *self.action_shape), generator=generator, device=device)

    def initial_state(self, n: int) -> Tensor | None:
        """The state ``[n, S]`` before an episode; None: the policy has no memory."""
        return None

    def params(self, obs: Tree) -> dict[str, Tensor]:
        """Distribution parameters ``[B, ...]``."""
        return self._params(self.features(obs, "actor"))

    def _params(self, latent: Tensor) -> dict[str, Tensor]:
        return self._named_params(self.actor.net(latent))

    def _named_params(self, out: Tensor) -> dict[str, Tensor]:
        if "logits" in self.distribution.names:
            return {"logits": out}
        if self._log_std_init is not None:
            mean, log_std = out.chunk(2, -1)
            return {"mean": mean, "log_std": (log_std + self._log_std_init).clamp(*LOG_STD_RANGE)}
        return {"mean": out, "log_std": self.actor.log_std.expand_as(out)}

    def act(
        self, obs: Tree, noise: Tensor | None, state: Tensor | None = None, first: Tensor | None = None
    ) -> dict[str, Tensor]:
        """``action`` ``[B, ...]`` as stored and the distribution parameters; ``noise=None``: the mode.

        ``state`` and ``first`` (rows that begin an episode) are for policies with a memory; they also return
        ``state``, the next one.
        """
        return self._act(self.params(obs), noise)

    def _act(self, params: dict[str, Tensor], noise: Tensor | None) -> dict[str, Tensor]:
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
        """The action that the environment executes: inside the bounds, in the type of the Box; others unchanged."""
        if "mean" in self.distribution.names:
            return to_box(action, self.low, self.high, self.distribution is SQUASHED)
        return action

    def values(self, obs: Tree, head: str = "value") -> Tensor:
        """One critic head, ``[B]``."""
        return self.critic.forward(self.features(obs, "critic"), (head,))[head]

    def state_values(self, data: Data, head: str = "value") -> tuple[Tensor, Tensor]:
        """``(V(o_t), V(x_t))`` ``[T, N]`` of a whole rollout, ``x_t`` the true successors."""
        return data.state_values(lambda obs: self.values(obs, head))

    def _latents(self, batch: Data, role: Role) -> Tensor:
        """What a role's network reads, one row per step of the batch: ``[T' * B, width]``.

        Rows are flattened for the networks: ``[1, B, D]`` matmuls cost up to 14 % more than ``[B, D]``.
        """
        obs: Tree = tree_map(_flat, batch["obs"])
        return self.features(obs, role)

    def evaluate(self, batch: Data, want: frozenset[str]) -> dict[str, Tensor]:
        """What ``want`` names, each ``[T', B]``: ``log_prob, entropy, dist`` (adds the parameters) and value heads."""
        lead = batch.shape
        out: dict[str, Tensor] = {}
        if want & {"log_prob", "entropy", "dist"}:
            params, action = self._params(self._latents(batch, "actor")), _flat(batch["action"])
            if "log_prob" in want:
                out["log_prob"] = self.distribution.log_prob(params, action)
            if "entropy" in want:
                out["entropy"] = self.distribution.entropy(params, action)
            if "dist" in want:
                out |= params
        heads = [h for h in self.heads if h in want]
        if heads:
            out |= self.critic.forward(self._latents(batch, "critic"), heads)
        return {k: v.reshape(*lead, *v.shape[1:]) for k, v in out.items()}

    def outputs(self) -> frozenset[str]:
        """Names that ``evaluate`` can compute."""
        return frozenset({"log_prob", "entropy", "dist", *self.heads})

    @torch.no_grad()
    def update_normaliser(self, obs: Tree, valid: Tensor) -> None:
        """Move the observation statistics by one rollout: ``obs [T, N, ...]``, ``valid [T, N]``."""
        for key, name in self._norm_names.items():
            norm, x = self.norm[name], obs[key] if isinstance(obs, dict) else obs
            assert isinstance(norm, RunningNorm)
            norm.update(x.reshape(*valid.shape, -1), valid)

    def forward(self, batch: Data, want: frozenset[str]) -> dict[str, Tensor]:
        """``evaluate``, under the name that ``torch.func.functional_call`` uses."""
        return self.evaluate(batch, want)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[2:])
