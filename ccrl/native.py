"""Small C++ files of ours as functions, where there is a compiler: :func:`library`.

For loops of ten thousand small operations that are one pass within the cache. Each has an eager form beside it, which
needs no compiler and is what it is tested against.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

from ccrl.waiting import waiting

__all__ = ["compiler", "library"]


def compiler() -> str | None:
    """The C++ compiler on PATH, by name."""
    return next((c for c in ("g++", "clang++", "c++") if shutil.which(c)), None)


@lru_cache(maxsize=16)
def library(source: Path, real: str) -> ctypes.CDLL:
    """``source`` compiled for this processor and loaded, with ``REAL`` defined as ``real`` (``"float"``, ``"double"``).

    Once per process, into a folder that is gone afterwards: half a second, and nothing on the disk that could be stale,
    meant for another processor of a cluster, or somebody else's.

    :raises RuntimeError: without a compiler, or with its message where it fails.
    """
    found = compiler()
    if found is None:
        raise RuntimeError("expected a C++ compiler (g++ or clang++) on PATH, found none; install one")
    with waiting("compilation"), tempfile.TemporaryDirectory(prefix="ccrl-") as folder:
        target = str(Path(folder) / "library.so")
        command = [found, "-std=c++17", "-O3", "-fPIC", "-shared", f"-DREAL={real}", "-o", target, str(source)]
        run = subprocess.run([*command, "-march=native"], capture_output=True, text=True)
        if run.returncode:  # a compiler that does not know this processor
            run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"{found} could not compile {source.name}:\n{run.stderr[-2000:]}")
        return ctypes.CDLL(target)
