"""Checkpoints that survive ``kill -9`` and load without running foreign code.

A checkpoint is one ``torch.save`` file holding a tree of plain values. It is written beside its final name and renamed
when it is on the disk, so that a reader sees the old file or the new one, never half of one.
"""

from __future__ import annotations

import os
import pickle
import random
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "CheckpointError",
    "checkpoint_path",
    "different_shapes",
    "generator_state",
    "latest",
    "load",
    "portable",
    "prune",
    "rng_state",
    "save",
    "set_generator_state",
    "set_rng_state",
    "write_atomic",
]

_STEP_FILE = re.compile(r"step_(\d+)\.pt")
_FOREIGN = re.compile(r"GLOBAL (\S+)")


class CheckpointError(RuntimeError):
    """A file that cannot be used as a checkpoint: damaged, or with objects in it that need foreign code."""


def portable(tree: Any, where: str = "state") -> Any:
    """The same tree out of what ``torch.load(weights_only=True)`` accepts.

    NumPy arrays become tensors, NumPy scalars Python numbers, mappings ``dict``, named tuples ``tuple``; tensors are
    detached but keep their storage (views of one flat vector are stored once).

    Raises ``TypeError``, naming the place in the tree, for anything else: found here and not at the resume.
    """
    if isinstance(tree, Tensor):
        return tree.detach()
    if isinstance(tree, np.ndarray) and tree.dtype != object:
        # A copy: torch shares neither read-only arrays nor negative strides.
        return torch.from_numpy(tree.copy())
    if isinstance(tree, np.generic):
        return tree.item()
    if tree is None or type(tree) in (bool, int, float, complex, str, bytes, torch.dtype, torch.device):
        return tree
    if isinstance(tree, Mapping):
        return {_portable_key(key, where): portable(value, f"{where}[{key!r}]") for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        kind = list if isinstance(tree, list) else tuple
        return kind(portable(value, f"{where}[{i}]") for i, value in enumerate(tree))
    raise TypeError(
        f"{where}: expected a tensor, array, number, str, bytes, None or a dict, list or tuple of them; received "
        f"{type(tree).__module__}.{type(tree).__qualname__}. Convert it in state_dict() (a NumPy Generator: "
        f"generator_state)."
    )


def _portable_key(key: Any, where: str) -> Any:
    if type(key) in (str, int, float, bool):
        return key
    raise TypeError(f"{where}: expected keys of type str or int; received {key!r}. Convert it in state_dict().")


def write_atomic(path: Path, write: Any) -> None:
    """Call ``write(file)`` on a new binary file in the folder of ``path``, then rename it to ``path``.

    The data are on the disk before the rename, and the rename before the return.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # Without this the rename itself can be lost in a power cut, on POSIX; Windows cannot open folders.
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write ``state`` (see :func:`portable`) to ``path`` atomically; makes the folder."""
    path = Path(path)
    tree = portable(state)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda file: torch.save(tree, file))


