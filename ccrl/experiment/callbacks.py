"""What happens between iterations: checkpoints, evaluation, early ends, and any function of the user's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ccrl.batched_env import BatchedEnv
from ccrl.experiment import checkpoint
from ccrl.experiment.evaluation import EvalLog, evaluate_agent
from ccrl.experiment.files import Owner
from ccrl.experiment.logger import Logger
from ccrl.experiment.saved import prune_segments, save_segmented, save_without_memory
from ccrl.settings import Count, Finite, Natural, checked
from ccrl.signals import DeferredSignals
from ccrl.waiting import waiting

__all__ = [
    "Callback",
    "CheckpointCallback",
    "EvalCallback",
    "FunctionCallback",
    "LogCallback",
    "SamplesCallback",
    "StopOnReward",
    "StopOnSignal",
    "as_callback",
    "running",
]


class Callback:
    """Base class: three hooks around training, called in the order of the list; ``on_training_end`` also after an
    error, of every callback whose ``on_training_start`` was called, whatever the others do.

    A callback with state (a best score, the next step it is due) saves it with the agent under ``key``.
    """

    def __init_subclass__(cls) -> None:
        if others := sorted({"on_step", "_on_step", "on_rollout_end", "_on_rollout_end"} & vars(cls).keys()):
            raise TypeError(f"{cls.__name__}: expected on_training_start, on_iteration or on_training_end, each of the "
                            f"agent, got {others}, which nothing here calls; rename them")  # fmt: skip

    @property
    def key(self) -> str:
        """Name of its state in a checkpoint; two callbacks of one class in a list need different ones."""
        return type(self).__name__

    def on_training_start(self, agent: Any) -> None: ...

    def reads(self, iteration: int) -> bool:
        """Whether it looks at ``agent.scalars`` after this iteration (counted from 1). Statistics that cost a forward
        pass of their own are left out where nobody does, unless it is the last iteration."""
        return True

    def on_iteration(self, agent: Any) -> bool | None:
        """After every iteration; False ends training (after the other callbacks had their turn)."""

    def on_training_end(self, agent: Any) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class FunctionCallback(Callback):
    """``fn(agent) -> bool | None`` after every iteration."""

    def __init__(self, fn: Callable[[Any], bool | None]) -> None:
        if isinstance(fn, type) or not callable(fn):
            got = f"the class {fn.__name__}; make one: {fn.__name__}()" if isinstance(fn, type) else type(fn).__name__
            raise TypeError(f"callback: expected a Callback or a function of the agent, got {got}")
        self.fn = fn

    def on_iteration(self, agent: Any) -> bool | None:
        return self.fn(agent)


class LogCallback(Callback):
    """Writes the agent's scalars every ``every`` iterations."""

    @checked
    def __init__(self, logger: Logger, every: Count = 1) -> None:
        self.logger, self.every = logger, every

    def reads(self, iteration: int) -> bool:
        return iteration % self.every == 0

    def on_iteration(self, agent: Any) -> bool | None:
        if agent.iteration % self.every == 0:
            self.logger.log(agent.num_timesteps, agent.scalars)
        return None


class SamplesCallback(Callback):
    """Writes ``agent.last_completions()`` (prompt, completion, reward) to TensorBoard as ``rollout/samples``, every
    ``every`` iterations and after the first."""

    @checked
    def __init__(self, logger: Logger, every: Count = 10, most: Count = 8) -> None:
        self.logger, self.every, self.most = logger, every, most

    def reads(self, iteration: int) -> bool:
        return False

    def on_iteration(self, agent: Any) -> bool | None:
        if agent.iteration == 1 or agent.iteration % self.every == 0:
            # indented by four: Markdown leaves such a block as it is written
            rows = [f"reward {reward:g}\n\n{_block(prompt)}\n\n{_block(text)}" for prompt, text, reward in
                    agent.last_completions(self.most)]  # fmt: skip
            if rows:
                self.logger.log_text(agent.num_timesteps, "rollout/samples", "\n\n---\n\n".join(rows))
        return None


def _block(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.split("\n"))


