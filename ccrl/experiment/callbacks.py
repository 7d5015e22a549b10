"""What happens between iterations: checkpoints, evaluation, early ends, and any function of the user's."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ccrl.batched_env import BatchedEnv
from ccrl.experiment import checkpoint
from ccrl.experiment.evaluation import EvalLog, evaluate_agent
from ccrl.experiment.logger import Logger

__all__ = [
    "Callback",
    "CheckpointCallback",
    "EvalCallback",
    "FunctionCallback",
    "LogCallback",
    "StopOnReward",
    "StopOnSignal",
    "as_callback",
]


class Callback:
    """Base class: three hooks around training, called in the order of the list.

    A callback with state (a best score, the next step it is due) saves it with the agent under ``key``.
    """

    @property
    def key(self) -> str:
        """Name of its state in a checkpoint; two callbacks of one class in a list need different ones."""
        return type(self).__name__

    def on_training_start(self, agent: Any) -> None: ...

    def on_iteration(self, agent: Any) -> bool | None:
        """After every iteration; False ends training (after the other callbacks had their turn)."""

    def on_training_end(self, agent: Any) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class FunctionCallback(Callback):
    """``fn(agent) -> bool | None`` after every iteration."""

    def __init__(self, fn: Callable[[Any], bool | None]) -> None:
        if not callable(fn):
            raise TypeError(f"callback: expected a Callback or a function of the agent, got {type(fn).__name__}")
        self.fn = fn

    def on_iteration(self, agent: Any) -> bool | None:
        return self.fn(agent)


class LogCallback(Callback):
    """Writes the agent's scalars every ``every`` iterations."""

    def __init__(self, logger: Logger, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"LogCallback: expected every >= 1 iterations, got {every}")
        self.logger, self.every = logger, every

    def on_iteration(self, agent: Any) -> bool | None:
        if agent.iteration % self.every == 0:
            self.logger.log(agent.num_timesteps, agent.scalars)
        return None


