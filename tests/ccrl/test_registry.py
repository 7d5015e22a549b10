"""Ids to constructors: registered names, plugins, names of modules, and names that were read from a file."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from ccrl import registry
from ccrl.batched_env import resolve_env
from ccrl.llm.task import resolve_task
from ccrl.registry import Registry, UntrustedError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A stranger's module; ``imported.txt`` says that it has run."""
    (tmp_path / "foreign_thing.py").write_text(
        "import pathlib\n"
        "(pathlib.Path(__file__).parent / 'imported.txt').touch()\n"
        "from ccrl.testing.clock import ClockEnv, Episode\n"
        "def Env(num_envs, *, device, length=2):\n"
        "    return ClockEnv([[Episode(0.0, length, 'terminate')]] * num_envs)\n"
        "class NotAnEnv:\n"
        "    def __init__(self, num_envs, *, device): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("foreign_thing", None)


@pytest.fixture
def things(monkeypatch):
    """A registry of its own, without plugins."""
    monkeypatch.setattr(registry, "entry_points", lambda group: [])
    monkeypatch.setattr(registry, "_loaded", set())
    return Registry("thing")


def test_registered_names(things):
    things.register("a", dict)
    things.register("late", "collections:OrderedDict")
    assert things.names() == ["a", "late"]
    assert things.get("a") is dict
    assert things.get("late").__name__ == "OrderedDict"
    things.register("a", dict)  # the same again, as a reloaded module does
    with pytest.raises(ValueError, match=r"'a' is registered already, as .*dict"):
        things.register("a", list)
    with pytest.raises(
        ValueError, match=r"no thing 'lat'; did you mean late\? expected one of a, late, or 'module:name'"
    ):
        things.get("lat")


def test_finders_come_after_registered_names(things):
    things.register_finder(lambda name: list if name.startswith("l") else None)
    things.register("lone", dict)
    assert things.get("lone") is dict
    assert things.get("lanything") is list
    with pytest.raises(
        ValueError,
        match=r"no thing 'x'; expected one of lone, or 'module:name'\. No plugin is installed: .*`import envs`",
    ):
        things.get("x")


def test_plugins_load_once_and_only_for_unknown_names(things, monkeypatch, tmp_path):
    (tmp_path / "plugged_in.py").write_text(
        "from tests_registry_target import things\nthings.register('theirs', int)\n"
    )
    (tmp_path / "tests_registry_target.py").write_text("things = None\n")
    monkeypatch.syspath_prepend(tmp_path)
    import tests_registry_target

    tests_registry_target.things = things
    asked = []

    def found(group):
        asked.append(group)
        return [EntryPoint("x", "plugged_in", group)]

    monkeypatch.setattr(registry, "entry_points", found)
    things.register("ours", str)
    assert things.get("ours") is str
    assert asked == []
    assert things.get("theirs") is int
    assert asked == ["ccrl.plugins"]
    monkeypatch.setattr(registry, "entry_points", lambda group: [EntryPoint("x", "no_such_plugin", group)])
    with pytest.raises(ImportError, match="the plugin 'no_such_plugin' cannot be imported"):
        things.get("neither")


def test_a_module_that_the_caller_names(package):
    assert registry.load("foreign_thing:NotAnEnv").__name__ == "NotAnEnv"
    assert resolve_env("foreign_thing:Env", 3).num_envs == 3
    with pytest.raises(TypeError, match="'foreign_thing:NotAnEnv' to make a BatchedEnv, got NotAnEnv without"):
        resolve_env("foreign_thing:NotAnEnv", 3)
    with pytest.raises(ValueError, match="expected a name 'Enf' in foreign_thing, there is none; did you mean Env"):
        registry.text_tasks.get("foreign_thing:Enf")
    for name in ("foreign_thing", "foreign_thing:", ":Env", "foreign_thing:a.b", "a:b:c"):
        with pytest.raises(ValueError, match="expected 'module:name'"):
            registry.load(name)
    for name in ("no_such_thing:Env", "..x:Env"):
        with pytest.raises(ModuleNotFoundError, match=f"{name!r}: expected"):
            registry.load(name)


def test_what_a_file_names_is_not_imported(package):
    with registry.stored("run/step_1.pt"):
        for resolve in (registry.load, registry.agents.get, lambda name: resolve_env(name, 1), resolve_task):
            with pytest.raises(
                UntrustedError,
                match=r"run/step_1\.pt names 'foreign_thing:Env', .*trust=\('foreign_thing:Env',\), in scripts --trust",
            ):
                resolve("foreign_thing:Env")
        assert not (package / "imported.txt").exists()
        assert resolve_env("CartPole-v1", 1).num_envs == 1  # registered: what it loads is the registering package's
        assert resolve_task("arithmetic").name == "arithmetic"
    with registry.stored("run/step_1.pt", trust=["foreign_thing:NotAnEnv"]):
        with pytest.raises(UntrustedError):
            resolve_env("foreign_thing:Env", 1)
        assert not (package / "imported.txt").exists()
        assert registry.load("foreign_thing:NotAnEnv").__name__ == "NotAnEnv"
    assert resolve_env("foreign_thing:Env", 1).num_envs == 1  # the caller's own again


def test_families_are_no_modules(things, package, monkeypatch):
    (package / "isaac.py").write_text("raise RuntimeError('a module was run in place of a family')\n")
    with pytest.raises(ValueError, match="no thing 'isaac:Ant'"):
        things.get("isaac:Ant")
    things.register_finder(lambda name: str if name.startswith("isaac:") else None)
    with registry.stored("x"):
        assert things.get("isaac:Ant") is str


def test_from_a_folder_that_is_not_installed(tmp_path):
    """The message names the import that is missing."""
    (tmp_path / "ccrl").symlink_to(ROOT / "ccrl")
    code = (
        "import ccrl.registry as r\n"
        "r.entry_points = lambda group: []\n"
        "from ccrl.batched_env import resolve_env\n"
        "try: resolve_env('CartPole-v1', 1)\n"
        "except ValueError as error: print(error)\n"
        "import sys; print('envs' in sys.modules, 'agents' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    said, modules = done.stdout.splitlines()
    assert "import the package that registers the name first (`import envs`)" in said
    assert modules == "False False"


def test_a_setting_that_names_a_function_says_what_it_expected():
    assert registry.load_function("math:sqrt", "weights", "none or module:function")(4.0) == 2.0
    with pytest.raises(ValueError, match="weights: expected a function at 'math:pi', got float"):
        registry.load_function("math:pi", "weights", "none or module:function")
    for name in ("none", "no_such_module:f", "math:no_such_name"):
        with pytest.raises(ValueError, match=f"weights: expected reload or module:function, got '{name}'"):
            registry.load_function(name, "weights", "reload or module:function")


def test_ids_that_nobody_has_registered_yet(monkeypatch):
    """``PPO("module:My-v0")`` from a folder that is not installed, before ``import envs``."""
    monkeypatch.setattr(registry, "_loaded", set())
    with pytest.raises(ValueError, match="if it is the id of an environment, import envs first"):
        registry.load("os:My-v0")
