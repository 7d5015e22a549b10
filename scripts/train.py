"""Train an agent: one command, one run folder.

python scripts/train.py mdpo --env HalfCheetah-v5
python scripts/train.py ppo --env Hopper-v5 --total-timesteps 300000 --num-envs 8 --learning-rate 1e-4
python scripts/train.py ppo --env Hopper-v5 --config my.yaml        # flags win over the file
python scripts/train.py --resume runs/HalfCheetah-v5__mdpo__0__...  # continues bit for bit
python scripts/train.py llm --method grpo --task arithmetic         # a language model on a text task
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import tyro

from ccrl.packages import check_siblings

check_siblings()

import agents
import envs
from ccrl.experiment import checkpoint
from ccrl.experiment import config as configs
from ccrl.experiment.callbacks import Callback, CheckpointCallback, EvalCallback, LogCallback
from ccrl.experiment.logger import Logger
from ccrl.experiment.run import RunFolder

__all__ = ["TrainConfig", "main", "run_config", "timed", "train"]


@dataclass(frozen=True)
class TrainConfig:
    """One training run. The agent's own settings follow under ``agent`` (on the command line without a prefix)."""

    env: str = "HalfCheetah-v5"
    """Environment id: Gymnasium's, ours (ccrl/...), or module:id."""
    total_timesteps: int = 1_000_000
    """Environment steps."""
    seed: int = 0
    """Seeds networks, environments, action noise and shuffling."""
    device: str = "cpu"
    """Where networks and buffers are."""
    run_root: Path = Path("runs")
    """Folder that the run folder is made in."""
    checkpoint_every: int = 100_000
    """Environment steps between checkpoints (one more at the end)."""
    keep_checkpoints: int = 3
    """Newest checkpoints kept."""
    eval_every: int = 50_000
    """Environment steps between evaluations; 0: none."""
    eval_episodes: int = 10
    """Episodes per evaluation, deterministic and stochastic each."""
    log_interval: int = 1
    """Iterations between rows of progress.csv and TensorBoard."""
    progress: bool = True
    """Progress bar, on a terminal."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    torch_threads: int = 1
    """Threads of torch's operators: more than one slows small networks down and fights the simulator's threads."""
    env_kwargs: configs.Options = field(default_factory=dict)
    """Constructor options of the environment, under Gymnasium's names, as JSON."""


@dataclass(frozen=True)
class TextConfig(TrainConfig):
    """One training run of a language model. Its clock counts completions."""

    env: str = "arithmetic"
    """Text task (``--task``); its options go into env_kwargs."""
    total_timesteps: int = 20_000
    """Completions."""
    checkpoint_every: int = 5_000
    """Completions between checkpoints (one more at the end)."""
    eval_every: int = 2_000
    """Completions between evaluations; 0: none."""
    eval_episodes: int = 256
    """Test questions per evaluation, one greedy and one sampled completion each."""


def run_config(agent: str) -> type[Any]:
    """``TrainConfig`` (of language models ``TextConfig``) with the settings of ``agent`` nested under ``agent``."""
    found = agents.get_agent(agent)
    cls, base = found.Config, TextConfig if is_text(found) else TrainConfig
    nested = (tyro.conf.OmitArgPrefixes[cls], field(default_factory=cls))
    made = make_dataclass("RunConfig", [("agent", *nested)], bases=(base,), frozen=True)
    made.__doc__ = f"Train {agent}: {base.__doc__}"
    return made


def is_text(cls: type[Any]) -> bool:
    """Whether an agent trains on text tasks: there is then no environment to build."""
    return getattr(cls, "text", False)


@contextmanager
def timed(run: RunFolder, learner: Any, evaluation: EvalCallback | None) -> Iterator[None]:
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


