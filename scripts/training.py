"""Trainings as configurations say: what ``train.py`` builds and runs, and the other scripts with it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from ccrl.packages import check_siblings, require

check_siblings("agents", "envs")

import agents
import envs  # noqa: F401  (registers its ids)
from ccrl import registry
from ccrl.batched_env import evaluation_env
from ccrl.experiment import callbacks as hooks
from ccrl.experiment import checkpoint
from ccrl.experiment import config as configs
from ccrl.experiment.csv_table import read_columns
from ccrl.experiment.files import WriteError
from ccrl.experiment.logger import Logger, digits
from ccrl.experiment.progress import shares
from ccrl.experiment.run import RunFolder
from ccrl.experiment.tracking import Service, Tracker
from ccrl.settings import Count, Natural, Settings
from scripts.group import Group, check_number
from scripts.overlays import tuned_settings
from scripts.whole_paths import whole_paths, with_prompts

__all__ = ["TrainConfig", "Training", "build", "from_flags", "resume", "run_config", "timed", "train"]


@dataclass(frozen=True)
class TrainConfig(Settings):
    """One training run. The agent's own settings follow under ``agent`` (on the command line without a prefix)."""

    env: str = "HalfCheetah-v5"
    """The environment has this id: Gymnasium's, ours (ccrl/...), or module:name."""
    total_timesteps: Count = 1_000_000
    """Training takes this many environment steps."""
    seed: Natural = 0
    """One number seeds networks, environments, action noise and shuffling."""
    device: str = "cpu"
    """Networks and buffers are on this device, as PyTorch names it."""
    run_root: Path = Path("runs")
    """The run folder is made in this folder."""
    checkpoint_every: Count = 100_000
    """A checkpoint is written every so many environment steps, and one more at the end."""
    keep_checkpoints: Count = 3
    """Only this many of the newest checkpoints are kept."""
    eval_every: Natural = 50_000
    """The agent is evaluated every so many environment steps; 0 never evaluates."""
    eval_episodes: Count = 10
    """An evaluation plays this many episodes, deterministic and stochastic each."""
    log_interval: Count = 1
    """A row of progress.csv and TensorBoard is written every so many iterations; only for a row are statistics taken
    that cost a forward pass of their own."""
    progress: bool = True
    """A progress bar is shown, on a terminal."""
    tensorboard: bool = True
    """TensorBoard events are written."""
    track: Service = "none"
    """The same scalars, the configuration and the last checkpoint go to this service too."""
    track_project: str = "ccrl"
    """The service files the run under this project."""
    torch_threads: Count = 1
    """Torch's operators use this many threads: more than one slows small networks down and fights the simulator's
    threads."""
    env_kwargs: configs.Options = field(default_factory=dict)
    """These constructor options go to the environment, under Gymnasium's names, as JSON."""


@dataclass(frozen=True)
class TextConfig(TrainConfig):
    """One training run of a language model. Its clock counts completions."""

    env: str = "arithmetic"
    """The text task has this name, or module:name (``--task``); its options go into env_kwargs."""
    prompts: Path | None = None
    """The prompts are in this file, one JSON object per line: the task is then jsonl."""
    test_prompts: Path | None = None
    """The test questions are in this file; without one a tenth of the prompts are held out."""
    reward: tuple[str, ...] = ()
    """The reward of a completion is what these say, a component each: functions, as module:function, and reward models,
    as folders of classifiers with one output; without one it is 1 for a completion that equals the line's answer."""
    tools: tuple[str, ...] = ()
    """Completions of the prompts may call these tools: calculator, or functions as module:function."""
    total_timesteps: Count = 20_000
    """Training takes this many completions."""
    checkpoint_every: Count = 5_000
    """A checkpoint is written every so many completions, and one more at the end."""
    eval_every: Natural = 2_000
    """The agent is evaluated every so many completions; 0 never evaluates."""
    eval_episodes: Count = 256
    """An evaluation asks this many test questions, with one greedy and one sampled completion each."""