class _Periodic(Callback):
    """Due when the clock passes the next multiple of ``every`` steps."""

    @checked
    def __init__(self, every: Count) -> None:
        self.every, self.next = every, every

    def reads(self, iteration: int) -> bool:
        return False

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

    Raises:
        FileExistsError: at the start, if the folder has checkpoints of another run, some past this agent's, or none
            but damaged ones: pruning by step would delete the new ones as they are written.
        FolderInUseError: at the start, if another process writes into the folder.
        FloatingPointError: instead of saving parameters that are not finite.
        WriteError: the disk does not take a checkpoint.
    """

    @checked
    def __init__(self, folder: str | Path, every: Count, keep: Count = 3) -> None:
        super().__init__(every)
        self.folder, self.keep, self._saved_at = Path(folder), keep, -1
        self._owner: Owner | None = None

    def on_training_start(self, agent: Any) -> None:
        self._owner = Owner(self.folder)
        self._check_folder(agent)
        # a run killed before its first checkpoint would repeat the supervised phase
        if getattr(agent, "warm_started", False):
            self._save(agent)

    def on_iteration(self, agent: Any) -> bool | None:
        if self.due(agent.num_timesteps):
            self._save(agent)
        return None

    def on_training_end(self, agent: Any) -> None:
        if self._owner is None:
            return  # it did not start: the folder is another run's
        try:
            # an update that broke off half-way is not a state to resume from
            if agent.num_timesteps > self._saved_at and agent.healthy:
                self._save(agent)
        finally:
            self._release()

    def _check_folder(self, agent: Any) -> None:
        last = getattr(agent, "last_checkpoint", None)
        mine = last is not None and Path(last).resolve().parent == self.folder.resolve()
        try:
            newest = checkpoint.latest(self.folder)
            if newest is None and any(self.folder.glob("step_*.pt")):
                # none would be kept: pruning goes by their steps, and these may be past all that are written
                raise FileExistsError(
                    f"{self.folder}: expected no checkpoints but this run's, got damaged ones; choose another folder, "
                    "or move them away"
                )
            if newest is None or (mine and newest <= checkpoint.checkpoint_path(self.folder, agent.num_timesteps)):
                # past the newest whole one, damaged ones would be kept in place of new ones
                return checkpoint.remove_damaged(self.folder)
        except BaseException:
            self._release()
            raise
        self._release()
        whose = f"some past step {agent.num_timesteps}, where this agent is" if mine else "those of another run"
        raise FileExistsError(
            f"{self.folder}: expected no checkpoints but this run's, got {whose} (up to {newest.name}); choose another "
            f"folder, or load {newest.name} and go on from it"
        )

    def _release(self) -> None:
        if self._owner is not None:
            self._owner.release()
        self._owner = None

    def _save(self, agent: Any) -> None:
        if bad := checkpoint.nonfinite(_parameters(agent)):
            raise FloatingPointError(
                f"parameters are not finite: {', '.join(bad[:3])}{' ...' if len(bad) > 3 else ''}; no checkpoint is "
                "written of them"
            )
        path = checkpoint.checkpoint_path(self.folder, agent.num_timesteps)
        with waiting("checkpoint"):
            save_segmented(agent, path)
        self._saved_at, agent.last_checkpoint = agent.num_timesteps, path
        checkpoint.prune(self.folder, self.keep)
        prune_segments(self.folder)


def _parameters(agent: Any) -> dict[str, Tensor]:
    policy: Any = getattr(agent, "policy", None)
    return dict(policy.named_parameters()) if hasattr(policy, "named_parameters") else {}


class EvalCallback(_Periodic):
    """Evaluates on a separate environment every ``every`` steps: deterministic and stochastic, raw rewards, frozen
    normaliser, fixed seeds. Writes ``eval.csv`` and ``evaluations.npz``; the best deterministic mean is saved as
    ``best.pt``, without the rows of a replay memory (training that goes on from it fills one first; ``checkpoints/``
    goes on bit for bit).

    Raises:
        ValueError: at the start, for the environment that the agent trains on: an evaluation would reset it under the
            rollout that goes on.
        FileExistsError: ``eval.csv`` has rows and ``resume_step`` is None.
    """

    @checked
    def __init__(
        self, env: BatchedEnv, folder: str | Path, every: Count, episodes: Count = 10, seed: Natural = 10_000,
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
        if self.env is not None and _inside(self.env) & _inside(getattr(agent, "env", None)):
            raise ValueError(
                "EvalCallback: expected an environment of its own, got the one that the agent trains on, which an "
                "evaluation would reset in the middle of a rollout; make a second one"
            )
        if self._ended:  # a second call of learn() with this callback adds to the file of the first
            self.log, self._ended = EvalLog(self.folder, agent.num_timesteps), False

    def on_iteration(self, agent: Any) -> bool | None:
        if self.due(agent.num_timesteps):
            start, cpu_start = time.perf_counter(), time.process_time()
            with waiting("evaluation"):
                results = [evaluate_agent(agent, self.env, self.episodes, self.seed, d) for d in (True, False)]
            scalars = self.log.log(agent.num_timesteps, *results)
            if self.logger is not None:
                self.logger.log(agent.num_timesteps, scalars)
            if scalars["eval/mean_reward"] > self.best:
                self.best = scalars["eval/mean_reward"]
                save_without_memory(agent, self.folder / "best.pt")
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


def _inside(env: Any) -> set[int]:
    """The identities of an environment and of those it wraps."""
    found: set[int] = set()
    while env is not None and id(env) not in found:
        found.add(id(env))
        env = getattr(env, "env", None) or getattr(env, "venv", None)
    return found


class StopOnSignal(Callback):
    """Ctrl-C (SIGINT) and SIGTERM end training after the iteration that runs, whose state can be saved; half an
    iteration's cannot. The second signal acts at once. Put it last in the list, behind the one that saves."""

    def __init__(self) -> None:
        self._signals = DeferredSignals()

    @property
    def received(self) -> str | None:
        """Name of the signal that ended training."""
        return self._signals.received

    def reads(self, iteration: int) -> bool:
        return False

    def on_training_start(self, agent: Any) -> None:
        self._signals.__enter__()

    def on_iteration(self, agent: Any) -> bool | None:
        return False if self.received else None

    def on_training_end(self, agent: Any) -> None:
        self._signals.__exit__()


