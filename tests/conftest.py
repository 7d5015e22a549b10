"""Settings of every test: one thread, no network, no display, fixed seeds."""

from __future__ import annotations

import ctypes.util
import os
import random
import signal
import sys
from collections.abc import Iterator

# Before NumPy, torch and MuJoCo are imported, which read these once. The subprocesses of tests inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes with a thread per core each slow one another down
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")
if sys.platform == "linux" and not os.environ.get("DISPLAY"):
    # Gymnasium's renderer, unlike ours, falls back to a window when nothing is set.
    for library, backend in (("EGL", "egl"), ("OSMesa", "osmesa")):
        if ctypes.util.find_library(library):
            os.environ.setdefault("MUJOCO_GL", backend)

import numpy as np
import pytest
import torch

import envs  # noqa: F401  (registers ids also where the project is not installed with its entry points)

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Each test starts from the same random streams, whatever ran before it and in whichever process."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (code under test may read the global stream)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """Python's own handlers, which a job in the background lacks: its tests and their subprocesses ignore SIGINT."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Modules that a test writes and imports end with it: another test's of the same name would never be read."""
    before = set(sys.modules)
    yield
    written = f"{tmp_path_factory.getbasetemp()}{os.sep}"
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(written):
            del sys.modules[name]
