"""The folder of a run: everything needed to read it, repeat it and continue it.

runs/{env}__{agent}__{seed}__{time}/
    config.yaml    every setting            run.json     versions, git, hardware, command
    progress.csv   training curve           eval.csv     evaluation curve, all returns
    checkpoints/   step_000000012345.pt     videos/      events.out.tfevents.*   TensorBoard
"""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import ccrl
from ccrl.experiment import config as config_module
from ccrl.experiment.checkpoint import latest
from ccrl.experiment.files import Owner, WriteError, write_atomic, writing

__all__ = ["RunFolder", "describe", "find_runs"]

_PACKAGES = ("torch", "numpy", "gymnasium", "mujoco")
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class RunFolder:
    """Paths and description of one run."""

    path: Path

    @classmethod
    def create(cls, root: str | os.PathLike[str], env: str, agent: str, seed: int, config: Any = None) -> RunFolder:
        """Make a new folder under ``root``; ``config`` (a dataclass) is written to ``config.yaml``.

        Two runs that start in the same second get different folders.
        """
        stamp = time.strftime("%Y%m%d-%H%M%S")
        name = "__".join(re.sub(r"[^\w.=+-]+", "-", part) for part in (env, agent, str(seed), stamp))
        with writing(root):
            Path(root).mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            path = Path(root) / (name if number == 1 else f"{name}-{number}")
            try:
                with writing(path):
                    path.mkdir()  # fails if another process was faster: the test and the making are one call
                break
            except WriteError as error:
                if error.errno != errno.EEXIST:
                    raise
                number += 1
        run = cls(path)
        run.checkpoints.mkdir()
        run.videos.mkdir()
        if config is not None:
            config_module.save_yaml(config, run.config_file)
        run._write({"env": env, "agent": agent, "seed": seed, **describe(), "resumes": []})
        return run

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunFolder:
        """An existing run; raises ``FileNotFoundError`` if there is no ``run.json``."""
        run = cls(Path(path))
        if not run.info_file.is_file():
            near = [str(found.path) for found in find_runs([path])][:5] if run.path.is_dir() else []
            below = f" Runs below it: {', '.join(near)}." if near else ""
            raise FileNotFoundError(f"expected a run folder (with run.json); received {path}.{below}")
        return run

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def videos(self) -> Path:
        """Folder of the videos."""
        return self.path / "videos"

    @property
    def config_file(self) -> Path:
        """``config.yaml``."""
        return self.path / "config.yaml"

    @property
    def info_file(self) -> Path:
        """``run.json``."""
        return self.path / "run.json"

    @property
    def info(self) -> dict[str, Any]:
        """The contents of ``run.json``: ``env, agent, seed`` and what :func:`describe` returns."""
        try:
            info = json.loads(self.info_file.read_bytes())
        except ValueError as error:
            raise ValueError(f"{self.info_file}: expected the JSON that a run writes, got: {error}") from error
        missing = [name for name in ("env", "agent", "seed") if not isinstance(info, dict) or name not in info]
        if missing or not isinstance(info["env"], str) or not isinstance(info["agent"], str):
            raise ValueError(f"{self.info_file}: expected env, agent and seed of a run, got no {missing or 'texts'}")
        found: dict[str, Any] = info
        return found

    def config(self) -> dict[str, Any]:
        """The contents of ``config.yaml``, for ``config.from_dict``."""
        if not self.config_file.is_file():
            raise FileNotFoundError(f"{self.config_file}: expected the settings of the run, found no file; put it back")
        return config_module.load_yaml(self.config_file)

    def checkpoint(self, name: str) -> Path | None:
        """The file that ``latest``, ``best`` or a path names, or None. Checkpoints are read for ``latest`` alone."""
        path = latest(self.checkpoints) if name == "latest" else self.path / "best.pt" if name == "best" else Path(name)
        return path if path is not None and path.is_file() else None

    def own(self) -> Owner:
        """Hold the folder for this process until the result is released.

        Raises:
            FolderInUseError: another process writes into it; the message says which.
        """
        return Owner(self.path)

    def record_resume(self, step: int) -> None:
        """Add to ``run.json`` that the run goes on from ``step`` now, by which versions and command."""
        info = self.info
        info.setdefault("resumes", []).append({"step": step, **describe()})
        self._write(info)

    def record(self, **facts: Any) -> None:
        """Add ``facts`` to ``run.json``, over those of the same name."""
        self._write(self.info | facts)

    def _write(self, info: dict[str, Any]) -> None:
        write_atomic(self.info_file, lambda file: file.write((json.dumps(info, indent=2) + "\n").encode()))


def describe() -> dict[str, Any]:
    """What this process runs on: start time, command, versions, git state of the code, hardware, thread counts."""
    return {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(sys.orig_argv),
        "versions": {"python": platform.python_version(), "ccrl": ccrl.__version__, **_versions()},
        "git": _git(),
        "hardware": {
            "platform": platform.platform(),
            "cpu": _cpu(),
            "cpu_count": os.cpu_count(),
            "memory_gib": _memory_gib(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "threads": {
            "torch": torch.get_num_threads(),
            "torch_interop": torch.get_num_interop_threads(),
            **{name: os.environ.get(name) for name in _THREADS},
        },
    }


def find_runs(paths: Iterable[str | os.PathLike[str]]) -> list[RunFolder]:
    """All runs at or below ``paths``, sorted by path, each once.

    Raises:
        TypeError: one path instead of several; its letters would be searched, ``/`` among them.
    """
    if isinstance(paths, str | os.PathLike):
        raise TypeError(f"paths: expected a list of folders, got {paths!r}; write [{str(paths)!r}]")
    files = {file.parent.resolve(): file.parent for path in paths for file in Path(path).rglob("run.json")}
    return [RunFolder(path) for _, path in sorted(files.items())]


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)  # without importing it: MuJoCo alone takes half a second
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _git() -> dict[str, Any] | None:
    """Commit and whether tracked files differ from it; None if this code is not in a repository."""
    here = Path(ccrl.__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # A virtual environment may lie inside somebody else's repository: its commit would say nothing about us.
        git("ls-files", "--error-unmatch", "__init__.py")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu() -> str:
    try:
        models = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        models = []
    return models[0] if models else platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None
