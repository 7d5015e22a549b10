"""Make data sets for offline agents, from our own agents and controllers, on this machine.

python scripts/make_dataset.py maze --maze u_maze --steps 100000 --out data/u_maze.npz
python scripts/make_dataset.py maze --maze medium --steps 1000000 --out minari:mine/pointmaze-medium-v0
python scripts/make_dataset.py og-bench --env pointmaze-medium-navigate-v0 --out data/og.npz   # extra ogbench
python scripts/make_dataset.py corridor --out data/corridor.npz
python scripts/make_dataset.py pendulum --gain 0.3 --noise 0.5 --steps 10000 --out data/pendulum.npz
python scripts/make_dataset.py agent --env Hopper-v5 --steps 100000 --out data/hopper-random.npz            # random
python scripts/make_dataset.py agent --checkpoint runs/.../best.pt --steps 100000 --out data/hopper-expert.npz
python scripts/make_dataset.py replay --checkpoint runs/.../checkpoints/step_100000.pt --out data/hopper-replay.npz

Files are ``.npz`` (``ccrl.offline.load_npz``) or, with ``minari:ID``, data sets that Minari opens (extra ``offline``).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gymnasium
import numpy as np
import torch
import tyro
from torch import Tensor

from ccrl.packages import check_siblings, require

check_siblings("agents", "envs")

import agents
import envs
from ccrl import registry
from ccrl.experiment import checkpoint
from ccrl.experiment.logger import digits
from ccrl.offline import Dataset, from_arrays, make_ogbench, navigate_ogbench, write_minari
from ccrl.seeding import named_generator, stream_seed
from ccrl.settings import Count, Finite, Natural, Nonnegative, Settings
from envs.maze import HazardCorridor, PointMaze, Tour, Waypoints, cautious_action
from scripts.episodes import collect, mean_return, uniform

__all__ = ["Agent", "Corridor", "Maze", "OGBench", "Pendulum", "Replay", "collect", "main", "uniform", "write"]

LQR_GAIN = (1.8125, 9.9361, 1.8642, 1.7557)
"""Of InvertedPendulum-v5: the discrete regulator on finite differences, Q = diag(1, 1, .1, .1), R = .1."""


@dataclass(frozen=True)
class Common(Settings):
    """What every command has."""

    out: str = "data/dataset.npz"
    """The data set is written to this .npz file, or as minari:ID under Minari's root."""
    seed: Natural = 0
    """Environments and noise have this seed; evaluation uses others."""
    trust: tuple[str, ...] = ()
    """The checkpoint may import these names, module:name; all others that are not registered are refused."""


