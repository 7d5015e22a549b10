"""The rules of the tree: who may import whom, what is loaded only on demand, how long a file may be."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("ccrl", "envs", "agents")
FORBIDDEN = {
    "ccrl": {"agents", "envs", "scripts"},
    "envs": {"agents", "scripts"},
    "agents": {"envs", "scripts"},
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MODULE_OF = {"pyyaml": "yaml"}
"""Distributions whose module has another name."""
TEST_TOOLS = {"pytest", "hypothesis"}
"""What ccrl.testing may import too: nothing but tests imports it."""

ON_DEMAND = {
    "ccrl.adapters.sb3_export": "subclasses a class of SB3; as_vec_env imports it when it is called",
    "ccrl.gp.kernels": "its kernels are subclasses of GPyTorch's; imported by what evaluates them",
    "ccrl.llm.cache": "subclasses a class of transformers; imported by what has such a model",
    "agents.dbqpg.kernel": "holds such a kernel; imported when an agent with one is built",
}
"""Modules that need an extra as a whole, each with the reason. Nothing may import them with a module."""
ROOMS = {"envs/mujoco/": "mujoco"}
"""Folders that need an extra as a whole, and its package. Nothing outside may import them with a module."""

MAX_LINES = 400
LONGER: dict[str, str] = {}
"""Files over MAX_LINES, each with the reason why it is not two files."""


class Import(NamedTuple):
    module: str
    line: int
    at_import: bool
    """Whether it happens when the module is imported: not in a function, not for the type checker alone."""


def imports(source: str) -> list[Import]:
    """Every import in ``source``, also ``import_module("name")`` and ``require("name", ...)``. Relative ones stay in
    their package and are left out."""
    return list(_imports(ast.parse(source), at_import=True))


def _imports(node: ast.AST, at_import: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(alias.name, node.lineno, at_import)
    elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
        yield Import(node.module, node.lineno, at_import)
    elif isinstance(node, ast.Call) and node.args:
        called = getattr(node.func, "attr", getattr(node.func, "id", None))
        first = node.args[0]
        if called in ("import_module", "__import__", "require") and isinstance(first, ast.Constant):
            yield Import(str(first.value), node.lineno, at_import)
    late = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        for child in node.body:
            yield from _imports(child, at_import=False)
        for child in node.orelse:
            yield from _imports(child, at_import)
        return
    for child in ast.iter_child_nodes(node):
        yield from _imports(child, at_import and not late)


def files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def core_modules() -> set[str]:
    names = [re.match(r"[\w.-]+", requirement)[0].lower() for requirement in PROJECT["dependencies"]]
    return {MODULE_OF.get(each, each.replace("-", "_")) for each in names}


def test_imports_are_found():
    source = """
import a.b, c
from d.e import f
from . import g
if TYPE_CHECKING:
    import h
else:
    import i
try:
    import j
except ImportError:
    pass
class K:
    import l
    def m(self):
        import n
        o = importlib.import_module("p.q")
