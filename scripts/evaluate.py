"""Evaluate a run: raw returns, frozen observation statistics, deterministic and stochastic.

python scripts/evaluate.py runs/HalfCheetah-v5__mdpo__0__...            # newest checkpoint
python scripts/evaluate.py RUN --checkpoint best --episodes 20
python scripts/evaluate.py RUN --video                                  # videos/*.mp4 in the run folder
"""

from __future__ import annotations

import json
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
from ccrl.experiment import checkpoint
from ccrl.experiment.evaluation import evaluate_agent
from ccrl.experiment.run import RunFolder
from ccrl.experiment.video import record_video

__all__ = ["EvaluateConfig", "main"]


@dataclass(frozen=True)
class EvaluateConfig:
    """What to evaluate and how."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    checkpoint: str = "latest"
    """latest, best (highest deterministic evaluation while training) or a file."""
    episodes: int = 10
    """Episodes of each kind."""
    seed: int = 20_000
    """Seeds the evaluation environments; training and its evaluations use others."""
    samples: int = 16
    """Language models: completions per test question for pass@k."""
    video: bool = False
    """Also record one deterministic episode (mp4), headless."""
    video_format: Literal["mp4", "gif"] = "mp4"
    """mp4 or gif."""
    fps: int = 30
    """Frames per second of the video."""
    device: str = "cpu"
    """Where networks are."""

    def __post_init__(self) -> None:
        for name in ("episodes", "samples", "fps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected >= 1, got {getattr(self, name)}")


def main(config: EvaluateConfig) -> dict[str, float]:
    """Evaluate; print a table and write ``evaluation.json`` in the run folder. Returns the scalars."""
    torch.set_num_threads(1)
    run = RunFolder.open(config.run)
    path = {"latest": checkpoint.latest(run.checkpoints), "best": run.path / "best.pt"}.get(
        config.checkpoint, Path(config.checkpoint)
    )
    if path is None or not path.is_file():
        found = sorted(p.name for p in run.checkpoints.glob("*.pt"))
        why = f"; there are {', '.join(found)}" if found else "; a run writes its first after checkpoint_every steps"
        raise FileNotFoundError(f"{run.path}: expected a checkpoint {config.checkpoint!r}, found none{why}")
    info = run.info
    agent = agents.get_agent(info["agent"]).load(path, device=config.device)
    text = getattr(agent, "text", False)
    if text and config.video:
        raise ValueError("video: a language model has nothing to film; leave --video out")
    env = None if text else envs.make(info["env"], config.episodes, device=config.device, **agent.env_kwargs)
    scalars: dict[str, float] = {"steps": float(agent.num_timesteps)}
    for kind in ("deterministic", "stochastic"):
        result = evaluate_agent(agent, env, config.episodes, config.seed, kind == "deterministic")
        scalars |= result.scalars(kind)
        returns, length = result.returns, result.lengths.mean()
        print(
            f"{kind:>13}: {returns.mean():10.2f} +- {returns.std():.2f}  (episodes {config.episodes}, "
            f"length {length:.1f}, min {returns.min():.2f}, max {returns.max():.2f})"
        )
    if env is not None:
        env.close()
    if text:
        ks = (1, config.samples // 4, config.samples) if config.samples >= 8 else (1, config.samples)
        found = agent.pass_at(ks, config.episodes, config.samples, config.seed)
        print("       sampled: " + ", ".join(f"{name} {value:.4f}" for name, value in found.items()))
        scalars |= found
    (run.path / "evaluation.json").write_text(json.dumps(scalars | {"checkpoint": str(path.name)}, indent=2) + "\n")
    if config.video:
        # render_mode is an option of the environment: without it a window or a renderer may never be made
        scene = envs.make(info["env"], 1, device=config.device, **agent.env_kwargs)
        target = run.videos / f"step_{agent.num_timesteps}.{config.video_format}"
        score = record_video(scene, agent.acting(), target, fps=config.fps, seed=config.seed)
        scene.close()
        print(f"video of one deterministic episode (return {score:.2f}): {target}")
    return scalars


if __name__ == "__main__":
    options = tyro.cli(EvaluateConfig, description=__doc__)
    try:
        main(options)
    except (ValueError, ImportError, OSError, checkpoint.CheckpointError) as failure:
        sys.exit(f"error: {failure}")
