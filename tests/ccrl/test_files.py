"""One writer per folder, files whole or not at all, and errors that name path and cause."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from ccrl.experiment import checkpoint
from ccrl.experiment.files import FolderInUseError, Owner, WriteError, remove_leftovers, write_atomic

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(os.name != "posix", reason="asks for processes")


def child(code: str, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)


HOLDS = """
    import sys
    from ccrl.experiment.files import Owner
    owner = Owner(sys.argv[1])
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_a_second_process_is_told_who_writes(tmp_path: Path) -> None:
    other = child(HOLDS, tmp_path)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    with pytest.raises(FolderInUseError, match=rf"by process {other.pid} on {socket.gethostname()} since 2.* choose"):
        Owner(tmp_path)
    other.kill()  # leaves its file behind
    other.wait()
    assert (tmp_path / Owner.FILE).exists()
    Owner(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_the_owners_path_may_say_write(tmp_path: Path) -> None:
    folder = tmp_path / "rewrite"
    folder.mkdir()
    parent = {"pid": os.getppid(), "host": socket.gethostname(), "since": "now", "command": "python writer.py"}
    (folder / Owner.FILE).write_text(json.dumps(parent))
    with pytest.raises(FolderInUseError, match=r"rewrite is being written by process .*writer\.py"):
        Owner(folder)


def test_an_owner_that_lets_go_in_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file is gone between our opening it and our turn: nobody would see what is written into it."""
    turns: list[int] = []

    @contextlib.contextmanager
    def alone(descriptor: int) -> Iterator[None]:
        if not turns:
            (tmp_path / Owner.FILE).unlink()
        turns.append(descriptor)
        yield

    monkeypatch.setattr("ccrl.experiment.files._alone", alone)
    owner = Owner(tmp_path)
    assert json.loads((tmp_path / Owner.FILE).read_text())["pid"] == os.getpid()
    assert len(turns) == 2
    owner.release()


def test_one_process_may_hold_a_folder_twice(tmp_path: Path) -> None:
    with Owner(tmp_path) as first:
        with Owner(tmp_path / "x" / ".."):
            pass
        assert (tmp_path / Owner.FILE).exists()
        first.release()
        assert not (tmp_path / Owner.FILE).exists()
    with Owner(tmp_path):
        assert json.loads((tmp_path / Owner.FILE).read_text())["pid"] == os.getpid()


def test_what_says_nothing_about_a_living_process_holds_nothing(tmp_path: Path) -> None:
    mine = {"pid": os.getppid(), "host": socket.gethostname(), "since": "then", "command": "x"}
    for text in ("", "{", "[]", '{"pid": "x"}', json.dumps(mine | {"started": "1"})):  # the number is used again
        (tmp_path / Owner.FILE).write_text(text)
        Owner(tmp_path).release()
    for text in (json.dumps(mine | {"started": None}), json.dumps(mine | {"host": "elsewhere", "pid": 1})):
        (tmp_path / Owner.FILE).write_text(text)
        with pytest.raises(FolderInUseError, match=r"remove .*\.owner"):
            Owner(tmp_path)


def test_a_child_does_not_let_go(tmp_path: Path) -> None:
    owner = Owner(tmp_path)
    if (pid := os.fork()) == 0:
        owner.release()
        os._exit(0)
    os.waitpid(pid, 0)
    assert (tmp_path / Owner.FILE).exists()
    owner.release()


def test_a_write_that_fails_names_path_and_cause(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def full(file: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(WriteError, match=rf"{path}: cannot be written: No space left on device"):
        write_atomic(path, full)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"
    with pytest.raises(WriteError, match=r"no_folder/a\.txt: cannot be written: No such file or directory"):
        write_atomic(tmp_path / "no_folder" / "a.txt", full)
    with pytest.raises(ZeroDivisionError):
        write_atomic(path, lambda file: 1 / 0)


def test_a_checkpoint_on_a_full_disk(tmp_path: Path) -> None:
    """torch reports a RuntimeError of its own, without the cause."""
    code = """
        import resource, signal, sys, torch
        from ccrl.experiment import checkpoint
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try: checkpoint.save(sys.argv[1] + "/a.pt", {"x": torch.zeros(100_000)})
        except OSError as error: print(type(error).__name__, str(error).splitlines()[-1])
    """
    said = child(code, tmp_path).communicate(timeout=60)[0]
    assert said.startswith("WriteError")
    assert f"{tmp_path}/a.pt: cannot be written: " in said
    assert list(tmp_path.iterdir()) == []


def test_only_what_dead_writers_left_is_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, os.getppid()):
        (tmp_path / f".step_000000000008.pt.{pid}.tmp").touch()
    (tmp_path / ".mine.tmp").touch()
    remove_leftovers(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {f".step_000000000008.pt.{os.getppid()}.tmp", ".mine.tmp"}


def test_versions_of_the_format(tmp_path: Path) -> None:
    import torch

    checkpoint.save(tmp_path / "a.pt", {"x": 1})
    assert checkpoint.load(tmp_path / "a.pt") == {"x": 1}
    for name, header, message in (
        ("old", {}, r"no format version; it is no checkpoint of ccrl's, or one of ccrl 0\.1\.0, which reads it"),
        ("new", {"format_version": 3, "ccrl": "0.9.1"}, r"format 2, got one with format 3; ccrl 0\.9\.1 wrote it"),
        ("odd", {"format_version": "2", "ccrl": "x"}, "got one with format '2'"),
    ):
        path = tmp_path / name / "step_000000000001.pt"
        path.parent.mkdir()
        torch.save({**header, "x": 1}, path)
        with pytest.raises(checkpoint.FormatError, match=message):
            checkpoint.load(path)
        with pytest.raises(checkpoint.FormatError):  # not passed over: the run is whole, for another version
            checkpoint.latest(path.parent)


def test_keys_that_are_missing_or_too_many_are_named() -> None:
    own = {"a": 1, "b": {"c": 2}, "d": {}}
    checkpoint.check_keys({"a": 0, "b": {"c": 0}, "d": {}}, own, "x.pt", depth=2)
    checkpoint.check_keys({"a": 0, "b": {"e": 0}, "d": {}}, own, "x.pt")
    with pytest.raises(
        checkpoint.CheckpointError, match=r"x\.pt: .* a state with no a, no b\.c, an unknown b\.e, a list as d"
    ):
        checkpoint.check_keys({"b": {"e": 0}, "d": []}, own, "x.pt", depth=2)