def load(path: str | os.PathLike[str], map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint; no code of the file is run.

    Raises ``FileNotFoundError``, or :class:`CheckpointError` for a damaged file or one with foreign objects.
    """
    path = Path(path)
    if not path.is_file():
        beside = sorted(other.name for other in path.parent.glob("*.pt"))
        raise FileNotFoundError(f"expected a checkpoint at {path}; received no file. In that folder: {beside}.")
    if not _is_zip(path):
        raise CheckpointError(
            f"{path}: expected a checkpoint written by save(); received {path.stat().st_size} bytes that are "
            f"truncated or of another format. Use an older checkpoint (latest() finds the newest whole one)."
        )
    try:
        _check_sums(path)
        state = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        foreign = _FOREIGN.search(str(error))
        name = f"the foreign object {foreign[1]}" if foreign else "a foreign object"
        raise CheckpointError(
            f"{path}: expected tensors and plain values; received {name}. It is refused because unpickling it runs "
            f"code of the file. Save plain values instead (portable() converts NumPy)."
        ) from error
    except Exception as error:  # which one depends on the bits that flipped
        raise CheckpointError(
            f"{path}: expected a whole checkpoint; received a damaged file ({error!r}). Use an older checkpoint."
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: expected a dict; received {type(state).__name__}. Write it with save().")
    return state


def _is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # said of some damages of the last bytes
        return False


def _check_sums(path: Path) -> None:
    # torch reads tensors without looking at their checksums: a flipped bit would become a parameter
    with zipfile.ZipFile(path) as archive:
        for x in archive.infolist():
            # nothing is compressed; with a wrong size testzip() would not get as far as the checksum, and of what
            # calls itself a folder (bit 4) torch reads nothing and returns memory as it finds it
            if x.file_size != x.compress_size or x.compress_type != zipfile.ZIP_STORED or x.external_attr & 16:
                raise zipfile.BadZipFile(f"bad header of {x.filename}")
        if (damaged := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"bad checksum of {damaged}")


def checkpoint_path(folder: str | os.PathLike[str], step: int) -> Path:
    """``folder/step_000000012345.pt``: zero-padded, so that names sort by step."""
    return Path(folder) / f"step_{step:012d}.pt"


def latest(folder: str | os.PathLike[str]) -> Path | None:
    """The newest whole checkpoint ``step_*.pt``, or None. Those that do not load are skipped with a warning."""
    for path in reversed(_checkpoints(folder)):
        try:
            load(path)
        except CheckpointError as error:
            warnings.warn(f"checkpoint {path} is damaged; trying the one before ({error})", stacklevel=2)
        else:
            return path
    return None


def prune(folder: str | os.PathLike[str], keep: int) -> None:
    """Delete all but the ``keep`` newest ``step_*.pt`` and what killed writers left behind."""
    if keep < 1:
        raise ValueError(f"keep: expected at least 1 (else nothing could be resumed); received {keep}.")
    for path in _checkpoints(folder)[:-keep]:
        path.unlink(missing_ok=True)
    for path in Path(folder).glob(".step_*.tmp"):
        path.unlink(missing_ok=True)


def _checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    found = [(int(match[1]), path) for path in Path(folder).glob("*.pt") if (match := _STEP_FILE.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def different_shapes(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, tuple[Any, Any]]:
    """Where two state dicts do not fit: name -> the shapes in ``own`` and in ``saved``, None where it is missing."""
    ours, theirs = ({name: tuple(x.shape) for name, x in tensors.items()} for tensors in (own, saved))
    names = sorted(ours.keys() | theirs.keys())
    return {name: (ours.get(name), theirs.get(name)) for name in names if ours.get(name) != theirs.get(name)}


def rng_state() -> dict[str, Any]:
    """States of the global generators: Python, NumPy's legacy one, torch on the CPU and, once in use, on CUDA."""
    return {
        "python": random.getstate(),
        "numpy": portable(np.random.get_state(legacy=False)),  # noqa: NPY002  (the global one is what is saved)
        "torch": torch.get_rng_state(),
        "cuda": list(torch.cuda.get_rng_state_all()) if _cuda_in_use() else [],
    }


def _cuda_in_use() -> bool:
    # Asking CUDA for its state would start it: memory and seconds for a run that is on the CPU.
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put back what :func:`rng_state` returned. CUDA states of devices that are not here are left out."""
    random.setstate(_tuples(state["python"]))
    np.random.set_state(_arrays(state["numpy"]))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    for device, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda.cpu(), device)


def generator_state(generator: np.random.Generator) -> dict[str, Any]:
    """The state of a NumPy ``Generator`` (an env's ``np_random``) as plain values."""
    state: dict[str, Any] = portable(generator.bit_generator.state)
    return state


def set_generator_state(generator: np.random.Generator, state: Mapping[str, Any]) -> None:
    """Put back what :func:`generator_state` returned. ``ValueError`` if the bit generator is of another kind."""
    here = type(generator.bit_generator).__name__
    if state["bit_generator"] != here:
        raise ValueError(f"expected the state of a {here}; received one of a {state['bit_generator']}.")
    generator.bit_generator.state = _arrays(state)


def _arrays(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.cpu().numpy()
    if isinstance(tree, Mapping):
        return {key: _arrays(value) for key, value in tree.items()}
    return tree


def _tuples(tree: Any) -> Any:
    return tuple(_tuples(value) for value in tree) if isinstance(tree, list | tuple) else tree
