"""Methods for language models from one warm start, at equal rollouts: pass@1, pass@k and entropy over training.

python scripts/studies/llm run --out results/llm --jobs 2      # resumable: warm starts, then every method and seed
python scripts/studies/llm report --out results/llm            # tables and figures in docs/figures/llm_*
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from matplotlib.figure import Figure

from ccrl.packages import ROOT, check_siblings

check_siblings("agents", "envs")

import agents
from ccrl.experiment.cells import complete
from ccrl.experiment.config import Options
from ccrl.experiment.csv_table import read_rows
from ccrl.experiment.files import write_atomic

__all__ = ["METHODS", "Report", "Run", "interval", "main", "play", "warm_start"]

METHODS = (
    "grpo", "hpt", "bnpo", "gdpo", "g2rpo", "empg", "mhpo", "real", "gbpo", "dcpo", "r2vpo", "d3s", "riskpo", "copg",
)  # fmt: skip
"""The baseline, then the papers."""

STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""0.975 quantile of Student's t for so many runs (one degree of freedom less)."""


@dataclass(frozen=True)
class Run:
    """Train every method from the same warm start, seed by seed."""

    out: Path
    """Folder of ``runs.csv`` and of the warm starts."""
    methods: tuple[str, ...] = METHODS
    """Names of ``agents.llm.METHODS``; each runs its own default settings but for those below."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seed of warm start, sampling and shuffling."""
    task: str = "arithmetic"
    """Text task."""
    options: Options = field(default_factory=lambda: {"digits": 2, "modulus": 10})
    """The task's, as JSON."""
    layers: int = 3
    """Layers of the model."""
    width: int = 160
    """Its hidden size (1.2 M parameters with 3 layers)."""
    warm_steps: int = 500
    """Supervised steps of the warm start, 64 demonstrations each: the sum is half learnt then."""
    iterations: int = 80
    """Rollouts of 16 prompts x 8 completions (methods that ask for more than one rollout count what they use)."""
    learning_rate: float = 1e-4
    """AdamW's, for all methods."""
    max_grad_norm: float = 0.1
    """Gradients are scaled down to this norm, which is below most methods' gradients: losses of different scale then
    move the model alike."""
    eval_every: int = 20
    """Iterations between evaluations (128 test questions x 8 samples)."""
    jobs: int = 1
    """Processes."""

    def __post_init__(self) -> None:
        unknown = set(self.methods) - set(agents.METHODS)
        if unknown:
            raise ValueError(f"methods: expected some of {sorted(agents.METHODS)}, got {sorted(unknown)}")
        if not 1 <= len(self.seeds) <= max(STUDENT) or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: expected 1 to {max(STUDENT)} different ones, got {self.seeds}")
        for name in ("layers", "width", "warm_steps", "iterations", "eval_every", "jobs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected >= 1, got {getattr(self, name)}")

    def run(self) -> list[dict[str, str]]:
        """Warm starts that are missing, then the runs that ``runs.csv`` lacks."""
        model = {"task": self.task, "options": json.dumps(self.options), "layers": self.layers, "width": self.width,
                 "warm_steps": self.warm_steps}  # fmt: skip
        starts = [{"seed": seed, **model} for seed in self.seeds]
        make = partial(warm_start, out=str(self.out))
        complete(self.out / "warm.csv", starts, make, jobs=min(self.jobs, len(starts)), name="warm start",
                 names=("seed",))  # fmt: skip
        cells = [
            {"method": method, "seed": seed, **model, "iterations": self.iterations, "lr": self.learning_rate,
             "max_grad_norm": self.max_grad_norm, "eval_every": self.eval_every}
            for seed in self.seeds for method in self.methods
        ]  # fmt: skip
        rows = complete(self.out / "runs.csv", cells, partial(play, out=str(self.out)), jobs=self.jobs, name="llm",
                        names=("method", "seed"))  # fmt: skip
        write_atomic(self.out / "command.txt", lambda file: file.write(self.command().encode()))
        return rows

    def command(self) -> str:
        """The command that makes these rows, with what differs from the defaults."""
        words = ["python scripts/studies/llm run --out results/llm"]
        for name in ("seeds", "task", "options", "layers", "width", "warm_steps", "iterations", "learning_rate",
                     "max_grad_norm", "eval_every"):  # fmt: skip
            value, default = getattr(self, name), getattr(Run(self.out), name)
            if value == default:
                continue
            text = {"seeds": " ".join(map(str, self.seeds)), "options": f"'{json.dumps(self.options)}'"}.get(
                name, value
            )
            words.append(f"--{name.replace('_', '-')} {text}")
        return " ".join(words)


