"""What a setting may be: types, ranges and choices, checked in Python as on the command line.

    @dataclass(frozen=True)
    class MyConfig(Settings):
        gamma: Unit = 0.99
        method: Literal["plain", "fancy"] = "plain"
        damping: Annotated[float, Range(0.0, 1e3)] = 0.1
        horizon: Count | None = None

``MyConfig(gamma=1.5)``, ``MyConfig(method="fency")`` and ``MyConfig(horizon=2.0)`` raise :class:`ConfigError`; so does
any NaN or infinity, unless the range names it (``Range(0.0, also=(math.inf,))``). :func:`checked` does the same for the
arguments of a function, :meth:`Range.check` for one number.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin

import tyro
import yaml

__all__ = [
    "Above", "Activation", "Compile", "ConfigError", "Count", "Finite", "Natural", "Nonnegative", "Positive", "Range",
    "Settings", "TimeLimit", "Unit", "checked", "convert",
]  # fmt: skip

F = TypeVar("F", bound=Callable[..., Any])


class ConfigError(ValueError):
    """An unknown key, a value of the wrong type or outside its range; the message names the key, what was expected and
    the fix."""


_SMALLEST, _LARGEST = 1.2e-38, 3.4e38


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included unless ``above`` (``low`` is not) or ``below`` (``high`` is not).

    ``also`` names values outside that are meant, such as ``math.inf``: infinite and NaN are in no range by themselves.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    also: tuple[float, ...] = ()

    def __contains__(self, value: float) -> bool:
        if value in self.also:
            return True
        inside = self.low < value if self.above else self.low <= value
        return math.isfinite(value) and inside and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        if self.low == -math.inf and self.high == math.inf:
            words = "a finite number"
        elif self.high == math.inf:
            words = f"{'>' if self.above else '>='} {self.low:g}"
        elif self.low == -math.inf:
            words = f"{'<' if self.below else '<='} {self.high:g}"
        else:
            words = f"a number in {'(' if self.above else '['}{self.low:g}, {self.high:g}{')' if self.below else ']'}"
        return " or ".join([words, *(f"{value:g}" for value in self.also)])

    def check(self, name: str, value: float) -> float:
        """``value``; raises :class:`ConfigError` with ``name`` where it is outside."""
        if isinstance(value, bool) or not isinstance(value, Real):
            raise ConfigError(f"{name}: expected {self}, got {value!r} ({type(value).__name__})")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ConfigError(f"{name}: expected {self}, of 64 bits, got {value!r}")
        if value not in self:
            finite = "" if math.isfinite(value) or self.also or "finite" in str(self) else " and finite"
            raise ConfigError(f"{name}: expected {self}{finite}, got {value!r}")
        # in float32, which networks compute in, others are 0 or infinite: the number would mean something else
        if value and math.isfinite(value) and not _SMALLEST <= abs(value) <= _LARGEST:
            raise ConfigError(
                f"{name}: expected {self}, 0 or of a size from {_SMALLEST:g} to {_LARGEST:g}, got {value!r}"
            )
        return value


def Above(low: float, high: float = math.inf) -> Range:
    """Numbers above ``low``, up to ``high``."""
    return Range(low, high, above=True)


Count = Annotated[int, Range(1)]
"""An integer of at least 1."""
Natural = Annotated[int, Range(0)]
"""An integer of at least 0."""
Positive = Annotated[float, Above(0)]
Nonnegative = Annotated[float, Range(0)]
Finite = Annotated[float, Range()]
Unit = Annotated[float, Range(0, 1)]
"""From 0 to 1, both included."""
Activation = Literal["tanh", "relu", "elu", "silu", "fast_tanh"]
Compile = Literal["auto", "on", "off"]
TimeLimit = Literal["bootstrap", "terminal"]


class Settings:
    """Base of configurations: every field is checked when an object is made, and takes the form that YAML gives it
    (a list becomes a tuple, 1 a float). A subclass with its own ``__post_init__`` calls this one first.

    Raises:
        ConfigError: see the module.
    """

    def __post_init__(self) -> None:
        hints = hints_of(cast(Any, type(self)))
        for field in fields(cast(Any, self)):
            value = getattr(self, field.name)
            # what the command line still has to fill in
            if field.init and value is not tyro.MISSING and value is not tyro.MISSING_NONPROP:
                object.__setattr__(self, field.name, convert(value, hints[field.name], value, field.name))


def checked(function: F) -> F:
    """A decorator: arguments of numbers, texts and choices are checked by their annotations, all others are left alone.

    For constructors that users reach with options from a command line or a file.
    """
    signature = inspect.signature(function)
    own = {name: p.annotation for name, p in signature.parameters.items() if p.annotation is not p.empty}

    @functools.cache
    def hints() -> dict[str, Any]:
        names = dict(function.__globals__)
        found = {name: eval(hint, names) if isinstance(hint, str) else hint for name, hint in own.items()}
        return {name: hint for name, hint in found.items() if _is_plain(hint)}

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            known = ", ".join(name for name in signature.parameters if name != "self")
            raise TypeError(f"{function.__qualname__}: expected arguments among {known}: {error}") from None
        for name, value in bound.arguments.items():
            if name in hints() and signature.parameters[name].kind not in (
                inspect.Parameter.VAR_POSITIONAL,
                inspect.Parameter.VAR_KEYWORD,
            ):
                bound.arguments[name] = convert(value, hints()[name], value, name)
        return function(*bound.args, **bound.kwargs)

    return cast(F, call)


@functools.cache
def hints_of(cls: type[Any]) -> dict[str, Any]:
    """The annotations of a class and its bases as objects, ``Annotated`` kept. In a class that a function makes, or
    whose module is gone, one whose names cannot be found is ``Any``; elsewhere that is a ``NameError``."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        module = sys.modules.get(base.__module__)
        names = {} if module is None else vars(module)
        for name, hint in inspect.get_annotations(base).items():
            try:
                found[name] = eval(hint, dict(names)) if isinstance(hint, str) else hint
            except NameError:
                if module is not None and "<locals>" not in base.__qualname__:
                    raise
                found[name] = Any
    return found


