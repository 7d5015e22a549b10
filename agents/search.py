"""Where ``scripts/tune.py`` looks for settings: one entry per setting, kept by every agent that has the setting.

An agent's file says what differs there: a ``search`` of its ``Config``, a ``ClassVar`` mapping of the same form, is
laid over these entries and those of the classes it is derived from (None takes one out: a name can mean another thing).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

__all__ = ["SPACE", "space_of"]

SPACE: dict[str, dict[str, Any]] = {
    "learning_rate": {"around": 30},
    "gamma": {"choice": [0.9, 0.95, 0.98, 0.99, 0.995, 0.999]},
    "gae_lambda": {"choice": [0.8, 0.9, 0.95, 0.98, 1.0]},
    "n_steps": {"choice": [32, 64, 128, 256, 512]},
    "batch_size": {"choice": [32, 64, 128, 256, 512]},
    "n_epochs": {"choice": [1, 4, 10, 20]},
    "clip_range": {"choice": [0.1, 0.2, 0.3]},
    "ent_coef": {"choice": [0.0, 1e-4, 1e-3, 1e-2]},
    "max_grad_norm": {"choice": [0.3, 0.5, 1.0, 5.0]},
    "normalise_obs": {"choice": [False, True]},
    "normalise_reward": {"choice": [False, True]},
    "tau": {"choice": [0.001, 0.005, 0.02]},
    "group_size": {"choice": [4, 8, 16]},
    "clip_high": {"choice": [0.1, 0.2, 0.28, 0.4]},
}
"""Setting -> one of ``around`` (log-uniform from default / a to default * a), ``log`` and ``uniform`` ([low, high]),
``choice`` (a list)."""


def space_of(config: type[Any], only: tuple[str, ...] = (), fixed: Any = None) -> dict[str, dict[str, Any]]:
    """The entries for the settings that ``config`` has and has switched on, with ``around`` made ``log``.

    A setting that is None by default is off and stays so: a number would change what the method is. So does an entropy
    coefficient that is a word, unless words are what there is to choose. Values that are refused are left out: every
    trial with one would fail.

    :param only: names, if not all of them are searched.
    :param fixed: a ``config`` with the settings that trials have beside those they are given; None: the defaults.
    :raises ValueError: a name in ``only`` that is not there to be searched, or nothing to search.
    """
    space: dict[str, dict[str, Any] | None] = dict(SPACE)
    for cls in reversed(config.__mro__):
        space |= vars(cls).get("search", {})
    default = config()
    known = {f.name: getattr(default, f.name) for f in dataclasses.fields(config)}
    found: dict[str, dict[str, Any]] = {}
    for name, entry in space.items():
        value = known.get(name)
        if entry is None or value is None:
            continue
        if isinstance(value, str) and not all(isinstance(each, str) for each in entry.get("choice", (None,))):
            continue  # numbers in the place of a word
        if (taken := _taken(_ranged(entry, value), default if fixed is None else fixed, name)) is not None:
            found[name] = taken
    if missing := set(only) - found.keys():
        raise ValueError(f"only: expected some of {', '.join(found)}, got {', '.join(sorted(missing))}")
    found = {name: entry for name, entry in found.items() if not only or name in only}
    if not found:
        raise ValueError(f"{config.__name__} has no setting in agents.search.SPACE; give it a `search` of its own")
    return found


def _ranged(entry: Mapping[str, Any], default: Any) -> dict[str, Any]:
    if "around" in entry:
        return {"log": [default / entry["around"], default * entry["around"]]}
    return dict(entry)


def _taken(entry: dict[str, Any], fixed: Any, name: str) -> dict[str, Any] | None:
    """The entry with the values that ``fixed`` takes; None where nothing is left to choose."""

    def takes(value: Any) -> bool:
        try:
            dataclasses.replace(fixed, **{name: value})
        except ValueError:
            return False
        return True

    ((kind, values),) = entry.items()
    if kind == "choice":
        kept = [value for value in values if takes(value)]
        return {kind: kept} if len(kept) > 1 else None
    return entry if all(map(takes, values)) else None
