"""The state of a Gymnasium environment as plain data: numbers, texts, arrays and containers of them.

Gymnasium has no way to save an environment, and a pickled one would run whatever code a checkpoint names. What is
saved here are the attributes of the objects that the environment consists of; they are put back into the objects of an
environment that was built in the same way. Where an attribute is neither plain data nor an object of such attributes,
the state is incomplete, and the first such attribute is named. Attributes of classes and modules are not looked at.
"""

from __future__ import annotations

import enum
import hashlib
import random
import types
from collections import deque
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.wrappers import PassiveEnvChecker
from torch import Tensor

__all__ = ["load_plain_state", "plain_state", "read_plain", "write_plain"]

_PLAIN = (bool, int, float, str, type(None))
_CONSTANT = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType, np.dtype,
             EnvSpec, enum.Enum)  # fmt: skip
"""What is known by its name: an environment that was built in the same way has it too."""
_SKIPPED = {PassiveEnvChecker: ("_previous_data",)}
"""Attributes that only checks look at."""
_MAX_OBJECTS = 100_000


class _Incomplete(Exception):
    """The attribute whose state cannot be had."""


def plain_state(env: gymnasium.Env[Any, Any]) -> tuple[dict[str, Any], str | None]:
    """State of ``env`` and its wrappers, and why it is not complete (``None`` where it is)."""
    try:
        return _Reader().read(env, type(env).__name__), None
    except _Incomplete as error:
        return {}, str(error)


def load_plain_state(env: gymnasium.Env[Any, Any], state: dict[str, Any]) -> None:
    """Put ``state`` into an environment that was built as the saved one was.

    Raises:
        ValueError: the environment has other attributes than the saved one had.
    """
    _Writer().write(env, state, type(env).__name__)


