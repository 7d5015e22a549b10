"""A training's processes (``torchrun``): the first one writes the run folder, the others train along.

    torchrun --nproc-per-node 2 scripts/train.py ppo --env HalfCheetah-v5 --num-envs 8

Each keeps its own checkpoints (``RUN/processes/1`` and so on), so that a run goes on bit for bit with as many
processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ccrl.experiment import checkpoint
from ccrl.experiment.callbacks import CheckpointCallback, StopOnSignal
from ccrl.experiment.config import ConfigError
from ccrl.experiment.run import RunFolder
from ccrl.learn.parallel import Processes, distribute

__all__ = ["Group", "check_number"]


@dataclass(frozen=True)
class Group:
    """This process as one of several."""

    processes: Processes

    @classmethod
    def join(cls, config: Any) -> Group | None:
        """None where there is only one."""
        return Group(Processes(_own_device(config.device))) if Processes.started() > 1 else None

    @property
    def lead(self) -> bool:
        """Whether this one writes."""
        return self.processes.rank == 0

    def own(self, config: Any) -> Any:
        """The configuration of this process: its seed and, of several GPUs, its own."""
        return replace(config, seed=self.processes.seed(config.seed), device=_own_device(config.device))

    def folder(self, run: RunFolder) -> Path:
        """Of this process's checkpoints."""
        return run.checkpoints if self.lead else run.path / "processes" / str(self.processes.rank)

    def open(self, run: RunFolder | None) -> RunFolder:
        """The folder that the first process has made."""
        path = self.processes.same_text(None if run is None else str(run.path))
        if run is not None:
            run.record(processes=self.processes.size)
            return run
        return RunFolder.open(path)

    def checkpoint(self, run: RunFolder) -> Path | None:
        """The one to go on from: of the first process's newest step of which all have one. Newer ones of this process,
        which a kill between two processes' savings leaves, are deleted: they would pass for a training further on.

        :raises FileNotFoundError: this process has none of that step.
        """
        name = self.processes.same_text(self._newest(run) if self.lead else None)
        if name == "none":
            return None
        path = self.folder(run) / name
        if not path.is_file():
            raise FileNotFoundError(f"process {self.processes.rank}: expected its checkpoint {path}, found none")
        for other in path.parent.glob("step_*.pt"):
            if other.name > name:  # names sort by step
                other.unlink(missing_ok=True)
        return path

    def _newest(self, run: RunFolder) -> str:
        """Of the steps that all have the newest, as the name of its file; if there is none, the first process's."""
        newest = checkpoint.latest(run.checkpoints)
        if newest is None:
            return "none"
        ranks = range(1, self.processes.size)
        others = [{path.name for path in (run.path / "processes" / str(k)).glob("step_*.pt")} for k in ranks]
        mine = {path.name for path in run.checkpoints.glob("step_*.pt") if path.name <= newest.name}
        return max(mine.intersection(*others), default=newest.name)

    def enter(self, agent: Any, restored: bool) -> None:
        """Let the agent train with the others."""
        distribute(agent.learner, self.processes, share=not restored)

    def follow(self, config: Any, run: RunFolder, agent: Any) -> Callable[[], RunFolder]:
        """The training of a process that is not the first."""

        def train() -> RunFolder:
            callbacks = [CheckpointCallback(self.folder(run), config.checkpoint_every, config.keep_checkpoints),
                         StopOnSignal()]  # fmt: skip
            try:
                agent.learn(callback=callbacks, until=config.total_timesteps)
            finally:
                agent.close()
            self.processes.close()
            return run

        return train


def check_number(run: RunFolder) -> None:
    """:raises ConfigError: a run goes on with as many processes as it began with."""
    began, here = run.info.get("processes", 1), Processes.started()
    if began != here:
        how = f"torchrun --nproc-per-node {began} scripts/train.py" if began > 1 else "python scripts/train.py"
        raise ConfigError(
            f"{run.path}: expected {began} processes, as the run began with, got {here}; go on with {how} --resume "
            f"{run.path}"
        )


def _own_device(device: str) -> str:
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device.startswith("cuda") else device
