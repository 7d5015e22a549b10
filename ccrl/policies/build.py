"""From settings to an actor-critic policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym
from torch import nn

from ccrl.policies.encoders import Encoders
from ccrl.policies.mlp import MLPPolicy
from ccrl.policies.recurrent import RecurrentPolicy

__all__ = ["PolicyLike", "build_actor_critic", "check_policy"]

PolicyLike = nn.Module | Callable[..., nn.Module]
"""A policy, or what builds one: called with the two spaces and ``heads=``; subclasses of ``MLPPolicy`` with all network
settings."""

_MEMBERS = (
    "unit",
    "draw_noise",
    "initial_state",
    "act",
    "to_env",
    "behaviour_fields",
    "behaviour",
    "evaluate",
    "outputs",
)


def build_actor_critic(
    config: Any,
    observation_space: gym.Space[Any],
    action_space: gym.Space[Any],
    heads: Mapping[str, Sequence[int]],
    *,
    policy: PolicyLike | None = None,
    encoders: Mapping[str, Encoders] | None = None,
    default: type[MLPPolicy] | None = None,
    **settings: Any,
) -> Any:
    """The policy that a config describes, or the caller's own.

    :param config: network settings under the names of the on-policy agents (``hidden``, ``activation``, ``squash``
        ...); those it does not have keep their defaults.
    :param heads: value heads that the agent trains -> their extra hidden layers.
    :param policy: None: ``MLPPolicy`` or, with ``config.recurrent``, ``RecurrentPolicy``.
    :param default: what the agent builds in their place (critics of actions, quantiles); a subclass gets ``settings``.
    :param encoders: observation key -> encoder (``ccrl.policies.encoders``).
    :raises TypeError: for a policy without the protocol's members, or encoders next to a policy that takes none.
    :raises ValueError: if the policy lacks a head, or spaces and settings do not fit together.
    """
    recurrent = getattr(config, "recurrent", "none")
    base = default or (MLPPolicy if recurrent == "none" else RecurrentPolicy)
    cls: Any = base if policy is None else policy
    ours = isinstance(cls, type) and issubclass(cls, default or MLPPolicy)
    if encoders and not ours:
        raise TypeError(f"encoders: expected the suite's policies, which take them, got policy={policy!r}; drop one")
    if recurrent != "none" and not (ours and issubclass(cls, RecurrentPolicy)):
        raise ValueError(f"recurrent={recurrent!r} is of the suite's own policies, got policy={policy!r}; drop one")
    if ours:
        made = cls(
            observation_space, action_space, heads=heads, encoders=encoders, **_settings(config, cls), **settings
        )
    else:
        if not callable(cls):
            raise TypeError(f"policy: expected a module, or a class or function that makes one, got {cls!r}")
        made = cls if isinstance(cls, nn.Module) else cls(observation_space, action_space, heads=heads)
    check_policy(made, heads)
    return made


def _settings(config: Any, cls: type[MLPPolicy]) -> dict[str, Any]:
    names = {
        "hidden": "hidden", "critic_hidden": "critic_hidden", "activation": "activation", "squash": "squash",
        "log_std_init": "log_std_init", "state_dependent_std": "state_dependent_std",
        "std_parameter": "std_parameter", "orthogonal": "orthogonal",
        "normalise_obs": "normalise_obs", "clip_norm": "clip_obs",
    }  # fmt: skip
    if issubclass(cls, RecurrentPolicy) and getattr(config, "recurrent", "none") != "none":
        names |= {"recurrent": "recurrent", "recurrent_size": "recurrent_size"}
    settings = {new: getattr(config, old) for old, new in names.items() if hasattr(config, old)}
    groups = {"actor": getattr(config, "actor_obs", None), "critic": getattr(config, "critic_obs", None)}
    return settings | {"groups": groups}


def check_policy(policy: Any, heads: Mapping[str, Sequence[int]]) -> None:
    """:raises TypeError: unless it is a module with the members of the protocol.
    :raises ValueError: if it does not compute a head that is trained."""
    missing = [m for m in _MEMBERS if not hasattr(policy, m)]
    if not isinstance(policy, nn.Module) or missing:
        raise TypeError(
            f"policy: expected an nn.Module with the members of ccrl.policies.Policy, got {type(policy).__name__}"
            + (f" without {missing}" if missing else "")
        )
    found: frozenset[str] = policy.outputs()  # type: ignore[operator]
    if absent := set(heads) - found:
        raise ValueError(
            f"policy: expected the value heads {sorted(heads)} among its outputs, got {sorted(found)} "
            f"without {sorted(absent)}; build the heads that are passed as heads="
        )