def read_plain(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Arrays, numbers and containers of them, as a checkpoint takes them."""
    read: dict[str, Any] = _Reader().read(values, where)
    return read


def write_plain(state: dict[str, Any], where: str) -> dict[str, Any]:
    """What :func:`read_plain` was given."""
    values: dict[str, Any] = _Writer().write(None, state, where)
    return values


class _Reader:
    def __init__(self) -> None:
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []  # or an id could be taken twice

    def read(self, value: Any, where: str) -> Any:
        if type(value) in _PLAIN:
            return value
        if isinstance(value, _CONSTANT):
            return {"constant": _name(value)}
        if id(value) in self._seen:
            return {"same": self._seen[id(value)]}
        if len(self._alive) >= _MAX_OBJECTS:
            raise _Incomplete(f"{where}: more than {_MAX_OBJECTS} objects")
        number = self._seen[id(value)] = len(self._alive)
        self._alive.append(value)
        return {"number": number} | self._content(value, where)

    def _content(self, value: Any, where: str) -> dict[str, Any]:
        kind = type(value)
        if isinstance(value, gymnasium.Space):
            return {"space": self._space(value, where)}
        if isinstance(value, np.ndarray) and _has_tensors(value.dtype):
            return {"array": torch.from_numpy(np.array(value))}
        if isinstance(value, np.ndarray) and value.dtype.kind in "SU":
            return {"text": value.astype(str).tolist(), "type": str(value.dtype)}
        if isinstance(value, np.generic) and _has_tensors(value.dtype):
            return {"array": torch.from_numpy(np.array(value)), "scalar": str(value.dtype)}
        if isinstance(value, Tensor):
            return {"tensor": value.detach().clone()}
        if isinstance(value, torch.Generator):
            return {"torch": value.get_state()}
        if isinstance(value, np.random.Generator):
            return {"numpy": self.read(value.bit_generator.state, where)}
        if isinstance(value, np.random.RandomState):
            return {"legacy": self.read(value.get_state(legacy=False), where)}
        if isinstance(value, random.Random):
            return {"random": self.read(value.getstate(), where)}
        if kind is dict:
            if not all(type(key) in _PLAIN or (type(key) is tuple and {*map(type, key)} <= {*_PLAIN}) for key in value):
                raise _Incomplete(f"{where}: keys of a dict that are no plain data")
            return {"dict": [[key, self._part(x, f"{where}[{key!r}]")] for key, x in value.items()]}
        if kind in (list, tuple, set, frozenset, deque):
            parts = sorted(value, key=repr) if kind in (set, frozenset) else value
            limit = value.maxlen if isinstance(value, deque) else None
            return {kind.__name__: [self._part(x, f"{where}[{i}]") for i, x in enumerate(parts)], "maxlen": limit}
        if kind.__module__.startswith("mujoco.") and kind.__name__ == "MjModel":  # by name: MuJoCo is not imported
            return {"constant": _digest(value)}
        if kind.__module__.startswith("mujoco.") and kind.__name__ == "MjData":
            arrays = {name: torch.from_numpy(np.array(x)) for name, x in _mujoco_arrays(value)}
            return {"mujoco": arrays, "time": float(value.time)}
        if not hasattr(value, "__dict__") or _has_hidden_state(kind):
            raise _Incomplete(f"{where}: a {kind.__module__}.{kind.__name__}")
        skipped = _SKIPPED.get(kind, ())
        attributes = {k: self.read(x, f"{where}.{k}") for k, x in vars(value).items() if k not in skipped}
        return {"attributes": attributes, "class": kind.__qualname__}

    def _part(self, value: Any, where: str) -> Any:
        """An element of a container, which is made anew: objects could not be."""
        part = self.read(value, where)
        if isinstance(part, dict) and ("attributes" in part or "mujoco" in part):
            raise _Incomplete(f"{where}: a {type(value).__module__}.{type(value).__name__} in a container")
        return part

    def _space(self, space: gymnasium.Space[Any], where: str) -> Any:
        """Of a space only its random numbers change, if it was ever asked for some: its own and its parts'."""
        drawn = space._np_random
        own = None if drawn is None else self.read(drawn.bit_generator.state, where)
        return [own, [self._space(part, where) for part in _parts(space)]]


class _Writer:
    def __init__(self) -> None:
        self._made: dict[int, Any] = {}

    def write(self, target: Any, saved: Any, where: str) -> Any:
        """The value that ``saved`` stands for: ``target`` itself, changed, where it can be."""
        if not isinstance(saved, dict):
            return saved
        if "same" in saved:
            return self._made[saved["same"]]
        made = target
        if "number" in saved:
            self._made[saved["number"]] = target
        if "constant" in saved:
            present = _digest(target) if hasattr(target, "nbody") else _name(target)
            if present != saved["constant"]:
                raise ValueError(
                    f"{where}: expected {saved['constant']}, got {present}; this attribute has changed since the "
                    "environment was built, and cannot be put back"
                )
            return made
        if "space" in saved:
            self._space(target, saved["space"], where)
            return made
        if "attributes" in saved:
            if type(target).__qualname__ != saved["class"]:
                raise ValueError(
                    f"{where}: expected a {saved['class']}, got a {type(target).__qualname__}; build the environment "
                    "as the saved one was built"
                )
            for name in set(vars(target)) - set(saved["attributes"]) - set(_SKIPPED.get(type(target), ())):
                delattr(target, name)
            for name, value in saved["attributes"].items():
                present = vars(target).get(name)
                changed = self.write(present, value, f"{where}.{name}")
                if changed is not present or name not in vars(target):
                    object.__setattr__(target, name, changed)
            return made
        if "mujoco" in saved:
            for name, array in saved["mujoco"].items():
                present = getattr(target, name)
                if present.shape == array.shape:  # others are as long as there are contacts, and made anew in each step
                    present[...] = array.numpy()
            target.time = saved["time"]
            return made
        made = self._made[saved["number"]] = self._value(target, saved, where)
        return made

    def _space(self, space: gymnasium.Space[Any], saved: Any, where: str) -> None:
        own, parts = saved
        if own is not None:
            space.np_random.bit_generator.state = self.write(None, own, where)
        for part, state in zip(_parts(space), parts):
            self._space(part, state, where)

    def _value(self, target: Any, saved: dict[str, Any], where: str) -> Any:
        if "array" in saved:
            value = saved["array"].numpy()
            if "scalar" in saved:
                return value.astype(saved["scalar"])[()]
            fits = isinstance(target, np.ndarray) and (target.shape, target.dtype) == (value.shape, value.dtype)
            if fits and target.flags.writeable:
                target[...] = value  # in place: other attributes may be views of it
                return target
            return value.copy()
        if "text" in saved:
            return np.array(saved["text"]).astype(saved["type"])
        if "tensor" in saved:
            return saved["tensor"].clone()
        if "torch" in saved:
            generator = target if isinstance(target, torch.Generator) else torch.Generator()
            generator.set_state(saved["torch"].cpu())
            return generator
        if "numpy" in saved:
            state = self.write(None, saved["numpy"], where)
            made = target if isinstance(target, np.random.Generator) else None
            if made is None or made.bit_generator.state["bit_generator"] != state["bit_generator"]:
                made = np.random.Generator(_bit_generator(state["bit_generator"], where))
            made.bit_generator.state = state
            return made
        if "legacy" in saved:
            legacy = target if isinstance(target, np.random.RandomState) else np.random.RandomState()
            legacy.set_state(self.write(None, saved["legacy"], where))
            return legacy
        if "random" in saved:
            python = target if isinstance(target, random.Random) else random.Random()
            python.setstate(self.write(None, saved["random"], where))
            return python
        if "dict" in saved:
            pairs = saved["dict"]
            named = target if isinstance(target, dict) else {}
            return {_key(k): self.write(named.get(_key(k)), x, f"{where}[{k!r}]") for k, x in pairs}
        name = next(name for name in ("list", "tuple", "set", "frozenset", "deque") if name in saved)
        old = list(target) if isinstance(target, list | tuple | deque) else []
        old += [None] * (len(saved[name]) - len(old))
        parts = [self.write(was, x, f"{where}[{i}]") for i, (was, x) in enumerate(zip(old, saved[name]))]
        if name == "deque":
            return deque(parts, maxlen=saved["maxlen"])
        return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[name](parts)


def _parts(space: gymnasium.Space[Any]) -> list[Any]:
    parts = getattr(space, "spaces", ())
    return list(parts.values() if isinstance(parts, dict) else parts)


def _key(key: Any) -> Any:
    return tuple(key) if isinstance(key, list) else key


def _bit_generator(name: str, where: str) -> Any:
    known = {"PCG64": np.random.PCG64, "PCG64DXSM": np.random.PCG64DXSM, "MT19937": np.random.MT19937,
             "Philox": np.random.Philox, "SFC64": np.random.SFC64}  # fmt: skip
    if name not in known:
        raise ValueError(f"{where}: expected one of NumPy's bit generators ({', '.join(known)}), got {name!r}")
    return known[name]()


def _has_tensors(kind: np.dtype[Any]) -> bool:
    """Whether PyTorch has the type: neither numbers of more than 64 bits nor those in another machine's byte order."""
    return kind.kind in "biuf" and kind.isnative and kind.itemsize <= 8


def _name(value: Any) -> str:
    if isinstance(value, enum.Enum):
        return f"{type(value).__qualname__}.{value.name}"
    return str(getattr(value, "__qualname__", None) or getattr(value, "__name__", None) or type(value).__qualname__)


def _digest(model: Any) -> str:
    """Of the numbers of an ``MjModel``, which tasks that vary their physics change."""
    digest = hashlib.sha256()
    for _, array in _mujoco_arrays(model):
        digest.update(array.tobytes())
    return f"MjModel {digest.hexdigest()[:16]}"


def _mujoco_arrays(data: Any) -> list[tuple[str, Any]]:
    """The arrays of an ``MjData`` or ``MjModel``, also derived ones: tasks read those of the step before."""
    found = []
    for name in dir(data):
        if name.startswith(("_", "efc_", "iefc_")):
            continue
        value = getattr(data, name)
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf" and value.flags.writeable:
            found.append((name, value))
    return found


def _has_hidden_state(kind: type) -> bool:
    """Whether a class has slots, or derives from one written in C: state that its ``__dict__`` does not show."""
    heap = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement
    return any(
        base is not object and (vars(base).get("__slots__") or not base.__flags__ & heap) for base in kind.__mro__
    )