@dataclass(frozen=True)
class FlowConfig(TrainConfig):
    """One training run of a flow policy on a generation task. Its clock counts samples."""

    env: str = "ring2d"
    """The generation task has this name, or module:name; its options go into env_kwargs."""
    total_timesteps: Count = 40_000
    """Training takes this many samples."""
    checkpoint_every: Count = 10_000
    """A checkpoint is written every so many samples, and one more at the end."""
    eval_every: Natural = 4_000
    """The agent is evaluated every so many samples; 0 never evaluates."""
    eval_episodes: Count = 256
    """An evaluation takes this many samples, conditions in turn."""


def run_config(agent: str, settings: Mapping[str, Any] | None = None) -> type[Any]:
    """``TrainConfig`` (of language models ``TextConfig``, of flow policies ``FlowConfig``) with the settings of
    ``agent`` nested under ``agent``.

    :param settings: settings of the agent that are known; grouped's ``method`` decides which others there are.
    """
    found = agents.get_agent(agent, settings)
    alone = FlowConfig if not getattr(found, "steps_env", True) else TrainConfig
    cls, base = found.Config, TextConfig if is_text(found) else alone
    nested: Any = tyro.conf.OmitArgPrefixes
    own: list[Any] = [("agent", nested[cls], field(default_factory=cls))]
    if example := getattr(found, "example_env", None):  # one that the agent accepts
        own.append(("env", str, field(default=example)))
    made = make_dataclass("RunConfig", own, bases=(base,), frozen=True)
    made.__doc__ = f"Train {agent}: {base.__doc__}"
    return made


def is_text(cls: type[Any]) -> bool:
    """Whether an agent trains on text tasks: there is then no environment to build."""
    return getattr(cls, "text", False)


@contextmanager
def timed(run: RunFolder, learner: Any, evaluation: hooks.EvalCallback | None) -> Iterator[None]:
    """Writes ``finished`` into ``run.json`` after training that was not broken off: ``step``, the training return of
    the last 100 episodes, and wall and CPU seconds and steps per second, all without evaluation and since ``since``
    (a resumed run starts its clocks anew)."""
    since, wall, cpu = learner.num_timesteps, time.perf_counter(), time.process_time()
    yield
    seconds = time.perf_counter() - wall - (evaluation.seconds if evaluation else 0.0)
    cpu_seconds = time.process_time() - cpu - (evaluation.cpu_seconds if evaluation else 0.0)
    run.record(finished={
        "step": learner.num_timesteps, "ep_rew_mean": learner.ep_rew_mean, "since": since, "seconds": seconds,
        "cpu_seconds": cpu_seconds, "steps_per_second": (learner.num_timesteps - since) / max(seconds, 1e-9),
    })  # fmt: skip


def summary(run: RunFolder, agent: Any) -> str:
    """Of a training that has ended: evaluations, speed, where the time went, and which files there are."""
    finished, lines = run.info["finished"], []
    if (run.path / "eval.csv").is_file():
        table = read_columns(run.path / "eval.csv")
        returns, steps = table.get("eval/mean_reward", np.zeros(0)), table.get("step", np.zeros(0))
        if len(returns):
            best = int(returns.argmax())
            lines.append(f"evaluation: {digits(float(returns[-1]))} at the end, at best {digits(float(returns[best]))} "
                         f"after {int(steps[best]):,} (best.pt)")  # fmt: skip
    lines.append(f"speed: {finished['steps_per_second']:,.0f} steps/s, {finished['seconds']:.0f} s without evaluation")
    found = shares(agent.learner.times)
    lines.append("time: " + ", ".join(f"{name} {100 * share:.0f} %" for name, share in found.items()))
    names = ("config.yaml", "run.json", "progress.csv", "eval.csv", "best.pt", "checkpoints")
    lines.append(f"files: {', '.join(name for name in names if (run.path / name).exists())} in {run.path}")
    return "\n".join(f"[ccrl] {line}" for line in lines)


