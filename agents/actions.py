"""Which agents take which actions: an agent that refuses an environment names those that do not."""

from __future__ import annotations

from typing import Any, Literal

from gymnasium import spaces

from ccrl import registry

__all__ = ["Actions", "check_actions"]

Actions = Literal["any", "continuous", "discrete"]
"""What an agent takes: a Box, a Discrete space, or whatever a policy can act in."""


def check_actions(agent: Any, space: Any) -> None:
    """Whether an agent, class or object, takes the actions of ``space``.

    :raises ValueError: it does not; the message has the agents that do.
    """
    kind = "continuous" if isinstance(space, spaces.Box) else "discrete" if isinstance(space, spaces.Discrete) else ""
    if agent.actions in ("any", kind):
        return
    wanted = "a Box" if agent.actions == "continuous" else "Discrete actions"
    others = ", ".join(_that_take(kind))
    raise ValueError(f"action space: expected {wanted}, got {space}; agents that take it: {others}")


def _that_take(kind: str) -> list[str]:
    found = {name: registry.agents.get(name) for name in registry.agents.names()}
    return [name for name, cls in found.items() if _plays(cls) and cls.actions in ("any", kind)]


def _plays(cls: Any) -> bool:
    """Whether it is for environments in general: not for language models, data, or tasks of one kind, of which it then
    names an example."""
    if not isinstance(cls, type) or not getattr(cls, "steps_env", False) or getattr(cls, "text", False):
        return False
    special = hasattr(cls, "example_env") and cls.actions == "any"  # type: ignore[attr-defined]
    return not special and not hasattr(cls.Config, "dataset")  # type: ignore[attr-defined]
