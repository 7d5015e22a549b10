"""One flat configuration of several: settings that belong together keep a dataclass of their own, and users see one
list of names in YAML, on the command line and as keywords."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, get_type_hints

__all__ = ["join", "unpack"]


def join(
    name: str, parts: tuple[type[Any], ...], defaults: Mapping[str, Any] | None = None, doc: str = ""
) -> type[Any]:
    """A frozen dataclass with the fields of all ``parts``, of each of which it is a subclass. What they check together
    they check here too, if their ``__post_init__`` calls that of ``super()``, down to ``ccrl.settings.Settings``.

    >>> Settings = join("Settings", (GRPOConfig, ModelConfig), {"model_layers": 2})
    >>> Settings(group_size=4, model_width=32)

    :param defaults: other defaults for some of the fields.
    :raises ValueError: for a name in two of the parts, or a default for none of their fields.
    """
    owner: dict[str, type[Any]] = {}
    for part in parts:
        for field in dataclasses.fields(part):
            if field.name in owner:
                raise ValueError(
                    f"{name}: expected every setting in one part, got {field.name!r} in {owner[field.name].__name__} "
                    f"and in {part.__name__}; rename one"
                )
            owner[field.name] = part
    defaults = dict(defaults or {})
    if unknown := sorted(defaults.keys() - owner.keys()):
        raise ValueError(f"{name}: expected defaults of settings that there are, got {unknown}")
    hints = {key: get_type_hints(owner[key], include_extras=True)[key] for key in defaults}
    own = [(key, hints[key], value) for key, value in defaults.items()]
    return dataclasses.make_dataclass(name, own, bases=parts, frozen=True, namespace={"__doc__": doc or None})


def unpack(cls: type[Any], config: Any, settings: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """``config`` and ``settings``; of a config that is one of the parts that ``cls`` was joined of, its fields as
    settings below the others."""
    part = dataclasses.is_dataclass(config) and not isinstance(config, cls) and issubclass(cls, type(config))
    if not part:
        return config, dict(settings)
    return None, {f.name: getattr(config, f.name) for f in dataclasses.fields(config)} | dict(settings)