def _is_plain(hint: Any) -> bool:
    """Made of numbers, texts, choices and None alone."""
    if get_origin(hint) in (Union, types.UnionType, tuple, list, Annotated):
        inner = get_args(hint)[:1] if get_origin(hint) is Annotated else get_args(hint)
        return all(_is_plain(each) for each in inner if each is not ...)
    return get_origin(hint) is Literal or hint in (int, float, bool, str, None, type(None))


def convert(value: Any, hint: Any, current: Any, where: str, build: Callable[..., Any] | None = None) -> Any:
    """``value`` as ``hint`` wants it: the same, or what YAML and JSON have in its place.

    Args:
        current: what a nested configuration is laid over.
        where: its name, for messages.
        build: ``(cls, mapping, current, where)``, makes a nested configuration from a mapping; None refuses mappings.

    Raises:
        ConfigError: see the module.
    """
    origin, options = get_origin(hint), get_args(hint)
    if origin is Annotated:
        ranges = [each for each in options[1:] if isinstance(each, Range)]
        if not ranges:
            return convert(value, options[0], current, where, build)
        return ranges[0].check(where, _typed(value, options[0], where))
    if is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        if isinstance(value, Mapping) and build is not None:
            return build(hint, value, current if isinstance(current, hint) else None, f"{where}.")
    elif origin in (Union, types.UnionType):
        return _one_of(value, options, current, where, build)
    elif origin is Literal:
        if any(value == option and type(value) is type(option) for option in options):
            return value
        raise _no_choice(value, options, where)
    elif origin in (tuple, list) and isinstance(value, list | tuple):
        many = origin is list or options[1:] == (...,)
        inner = [options[0]] * len(value) if many else list(options)
        if len(inner) == len(value):
            pairs = enumerate(zip(value, inner, strict=True))
            return origin(convert(v, t, None, f"{where}[{i}]", build) for i, (v, t) in pairs)
    elif origin is dict and isinstance(value, Mapping):
        key, item = options
        return {
            convert(k, key, None, f"{where} (a key)", build): convert(v, item, None, f"{where}[{k!r}]", build)
            for k, v in value.items()
        }
    elif hint is float:
        return Range().check(where, _typed(value, float, where))
    else:
        return _typed(value, hint, where)
    raise _wrong(value, hint, where)


