"""``ccrl COMMAND ...``: runs the file of that name in this folder, as ``python scripts/COMMAND.py ...`` does.

ccrl train ppo --env Hopper-v5
ccrl evaluate runs/Hopper-v5__ppo__0__...
"""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path

__all__ = ["COMMANDS", "main"]

COMMANDS = ("train", "evaluate", "benchmark", "plot", "report", "tune", "methods", "gradient_lab", "inventory_network",
            "inventory_example", "inventory_train", "inventory_orders", "inventory_report", "llm_example",
            "stockpyl_check", "unrolled", "export", "make_dataset", "reproduce")  # fmt: skip

FOLDER = Path(__file__).resolve().parent

# The files import each other as `scripts.X`, which is the name of their folder in a clone. Installed it is
# ccrl_scripts; a worker process imports or runs this file too, and finds them by the same name.
if FOLDER.name != "scripts":
    if __package__ in (None, ""):
        sys.path.insert(0, str(FOLDER.parent))
    sys.modules.setdefault("scripts", importlib.import_module(FOLDER.name))


def main() -> None:
    """The console command."""
    there = [name for name in COMMANDS if (FOLDER / f"{name}.py").is_file()]
    name = sys.argv[1].replace("-", "_") if len(sys.argv) > 1 else ""
    if name not in there:
        usage = f"usage: ccrl {{{','.join(there)}}} ...\n{__doc__}"
        if name in ("_h", "__help"):
            print(usage)
            return
        sys.exit(f"{usage}\nexpected one of these commands, got {name or 'none'}")
    sys.argv = [str(FOLDER / f"{name}.py"), *sys.argv[2:]]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
