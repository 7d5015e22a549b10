"""Foreign packages under our names, missing extras."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from ccrl import packages
from ccrl.packages import check_siblings, require

ROOT = Path(__file__).resolve().parents[1]


def check_in_subprocess(*path: Path) -> subprocess.CompletedProcess[str]:
    """Run the check and then import, as scripts do, with ``path`` first on the Python path."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    # -P: without it the folder the test runs in would stand in front of everything.
    command = [
        sys.executable,
        "-P",
        "-c",
        "from ccrl.packages import check_siblings as c; c('agents', 'envs'); import agents; print(1)",
    ]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def make_package(folder: Path, name: str, distribution: str | None = None) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text("raise RuntimeError('a foreign package was run')\n")
    if distribution is not None:
        info = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "RECORD").write_text(f"{name}/__init__.py,,\n")


def test_our_own_packages_pass():
    check_siblings("agents", "envs")
    done = check_in_subprocess(ROOT)
    assert done.stdout == "1\n", done.stderr


@pytest.mark.parametrize("name", ["agents", "envs"])
def test_a_foreign_package_is_named_with_the_fix(tmp_path, name):
    make_package(tmp_path, name)
    done = check_in_subprocess(tmp_path, ROOT)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        f"ImportError: expected the package '{name}' beside ccrl, at {ROOT / name}, received {tmp_path}"
    )
    assert f"set PYTHONPATH={ROOT};" in last
    assert f"take {tmp_path} off the Python path" in last
    assert "virtual environment" in last
    assert "a foreign package was run" not in done.stderr


def test_the_fix_of_the_message_works(tmp_path):
    make_package(tmp_path, "agents")
    assert check_in_subprocess(ROOT, tmp_path).stdout == "1\n"


def test_the_distribution_to_uninstall_is_named(tmp_path):
    make_package(tmp_path, "agents", "openai-agents")
    last = check_in_subprocess(tmp_path, ROOT).stderr.splitlines()[-1]
    assert f"received {tmp_path / 'agents' / '__init__.py'} of openai-agents," in last
    assert "pip uninstall openai-agents;" in last


def test_a_folder_without_init_and_a_missing_package(tmp_path):
    """``envs/`` with virtual environments in it is common, and enough for Python to call it a package."""
    (tmp_path / "ccrl").symlink_to(ROOT / "ccrl")
    (tmp_path / "agents").symlink_to(ROOT / "agents")
    (tmp_path / "envs").mkdir()
    # -S leaves out site-packages, and with it an editable install of this project.
    command = [sys.executable, "-S", "-P", "-c", "from ccrl.packages import check_siblings as c; c('agents', 'envs')"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert f"at {ROOT / 'envs'}, received {tmp_path / 'envs'}, which" in done.stderr
    assert f"take {tmp_path} off the Python path" in done.stderr
    (tmp_path / "envs").rmdir()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert f"at {ROOT / 'envs'}, received none: install the project" in done.stderr


def test_a_foreign_package_that_is_already_imported(monkeypatch, tmp_path):
    module = types.ModuleType("agents")
    module.__spec__ = types.SimpleNamespace(origin=str(tmp_path / "agents.py"), submodule_search_locations=None)
    monkeypatch.setitem(sys.modules, "agents", module)
    with pytest.raises(ImportError, match=r"received .*agents\.py"):
        check_siblings("agents", "envs")


def test_two_distributions_in_one_folder(monkeypatch, tmp_path):
    """As after ``pip install .`` beside openai-agents: the place is ours, the files may not be."""
    make_package(tmp_path, "agents")
    monkeypatch.setattr(packages, "ROOT", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "agents", raising=False)
    monkeypatch.setattr(packages, "packages_distributions", lambda: {"agents": ["ccrl", "openai-agents"]})
    with pytest.raises(ImportError, match=r"of openai-agents, .* these: pip uninstall openai-agents; install"):
        check_siblings("agents")
    monkeypatch.setattr(packages, "packages_distributions", lambda: {"agents": ["ccrl"]})
    check_siblings("agents")


def test_require_returns_the_module():
    assert require("importlib.metadata", "dev") is sys.modules["importlib.metadata"]


@pytest.mark.parametrize("module", ["no_such_package", "no_such_package.part"])
def test_require_names_the_extra(module):
    with pytest.raises(ImportError, match=r"'no_such_package', .* not installed; .* pip install -e \"\.\[isaac\]\""):
        require(module, "isaac")


def test_require_passes_on_what_an_installed_module_lacks(monkeypatch, tmp_path):
    (tmp_path / "half_installed.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency") as caught:
        require("half_installed", "isaac")
    assert "extra" not in str(caught.value)


def test_all_but_mujocos_own_tasks_import_without_mujoco():
    """So that an installation without it is of use: language models, classic control, inventory, data sets."""
    script = """
import importlib, pathlib, sys
sys.modules["mujoco"] = None  # what is None cannot be imported
names = sorted(
    ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    for package in ("ccrl", "envs", "agents") for path in pathlib.Path(package).rglob("*.py")
)
failed = []
for name in names:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] == "mujoco":
            failed.append(name)
import envs
assert envs.make("CartPole-v1", 2, seed=0).num_envs == 2
print(*failed)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()
    assert not [name for name in done.stdout.split() if not name.startswith("envs.mujoco")]


def test_a_mujoco_task_without_mujoco_names_the_extra(monkeypatch):
    import envs

    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(ImportError, match=r"'mujoco', which is not installed; .* -e \"\.\[mujoco\]\""):
        envs.make("Hopper-v5", 2)
