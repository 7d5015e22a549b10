"""Version and packages of the wheel; everything else is in pyproject.toml.

The files of ``scripts/`` are in it as ``ccrl_scripts``: a top-level package called ``scripts`` would be in the way of
everybody else's. In a clone they keep their folder.
"""

import runpy
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

version = runpy.run_path(str(Path(__file__).resolve().parent / "ccrl" / "version.py"))["version"]()


class BuildWithVersion(build_py):
    """Writes the version into the wheel, where there is no git to ask."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            (Path(self.build_lib) / "ccrl" / "_version.txt").write_text(f"{version}\n", encoding="utf-8")


ours = find_packages(include=["ccrl", "ccrl.*", "envs", "envs.*", "agents", "agents.*"])
command_line = ["ccrl_scripts", *(f"ccrl_scripts.{name}" for name in find_packages("scripts"))]
setup(
    version=version, packages=[*ours, *command_line], package_dir={"ccrl_scripts": "scripts"},
    cmdclass={"build_py": BuildWithVersion},
)  # fmt: skip
