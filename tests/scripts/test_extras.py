"""The check of extras knows all of pyproject.toml; that they install is scripts/setup/extras.sh's to find out."""

from __future__ import annotations

import pytest

from scripts.setup.extra_check import CHECKS, ROOT, requirements


def test_the_packages_of_an_extra():
    assert requirements("notebooks") == ["nbclient", "ipykernel"]
    assert requirements("docs") == ["sphinx", "myst-parser", "furo"]
    with pytest.raises(ValueError, match=r"expected one of sb3, .*got nothing"):
        requirements("nothing")
    listed = (ROOT / "scripts/setup/extras.sh").read_text().split("|| set -- ")[1].split("\n")[0].split()
    assert all(requirements(extra) for extra in [*listed, *CHECKS])
