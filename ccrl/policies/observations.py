"""How policies see observation spaces: keys, widths, groups of actor and critic, and their normalisers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from torch import nn

__all__ = ["Role", "module_name", "observation_groups", "observation_sizes", "observation_spaces"]

Role = Literal["actor", "critic"]


def observation_spaces(space: gym.Space[Any]) -> dict[str, gym.Space[Any]]:
    """Observation key -> space; a single space has the key ``obs``.

    :raises ValueError: for nested Dicts.
    """
    if not isinstance(space, gym.spaces.Dict):
        return {"obs": space}
    nested = [k for k, s in space.items() if isinstance(s, gym.spaces.Dict)]
    if nested:
        raise ValueError(f"observation space: expected a flat Dict, got nested keys {nested}; flatten it first")
    return dict(space.items())


def observation_sizes(space: gym.Space[Any]) -> int:
    """Flat width; negative: one-hot of a Discrete.

    :raises ValueError: for spaces that need an encoder of their own.
    """
    if isinstance(space, gym.spaces.Box):
        return int(np.prod(space.shape))
    if isinstance(space, gym.spaces.MultiBinary):
        return int(np.prod(space.shape))
    if isinstance(space, gym.spaces.Discrete):
        if space.start != 0:
            raise ValueError(f"observation space: expected Discrete starting at 0, got start {space.start}")
        return -int(space.n)
    raise ValueError(
        f"observation space: expected Box, Discrete, MultiDiscrete, MultiBinary or a Dict of them, got {space}; "
        "flatten it with a wrapper, or pass an encoder for it"
    )


def observation_groups(
    keys: Sequence[str], groups: Mapping[Role, Sequence[str] | None] | None = None
) -> dict[Role, list[str]]:
    """Which keys the actor and the critic see, in this order.

    Without a choice both see every key, except groups named as in Isaac Lab: the actor does not see ``critic`` (it
    holds privileged states), and next to it the critic does not see ``policy`` (or ``actor``), whose content it holds.

    :raises ValueError: for unknown roles, unknown or repeated keys, or an empty choice.
    """
    seen: dict[Role, list[str]] = {"actor": list(keys), "critic": list(keys)}
    if "critic" in keys and len(keys) > 1:
        seen["actor"] = [k for k in keys if k != "critic"]
        seen["critic"] = [k for k in keys if k not in ("policy", "actor")]
    for role, chosen in (groups or {}).items():
        if chosen is None:
            continue
        if role not in seen or not chosen or set(chosen) - set(keys) or len(set(chosen)) < len(chosen):
            raise ValueError(f"groups: expected keys of {sorted(keys)}, each once, got {role}: {list(chosen)}")
        seen[role] = list(chosen)
    return seen


def module_name(key: str) -> str:
    """``key`` as a name that ``nn.ModuleDict`` takes: no dots, no empty name, none of its own attributes."""
    name = key.replace("%", "%25").replace(".", "%2E")
    return f"key:{name}" if not name or name.startswith("key:") or hasattr(nn.ModuleDict, name) else name
