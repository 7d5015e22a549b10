"""A trained inventory policy as a planner sees it: the network with its flows, the stock of every node over time.

python scripts/inventory_network.py runs/ccrl-InventorySerial-v0__hdpo__0__... --out figures/serial
python scripts/inventory_network.py RUN --out figures/december --split test --scenario 3 --periods 37
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import tyro
from torch import Tensor

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

from agents.hdpo import HDPO
from ccrl.experiment import checkpoint, plots
from ccrl.inventory.functional_env import Split, State
from ccrl.inventory.pathwise import Unrolled
from ccrl.settings import Count, Natural, Settings
from envs.inventory import InventoryEnv, Trace, simulate
from envs.inventory.plot import plot_network

__all__ = ["NetworkConfig", "main", "play"]


@dataclass(frozen=True)
class NetworkConfig(Settings):
    """What to draw."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder of hdpo (its newest checkpoint), or a checkpoint; what acts is the best parameters in it."""
    out: Path
    """The names of the PNG and the SVG begin with this path."""
    split: Split = "test"
    """Horizon and weeks are those of this split."""
    count: Count = 32
    """Numbers are means of this many scenarios, of recorded demand the first series."""
    scenario: Natural = 0
    """The right half shows this one of them."""
    periods: Count = 60
    """It shows so many of the last periods."""
    seed: Natural = 65
    """This number decides demand and initial stock; training has other seeds."""
    title: str | None = None
    """The figure has this title; None: task, policy and epochs."""
    trust: tuple[str, ...] = ()
    """The run's files may import these names, module:name; all others that are not registered are refused."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.scenario < self.count:
            raise ValueError(f"scenario: expected one of 0 to count - 1 = {self.count - 1}, got {self.scenario}")


def main(config: NetworkConfig) -> list[Path]:
    """Play the policy and draw it; returns the files."""
    torch.set_num_threads(1)
    path = checkpoint.latest(config.run / "checkpoints") if config.run.is_dir() else config.run
    if path is None or not path.is_file():
        raise FileNotFoundError(f"{config.run}: expected a run folder of hdpo with a checkpoint, or a checkpoint")
    agent = HDPO.load(path, trust=config.trust)
    env = agent.simulator.split(config.split)
    if not isinstance(env, InventoryEnv):
        raise ValueError(f"{config.run}: expected an inventory network of ours, got {type(env).__name__}")
    count = min(config.count, env.available or config.count)
    if config.scenario >= count:
        raise ValueError(f"scenario: expected one of the {count} series, from 0, got {config.scenario}")
    trace = play(agent, env, agent.scenarios(config.split, count, 10**6 + config.seed))
    name = env.task.name.replace("_", " ")
    title = config.title or f"{name}: {agent.config.policy}, best of {agent.iteration} epochs"
    figure = plot_network(env, trace, scenario=config.scenario, periods=config.periods, title=title)
    return plots.save(figure, config.out)


def play(agent: HDPO, env: InventoryEnv, scenarios: State) -> Trace:
    """The best parameters in these scenarios, with what an oracle foresees and whole units where the agent has them."""
    unrolled = Unrolled(env, agent.ctx.bank.policy("best"))
    demand, clock = env.noise(scenarios), itertools.count()

    def order(seen: State) -> Tensor:
        future = unrolled.future(demand, next(clock))
        wanted: Tensor = unrolled.policy(seen if future is None else seen | {"future_demand": future})
        return wanted.round() if agent.config.whole_units else wanted

    return simulate(env, order, scenarios)


if __name__ == "__main__":
    try:
        files = main(tyro.cli(NetworkConfig, description=__doc__))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    print("\n".join(map(str, files)))
