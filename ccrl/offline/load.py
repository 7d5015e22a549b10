"""One name for every data set: what stands in a setting, a file or a command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ccrl.offline.arrays import load_npz, load_parquet
from ccrl.offline.d4rl import load_d4rl
from ccrl.offline.dataset import DataError, Dataset
from ccrl.offline.minari import load_minari
from ccrl.offline.ogbench import load_ogbench

__all__ = ["load_dataset"]

_KINDS: dict[str, Callable[..., Dataset]] = {
    "minari": load_minari,
    "d4rl": load_d4rl,
    "ogbench": load_ogbench,
    "npz": load_npz,
    "parquet": load_parquet,
}
_SUFFIXES = {".npz": "npz", ".parquet": "parquet", ".hdf5": "d4rl", ".h5": "d4rl"}


def load_dataset(name: str, **options: Any) -> Dataset:
    """``minari:ID``, ``ogbench:FILE``, ``d4rl:FILE`` or a file (``.npz``, ``.parquet`` of your own, ``.hdf5`` of D4RL).

    :param options: of the loader.
    :raises DataError: an unknown kind, or what the loader refuses.
    """
    kind, colon, rest = name.partition(":")
    if colon and kind in _KINDS:
        return _KINDS[kind](rest, **options)
    suffix = Path(name).suffix.lower()
    if suffix not in _SUFFIXES:
        raise DataError(
            f"dataset: expected minari:ID, ogbench:FILE, d4rl:FILE or a file that ends in {', '.join(_SUFFIXES)}, got "
            f"{name!r}"
        )
    if not Path(name).is_file():
        raise DataError(f"dataset: expected a file, found none at {name}")
    return _KINDS[_SUFFIXES[suffix]](name, **options)
