"""Run the notebooks of ``docs/notebooks`` from top to bottom (extra notebooks).

    python scripts/notebooks.py --tiny         # as the continuous integration does: small sizes, nothing is kept
    python scripts/notebooks.py --write        # at full size, outputs into the files

Small sizes stand in a notebook's metadata (``tiny``), by the names of its cell with the tag ``parameters``. The site
shows notebooks as pages, with the outputs that are in the files.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from ccrl.packages import ROOT, require
from ccrl.settings import Count, Settings

__all__ = ["FOLDER", "Options", "main", "page", "shrink"]

FOLDER = ROOT / "docs" / "notebooks"


@dataclass(frozen=True)
class Options(Settings):
    """What is run."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """These notebooks are run, by the names of their files; none named: all."""
    tiny: bool = False
    """They run at the small sizes."""
    write: bool = False
    """Outputs are kept in the files."""
    timeout: Count = 900
    """A cell that takes more seconds is an error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tiny and self.write:
            raise ValueError("write: expected outputs at full size, got tiny too; leave one out")


def shrink(notebook: dict[str, Any]) -> None:
    """Put the small sizes in the place of the parameters, in place.

    Raises:
        ValueError: not one cell with the tag ``parameters``, or it assigns other names than ``tiny`` has.
    """
    cells = [cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", ())]
    tiny = notebook["metadata"].get("tiny", {})
    names = [line.split("=")[0].strip() for cell in cells for line in _text(cell["source"]).splitlines()]
    if len(cells) != 1 or sorted(names) != sorted(tiny):
        raise ValueError(f"expected one cell with the tag parameters that assigns {', '.join(tiny)}, got "
                         f"{len(cells)} that assign {', '.join(names)}")  # fmt: skip
    cells[0]["source"] = "\n".join(f"{name} = {tiny[name]!r}" for name in names)


def main(options: Options) -> list[Path]:
    """Run them; returns their files.

    Raises:
        ValueError: a name without a file.
        nbclient.exceptions.CellExecutionError: a cell fails; the message has its traceback.
    """
    nbclient, nbformat = require("nbclient", "notebooks"), require("nbformat", "notebooks")
    there = {path.stem: path for path in sorted(FOLDER.glob("*.ipynb"))}
    if unknown := set(options.names) - there.keys():
        raise ValueError(f"names: expected some of {', '.join(there)}, got {', '.join(sorted(unknown))}")
    paths = [there[name] for name in options.names or there]
    # the kernel is a process of its own, in a folder of its own: it finds the project and draws into the notebook
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # small networks: several threads wait for each other
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        if options.tiny:
            shrink(notebook)
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            client = nbclient.NotebookClient(
                notebook, timeout=options.timeout, startup_timeout=300, kernel_name="python3",
                resources={"metadata": {"path": folder}}, extra_arguments=["--log-level=ERROR"],
            )  # fmt: skip
            client.execute()
        if options.write:
            for cell in notebook.cells:
                cell.metadata.pop("execution", None)  # the time of day: another file at every run
                if "outputs" in cell:  # warnings name the folders of this machine
                    cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            nbformat.write(notebook, path)
        print(f"[notebooks] {path.name}: {time.perf_counter() - start:.0f} s", flush=True)
    return paths


def page(path: Path, folder: Path) -> str:
    """A notebook as Markdown: texts, code and outputs; pictures become files in ``folder``."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    parts: list[str] = []
    for number, cell in enumerate(notebook["cells"]):
        source = _text(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for index, output in enumerate(cell["outputs"]):
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}_{number}_{index}.png"
                (folder / name).write_bytes(base64.b64decode(_text(data["image/png"])))
                parts.append(f"![output of the cell above]({name})")
            elif text := _text(output.get("text", data.get("text/plain", ""))).strip("\n"):
                parts.append(f"```text\n{text}\n```")
    return "\n\n".join([*parts, f"This page is the notebook `docs/notebooks/{path.name}`."]) + "\n"


def _text(source: str | list[str]) -> str:
    return source if isinstance(source, str) else "".join(source)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