r = require("s", "t")
"""
    found = imports(source)
    assert {each.module for each in found if each.at_import} == {"a.b", "c", "d.e", "i", "j", "l", "s"}
    assert {each.module for each in found if not each.at_import} == {"h", "n", "p.q"}


@pytest.mark.parametrize("package", PACKAGES)
def test_arrows_point_one_way(package):
    paths = files(package)
    assert paths
    wrong = [
        f"{name(path)}:{each.line} imports {each.module}"
        for path in paths
        for each in imports(path.read_text(encoding="utf-8"))
        if each.module.split(".")[0] in FORBIDDEN[package]
    ]
    assert not wrong, "\n".join(wrong)


def test_estimators_know_no_updater():
    """Estimators define what an updater is (``ccrl.estimators.updates``), updaters import estimators: no circle."""
    paths = files("ccrl/estimators")
    assert paths
    wrong = [
        f"{name(path)}:{each.line} imports {each.module}"
        for path in paths
        for each in imports(path.read_text(encoding="utf-8"))
        if each.module.startswith("ccrl.updaters")
    ]
    assert not wrong, "\n".join(wrong)


def test_ccrl_does_not_name_what_plugs_into_it():
    """Neither as a module nor as a string that could become one; the registry learns the names from plugins."""
    module = re.compile(r"(agents|envs|scripts)([.:]\w+)*")
    wrong = []
    for path in files("ccrl"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        tree.body = [node for node in tree.body if not ast.unparse(node).startswith("__all__")]
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and module.fullmatch(node.value):
                wrong.append(f"{name(path)}:{node.lineno} names {node.value!r}")
    assert not wrong, "\n".join(wrong)


def test_our_plugins_are_entry_points():
    assert PROJECT["entry-points"]["ccrl.plugins"] == {"envs": "envs"}


def test_only_core_dependencies_are_imported_with_a_module():
    """So each module loads, and every agent and environment can be listed, without any extra."""
    core = {*sys.stdlib_module_names, *PACKAGES, *core_modules()}
    wrong = []
    for path in files(*PACKAGES):
        if name(path).removesuffix(".py").replace("/", ".") in ON_DEMAND:
            continue
        known = core | TEST_TOOLS if name(path).startswith("ccrl/testing/") else core
        inside = {room: package for room, package in ROOMS.items() if name(path).startswith(room)}
        known = known | set(inside.values())
        closed = tuple(room.rstrip("/").replace("/", ".") for room in ROOMS if room not in inside)
        for each in imports(path.read_text(encoding="utf-8")):
            foreign = each.module.split(".")[0] not in known or f"{each.module}.".startswith(
                tuple(f"{r}." for r in closed)
            )
            if each.at_import and (foreign or each.module in ON_DEMAND):
                wrong.append(f"{name(path)}:{each.line} imports {each.module}: import it in the function that uses it")
    assert not wrong, "\n".join(wrong)


def test_required_extras_exist():
    wrong = []
    for path in files(*PACKAGES, "scripts"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", None)) == "require":
                # a variable is a tracking service, whose extra has its name
                named = [node.args[1].value] if isinstance(node.args[1], ast.Constant) else ["wandb", "trackio"]
                for extra in set(named) - set(PROJECT["optional-dependencies"]):
                    wrong.append(f"{name(path)}:{node.lineno} names the extra {extra!r}")
    assert not wrong, "\n".join(wrong)


def test_scripts_check_for_foreign_packages_first():
    wrong = []
    for path in files("scripts"):
        source = path.read_text(encoding="utf-8")
        ours = [each.line for each in imports(source) if each.module.split(".")[0] in ("agents", "envs")]
        checks = [number for number, line in enumerate(source.splitlines(), 1) if line.startswith("check_siblings(")]
        if ours and not (checks and min(checks) < min(ours)):
            wrong.append(f"{name(path)}:{min(ours)} comes before check_siblings(...) of ccrl.packages")
    assert not wrong, "\n".join(wrong)


def test_only_their_own_tests_use_scripts():
    """By import or by path: a package's tests must run where only the package is."""
    wrong = []
    for path in files("tests"):
        if name(path).startswith("tests/scripts/") or path.parent == ROOT / "tests":
            continue
        source = path.read_text(encoding="utf-8")
        wrong += [f"{name(path)}:{each.line}" for each in imports(source) if each.module.split(".")[0] == "scripts"]
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Constant) and re.search(r"(^|\W)scripts(/\w|$)", str(node.value)):
                wrong.append(f"{name(path)}:{node.lineno}")
    assert not wrong, "\n".join(wrong)


def test_packages_have_an_init():
    """A folder without one is left out of an installed package."""
    wrong = {name(path.parent) for path in files(*PACKAGES) if not (path.parent / "__init__.py").exists()}
    assert not wrong


def test_files_are_short():
    lengths = {name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in files(*PACKAGES, "scripts")}
    long = {path: lines for path, lines in lengths.items() if lines > MAX_LINES}
    assert long.keys() <= LONGER.keys(), f"over {MAX_LINES} lines: {long}; split them, or give the reason in LONGER"
    assert LONGER.keys() <= long.keys(), "these are short again: take them out of LONGER"
