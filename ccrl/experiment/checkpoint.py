"""Checkpoints that survive ``kill -9`` and load without running foreign code.

A checkpoint is one ``torch.save`` file holding a tree of plain values and the version of its format. It is written
beside its final name and renamed when it is on the disk, so that a reader sees the old file or the new one, never half
of one. A file of another format is refused: completed with defaults it would train on with settings it never had.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ccrl
from ccrl.experiment.files import CheckpointError, remove_leftovers, write_atomic, writing

__all__ = [
    "FORMAT",
    "REPLAY",
    "CheckpointError",
    "FormatError",
    "check_keys",
    "checkpoint_path",
    "different_shapes",
    "generator_state",
    "latest",
    "load",
    "nonfinite",
    "portable",
    "preserved_rng",
    "prune",
    "remove_damaged",
    "rng_state",
    "save",
    "segment_names",
    "set_generator_state",
    "set_rng_state",
]

_STEP_FILE = re.compile(r"step_(\d+)\.pt")
_FOREIGN = re.compile(r"GLOBAL (\S+)")


REPLAY = "replay"
"""Folder of segments, beside checkpoints."""

FORMAT = 2
"""Version of what a checkpoint holds; ccrl 0.1 wrote none."""


class FormatError(CheckpointError):
    """A whole checkpoint that another version of ccrl wrote; the message says which reads it."""


def portable(tree: Any, where: str = "state") -> Any:
    """The same tree out of what ``torch.load(weights_only=True)`` accepts.

    NumPy arrays become tensors, NumPy scalars Python numbers, mappings ``dict``, named tuples ``tuple``, paths text;
    tensors are detached but keep their storage (views of one flat vector are stored once).

    Raises ``TypeError``, naming the place in the tree, for anything else: found here and not at the resume.
    """
    if isinstance(tree, Tensor):
        return tree.detach()
    if isinstance(tree, np.ndarray) and tree.dtype != object:
        # A copy: torch shares neither read-only arrays nor negative strides.
        try:
            return torch.from_numpy(tree.astype(tree.dtype.newbyteorder("=")))
        except TypeError as error:
            raise TypeError(f"{where}: expected an array of numbers; received one of {tree.dtype}.") from error
    if isinstance(tree, np.generic):
        tree = tree.item()
    if tree is None or type(tree) in (bool, int, float, complex, str, bytes, torch.dtype, torch.device):
        return tree
    if isinstance(tree, PurePath):
        return str(tree)
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


def save(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write ``state`` (see :func:`portable`) to ``path`` atomically; makes the folder.

    Raises ``TypeError`` for what is not portable, ``ccrl.experiment.files.WriteError`` where the disk does not take it.
    """
    path = Path(path)
    with writing(path):
        if not path.name or "\0" in str(path) or path.is_dir():
            raise ValueError(f"path: expected the name of a file, got {str(path)!r}")
    tree = {"format_version": FORMAT, "ccrl": ccrl.__version__, **portable(state)}
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda file: torch.save(tree, file))