class _Periodic(Callback):
    """Due when the clock passes the next multiple of ``every`` steps."""

    def __init__(self, every: int) -> None:
        if every < 1:
            raise ValueError(f"{type(self).__name__}: expected every >= 1 environment steps, got {every}")
        self.every, self.next = every, every

    def due(self, steps: int) -> bool:
        if steps < self.next:
            return False
        self.next = (steps // self.every + 1) * self.every
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next = state["next"]


class CheckpointCallback(_Periodic):
    """Saves ``folder/step_*.pt`` every ``every`` environment steps and at the end, keeping the newest ``keep``; also
    before the first iteration, if the agent has learnt by then (``warm_started``).

    Put it last in the list: what it saves includes the state of the callbacks before it.
    """

    def __init__(self, folder: str | Path, every: int, keep: int = 3) -> None:
        super().__init__(every)
        if keep < 1:
            raise ValueError(f"CheckpointCallback: expected keep >= 1 checkpoints, got {keep}")
        self.folder, self.keep, self._saved_at = Path(folder), keep, -1

    def on_training_start(self, agent: Any) -> None:
        # a run killed before its first checkpoint would repeat the supervised phase
        if getattr(agent, "warm_started", False):
            self._save(agent)

    def on_iteration(self, agent: Any) -> bool | None:
        if self.due(agent.num_timesteps):
            self._save(agent)
        return None

    def on_training_end(self, agent: Any) -> None:
        # an update that broke off half-way is not a state to resume from
        if agent.num_timesteps > self._saved_at and agent.healthy:
            self._save(agent)

    def _save(self, agent: Any) -> None:
        path = checkpoint.checkpoint_path(self.folder, agent.num_timesteps)
        agent.save(path)
        self._saved_at, agent.last_checkpoint = agent.num_timesteps, path
        checkpoint.prune(self.folder, self.keep)


class EvalCallback(_Periodic):
    """Evaluates on a separate environment every ``every`` steps: deterministic and stochastic, raw rewards, frozen
    normaliser, fixed seeds. Writes ``eval.csv`` and ``evaluations.npz``; the best deterministic mean is saved as
    ``best.pt``.
    """

    def __init__(
        self, env: BatchedEnv, folder: str | Path, every: int, episodes: int = 10, seed: int = 10_000,
        logger: Logger | None = None, resume_step: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(every)
        self.env, self.folder, self.episodes, self.seed, self.logger = env, Path(folder), episodes, seed, logger
        self.log = EvalLog(folder, resume_step)
        self.best = float("-inf")
        self.seconds = 0.0
        """Wall time spent evaluating, to be left out of speed figures."""
        self.cpu_seconds = 0.0
        """The same in seconds of this process on all its cores."""
        self._ended = False

    def on_training_start(self, agent: Any) -> None:
        if self._ended:  # a second call of learn() with this callback adds to the file of the first
            self.log, self._ended = EvalLog(self.folder), False

    def on_iteration(self, agent: Any) -> bool | None:
        if self.due(agent.num_timesteps):
            start, cpu_start = time.perf_counter(), time.process_time()
            results = [evaluate_agent(agent, self.env, self.episodes, self.seed, d) for d in (True, False)]
            scalars = self.log.log(agent.num_timesteps, *results)
            if self.logger is not None:
                self.logger.log(agent.num_timesteps, scalars)
            if scalars["eval/mean_reward"] > self.best:
                self.best = scalars["eval/mean_reward"]
                agent.save(self.folder / "best.pt")
            self.seconds += time.perf_counter() - start
            self.cpu_seconds += time.process_time() - cpu_start
        return None

    def on_training_end(self, agent: Any) -> None:
        self.log.close()
        self._ended = True

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.best = state["best"]


class StopOnSignal(Callback):
    """Ctrl-C (SIGINT) and SIGTERM end training after the iteration that runs, whose state can be saved; half an
    iteration's cannot. The second signal acts at once. Put it last in the list, behind the one that saves."""

    def __init__(self) -> None:
        self.received: str | None = None
        """Name of the signal that ended training."""
        self._before: dict[int, Any] = {}

    def on_training_start(self, agent: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # elsewhere Python takes no handlers
        for number in (signal.SIGINT, signal.SIGTERM):
            # a job in the background ignores SIGINT, so that Ctrl-C at its terminal does not reach it
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._stop)

    def on_iteration(self, agent: Any) -> bool | None:
        return False if self.received else None

    def on_training_end(self, agent: Any) -> None:
        self._restore()

    def _stop(self, number: int, frame: Any) -> None:
        self.received = signal.Signals(number).name
        self._restore()
        # not print: the signal may have come in the middle of one, which refuses a second
        os.write(2, f"\n[ccrl] {self.received}: ends after this iteration; once more ends it at once\n".encode())

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was not Python's


class StopOnReward(Callback):
    """Ends training when the mean raw return of the last 100 training episodes reaches ``threshold``."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def on_iteration(self, agent: Any) -> bool | None:
        mean = agent.ep_rew_mean
        return None if mean is None or mean < self.threshold else False


def as_callback(
    callback: Callback | Callable[[Any], bool | None] | Sequence[Callback | Callable[[Any], bool | None]] | None,
) -> list[Callback]:
    """A list of callbacks from one, several, functions or None.

    :raises TypeError: something that is neither a callback nor a function.
    :raises ValueError: two with state under one key.
    """
    if callback is None:
        return []
    if isinstance(callback, Callback):
        return [callback]
    if not isinstance(callback, Sequence):
        return [FunctionCallback(callback)]
    found = [c if isinstance(c, Callback) else FunctionCallback(c) for c in callback]
    keys = [c.key for c in found]
    twice = sorted({k for k in keys if keys.count(k) > 1 and found[keys.index(k)].state_dict()})
    if twice:
        raise ValueError(f"callbacks: {twice} occur twice and would overwrite each other's state; override their key")
    return found
