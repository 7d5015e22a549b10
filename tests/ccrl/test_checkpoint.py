import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections import OrderedDict, namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

from ccrl.experiment import checkpoint

ROOT = Path(__file__).parents[2]


def test_state_comes_back_equal(tmp_path):
    flat = torch.arange(6.0)
    state = {
        "flat": flat,
        "view": flat[2:4],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "nested": {"list": [1, 2.5, None, True, "a", b"\x00\xff"], "tuple": (1, (2, 3)), 7: torch.tensor(3)},
        "big": 2**127 + 1,
        "dtype": torch.float64,
    }
    checkpoint.save(tmp_path / "deep" / "state.pt", state)
    back = checkpoint.load(tmp_path / "deep" / "state.pt")
    assert back["nested"]["list"] == [1, 2.5, None, True, "a", b"\x00\xff"]
    assert back["nested"]["tuple"] == (1, (2, 3))
    assert back["nested"][7] == 3
    assert back["big"] == 2**127 + 1
    assert back["dtype"] is torch.float64
    assert back["parameter"].tolist() == [1.0, 1.0]
    # Views of one vector are stored once: writing through one shows in the other.
    back["flat"][2] = -1.0
    assert back["view"].tolist() == [-1.0, 3.0]


def test_numpy_is_converted():
    tree = checkpoint.portable(
        OrderedDict(a=np.arange(3, dtype=np.uint32), b=np.float64(0.1), c=np.array([[True], [False]])[::-1])
    )
    assert type(tree) is dict
    assert tree["a"].dtype == torch.uint32
    assert tree["a"].tolist() == [0, 1, 2]
    assert type(tree["b"]) is float
    assert tree["c"].tolist() == [[False], [True]]
    assert checkpoint.portable({"d": np.array([1.5, 2.0], ">f8")})["d"].tolist() == [1.5, 2.0], "of another byte order"
    assert checkpoint.portable(namedtuple("Pair", "x y")(1, 2)) == (1, 2)


@pytest.mark.parametrize(
    "bad", [object(), {1, 2}, np.array([None]), np.array(["a"]), np.datetime64("2020-01-01"), lambda: 0]
)
def test_what_could_not_be_loaded_is_refused_when_saving(tmp_path, bad):
    with pytest.raises(TypeError, match=r"state\['agent'\]\[1\]: expected .*; received"):
        checkpoint.save(tmp_path / "x.pt", {"agent": [0, bad]})
    assert list(tmp_path.iterdir()) == []


def test_keys_are_checked():
    with pytest.raises(TypeError, match="expected keys of type str or int; received"):
        checkpoint.portable({("a", 1): 0})


class Foreign:
    pass


def test_foreign_objects_are_refused(tmp_path):
    torch.save({"agent": Foreign()}, tmp_path / "a.pt")
    with pytest.raises(checkpoint.CheckpointError, match=r"foreign object .*Foreign"):
        checkpoint.load(tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps({"a": Foreign()}))
    with pytest.raises(checkpoint.CheckpointError, match="of another format"):
        checkpoint.load(tmp_path / "b.pt")
    torch.save([1], tmp_path / "c.pt")
    with pytest.raises(checkpoint.CheckpointError, match="expected a dict; received list"):
        checkpoint.load(tmp_path / "c.pt")


