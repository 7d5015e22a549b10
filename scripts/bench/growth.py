"""How the cost of one unit grows with the size of what it is part of: ``python scripts/bench growth``."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ccrl.packages import check_siblings, require

check_siblings("agents", "envs")

import envs  # noqa: F401  (registers ids)
from agents.dbqpg.kernel import DeepKernel
from agents.dbqpg.quadrature import GradientSystem, StateGram
from agents.hdpo import HDPO, HDPOConfig
from ccrl.batched_env import resolve_env
from ccrl.collect import Collector, Request
from ccrl.data import Batching, Data
from ccrl.policies import MLPPolicy
from ccrl.replay import ReplayBuffer

__all__ = ["VERTICALS", "Config", "main", "slope"]

COLUMNS = ("vertical", "unit", "size", "microseconds_per_unit")


@dataclass
class Config:
    """Processor time per unit against size, on one torch thread, the least of the repeats; a slope is that of the
    logarithms, by least squares: 0 is a cost per unit that does not depend on size, 1 one that grows with it.

    * copies: an environment step of a rollout of HalfCheetah-v5 in so many copies, acting included.
    * ring: a row drawn from a memory of so many transitions, in batches of 256.
    * tokens: a token of a completion of that length in a forward and backward pass of a small language model.
    * generated: a token of a completion of that length as it is sampled.
    * stores: a period of one of so many stores behind a warehouse in a gradient step of HDPO.
    * transitions: one of so many in a solve of DBQPG's Gaussian process, by the solver that it chooses.
    """

    verticals: tuple[str, ...] = ("copies", "ring", "tokens", "generated", "stores", "transitions")
    """These are measured."""
    copies: tuple[int, ...] = (16, 64, 256, 1024, 4096)
    """Copies of the environment."""
    ring: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    """Transitions in memory."""
    tokens: tuple[int, ...] = (32, 128, 512, 2048, 4096)
    """Tokens of a completion; both verticals."""
    stores: tuple[int, ...] = (3, 6, 12, 25, 50)
    """Stores of the network."""
    transitions: tuple[int, ...] = (500, 1000, 2000, 4000, 8000)
    """Points of the Gaussian process."""
    repeats: int = 3
    """Each cost is measured so many times."""
    out: Path = Path("docs/figures")
    """``growth.csv`` and ``growth.png`` are written here."""
    figure: bool = field(default=True)
    """The picture is drawn."""


def main(config: Config) -> None:
    """Measure, print a table of slopes and write the table of costs and its picture; what an older table has of other
    verticals stays.

    Raises ``ValueError`` for an unknown vertical.
    """
    if unknown := sorted(set(config.verticals) - set(VERTICALS)):
        raise ValueError(f"verticals: expected some of {', '.join(VERTICALS)}, got {', '.join(unknown)}")
    torch.set_num_threads(1)
    table = config.out / "growth.csv"
    found = _read(table) if table.exists() else {}
    print("| size of | unit | smallest, us | largest, us | slope |\n|---|---|---:|---:|---:|")
    for name in config.verticals:
        unit, prepare = VERTICALS[name]
        sizes = getattr(config, "tokens" if name == "generated" else name)
        found[name] = {size: _cost(*prepare(size), config.repeats) for size in sizes}
        costs = found[name]
        ends = " | ".join(f"{costs[n]:,.2f} ({n:,})" for n in (sizes[0], sizes[-1]))
        print(f"| {name} | {unit} | {ends} | {slope(costs):.2f} |", flush=True)
    config.out.mkdir(parents=True, exist_ok=True)
    found = {name: found[name] for name in VERTICALS if name in found}
    with table.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for name, costs in found.items():
            writer.writerows([name, VERTICALS[name][0], size, f"{cost:.4f}"] for size, cost in costs.items())
    if config.figure:
        _draw(found, config.out / "growth.png")


def _read(table: Path) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    with table.open(newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["vertical"], {})[int(row["size"])] = float(row["microseconds_per_unit"])
    return found


def slope(costs: dict[int, float]) -> float:
    """Of the logarithm of cost by that of size; 0 of a single size."""
    x, y = ([math.log(v) for v in column] for column in (costs.keys(), costs.values()))
    mx, my = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mx) ** 2 for a in x)
    return sum((a - mx) * (b - my) for a, b in zip(x, y)) / spread if spread else 0.0


def _cost(run: Callable[[], object], units: int, repeats: int) -> float:
    """Microseconds of processor time per unit, after one call that is not measured."""
    run()
    best = math.inf
    for _ in range(repeats):
        start = time.process_time()
        run()
        best = min(best, time.process_time() - start)
    return best / units * 1e6


# -- what is measured: a call, and how many units it is ---------------------------------------------------------------


def _copies(n: int) -> tuple[Callable[[], object], int]:
    env = resolve_env("HalfCheetah-v5", n, nthread=1)
    policy = MLPPolicy(env.single_observation_space, env.single_action_space)
    collector, request = Collector(env), Request(steps=max(8, 4096 // n))
    assert request.steps is not None
    return (lambda: collector.collect(request, policy)), request.steps * n


def _ring(n: int) -> tuple[Callable[[], object], int]:
    generator = torch.Generator().manual_seed(0)
    # HalfCheetah's: 17 numbers of observation, 6 of action
    wide = {name: torch.randn(n, 17, generator=generator) for name in ("obs", "next_obs")}
    narrow = {"action": torch.randn(n, 6, generator=generator), "reward": torch.zeros(n)}
    flags = {name: torch.zeros(n, dtype=torch.bool) for name in ("terminated", "truncated")}
    ring, spec = ReplayBuffer.from_arrays(wide | narrow | flags), Batching(size=256)

    def draw() -> None:
        for _ in range(200):
            ring.sample(spec, generator)

    return draw, 200 * 256


def _model() -> Any:
    from ccrl.llm.models import tiny_model
    from ccrl.llm.policy import CausalLMPolicy

    require("transformers", "llm")
    torch.manual_seed(0)
    return CausalLMPolicy(tiny_model(256, layers=2, width=64))


def _tokens(n: int) -> tuple[Callable[[], object], int]:
    policy, count = _model(), max(1, 4096 // n)
    tokens = torch.randint(256, (n, count))
    ones = torch.ones(n, count)
    columns = {"action": tokens, "present": ones, "valid": ones, "prompt": tokens[:1].t().contiguous()}
    columns["prompt_valid"] = torch.ones(count, 1)
    batch = Data(columns, sequence=frozenset({"prompt", "prompt_valid"}))
    return (lambda: policy(batch, frozenset({"log_prob"}))["log_prob"].mean().backward()), n * count


def _generated(n: int) -> tuple[Callable[[], object], int]:
    from scripts.bench import llm

    width = 8
    ours = llm.Ours(llm.Config(vocab=256, width=64, layers=2, length=n, n_prompts=1, group_size=width))
    return ours.generate, n * width


def _stores(n: int) -> tuple[Callable[[], object], int]:
    settings = HDPOConfig(n_train=64, batch_size=64, n_dev=2, dev_every=10**6, hidden=(64, 64))
    agent = HDPO("ccrl/InventoryOneWarehouseLost-v0", settings, seed=0, env_kwargs={"stores": n})
    units = agent.samples_per_iteration * n
    return (lambda: agent.learn(agent.samples_per_iteration)), units


def _transitions(n: int) -> tuple[Callable[[], object], int]:
    torch.manual_seed(0)
    deep = DeepKernel(17)
    x, targets = torch.randn(n, 17, dtype=torch.float64), torch.randn(n, dtype=torch.float64)
    right, _ = torch.linalg.qr(torch.randn(n, 25, dtype=torch.float64))

    def nothing(v: Tensor) -> Tensor:
        return v

    @torch.no_grad()
    def solve() -> None:
        gram = StateGram(deep.kernel, deep.features(x))
        system = GradientSystem(nothing, nothing, gram, right, c1=1.0, c2=5e-5, noise=0.05, solver="auto")
        system.weights(targets)

    return solve, n


Prepare = Callable[[int], tuple[Callable[[], object], int]]
VERTICALS: dict[str, tuple[str, Prepare]] = {
    "copies": ("environment step", _copies),
    "ring": ("row drawn", _ring),
    "tokens": ("token trained on", _tokens),
    "generated": ("token generated", _generated),
    "stores": ("period of a store", _stores),
    "transitions": ("transition", _transitions),
}
"""What has the size -> the unit, and what makes a call of so many units."""


def _draw(found: dict[str, dict[int, float]], path: Path) -> None:
    from matplotlib import pyplot, ticker  # late: only where a figure is asked for

    figure, axes = pyplot.subplots(3, 2, figsize=(6, 7), squeeze=False)
    for axis, (name, costs) in zip(axes.flat, found.items()):
        axis.loglog(list(costs), list(costs.values()), "o-")
        axis.set_title(f"{name}: slope {slope(costs):.2f}", fontsize=10)
        axis.set_xlabel(f"{'tokens' if name == 'generated' else name}")
        axis.set_ylabel(f"us per {VERTICALS[name][0]}")
        axis.grid(True, alpha=0.3)
        for one in (axis.xaxis, axis.yaxis):  # two sizes may be less than a decade apart
            one.set_major_locator(ticker.LogLocator(subs=(1.0,) if one is axis.xaxis else (1.0, 2.0, 5.0)))
            one.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:,g}"))
            one.set_minor_formatter(ticker.NullFormatter())
        low, high = min(costs.values()), max(costs.values())
        axis.set_ylim(low / 2, max(high * 2, low * 4))  # a flat line looks flat
    for axis in axes.flat[len(found) :]:
        axis.set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