def train(agent_name: str, config: Any, resume: Path | None = None) -> RunFolder:
    """Train as ``config`` (of ``run_config(agent_name)``) says, in a new run folder or on in ``resume``."""
    torch.set_num_threads(config.torch_threads)
    cls, step = agents.get_agent(agent_name), None
    if resume is None:
        run = RunFolder.create(config.run_root, config.env, agent_name, config.seed, config)
        options = {"seed": config.seed, "device": config.device, "env_kwargs": config.env_kwargs}
        agent = cls(config.env, config.agent, **options)
    else:
        run = RunFolder.open(resume)
        path = checkpoint.latest(run.checkpoints)
        if path is None:
            raise FileNotFoundError(f"{run.path}: expected a checkpoint to resume from, found none; start a new run")
        agent = cls.load(path, device=config.device)
        step = agent.num_timesteps
        run.record_resume(step)
    print(f"[ccrl] run folder: {run.path}\n[ccrl] tensorboard --logdir {run.path}", flush=True)
    logger = Logger(run.path, tensorboard=config.tensorboard, resume_step=step)
    if step is None:
        logger.log_hparams(configs.flatten(configs.to_dict(config)))
    callbacks: list[Callback] = [LogCallback(logger, config.log_interval)]
    evaluation = eval_env = None
    if config.eval_every:
        if not is_text(cls):
            eval_env = envs.make(config.env, config.eval_episodes, device=config.device, **config.env_kwargs)
        evaluation = EvalCallback(eval_env, run.path, config.eval_every, config.eval_episodes, logger=logger,
                                  resume_step=step)  # fmt: skip
        callbacks.append(evaluation)
    callbacks.append(CheckpointCallback(run.checkpoints, config.checkpoint_every, config.keep_checkpoints))
    try:
        with timed(run, agent, evaluation):
            agent.learn(config.total_timesteps, callbacks, progress_bar=config.progress)
    finally:
        logger.close()
        for env in (agent.env, eval_env):
            if env is not None:
                env.close()
    mean = agent.ep_rew_mean
    score = "no episode ended" if mean is None else f"mean return of the last {len(agent.episodes)} episodes {mean:.1f}"
    print(f"[ccrl] {agent.num_timesteps:,} steps, {score}; run folder: {run.path}", flush=True)
    return run


def text_arguments(argv: list[str]) -> list[str]:
    """``--method M --task T [flags]`` as the arguments of the agent M with the environment T."""
    if "--method" not in argv or argv.index("--method") + 1 == len(argv):
        sys.exit(f"usage: train.py llm --method {{{','.join(sorted(agents.METHODS))}}} [--task TASK] [flags]")
    index = argv.index("--method")
    rest = argv[:index] + argv[index + 2 :]
    return [argv[index + 1], *("--env" if word == "--task" else word for word in rest)]


def main(argv: list[str]) -> RunFolder:
    """Command line: ``AGENT [flags]`` or ``--resume RUN``."""
    if "--resume" in argv:
        index = argv.index("--resume")
        if len(argv) != 2 or index != 0:
            sys.exit("usage: train.py --resume RUN (a run continues with its own settings; no other flags)")
        run = RunFolder.open(argv[1])
        name = run.info["agent"]
        return train(name, configs.from_dict(run_config(name), run.config()), Path(argv[1]))
    if argv[:1] == ["llm"]:
        argv = text_arguments(argv[1:])
    if not argv or argv[0] not in agents.AGENTS | agents.METHODS:
        sys.exit(f"usage: train.py {{{','.join(sorted(agents.AGENTS))}}} [flags] | llm --method "
                 f"{{{','.join(sorted(agents.METHODS))}}} [flags] | --resume RUN; received "
                 f"{argv[:1] or 'nothing'}")  # fmt: skip
    name, rest = argv[0], argv[1:]
    overlay = None
    if "--config" in rest:
        index = rest.index("--config")
        if index + 1 == len(rest):
            sys.exit("--config: expected a YAML file after it")
        overlay, rest = rest[index + 1], rest[:index] + rest[index + 2 :]
    return train(name, configs.parse(run_config(name), rest, overlay, prog=f"train.py {name}"))


if __name__ == "__main__":
    main(sys.argv[1:])
