"""The state of a learner: every object with state registers itself once, under a name; nobody lists state by hand."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ccrl.seeding import restore_generator

__all__ = ["StateRegistry", "Stateful"]


class Stateful(Protocol):
    """What can be registered: modules, updaters, collectors, rings, banks."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class StateRegistry:
    """Name -> object, saved and restored together: a loaded learner goes on where the saved one was.

    Takes anything with ``state_dict`` and ``load_state_dict``, generators, and tensors (restored in place: a compiled
    graph may hold them).
    """

    def __init__(self) -> None:
        self._items: dict[str, Any] = {}

    def register(self, name: str, item: Stateful | torch.Generator | Tensor) -> None:
        """:raises ValueError: a name twice. :raises TypeError: an object without state."""
        if name in self._items:
            raise ValueError(f"state: expected a new name, got {name!r} twice; what is registered: {self.names()}")
        if not isinstance(item, torch.Generator | Tensor) and not (
            hasattr(item, "state_dict") and hasattr(item, "load_state_dict")
        ):
            raise TypeError(
                f"state {name!r}: expected a generator, a tensor or an object with state_dict and load_state_dict, got "
                f"{type(item).__name__}"
            )
        self._items[name] = item

    def names(self) -> list[str]:
        """What is registered, in order."""
        return list(self._items)

    def state_dict(self) -> dict[str, Any]:
        """Name -> state."""
        return {name: _get(item) for name, item in self._items.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore in place. :raises ValueError: names missing or unknown: the agent would go on half restored."""
        missing, extra = self._items.keys() - state.keys(), state.keys() - self._items.keys()
        if missing or extra:
            raise ValueError(
                f"state: expected {self.names()}; missing: {sorted(missing)}, unknown: {sorted(extra)}. The checkpoint "
                "is of another version, of other settings, or damaged"
            )
        for name, item in self._items.items():
            _set(item, state[name])


def _get(item: Any) -> Any:
    if isinstance(item, torch.Generator):
        return item.get_state()
    return item.clone() if isinstance(item, Tensor) else item.state_dict()


def _set(item: Any, state: Any) -> None:
    if isinstance(item, torch.Generator):
        restore_generator(item, state)
    elif isinstance(item, Tensor):
        item.copy_(state)
    else:
        item.load_state_dict(state)