@dataclass(frozen=True)
class Maze(Common):
    """A controller that walks to random targets in one endless run, after D4RL's recipe: a time-out at each new target,
    rewards for the fixed goal."""

    maze: Literal["u_maze", "medium", "large"] = "u_maze"
    """The maze has this map."""
    dense: bool = False
    """The reward is exp(-distance); else 1 within 0.5 of the goal."""
    steps: Count = 100_000
    """So many transitions are written (rounded down to a multiple of num_envs)."""
    num_envs: Count = 50
    """So many points walk side by side."""
    noise: Nonnegative = 0.5
    """The controller's actions get normal noise of this standard deviation."""
    controller: Literal["cells", "tour"] = "cells"
    """The controller steers at the next cell's place from each cell, and a target is reached within 0.5 (cells), or
    passes shifted places one by one, and a target is reached within 0.1, as in D4RL (tour)."""
    reference: Count = 100
    """The scores of reference, of random actions and of the controller, are means of this many episodes."""

    def make(self) -> Dataset:
        env = PointMaze(self.num_envs, maze=self.maze, dense=self.dense)
        generator = named_generator(self.seed, "data set: controller")
        limit, walk, near = env.max_episode_steps, self._walk(env), 0.5 if self.controller == "cells" else Tour.NEAR
        assert limit is not None
        state = env.initial(generator, self.num_envs)
        target, age = self._targets(env, generator), torch.zeros(self.num_envs, dtype=torch.int64)
        rows: list[tuple[Tensor, ...]] = []
        for _ in range(max(1, self.steps // self.num_envs)):
            noise = self.noise * torch.randn((self.num_envs, 2), generator=generator)
            action = (walk(state, target) + noise).clamp(-1.0, 1.0)
            following, reward, _ = env.transition(state, action, None)
            age = age + 1
            new = (torch.linalg.vector_norm(following[:, :2] - target, dim=-1) <= near) | (age >= limit)
            rows.append((state, action, reward, following, torch.zeros_like(new), new))
            target = torch.where(new.unsqueeze(-1), self._targets(env, generator), target)
            age, state = age * ~new, following
        return _joined(rows, self.out, self._scores())

    def _targets(self, env: PointMaze, generator: torch.Generator) -> Tensor:
        cell = torch.randint(len(env.free), (self.num_envs,), generator=generator)
        return env.free[cell].float()

    def _walk(self, env: PointMaze) -> Waypoints | Tour:
        if self.controller == "cells":
            return Waypoints(env)
        return Tour(env, named_generator(self.seed, "data set: waypoints"))

    def _scores(self) -> tuple[float, float]:
        env = PointMaze(self.reference, maze=self.maze, dense=self.dense)
        walk = self._walk(env)
        goal = env.goal.expand(self.reference, 2)
        return mean_return(env, uniform(env, self.seed), self.seed), mean_return(
            env, lambda o: walk(o, goal), self.seed
        )


@dataclass(frozen=True)
class OGBench(Common):
    """A point maze of OGBench by its recipe navigate: random goals, noisy steps along the shortest way, no expert."""

    env: str = "pointmaze-medium-navigate-v0"
    """The maze has this name there."""
    steps: Count = 1_000_000
    """At least so many transitions are written, in trajectories of 1,000."""
    noise: Nonnegative = 0.5
    """Actions get normal noise of this standard deviation."""
    task: Count = 1
    """Rewards are those of this task: -1, and 0 at its goal, which ends an episode."""

    def make(self) -> Dataset:
        env = make_ogbench(self.env)
        return navigate_ogbench(env, self.steps, noise=self.noise, task=self.task, seed=self.seed, name=self.out)


@dataclass(frozen=True)
class Corridor(Common):
    """Half speed through the middle of the hazard corridor, with noise."""

    episodes: Count = 300
    """So many episodes of 100 steps are written."""
    noise: Nonnegative = 0.3
    """Actions get normal noise of this standard deviation."""

    def make(self) -> Dataset:
        env, generator = HazardCorridor(self.episodes), named_generator(self.seed, "data set: controller")

        def act(obs: Tensor) -> Tensor:
            noise = self.noise * torch.randn((len(obs), 2), generator=generator)
            return (cautious_action(obs) + noise).clamp(-1.0, 1.0)

        return collect(env, act, 100 * self.episodes, self.seed, self.out)


@dataclass(frozen=True)
class Pendulum(Common):
    """InvertedPendulum-v5 by its linear regulator, scaled down and with noise: tiers without training."""

    gain: Finite = 0.3
    """The regulator's gain is multiplied by this number; 1 balances."""
    noise: Nonnegative = 0.5
    """Actions get normal noise of this standard deviation."""
    steps: Count = 10_000
    """At least so many transitions are written, in whole episodes."""
    num_envs: Count = 10
    """So many pendulums swing side by side."""

    def make(self) -> Dataset:
        env, generator = (
            envs.make("InvertedPendulum-v5", self.num_envs),
            named_generator(self.seed, "data set: controller"),
        )
        gain = self.gain * torch.tensor(LQR_GAIN)

        def act(obs: Tensor) -> Tensor:
            noise = self.noise * torch.randn((len(obs), 1), generator=generator)
            return (obs @ gain).unsqueeze(-1).add(noise).clamp(-3.0, 3.0)

        return collect(env, act, self.steps, self.seed, self.out)


@dataclass(frozen=True)
class Agent(Common):
    """Episodes of a trained agent, or of random actions."""

    checkpoint: Path | None = None
    """The agent of this checkpoint acts; unset, uniform random actions do."""
    env: str | None = None
    """The environment is this id; unset, that of the checkpoint."""
    steps: Count = 100_000
    """At least so many transitions are written, in whole episodes."""
    num_envs: Count = 10
    """So many environments run side by side."""
    deterministic: bool = False
    """The agent's mode acts; else its actions are drawn, as in D4RL."""

    def make(self) -> Dataset:
        if self.checkpoint is None:
            if self.env is None:
                raise ValueError("expected env or checkpoint, got neither")
            env = envs.make(self.env, self.num_envs)
            return collect(env, uniform(env, self.seed), self.steps, self.seed, self.out)
        agent = _load(self.checkpoint, self.trust)
        with registry.stored(str(self.checkpoint), [*self.trust, *([self.env] if self.env else [])]):
            env = envs.make(self.env or agent.env_id, self.num_envs, **agent.env_kwargs)
        torch.manual_seed(stream_seed(self.seed, "data set: actions"))
        acting = agent.acting()
        restart = getattr(acting, "restart", None)
        return collect(env, lambda o: acting(o, self.deterministic), self.steps, self.seed, self.out, restart)


@dataclass(frozen=True)
class Replay(Common):
    """The whole replay memory of an off-policy agent's checkpoint, each environment's oldest rows first: the tier
    medium-replay."""

    checkpoint: Path = Path("checkpoint.pt")
    """The memory is in this checkpoint."""

    def make(self) -> Dataset:
        agent = _load(self.checkpoint, self.trust)
        ring = getattr(agent.learner, "ring", None)
        if ring is None:
            raise ValueError(f"{self.checkpoint}: expected an agent with a replay memory, got {agent.name}")
        if not len(ring):
            raise ValueError(f"{self.checkpoint}: expected rows in the memory, got none; best.pt has no memory, the "
                             "files of checkpoints/ have")  # fmt: skip
        if isinstance(agent.env.single_observation_space, gymnasium.spaces.Dict):
            raise ValueError(f"{self.checkpoint}: expected observations of one array, got "
                             f"{agent.env.single_observation_space}")  # fmt: skip
        rows = ring.rows()
        found = {k: rows[k] for k in ("obs", "next_obs", "reward", "terminated", "truncated")}
        with torch.no_grad():
            action = agent.policy.to_env(rows["action"])
        # rows of several environments take turns in the memory: here one after another, each in its own time
        order = np.argsort(np.arange(len(ring)) % agent.config.num_envs, kind="stable")
        columns = {k: v.cpu().numpy()[order] for k, v in (found | {"action": action}).items()}
        # where the next row is another episode's, one ends in the file
        same = columns["next_obs"][:-1] == columns["obs"][1:]
        goes_on = same.reshape(len(same), -1).all(-1)
        ended = columns["terminated"] | columns["truncated"]
        episode = np.cumsum(np.r_[False, ended[:-1] | ~goes_on])
        return from_arrays(columns | {"episode": episode}, self.out)


Command = Maze | OGBench | Corridor | Pendulum | Agent | Replay


def write(data: Dataset, out: str, env_id: str | None) -> str:
    """Write ``data`` to an ``.npz`` file or as ``minari:ID`` (which needs the environment's id)."""
    if not out.startswith("minari:"):
        path = Path(out if out.endswith(".npz") else f"{out}.npz")  # not with_suffix: gain0.3 would lose its number
        path.parent.mkdir(parents=True, exist_ok=True)
        columns: dict[str, Any] = data.columns()
        np.savez_compressed(path, **columns)
        return str(path)
    _check_minari(out, env_id)
    ends = np.r_[data.starts[1:], len(data)]
    episodes = []
    for start, end in zip(data.starts, ends):
        rows = slice(start, end)
        truncated = data.truncated[rows].copy()
        truncated[-1] |= not data.terminated[end - 1]  # the end of the recording
        episodes.append({
            "obs": np.concatenate([data.obs[rows], data.next_obs[end - 1 : end]]), "action": data.action[rows],
            "reward": data.reward[rows], "terminated": data.terminated[rows], "truncated": truncated,
        })  # fmt: skip
    write_minari(
        out.removeprefix("minari:"), episodes, gymnasium.make(str(env_id)), scores=data.scores,
        algorithm_name="scripts/make_dataset.py", description=f"{len(data)} transitions made by ccrl",
    )  # fmt: skip
    return out


def _check_minari(out: str, env_id: str | None) -> None:
    if env_id is None or ":" in env_id:
        raise ValueError(f"out: expected a file, got {out}; Minari stores an environment by Gymnasium's id, and here "
                         f"is {env_id or 'none'}")  # fmt: skip
    folder = require("minari.storage", "offline").get_dataset_path(out.removeprefix("minari:"))
    if folder.exists():
        raise ValueError(f"out: expected a new name, got {out}, which Minari has ({folder}); choose another one")


def main(config: Command) -> Dataset:
    """Make and write; print what was made.

    :raises ValueError: what cannot be made, or a name under which Minari cannot keep it: before anything is made.
    """
    if config.out.startswith("minari:"):
        _check_minari(config.out, _environment(config))
    data = config.make()
    where = write(data, config.out, _environment(config))
    returns = data.returns()
    scores = "none" if data.scores is None else " and ".join(map(digits, data.scores))
    print(
        f"[ccrl] {where}: {len(data):,} transitions, {len(returns)} episodes, mean return {digits(returns.mean())}, "
        f"{int(data.terminated.sum())} terminals, {int(data.truncated.sum())} time-outs, reference scores {scores}"
    )
    return data


def _joined(rows: list[tuple[Tensor, ...]], name: str, scores: tuple[float, float]) -> Dataset:
    """Copies one after another, each in its own time."""
    names = ("obs", "action", "reward", "next_obs", "terminated", "truncated")
    columns = {k: torch.stack(part, 1).flatten(0, 1).numpy() for k, part in zip(names, zip(*rows))}
    steps, copies = len(rows), len(rows[0][0])
    ended = columns["truncated"].reshape(copies, steps).copy()
    ended[:, -1] = True
    return from_arrays(columns | {"episode": np.cumsum(np.r_[False, ended.reshape(-1)[:-1]])}, name, scores)


def _load(path: Path, trust: Sequence[str]) -> Any:
    with registry.stored(str(path), trust):
        return agents.get_agent(checkpoint.load(path)["agent"]).load(path, trust=trust)


def _environment(config: Command) -> str | None:
    if isinstance(config, Maze):
        return "ccrl/PointMaze" + {"u_maze": "U", "medium": "Medium", "large": "Large"}[config.maze] + "-v0"
    if isinstance(config, Corridor):
        return "ccrl/HazardCorridor-v0"
    if isinstance(config, OGBench):
        return None
    if isinstance(config, Pendulum):
        return "InvertedPendulum-v5"
    if isinstance(config, Agent) and config.env is not None:
        return config.env
    found: str | None = None if config.checkpoint is None else checkpoint.load(config.checkpoint)["env"]
    return found


if __name__ == "__main__":
    try:
        main(tyro.cli(Command, description=__doc__))  # type: ignore[arg-type]
    except (ValueError, OSError, ImportError, checkpoint.CheckpointError) as failure:
        sys.exit(f"error: {failure}")