@dataclass(frozen=True)
class Training:
    """A run that can begin: calling it trains."""

    config: Any
    run: RunFolder
    agent: Any
    resumed_from: int | None
    """Step of the checkpoint; None: a new run."""
    eval_env: Any
    owner: Any
    """Holds the run folder for this process."""
    group: Group | None = None
    """The processes of this training, where there are several."""

    def __call__(self) -> RunFolder:
        """Train, and print the end. ``SystemExit`` with how to go on, after Ctrl-C or SIGTERM and where the disk takes
        no more."""
        try:
            return self._train()
        except WriteError as error:
            sys.exit(f"error: {error.strerror}; make room or the folder writable, then {self._how_to_go_on()}")
        finally:
            self.owner.release()

    def _how_to_go_on(self) -> str:
        saved = checkpoint.latest(self.run.checkpoints)
        if saved is None:
            return "start again: nothing was saved"
        return f"it goes on from {saved.name} with --resume {self.run.path}"

    def _train(self) -> RunFolder:
        config, run, agent, step = self.config, self.run, self.agent, self.resumed_from
        events = f"\n[ccrl] tensorboard --logdir {run.path}" if config.tensorboard else ""
        print(f"[ccrl] run folder: {run.path}{events}", flush=True)
        tracker = Tracker.of(config.track, config.track_project, run, configs.to_dict(config))
        also = None if tracker is None else tracker.log
        logger = Logger(run.path, tensorboard=config.tensorboard, resume_step=step, also=also)
        stop = hooks.StopOnSignal()
        if step is None:
            logger.log_hparams(configs.flatten(configs.to_dict(config)))
        callbacks: list[hooks.Callback] = [hooks.LogCallback(logger, config.log_interval)]
        if hasattr(agent, "last_completions"):
            callbacks.append(hooks.SamplesCallback(logger))
        evaluation = None
        if config.eval_every:
            evaluation = hooks.EvalCallback(self.eval_env, run.path, config.eval_every, config.eval_episodes,
                                            logger=logger, resume_step=step)  # fmt: skip
            callbacks.append(evaluation)
        callbacks += [hooks.CheckpointCallback(run.checkpoints, config.checkpoint_every, config.keep_checkpoints), stop]
        try:
            with timed(run, agent, evaluation):
                agent.learn(callback=callbacks, progress_bar=config.progress, until=config.total_timesteps)
                if stop.received and agent.num_timesteps < config.total_timesteps:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            total = f"{agent.num_timesteps:,} of {config.total_timesteps:,} steps"
            sys.exit(f"[ccrl] stopped at {total}; {self._how_to_go_on()}")
        finally:
            logger.close()
            agent.close()
            if self.eval_env is not None:
                self.eval_env.close()
            if tracker is not None:  # last: nothing of ours stays open where a service cannot be reached
                tracker.finish(checkpoint.latest(run.checkpoints))
        mean, count = agent.ep_rew_mean, len(agent.episodes)
        score = "no episode ended" if mean is None else f"mean return of the last {count} episodes {digits(mean)}"
        print(summary(run, agent), flush=True)
        print(f"[ccrl] {agent.num_timesteps:,} steps, {score}; run folder: {run.path}", flush=True)
        if self.group is not None:
            self.group.processes.close()
        return run


def build(
    agent_name: str, config: Any, resume: Path | None = None, trust: Collection[str] = ()
) -> Callable[[], RunFolder]:
    """A training as ``config`` (of ``run_config(agent_name)``) says, in a new run folder or on in ``resume``. What does
    not fit together fails here; the result trains when it is called (and does nothing for a finished run).

    :param trust: names ``module:name`` in the folder that may import, see ``ccrl.registry.stored``.
    """
    torch.set_num_threads(config.torch_threads)
    if config.track != "none":
        require(config.track, config.track)
    elif config.track_project != TrainConfig.track_project:
        raise configs.ConfigError("track_project: expected a service to use it, got track 'none'; set track")
    cls, group = agents.get_agent(agent_name), Group.join(config)
    if resume is None:
        config = whole_paths(with_prompts(config))
        own = config if group is None else group.own(config)
        agent = cls(own.env, own.agent, seed=own.seed, device=own.device, env_kwargs=own.env_kwargs)
        if group is not None:
            group.enter(agent, restored=False)
            if not group.lead:
                return group.follow(own, group.open(None), agent)
        eval_env = _eval_env(cls, own)
        # last of all: the folder of a run that could not begin would only be in the way
        run = RunFolder.create(config.run_root, config.env, agent_name, config.seed, config)
        _note_resume(run, agent)
        if group is not None:
            group.open(run)
        return Training(own, run, agent, None, eval_env, run.own(), group)
    run = RunFolder.open(resume)
    check_number(run)
    own = config if group is None else group.own(config)
    if group is not None and not group.lead:
        agent = _restore(cls, run, own, trust, group)
        done = "finished" in run.info and agent.num_timesteps >= own.total_timesteps
        return (lambda: run) if done else group.follow(own, run, agent)
    owner = run.own()  # first: the run may still be at it
    try:
        agent = _restore(cls, run, own, trust, group)
        step = agent.num_timesteps
        if "finished" in run.info and step >= config.total_timesteps:
            print(f"[ccrl] {run.path} is finished: {step:,} of {config.total_timesteps:,} steps. To train on, raise "
                  f"total_timesteps in {run.config_file} and resume it again", flush=True)  # fmt: skip
            owner.release()
            return lambda: run
        eval_env = _eval_env(cls, own)
        run.record_resume(step)
        _note_resume(run, agent)
        return Training(own, run, agent, step, eval_env, owner, group)
    except BaseException:
        owner.release()
        raise


