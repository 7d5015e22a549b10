"""What goes wrong around a training: a second writer, Ctrl-C with workers, a full disk, names in a folder's files."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ccrl.experiment import checkpoint

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs signals and limits")
LONG = ("ppo", "--env", "CartPole-v1", "--total-timesteps", "100000000", "--num-envs", "2", "--n-steps", "64",
        "--n-epochs", "1", "--compile", "off", "--eval-every", "0", "--checkpoint-every", "128",
        "--no-tensorboard", "--no-progress")  # fmt: skip


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "scripts/train.py"), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def first_checkpoint(root: Path, process: subprocess.Popen[str]) -> Path:
    deadline = time.monotonic() + 120
    while not list(root.rglob("step_*.pt")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.05)
    (run,) = (path.parent for path in root.rglob("run.json"))
    return run


def test_a_run_that_is_at_it_is_not_resumed_and_ctrl_c_saves_it_with_its_workers(tmp_path: Path) -> None:
    workers = ("--env-kwargs", '{"backend": "async"}')
    running = start(*LONG, *workers, "--run-root", tmp_path, start_new_session=True)
    run = first_checkpoint(tmp_path, running)
    second = start("--resume", run)
    said = second.communicate(timeout=120)[0]
    assert second.returncode == 1
    assert f"is being written by process {running.pid} on" in said
    assert "Traceback" not in said
    assert running.poll() is None, "the second one took the first one's files"
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does: the workers get it too
    said = running.communicate(timeout=120)[0]
    last = said.strip().splitlines()[-1]
    assert "--logdir" not in said, "it writes no events"
    assert running.returncode == 1
    newest = checkpoint.latest(run.joinpath("checkpoints"))
    assert newest is not None
    assert last.endswith(f"it goes on from {newest.name} with --resume {run}")
    assert f"stopped at {int(newest.stem[5:]):,} of" in last
    assert not (run / ".owner").exists()


@pytest.mark.parametrize("limit", [20_000, 150_000])
def test_a_full_disk_is_one_line_with_the_command_to_go_on(tmp_path: Path, limit: int) -> None:
    """The first checkpoint, of some 70 kB, does not fit, or progress.csv does not at some time."""

    def small_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writes fail as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    flags = LONG if limit < 50_000 else (*LONG, "--hidden", "2", "--n-steps", "8", "--checkpoint-every", "1024")
    process = start(*flags, "--run-root", tmp_path, preexec_fn=small_disk)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 1
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert last.startswith(f"error: {tmp_path}/")
    assert ": cannot be written: File too large" in last
    (run,) = (path.parent for path in tmp_path.rglob("run.json"))
    if limit < 50_000:
        assert last.endswith("then start again: nothing was saved")
        assert list(run.joinpath("checkpoints").iterdir()) == []
    else:
        newest = checkpoint.latest(run / "checkpoints")
        assert newest is not None
        assert last.endswith(f"then it goes on from {newest.name} with --resume {run}")


def test_a_folders_yaml_does_not_import(tmp_path: Path) -> None:
    done = start(*LONG, "--total-timesteps", "128", "--run-root", tmp_path)
    assert done.wait(timeout=120) == 0, done.communicate()[0]
    (run,) = (path.parent for path in tmp_path.rglob("run.json"))
    (tmp_path / "evilmod.py").write_text("raise SystemExit('a name in a file was imported')")
    for file, old, new in (
        ("config.yaml", "env: CartPole-v1", 'env: "evilmod:X"'),
        ("run.json", '"agent": "ppo"', '"agent": "evilmod:X"'),
    ):
        text = (run / file).read_text()
        assert old in text
        (run / file).write_text(text.replace(old, new))
        second = start("--resume", run, cwd=tmp_path)
        said = second.communicate(timeout=120)[0]
        assert second.returncode == 1
        assert "was imported" not in said
        assert "evilmod:X" in said
        (run / file).write_text(text)


def test_files_from_elsewhere_do_not_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint whose header names a module, and a YAML file that does: neither runs it."""
    (tmp_path / "evilmod.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    from agents import PPO
    from ccrl.experiment import checkpoint
    from ccrl.registry import UntrustedError
    from scripts import make_dataset, train

    PPO("CartPole-v1", num_envs=2, n_steps=8, hidden=(4,), compile="off").save(tmp_path / "a.pt")
    for part in ("agent", "env"):
        checkpoint.save(tmp_path / "b.pt", checkpoint.load(tmp_path / "a.pt") | {part: "evilmod:X"})
        with pytest.raises(UntrustedError, match="names 'evilmod:X'"):
            make_dataset.Agent(checkpoint=tmp_path / "b.pt", steps=10).make()
    (tmp_path / "c.yaml").write_text("env: evilmod:X\n")
    with pytest.raises(UntrustedError, match=r"c\.yaml names 'evilmod:X'"):
        train.prepare(["ppo", "--config", str(tmp_path / "c.yaml"), "--run-root", str(tmp_path)])
    assert not (tmp_path / "ran").exists()
