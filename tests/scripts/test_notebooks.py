"""Notebooks as pages, and their small sizes; that they run is a stage of .ci/run."""

from __future__ import annotations

import ast
import base64
import json

import pytest

from scripts.notebooks import FOLDER, Options, page, shrink


def cell(kind, source, outputs=(), tags=()):
    return {"cell_type": kind, "source": source, "outputs": list(outputs), "metadata": {"tags": list(tags)}}


def test_a_page_has_texts_code_outputs_and_pictures(tmp_path):
    png = base64.b64encode(b"picture").decode()
    cells = [
        cell("markdown", ["# A\n", "b"]),
        cell(
            "code", "print(1)", [{"text": "1\n"}, {"data": {"image/png": png, "text/plain": "<Figure>"}}, {"text": ""}]
        ),
        cell("code", "2", [{"data": {"text/plain": ["2"]}}]),
    ]
    (tmp_path / "n.ipynb").write_text(json.dumps({"cells": cells, "metadata": {}}))
    assert page(tmp_path / "n.ipynb", tmp_path) == (
        "# A\nb\n\n```python\nprint(1)\n```\n\n```text\n1\n```\n\n![output of the cell above](n_1_1.png)\n\n"
        "```python\n2\n```\n\n```text\n2\n```\n\nThis page is the notebook `docs/notebooks/n.ipynb`.\n"
    )
    assert (tmp_path / "n_1_1.png").read_bytes() == b"picture"


def test_small_sizes_take_the_place_of_the_parameters():
    notebook = {"cells": [cell("code", "n = 1_000\nseeds = (0, 1)", tags=["parameters"])],
                "metadata": {"tiny": {"seeds": [0], "n": 5}}}  # fmt: skip
    shrink(notebook)
    assert notebook["cells"][0]["source"] == "n = 5\nseeds = [0]"
    with pytest.raises(ValueError, match="one cell with the tag parameters that assigns seeds, m, got 1 that assign n"):
        shrink({"cells": notebook["cells"], "metadata": {"tiny": {"seeds": [0], "m": 5}}})
    with pytest.raises(ValueError, match="expected outputs at full size"):
        Options(tiny=True, write=True)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_is_whole(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    shrink(notebook)  # it has parameters, and small sizes for them
    code = [each for each in notebook["cells"] if each["cell_type"] == "code"]
    for each in code:
        ast.parse("".join(each["source"]))
        assert not [output for output in each["outputs"] if output.get("output_type") == "error"]
    assert any(each["outputs"] for each in code), "run scripts/notebooks.py --write"
