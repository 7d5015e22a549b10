"""Which packages an import would give, and what to install for the ones that are missing.

``agents`` and ``envs`` are names that other projects use too (openai-agents installs a top-level ``agents``), and an
editable install stands behind everything on ``sys.path``. Without a check, the foreign package is imported in silence
and the first name looked up in it raises a puzzling ImportError.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.metadata import packages_distributions
from pathlib import Path
from types import ModuleType

__all__ = ["check_siblings", "require"]

ROOT = Path(__file__).resolve().parent.parent
"""The folder that holds ``ccrl``, and beside it ``agents`` and ``envs``."""


def check_siblings(first: str, *others: str) -> None:
    """Make sure that importing these gives the packages beside ``ccrl``. Imports none of them.

    Scripts call it before their first import of ``agents`` or ``envs``, the registry before it loads a plugin of ours.

    Raises:
        ImportError: another package of that name comes first, or there is none.
    """
    for name in (first, *others):
        expected = ROOT / name / "__init__.py"
        found = _origin(name)
        # In site-packages two distributions can write to the same folder: the place is right, the files are not.
        shared = found == expected and not (ROOT / "pyproject.toml").exists()
        if found == expected and not (shared and _foreign_owners(name)):
            continue
        if found is None:
            raise ImportError(
                f"expected the package {name!r} beside ccrl, at {expected.parent}, received none: "
                "install the project from its folder (pip install -c constraints.txt -e .)"
            )
        owners = _foreign_owners(name)
        received = f"{found} of {' and '.join(owners)}" if owners else str(found)
        fixes = [f"set PYTHONPATH={ROOT}"] if found != expected else []
        fixes += [f"pip uninstall {' '.join(owners)}"] if owners else [f"take {_entry(found)} off the Python path"]
        fixes += ["install this project in a virtual environment of its own"]
        raise ImportError(
            f"expected the package {name!r} beside ccrl, at {expected.parent}, received {received}, which has the same "
            f"name and comes first; to fix it, do one of these: {'; '.join(fixes)}"
        )


def require(module: str, extra: str) -> ModuleType:
    """Import ``module``, which the optional dependencies ``extra`` of pyproject.toml bring.

    Raises:
        ImportError: it is not installed. An error inside an installed module is passed on as it is.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module != missing and not module.startswith(f"{missing}."):
            raise  # a dependency of the module is missing: installing the extra again may not bring it
        # By path: on the package index the name ccrl belongs to another project.
        raise ImportError(
            f"expected the package {missing!r}, which is not installed; it comes with the extra {extra!r}: "
            f'pip install -e ".[{extra}]" in the folder of the project'
        ) from error


def _origin(name: str) -> Path | None:
    """The file that ``import name`` runs or has run; the folder where it is a namespace package."""
    loaded = sys.modules.get(name)
    spec = loaded.__spec__ if loaded is not None else importlib.util.find_spec(name)
    if spec is None:
        return None
    if spec.origin is not None:
        return Path(spec.origin).resolve()
    return next((Path(folder).resolve() for folder in spec.submodule_search_locations or ()), None)


def _entry(origin: Path) -> Path:
    """The folder on the Python path in which ``origin`` was found."""
    return origin.parent.parent if origin.name == "__init__.py" else origin.parent


def _foreign_owners(name: str) -> list[str]:
    return sorted(set(packages_distributions().get(name, ())) - {"ccrl"})