def _eval_env(cls: type[Any], config: Any) -> Any:
    if not config.eval_every or not getattr(cls, "steps_env", True):
        return None
    return evaluation_env(config.env, config.eval_episodes, "dev", device=config.device, **config.env_kwargs)


def _note_resume(run: RunFolder, agent: Any) -> None:
    # null, or why a resumed run is not the run that would have gone on: its environments start fresh episodes
    run.record(resume_note=getattr(getattr(agent, "collector", None), "resume_note", None))


def train(agent_name: str, config: Any, resume: Path | None = None, trust: Collection[str] = ()) -> RunFolder:
    """Build and train."""
    return build(agent_name, config, resume, trust)()


def _restore(cls: type[Any], run: RunFolder, config: Any, trust: Collection[str], group: Group | None = None) -> Any:
    """The agent of the newest checkpoint; ``config.yaml`` must still say of it what the checkpoint does."""
    path = checkpoint.latest(run.checkpoints) if group is None else group.checkpoint(run)
    if path is None:
        raise FileNotFoundError(f"{run.path}: expected a checkpoint to resume from, found none; start a new run")
    agent = cls.load(path, device=config.device, trust=trust, restore_rng=True)
    mine = _facts(config.env, config.seed, config.env_kwargs, config.agent)
    saved = _facts(agent.env_id, agent.seed, agent.env_kwargs, agent.config)
    if different := sorted(k for k in mine.keys() | saved.keys() if mine.get(k) != saved.get(k)):
        pairs = ", ".join(f"{k}: expected {saved.get(k)!r}, got {mine.get(k)!r}" for k in different)
        raise configs.ConfigError(f"{run.config_file} was changed since {path.name} ({pairs}); a run keeps these "
                                  "settings: put them back, or start a new run")  # fmt: skip
    if group is not None:
        group.enter(agent, restored=True)
    return agent


def _facts(env: str, seed: int, env_kwargs: dict[str, Any], settings: Any) -> dict[str, Any]:
    nested = {"env": env, "seed": seed, "env_kwargs": env_kwargs, "agent": configs.to_dict(settings)}
    return configs.flatten(json.loads(json.dumps(nested, default=str)))  # as YAML gives them back: tuples are lists


def resume(folder: str, trust: Collection[str] = ()) -> Callable[[], RunFolder]:
    """The training of a run folder, built to go on with the folder's own settings."""
    run = RunFolder.open(folder)
    name, values = run.info["agent"], run.config()
    with registry.stored(str(run.path), trust):
        config = configs.from_dict(run_config(name, values.get("agent")), values)
        return build(name, config, Path(folder), trust)


def from_flags(name: str, flags: list[str], overlay: str | None = None) -> Callable[[], RunFolder]:
    """The training of the agent ``name`` that flags ask for, over those of the YAML file ``overlay``, built."""
    if "--tuned" in flags:
        overlay, flags = tuned_settings(name, flags, run_config(name).__dataclass_fields__["env"].default, overlay)
    settings = (configs.load_yaml(overlay) if overlay else {}).get("agent") or {}
    if "--method" in flags[:-1]:
        settings = settings | {"method": flags[flags.index("--method") + 1]}
    # the file may be somebody else's: of its names only those that the command line repeats may import
    words = [name, *(part for word in flags for part in word.split("=", 1))]
    with nullcontext() if overlay is None else registry.stored(overlay, words):
        return build(name, configs.parse(run_config(name, settings), flags, overlay, prog=f"train.py {name}"))