def _typed(value: Any, hint: Any, where: str) -> Any:
    """``value`` if it is of the type ``hint``; whole numbers for floats and texts for paths are turned into them."""
    if hint is Any or (hint in (None, type(None)) and value is None):
        return value
    if hint is float and isinstance(value, Real) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(f"{where}: expected a finite number, got one beyond 1.8e308") from None
    if hint is int and isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    if hint in (bool, int, float, str, Path, None, type(None)):
        if type(value) is hint:
            return value
    else:
        try:
            if isinstance(value, get_origin(hint) or hint):
                return value
        except TypeError:  # a type that cannot be tested for, such as a TypeVar
            return value
    raise _wrong(value, hint, where)


def _one_of(value: Any, options: tuple[Any, ...], current: Any, where: str, build: Callable[..., Any] | None) -> Any:
    errors: dict[Any, ConfigError] = {}
    # 1 stays an int in float | int
    for option in sorted(options, key=lambda option: type(value) is not _bare(option)):
        try:
            return convert(value, option, current, where, build)
        except ConfigError as error:
            if isinstance(value, Mapping) and is_dataclass(option) and type(current) is option:
                raise error  # its own message says more than "one of ..." would
            errors[option] = error
    tested = [option for option in options if option not in (None, type(None))]
    number = isinstance(value, Real) and not isinstance(value, bool)
    if len(tested) == 1 and (number or get_origin(tested[0]) is Literal):
        raise errors[tested[0]]  # what is wrong with it, not that None would be right too
    raise _wrong(value, Union[options], where)  # noqa: UP007


def _bare(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _no_choice(value: Any, options: tuple[Any, ...], where: str) -> ConfigError:
    near = difflib.get_close_matches(str(value), [str(option) for option in options], n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    words = [option for option in options if yaml.safe_load(str(option)) is value] if type(value) is bool else []
    if words:  # compile: off
        hint = f' Write "{words[0]}", in quotes: YAML takes the bare word for a boolean.'
    return ConfigError(f"{where}: expected one of {', '.join(map(repr, options))}, got {value!r}.{hint}")


def _wrong(value: Any, hint: Any, where: str) -> ConfigError:
    return ConfigError(f"{where}: expected {_name(hint)}, got {value!r} ({type(value).__name__}).{_fix(value, hint)}")


def _fix(value: Any, hint: Any) -> str:
    if isinstance(value, str) and hint in (int, float, bool):
        return " Write it without quotes."
    if hint is int and isinstance(value, float) and value.is_integer() and abs(value) < 2**63:
        return f" Write {int(value)}."
    if hint is str and isinstance(value, bool):  # compile: off
        return " Write the word in quotes: YAML takes on, off, yes and no for booleans."
    if hint is str:
        return f' Write "{value}", in quotes.'
    options = get_args(hint)
    if get_origin(hint) in (tuple, list) and options[1:] in ((), (...,)) and type(value) is _bare(options[0]):
        return f" Write [{value!r}]."
    return ""


def _name(hint: Any) -> str:
    origin, options = get_origin(hint), get_args(hint)
    if origin is Annotated:
        ranges = [str(each) for each in options[1:] if isinstance(each, Range)]
        return " ".join([_name(options[0]), *ranges])
    if origin in (Union, types.UnionType):
        return " | ".join(_name(option) for option in options)
    if origin is Literal:
        return f"one of {', '.join(map(repr, options))}"
    if origin in (tuple, list):
        return f"{origin.__name__}[{', '.join('...' if each is ... else _name(each) for each in options)}]"
    if hint in (None, type(None)):
        return "None"
    return hint.__name__ if isinstance(hint, type) and not options else str(hint).replace("typing.", "")