def _folder(cell: dict[str, Any], out: str) -> Path:
    options = [f"{name}{value}" for name, value in json.loads(cell["options"]).items()]
    words = [cell["task"], *options, *(str(cell[name]) for name in ("layers", "width", "warm_steps", "seed"))]
    return Path(out) / "warm" / "_".join(words)


def warm_start(cell: dict[str, Any], out: str) -> list[dict[str, float]]:
    """Supervised training from scratch; the model goes into a folder that any method can start from."""
    cls = agents.get_agent("sft")
    config = cls.Config(model_layers=cell["layers"], model_width=cell["width"])
    agent = cls(cell["task"], config, seed=cell["seed"], env_kwargs=json.loads(cell["options"]))
    loss = agent.warm_start(cell["warm_steps"])
    agent.policy.model.save_pretrained(_folder(cell, out))
    found = agent.pass_at((1, 8), 128, 8, 30_000)
    size = sum(p.numel() for p in agent.policy.parameters())
    return [{"loss": loss, "parameters": size, "pass1": found["pass@1"], "pass8": found["pass@8"],
             "entropy": found["entropy"]}]  # fmt: skip


def play(cell: dict[str, Any], out: str) -> list[dict[str, float]]:
    """One method, one seed; a row per evaluation."""
    cls = agents.get_agent(cell["method"])
    config = cls.Config(
        model=str(_folder(cell, out)), n_prompts=16, group_size=8, learning_rate=cell["lr"],
        max_grad_norm=cell["max_grad_norm"],
    )  # fmt: skip
    agent = cls(cell["task"], config, seed=cell["seed"], env_kwargs=json.loads(cell["options"]))
    rows, norms = list[dict[str, float]](), list[float]()

    def measure() -> None:
        found = agent.pass_at((1, 8), 128, 8, 30_000)
        norm = statistics.fmean(norms) if norms else math.nan
        rows.append({"iteration": agent.iteration, "completions": agent.num_timesteps, "pass1": found["pass@1"],
                     "pass8": found["pass@8"], "entropy": found["entropy"], "grad_norm": norm})  # fmt: skip
        norms.clear()

    def watch(_: Any) -> bool:
        norms.append(float(agent.scalars.get("train/grad_norm", math.nan)))
        if agent.iteration % cell["eval_every"] == 0:
            measure()
        return bool(agent.iteration < cell["iterations"])

    measure()
    agent.learn(10**9, watch)
    return rows


