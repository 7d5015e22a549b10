"""Evaluate a run: raw returns, frozen observation statistics, deterministic and stochastic.

python scripts/evaluate.py runs/HalfCheetah-v5__mdpo__0__...            # newest checkpoint
python scripts/evaluate.py RUN --checkpoint best --episodes 20
python scripts/evaluate.py RUN --video                                  # videos/*.mp4 in the run folder
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import tyro

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

import agents
import envs
from ccrl import registry
from ccrl.batched_env import BatchedEnv, evaluation_env
from ccrl.experiment import checkpoint
from ccrl.experiment.evaluation import evaluate_agent
from ccrl.experiment.files import write_atomic
from ccrl.experiment.logger import digits
from ccrl.experiment.run import RunFolder
from ccrl.experiment.video import record_video
from ccrl.settings import Count, Natural, Settings

__all__ = ["EvaluateConfig", "main"]


@dataclass(frozen=True)
class EvaluateConfig(Settings):
    """What to evaluate and how."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run has this folder."""
    checkpoint: str = "latest"
    """The checkpoint is the newest (latest), that of the highest deterministic evaluation while training (best), or a
    file."""
    episodes: Count = 10
    """So many episodes of each kind are played."""
    seed: Natural = 20_000
    """The evaluation environments have this seed; training and its evaluations use others."""
    samples: Count = 16
    """Language models give this many completions per test question for pass@k."""
    video: bool = False
    """One deterministic episode is filmed too, headless."""
    video_format: Literal["mp4", "gif"] = "mp4"
    """The video is an mp4 or a gif."""
    fps: Count = 30
    """The video has this many frames per second."""
    device: str = "cpu"
    """Networks are on this device."""
    trust: tuple[str, ...] = ()
    """The run's files may import these names, module:name; all others that are not registered are refused."""


def main(config: EvaluateConfig) -> dict[str, float]:
    """Evaluate; print a table and write ``evaluation.json`` in the run folder. Returns the scalars."""
    torch.set_num_threads(1)
    run = RunFolder.open(config.run)
    with registry.stored(str(run.path), config.trust):
        return _evaluate(config, run)


def _evaluate(config: EvaluateConfig, run: RunFolder) -> dict[str, float]:
    path = run.checkpoint(config.checkpoint)
    if path is None:
        found = sorted(p.name for p in run.checkpoints.glob("*.pt"))
        why = f"; there are {', '.join(found)}" if found else "; a run writes its first after checkpoint_every steps"
        raise FileNotFoundError(f"{run.path}: expected a checkpoint {config.checkpoint!r}, found none{why}")
    info = run.info
    scene = _filmed(config, run) if config.video else None
    agent = agents.get_agent(info["agent"]).load(path, scene, config.device, trust=config.trust)
    if config.video and not agent.steps_env:
        raise ValueError("video: an agent that steps no environment has nothing to film; leave --video out")
    options = {"device": config.device, **agent.env_kwargs}
    env = scene
    if scene is None and agent.steps_env:
        env = evaluation_env(info["env"], config.episodes, "test", **options)
    scalars: dict[str, float] = {"steps": float(agent.num_timesteps)}
    for kind in ("deterministic", "stochastic"):
        result = evaluate_agent(agent, env, config.episodes, config.seed, kind == "deterministic")
        scalars |= result.scalars(kind)
        returns, length = result.returns, result.lengths.mean()
        print(
            f"{kind:>13}: {digits(returns.mean()):>10} +- {digits(returns.std())}  (episodes {config.episodes}, "
            f"length {digits(length)}, min {digits(returns.min())}, max {digits(returns.max())})"
        )
    if env is not None:
        env.close()
    if hasattr(agent, "pass_at"):
        ks = (1, config.samples // 4, config.samples) if config.samples >= 8 else (1, config.samples)
        found = agent.pass_at(ks, config.episodes, config.samples, config.seed)
        print("       sampled: " + ", ".join(f"{name} {digits(value)}" for name, value in found.items()))
        scalars |= found
    text_of = json.dumps(scalars | {"checkpoint": str(path.name)}, indent=2) + "\n"
    write_atomic(run.path / "evaluation.json", lambda file: file.write(text_of.encode()))
    if scene is not None:
        print(f"video of the first steps, by the simulator: {run.videos}")
    elif config.video:
        # render_mode is an option of the environment: without it a window or a renderer may never be made
        scene = evaluation_env(info["env"], 1, "test", **options)
        target = run.videos / f"step_{agent.num_timesteps}.{config.video_format}"
        score = record_video(scene, agent.acting(), target, fps=config.fps, seed=config.seed)
        scene.close()
        print(f"video of one deterministic episode (return {digits(score)}): {target}")
    return scalars


def _filmed(config: EvaluateConfig, run: RunFolder) -> BatchedEnv | None:
    """The environment of a simulator that films by itself, from its first step on; None: ours does not."""
    if str(run.info["env"]).partition(":")[0] not in envs.LAB_FAMILIES:
        return None
    trained = run.config()
    options = trained.get("env_kwargs", {}) | {"video": str(run.videos)}
    return envs.make(run.info["env"], trained["agent"]["num_envs"], device=config.device, **options)


if __name__ == "__main__":
    sys.path.append(os.getcwd())  # for --trust; last, so that it shadows nothing
    options = tyro.cli(EvaluateConfig, description=__doc__)
    try:
        main(options)
    except (ValueError, ImportError, OSError, checkpoint.CheckpointError) as failure:
        sys.exit(f"error: {failure}")
