"""Files of a run: written whole or not at all, by one process at a time, with errors that name the path."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import socket
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

__all__ = [
    "CheckpointError",
    "FolderInUseError",
    "Owner",
    "WriteError",
    "alone_in",
    "remove_leftovers",
    "write_atomic",
    "writing",
]

_TEMPORARY = re.compile(r"\..+\.(\d+)\.tmp")
_held: dict[tuple[int, Path], int] = {}
"""How often this process owns a folder."""


class WriteError(OSError):
    """A file that cannot be written: disk full, folder gone or made read-only. The message has path and cause."""


class CheckpointError(RuntimeError):
    """A file that cannot be used as a checkpoint: damaged, incomplete, or with objects in it that need foreign code."""


class FolderInUseError(RuntimeError):
    """Another process writes into the folder; the message says which."""


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """``OSError`` inside becomes a :class:`WriteError` that names ``path``."""
    try:
        yield
    except (WriteError, FolderInUseError):  # whose text may hold any path and command
        raise
    except (OSError, RuntimeError) as error:
        # torch's writer raises a RuntimeError without the cause, which the file's own error is the context of
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            if "write" not in str(error):
                raise
            cause = OSError(None, "the file could not be written to the end (is the disk full?)")
        raise WriteError(cause.errno, f"{path}: cannot be written: {cause.strerror or cause}") from error


def write_atomic(path: str | os.PathLike[str], write: Callable[[BinaryIO], Any]) -> None:
    """Call ``write(file)`` on a new binary file in the folder of ``path``, then rename it to ``path``.

    The data are on the disk before the rename, and the rename before the return. What killed writers of this file left
    behind is removed.

    Raises:
        WriteError: see there; the file of before, if any, is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        # Without this the rename itself can be lost in a power cut, on POSIX; Windows cannot open folders.
        if os.name == "posix":
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Delete the temporary files of writers that are no longer there."""
    for path in Path(folder).glob(".*.tmp"):
        match = _TEMPORARY.fullmatch(path.name)
        if match and not _alive(int(match[1]), None):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


class Owner:
    """Holds ``folder`` for this process: a second process that asks is told who has it.

    A context manager; one process may hold a folder several times. What a dead process of this machine held is free;
    of another machine nobody here can say, and the message names the file to remove.

    Raises:
        FolderInUseError: another process holds it.
        WriteError: the folder cannot be written to.
    """

    FILE = ".owner"

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder).resolve()
        self._key: tuple[int, Path] | None = (os.getpid(), self.folder)
        if self._key not in _held:
            self._claim()
        _held[self._key] = _held.get(self._key, 0) + 1

    def release(self) -> None:
        """Let go; a second call does nothing, nor does one in a child process."""
        key, self._key = self._key, None
        if key is None or key[0] != os.getpid():
            return
        _held[key] -= 1
        if not _held[key]:
            del _held[key]
            with contextlib.suppress(OSError):
                (self.folder / self.FILE).unlink(missing_ok=True)

    def __enter__(self) -> Owner:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def _claim(self) -> None:
        path = self.folder / self.FILE
        mine = {
            "pid": os.getpid(), "host": socket.gethostname(), "started": _start_of(os.getpid()),
            "since": datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": " ".join(shlex.join(sys.orig_argv).split())[:200],
        }  # fmt: skip
        with writing(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            # each turn that is lost is another owner's end; a file system that counts no links loses all
            any(self._written(path, mine) for _ in range(100))
        remove_leftovers(self.folder)

    def _written(self, path: Path, mine: dict[str, Any]) -> bool:
        """False: the owner before let go, and took the file away, between our opening it and our turn."""
        with open(path, "a+", encoding="utf-8") as file, _alone(file.fileno()):
            if not os.fstat(file.fileno()).st_nlink:
                return False
            file.seek(0)
            other = _read(file.read())
            if other is not None and not _is_gone(other):
                raise FolderInUseError(
                    f"{self.folder} is being written by process {other['pid']} on {other['host']} since "
                    f"{other['since']} ({other['command']}); wait for it, stop it, or choose another folder. If it "
                    f"is not running any more, remove {path}"
                )
            file.truncate(0)
            file.write(json.dumps(mine))
        return True


@contextlib.contextmanager
def alone_in(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, no other thread or process of this machine is inside for the same folder: between reading a file and
    writing it anew nobody else may do the same. On Windows nothing is held."""
    if os.name != "posix":  # folders cannot be opened
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with _alone(descriptor):
            yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _alone(descriptor: int) -> Iterator[None]:
    """Between reading who was here and writing who is, nobody else may do the same."""
    if os.name != "posix":
        yield
        return
    import fcntl

    fcntl.flock(descriptor, fcntl.LOCK_EX)  # closing the file lets go
    yield


def _read(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
        return found if isinstance(found["pid"], int) else None
    except (ValueError, TypeError, KeyError):  # empty, or of a writer that was killed in the middle
        return None


def _is_gone(other: dict[str, Any]) -> bool:
    return other.get("host") == socket.gethostname() and not _alive(other["pid"], other.get("started"))


def _alive(pid: int, started: str | None) -> bool:
    """Whether the process is there, and (numbers are used again) is the one that began at ``started``."""
    if os.name != "posix":
        return True  # to ask would end it
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    now = _start_of(pid)
    return started is None or now is None or now == started


def _start_of(pid: int) -> str | None:
    try:
        # the command, in parentheses, may have spaces; the start time is the 20th number after it
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
