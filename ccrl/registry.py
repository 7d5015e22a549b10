"""Ids to constructors: the one place where a name that somebody wrote becomes code.

    registry.environments.register("PointMass-v0", PointMass)  # or "my_pkg.point:PointMass", loaded when asked for
    registry.environments.get("PointMass-v0")(8, device="cpu", goal=1.0)

This package names none of the modules that register here. On the first id that nobody has registered it loads the
*plugins*: the modules that installed distributions name as entry points of the group ``ccrl.plugins``. From a tree that
is not installed, import the package that registers the id first. ``"module:name"`` is an import that a caller wrote,
:func:`load`; one that was read from a file is refused, :func:`stored`.
"""

from __future__ import annotations

import difflib
import importlib
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from ccrl.packages import check_siblings

__all__ = [
    "FAMILIES", "PLUGINS", "Registry", "UntrustedError", "agents", "environments", "flow_tasks",
    "functional_environments", "import_module", "is_module_name", "load", "load_function", "methods",
    "stored", "text_tasks",
]  # fmt: skip

PLUGINS = "ccrl.plugins"
"""Group of the entry points."""

FAMILIES = ("isaac", "mjlab", "sb3", "sb3-contrib", "reasoning_gym")
"""What stands before the colon of names that others registered (``isaac:Isaac-Ant-v0``): never taken for a module."""


class UntrustedError(ValueError):
    """A name in a file would import a module; nobody but the caller may ask for that."""


@dataclass(frozen=True)
class _Stored:
    source: str
    trust: frozenset[str]


_reading: ContextVar[_Stored | None] = ContextVar("ccrl_registry_reading", default=None)


@contextmanager
def stored(source: str, trust: Collection[str] = ()) -> Iterator[None]:
    """Inside, names come from a file: a checkpoint's header, the YAML of a run folder. Registered names resolve,
    ``module:name`` does not, unless the caller repeats that very string.

    Args:
        source: the file, for the message.
        trust: strings that may import.
    """
    token = _reading.set(_Stored(source, frozenset(trust)))
    try:
        yield
    finally:
        _reading.reset(token)


def is_module_name(name: str) -> bool:
    """Whether ``name`` is ``module:name``: with a colon, and not of a family."""
    module, colon, _ = name.partition(":")
    return bool(colon) and module not in FAMILIES


def import_module(name: str) -> Any:
    """The module of ``module:name``, imported.

    Raises:
        UntrustedError: ``name`` was read from a file and not repeated by the caller.
        ModuleNotFoundError: there is no such module; what a module itself lacks is passed on as it is.
    """
    module, _, attribute = name.rpartition(":")
    reading = _reading.get()
    if reading is not None and name not in reading.trust:
        raise UntrustedError(
            f"{reading.source} names {name!r}, which would import the module {module!r}: a file may name only what is "
            f"registered. If you know that module, repeat the name: trust=({name!r},), in scripts --trust {name}"
        )
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there and misses a package of its own
        near = (
            [module.removesuffix(".py")] if module.endswith(".py") else difflib.get_close_matches(module, FAMILIES, n=1)
        )
        hint = f"did you mean {near[0]}:{attribute}? Else " if near else ""
        raise ModuleNotFoundError(
            f"{name!r}: expected a module {module!r} that has {attribute!r}, found none; {hint}install its package or "
            "put its folder on PYTHONPATH",
            name=error.name,
        ) from error
    except (ValueError, TypeError) as error:
        if all(part.isidentifier() for part in module.split(".")):
            frames = traceback.extract_tb(error.__traceback__)
            at = next((frame for frame in reversed(frames) if frame.name == "<module>"), frames[-1])
            raise ImportError(
                f"{name!r}: expected a module that can be imported, got {type(error).__name__} at {at.filename}:"
                f"{at.lineno}: {error}",
                name=module,
            ) from error
        raise ModuleNotFoundError(f"{name!r}: expected 'module:name', got {error}") from error  # "..x:y" and the like


def load(name: str) -> Any:
    """What ``module:name`` names, in a module that is imported for it.

    Raises:
        ValueError: it is not of that form, or the module has no such name.
        UntrustedError, ModuleNotFoundError: see :func:`import_module`.
    """
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute.isidentifier():
        late = "" if _loaded else (
            "; if it is the id of an environment, import envs first, or install the project: pip install -c "
            "constraints.txt -e ."
        )  # fmt: skip
        raise ValueError(f"expected 'module:name', as in 'my_package.my_module:MyClass', got {name!r}{late}")
    found = import_module(name)
    if not hasattr(found, attribute):
        near = difflib.get_close_matches(attribute, dir(found), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"{name!r}: expected a name {attribute!r} in {found.__name__}, there is none{hint}")
    return getattr(found, attribute)