# -- report -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """Tables and figures of finished runs."""

    out: Path
    """Folder of ``run``."""
    target: Path = ROOT / "docs" / "figures"
    """Where ``llm_study.md``, ``llm_study_runs.csv`` and the figure go."""

    def run(self) -> str:
        """Write and return the table."""
        rows = read_rows(self.out / "runs.csv")
        command = (self.out / "command.txt").read_text(encoding="utf-8")
        warm = read_rows(self.out / "warm.csv")
        self.target.mkdir(parents=True, exist_ok=True)
        text = table(rows, warm, command)
        write_atomic(self.target / "llm_study.md", lambda file: file.write(text.encode()))
        # beside the figure, so that it can be drawn again without training
        shutil.copyfile(self.out / "runs.csv", self.target / "llm_study_runs.csv")
        differences(rows).savefig(self.target / "llm_study_differences.png", dpi=110)
        print(text, end="")
        return text


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval (Student's t; nan for one value)."""
    n = len(values)
    half = STUDENT[n] * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return statistics.fmean(values), half


def _last(rows: list[dict[str, str]], method: str, column: str) -> dict[str, float]:
    """By seed: the value of the last evaluation."""
    return {row["seed"]: float(row[column]) for row in rows if row["method"] == method}


def table(rows: list[dict[str, str]], warm: list[dict[str, str]], command: str) -> str:
    """Markdown: the last evaluation of every method, and its paired difference to GRPO."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    seeds = sorted({row["seed"] for row in rows}, key=int)
    start = {c: statistics.fmean(float(row[c]) for row in warm) for c in ("pass1", "pass8", "entropy")}
    lines = [
        f"Made by `{command}` and `report`. Last evaluation; mean over seeds {', '.join(seeds)} with the half width of "
        f"its 95 % interval (Student's t). Warm start ({float(warm[0]['parameters']) / 1e6:.1f} M parameters): pass@1 "
        f"{start['pass1']:.3f}, pass@8 {start['pass8']:.3f}, entropy {start['entropy']:.3f}. The difference is paired "
        "by seed; significant: its interval leaves out 0, without a correction for the number of methods.",
        "", "| method | pass@1 | pass@8 | entropy | completions | pass@1 - GRPO | significant | gradient norm |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    base = _last(rows, "grpo", "pass1")
    for method in methods:
        cells = [_text(list(_last(rows, method, c).values())) for c in ("pass1", "pass8", "entropy")]
        mine = _last(rows, method, "pass1")
        paired = [mine[s] - base[s] for s in mine if s in base]
        mean, half = interval(paired) if paired else (math.nan, math.nan)
        verdict = "" if method == "grpo" or not abs(mean) > half else "better" if mean > 0 else "worse"
        if method != "grpo" and not verdict:
            verdict = "no"
        used = statistics.fmean(_last(rows, method, "completions").values())
        norm = statistics.fmean(_last(rows, method, "grad_norm").values())
        gap = "" if method == "grpo" else f"{mean:+.3f} +- {half:.3f}"
        lines.append(f"| {method} | {' | '.join(cells)} | {used:,.0f} | {gap} | {verdict} | {norm:.3g} |")
    return "\n".join(lines) + "\n"


def _text(values: list[float]) -> str:
    mean, half = interval(values)
    return f"{mean:.3f} +- {half:.3f}"


def differences(rows: list[dict[str, str]]) -> Figure:
    """pass@1 less GRPO's at the last evaluation: a dot per seed, their mean and its 95 % interval."""
    base, seeds = _last(rows, "grpo", "pass1"), sorted({row["seed"] for row in rows}, key=int)
    methods = [method for method in dict.fromkeys(row["method"] for row in rows) if method != "grpo"]
    page = Figure(figsize=(6.0, 1.2 + 0.3 * len(methods)), layout="constrained")
    axis = page.subplots()
    for y, method in enumerate(methods):
        mine = _last(rows, method, "pass1")
        paired = [mine[seed] - base[seed] for seed in seeds if seed in mine and seed in base]
        mean, half = interval(paired)
        axis.plot(paired, [y - 0.2] * len(paired), "o", mfc="none", color="#D55E00", ms=5, label="" if y else "a seed")
        axis.errorbar(mean, y, xerr=0.0 if math.isnan(half) else half, fmt="o", color="#0072B2", ms=5, capsize=3,
                      label="" if y else "mean, 95 % interval (Student's t)")  # fmt: skip
    axis.axvline(0.0, color="0.4", linewidth=1)
    axis.set_yticks(range(len(methods)), methods)
    axis.invert_yaxis()
    axis.set_xlabel(f"pass@1 less GRPO's from the same warm start, {len(seeds)} seeds")
    axis.grid(axis="x", color="0.9")
    if methods:
        page.legend(loc="outside upper center", ncols=2, frameon=False)
    return page


def main(argv: list[str]) -> Any:
    """``run`` or ``report``."""
    torch.set_num_threads(1)
    chosen: Any = tyro.extras.subcommand_cli_from_dict({"run": Run, "report": Report}, args=argv, description=__doc__)
    return chosen.run()
