"""Packages of the wheel; everything else is in pyproject.toml.

The files of ``scripts/`` are in it as ``ccrl_scripts``: a top-level package called ``scripts`` would be in the way of
everybody else's. In a clone they keep their folder.
"""

from setuptools import find_packages, setup

ours = find_packages(include=["ccrl", "ccrl.*", "envs", "envs.*", "agents", "agents.*"])
command_line = ["ccrl_scripts", *(f"ccrl_scripts.{name}" for name in find_packages("scripts"))]
setup(packages=[*ours, *command_line], package_dir={"ccrl_scripts": "scripts"})