def load_function(name: str, setting: str, expected: str) -> Callable[..., Any]:
    """The function that ``module:name`` names, for a setting that may be one.

    Raises:
        ValueError: there is none; the text says what ``setting`` is ``expected`` to be.
        UntrustedError: see :func:`import_module`.
    """
    try:
        found = load(name)
    except UntrustedError:
        raise
    except (ValueError, ModuleNotFoundError) as error:
        raise ValueError(f"{setting}: expected {expected}, got {name!r}: {error}") from error
    if not callable(found):
        raise ValueError(f"{setting}: expected a function at {name!r}, got {type(found).__name__}")
    function: Callable[..., Any] = found
    return function


class Registry:
    """Ids of one kind and what makes them.

    Args:
        kind: what the ids name, for messages.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._known: dict[str, Any] = {}
        self._finders: list[Callable[[str], Any]] = []

    def register(self, name: str, constructor: Any) -> None:
        """Let ``name`` mean ``constructor``, or what ``"module:name"`` names, which is imported when it is asked for.

        Raises:
            ValueError: the name means something else already.
        """
        if self._known.get(name, constructor) != constructor:
            raise ValueError(
                f"{self.kind} {name!r} is registered already, as {self._known[name]!r}; choose another name"
            )
        self._known[name] = constructor

    def register_finder(self, find: Callable[[str], Any]) -> None:
        """``find(name)`` is asked for names that are not registered; it returns a constructor or None."""
        if find not in self._finders:
            self._finders.append(find)

    def names(self) -> list[str]:
        """The registered names, sorted."""
        return sorted(self._known)

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def get(self, name: str) -> Any:
        """What ``name`` means: registered, found by a finder, of a plugin, or a ``module:name``.

        Raises:
            ValueError: nobody knows the name; the message has near ones.
            UntrustedError, ModuleNotFoundError: see :func:`import_module`.
        """
        found = self._find(name)
        if found is None:
            _load_plugins()
            found = self._find(name)
        if found is None and is_module_name(name):
            found = load(name)  # says what the module lacks
        if found is None:
            raise ValueError(self._unknown(name))
        return found

    def _find(self, name: str) -> Any:
        if name in self._known:
            found = self._known[name]
            if isinstance(found, str):
                # registered by code that runs, whatever file names it
                module, _, attribute = found.partition(":")
                return getattr(importlib.import_module(module), attribute)
            return found
        if is_module_name(name):
            module, _, attribute = name.rpartition(":")
            imported = import_module(name)
            if attribute.isidentifier() and hasattr(imported, attribute):
                return getattr(imported, attribute)
        for find in self._finders:
            if (found := find(name)) is not None:
                return found
        return None

    def _unknown(self, name: str) -> str:
        near = difflib.get_close_matches(name, self._known, n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        known = f"expected one of {', '.join(self.names())}, or 'module:name'" if self._known else "none is registered"
        missing = (
            "" if near or _loaded else
            ". No plugin is installed: from a folder that is not, import the package that registers the name first "
            "(`import envs`), or install the project: pip install -c constraints.txt -e ."
        )  # fmt: skip
        return f"no {self.kind} {name!r}; {hint}{known}{missing}"


environments = Registry("environment")
"""``(num_envs, *, device, **options) -> BatchedEnv``."""
functional_environments = Registry("functional environment")
"""``(**options) -> FunctionalEnv``."""
text_tasks = Registry("text task")
"""``(**options) -> TextTask``."""
flow_tasks = Registry("flow task")
"""``(**options) -> FlowTask``."""
agents = Registry("agent")
"""Agent classes."""
methods = Registry("method")
"""Methods for groups of episodes: objects that hold a recipe and its settings."""

_loaded: set[str] = set()


def _load_plugins() -> None:
    for point in entry_points(group=PLUGINS):
        if point.value in _loaded:
            continue
        _check(point)
        try:
            point.load()
        except ImportError as error:
            whose = "" if point.dist is None else f" of {point.dist.name}"
            raise ImportError(f"the plugin {point.value!r}{whose} cannot be imported: {error}") from error
        _loaded.add(point.value)


def _check(point: EntryPoint) -> None:
    # Our own names are names that other projects use too: what would be imported must be what was installed with us.
    if point.dist is not None and point.dist.name == __name__.partition(".")[0]:
        check_siblings(point.module.partition(".")[0])