def test_missing_and_truncated_files(tmp_path):
    checkpoint.save(tmp_path / "a.pt", {"x": torch.zeros(10_000)})
    with pytest.raises(FileNotFoundError, match=r"\['a.pt'\]"):
        checkpoint.load(tmp_path / "b.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "a.pt").write_bytes(whole[:size])
        with pytest.raises(checkpoint.CheckpointError, match="truncated"):
            checkpoint.load(tmp_path / "a.pt")


@pytest.mark.parametrize("bit", [0, 4])
def test_a_flipped_bit_is_never_loaded(tmp_path, bit):
    """Wherever it is: what loads is what was saved, and the newest checkpoint that does not load is passed over."""
    older, newest = (checkpoint.checkpoint_path(tmp_path, step) for step in (1, 2))
    for path in (older, newest):
        checkpoint.save(path, {"x": torch.ones(8), "s": "text"})
    whole, refused = newest.read_bytes(), 0
    for place in range(bit, len(whole), 13):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bit
        newest.write_bytes(damaged)
        message = ""
        try:
            state = checkpoint.load(newest)
        except checkpoint.CheckpointError as error:
            message = str(error)
        if message:
            refused += 1
            assert message.startswith(str(newest))
            if refused % 8 == 1:
                with pytest.warns(UserWarning, match="is damaged; trying the one before"):
                    assert checkpoint.latest(tmp_path) == older
        else:  # padding, or a field that nobody reads
            assert state.keys() == {"x", "s"}
            assert state["s"] == "text"
            assert torch.equal(state["x"], torch.ones(8))
    assert refused > 50


@pytest.mark.parametrize(("place", "bit"), [(10, 3), (24, 4), (38, 4)])
def test_flags_and_sizes_that_hide_a_tensor_are_refused(tmp_path, place, bit):
    """Compression method, size and folder flag of the archive's entry: torch would return memory as it finds it."""
    path = tmp_path / "a.pt"
    checkpoint.save(path, {"x": torch.ones(8)})
    data = bytearray(path.read_bytes())
    directory = data.index(b"PK\x01\x02")
    entry = data.index(b"archive/data/0", directory) - 46  # the name follows the fixed part
    assert data[entry : entry + 4] == b"PK\x01\x02"
    data[entry + place] ^= 1 << bit
    path.write_bytes(data)
    with pytest.raises(checkpoint.CheckpointError, match="damaged file"):
        checkpoint.load(path)


def test_data_reach_the_disk_before_the_name_does(tmp_path, monkeypatch):
    """In the other order a power cut leaves an empty file under the name of the good one."""
    calls = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, original=original, name=name: calls.append(name) or original(*a))
    checkpoint.write_atomic(tmp_path / "a.pt", lambda file: file.write(b"x"))
    assert calls == ["fsync", "replace", "fsync"]  # the file, its name, the folder with the name in it


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.pt"
    checkpoint.save(path, {"x": 1})

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_atomic(path, fail)
    assert checkpoint.load(path) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_latest_and_prune(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    for step in (5, 900, 10_000):
        checkpoint.save(checkpoint.checkpoint_path(tmp_path, step), {"step": step, "x": torch.ones(1000)})
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".step_000000020000.pt.{dead.pid}.tmp").write_bytes(b"half")
    living = tmp_path / f".step_000000020000.pt.{os.getppid()}.tmp"
    living.write_bytes(b"of a writer that is at it")
    (tmp_path / "best.pt").write_bytes(b"not a step")
    assert checkpoint.latest(tmp_path) == tmp_path / "step_000000010000.pt"
    newest = bytearray((tmp_path / "step_000000010000.pt").read_bytes())
    newest[len(newest) // 2] ^= 1  # one bit flipped on the disk
    (tmp_path / "step_000000010000.pt").write_bytes(newest)
    with pytest.warns(UserWarning, match="step_000000010000.pt is damaged"):
        assert checkpoint.latest(tmp_path) == tmp_path / "step_000000000900.pt"
    checkpoint.prune(tmp_path, keep=2)
    assert living.exists()
    living.unlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.pt", "step_000000000900.pt", "step_000000010000.pt"]
    with pytest.raises(ValueError, match="keep: expected at least 1"):
        checkpoint.prune(tmp_path, keep=0)


WRITER = """
import sys, torch
from ccrl.experiment import checkpoint
x = torch.zeros(4_000_000)
for step in range(10**9):
    x.fill_(step)
    checkpoint.save(checkpoint.checkpoint_path(sys.argv[1], step), {"step": step, "x": x})
    checkpoint.save(sys.argv[1] + "/last.pt", {"step": step, "x": x})
    checkpoint.prune(sys.argv[1], keep=2)
"""


def test_kill_in_the_middle_of_a_write(tmp_path):
    """SIGKILL at moments when a temporary file is there, that is, inside a write."""
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], cwd=ROOT)
        try:
            deadline = time.monotonic() + 60
            while not (list(tmp_path.glob(".*.tmp")) and (tmp_path / "last.pt").exists()):
                assert writer.poll() is None
                assert time.monotonic() < deadline
        finally:
            writer.send_signal(signal.SIGKILL)
            writer.wait()
        for path in (checkpoint.latest(tmp_path), tmp_path / "last.pt"):
            state = checkpoint.load(path)
            assert torch.equal(state["x"], torch.full((4_000_000,), float(state["step"])))
        assert int(checkpoint.latest(tmp_path).stem[5:]) == checkpoint.load(checkpoint.latest(tmp_path))["step"]
        assert checkpoint.load(tmp_path / "last.pt")["step"] <= checkpoint.load(checkpoint.latest(tmp_path))["step"]
        for left in tmp_path.iterdir():
            left.unlink()


def test_global_generators_resume(tmp_path):
    def draw():
        return random.random(), np.random.normal(), float(torch.randn(())), np.random.rand()  # noqa: NPY002

    random.seed(1), np.random.seed(2), torch.manual_seed(3)  # noqa: NPY002
    draw()
    checkpoint.save(tmp_path / "rng.pt", checkpoint.rng_state())
    expected = [draw() for _ in range(3)]
    checkpoint.set_rng_state(checkpoint.load(tmp_path / "rng.pt"))
    assert [draw() for _ in range(3)] == expected


@pytest.mark.parametrize("kind", [np.random.PCG64, np.random.MT19937, np.random.Philox])
def test_numpy_generators_resume(tmp_path, kind):
    generator = np.random.Generator(kind(5))
    generator.random(3, dtype=np.float32)  # leaves half a word in PCG64's cache
    checkpoint.save(tmp_path / "g.pt", {"g": checkpoint.generator_state(generator)})
    expected = generator.normal(size=5).tolist()
    fresh = np.random.Generator(kind(0))
    checkpoint.set_generator_state(fresh, checkpoint.load(tmp_path / "g.pt")["g"])
    assert fresh.normal(size=5).tolist() == expected
    with pytest.raises(ValueError, match="expected the state of a SFC64; received one of a"):
        checkpoint.set_generator_state(np.random.Generator(np.random.SFC64(0)), checkpoint.generator_state(generator))
