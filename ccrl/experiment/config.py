"""Configurations: frozen dataclasses with a docstring under each field, to and from YAML and the command line.

    @dataclass(frozen=True)
    class PPOConfig:
        learning_rate: float = 3e-4
        \"\"\"Step size of Adam.\"\"\"

The docstrings are the help text of the command line and the comments of a saved ``config.yaml``. Values come from the
defaults, then a YAML file, then the command line; unknown keys and wrong types stop the run before it starts.
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
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
import yaml

__all__ = ["ConfigError", "Options", "field_docs", "flatten", "from_dict", "load_yaml", "parse", "save_yaml", "to_dict"]

C = TypeVar("C")


class ConfigError(ValueError):
    """An unknown key or a value of the wrong type; the message names the key, what was expected and the fix."""


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


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+"), list("-+0123456789")
)


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values, tuples as lists: what YAML holds."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise ConfigError(f"to_dict: expected a dataclass instance; received {config!r}.")
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
        raise ConfigError(f"{path}: expected YAML; received a file that does not parse: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected `key: value` lines; received a {type(values).__name__}.")
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
            raise ConfigError(f"{where}{key}: unknown key of {cls.__name__}.{hint} Known keys: {', '.join(fields)}.")
    hints = get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for name, field in fields.items():
        current = getattr(base, name, dataclasses.MISSING) if base is not None else _default(field)
        if name in values:
            arguments[name] = _convert(values[name], hints[name], current, f"{where}{name}")
        elif current is not dataclasses.MISSING:
            arguments[name] = current
        elif required is not None:
            arguments[name] = required
        else:
            raise ConfigError(f"{where}{name}: expected a value ({cls.__name__} has no default for it); received none.")
    return cls(**arguments)


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _convert(value: Any, hint: Any, current: Any, where: str) -> Any:
    """``value`` as ``hint`` wants it. ``current`` is what a nested configuration is laid over."""
    origin, options = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        if isinstance(value, Mapping):
            return _build(hint, value, current if isinstance(current, hint) else None, f"{where}.")
    elif origin in (Union, types.UnionType):
        for option in sorted(options, key=lambda option: type(value) is not option):  # 1 stays an int in float | int
            try:
                return _convert(value, option, current, where)
            except ConfigError as error:
                if isinstance(value, Mapping) and dataclasses.is_dataclass(option) and type(current) is option:
                    raise error  # its own message says more than "one of ..." would
    elif origin is Literal:
        if any(value == option and type(value) is type(option) for option in options):
            return value
        near = difflib.get_close_matches(str(value), [str(option) for option in options], n=1)
        hint_text = f" Did you mean {near[0]}?" if near else ""
        words = [option for option in options if yaml.safe_load(str(option)) is value] if type(value) is bool else []
        if words:  # compile: off
            hint_text = f' Write "{words[0]}", in quotes: YAML takes the bare word for a boolean.'
        raise ConfigError(f"{where}: expected one of {', '.join(map(repr, options))}; received {value!r}.{hint_text}")
    elif origin in (tuple, list) and isinstance(value, list | tuple):
        if origin is list or options[1:] == (...,):
            inner = [options[0]] * len(value)
        else:
            inner = list(options)
        if len(inner) == len(value):
            return origin(
                _convert(v, t, None, f"{where}[{i}]") for i, (v, t) in enumerate(zip(value, inner, strict=True))
            )
    elif origin is dict and isinstance(value, Mapping):
        return {
            _convert(k, options[0], None, f"{where} (a key)"): _convert(v, options[1], None, f"{where}[{k!r}]")
            for k, v in value.items()
        }
    elif hint is Any or (hint in (None, type(None)) and value is None):
        return value
    elif hint is float and type(value) in (int, float):
        return float(value)
    elif hint is Path and isinstance(value, str | Path):
        return Path(value)
    elif isinstance(hint, type) and type(value) is hint:
        return value
    raise ConfigError(
        f"{where}: expected {_name(hint)}; received {value!r} ({type(value).__name__}).{_fix(value, hint)}"
    )


def _fix(value: Any, hint: Any) -> str:
    if isinstance(value, str) and hint in (int, float, bool):
        return " Write it without quotes."
    if hint is int and isinstance(value, float) and value.is_integer():
        return f" Write {int(value)}."
    if hint is str and isinstance(value, bool):  # compile: off
        return " Write the word in quotes: YAML takes on, off, yes and no for booleans."
    if hint is str:
        return f' Write "{value}", in quotes.'
    return ""


def _name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")


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
            text = yaml.safe_dump([_plain(value)], default_flow_style=True, sort_keys=False, width=1_000_000).strip()
            parts.append(f"{pad}{field.name}: {text[1:-1]}\n")
    return "".join(parts) or f"{pad}{{}}\n"