def load(path: str | os.PathLike[str], map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """What :func:`save` was given; no code of the file is run.

    Raises ``FileNotFoundError``, :class:`CheckpointError` for a damaged file or one with foreign objects, or
    :class:`FormatError` for one of another format version or of none.
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
    version = state.get("format_version")
    if type(version) is not int or version != FORMAT:
        found = "no format version" if version is None else f"format {version!r}"
        reader = f"ccrl {state.get('ccrl')} wrote it and reads it"
        if version is None:
            reader = "it is no checkpoint of ccrl's, or one of ccrl 0.1.0, which reads it"
        raise FormatError(
            f"{path}: expected a checkpoint of format {FORMAT}, got one with {found}; {reader}, ccrl "
            f"{ccrl.__version__} does not"
        )
    return {key: value for key, value in state.items() if key not in ("format_version", "ccrl")}


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


def segment_names(state: Any) -> set[str]:
    """Files beside the checkpoint, in the folder ``REPLAY``, that hold a part of ``state`` (``ccrl.segments``)."""
    if not isinstance(state, dict):
        return set()
    listed = state.get("segments")
    own = {str(s.get("name")) for s in listed if isinstance(s, dict)} if isinstance(listed, list) else set()
    return own.union(*(segment_names(v) for v in state.values()))


def _sound(path: Path) -> bool:
    """Whether a file is there and its checksums are right."""
    if not path.is_file() or not _is_zip(path):
        return False
    try:
        _check_sums(path)
    except Exception:  # which one depends on the bits that flipped
        return False
    return True


def checkpoint_path(folder: str | os.PathLike[str], step: int) -> Path:
    """``folder/step_000000012345.pt``: zero-padded, so that names sort by step."""
    return Path(folder) / f"step_{step:012d}.pt"


def latest(folder: str | os.PathLike[str]) -> Path | None:
    """The newest whole checkpoint ``step_*.pt``, its segments included, or None. Damaged ones are skipped with a
    warning; one of another format raises :class:`FormatError`."""
    sound: dict[str, bool] = {}
    for path in reversed(_checkpoints(folder)):
        try:
            for name in sorted(segment_names(load(path))):
                if not sound.setdefault(name, _sound(Path(folder) / REPLAY / name)):
                    raise CheckpointError(f"{path}: expected its segment {REPLAY}/{name}, which is damaged or missing")
        except FormatError:
            raise
        except CheckpointError as error:
            warnings.warn(f"checkpoint {path} is damaged; trying the one before ({error})", stacklevel=2)
        else:
            return path
    return None


def prune(folder: str | os.PathLike[str], keep: int) -> None:
    """Delete all but the ``keep`` newest ``step_*.pt``, and what killed writers left behind."""
    if keep < 1:
        raise ValueError(f"keep: expected at least 1 (else nothing could be resumed); received {keep}.")
    for path in _checkpoints(folder)[:-keep]:
        path.unlink(missing_ok=True)
    remove_leftovers(folder)


def remove_damaged(folder: str | os.PathLike[str]) -> None:
    """Delete the ``step_*.pt`` past the newest whole one: half-written or damaged ones, which would pass for newer."""
    newest = latest(folder)
    for path in _checkpoints(folder):
        if newest is not None and path > newest:
            path.unlink(missing_ok=True)


def _checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    found = [(int(match[1]), path) for path in Path(folder).glob("*.pt") if (match := _STEP_FILE.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def different_shapes(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, tuple[Any, Any]]:
    """Where two state dicts do not fit: name -> the shapes in ``own`` and in ``saved``, None where it is missing."""
    ours, theirs = ({name: tuple(x.shape) for name, x in tensors.items()} for tensors in (own, saved))
    names = sorted(ours.keys() | theirs.keys())
    return {name: (ours.get(name), theirs.get(name)) for name in names if ours.get(name) != theirs.get(name)}


def check_keys(saved: Mapping[str, Any], own: Mapping[str, Any], where: str, depth: int = 1) -> None:
    """:class:`CheckpointError` where ``saved`` lacks keys that ``own`` has, or has others.

    Args:
        where: what it is a state of, for the message.
        depth: how many levels of mappings are compared.
    """
    if not isinstance(saved, Mapping):
        raise CheckpointError(f"{where}: expected a mapping, got {type(saved).__name__}; the file is damaged")
    faults = list(_different_keys(saved, own, "", depth))
    if faults:
        raise CheckpointError(f"{where}: expected the keys of this version, got a state with {', '.join(faults)}")


def _different_keys(saved: Mapping[str, Any], own: Mapping[str, Any], prefix: str, depth: int) -> Iterator[str]:
    for key in own:
        if key not in saved:
            yield f"no {prefix}{key}"
        elif isinstance(own[key], Mapping) and depth > 1:
            if isinstance(saved[key], Mapping):
                yield from _different_keys(saved[key], own[key], f"{prefix}{key}.", depth - 1)
            else:
                yield f"a {type(saved[key]).__name__} as {prefix}{key}"
    yield from (f"an unknown {prefix}{key}" for key in saved if key not in own)


def nonfinite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors with NaN or infinite values; waits for the device once."""
    floats = {name: x for name, x in tensors.items() if x.is_floating_point() and x.numel()}
    if not floats:
        return []
    good = torch.stack([x.detach().isfinite().all() for x in floats.values()]).tolist()
    return [name for name, ok in zip(floats, good, strict=True) if not ok]


@contextlib.contextmanager
def preserved_rng() -> Iterator[None]:
    """Put the global generators back afterwards: what is built or loaded inside does not move the caller's numbers."""
    before = rng_state()
    try:
        yield
    finally:
        set_rng_state(before)


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
