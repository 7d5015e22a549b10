import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from ccrl.experiment import checkpoint
from ccrl.experiment.config import from_dict
from ccrl.experiment.run import RunFolder, describe, find_runs

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Config:
    learning_rate: float = 3e-4
    """Step size."""


def test_a_new_run(tmp_path):
    run = RunFolder.create(tmp_path / "runs", "ccrl/Name-v0", "sb3:ppo", 3, Config())
    assert run.path.parent == tmp_path / "runs"
    assert run.path.name.startswith("ccrl-Name-v0__sb3-ppo__3__2")
    assert run.checkpoints.is_dir()
    assert run.videos.is_dir()
    assert from_dict(Config, run.config()) == Config()
    info = json.loads((run.path / "run.json").read_text())
    assert (info["env"], info["agent"], info["seed"]) == ("ccrl/Name-v0", "sb3:ppo", 3)
    assert set(info["versions"]) == {"python", "ccrl", "torch", "numpy", "gymnasium", "mujoco"}
    assert info["versions"]["torch"] == torch.__version__
    assert info["threads"]["torch"] == torch.get_num_threads()
    assert info["hardware"]["cpu_count"] >= 1
    assert info["command"] == shlex.join(sys.orig_argv)
    assert RunFolder.open(run.path).info == info


def test_runs_of_one_second_differ(tmp_path, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda _: "20260101-000000")
    names = [RunFolder.create(tmp_path, "A-v0", "ppo", 0).path.name for _ in range(3)]
    stem = "A-v0__ppo__0__20260101-000000"
    assert names == [stem, f"{stem}-2", f"{stem}-3"]


def test_resumes_are_recorded(tmp_path):
    run = RunFolder.create(tmp_path, "A-v0", "ppo", 0)
    before = run.info
    run.record_resume(5000)
    after = RunFolder.open(run.path).info
    assert before["resumes"] == []
    assert after["resumes"][0]["step"] == 5000
    assert after["resumes"][0]["versions"] == before["versions"]
    assert {**after, "resumes": []} == before


def test_facts_recorded_again_replace_the_old_ones(tmp_path):
    run = RunFolder.create(tmp_path, "A-v0", "ppo", 0)
    before = run.info
    run.record(finished=1, error="x")
    run.record(finished=2)
    assert run.info == {**before, "finished": 2, "error": "x"}


def test_open_wants_a_run_folder(tmp_path):
    run = RunFolder.create(tmp_path / "runs", "A-v0", "ppo", 0)
    with pytest.raises(FileNotFoundError, match="expected a run folder") as error:
        RunFolder.open(tmp_path)
    assert str(run.path) in str(error.value)  # the fix: what is below
    with pytest.raises(FileNotFoundError):
        RunFolder.open(tmp_path / "nothing")


def test_which_checkpoint(tmp_path):
    run = RunFolder.create(tmp_path, "A", "ppo", 0)
    assert [run.checkpoint(name) for name in ("latest", "best", str(tmp_path / "x.pt"))] == [None] * 3
    checkpoint.save(run.path / "best.pt", {})
    torch.save({}, run.checkpoints / "step_000000000009.pt")  # of another version
    assert run.checkpoint("best") == run.path / "best.pt"
    with pytest.raises(checkpoint.FormatError):
        run.checkpoint("latest")


def test_find_runs_lists_each_once(tmp_path):
    runs = [RunFolder.create(tmp_path / "runs" / part, "A-v0", "ppo", seed) for seed, part in enumerate(("a", "b/c"))]
    assert find_runs([tmp_path, tmp_path / "runs", runs[0].path]) == runs
    assert find_runs([tmp_path / "runs" / "b"]) == runs[1:]
    (tmp_path / "link").symlink_to(tmp_path / "runs" / "a")
    assert len(find_runs([tmp_path / "runs", tmp_path / "link"])) == 2, "a run found on two ways would count twice"


@pytest.mark.parametrize("tracked", [True, False])
def test_git_state_is_that_of_the_code(tmp_path, monkeypatch, tracked):
    """A package installed below somebody else's repository must not report that one's commit."""

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    package = tmp_path / "lib" / "ccrl"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (tmp_path / "other").write_text("1")
    git("init")
    git("add", "other", *(["lib"] if tracked else []))
    git("commit", "-m", "a")
    monkeypatch.setattr("ccrl.__file__", str(package / "__init__.py"))
    state = describe()["git"]
    if not tracked:
        assert state is None
        return
    assert len(state["commit"]) == 40
    assert state["dirty"] is False
    (tmp_path / "run.log").write_text("untracked")
    assert describe()["git"]["dirty"] is False
    (tmp_path / "other").write_text("2")
    assert describe()["git"] == {"commit": state["commit"], "dirty": True}


def test_describe_needs_no_simulator():
    code = "import sys; from ccrl.experiment.run import describe; describe(); assert 'mujoco' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_settings_that_are_gone_are_named(tmp_path):
    run = RunFolder.create(tmp_path, "E", "a", 0, Config())
    run.config_file.unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.yaml: expected the settings of the run, found no file"):
        run.config()
