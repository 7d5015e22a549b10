"""One iteration of an agent as one page: every function of ours that runs, in the order in which it first runs.

python scripts/unrolled.py ppo --out ppo.md      # the agent's iteration, on its smallest task
python scripts/unrolled.py sac --env Pendulum-v1
python scripts/unrolled.py bnpo                  # a method for language models, on a table of logits
python scripts/unrolled.py bnpo --beside grpo    # the same without the source of what GRPO runs too

The iteration is traced while it runs (Python's profile hook), uncompiled: what is on the page ran, in that order, and
nothing else of ``ccrl`` and ``agents`` did. Environments and PyTorch are left out.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
import tempfile
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Annotated, Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import tyro

from ccrl.packages import ROOT, check_siblings

check_siblings("agents", "envs")

import agents
import envs  # noqa: F401  (registers the tasks)

__all__ = ["TASKS", "Called", "Options", "build", "iteration", "main", "page", "trace"]

TASKS = ("CartPole-v1", "Pendulum-v1", "ccrl/InventoryOneStoreLost-v0")
"""Tried in this order until one has the spaces that the agent takes."""

SMALL = {"num_envs": 2, "n_steps": 16, "batch_size": 16, "learning_starts": 32, "buffer_size": 256,
         "n_train": 64, "n_dev": 64, "rounds": 2, "hidden": (32, 32), "critic_hidden": (32, 32),
         "compile": "off"}  # fmt: skip
"""Settings of the traced agent, as far as it has them: sizes alone, and no compilation, which would hide functions."""

TEXT_TASKS, FLOW_TASKS = ("modsum", "sequence_match"), ("ring2d",)
"""Tried instead by methods for language models and for flow policies."""

TEXT = ({"n_prompts": 4, "model": "tabular"},
        {"n_prompts": 4, "model": "tiny", "model_layers": 1, "model_width": 16, "model_heads": 2})  # fmt: skip
"""Settings of these: a table of logits, or a small model for recipes that read hidden states."""

LONGEST = 1_000
"""An agent that has made no update after so many iterations makes none on this task."""

FROM_DATA: dict[str, dict[str, Any]] = {
    "bc": {}, "iql": {}, "rebrac": {}, "td3_bc": {},
    "cdsa": {"policy": lambda obs: 0 * obs[..., :1]},
    "pgd": {"real_rows": 4, "window": 4, "stride": 2, "generated": 3, "trajectories": 6, "sampling_steps": 2,
            "regenerate_every": 1, "denoiser_steps": 2, "denoiser_batch": 2, "denoiser_features": 8,
            "denoiser_levels": 1},
}  # fmt: skip
"""Agents that learn here from a few drawn rows of the pendulum, with what they need besides."""


@dataclass(frozen=True)
class Options:
    """Which agent, on what."""

    agent: Annotated[str, tyro.conf.Positional]
    """An agent or a method, as ppo or bnpo."""
    env: str | None = None
    """Environment id; None: the first of the small tasks that the agent takes."""
    beside: str | None = None
    """The source of functions that this agent's iteration runs too is left out."""
    out: Path | None = None
    """Markdown file to write; None: print."""


@dataclass(frozen=True)
class Called:
    """A function that ran: where its first call was in the tree of calls, and how many calls there were."""

    code: CodeType
    depth: int
    calls: int

    @property
    def path(self) -> str:
        """Its file, from the root of the project."""
        return Path(self.code.co_filename).relative_to(ROOT).as_posix()

    @property
    def place(self) -> tuple[str, int, str]:
        """Which function it is."""
        return self.path, self.code.co_firstlineno, self.code.co_qualname