class StopOnReward(Callback):
    """Ends training when the mean raw return of the last 100 training episodes reaches ``threshold``."""

    @checked
    def __init__(self, threshold: Finite) -> None:
        self.threshold = threshold

    def reads(self, iteration: int) -> bool:
        return False

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
    several = isinstance(callback, Sequence) and not isinstance(callback, str | bytes)
    given: Sequence[Any] = [] if callback is None else callback if several else [callback]  # type: ignore[assignment]
    found = [c if isinstance(c, Callback) else FunctionCallback(c) for c in given]
    keys = [c.key for c in found]
    twice = sorted({k for k in keys if keys.count(k) > 1 and found[keys.index(k)].state_dict()})
    if twice:
        raise ValueError(f"callbacks: {twice} occur twice and would overwrite each other's state; override their key")
    return found


@contextmanager
def running(callbacks: Sequence[Callback], agent: Any) -> Iterator[None]:
    """Calls ``on_training_start`` of all before, and ``on_training_end`` after what is inside, in the same order.

    Every callback that started has its end, also if others fail: a checkpoint is not skipped and a signal handler does
    not stay. The first error is raised when all had their turn.
    """
    started: list[Callback] = []
    try:
        for callback in callbacks:
            started.append(callback)
            callback.on_training_start(agent)
        yield
    except BaseException:
        _end(started, agent, raises=False)
        raise
    _end(started, agent, raises=True)


def _end(started: Sequence[Callback], agent: Any, raises: bool) -> None:
    first: BaseException | None = None
    for callback in started:
        try:
            callback.on_training_end(agent)
        except BaseException as error:
            first = first or error
            if not raises or error is not first:
                where = f"{type(callback).__name__} at the end of training"
                print(f"[ccrl] {where}: {type(error).__name__}: {error}", flush=True)
    if raises and first is not None:
        raise first
