"""Configurations: frozen dataclasses with a docstring under each field, to and from YAML and the command line.

    @dataclass(frozen=True)
    class PPOConfig:
        learning_rate: float = 3e-4
        \"\"\"Step size of Adam.\"\"\"

The docstrings are the help text of the command line and the comments of a saved ``config.yaml``. Values come from the
defaults, then a YAML file, then the command line; unknown keys, wrong types and values outside their range
(``ccrl.settings``) stop the run before it starts.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import json
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import tyro
import yaml

from ccrl.settings import ConfigError, convert, hints_of

__all__ = ["ConfigError", "Options", "field_docs", "flatten", "from_dict", "load_yaml", "parse", "save_yaml", "to_dict"]

C = TypeVar("C")


def _options(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"expected JSON, got {text!r} ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object, as in '{{\"digits\": 1}}', got {text!r}")
    return values


Options = Annotated[
    dict[str, Any],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1, metavar="JSON", instance_from_str=lambda words: _options(words[0]),
        is_instance=lambda value: isinstance(value, dict), str_from_instance=lambda value: [json.dumps(value)],
    ),
]  # fmt: skip
"""A field for options that somebody else names: a mapping in YAML, a JSON object on the command line."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads ``3e-4`` (no dot) as a string; people who write it mean the number."""


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that ``_Loader`` would read as numbers."""


for _own in (_Loader, _Dumper):
    _own.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+"), list("-+0123456789")
    )


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values, tuples as lists: what YAML holds."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise ConfigError(f"to_dict: expected a dataclass instance, got {config!r}.")
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def from_dict(cls: type[C], values: Mapping[str, Any], base: C | None = None) -> C:
    """A ``cls`` with ``values`` laid over ``base`` (over the defaults if None); nested mappings are laid over nested
    configurations.

    Raises :class:`ConfigError` for unknown keys, missing required ones and wrong types.
    """
    return _build(cls, values, base, where="")


def load_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is ``{}``. ``ConfigError`` if it is not a mapping or not YAML."""
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: expected YAML, got a file that does not parse: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, got a {type(values).__name__}.")
    return values


def save_yaml(config: Any, path: str | os.PathLike[str]) -> None:
    """Write every field, with its docstring above it as a comment. ``load_yaml`` and ``from_dict`` give it back."""
    Path(path).write_text(_yaml_text(config, 0), encoding="utf-8")


def parse(
    config_cls: type[C],
    argv: Sequence[str] | None = None,
    yaml_overlay: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    prog: str | None = None,
    description: str | None = None,
) -> C:
    """The configuration of a run: defaults, then ``yaml_overlay`` (a file or a mapping), then ``argv``.

    ``argv=None`` reads ``sys.argv``. A wrong flag ends the program with a usage message; a wrong YAML key raises
    :class:`ConfigError`. A field without a default has to be in one of the two.
    """
    values = yaml_overlay if isinstance(yaml_overlay, Mapping) else load_yaml(yaml_overlay) if yaml_overlay else {}
    default = _build(config_cls, values, None, where="", required=tyro.MISSING) if values else tyro.MISSING_NONPROP
    return tyro.cli(config_cls, prog=prog, description=description, args=argv, default=default)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` to ``{"a.b": 1}``: for TensorBoard's hyper-parameters and tables."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


def field_docs(cls: type[Any]) -> dict[str, str]:
    """Field name to the docstring under it (of base classes too), on one line; fields without one are left out."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        except (OSError, TypeError, SyntaxError):  # typed into an interpreter: there is no source to read
            continue
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
                and isinstance(below.value.value, str)
            ):
                docs[field.target.id] = " ".join(below.value.value.split())
    return docs


def _build(cls: type[C], values: Mapping[str, Any], base: Any, where: str, required: Any = None) -> C:
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=3)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            for name, field in fields.items():
                nested = _default(field)
                if dataclasses.is_dataclass(nested) and hasattr(nested, str(key)):
                    hint = f" It is a key of {name!r}: write it, indented, below a line `{where}{name}:`."
            known = f"Expected some of {', '.join(fields)}."
            raise ConfigError(f"{where}{key}: unknown key of {cls.__name__}.{hint} {known}")
    hints = hints_of(cast(Any, cls))
    arguments: dict[str, Any] = {}
    for name, field in fields.items():
        current = getattr(base, name, dataclasses.MISSING) if base is not None else _default(field)
        if name in values:
            arguments[name] = convert(values[name], hints[name], current, f"{where}{name}", _build)
        elif current is not dataclasses.MISSING:
            arguments[name] = current
        elif required is not None:
            arguments[name] = required
        else:
            raise ConfigError(f"{where}{name}: expected a value ({cls.__name__} has no default for it), got none.")
    return cls(**arguments)


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value


def _yaml_text(config: Any, indent: int) -> str:
    docs, pad, parts = field_docs(type(config)), " " * indent, []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in docs:
            comment = f"{pad}# "
            parts.append(textwrap.fill(docs[field.name], 110, initial_indent=comment, subsequent_indent=comment) + "\n")
        if dataclasses.is_dataclass(value):
            parts.append(f"{pad}{field.name}:\n{_yaml_text(value, indent + 2)}")
        else:
            # Inside a list, so that lists and mappings stay on the line and strings are quoted where needed.
            text = yaml.dump([_plain(value)], Dumper=_Dumper, default_flow_style=True, sort_keys=False, width=1_000_000)
            text = text.strip()
            parts.append(f"{pad}{field.name}: {text[1:-1]}\n")
    return "".join(parts) or f"{pad}{{}}\n"