def build(name: str, env: str | None = None) -> Any:
    """The agent, small, after its first update, so that what happens once is not on the page.

    :raises ValueError: no task fits, with the reason for each.
    """
    cls, reasons = agents.get_agent(name), []
    known = {f.name for f in dataclasses.fields(cls.Config)}
    text, flow = getattr(cls, "text", False), name in agents.FLOW_METHODS
    small: tuple[dict[str, Any], ...] = ({k: v for k, v in SMALL.items() if k in known},)
    small = TEXT if text else ({"n_prompts": 2},) if flow else small
    with tempfile.TemporaryDirectory() as folder:
        if name in FROM_DATA:
            small = ({**small[0], "updates": 1, "dataset": _rows(Path(folder)), **FROM_DATA[name]},)
        own = (cls.example_env,) if "example_env" in vars(cls) else ()
        for task in (TEXT_TASKS if text else FLOW_TASKS if flow else (*TASKS, *own)) if env is None else (env,):
            for settings in (*small, {"compile": "off"} if "compile" in known else {}):
                try:
                    agent = cls(task, seed=0, **settings)
                    for _ in range(LONGEST):
                        agent.learn(1)
                        if agent.n_updates > 0:
                            return agent
                    reasons.append(f"{task}: no update in {LONGEST} iterations")
                except (ValueError, TypeError, NotImplementedError) as error:
                    reasons.append(f"{task}: {error}")
    raise ValueError(
        f"{name}: expected an agent that trains on one of the small tasks; pass env. " + "; ".join(reasons)
    )


def _rows(folder: Path) -> str:
    draw = np.random.default_rng(0).uniform
    columns: dict[str, Any] = {"obs": draw(-1, 1, (64, 3)), "action": draw(-2, 2, (64, 1)), "reward": draw(size=64)}
    path = folder / "rows.npz"
    np.savez(path, **columns, terminated=np.zeros(64, bool), truncated=np.arange(64) % 16 == 15)
    return str(path)


def trace(run: Callable[[], Any]) -> list[Called]:
    """The functions of ``ccrl`` and ``agents`` that ``run()`` calls, in the order of their first calls."""
    roots = tuple(f"{ROOT / package}/" for package in ("ccrl", "agents"))
    first: dict[CodeType, int] = {}
    calls: dict[CodeType, int] = {}
    begins: dict[CodeType, int] = {}
    depth = 0

    def hook(frame: FrameType, event: str, _: Any) -> None:
        nonlocal depth
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(roots):
            return
        if event == "return":
            depth -= 1
            return
        if "<" not in code.co_name:  # lambdas and comprehensions are in the text of the function around them
            first.setdefault(code, depth)
            # where a generator goes on behind a yield, that is no call of its own
            calls[code] = calls.get(code, 0) + (frame.f_lasti == begins.setdefault(code, frame.f_lasti))
        depth += 1

    sys.setprofile(hook)
    try:
        run()
    finally:
        sys.setprofile(None)
    return [Called(code, at, calls[code]) for code, at in first.items()]


@functools.cache
def iteration(name: str, env: str | None = None) -> tuple[str, list[Called]]:
    """The task that the agent was built on, and what one iteration runs."""
    agent = build(name, env)
    found = trace(agent.learner.iterate)
    agent.close()
    return agent.env_id, found


def page(name: str, env: str | None = None, beside: str | None = None) -> str:
    """Markdown: the tree of calls, then the source of each function under its file and line."""
    task, found = iteration(name, env)
    known = {c.place for c in iteration(beside)[1]} if beside is not None else set()
    own = [c for c in found if c.place not in known]
    shallow, files = min(c.depth for c in found), len({c.path for c in found})
    says = (f"One iteration on {task}, traced while it ran without compilation: {len(found)} functions of {files} "
            "files, each where it was first called. Generated by `scripts/unrolled.py`.")  # fmt: skip
    if beside is not None:
        says += f" Marked with + and printed below: the {len(own)} that [{beside}]({beside}.md) does not run."

    def line(c: Called) -> str:
        mark = "" if beside is None else "  " if c.place in known else "+ "
        return f"{mark}{'  ' * (c.depth - shallow)}{c.code.co_qualname}" + (f"  x {c.calls}" if c.calls > 1 else "")

    tree = "\n".join(map(line, found))
    parts = [f"# {name}, unrolled", says, "## Calls", f"```text\n{tree}\n```", "## Source"]
    for called in own:
        source = textwrap.dedent(inspect.getsource(called.code)).rstrip()
        parts.append(f"**{called.code.co_qualname}** `{called.path}:{called.code.co_firstlineno}`")
        parts.append(f"```python\n{source}\n```")
    if not own:
        parts.append("None: another default or another number is all that differs.")
    return "\n\n".join(parts) + "\n"


def main(options: Options) -> str:
    """Write or print the page."""
    text = page(options.agent, options.env, options.beside)
    if options.out is None:
        print(text, end="")
    else:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text, encoding="utf-8")
    return text


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
