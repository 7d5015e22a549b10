"""Train an agent: one command, one run folder.

python scripts/train.py mdpo --env HalfCheetah-v5
python scripts/train.py ppo --env Hopper-v5 --total-timesteps 300000 --num-envs 8 --learning-rate 1e-4
python scripts/train.py ppo --env Hopper-v5 --config my.yaml        # flags win over the file
python scripts/train.py ppo --env Hopper-v5 --tuned                 # ... and over the settings tuned for this pair
python scripts/train.py --resume runs/HalfCheetah-v5__mdpo__0__...  # continues bit for bit; also after Ctrl-C
python scripts/train.py llm --method grpo --task arithmetic         # a language model on a text task
python scripts/train.py llm --method bnpo --model DIR --prompts data.jsonl --reward module:function --lora-rank 8
python scripts/train.py awm --env ring2d                            # a flow policy on a generation task
python scripts/train.py grouped --method grpo --env CartPole-v1     # the same recipe on a control task
torchrun --nproc-per-node 2 scripts/train.py ppo --num-envs 8       # two processes of 8 environments each, one training
python scripts/train.py my_package.my_module:MyAgent --env my_package.envs:MyEnv     # of your own, also text tasks
"""

from __future__ import annotations

import difflib
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Nothing here imports torch, which takes a second and more: the usage and its errors do not wait for it.
from ccrl.packages import check_siblings

check_siblings("agents", "envs")

import agents
from ccrl import registry
from ccrl.experiment.files import CheckpointError, FolderInUseError

if TYPE_CHECKING:
    from ccrl.experiment.run import RunFolder

__all__ = ["main", "prepare"]


def _training() -> ModuleType:
    """The module that trains, with torch behind it, imported."""
    first = "torch" not in sys.modules
    if first:
        gc.disable()  # a collection amid the imports walks all that torch has made so far: a tenth of a second each
    try:
        from scripts import training
    finally:
        if first:
            gc.enable()
            gc.freeze()  # nor do those of the training walk it: modules live as long as the process
    return training


def text_arguments(argv: list[str]) -> list[str]:
    """``--method M --task T [flags]`` as the arguments of the agent M with the environment T."""
    if "--method" not in argv or argv.index("--method") + 1 == len(argv):
        known = ",".join(sorted(agents.METHODS))
        sys.exit(f"usage: train.py llm --method {{{known},module:NAME}} [--task TASK] [flags]")
    index = argv.index("--method")
    rest = argv[:index] + argv[index + 2 :]
    return [argv[index + 1], *("--env" if word == "--task" else word for word in rest)]


def main(argv: list[str]) -> RunFolder:
    """Command line: ``AGENT [flags]`` or ``--resume RUN``."""
    return prepare(argv)()


def prepare(argv: list[str]) -> Callable[[], RunFolder]:
    """The training that a command line asks for, built."""
    # tyro reads the others, and takes both --x=y and --x y
    own = ("--config", "--resume", "--method", "--task", "--trust")
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith(own) else [word])]
    if "--resume" in argv:
        if len(argv) < 2 or argv[0] != "--resume" or argv[2:3] not in ([], ["--trust"]):
            sys.exit("usage: train.py --resume RUN [--trust NAME ...] (a run continues with its own settings; no other "
                     "flags. To train longer, raise total_timesteps in RUN/config.yaml)")  # fmt: skip
        return _training().resume(argv[1], argv[3:])  # type: ignore[no-any-return]
    if argv[:1] == ["llm"]:
        argv = text_arguments(argv[1:])
    elif argv[:1] and argv[0] in agents.METHODS:
        argv = text_arguments(["--method", *argv])
    if not argv or not (argv[0] in registry.agents or registry.is_module_name(argv[0])):
        usage = (f"usage: train.py {{{','.join(sorted(agents.AGENTS | agents.FLOW_METHODS))}}} [flags] | llm --method "
                 f"{{{','.join(sorted(agents.METHODS))}}} [flags] | module:Class [flags] | --resume RUN")  # fmt: skip
        if argv[:1] in (["-h"], ["--help"]):
            print(f"{usage}\n{__doc__}AGENT --help shows every flag.")
            sys.exit(0)
        near = difflib.get_close_matches(argv[0], [*registry.agents.names(), *agents.METHODS], n=1) if argv else []
        hint = f"; did you mean {near[0]}?" if near else ""
        sys.exit(f"{usage}; received {argv[:1] or 'nothing'}{hint}")
    name, rest = argv[0], argv[1:]
    overlay = None
    if "--config" in rest:
        index = rest.index("--config")
        if index + 1 == len(rest):
            sys.exit("--config: expected a YAML file after it")
        overlay, rest = rest[index + 1], rest[:index] + rest[index + 2 :]
        if not Path(overlay).is_file():
            sys.exit(f"--config: expected a YAML file, found none at {overlay}")
    return _training().from_flags(name, rest, overlay)  # type: ignore[no-any-return]


if __name__ == "__main__":
    sys.path.append(os.getcwd())  # module:Class of the folder one works in; last, so that it shadows nothing
    try:
        training = prepare(sys.argv[1:])
    except (ValueError, TypeError, ImportError, OSError, CheckpointError, FolderInUseError) as failure:
        sys.exit(f"error: {failure}")
    training()  # what fails in here keeps its traceback: it may be the user's own environment or agent
